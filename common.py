"""What all files share: numbers, bad input, processes, shape checks, devices, checkpoints.

Letters of shapes, one meaning each in all code; any other axis is a word:
    B batch                   S frames of a group (5)      T frames of a clip or video
    R reference pictures      C channels, C_i of stage i   D width of an audio feature
    H W pixels                h w feature map              L audio features of a sound, 25 a second
    N sound samples           F selected audio features    K points of a face
    P points of lips and jaw  M channels of SPADE's map    E width of an embedding
    U tokens of a text        V kinds of token             G groups of S frames in a clip
    X false sounds
The network's points and lips are (x, y) in picture widths. Its points [B, R, 2, K, 2]: [:, :, 0]
where a face's points lie in each reference, [:, :, 1] where they would lie with the frame's head
pose. Landmarks, outside of the network, are pixels, of the frame or of the 256 px crop.
Stage mouth teaches where lips lie (LipHead); stage lip the lip reader, which reads words.
"""
import contextlib
import contextvars
import multiprocessing
import os
import pathlib
import signal
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor

import cv2
import torch

SAMPLE_RATE = 16_000                              # Hz, S11
FPS = 25                                          # video frames and audio features a second, S11
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS            # 640
VERSION = 2                                       # of the checkpoint file
WEIGHTS = pathlib.Path(__file__).parent / "weights" / "edge.pt"  # where the user names none


# ---------------------------------------------------------------- bad input
class BadInput(ValueError):
    """What a user got wrong, in one line that names the file or the value; commands exit with 2."""


def cli(main):
    """Run `main()`; bad input becomes one line on stderr and exit 2, Ctrl-C and SIGTERM exit 130.

    Names that a terminal cannot print are escaped; a closed stdout or stderr stops nothing."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:      # closed streams: fill 0, 1 and 2
        pass
    os.close(null)
    sys.stdout = sys.stdout or open(1, "w")
    sys.stderr = sys.stderr or open(2, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill also cleans up
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                       # `| head`: what was to be written to files is
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (BadInput, OSError) as error:  # no such file, disk full, read-only, name too long
        named = isinstance(error, OSError) and error.filename is not None
        text = f"{error.filename}: {error.strerror}" if named else str(error)
        print("error: " + " ".join(text.split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def first_line(error):
    """An exception's first line, or its name where it says nothing"""
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:120]


# ---------------------------------------------------------------- processes and files
class WorkerPool(ProcessPoolExecutor):
    """Processes of one thread each. Ctrl-C, SIGTERM or an error inside `with` ends them at once,
    but for cleaning up; what they had not begun is left undone."""

    def __init__(self, count):
        super().__init__(count, multiprocessing.get_context("spawn"), begin_worker)

    def submit(self, job, /, *args, **kwargs):
        return super().submit(run_job, job, *args, **kwargs)

    def __exit__(self, kind, error, trace):
        if kind is None:
            return super().__exit__(kind, error, trace)
        self.shutdown(wait=False, cancel_futures=True)
        for attempt in range(20):  # one that does not heed it is killed at last
            processes = multiprocessing.active_children()
            for process in processes:
                stop = process.terminate if attempt < 19 else process.kill
                stop()
            for process in processes:
                process.join(1)


_worker = dict(busy=False, leaving=False)  # of this process


def begin_worker():
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, leave_worker)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")


def leave_worker(*_):
    """A job is ended by the first SIGTERM and cleans up undisturbed; an idle worker by any."""
    cleaning_up = _worker["busy"] and _worker["leaving"]
    _worker["leaving"] = True
    if not cleaning_up:
        sys.exit(130)


def run_job(job, *args, **kwargs):
    if _worker["leaving"]:
        sys.exit(130)
    _worker["busy"] = True
    try:
        return job(*args, **kwargs)
    finally:
        _worker["busy"] = False


def write_whole(path, content):
    """str or bytes into a file, through a link: whole or not at all."""
    path = pathlib.Path(os.path.realpath(path))
    part = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):x}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- shape checks and their trace
