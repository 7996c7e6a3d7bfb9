"""S11: what ffmpeg reads, as frames at 25 a second and mono sound at 16 kHz; and back into a file.

    stage        | code                                              | patent
    ask          | probe, ffmpeg_reader                              | -
    sound        | read_audio                                        | S11: 16 kHz
    pictures     | read_frames, read_picture, frames_at              | S11: 25 fps
    writing      | VideoWriter, save_png                             | -
    dubbing      | play: forward, backward, forward; ahead: a thread | -

Letters as in common.py. Pictures are uint8 RGB, sound is float32, -1..1.
"""
import collections
import contextlib
import hashlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import wave as wave_file
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from common import FPS, SAMPLE_RATE, BadInput, write_whole

VIDEO_SUFFIXES = set(
    ".3gp .amv .asf .avi .divx .dv .f4v .flv .gif .m1v .m2ts .m2v .m4v .mkv .mov .mp4 "
    ".mpe .mpeg .mpg .mts .mxf .ogv .qt .rm .ts .vob .webm .wmv .y4m".split()
)
# Containers that hold their own data. Playlists and scripts (hls, dash, concat, image2 ...) would
# make ffmpeg open other files.
SAFE_FORMATS = (
    "aac,ac3,aiff,amr,apng,asf,au,avi,caf,dv,eac3,flac,flv,gif,h264,hevc,matroska,webm,mov,"
    "mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,w64,wav,wv,bmp_pipe,"
    "j2k_pipe,jpeg_pipe,png_pipe,tiff_pipe,webp_pipe,webp_anim,ivf,m4v,mjpeg,obu,y4m,yuv4mpegpipe"
)
MOST_PICTURE_BYTES = 1 << 28  # a longer file is no picture
SWING = 60 * FPS  # frames at a long video's end between which a longer sound swings,
SWING_BYTES = 8 << 30  # but no more than these, uncompressed: 14 s of 4K (on disk about half)
CHUNK_BYTES = 64 << 20  # backward play reads so much at a time
QUEUE = 12  # items that wait between two threads
EXACT = "accurate_rnd+full_chroma_int+bicubic"  # swscale's default truncates: a level too dark
# A time over ten minutes after the last one is damage: filling the gap would take hours.
NO_JUMP = "select='not(gt(t-if(isnan(prev_selected_t),0,prev_selected_t),600))'"
# The tags are set, since some files leave them out.
HDR_TO_BT709 = ("setparams=colorspace=bt2020nc:color_primaries=bt2020,"
                "zscale=transfer=linear:npl=203,format=gbrpf32le,zscale=primaries=bt709,"
                "tonemap=clip,zscale=transfer=bt709:matrix=bt709:range=tv,format=yuv420p")


# ---------------------------------------------------------------- ffmpeg
def ffmpeg_exe():
    import imageio_ffmpeg
    return imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg_input(path):
    """The first words of a command that reads one local file. BadInput if there is no such file."""
    if not os.path.exists(path):
        raise BadInput(f"{path}: no such file")
    if not os.path.isfile(path):
        raise BadInput(f"{path}: not a regular file")
    return [ffmpeg_exe(), "-nostdin", "-protocol_whitelist", "file,pipe",
            "-format_whitelist", SAFE_FORMATS]


@dataclass(frozen=True)
class Probe:
    """What ffmpeg says of a file: its first video and its default sound stream."""
    video: str  # ffmpeg's line about it, "" if there is none
    audio: int  # which sound stream, None if there is none
    placeless: bool  # its channels have a number, but no places (left, right ...)
    alpha_mode: bool  # a VP8 or VP9 whose transparency lies in a layer of its own
    picture: bool  # the file may be a still picture


def probe(path):
    """-> Probe. Raises BadInput as ffmpeg_input does."""
    command = [*ffmpeg_input(path), "-hide_banner", "-i", f"file:{path}"]
    text = subprocess.run(command, stderr=subprocess.PIPE).stderr.decode(errors="replace")
    streams = re.findall(r"^ *Stream #0:\d+.*?: (Video|Audio): (.*)$", text, re.M)
    sounds = [line for kind, line in streams if kind == "Audio"]
    pictures = [line for kind, line in streams if kind == "Video" and "attached pic" not in line]
    default = [i for i, line in enumerate(sounds) if "(default)" in line]
    found = re.search(r"^Input #0, ([^ ]+),", text, re.M)
    picture = not found or found[1].endswith("_pipe")
    best = default[0] if default else 0
    placeless = bool(sounds and re.search(r", \d+ channels", sounds[best]))
    return Probe(video=pictures[0] if pictures else "", audio=best if sounds else None,
                 placeless=placeless, alpha_mode="alpha_mode" in text, picture=picture)


