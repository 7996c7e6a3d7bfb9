"""S2(1): a sound becomes audio features, 25 a second.

    stage      | code
    loudness   | level_sound
    mel        | log_mel
    long sound | in_windows
    encoders   | WhisperEncoder, HubEncoder, ScratchEncoder
    from files | parse_audio_encoder, build_audio_encoder

Letters as in common.py. A sound is mono, 16 kHz, -1..1.
"""
import os
import pathlib

import torch
from torch import nn
from torch.nn import functional as fn

from common import FPS, SAMPLES_PER_FRAME, BadInput, check, first_line

HOP = 160                                         # samples between two mel columns: 10 ms
N_MELS = 80                                       # mel bands
LOUD = 0.1                                        # root mean square of loud frames, full scale 1
MEL_FLOOR = -7.0                                  # log10 of power: 80 dB below loudest speech
MEL_PER_FRAME = SAMPLES_PER_FRAME // HOP          # 4
WINDOW_SECONDS, OVERLAP_SECONDS = 30, 10          # what an encoder sees at once; two share


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


class FrozenEncoder(nn.Module):
    """What both pretrained audio encoders share: they are never trained.

    Patent: S2(1), a pretrained audio encoder.
    Shapes: wave [B, N] 16 kHz, -1..1 -> features [B, L, D], L = round(N / 640).
    Choice: frozen also means never in training mode: no dropout.
    """
    frozen = True

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, wave):
        return encode_batch(self, wave)


class WhisperEncoder(FrozenEncoder):
    """A pretrained whisper's audio encoder, frozen.

    Patent: S2(1), a pretrained multilingual ASR model, so that one network serves all languages.
    Shapes: wave [B, N] 16 kHz, -1..1 -> features [B, L, D], L = round(N / 640).
    Choice: its 50 features a second are averaged in pairs. They depend on where in 30 s a sound
        stands: the same 5 s, moved by 5 s, have a cosine of 0.63 (base, last layer), so what short
        clips teach fails in long videos. With one position code for all, after half of the layers,
        it is 0.976 to 0.997, in half the time, and the mouth's opening can be read off as well
        (ridge regression on GRID: r = 0.870, last layer 0.869). Sounds cost what they are long.
    """
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


class HubEncoder(FrozenEncoder):
    """wav2vec 2.0 or HuBERT, frozen, through the transformers package.

    Patent: S2(1), wav2vec and HuBERT as other pretrained audio encoders.
    Shapes: wave [B, N] 16 kHz, -1..1 -> features [B, L, D], L = round(N / 640).
    Choice: pairs averaged as whisper's; 80 samples of silence at both ends, since the convolutions
        (window 400, hop 320) would give one feature less; zero mean, unit variance.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.dim = model, model.config.hidden_size
        self.dims = dict(model.config.to_dict())
        self.eval().requires_grad_(False)

    def encode(self, wave):
        """wave [640 L] -> [L, D]"""
        wave = (wave - wave.mean()) / (wave.std() + 1e-5)
        x = self.model(fn.pad(wave, (80, 80))[None]).last_hidden_state           # [1, 2L, D]
        return x[0].unflatten(0, (-1, 2)).mean(1)                    # [L, D]


class ScratchEncoder(nn.Module):
    """A small audio encoder of our own, trained together with the generator.

    Patent: S2(1), Fig. 3, "or build an audio encoder and train it from scratch".
    Shapes: wave [B, N] 16 kHz, -1..1 -> features [B, L, D]; encode_mel: [B, 80, 4L] -> [B, L, D].
    Choice: Fig. 3 gives no layers: Conv1d on log-mel, two of stride 2; a feature hears 0.24 s. Each
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