_rows = contextvars.ContextVar("trace_rows", default=None)


@contextlib.contextmanager
def trace():
    """Within it every `check` appends (name, axes, shape) to the yielded list."""
    rows = []
    token = _rows.set(rows)
    try:
        yield rows
    finally:
        _rows.reset(token)


def check(x, axes, name, low=None, high=None, **sizes):
    """Return x if its shape fits `axes`, else a ValueError names it, the axes and the shape got.

    axes: one letter, word or number per dimension, such as "B R 3 H W"; one that is repeated, or
    given in `sizes`, must have that size. low, high: allowed values; read only from CPU tensors,
    where looking costs no stall. Example: check(audio, "B F D", "fusion.audio", B=2, D=512).
    """
    if torch.compiler.is_compiling():             # checked eagerly; here shapes may be symbolic
        return x
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} must be a tensor [{axes}], got {type(x).__name__}")
    known, names = dict(sizes), axes.split()
    fits = x.dim() == len(names)
    for axis, size in zip(names, x.shape):
        wanted = int(axis) if axis.isdigit() else known.setdefault(axis, size)
        fits = fits and size == wanted
    if not fits:
        wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in names)
        raise ValueError(f"{name} must be [{wanted}], got {list(x.shape)}")
    if low is not None and x.device.type == "cpu" and x.numel():
        least, most = (value.item() for value in x.detach().aminmax())
        if not (low - 1e-3 <= least and most <= high + 1e-3):        # also refuses NaN
            raise ValueError(f"{name} must lie in {low}..{high}, got {least:.4g}..{most:.4g}")
    if _rows.get() is not None:
        _rows.get().append((name, axes, tuple(x.shape)))
    return x


# ---------------------------------------------------------------- devices and checkpoints
def pick_device(name="auto"):
    """"auto" -> cuda if there is one, else cpu; else the named device; BadInput if it is absent"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).item()  # "meta" holds no numbers
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"--device {name}: {first_line(error)}") from None


def fast_bfloat16(device):
    """Whether the device is fast at bfloat16: GPUs, and CPUs with AMX or AVX512-BF16."""
    able = torch.cpu.get_capabilities()
    return device.type == "cuda" or bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def autocast(device):
    """Computes in bfloat16 where that is fast; for training, whose weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


def save_checkpoint(path, content):
    """Write plain types and tensors; a kill at any moment leaves the old file or the new one."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:      # torch reports a full disk as RuntimeError
        raise BadInput(f"{path}: cannot be written ({first_line(error)}); "
                       "the old file is kept") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, kind="lipsync"):
    """What save_checkpoint wrote, on the CPU. BadInput if missing, broken, foreign or of another
    version."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such weights file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                             # truncated, no torch file, a pickle with code
        raise BadInput(f"{path}: not a checkpoint of this project, or damaged") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise BadInput(f"{path}: not a {kind} checkpoint of this project")
    if content.get("version") != VERSION:
        raise BadInput(f"{path}: of version {content.get('version')}, this code reads {VERSION}")
    return content


def load_pretrained(net, weights, source, name, remedy, strict=True):
    """Fill a network with torchvision's weights `source` of the network that is called `name`.

    weights: "imagenet", downloaded once, or the path of that file. strict=False: it holds more than
    `net` needs. BadInput if they are not to be had; offline it says the remedy, else the path."""
    try:
        if weights == "imagenet":
            state = source.get_state_dict(progress=True, check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        missing = net.load_state_dict(state, strict).missing_keys
        if missing:
            raise ValueError(f"no {missing[0]}")
    except Exception as error:  # no network, a broken download, no such file, one of another kind
        if weights == "imagenet":
            reason = f"{name} weights cannot be downloaded ({error}): fetch {source.url} elsewhere"
            raise BadInput(f"{reason} and pass {remedy}") from None
        reason = f"not {name} weights in torchvision's layout ({first_line(error)})"
        if isinstance(error, OSError):
            reason = f"cannot be read: {error.strerror or error}"
        raise BadInput(f"{weights}: {reason}; expected the file {source.url}") from None
