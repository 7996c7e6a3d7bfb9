"""The lip-sync network, in the order of the patent.

    stage    | code                                                        | step      | figure
    audio    | WhisperEncoder, HubEncoder, ScratchEncoder                  | S2(1)     | 1, 3
    image    | ImageEncoder                                                | S2(2)     | 1
    selector | AudioSelector                                               | S2(3)     | 1
    fusion   | ModalityFusion, attention                                   | S2(4) a-g | 2
    lips     | LipHead, ReferenceWarp                                      | -         | -
    decoder  | ImageDecoder, SPADEResnetBlock, SPADE, ReferenceMix         | S2(5)     | 4, 5, 6
    all      | LipSync                                                     | S2        | 1

Letters of shapes, one meaning each in all files; any other axis is a word:
    B batch                   S frames of a group (5)      T frames of a clip or video
    R reference pictures      C channels, C_i of stage i   D width of an audio feature
    H W pixels                h w feature map              L audio features of a sound, 25 a second
    N sound samples           F selected audio features    K points of a face
    P points of lips and jaw  M channels of SPADE's map    E width of an embedding
    U tokens of a text        V kinds of token             G groups of S frames in a clip
    X false sounds
Pictures are RGB, float, 0..1. `python lipsync.py` prints the trace of one batch through all stages.
"""
import argparse
import contextlib
import contextvars
import dataclasses
import itertools
import math
import os
import pathlib
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as fn
from torch.utils.checkpoint import checkpoint

SAMPLE_RATE = 16_000                              # Hz, S11
FPS = 25                                          # video frames and audio features a second, S11
HOP = 160                                         # samples between two mel columns: 10 ms
N_MELS = 80                                       # mel bands
LOUD = 0.1                                        # root mean square of loud frames, full scale 1
MEL_FLOOR = -7.0                                  # log10 of power: 80 dB below loudest speech
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS            # 640
MEL_PER_FRAME = SAMPLES_PER_FRAME // HOP          # 4
WINDOW_SECONDS, OVERLAP_SECONDS = 30, 10          # what an encoder sees at once; two share
VERSION = 2                                       # of the checkpoint file
LIP_POINTS, MOUTH_POINTS = 40, 61                 # the first of a face's K points: lips; P, + jaw
MOUTH_CORNERS = (0, 10)                           # their places among the K points
WEIGHTS = pathlib.Path(__file__).parent / "weights" / "edge.pt"  # where the user names none


# ---------------------------------------------------------------- configuration
@dataclass(frozen=True)
class Config:
    """Everything that decides the network's shape; saved with the weights, which it rebuilds."""
    image_size: int = 256            # H = W, px
    refs: int = 3                    # R
    audio_encoder: str = "whisper:base"  # or whisper:PATH, {wav2vec2,hubert}:{NAME,FOLDER}, scratch
    audio_dim: int = 512             # D
    window: int = 11                 # F
    spacing: int = 1                 # of the selected features, in frames
    decoder: str = "spade"           # or "conv"
    channels: tuple = (32, 64, 128, 256, 384, 512)  # of stages, finest first, rounded up to R+1
    fold: int = 1                    # 2 or 4: pictures are pixel_unshuffled first: less work
    heads: int = 8                   # of each attention
    spade_hidden: int = 64           # width of the maps inside SPADE
    bidirectional: bool = True       # False: image tokens only receive, for the ablation
    mask_upper: bool = True          # S2(4)g's -inf over the upper half
    warp: bool = True                # references follow head and lips; False: the patent's network
    lip_width: int = 256             # hidden width of LipHead
    dropout: float = 0.2             # inside LipHead and before it, while training
    checkpointing: bool = False      # recompute activations: less memory, a third more time

    def __post_init__(self):
        stages = 6 - int(math.log2(self.fold)) if self.fold in (1, 2, 4) else 0
        sizes = (*self.channels, self.audio_dim, self.heads, self.lip_width)
        for good, rule in (
                (self.image_size > 0 and self.image_size % 32 == 0, "image_size: a multiple of 32"),
                (1 <= self.refs <= 8, "refs: 1..8"),
                (self.window > 0 and self.window % 2 == 1, "window: odd"),
                (self.spacing >= 1, "spacing: at least 1"),
                (self.decoder in ("spade", "conv"), "decoder: spade or conv"),
                (self.fold in (1, 2, 4), "fold: 1, 2 or 4"),
                (len(self.channels) == stages, f"channels: {stages} of them, one a stage"),
                (min(sizes) > 0, "channels, audio_dim, heads, lip_width: positive")):
            if not good:
                raise ValueError(f"Config: {rule}, got {self}")
        groups = self.refs + 1
        last = math.lcm(groups, self.heads, 2)    # of its width: groups, heads, sine and cosine
        widths = [round_up(width, groups) for width in self.channels[:-1]]
        object.__setattr__(self, "channels", (*widths, round_up(self.channels[-1], last)))


