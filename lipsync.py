"""The lip-sync network, in the order of the patent.

    stage | code                                   | patent step     | figure
    ------+----------------------------------------+-----------------+-------
    audio    | WhisperEncoder, HubEncoder, ScratchEncoder | S2(1)    | 1, 3
    image    | ImageEncoder                        | S2(2)           | 1
    selector | AudioSelector                       | S2(3)           | 1
    fusion   | ModalityFusion, attention           | S2(4) a..g      | 2
    decoder  | ImageDecoder, SPADEResnetBlock, SPADE, ReferenceCopy | S2(5) | 4, 5, 6
    all      | LipSync                             | S2              | 1

Axes, here and in the other files, whose heads name the few that they add:
    B batch, S frames of a group, R reference pictures, C channels, H W pixels, h w feature map,
    L audio features of a clip (25 a second), N sound samples, F selected audio features, D audio width,
    T video frames, Q tokens that look, K tokens looked at, G channels of one head, M channels of SPADE's map.
Pictures are RGB, float, 0..1. `python lipsync.py` prints the trace of one batch through everything below.
"""
import argparse
import contextlib
import contextvars
import dataclasses
import math
import os
import pathlib
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as fn
from torch.utils.checkpoint import checkpoint

SAMPLE_RATE = 16_000                              # Hz, S11
FPS = 25                                          # video frames a second, S11; audio features come at the same rate
HOP = 160                                         # samples between two mel columns: 10 ms, as whisper has it
N_MELS = 80                                       # mel bands
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS            # 640
MEL_PER_FRAME = SAMPLES_PER_FRAME // HOP          # 4
WINDOW_SECONDS, OVERLAP_SECONDS = 30, 10          # longest piece an encoder sees at once; shared with its neighbour
VERSION = 1                                       # of the checkpoint file
WEIGHTS = pathlib.Path(__file__).parent / "weights" / "edge.pt"  # what the commands use when the user names none