@contextlib.contextmanager
def ffmpeg_reader(path, *output, before=()):
    """Starts ffmpeg on one local file: gives (its stdout, fail), where fail(default) is the
    BadInput that says what went wrong. output: options of what goes to stdout, before: of the
    input.

    All streams are read, those not asked for into nothing: so that sound and pictures, read by two
    runs, start from one clock (in MPEG-TS each stream has its own)."""
    command = [*ffmpeg_input(path), "-v", "error", *before, "-i", f"file:{path}", *output, "pipe:1",
               "-map", "0:V?", "-map", "0:a?", "-c", "copy", "-f", "null", "-"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL,
            pipesize=1 << 20) as process:
        def fail(default):
            process.wait()
            log.seek(0)
            text = log.read().decode(errors="replace")
            lines = [line for line in text.splitlines() if line.strip()]
            if "matches no streams" in text or "does not contain any stream" in text or not lines:
                return BadInput(f"{path}: {default}")
            if "whitelist" in text:
                return BadInput(f"{path}: unreadable (a playlist, or a container we do not open)")
            return BadInput(f"{path}: unreadable ({lines[0].split('] ')[-1].strip()})")
        try:
            yield process.stdout, fail
        finally:
            process.kill()


# ---------------------------------------------------------------- sound
def read_audio(path):
    """The sound of any media file -> float32 [N], 16 kHz mono, -1..1, on the video's clock (padded
    or cut at the start to time 0).

    The default track, the sum of its channels as loud as the loudest of them, those opposite to it
    turned: nothing cancels, a voice on one of six stays as it is, one of two voices is not lost.
    Raises BadInput: unreadable, "no sound track"."""
    track = probe(path).audio
    options = ["-map", f"0:a:{track or 0}", "-af", f"a{NO_JUMP},aresample=async=1:first_pts=0",
               "-ar", str(SAMPLE_RATE), "-c:a", "pcm_f32le", "-bitexact", "-f", "wav"]
    with ffmpeg_reader(path, *options) as (pipe, fail):
        header, _, body = pipe.read().partition(b"data")
        channels = int.from_bytes(header[22:24], "little")
        if len(body) < 8 or channels == 0:
            raise fail("no sound track")
    samples = np.frombuffer(body, np.float32, offset=4)  # after the body's size
    samples = samples[:len(samples) // channels * channels].reshape(-1, channels)  # [N, channels]
    samples = np.nan_to_num(samples, nan=0, posinf=0, neginf=0)
    if len(samples) == 0:
        raise BadInput(f"{path}: no sound track")
    if channels == 1:
        return samples[:, 0].clip(-1, 1)
    some = samples[::max(1, len(samples) // 1_000_000)].astype(np.float64)
    power = (some ** 2).mean(0)  # [channels]
    loudest = some[:, [power.argmax()]]  # [N, 1]
    product = (some * loudest).mean(0)
    alike = product / np.sqrt(power * power.max() + 1e-12)  # [channels], -1..1
    signs = np.where(alike < -0.5, -1.0, 1.0)
    mixed = np.square(some @ signs).mean()
    gain = np.sqrt(power.max() / max(mixed, 1e-12))
    return (samples @ np.float32(signs * gain)).clip(-1, 1)


# ---------------------------------------------------------------- pictures
def colour_matrix(info):
    """What turns a video's YCbCr into RGB, as its tag says; without one BT.709 in HD, else BT.601,
    as every player has it."""
    names = "unknown|bt709|bt470bg|smpte170m|smpte240m|bt2020|fcc|gbr|rgb|bgr|gray"
    tag = re.search(names, info.video)
    if tag and tag[0] != "unknown":
        return tag[0]
    size = re.search(r", (\d+)x(\d+)", info.video)
    return "bt709" if size and int(size[2]) >= 720 else "smpte170m"


def picture_filters(info, fps):
    """What ffmpeg must do to a stream besides decoding: deinterlace, a constant rate (after that:
    a picture of each field), tone-map, square pixels."""
    filters = [NO_JUMP, f"fps={fps}:start_time=0"]
    if re.search(r"dvvideo|(top|bottom) (coded )?first", info.video):
        filters.insert(1, "bwdif=deint=interlaced")
    if re.search("smpte2084|arib-std-b67", info.video):
        filters.append(HDR_TO_BT709)
    scale = f"scale=iw*sar:ih:flags={EXACT}"
    if colour_matrix(info) == "bt709":
        scale += ":in_color_matrix=bt709"  # also where no tag says so
    filters += [scale, "setsar=1"]
    if re.search(r"yuva|rgba|argb|bgra|abgr|gbrap|ya8|ya16|pal8", info.video) or info.alpha_mode:
        filters += ["format=gbrap", "premultiply=inplace=1"]  # on black
    return filters


def read_frames(path, fps=FPS):
    """Frames of a video (or the one of a picture) at a constant rate -> uint8 RGB [H, W, 3] each.

    Frame i shows time i / fps (seconds) on the clock of read_audio. Rotation flags and non-square
    pixels are undone, interlaced video is deinterlaced, HDR is tone-mapped to BT.709, transparency
    lies on black, later frames of another size are fitted into the first one's. One frame in
    memory. Raises BadInput: unreadable, "no picture"."""
    info = probe(path)
    if info.picture:
        picture = read_picture(path)
        if picture is not None:
            yield picture
            return
    decoder = []
    if info.alpha_mode:  # ffmpeg's own VP8 and VP9 decoders drop the transparency
        decoder = ["-c:v", "libvpx-vp9" if "vp9" in info.video else "libvpx"]
    filters = ",".join([*picture_filters(info, fps), "format=rgb24"])
    options = ["-map", "0:V:0", "-noautoscale", "-vf", filters, "-c:v", "ppm", "-f", "image2pipe"]
    with ffmpeg_reader(path, *options, before=decoder) as (pipe, fail):
        first = None
        while pipe.readline() == b"P6\n":
            width, height = map(int, pipe.readline().split())
            pipe.readline()  # the maximum, 255
            frame = np.empty((height, width, 3), np.uint8)
            if pipe.readinto(frame.data.cast("B")) < frame.nbytes:
                break
            first = frame.shape if first is None else first
            yield fit(frame, *first[:2])
        if first is None:
            raise fail("no picture")


def fit(frame, height, width):
    """uint8 [h, w, 3] -> [height, width, 3]: scaled to fit, in the middle of black"""
    h, w = frame.shape[:2]
    if (h, w) == (height, width):
        return frame
    scale = min(height / h, width / w)
    h, w = round(h * scale), round(w * scale)
    top, left = (height - h) // 2, (width - w) // 2
    whole = np.zeros((height, width, 3), np.uint8)
    whole[top:top + h, left:left + w] = cv2.resize(frame, (w, h), interpolation=cv2.INTER_AREA)
    return whole


def read_picture(path):
    """A still picture's file -> uint8 RGB [H, W, 3], turned as its EXIF says, or None."""
    content = np.fromfile(path, np.uint8, MOST_PICTURE_BYTES)
    if len(content) == 0:
        return None
    if b"ANIM" in content[:64].tobytes():
        tqdm.write(f"{path}: animated, only its first picture is used", file=sys.stderr)
    try:
        picture = cv2.imdecode(content, cv2.IMREAD_COLOR)
        whole = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    except cv2.error:  # more pixels than it reads
        return None
    if picture is None:
        return None
    if whole is not None and whole.ndim == 3 and whole.shape[2] == 4:  # on black
        as_stored = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if not np.array_equal(as_stored, picture):  # turned, which its alpha is not: ffmpeg's part
            return None
        alpha = whole[..., 3:] / np.float32(np.iinfo(whole.dtype).max)
        picture = (picture * alpha).round().astype(np.uint8)
    return picture[..., ::-1].copy()  # BGR -> RGB


def save_png(path, picture):
    """uint8 RGB [H, W, 3] into a file, whole or not at all. OpenCV's own writer takes no name that
    is not UTF-8."""
    write_whole(path, cv2.imencode(".png", picture[..., ::-1])[1].tobytes())


def frames_at(video, numbers):
    """Frames by their number, read forwards once -> {number: uint8 [H, W, 3]}"""
    wanted, frames = set(numbers), {}
    with contextlib.closing(read_frames(video)) as source:
        for t, frame in enumerate(source):
            if t in wanted:
                frames[t] = frame
            if len(frames) == len(wanted):
                return frames
    raise BadInput(f"{video}: changed while it was being read")


# ---------------------------------------------------------------- writing
def written_matrix(like):
    """The matrix, BT.709 or BT.601, for frames that were read from the file `like` (None: drawn)"""
    old = like is not None and colour_matrix(probe(like)) in ("bt470bg", "smpte170m")
    return "smpte170m" if old else "bt709"


class VideoWriter:
    """Streams frames and a sound to an H.264/AAC file; the file appears only when all went well.

    with VideoWriter("out.mp4", sound) as writer: writer.write(rgb)  # uint8 [H, W, 3], one size
    sound: float32 [N] at 16 kHz; or the path of a media file, whose default track is taken as it is
    (at most 48 kHz, stereo); or None. seconds: where the sound is cut; None: at its end.
    like: the video that the frames were read from: the file's colours are BT.601 or BT.709 as
    there, where another would round each value once more. None: BT.709.
    lossless: RGB, every frame on its own, for a copy that is read back bit-equal.
    Raises BadInput when the file cannot be written (no folder, disk full, unknown suffix)."""

    def __init__(self, path, sound=None, fps=FPS, crf=18, preset="veryfast", seconds=None,
                 like=None, lossless=False):
        self.path = Path(os.path.realpath(path))  # a link is written through
        self.sound, self.fps, self.seconds = sound, fps, seconds
        name = f".{hash_of(self.path.name):x}.{os.getpid()}{self.path.suffix}"
        self.part = self.path.with_name(name)
        self.process = None
        matrix = written_matrix(like)
        self.codec = ["-c:v", "libx264", "-crf", str(crf), "-preset", preset, "-pix_fmt", "yuv420p",
                      "-vf", f"scale=out_color_matrix={matrix}:out_range=tv:flags={EXACT}",
                      "-colorspace", matrix, "-color_primaries", matrix, "-color_trc", matrix,
                      "-movflags", "+faststart"]
        if lossless:
            self.codec = ["-c:v", "libx264rgb", "-qp", "0", "-preset", "ultrafast", "-g", "1"]

    def __enter__(self):
        if not self.path.parent.is_dir():
            raise BadInput(f"{self.path}: no such folder")
        if self.path.is_dir():
            raise BadInput(f"{self.path}: is a folder")
        self.log, self.wav = tempfile.TemporaryFile(), None
        return self

    def sound_words(self):
        """ffmpeg's words for the sound's input and its coding"""
        if self.sound is None:
            return []
        cut = [] if self.seconds is None else ["-t", str(self.seconds)]
        coding = ["-map", "0:v", "-c:a", "aac", "-b:a", "192k", *cut]
        heard = None if isinstance(self.sound, np.ndarray) else probe(self.sound)
        if heard and heard.placeless:
            self.sound = read_audio(self.sound)  # ffmpeg does not mix such channels
        if isinstance(self.sound, np.ndarray):
            self.wav = tempfile.NamedTemporaryFile(suffix=".wav")
            with wave_file.open(self.wav, "wb") as out:
                out.setparams((1, 2, SAMPLE_RATE, 0, "NONE", None))
                out.writeframes(to_int16(self.sound).tobytes())
            self.wav.flush()
            return ["-f", "wav", "-i", f"file:{self.wav.name}", *coding, "-map", "1:a"]
        track = heard.audio or 0
        finite = "aeval='if(isnan(val(ch))+isinf(val(ch)),0,val(ch))':c=same"
        clock = "aresample=async=1:first_pts=0:osf=fltp:clev=1"  # a centre voice stays as loud
        rates = "48000|44100|32000|24000|22050|16000|12000|11025|8000"
        form = f"aformat=sample_rates={rates}:channel_layouts=stereo|mono"
        return ["-format_whitelist", SAFE_FORMATS, "-i", f"file:{self.sound}", *coding,
                "-map", f"1:a:{track}", "-af", f"a{NO_JUMP},{finite},{clock},{form}"]

    def clock_words(self):
        """Reads the pictures beside the sound into nothing, as ffmpeg_reader does: one clock."""
        if self.sound is None or self.wav is not None:
            return []
        return ["-map", "1:V?", "-c", "copy", "-f", "null", "-"]

    def start(self, height, width):
        pictures = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
                    "-r", str(self.fps), "-i", "pipe:0"]
        command = [ffmpeg_exe(), "-v", "error", "-y", "-protocol_whitelist", "file,pipe", *pictures,
                   *self.sound_words(), *self.codec, f"file:{self.part}", *self.clock_words()]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE,
                                        stdout=subprocess.DEVNULL, stderr=self.log)

    def write(self, rgb):
        height, width = rgb.shape[:2]  # yuv420p wants even sides
        rgb = cv2.copyMakeBorder(rgb, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if self.process is None:
            self.start(*rgb.shape[:2])
        try:
            self.process.stdin.write(np.ascontiguousarray(rgb).data)
        except BrokenPipeError:
            raise self.failure() from None

    def failure(self):
        self.process.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").splitlines() or ["ffmpeg stopped"]
        return BadInput(f"{self.path}: cannot be written ({lines[0].split('] ')[-1].strip()})")

    def __exit__(self, kind, error, trace):
        try:
            if self.process is None:
                if kind is None:
                    raise BadInput(f"{self.path}: no frame to write")
                return
            if kind is not None:
                self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            if self.process.wait() != 0 and kind is None:
                raise self.failure()
            if kind is None:
                os.replace(self.part, self.path)
        finally:
            self.part.unlink(missing_ok=True)
            self.log.close()
            if self.wav is not None:
                self.wav.close()


def to_int16(wave):
    return (np.clip(wave, -1, 1) * 32767).round().astype(np.int16)


def hash_of(text):
    digest = hashlib.sha256(str(text).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")


# ---------------------------------------------------------------- the frames again
def ahead(source):
    """The items of the generator `source`, which runs in a thread, at most QUEUE items ahead."""
    pool = ThreadPoolExecutor(1)
    try:
        coming = collections.deque(pool.submit(next, source, None) for _ in range(QUEUE))
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, source, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        source.close()


def play(video, T, count):
    """Yields (t, frame) `count` times: forward, backward, forward ... through the T frames, never a
    jump. A long video swings through its last SWING frames only (or SWING_BYTES).

    A file is read forwards only, frames known by their number: seeking and decoding twice are not
    to be trusted. What swings is read from a lossless copy in a temporary folder."""
    with contextlib.ExitStack() as stack:
        copy = None
        if count > T:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            copy = VideoWriter(f"{folder}/copy.mkv", lossless=True)
        with copy or contextlib.nullcontext():
            for t, frame in enumerate(hold_last(video, min(T, count))):
                first = max(0, T - min(SWING, SWING_BYTES // frame.nbytes))
                if copy and t >= first:
                    copy.write(frame)
                yield t, frame
        swing = itertools.cycle([*range(T - 2, first, -1), *range(first, T)])
        order = list(itertools.islice(swing, max(0, count - T)))
        chunk = max(1, CHUNK_BYTES // frame.nbytes)
        for i in range(0, len(order), chunk):
            wanted = order[i:i + chunk]
            low, high = min(wanted), max(wanted) + 1
            pictures = read_copy(copy.path, low - first, high - first, frame.shape)
            for t in wanted:
                yield t, pictures[t - low]


def hold_last(video, T):
    """The first T frames of a video; if it now gives fewer, the last one is held."""
    with contextlib.closing(read_frames(video)) as source:
        t = 0
        for t, frame in enumerate(itertools.islice(source, T), 1):
            yield frame
        if t == 0:
            raise BadInput(f"{video}: changed while it was being read")
        for _ in range(T - t):
            yield frame


def read_copy(path, low, high, shape):
    """Frames low .. high-1 of our own lossless copy -> uint8 [n, H, W, 3]"""
    H, W = shape[:2]
    padded = (H + H % 2, W + W % 2, 3)  # VideoWriter makes sides even
    start_s = max(0, low - 0.5) / FPS
    command = [ffmpeg_exe(), "-v", "error", "-nostdin", "-ss", str(start_s), "-i", f"file:{path}",
               "-frames:v", str(high - low), "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    content = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return np.frombuffer(content, np.uint8).reshape(-1, *padded)[:, :H, :W]