def round_up(number, step):
    """The least multiple of `step` that is not below `number`"""
    return -(-number // step) * step


PRESETS = {
    "full": Config(channels=(32, 64, 128, 256, 512, 512), spade_hidden=64),
    "edge": Config(decoder="conv", fold=4, channels=(32, 64, 128, 192), heads=4),
    "tiny": Config(image_size=128, decoder="conv", fold=2, channels=(16, 32, 48, 96, 128), heads=4,
                   audio_encoder="scratch", audio_dim=96, lip_width=128),
}


# ---------------------------------------------------------------- checks, trace, errors
class BadInput(ValueError):
    """What a user got wrong, in one line that names the file or the value; commands exit with 2."""


def cli(main):
    """Run `main()`; bad input becomes one line on stderr and exit 2, Ctrl-C exit 130.

    Names that a terminal cannot print are escaped; a closed stdout or stderr stops nothing."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:      # closed streams: fill 0, 1 and 2
        pass
    os.close(null)
    sys.stdout = sys.stdout or open(1, "w")
    sys.stderr = sys.stderr or open(2, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                       # `| head`: what was to be written to files is
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (BadInput, FileNotFoundError, PermissionError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print("error: " + " ".join(text.split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def first_line(error):
    """An exception's first line, or its name where it says nothing"""
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


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


# ---------------------------------------------------------------- S2(1) audio encoders
def level_sound(wave):
    """A whole sound brought to one loudness, so that a soft voice moves the lips like a loud one.

    Shapes: wave [N] 16 kHz, float numpy array or tensor -> float32 tensor [N], -1..1.
    Choice: the 95th percentile of the frames above -70 dB comes to LOUD: a click is too short to
        count. Gain at most 40 dB: a silent room's noise stays soft.
    """
    wave = torch.as_tensor(wave, dtype=torch.float32)
    whole = len(wave) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
    frames = wave[:whole].unflatten(0, (-1, SAMPLES_PER_FRAME))      # [L, 640]
    level = frames.square().mean(1).sqrt()                           # [L]
    heard = level[level > 10 ** (-70 / 20)]
    if len(heard) == 0:
        return wave.clamp(-1, 1)
    gain = LOUD / heard.quantile(0.95)
    return (wave * gain.clamp(max=100)).clamp(-1, 1)


def whole_frames(wave):
    """[N] -> [640 L], L = round(N / 640) but at least 1: padded with silence, or cut"""
    length = max(1, round(wave.shape[-1] / SAMPLES_PER_FRAME)) * SAMPLES_PER_FRAME
    return fn.pad(wave, (0, max(0, length - wave.shape[-1])))[:length]


def log_mel(wave):
    """Whisper's log-mel spectrogram of one sound.

    Shapes: wave [N] 16 kHz, -1..1 -> [80, 4L] float32, L = round(N / 640).
    Choice: the floor is constant, not 80 dB below the loudest moment: a far click changes nothing.
    """
    from whisper.audio import N_FFT, mel_filters
    wave = whole_frames(torch.as_tensor(wave, dtype=torch.float32))
    spectrum = torch.stft(wave, N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True)
    power = spectrum[:, :-1].abs().square()                          # [201, 4L]
    mel = mel_filters(wave.device, N_MELS) @ power                   # [80, 4L]
    return (mel.clamp(min=10 ** MEL_FLOOR).log10() + 4) / 4


def in_windows(encode, wave):
    """A sound of any length through `encode` in pieces, so that memory grows by the result alone.

    Shapes: wave [N] -> [L, D], L = round(N / 640), as `encode` maps each piece.
    Choice: windows of 30 s cross-faded over 10 s, since a window's outer features lack context.
    """
    wave = whole_frames(wave)
    total = len(wave) // SAMPLES_PER_FRAME
    size, overlap = WINDOW_SECONDS * FPS, OVERLAP_SECONDS * FPS
    if total <= size:
        return encode(wave)
    result, weights = 0, torch.zeros(total, 1)
    for start in range(0, total - overlap, size - overlap):
        stop = min(start + size, total)
        piece = wave[start * SAMPLES_PER_FRAME: stop * SAMPLES_PER_FRAME]
        part = encode(piece)[:stop - start]                          # [<= size, D]
        ramp = (torch.arange(stop - start)[:, None] + 0.5) / overlap
        weight = ramp.clamp(max=1) if start > 0 else torch.ones_like(ramp)
        if stop < total:
            weight = weight.minimum(ramp.flip(0))
        if start == 0:
            result = part.new_zeros(total, part.shape[1])
        result[start:stop] += part * weight.to(part)
        weights[start:stop] += weight
    return result / weights.to(result)


def encode_batch(encoder, wave):
    """Each sound of a batch through an audio encoder.

    Patent: S2(1).
    Shapes: wave [B, N] 16 kHz, -1..1 -> [B, L, D], L = round(N / 640).
    """
    check(wave, "B N", "audio.wave", low=-1, high=1)
    features = torch.stack([in_windows(encoder.encode, one) for one in wave])
    return check(features, "B L D", "audio.features", B=len(wave), D=encoder.dim)


class WhisperEncoder(nn.Module):
    """A pretrained whisper's audio encoder, frozen.

    Patent: S2(1), a pretrained multilingual ASR model, so that one network serves all languages.
    Shapes: wave [B, N] 16 kHz, -1..1 -> features [B, L, D], L = round(N / 640).
    Choice: its 50 features a second are averaged in pairs. They depend on where in 30 s a sound
        stands: the same 5 s, moved by 5 s, have a cosine of 0.63 (base, last layer), so what short
        clips teach fails in long videos. With one position code for all, after half of the layers,
        it is 0.976 to 0.997, in half the time, and the mouth's opening can be read off as well
        (ridge regression on GRID: r = 0.870, last layer 0.869). Sounds cost what they are long.
    """
    frozen = True
    POSITION = 100                                # whose position code all get: 2 s

    def __init__(self, dims):
        super().__init__()
        try:
            from whisper.model import AudioEncoder
        except ImportError:
            raise BadInput("the package openai-whisper is missing: pip install openai-whisper, "
                           "or use --audio-encoder scratch") from None
        bands, width = dims["n_mels"], dims["n_audio_state"]
        if bands != N_MELS:
            raise BadInput(f"this whisper hears {bands} mel bands, ours {N_MELS}: "
                           "take one of tiny .. large-v2")
        layers = (dims["n_audio_layer"] + 1) // 2
        self.dims, self.dim = dict(dims), width
        self.encoder = AudioEncoder(bands, dims["n_audio_ctx"], width, dims["n_audio_head"], layers)
        self.encoder.ln_post = nn.Identity()      # belongs to the last layer
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)               # frozen also means: never in training mode

    def encode(self, wave):
        """wave [N] of at most 30 s -> [L, D]"""
        net = self.encoder
        x = log_mel(wave.cpu())[None].to(net.conv1.weight)           # [1, 80, 4L]
        x = fn.gelu(net.conv1(x))                                    # [1, D, 4L]
        x = fn.gelu(net.conv2(x)).mT                                 # [1, 2L, D]
        x = x + net.positional_embedding[self.POSITION].to(x)
        for block in net.blocks:
            x = block(x)
        x = fn.layer_norm(x, (self.dim,))[0]                         # [2L, D]
        return x.unflatten(0, (-1, 2)).mean(1)                       # [L, D]

    @torch.no_grad()
    def forward(self, wave):
        return encode_batch(self, wave)


class HubEncoder(nn.Module):
    """wav2vec 2.0 or HuBERT, frozen, through the transformers package.

    Patent: S2(1), wav2vec and HuBERT as other pretrained audio encoders.
    Shapes: wave [B, N] 16 kHz, -1..1 -> features [B, L, D], L = round(N / 640).
    Choice: pairs averaged as whisper's; 80 samples of silence at both ends, since the convolutions
        (window 400, hop 320) would give one feature less; zero mean, unit variance.
    """
    frozen = True

    def __init__(self, model):
        super().__init__()
        self.model, self.dim = model, model.config.hidden_size
        self.dims = dict(model.config.to_dict())
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    def encode(self, wave):
        """wave [640 L] -> [L, D]"""
        wave = (wave - wave.mean()) / (wave.std() + 1e-5)
        x = self.model(fn.pad(wave, (80, 80))[None]).last_hidden_state           # [1, 2L, D]
        return x[0].unflatten(0, (-1, 2)).mean(1)                    # [L, D]

    @torch.no_grad()
    def forward(self, wave):
        return encode_batch(self, wave)