# ---------------------------------------------------------------- configuration
@dataclass(frozen=True)
class Config:
    """Everything that decides the network's shape. It is saved with the weights, and the weights rebuild it.

    `channels` are the widths of the image encoder's stages from the finest to the coarsest (rounded up to a
    multiple of R+1); with `fold` = 2 the pictures are pixel_unshuffled first, so the finest map is at half size.
    """
    image_size: int = 256            # H = W, px
    refs: int = 3                    # R
    audio_encoder: str = "whisper:base"  # whisper:NAME|PATH, wav2vec2:NAME|FOLDER, hubert:NAME|FOLDER, or scratch
    audio_dim: int = 512             # D
    window: int = 11                 # F
    spacing: int = 1                 # of the selected features, in frames
    decoder: str = "spade"           # or "conv"
    channels: tuple = (32, 64, 128, 256, 384, 512)
    fold: int = 1                    # 1, or 2 for small machines
    heads: int = 8                   # of each attention
    spade_hidden: int = 64           # width of the maps inside SPADE
    bidirectional: bool = True       # False: image tokens only receive, one-way, for the ablation
    mask_upper: bool = True          # S2(4)g's -inf over the upper half
    copy: bool = True                # ReferenceCopy; False: the patent's plain Sigmoid
    checkpointing: bool = False      # recompute activations in the backward pass: less memory, a third more time

    def __post_init__(self):
        for good, rule in (
                (self.image_size % 32 == 0 and self.image_size > 0, "image_size must be a multiple of 32"),
                (1 <= self.refs <= 8, "refs must be 1..8"),
                (self.window % 2 == 1 and self.window > 0, "window must be odd"),
                (self.spacing >= 1, "spacing must be at least 1"),
                (self.decoder in ("spade", "conv"), "decoder must be spade or conv"),
                (self.fold in (1, 2), "fold must be 1 or 2"),
                (len(self.channels) == 7 - self.fold, f"fold {self.fold} needs {7 - self.fold} channels")):
            if not good:
                raise ValueError(f"Config: {rule}, got {self}")
        groups = self.refs + 1
        object.__setattr__(self, "channels", tuple(-(-c // groups) * groups for c in self.channels))


PRESETS = {
    "full": Config(channels=(32, 64, 128, 256, 512, 512), spade_hidden=64),
    "edge": Config(decoder="conv", fold=2, channels=(24, 48, 96, 192, 256), heads=4),
    "tiny": Config(image_size=128, decoder="conv", fold=2, channels=(16, 32, 48, 96, 128), heads=4,
                   audio_encoder="scratch", audio_dim=96),
}


# ---------------------------------------------------------------- checks, trace, errors
class BadInput(ValueError):
    """What a user got wrong, in one line that names the file or the value. Every command turns it into exit 2."""


def cli(main):
    """Run `main()`; bad input becomes one line on stderr and exit 2, Ctrl-C exit 130."""
    try:
        main()
    except (BadInput, FileNotFoundError, PermissionError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print("error: " + " ".join(text.split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


_rows = contextvars.ContextVar("trace_rows", default=None)


@contextlib.contextmanager
def trace():
    """Within it every `check` appends (name, axes, shape) to the yielded list: the tensors that really passed."""
    rows = []
    token = _rows.set(rows)
    try:
        yield rows
    finally:
        _rows.reset(token)


def check(x, axes, name, low=None, high=None, **sizes):
    """Return x if its shape fits `axes`, else raise a ValueError that names tensor, expected axes and shape got.

    axes: one letter or number per dimension, such as "B R 3 H W"; a letter repeated, or given in `sizes`, must
    have that size. low, high: allowed value range; read only from CPU tensors, where looking costs no stall.
    Example: check(audio, "B F D", "fusion.audio", B=2, D=512).
    """
    if torch.compiler.is_compiling():             # shapes are static or symbolic there, and were checked eagerly
        return x
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} must be a tensor [{axes}], got {type(x).__name__}")
    known, names = dict(sizes), axes.split()
    fits = x.dim() == len(names)
    for axis, size in zip(names, x.shape):
        fits = fits and size == (int(axis) if axis.isdigit() else known.setdefault(axis, size))
    if not fits:
        wanted = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in names)
        raise ValueError(f"{name} must be [{wanted}], got {list(x.shape)}")
    if low is not None and x.device.type == "cpu" and x.numel():
        least, most = (v.item() for v in x.detach().aminmax())
        if not (low - 1e-3 <= least and most <= high + 1e-3):        # also refuses NaN
            raise ValueError(f"{name} must lie in {low}..{high}, got {least:.4g}..{most:.4g}")
    if _rows.get() is not None:
        _rows.get().append((name, axes, tuple(x.shape)))
    return x


# ---------------------------------------------------------------- S2(1) audio encoders
def log_mel(wave):
    """Whisper's log-mel spectrogram of one sound.

    Shapes: wave [N] 16 kHz, -1..1 -> [80, 4L] float32, L = round(N / 640).
    Choice: openai-whisper's whisper.log_mel_spectrogram (25 ms window, 10 ms hop, 80 bands, last 80 dB) for all encoders.
    """
    import whisper
    wave = torch.as_tensor(wave, dtype=torch.float32)
    length = max(1, round(wave.shape[-1] / SAMPLES_PER_FRAME)) * SAMPLES_PER_FRAME
    wave = fn.pad(wave, (0, max(0, length - wave.shape[-1])))[:length]
    return whisper.log_mel_spectrogram(wave)      # [80, 4L]


def in_windows(encode, wave):
    """Encode a sound of any length, in pieces; memory does not grow with it beyond the result.

    Shapes: wave [N] -> [L, D], L = round(N / 640); `encode` maps [n] to [round(n / 640), D].
    Choice: windows of 30 s that overlap by 10 s and are cross-faded there, since a window's outer features lack context.
    """
    total = max(1, round(wave.shape[-1] / SAMPLES_PER_FRAME))
    size, overlap = WINDOW_SECONDS * FPS, OVERLAP_SECONDS * FPS
    if total <= size:
        return encode(wave)
    result, weights = 0, torch.zeros(total, 1)
    for start in range(0, total - overlap, size - overlap):
        stop = min(start + size, total)
        part = encode(wave[start * SAMPLES_PER_FRAME: stop * SAMPLES_PER_FRAME])[:stop - start]  # [<=size, D]
        position = torch.arange(stop - start) + 0.5
        weight = (position / overlap).clamp(max=1) if start else torch.ones(stop - start)
        if stop < total:
            weight = weight.minimum(((stop - start - position) / overlap).clamp(max=1))
        if not start:
            result = part.new_zeros(total, part.shape[1])
        result[start:stop] += part * weight[:, None].to(part)
        weights[start:stop] += weight[:, None]
    return result / weights.to(result)


def encode_batch(encode, wave, dim):
    """Each sound of a batch through `in_windows`.

    Patent: S2(1), sound in, features [B, L, D] out.
    Shapes: wave [B, N] 16 kHz, -1..1 -> [B, L, D], L = round(N / 640). ValueError for another rank or range.
    """
    check(wave, "B N", "audio.wave", low=-1, high=1)
    features = torch.stack([in_windows(encode, one) for one in wave])            # [B, L, D]
    return check(features, "B L D", "audio.features", B=wave.shape[0], D=dim)


class WhisperEncoder(nn.Module):
    """A pretrained whisper's audio encoder, frozen.

    Patent: S2(1), a pretrained multilingual ASR model as audio encoder, so that one network serves all languages.
    Shapes: wave [B, N] 16 kHz, -1..1 -> features [B, L, D], L = round(25 x seconds).
    Choice: whisper gives 50 features a second, we average pairs to one per video frame. Whisper's features say as much
        about where in its 30 seconds a sound stands as about the sound: the same 5 s, moved by 5 s, give a cosine of
        0.63 (base, last layer), so what is learned on short clips fails in long videos. So every position gets one and
        the same position code, and we read after half of the layers, normalised: 0.976 to 0.997, half the time, and the
        mouth's opening can be read off them as well as off the last layer (ridge regression on GRID: r = 0.870,
        last layer 0.869). Sounds of any length cost what they are long.
    """
    frozen = True
    POSITION = 100                                # whose position code all get: 2 s

    def __init__(self, dims):
        super().__init__()
        try:
            from whisper.model import AudioEncoder
        except ImportError:
            raise BadInput("the package openai-whisper is missing: pip install openai-whisper, or use --audio-encoder scratch") from None
        if dims["n_mels"] != N_MELS:
            raise BadInput(f"this whisper hears {dims['n_mels']} mel bands, ours {N_MELS}: take one of tiny .. large-v2")
        self.dims, self.dim = dict(dims), dims["n_audio_state"]
        self.encoder = AudioEncoder(dims["n_mels"], dims["n_audio_ctx"], dims["n_audio_state"],
                                    dims["n_audio_head"], (dims["n_audio_layer"] + 1) // 2)
        self.encoder.ln_post = nn.Identity()      # belongs to the last layer
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)               # frozen also means: never in training mode

    def encode(self, wave):
        """wave [n] of at most 30 s -> [round(n / 640), D]"""
        net = self.encoder
        x = log_mel(wave.cpu())[None].to(net.conv1.weight)           # [1, 80, 4L]
        x = fn.gelu(net.conv2(fn.gelu(net.conv1(x)))).mT             # [1, 2L, D]
        x = x + net.positional_embedding[self.POSITION].to(x)
        for block in net.blocks:
            x = block(x)
        return fn.layer_norm(x, (self.dim,))[0].unflatten(0, (-1, 2)).mean(1)    # [L, D]

    @torch.no_grad()
    def forward(self, wave):
        return encode_batch(self.encode, wave, self.dim)


class HubEncoder(nn.Module):
    """wav2vec 2.0 or HuBERT, frozen, through the transformers package.

    Patent: S2(1), wav2vec and HuBERT as other pretrained audio encoders.
    Shapes: wave [B, N] 16 kHz, -1..1 -> features [B, L, D], L = round(25 x seconds).
    Choice: 50 features a second, pairs averaged; the sound is padded by 80 samples at both ends, because the
        convolutions of both models (window 400, hop 320) would give one feature less. Zero mean, unit variance.
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
        """wave [n] -> [round(n / 640), D]"""
        length = max(1, round(wave.shape[-1] / SAMPLES_PER_FRAME)) * SAMPLES_PER_FRAME
        wave = fn.pad(wave, (0, max(0, length - wave.shape[-1])))[:length]
        wave = (wave - wave.mean()) / (wave.std() + 1e-5)
        x = self.model(fn.pad(wave, (80, 80))[None]).last_hidden_state           # [1, 2L, D]
        return x[0].unflatten(0, (-1, 2)).mean(1)                                # [L, D]

    @torch.no_grad()
    def forward(self, wave):
        return encode_batch(self.encode, wave, self.dim)


class ScratchEncoder(nn.Module):
    """A small audio encoder of our own, trained together with the generator.

    Patent: S2(1), Fig. 3, "or build an audio encoder and train it from scratch".
    Shapes: wave [B, N] 16 kHz, -1..1 -> features [B, L, D]; encode_mel: mel [B, 80, 4L] -> [B, L, D].
    Choice: Fig. 3 gives no layers; we take a Conv1d stack on whisper's log-mel, two of stride 2 (100 -> 25 a second),
        so that a feature hears 0.3 s of sound and nothing of the rest: each moment is normalised by itself. Without that
        the features grew until the attention's gradient exploded (to 1e9).
    """
    frozen = False

    def __init__(self, dim):
        super().__init__()
        self.dims, self.dim = {"dim": dim}, dim
        widths = (N_MELS, dim, dim, dim, dim)
        self.layers = nn.ModuleList(nn.Conv1d(a, b, k, stride, padding=k // 2) for a, b, k, stride in
                                    zip(widths, widths[1:], (5, 4, 4, 3), (1, 2, 2, 1)))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self.layers)

    def encode_mel(self, mel):
        check(mel, "B 80 columns", "audio.mel")
        x = mel
        for layer, norm in zip(self.layers, self.norms):
            x = fn.leaky_relu(norm(layer(x).mT).mT, 0.1)[..., :x.shape[-1] // layer.stride[0]]
        return x.mT                               # [B, L, D]

    def forward(self, wave):
        device = self.layers[0].weight.device
        return encode_batch(lambda one: self.encode_mel(log_mel(one.cpu())[None].to(device))[0], wave, self.dim)


def parse_audio_encoder(text):
    """"base" -> ("whisper", "base"), "whisper" too; "hubert:DIR" -> ("hubert", "DIR"); "scratch" -> ("scratch", "")."""
    family, _, source = text.partition(":")
    if family == "scratch":
        return "scratch", ""
    if family in ("whisper", "wav2vec2", "hubert"):
        default = {"whisper": "base", "wav2vec2": "facebook/wav2vec2-base", "hubert": "facebook/hubert-base-ls960"}
        return family, source or default[family]
    for hub in ("wav2vec2", "hubert"):            # a bare hub name such as facebook/hubert-base-ls960
        if hub in text and not os.path.isfile(text):
            return hub, text
    return "whisper", text


def load_whisper(source):
    """dims and encoder weights from a whisper name, a full or encoder-only whisper file, or a checkpoint of ours."""
    path = pathlib.Path(source).expanduser()
    try:
        if path.is_file():
            saved = torch.load(path, map_location="cpu", weights_only=True)
        else:
            import whisper
            model = whisper.load_model(source, device="cpu")
            saved = {"dims": dataclasses.asdict(model.dims), "model_state_dict": model.state_dict()}
        if "audio_encoder" in saved:              # a checkpoint of ours that carries a whisper encoder
            saved = saved["audio_encoder"]
            return saved["dims"], saved["state"]
        state = {k: v for k, v in saved["model_state_dict"].items() if k.startswith("encoder.")}
        return dict(saved["dims"]), state
    except Exception as error:                    # no file, no network, a foreign file: one remedy for all
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"--audio-encoder {source}: no whisper encoder there ({reason[:120]}); give a whisper name "
                       f"with a network, the path of a whisper file, or --audio-encoder scratch") from None


def build_audio_encoder(config, weights=None):
    """The audio encoder that config.audio_encoder names.

    Patent: S2(1), whisper, wav2vec, HuBERT or one of one's own.
    Shapes: the module maps wave [B, N] 16 kHz, -1..1 -> [B, L, D], L = round(N / 640).
    weights: {"dims": dict, "state": dict} from a checkpoint, which then needs neither a file nor a network.
    The module has .dim (D; for a pretrained one it, not config.audio_dim, decides), .frozen and .dims (plain numbers
    that rebuild it). Raises BadInput with a remedy if weights or packages are missing.
    """
    family, source = parse_audio_encoder(config.audio_encoder)
    if family == "scratch":
        encoder = ScratchEncoder(config.audio_dim)
        state = weights["state"] if weights else None
    elif family == "whisper":
        dims, state = (weights["dims"], weights["state"]) if weights else load_whisper(source)
        encoder = WhisperEncoder(dims)
    else:
        try:
            import transformers
        except ImportError:
            raise BadInput(f"--audio-encoder {family}: the package transformers is missing; "
                           f"pip install transformers, or use --audio-encoder scratch") from None
        kind = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert"}[family]
        model_class, config_class = (getattr(transformers, kind + end) for end in ("Model", "Config"))
        try:
            model = model_class(config_class(**weights["dims"])) if weights else model_class.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise BadInput(f"--audio-encoder {source}: cannot be loaded ({str(error).splitlines()[0][:120]}); "
                           f"give a local folder, or --audio-encoder scratch") from None
        encoder, state = HubEncoder(model), weights["state"] if weights else None
    if state is not None:
        wanted = encoder.state_dict()             # of a whisper only half the layers
        encoder.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items() if k in wanted})
    return encoder


# ---------------------------------------------------------------- S2(2) image encoder
def half_mask(x):
    """1 for the upper half of the rows, 0 for the lower.

    Patent: S2(2), the masked frame's lower half is zero; S2(4)g, the upper half of the map is masked.
    Shapes: x [..., H, W] -> [H, 1], of x's type and device.
    """
    height = x.shape[-2]
    return (torch.arange(height, device=x.device) < height // 2).to(x.dtype)[:, None]


class EncoderStage(nn.Module):
    """Convolution (stride 2 to halve the map), GroupNorm, activation; where the stride is 2, then a residual convolution.

    Patent: S2(2), stacked 2-D convolutions, group normalisations and activations; stride 2 in some of them.
    Shapes: [B, C, h, w] -> [B, C', h/stride, w/stride].
    Choice: the second convolution, LeakyReLU; the patent gives neither.
    """

    def __init__(self, channels_in, channels, groups, stride):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1)
        self.norm = nn.GroupNorm(groups, channels)
        self.refine = nn.Conv2d(channels, channels, 3, padding=1) if stride == 2 else None

    def forward(self, x):
        B, C, h, w = check(x, "B C h w", "image.stage_in", C=self.conv.in_channels).shape
        x = fn.leaky_relu(self.norm(self.conv(x)), 0.2)              # [B, C', h', w']
        return x if self.refine is None else x + fn.leaky_relu(self.refine(x), 0.2)


class ImageEncoder(nn.Module):
    """R references and the masked frame, stacked on the channel axis, become one feature map and its skips.

    Patent: S2(2), R+1 pictures on the channel axis, GroupNorm with R+1 groups, stride-2 convolutions -> [B, H, W, C].
    Shapes: refs [B, R, 3, H, W] 0..1, masked [B, 3, H, W] 0..1 -> features [B, C, H/32, W/32],
        skips: list of [B, C_i, H_i, W_i], finest first. NCHW, the patent writes NHWC.
    Choice: five stride-2 stages (256 -> 8). With fold = 2 the first is a pixel_unshuffle, which keeps every pixel
        and moves the work to 128 x 128. The lower half of `masked` is zeroed here again: nothing can leak.
    """

    def __init__(self, config):
        super().__init__()
        self.config, groups, widths = config, config.refs + 1, config.channels
        pictures = 3 * groups * config.fold ** 2
        self.stages = nn.ModuleList(EncoderStage(a, b, groups, 1 if i == 0 else 2)
                                    for i, (a, b) in enumerate(zip((pictures,) + widths, widths)))

    def forward(self, refs, masked):
        B, R, _, H, W = check(refs, "B R 3 H W", "image.refs", R=self.config.refs, low=0, high=1).shape
        check(masked, "B 3 H W", "image.masked", B=B, H=H, W=W, low=0, high=1)
        x = torch.cat([refs.flatten(1, 2), masked * half_mask(masked)], 1)       # [B, 3(R+1), H, W]
        x = x.to(self.stages[0].conv.weight.dtype)                   # bfloat16 weights want such pictures
        x = fn.pixel_unshuffle(x, self.config.fold)                  # [B, 3(R+1) fold^2, H/fold, W/fold]
        x = x.contiguous(memory_format=torch.channels_last)
        skips = []
        for stage in self.stages:
            x = _stage(self, stage, x)            # [B, C_i, H_i, W_i]
            skips.append(check(x, "B C h w", f"image.map{len(skips)}", B=B))
        return x, skips[:-1]


def _stage(owner, module, *inputs):
    """module(*inputs), with its activations recomputed in the backward pass if the config asks for it."""
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
        index = audio_window(frames.cpu(), self.spacing, self.window).clamp(0, L - 1).to(features.device)  # [B, T, F]
        rows = torch.arange(B, device=features.device)[:, None, None]
        return check(features[rows, index], "B T F D", "selector.selected", B=B, D=D)


# ---------------------------------------------------------------- S2(4) bidirectional modality fusion
def attention(query, key, value, mask=None):
    """softmax(Q K^T / sqrt(G)) V

    Patent: S2(4)e, G channels of each token.
    Shapes: query [B, heads, Q, G], key and value [B, heads, K, G] -> [B, heads, Q, G];
        mask [K] is added to every row of logits: -inf where nobody may look.
    """
    logits = query @ key.mT / math.sqrt(query.shape[-1])             # [B, heads, Q, K]
    if mask is not None:
        logits = logits + mask
    return logits.softmax(-1) @ value


class MultiHeadAttention(nn.Module):
    """Linear maps to Query, Key, Value; attention in each head; a linear map back.

    Patent: S2(4)d-e.
    Shapes: tokens [B, Q, C], others [B, K, C] -> [B, Q, C]; mask [K] as in `attention`.
    Choice: biases everywhere, number of heads from the config; the patent gives neither.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens, others, mask=None):
        B, Q, C = check(tokens, "B Q C", "fusion.attention_in", C=self.out.in_features).shape
        check(others, "B K C", "fusion.attention_to", B=B, C=C)
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)      # [B, heads, Q, G]
        x = attention(split(self.query(tokens)), split(self.key(others)), split(self.value(others)), mask)
        return self.out(x.transpose(1, 2).flatten(2))                            # [B, Q, C]


def position_code(length, width):
    """The sinusoidal position code.

    Patent: S2(4)c, PE(pos, 2i) = sin(pos / 10000^(2i/width)), PE(pos, 2i+1) = cos of the same.
    Shapes: -> [length, width]
    """
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class ModalityFusion(nn.Module):
    """Audio tokens look at the mouths of the pictures, then every place of the picture looks at the audio tokens.

    Patent: S2(4), Fig. 2: a amplitude, b adapter, c position code, d-e self-attention, f residual and LayerNorm,
        g cross-attention with the upper half of the image masked by -inf.
    Shapes: image [B, C, h, w], audio [B, F, D], amplitude float or [B], > 0 -> [B, C, h, w].
    Choice: g ends with audio tokens, yet the decoder needs a map, and the patent calls the module bidirectional:
        so the tokens that have seen the mouth become Key and Value for every image position's Query, with
        residual and LayerNorm. -inf is added to the attention logits, where it means "never look here"; on the
        features themselves it would give NaN. Nothing normalises between a and the adapter, so a scale survives.
    """

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.channels[-1]
        self.adapter = nn.Sequential(nn.Linear(config.audio_dim, width), nn.LeakyReLU(0.2), nn.Linear(width, width))
        self.register_buffer("positions", position_code(config.window, width), persistent=False)
        self.listen, self.look, self.speak = (MultiHeadAttention(width, config.heads) for _ in range(3))
        self.norm_listen, self.norm_look, self.norm_speak = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, image, audio, amplitude=1.0):
        B, C, h, w = check(image, "B C h w", "fusion.image", C=self.config.channels[-1]).shape
        check(audio, "B F D", "fusion.audio", B=B, F=self.config.window, D=self.config.audio_dim)
        audio = audio.to(self.adapter[0].weight.dtype)
        amplitude = torch.as_tensor(amplitude, dtype=audio.dtype, device=audio.device).expand(B)
        check(amplitude, "B", "fusion.amplitude", low=0, high=10)
        x = audio * amplitude[:, None, None]                         # a  [B, F, D]
        x = self.adapter(x)                                          # b  [B, F, C]
        x = x + self.positions.to(x.dtype)                           # c
        x = self.norm_listen(x + self.listen(x, x))                  # d-f
        check(x, "B F C", "fusion.tokens", B=B)
        places = image.flatten(2).mT                                 # [B, hw, C]
        if self.config.bidirectional:
            mask = torch.zeros(h, w, device=x.device, dtype=x.dtype)
            if self.config.mask_upper:
                mask = torch.where(half_mask(mask) > 0, -math.inf, mask)
            x = self.norm_look(x + self.look(x, places, mask.flatten()))         # g  [B, F, C]
            check(x, "B F C", "fusion.looked", B=B)
        places = self.norm_speak(places + self.speak(places, x))     # the way back  [B, hw, C]
        return check(places.mT.unflatten(2, (h, w)), "B C h w", "fusion.fused", B=B)


# ---------------------------------------------------------------- S2(5) image decoder
class SPADE(nn.Module):
    """Spatially adaptive denormalisation: normalise, then scale and shift each place by what a map says there.

    Patent: S2(5), Fig. 6.
    Shapes: x [B, C, h, w], map [B, M, h, w] -> [B, C, h, w].
    Choice: instance norm without parameters; map -> 3x3 conv, LeakyReLU -> 3x3 convs gamma, beta; norm(x) (1 + gamma)
        + beta. Source: Park et al. 2019 (SPADE), whose segmentation map is here the encoder's skip.
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
    Shapes: x [B, C_in, h, w], map [B, M, h, w] -> [B, C_out, h, w].
    Choice: the shortcut has SPADE and a 1x1 convolution where the width changes; ImageDecoder changes it before. Source: Park et al. 2019.
    """

    def __init__(self, channels_in, channels, map_channels, hidden):
        super().__init__()
        self.spade1, self.spade2 = (SPADE(c, map_channels, hidden) for c in (channels_in, channels))
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = None
        if channels_in != channels:
            self.spade0, self.shortcut = SPADE(channels_in, map_channels, hidden), nn.Conv2d(channels_in, channels, 1)

    def forward(self, x, map):
        B, C, h, w = check(x, "B C h w", "decoder.block_x").shape
        straight = x if self.shortcut is None else self.shortcut(self.spade0(x, map))   # [B, C_out, h, w]
        x = self.conv1(fn.leaky_relu(self.spade1(x, map), 0.2))      # [B, C_out, h, w]
        return straight + self.conv2(fn.leaky_relu(self.spade2(x, map), 0.2))


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


class ReferenceCopy(nn.Module):
    """A draft of the lower half, warped and mixed from the references.

    Patent: silent; it wants teeth and skin taken from the references (S2(2), advantages 3 and 7).
    Shapes: x [B, C, h/2, w] decoder features of the lower half, refs [B, R, 3, H, W] 0..1 -> [B, 3, H/2, W] 0..1.
    Choice: a convolution predicts for each reference a flow (in half pictures) and a mixing weight, at the features'
        size; the sampled pixels are real ones, so they are sharp, also for a face never seen in training.
        The decoder then only corrects the draft. Source: the idea of DINet (Zhang et al. 2023); off with copy=False.
    """

    def __init__(self, channels, refs):
        super().__init__()
        self.conv = nn.Conv2d(channels, 3 * refs, 3, padding=1)
        self.conv.weight.data.mul_(0.1)           # start near "no motion, all references alike"
        self.conv.bias.data.zero_()

    def forward(self, x, refs):
        B, R, _, H, W = check(refs, "B R 3 H W", "decoder.copy_refs", R=self.conv.out_channels // 3).shape
        check(x, "B C h w", "decoder.copy_in", B=B, C=self.conv.in_channels)
        x = self.conv(x).float()                                     # [B, 3R, h, w]
        x = fn.interpolate(x, size=(H // 2, W), mode="bilinear")     # [B, 3R, H/2, W]
        flow, weight = x.split([2 * R, R], 1)
        y = (torch.arange(H // 2, H, device=x.device) + 0.5) * 2 / H - 1         # grid_sample's -1..1, lower half
        x = (torch.arange(W, device=x.device) + 0.5) * 2 / W - 1
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)        # [H/2, W, 2] as (x, y)
        grid = grid + 0.5 * flow.unflatten(1, (R, 2)).permute(0, 1, 3, 4, 2).tanh()   # [B, R, H/2, W, 2]
        lower = fn.grid_sample(refs.flatten(0, 1).float(), grid.flatten(0, 1), mode="bilinear",
                               padding_mode="border", align_corners=False)      # [BR, 3, H/2, W]
        return (lower.unflatten(0, (B, R)) * weight.softmax(1)[:, :, None]).sum(1)    # [B, 3, H/2, W]


class ImageDecoder(nn.Module):
    """From the fused map back to a picture.

    Patent: S2(5), Fig. 4: M = 5 x (upsampling, convolution, SPADEResnetBlock), LeakyReLU, Conv2d, Sigmoid.
    Shapes: fused [B, C, H/32, W/32], skips as ImageEncoder gives them, refs and masked as LipSync gets them
        -> picture [B, 3, H, W] 0..1.
    Choice: SPADE's map is the skip of the same size. The convolution after each (nearest) upsampling is 1x1 and is
        done before it, which is the same sum at a quarter of the cost. With fold = 2 the fifth upsampling is a
        pixel_shuffle after Conv2d. Only the lower half is asked for, so from the first stage on the maps keep their
        lower 5/8 (an eighth for the convolutions to look up), and the picture's upper half is the masked frame's:
        a third less work. With copy, Conv2d's output is added to the draft before the Sigmoid (to its logit), so a
        decoder that says nothing leaves the draft as it is.
    """

    def __init__(self, config):
        super().__init__()
        self.config, widths, groups = config, config.channels[::-1], config.refs + 1
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(widths, widths[1:]))
        self.blocks = nn.ModuleList(
            SPADEResnetBlock(c, c, c, min(c, config.spade_hidden)) if config.decoder == "spade"
            else ConvBlock(c, c, groups) for c in widths[1:])
        self.copy_at = len(widths) - 3 + (config.fold - 1)           # the stage at half of the picture's size
        self.copy = ReferenceCopy(widths[self.copy_at + 1], config.refs) if config.copy else None
        self.out = nn.Conv2d(widths[-1], 3 * config.fold ** 2, 3, padding=1)
        self.out.weight.data.mul_(0.1 if config.copy else 1.0)

    def forward(self, fused, skips, refs, masked):
        B, C, h, w = check(fused, "B C h w", "decoder.fused", C=self.config.channels[-1]).shape
        x, draft, H = fused, None, check(masked, "B 3 H W", "decoder.masked", B=B, H=32 * h, W=32 * w).shape[2]
        for i, (conv, block, skip) in enumerate(zip(self.convs, self.blocks, skips[::-1])):
            x = fn.interpolate(conv(x), scale_factor=2)              # [B, C_i, 2h, 2w], or their lower 5/8 rows
            x = x[:, :, 3 * skip.shape[2] // 8:] if i == 0 else x    # [B, C_i, 5/8 h_i, w_i]
            x = _stage(self, block, x, skip[:, :, -x.shape[2]:])
            check(x, "B C h w", f"decoder.map{i}", B=B)
            if self.copy is not None and i == self.copy_at:
                draft = check(self.copy(x[:, :, -H // 4:], refs), "B 3 h w", "decoder.draft", B=B)
        x = self.out(fn.leaky_relu(x, 0.2)).float()                  # [B, 3 fold^2, 5/8 H/fold, W/fold]
        x = fn.pixel_shuffle(x, self.config.fold)[:, :, -H // 2:]    # [B, 3, H/2, W]
        if draft is not None:
            x = x + draft.clamp(1 / 255, 254 / 255).logit()
        x = torch.cat([masked[:, :, :H // 2], x.sigmoid().to(masked)], 2)        # [B, 3, H, W]
        return check(x, "B 3 H W", "decoder.picture", B=B)


# ---------------------------------------------------------------- S2 the whole network
class LipSync(nn.Module):
    """Draws the lower half of a face so that it says what the audio says.

    Patent: S2, Fig. 1.
    Shapes: refs [B, R, 3, H, W] 0..1, masked [B, 3, H, W] 0..1 (its lower half is not read), audio [B, F, D] the
        selected features, amplitude float or [B] (1 = as spoken, > 1 wider) -> picture [B, 3, H, W] 0..1.
    Choice: the S frames of a training group are S entries of the batch, so training and inference share this forward.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_encoder, self.fusion, self.decoder = ImageEncoder(config), ModalityFusion(config), ImageDecoder(config)

    def forward(self, refs, masked, audio, amplitude=1.0):
        size = self.config.image_size
        B, R, _, H, W = check(refs, "B R 3 H W", "lipsync.refs", R=self.config.refs, H=size, W=size).shape
        check(masked, "B 3 H W", "lipsync.masked", B=B, H=size, W=size)
        check(audio, "B F D", "lipsync.audio", B=B, F=self.config.window, D=self.config.audio_dim)
        image, skips = self.image_encoder(refs, masked)              # [B, C, h, w]
        fused = self.fusion(image, audio, amplitude)                 # [B, C, h, w]
        return self.decoder(fused, skips, refs, masked)              # [B, 3, H, W]


# ---------------------------------------------------------------- devices and checkpoints
def pick_device(name="auto"):
    """"auto" -> cuda if there is one, else cpu; else the named device. BadInput if it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}") from None


def fast_bfloat16(device):
    """Whether the device is fast at bfloat16: GPUs, and CPUs with AMX or AVX512-BF16."""
    able = torch.cpu.get_capabilities()
    return device.type == "cuda" or bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def autocast(device):
    """A context that computes in bfloat16 where the device is fast at it; for training, whose weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


def save_checkpoint(path, content):
    """Write plain types and tensors to `path` so that a kill at any moment leaves the old file or the new one."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:      # torch reports a full disk as RuntimeError
        raise BadInput(f"{path}: cannot be written ({str(error).splitlines()[0]}); the old file is kept") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, kind="lipsync"):
    """The dict that save_checkpoint wrote, on the CPU. BadInput if it is missing, broken, foreign or newer."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such weights file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                             # truncated, not a torch file, or a pickle that holds code
        raise BadInput(f"{path}: not a checkpoint of this project, or damaged") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise BadInput(f"{path}: not a {kind} checkpoint of this project")
    if content["version"] > VERSION:
        raise BadInput(f"{path}: written by a newer version ({content['version']} > {VERSION})")
    return content


# ---------------------------------------------------------------- python lipsync.py
def example(config, batch=1):
    """Random inputs of the right shapes: (refs, masked, audio)"""
    size = config.image_size
    masked = torch.rand(batch, 3, size, size)
    return (torch.rand(batch, config.refs, 3, size, size), masked * half_mask(masked),
            torch.randn(batch, config.window, config.audio_dim))


def gmac(module, *inputs):
    """Multiply-adds of one forward, in 1e9, and {submodule name: share}, counted by torch's FlopCounterMode."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(*inputs)
    counts = {k.split(".", 1)[-1]: sum(v.values()) / 2e9 for k, v in counter.get_flop_counts().items()}
    return counter.get_total_flops() / 2e9, counts


def record(preset):
    """One second of sound and one frame through everything: (networks by stage, rows as `trace` gives them)."""
    config = dataclasses.replace(PRESETS[preset], audio_encoder="scratch")       # whisper's needs a download
    nets = ScratchEncoder(config.audio_dim), AudioSelector(config), LipSync(config)
    with trace() as rows, torch.no_grad():
        audio = nets[1](nets[0](torch.zeros(1, SAMPLE_RATE)))[:, 12]             # [1, F, D]
        nets[2](*example(config)[:2], audio)
    return nets, rows


def print_trace(preset):
    """One row per tensor that `check` saw, then parameters and multiply-adds of each stage."""
    (audio_encoder, _, net), rows = record(preset)
    print(f"{preset}: {net.config}\n\n{'stage':9} {'tensor':11} {'axes':11} shape")
    for name, axes, shape in rows:
        print("{:9} {:11} {:11} {}".format(*name.split("."), axes, " ".join(map(str, shape))))
    total, counts = gmac(net, *example(net.config))
    sound = gmac(audio_encoder, torch.zeros(1, SAMPLE_RATE))[0] / FPS
    stages = [("audio", audio_encoder, sound)] + [(name.split("_")[0], module, counts[name]) for name, module in net.named_children()]
    print(f"\n{'stage':9} {'parameters':>12} {'GMAC/frame':>11}")
    for stage, module, macs in stages:
        print(f"{stage:9} {sum(p.numel() for p in module.parameters()):12,} {macs:11.3f}")
    print(f"{'sum':9} {sum(p.numel() for _, m, _ in stages for p in m.parameters()):12,} {total + sound:11.3f}")


def draw_architecture(preset, png):
    """The recorded tensors as a picture: a box per stage, its tensors with their shapes inside, arrows where data flows."""
    import cv2
    import numpy as np
    _, rows = record(preset)
    places = {"audio": (20, 40), "selector": (20, 220), "image": (20, 400), "fusion": (420, 220), "decoder": (820, 220)}  # px
    canvas = np.full((680, 1220, 3), 255, np.uint8)
    text = lambda words, x, y, size=0.45: cv2.putText(canvas, words, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, (40, 40, 40), 1, cv2.LINE_AA)
    corners = {}
    for stage, (x, y) in places.items():
        lines = [f"{name.split('.')[1]} {'x'.join(map(str, shape))}" for name, _, shape in rows
                 if name.startswith(stage + ".") and "_" not in name]
        corners[stage] = (x, y, x + 340, y + 30 + 20 * len(lines))
        cv2.rectangle(canvas, (x, y), corners[stage][2:], (170, 110, 40), 1, cv2.LINE_AA)
        text(stage, x + 8, y + 20, 0.6)
        for i, line in enumerate(lines):
            text(line, x + 16, y + 42 + 20 * i)
    for a, b, note in (("audio", "selector", ""), ("selector", "fusion", "F features"), ("image", "fusion", "map"), ("fusion", "decoder", "fused")):
        down = places[a][0] == places[b][0]
        start = (corners[a][0] + 170, corners[a][3]) if down else (corners[a][2], corners[a][1] + 50)
        end = (corners[b][0] + 170, corners[b][1]) if down else (corners[b][0], corners[b][1] + (50 if a != "image" else 130))
        cv2.arrowedLine(canvas, start, end, (60, 60, 200), 1, cv2.LINE_AA, tipLength=0.12)
        text(note, (start[0] + end[0]) // 2 - 36, (start[1] + end[1]) // 2 - 8, 0.4)
    route = [(corners["image"][2], 600), (990, 600), (990, corners["decoder"][3])]
    cv2.polylines(canvas, [np.array(route[:2])], False, (60, 60, 200), 1, cv2.LINE_AA)
    cv2.arrowedLine(canvas, route[1], route[2], (60, 60, 200), 1, cv2.LINE_AA, tipLength=0.1)
    text("skips, references, masked frame", 560, 592)
    if not cv2.imwrite(str(png), canvas):
        raise BadInput(f"--figure {png}: cannot be written")


@torch.inference_mode()
def seconds_a_frame(net, batch, seconds=2.0):
    """How long one frame takes the network in a batch of that size: median over at least three runs, on this machine."""
    inputs, times, start = [x.to(next(net.parameters()).device) for x in example(net.config, batch)], [], time.perf_counter()
    while len(times) < 4 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        net(*inputs).sum().item()                                    # a GPU has finished when its answer is here
        times.append((time.perf_counter() - begin) / batch)
    return statistics.median(times[1:])


@torch.inference_mode()
def benchmark():
    """Frames a second of every preset and decoder, on this machine."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, channels_last\n"
          f"{'preset':7} {'decoder':8} {'GMAC':>7} {'type':5} {'batch':>5} {'ms/frame':>9} {'frames/s':>9}")
    for preset, decoder in ((p, d) for p in PRESETS for d in ("spade", "conv")):
        config = dataclasses.replace(PRESETS[preset], decoder=decoder)
        net = LipSync(config).eval().to(memory_format=torch.channels_last)
        total, _ = gmac(net, *example(config))
        for dtype, batch in ((d, b) for d in (torch.float32, torch.bfloat16) for b in (1, 8)):
            one = seconds_a_frame(net.to(dtype), batch)
            print(f"{preset:7} {decoder:8} {total:7.2f} {'bf16' if dtype == torch.bfloat16 else 'fp32'} {batch:6} "
                  f"{1000 * one:9.1f} {1 / one:9.1f}", flush=True)


def export(preset, path):
    """Write the network as a torch.export program: (refs, masked, audio, amplitude [B]), with a free batch axis."""
    net = LipSync(PRESETS[preset]).eval()
    program = torch.export.export(net, (*example(PRESETS[preset], 2), torch.ones(2)),
                                  dynamic_shapes=({0: torch.export.Dim("B", min=1, max=256)},) * 4)
    torch.export.save(program, path)


def main():
    parser = argparse.ArgumentParser(description="Build the network, push one batch through, print every tensor's shape.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="edge", help="size of the network")
    parser.add_argument("--benchmark", action="store_true", help="time every preset and decoder on this machine")
    parser.add_argument("--figure", metavar="PNG", help="draw the stages and their recorded shapes")
    parser.add_argument("--export", metavar="FILE.pt2", help="write the network as a torch.export program")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.benchmark:
        benchmark()
    elif args.figure:
        draw_architecture(args.preset, args.figure)
        print(f"wrote {args.figure}")
    elif args.export:
        export(args.preset, args.export)
        print(f"wrote {args.export}")
    else:
        print_trace(args.preset)


if __name__ == "__main__":
    cli(main)