class ScratchEncoder(nn.Module):
    """A small audio encoder of our own, trained together with the generator.

    Patent: S2(1), Fig. 3, "or build an audio encoder and train it from scratch".
    Shapes: wave [B, N] 16 kHz, -1..1 -> features [B, L, D]; encode_mel: [B, 80, 4L] -> [B, L, D].
    Choice: Fig. 3 gives no layers: Conv1d on log-mel, two of stride 2; a feature hears 0.3 s. Each
        moment is normalised by itself, or features grow until the attention's gradient explodes.
    """
    frozen = False

    def __init__(self, dim):
        super().__init__()
        self.dims, self.dim = {"dim": dim}, dim
        self.layers = nn.ModuleList()
        for before, kernel, stride in ((N_MELS, 5, 1), (dim, 4, 2), (dim, 4, 2), (dim, 3, 1)):
            self.layers.append(nn.Conv1d(before, dim, kernel, stride, padding=kernel // 2))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self.layers)

    def encode_mel(self, mel):
        x = check(mel, "B 80 columns", "audio.mel")
        for layer, norm in zip(self.layers, self.norms):
            columns = x.shape[-1] // layer.stride[0]
            x = norm(layer(x).mT).mT
            x = fn.leaky_relu(x, 0.1)[..., :columns]
        return x.mT                                                  # [B, L, D]

    def encode(self, wave):
        """wave [N] -> [L, D]"""
        mel = log_mel(wave.cpu()).to(self.layers[0].weight.device)   # [80, 4L]
        return self.encode_mel(mel[None])[0]

    def forward(self, wave):
        return encode_batch(self, wave)


def parse_audio_encoder(text):
    """"base" or "whisper" -> ("whisper", "base"), "hubert:DIR" -> ("hubert", "DIR")"""
    defaults = {"scratch": "", "whisper": "base", "wav2vec2": "facebook/wav2vec2-base",
                "hubert": "facebook/hubert-base-ls960"}
    family, _, source = text.partition(":")
    if family == "scratch":
        return "scratch", ""
    if family in defaults:
        return family, source or defaults[family]
    for hub in ("wav2vec2", "hubert"):            # a bare name such as facebook/hubert-base-ls960
        if hub in text and not os.path.isfile(text):
            return hub, text
    return "whisper", text


def load_whisper(source):
    """dims, encoder weights from a whisper name, a (full or encoder-only) file, our checkpoint."""
    path = pathlib.Path(source).expanduser()
    try:
        if path.is_file():
            saved = torch.load(path, map_location="cpu", weights_only=True)
        else:
            import whisper
            model = whisper.load_model(source, device="cpu")
            saved = {"dims": vars(model.dims), "model_state_dict": model.state_dict()}
        if "audio_encoder" in saved:              # a checkpoint of ours that carries a whisper
            return saved["audio_encoder"]["dims"], saved["audio_encoder"]["state"]
        return dict(saved["dims"]), saved["model_state_dict"]
    except Exception as error:                    # no file, no network, a foreign file: one remedy
        raise BadInput(
            f"--audio-encoder {source}: no whisper encoder there ({first_line(error)}); give a "
            "whisper name with a network, the path of a whisper file, or --audio-encoder scratch"
        ) from None


def load_hub(family, source, dims=None):
    """A transformers model from the hub or a folder; with `dims` an untrained one of that shape"""
    try:
        import transformers
    except ImportError:
        raise BadInput(f"--audio-encoder {family}: the package transformers is missing; "
                       "pip install transformers, or use --audio-encoder scratch") from None
    kind = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert"}[family]
    model_class = getattr(transformers, kind + "Model")
    try:
        if dims is None:
            return model_class.from_pretrained(source)
        return model_class(getattr(transformers, kind + "Config")(**dims))
    except (OSError, ValueError) as error:
        raise BadInput(f"--audio-encoder {source}: cannot be loaded ({first_line(error)}); "
                       "give a local folder, or --audio-encoder scratch") from None


def build_audio_encoder(config, weights=None):
    """The audio encoder that config.audio_encoder names; BadInput if anything for it is missing.

    Patent: S2(1), whisper, wav2vec, HuBERT or one of one's own.
    Shapes: the module maps wave [B, N] 16 kHz, -1..1 -> [B, L, D]; a pretrained one decides D.
    weights: {"dims": plain numbers that rebuild it, its .dims; "state"} of a checkpoint, if any.
    """
    family, source = parse_audio_encoder(config.audio_encoder)
    dims, state = (weights["dims"], weights["state"]) if weights else (None, None)
    if family == "scratch":
        encoder = ScratchEncoder(config.audio_dim)
    elif family == "whisper":
        if weights is None:
            dims, state = load_whisper(source)
        encoder = WhisperEncoder(dims)
    else:
        encoder = HubEncoder(load_hub(family, source, dims))
    if state is not None:
        wanted = encoder.state_dict()             # of a whisper only half the layers
        state = {key: value for key, value in state.items() if key in wanted}
        encoder.load_state_dict({key: value.to(wanted[key].dtype) for key, value in state.items()})
    return encoder


# ---------------------------------------------------------------- S2(2) image encoder
def half_mask(x):
    """1 for the upper half of the rows, 0 for the lower.

    Patent: S2(2), the masked frame's lower half is zero; S2(4)g masks the map's upper half.
    Shapes: x [..., H, W] -> [H, 1], of x's type and device.
    """
    height = x.shape[-2]
    upper = torch.arange(height, device=x.device) < height // 2      # [H]
    return upper.to(x.dtype)[:, None]


class EncoderStage(nn.Module):
    """Convolution, GroupNorm, activation; where the stride is 2, then a residual convolution.

    Patent: S2(2), stacked 2-D convolutions, group normalisations, activations; some of stride 2.
    Shapes: [B, C, h, w] -> [B, C', h/stride, w/stride].
    Choice: the second convolution, LeakyReLU; the patent gives neither.
    """

    def __init__(self, channels_in, channels, groups, stride):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1)
        self.norm = nn.GroupNorm(groups, channels)
        self.refine = nn.Conv2d(channels, channels, 3, padding=1) if stride == 2 else None

    def forward(self, x):
        check(x, "B C h w", "image.stage_in", C=self.conv.in_channels)
        x = fn.leaky_relu(self.norm(self.conv(x)), 0.2)              # [B, C', h/stride, w/stride]
        return x if self.refine is None else x + fn.leaky_relu(self.refine(x), 0.2)


class ImageEncoder(nn.Module):
    """R references and the masked frame, stacked on channels, become a feature map and its skips.

    Patent: S2(2), R+1 pictures on the channel axis, GroupNorm with R+1 groups, stride 2.
    Shapes: refs [B, R, 3, H, W] 0..1, masked [B, 3, H, W] 0..1 -> features [B, C, H/32, W/32],
        skips: list of [B, C_i, h_i, w_i], finest first. The patent writes channels last.
    Choice: five halvings (256 -> 8), with fold 2 or 4 the first by pixel_unshuffle. The lower half
        of `masked` is zeroed here again: nothing can leak.
    """

    def __init__(self, config):
        super().__init__()
        self.config, groups = config, config.refs + 1
        before, stride = 3 * groups * config.fold ** 2, 1
        self.stages = nn.ModuleList()
        for width in config.channels:
            self.stages.append(EncoderStage(before, width, groups, stride))
            before, stride = width, 2

    def forward(self, refs, masked):
        R = self.config.refs
        B, _, _, H, W = check(refs, "B R 3 H W", "image.refs", R=R, low=0, high=1).shape
        check(masked, "B 3 H W", "image.masked", B=B, H=H, W=W, low=0, high=1)
        dtype = self.stages[0].conv.weight.dtype                     # perhaps bfloat16
        upper = (masked * half_mask(masked)).to(dtype)               # [B, 3, H, W]
        x = torch.cat([refs.to(dtype).flatten(1, 2), upper], 1)      # [B, 3(R+1), H, W]
        x = fold_pixels(x, self.config.fold)                         # [B, .., H/fold, W/fold]
        skips = []
        for stage in self.stages:
            x = _stage(self, stage, x)                               # [B, C_i, h_i, w_i]
            skips.append(check(x, "B C h w", f"image.map{len(skips)}", B=B))
        return x, skips[:-1]


def fold_pixels(x, fold):
    """nn.functional.pixel_unshuffle, straight into channels_last memory: one copy, not two.

    Shapes: x [B, C, H, W] -> [B, C fold^2, H/fold, W/fold].
    Choice: keeps every pixel and moves the work to a smaller map.
    """
    x = x.unflatten(3, (-1, fold)).unflatten(2, (-1, fold))          # [B, C, h, fold, w, fold]
    rows = x.permute(0, 2, 4, 1, 3, 5).contiguous()                  # [B, h, w, C, fold, fold]
    return rows.flatten(3).permute(0, 3, 1, 2)


def _stage(owner, module, *inputs):
    """module(*inputs); with config.checkpointing the backward pass recomputes its activations"""
    if owner.config.checkpointing and owner.training:
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


# ---------------------------------------------------------------- S2(3) audio feature selector
def audio_window(frame, spacing, length):
    """Which audio features frame `frame` hears. The one place where sound and pictures meet.

    Patent: S2(3), frame + spacing * (-length//2 .. length//2).
    Shapes: frame int -> int64 [length], or int tensor [T] -> [T, length]; not clamped to the clip.
    """
    offsets = spacing * (torch.arange(length) - length // 2)
    return torch.as_tensor(frame)[..., None] + offsets


class AudioSelector(nn.Module):
    """The F audio features around each frame.

    Patent: S2(3), {a_(i-5), ..., a_i, ..., a_(i+5)} for spacing 1 and length 11, or spacing 2.
    Shapes: features [B, L, D] -> [B, L, F, D], or [B, T, F, D] for given frames [B, T] (int).
    Choice: before the first and after the last feature, these two repeat.
    """

    def __init__(self, config):
        super().__init__()
        self.window, self.spacing = config.window, config.spacing

    def forward(self, features, frames=None):
        B, L, D = check(features, "B L D", "selector.features").shape
        if frames is None:
            frames = torch.arange(L).expand(B, L)
        check(frames, "B T", "selector.frames", B=B)
        index = audio_window(frames.cpu(), self.spacing, self.window)            # [B, T, F]
        index = index.clamp(0, L - 1).to(features.device)
        rows = torch.arange(B, device=features.device)[:, None, None]
        return check(features[rows, index], "B T F D", "selector.selected", B=B, D=D)


# ---------------------------------------------------------------- S2(4) modality fusion
def attention(query, key, value, mask=None):
    """softmax(query key^T / sqrt(size)) value

    Patent: S2(4)e; size is that of a token in one head.
    Shapes: query [B, heads, queries, size], key and value [B, heads, keys, size]
        -> [B, heads, queries, size]; mask [keys] is added to the logits: -inf where nobody looks.
    """
    logits = query @ key.mT / math.sqrt(query.shape[-1])             # [B, heads, queries, keys]
    if mask is not None:
        logits = logits + mask
    return logits.softmax(-1) @ value


class MultiHeadAttention(nn.Module):
    """Linear maps to Query, Key, Value; attention in each head; a linear map back.

    Patent: S2(4)d-e.
    Shapes: tokens [B, queries, C], others [B, keys, C] -> [B, queries, C]; mask as in `attention`.
    Choice: biases, number of heads; the patent gives neither.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens, others, mask=None):
        C = self.out.in_features
        B = check(tokens, "B queries C", "fusion.attention_in", C=C).shape[0]
        check(others, "B keys C", "fusion.attention_to", B=B, C=C)
        maps = self.query(tokens), self.key(others), self.value(others)
        heads = [x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in maps]
        x = attention(*heads, mask)                                  # [B, heads, queries, C/heads]
        return self.out(x.transpose(1, 2).flatten(2))                # [B, queries, C]


def position_code(length, width):
    """The sinusoidal position code.

    Patent: S2(4)c, PE(pos, 2i) = sin(pos / 10000^(2i/width)), PE(pos, 2i+1) = cos of the same.
    Shapes: -> [length, width]
    """
    speed = 10000 ** (torch.arange(0, width, 2) / width)             # [width/2]
    angle = torch.arange(length)[:, None] / speed                    # [length, width/2]
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class ModalityFusion(nn.Module):
    """Audio tokens look at the pictures' mouths, then every place of the picture looks at them.

    Patent: S2(4), Fig. 2: a amplitude, b adapter, c position code, d-e self-attention, f residual,
        LayerNorm (encode_audio); g cross-attention, the upper half masked by -inf (exchange).
    Shapes: image [B, C, h, w], audio [B, F, D], amplitude float or [B], > 0 -> [B, C, h, w];
        encode_audio -> tokens [B, F, C]; exchange(image, tokens) -> [B, C, h, w].
    Choice: g ends with audio tokens, but the decoder needs a map and the patent says bidirectional:
        the tokens become Key and Value for each place's Query. -inf is added to the logits; on
        features it would give NaN. Nothing normalises between a and b, so a scale survives.
    """

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.channels[-1]
        self.adapter = nn.Sequential(nn.Linear(config.audio_dim, width), nn.LeakyReLU(0.2),
                                     nn.Dropout(config.dropout), nn.Linear(width, width))
        self.register_buffer("positions", position_code(config.window, width), persistent=False)
        self.self_attention = MultiHeadAttention(width, config.heads)
        self.audio_to_image = MultiHeadAttention(width, config.heads)
        self.image_to_audio = MultiHeadAttention(width, config.heads)
        self.self_norm, self.audio_norm, self.image_norm = (nn.LayerNorm(width) for _ in range(3))

    def encode_audio(self, audio, amplitude=1.0):
        F, D = self.config.window, self.config.audio_dim
        B = check(audio, "B F D", "fusion.audio", F=F, D=D).shape[0]
        audio = audio.to(self.adapter[0].weight.dtype)
        amplitude = torch.as_tensor(amplitude, dtype=audio.dtype, device=audio.device).expand(B)
        check(amplitude, "B", "fusion.amplitude", low=0, high=10)
        x = audio * amplitude[:, None, None]                         # a  [B, F, D]
        x = self.adapter(x)                                          # b  [B, F, C]
        x = x + self.positions.to(x.dtype)                           # c
        x = self.self_norm(x + self.self_attention(x, x))            # d-f
        return check(x, "B F C", "fusion.tokens", B=B)

    def exchange(self, image, tokens):
        C = self.config.channels[-1]
        B, _, h, w = check(image, "B C h w", "fusion.image", C=C).shape
        places = image.flatten(2).mT                                 # [B, hw, C]
        if self.config.bidirectional:
            mask = torch.zeros(h, w, device=image.device, dtype=image.dtype)
            if self.config.mask_upper:
                mask = torch.where(half_mask(mask) > 0, -math.inf, mask)
            seen = self.audio_to_image(tokens, places, mask.flatten())           # g  [B, F, C]
            tokens = self.audio_norm(tokens + seen)
            check(tokens, "B F C", "fusion.looked", B=B)
        heard = self.image_to_audio(places, tokens)                  # the way back  [B, hw, C]
        fused = self.image_norm(places + heard).mT.unflatten(2, (h, w))
        return check(fused, "B C h w", "fusion.fused", B=B)

    def forward(self, image, audio, amplitude=1.0):
        return self.exchange(image, self.encode_audio(audio, amplitude))


# ---------------------------------------------------------------- lips, and references that follow
def mouth_width(points):
    """Distance of the mouth's corners of the most closed reference, with the frame's head pose.

    Shapes: points [B, R, 2, K, 2] as LipSync takes them -> [B] picture widths.
    Choice: the unit of LipHead and losses.mouth_loss: a near face moves no more than a far one.
    """
    right, left = (points[:, 0, 1, corner] for corner in MOUTH_CORNERS)          # [B, 2]
    return torch.linalg.vector_norm(left - right, dim=-1).clamp(min=0.02)


class LipHead(nn.Module):
    """Where the lips and the jaw lie, as the sound asks for them.

    Patent: silent; but its S2(4)a-f work on the sound alone.
    Shapes: tokens [B, F, C] of ModalityFusion.encode_audio, points [B, R, 2, K, 2] picture widths
        -> lips [B, P, 2] picture widths.
    Choice: from the frame's own token and the references' lips, with the frame's head pose and in
        mouth widths; relative to the most closed reference. It learns without pictures (train.py,
        stage mouth). Source: landmarks between sound and picture are IP-LAP's (Zhong et al. 2023).
    """

    def __init__(self, config):
        super().__init__()
        width, values = config.lip_width, 2 * MOUTH_POINTS
        self.sound = nn.Linear(config.channels[-1], width)
        self.shapes = nn.Linear(config.refs * values, width)
        self.layers = nn.Sequential(
            nn.LeakyReLU(0.2), nn.Dropout(config.dropout), nn.Linear(width, width),
            nn.LeakyReLU(0.2), nn.Dropout(config.dropout), nn.Linear(width, values))
        self.layers[-1].weight.data.mul_(0.1)

    def forward(self, tokens, points):
        B, F, C = check(tokens, "B F C", "lips.tokens").shape
        check(points, "B R 2 K 2", "lips.points", B=B)
        mouths = points[:, :, 1, :MOUTH_POINTS].float()              # [B, R, P, 2]
        closed = mouths[:, 0]                                        # [B, P, 2]
        width = mouth_width(points.float())[:, None, None]           # [B, 1, 1]
        centre = closed.mean(1, keepdim=True)                        # [B, 1, 2]
        shapes = (mouths - centre[:, None]) / width[:, None]         # [B, R, P, 2] mouth widths
        shapes = shapes.flatten(1).to(tokens.dtype)                  # [B, R P 2]
        x = self.sound(tokens[:, F // 2]) + self.shapes(shapes)      # [B, lip_width]
        moved = self.layers(x).float().unflatten(1, (-1, 2))         # [B, P, 2] mouth widths
        return check(closed + moved * width, "B P 2", "lips.lips", B=B)


class ReferenceWarp(nn.Module):
    """Each reference's lower half with the frame's head pose and the lips that are wanted.

    Patent: silent; Fig. 7 wants references "without a large gap" to the frame.
    Shapes: refs [B, R, 3, H, W] 0..1, source [B, R, K, 2] where the points lie, target
        [B, R, K, 2] where they shall lie, picture widths -> [B, R, 3, H, W] 0..1.
    Choice: at the nodes of a coarse grid the flow is the mean of source - target, weighted by a
        narrow Gaussian of the distance to the target plus a little of a wide one, for where no
        point is near. Bilinear to full size; one bicubic sampling, since a bilinear one blurs.
        Towards the upper half it fades out.
    """
    NODES = 64                                    # in a picture's width: one each 4 px of 256
    NARROW, WIDE, SHARE = 6 / 256, 40 / 256, 1e-3  # sigmas, picture widths; weight of the wide one

    def forward(self, refs, source, target):
        B, R, _, H, W = check(refs, "B R 3 H W", "warp.refs").shape
        check(source, "B R K 2", "warp.source", B=B, R=R)
        check(target, "B R K 2", "warp.target", B=B, R=R, K=source.shape[2])
        source = source.flatten(0, 1).float()                        # [BR, K, 2]
        target = target.flatten(0, 1).float()                        # [BR, K, 2]
        rows = lower_rows(refs).shape[3]                             # 5/8 H
        with torch.autocast(refs.device.type, enabled=False):
            flow = self.flow(source, target)                         # [BR, 2, 40, 64]
            flow = fn.interpolate(flow, size=(rows, W), mode="bilinear")         # [BR, 2, 5/8 H, W]
            y = (torch.arange(H - rows, H, device=refs.device) + 0.5) / H
            x = (torch.arange(W, device=refs.device) + 0.5) / W
            place = torch.stack(torch.meshgrid(x, y, indexing="xy"))             # [2, 5/8 H, W]
            grid = (place + flow).permute(0, 2, 3, 1) * 2 - 1        # grid_sample's -1..1
            lower = fn.grid_sample(refs.flatten(0, 1).float(), grid, mode="bicubic",
                                   padding_mode="border", align_corners=False).clamp(0, 1)
        lower = lower.unflatten(0, (B, R))                           # [B, R, 3, 5/8 H, W]
        moved = torch.cat([refs[:, :, :, :H - rows].float(), lower], 3)
        return check(moved.to(refs.dtype), "B R 3 H W", "warp.moved", B=B, R=R)

    def flow(self, source, target):
        """source, target [BR, K, 2] -> [BR, 2, 40, 64] (x, y) towards the source, picture widths"""
        columns = (torch.arange(self.NODES, device=target.device) + 0.5) / self.NODES    # [64]
        rows = lower_rows(columns[:, None])[:, 0]                    # [40]
        x, y = target.unbind(2)                                      # [BR, K]
        step = source - target                                       # [BR, K, 2]
        step = torch.cat([step, torch.ones_like(step[..., :1])], 2)  # the 1 sums the weights
        total = 0
        for sigma, share in ((self.NARROW, 1.0), (self.WIDE, self.SHARE)):
            down = gaussian(rows, y, sigma)                          # [BR, 40, K]
            weighted = down[:, None] * step.mT[:, :, None]           # [BR, 3, 40, K]
            across = gaussian(columns, x, sigma).mT[:, None]         # [BR, 1, K, 64]
            total = total + share * weighted @ across                # [BR, 3, 40, 64]
        flow = total[:, :2] / (total[:, 2:] + 1e-12)
        fade = ((torch.arange(len(rows), device=target.device) - 1) / 4).clamp(0, 1)
        return flow * fade[:, None]


def gaussian(nodes, places, sigma):
    """How near each place [BR, K] lies to each node [nodes] -> [BR, nodes, K], 0..1"""
    distance = nodes[:, None] - places[:, None]
    return torch.exp(-distance ** 2 / (2 * sigma ** 2))


def smooth_blocks(x, fold):
    """The mean of fold x fold pixels at every place, which wipes out any pattern of that period.

    Shapes: x [B, C, H, W] -> [B, C, H, W].
    Choice: losses that reward sharpness like the grid of blocks that pixel_shuffle makes. Detail
        comes from the references' own pixels, so this loses little.
    """
    before, after = (fold - 1) // 2, fold // 2
    padded = fn.pad(x, (before, after, before, after), mode="replicate")
    return fn.avg_pool2d(padded, fold, 1)


def lower_rows(x):
    """The lower 5/8 of the rows: the half that is drawn, and an eighth above for the convolutions.

    Shapes: x [..., h, w] -> [..., 5/8 h, w]: rows 3/8 h to h; 0 to h/2 are given, h/2 to h drawn.
    Choice: a third less work.
    """
    return x[..., 3 * x.shape[-2] // 8:, :]


def join_halves(upper, lower, reach=16, width=5):
    """The lower half with the step to the upper half taken out, so that no border shows.

    Shapes: upper [B, C, h, W] and lower [B, C, h, W] 0..1 -> lower [B, C, h, W] 0..1.
    Choice: the step at the border, averaged over `width` pixels, is added, down to 0 at `reach`.
    """
    step = upper[:, :, -2:].mean(2, keepdim=True) - lower[:, :, :2].mean(2, keepdim=True)
    margin = width // 2
    step = fn.pad(step, (margin, margin, 0, 0), mode="replicate")
    step = fn.avg_pool2d(step, (1, width), 1)                        # [B, C, 1, W]
    rows = torch.arange(lower.shape[2], device=lower.device, dtype=lower.dtype)
    share = (1 - rows / reach).clamp(min=0).square()                 # [h]
    return (lower + step * share[:, None]).clamp(0, 1)


# ---------------------------------------------------------------- S2(5) image decoder
class SPADE(nn.Module):
    """Spatially adaptive denormalisation: normalise, then scale and shift each place as a map says.

    Patent: S2(5), Fig. 6.
    Shapes: x [B, C, h, w], map [B, M, h, w] -> [B, C, h, w].
    Choice: norm(x) (1 + gamma) + beta, with instance norm. Source: Park et al. 2019, whose
        segmentation map is here the encoder's skip.
    """

    def __init__(self, channels, map_channels, hidden):
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels, affine=False)
        self.shared = nn.Conv2d(map_channels, hidden, 3, padding=1)
        self.gamma, self.beta = (nn.Conv2d(hidden, channels, 3, padding=1) for _ in range(2))

    def forward(self, x, map):
        B, C, h, w = check(x, "B C h w", "decoder.spade_x").shape
        check(map, "B M h w", "decoder.spade_map", B=B, h=h, w=w, M=self.shared.in_channels)
        hidden = fn.leaky_relu(self.shared(map), 0.2)                # [B, hidden, h, w]
        return self.norm(x) * (1 + self.gamma(hidden)) + self.beta(hidden)


class SPADEResnetBlock(nn.Module):
    """Two rounds of SPADE, LeakyReLU, convolution beside a shortcut.

    Patent: S2(5), Fig. 5.
    Shapes: x [B, C, h, w], map [B, M, h, w] -> [B, C, h, w].
    Choice: the shortcut is the identity, since ImageDecoder changes the width before.
    """

    def __init__(self, channels, map_channels, hidden):
        super().__init__()
        self.spade1, self.spade2 = (SPADE(channels, map_channels, hidden) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x, map):
        check(x, "B C h w", "decoder.block_x")
        y = self.conv1(fn.leaky_relu(self.spade1(x, map), 0.2))      # [B, C, h, w]
        return x + self.conv2(fn.leaky_relu(self.spade2(y, map), 0.2))


class ConvBlock(nn.Module):
    """The cheap stand-in for SPADEResnetBlock: join the map, convolve, normalise, convolve, add.

    Patent: S2(5), "to reduce computation the SPADEResnetBlock may be replaced by convolution".
    Shapes: x [B, C, h, w], map [B, M, h, w] -> [B, C, h, w].
    Choice: the map joins by concatenation, as in a U-Net (Ronneberger et al. 2015); one GroupNorm.
    """

    def __init__(self, channels, map_channels, groups):
        super().__init__()
        self.conv1 = nn.Conv2d(channels + map_channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, map):
        B, C, h, w = check(x, "B C h w", "decoder.block_x").shape
        check(map, "B M h w", "decoder.block_map", B=B, h=h, w=w)
        y = self.norm(self.conv1(torch.cat([x, map], 1)))            # [B, C, h, w]
        return x + self.conv2(fn.leaky_relu(y, 0.2))


class ReferenceMix(nn.Module):
    """A draft of the lower half: at each place a mixture of the R references.

    Patent: silent; it wants teeth and skin taken from the references (S2(2), advantages 3 and 7).
    Shapes: x [B, C, h, w] decoder features of the lower 5/8, refs [B, R, 3, H, W] 0..1, as warped
        -> [B, 3, 5/8 H, W] 0..1.
    Choice: softmax over R, twice. Colour and shade of each 4 x 4 pixels are mixed softly, which the
        losses want; detail finer than that is mixed with FIRM times the logits, so that it comes
        from one reference nearly alone, since the mean of three is a blur. No gradient goes there:
        L1 would soften it. The pixels are real ones, so sharp, also for a face never seen before.
        Source: bands of a picture mixed apart, Burt & Adelson 1983.
    """
    FIRM, BAND = 4.0, 4

    def __init__(self, channels, refs):
        super().__init__()
        self.conv = nn.Conv2d(channels, refs, 3, padding=1)
        self.conv.weight.data.mul_(0.1)           # start near "all references alike"
        self.conv.bias.data.zero_()

    def forward(self, x, refs):
        B, R = check(refs, "B R 3 H W", "decoder.mix_refs", R=self.conv.out_channels).shape[:2]
        check(x, "B C h w", "decoder.mix_in", B=B, C=self.conv.in_channels)
        lower = lower_rows(refs).float()                             # [B, R, 3, 5/8 H, W]
        logits = self.conv(x).float()                                # [B, R, h, w]
        firm = fn.interpolate(logits.detach(), size=lower.shape[-2:], mode="bilinear")
        firm = (self.FIRM * firm).softmax(1)                         # [B, R, 5/8 H, W]
        detail = (lower * firm[:, :, None]).sum(1)                   # [B, 3, 5/8 H, W]
        means = fn.avg_pool2d(lower.flatten(0, 1), self.BAND).unflatten(0, (B, R))
        soft = fn.interpolate(logits, size=means.shape[-2:], mode="bilinear").softmax(1)
        shade = (means * soft[:, :, None]).sum(1)                    # [B, 3, 5/32 H, W/4]
        change = shade - fn.avg_pool2d(detail, self.BAND)            # [B, 3, 5/32 H, W/4]
        change = fn.interpolate(change, size=detail.shape[-2:], mode="bilinear")
        return (detail + change).clamp(0, 1)


class ImageDecoder(nn.Module):
    """From the fused map back to a picture.

    Patent: S2(5), Fig. 4: 5 x (upsampling, conv, SPADEResnetBlock), LeakyReLU, Conv2d, Sigmoid.
    Shapes: fused [B, C, H/32, W/32], ImageEncoder's skips, refs (warped) and masked as LipSync has
        them -> picture [B, 3, H, W] 0..1.
    Choice: SPADE's map is the skip of the same size. The convolution is 1x1 and done before the
        (nearest) upsampling: the same sum at a quarter of the cost. With fold 2 or 4 the last
        upsamplings are one pixel_shuffle after Conv2d. Only lower_rows are drawn; the upper half is
        the masked frame's. With warp, the last stage sees ReferenceMix's draft, and Conv2d's output
        is added to the draft's logit: a decoder that says nothing leaves the draft as it is.
    """

    def __init__(self, config):
        super().__init__()
        self.config, widths = config, config.channels[::-1]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, widths[1:]))
        self.blocks = nn.ModuleList()
        for width in widths[1:]:
            if config.decoder == "spade":
                hidden = min(width, config.spade_hidden)
                self.blocks.append(SPADEResnetBlock(width, width, hidden))
            else:
                self.blocks.append(ConvBlock(width, width, config.refs + 1))
        pixels, last = 3 * config.fold ** 2, widths[-1]
        self.mix, self.finish = None, None
        if config.warp:
            self.mix = ReferenceMix(last, config.refs)
            self.finish = nn.Conv2d(last + pixels, last, 3, padding=1)
        self.out = nn.Conv2d(last, pixels, 3, padding=1)
        self.out.weight.data.mul_(0.1 if config.warp else 1.0)

    def forward(self, fused, skips, refs, masked):
        fold, C = self.config.fold, self.config.channels[-1]
        B, _, h, w = check(fused, "B C h w", "decoder.fused", C=C).shape
        H = check(masked, "B 3 H W", "decoder.masked", B=B, H=32 * h, W=32 * w).shape[2]
        x = fused
        for i, (conv, block, skip) in enumerate(zip(self.convs, self.blocks, skips[::-1])):
            x = fn.interpolate(conv(x), scale_factor=2)              # [B, C_i, 2h, 2w]
            skip = lower_rows(skip)                                  # [B, C_i, 5/8 h_i, w_i]
            x = _stage(self, block, x[:, :, -skip.shape[2]:], skip)
            check(x, "B C h w", f"decoder.map{i}", B=B)
        if self.mix is not None:
            draft = self.mix(x, refs)                                # [B, 3, 5/8 H, W]
            check(draft, "B 3 H W", "decoder.draft", B=B)
            folded = fold_pixels(draft.to(x.dtype), fold)            # [B, 3 fold^2, 5/8 h_i, w_i]
            x = self.finish(torch.cat([x, folded], 1))               # [B, C_i, 5/8 h_i, w_i]
        x = self.out(fn.leaky_relu(x, 0.2)).float()                  # [B, 3 fold^2, 5/8 h_i, w_i]
        x = smooth_blocks(fn.pixel_shuffle(x, fold), fold)           # [B, 3, 5/8 H, W]
        if self.mix is not None:
            x = x + draft.float().clamp(1 / 255, 254 / 255).logit()
        upper = masked[:, :, :H // 2]                                # [B, 3, H/2, W]
        lower = x[:, :, -H // 2:].sigmoid().to(masked)               # [B, 3, H/2, W]
        picture = torch.cat([upper, join_halves(upper, lower)], 2)
        return check(picture, "B 3 H W", "decoder.picture", B=B)


# ---------------------------------------------------------------- S2 the whole network
class LipSync(nn.Module):
    """Draws the lower half of a face so that it says what the audio says.

    Patent: S2, Fig. 1.
    Shapes: refs [B, R, 3, H, W] 0..1, the most closed mouth first; masked [B, 3, H, W] 0..1 (its
        lower half is not read); audio [B, F, D] the selected features; amplitude float or [B] (1 as
        spoken, > 1 wider); points [B, R, 2, K, 2] (x, y) in picture widths, 0..1 inside the
        picture: [:, :, 0] where a face's points lie in each reference, [:, :, 1] where they would
        lie with the frame's head pose (faces.place_points) -> picture [B, 3, H, W] 0..1.
    Choice: S2(4)a-f come first, since they need the sound alone: LipHead reads the lips off them,
        and the references are warped to the frame's head pose and to those lips before anything
        looks at them; points=None: they stay as they are. lips [B, P, 2] picture widths take the
        place of the predicted ones (training). A group's S frames are S entries of the batch.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.fusion = ModalityFusion(config)
        self.lip_head = LipHead(config) if config.warp else None
        self.warp = ReferenceWarp()
        self.image_encoder = ImageEncoder(config)
        self.decoder = ImageDecoder(config)

    def sound_parameters(self):
        """What predict_lips uses, in the order of the network; [] with warp=False."""
        if self.lip_head is None:
            return []
        fusion = self.fusion
        modules = (fusion.adapter, fusion.self_attention, fusion.self_norm, self.lip_head)
        return [parameter for module in modules for parameter in module.parameters()]

    def predict_lips(self, audio, amplitude, points):
        """S2(4)a-f and LipHead alone, no picture -> lips [B, P, 2] picture widths"""
        return self.lip_head(self.fusion.encode_audio(audio, amplitude), points)

    def move_references(self, refs, points, lips):
        """The references with the frame's head pose and these lips -> [B, R, 3, H, W]"""
        source, posed = points.unbind(2)                             # [B, R, K, 2]
        rest = posed[:, :, lips.shape[1]:]
        lips = lips[:, None].expand(-1, refs.shape[1], -1, -1)       # [B, R, P, 2]
        return self.warp(refs, source, torch.cat([lips.to(rest), rest], 2))

    def forward(self, refs, masked, audio, amplitude=1.0, points=None, lips=None):
        config, size = self.config, self.config.image_size
        R, F, D = config.refs, config.window, config.audio_dim
        B = check(refs, "B R 3 H W", "lipsync.refs", R=R, H=size, W=size).shape[0]
        check(masked, "B 3 H W", "lipsync.masked", B=B, H=size, W=size)
        check(audio, "B F D", "lipsync.audio", B=B, F=F, D=D)
        tokens = self.fusion.encode_audio(audio, amplitude)          # [B, F, C]
        if points is not None and self.lip_head is not None:
            check(points, "B R 2 K 2", "lipsync.points", B=B, R=R)
            if lips is None:
                lips = self.lip_head(tokens, points)                 # [B, P, 2]
            refs = self.move_references(refs, points, lips)          # [B, R, 3, H, W]
        image, skips = self.image_encoder(refs, masked)              # [B, C, h, w]
        fused = self.fusion.exchange(image, tokens)                  # [B, C, h, w]
        return self.decoder(fused, skips, refs, masked)              # [B, 3, H, W]


def redraw(net, refs, crops, points, audio, amplitude=1.0):
    """Crops of a face with their lower halves drawn anew: what samples, eval and dubbing all call.

    Shapes: refs uint8 [R, 256, 256, 3], crops uint8 [B, 256, 256, 3] (RGB), points float32
        [B, R, 2, K, 2] or None, audio [B, F, D], amplitude float -> uint8 [B, 256, 256, 3], on the
        CPU; numpy in, numpy out but for audio.
    Choice: a network for smaller pictures gets averaged ones; its answer is enlarged bicubically.
    """
    device, size = audio.device, net.config.image_size
    both = torch.from_numpy(np.concatenate([refs, crops])).to(device)
    planes = both.permute(0, 3, 1, 2).float() / 255                  # [R+B, 3, 256, 256]
    if size != planes.shape[-1]:
        planes = fn.interpolate(planes, size=(size, size), mode="area")
    R, B = len(refs), len(crops)
    masked = planes[R:] * half_mask(planes)                          # [B, 3, H, W]
    shared = planes[:R].expand(B, -1, -1, -1, -1)                    # [B, R, 3, H, W]
    if points is not None:
        points = torch.from_numpy(points).to(device)
    with torch.inference_mode():
        drawn = net(shared, masked, audio, amplitude, points).float()
        if size != crops.shape[1]:
            drawn = fn.interpolate(drawn, size=crops.shape[1:3], mode="bicubic")
        drawn = (drawn * 255).round().clamp(0, 255).byte()           # [B, 3, 256, 256]
        return drawn.permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------- devices and checkpoints
def pick_device(name="auto"):
    """"auto" -> cuda if there is one, else cpu; else the named device; BadInput if it is absent"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
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
    """What save_checkpoint wrote, on the CPU; BadInput if missing, broken, foreign or newer."""
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


# ---------------------------------------------------------------- python lipsync.py
def example(config, batch=1):
    """Random inputs of the right shapes: (refs, masked, audio, amplitude, points)"""
    R, size = config.refs, config.image_size
    masked = torch.rand(batch, 3, size, size)
    points = torch.rand(batch, R, 1, 151, 2) * 0.5 + 0.25
    points = points + 0.02 * torch.randn(batch, R, 2, 151, 2)
    refs = torch.rand(batch, R, 3, size, size)
    audio = torch.randn(batch, config.window, config.audio_dim)
    return refs, masked * half_mask(masked), audio, torch.ones(batch), points


def gmac(module, *inputs):
    """Multiply-adds of one forward, in 1e9, and {submodule name: share}, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(*inputs)
    counts = {}
    for name, operations in counter.get_flop_counts().items():
        counts[name.split(".", 1)[-1]] = sum(operations.values()) / 2e9
    return counter.get_total_flops() / 2e9, counts


def record(preset):
    """One second of sound and one frame through everything: networks by stage, rows of `trace`."""
    config = dataclasses.replace(PRESETS[preset], audio_encoder="scratch")       # needs no download
    nets = ScratchEncoder(config.audio_dim), AudioSelector(config), LipSync(config)
    audio_encoder, selector, net = nets
    with trace() as rows, torch.no_grad():
        features = audio_encoder(torch.zeros(1, SAMPLE_RATE))        # [1, L, D]
        audio = selector(features)[:, 12]                            # [1, F, D]
        refs, masked, _, amplitude, points = example(config)
        net(refs, masked, audio, amplitude, points)
    return nets, rows


def print_trace(preset):
    """One row per tensor that `check` saw, then parameters and multiply-adds of each stage."""
    (audio_encoder, _, net), rows = record(preset)
    print(f"{preset}: {net.config}\n\nstage     tensor       axes        shape")
    for name, axes, shape in rows:
        stage, tensor = name.split(".")
        print(f"{stage:9} {tensor:12} {axes:11} {' '.join(map(str, shape))}")
    total, counts = gmac(net, *example(net.config))
    sound = gmac(audio_encoder, torch.zeros(1, SAMPLE_RATE))[0] / FPS
    stages = [("audio", audio_encoder, sound)]
    for name, module in net.named_children():
        inside = sum(count for path, count in counts.items() if path.rpartition(".")[0] == name)
        stages.append((name.split("_")[0], module, counts.get(name, inside)))
    stages.append(("sum", nn.ModuleList([audio_encoder, net]), total + sound))
    print("\nstage       parameters  GMAC/frame")
    for stage, module, macs in stages:
        parameters = sum(parameter.numel() for parameter in module.parameters())
        print(f"{stage:9} {parameters:12,} {macs:11.3f}")


@torch.inference_mode()
def seconds_a_frame(net, batch, seconds=2.0):
    """What one frame costs in a batch of that size: median of at least three runs, here and now."""
    device = next(net.parameters()).device
    inputs = [x.to(device) for x in example(net.config, batch)]
    times, start = [], time.perf_counter()
    while len(times) < 4 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        net(*inputs).sum().item()                                    # a GPU has finished by then
        times.append((time.perf_counter() - begin) / batch)
    return statistics.median(times[1:])


@torch.inference_mode()
def benchmark():
    """Frames a second of every preset and decoder, on this machine."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, channels_last")
    print("preset  decoder     GMAC type  batch  ms/frame  frames/s")
    for preset, decoder in itertools.product(PRESETS, ("spade", "conv")):
        config = dataclasses.replace(PRESETS[preset], decoder=decoder)
        net = LipSync(config).eval().to(memory_format=torch.channels_last)
        total, _ = gmac(net, *example(config))
        for dtype, batch in itertools.product((torch.float32, torch.bfloat16), (1, 8)):
            one = seconds_a_frame(net.to(dtype), batch)
            kind = "fp32" if dtype == torch.float32 else "bf16"
            print(f"{preset:7} {decoder:8} {total:7.2f} {kind} {batch:6} "
                  f"{1000 * one:9.1f} {1 / one:9.1f}", flush=True)


def export(preset, path):
    """Write the network as a torch.export program with a free batch axis, for example's inputs."""
    net = LipSync(PRESETS[preset]).eval()
    axes = {0: torch.export.Dim("B", min=1, max=256)}
    inputs = example(PRESETS[preset], 2)
    program = torch.export.export(net, inputs, dynamic_shapes=(axes,) * len(inputs))
    torch.export.save(program, path)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description="Print the shape of every tensor of one forward.")
    parser.add_argument("--preset", choices=PRESETS, default="edge", help="default: edge")
    parser.add_argument("--benchmark", action="store_true", help="time every preset and decoder")
    parser.add_argument("--export", metavar="FILE.pt2", help="write a torch.export program")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.benchmark:
        benchmark()
    elif args.export:
        export(args.preset, args.export)
    else:
        print_trace(args.preset)


if __name__ == "__main__":
    cli(main)
