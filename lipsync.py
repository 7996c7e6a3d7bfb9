"""The lip-sync network, in the order of the patent.

    stage    | code                                                        | step      | figure
    image    | ImageEncoder                                                | S2(2)     | 1
    selector | AudioSelector                                               | S2(3)     | 1
    fusion   | ModalityFusion, attention                                   | S2(4) a-g | 2
    decoder  | ImageDecoder, SPADEResnetBlock or ConvBlock, ReferenceMix   | S2(5)     | 4, 5, 6
    all      | LipSync; redraw: pictures in, pictures out                  | S2        | 1

S2(1), the audio encoders, is audio.py; lips and warp, which S2 does not have, are lips.py. Letters
of shapes as in common.py. Pictures are RGB, float, 0..1. `python lipsync.py` prints the trace of
one batch through all stages.
"""
import argparse
import dataclasses
import itertools
import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as fn
from torch.utils.checkpoint import checkpoint

from audio import build_audio_encoder
from common import FPS, SAMPLE_RATE, check, cli, trace
from lips import LipHead, ReferenceWarp, lower_rows


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
    channels: tuple = (32, 64, 128, 256, 384, 512)  # of stages, finest first, to multiples of R+1
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
    "tiny": Config(decoder="conv", fold=4, channels=(16, 32, 96, 128), heads=4,
                   audio_encoder="scratch", audio_dim=96, lip_width=128),
}


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
    Shapes: [B, C, h, w] -> [B, C', h/stride, w/stride]; with fold > 1 h and w are fold times that.
    Choice: the second convolution, LeakyReLU; the patent gives neither.
    """

    def __init__(self, channels_in, channels, groups, stride, fold=1):
        super().__init__()
        self.fold = fold
        self.conv = nn.Conv2d(channels_in * fold ** 2, channels, 3, stride, padding=1)
        self.norm = nn.GroupNorm(groups, channels)
        self.refine = nn.Conv2d(channels, channels, 3, padding=1) if stride == 2 else None

    def forward(self, x):
        check(x, "B C h w", "image.stage_in", C=self.conv.in_channels // self.fold ** 2)
        x = folded_conv(x, self.conv, self.fold)                     # [B, C', h/stride, w/stride]
        x = fn.leaky_relu(self.norm(x), 0.2)
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
        before, stride, fold = 3 * groups, 1, config.fold
        self.stages = nn.ModuleList()
        for width in config.channels:
            self.stages.append(EncoderStage(before, width, groups, stride, fold))
            before, stride, fold = width, 2, 1

    def forward(self, refs, masked):
        R = self.config.refs
        B, _, _, H, W = check(refs, "B R 3 H W", "image.refs", R=R, low=0, high=1).shape
        check(masked, "B 3 H W", "image.masked", B=B, H=H, W=W, low=0, high=1)
        dtype = self.stages[0].conv.weight.dtype                     # perhaps bfloat16
        upper = masked * half_mask(masked)                           # [B, 3, H, W]
        x = torch.cat([refs.flatten(1, 2), upper], 1).to(dtype)      # [B, 3(R+1), H, W]
        skips = []
        for stage in self.stages:
            x = _stage(self, stage, x)                               # [B, C_i, h_i, w_i]
            skips.append(check(x, "B C h w", f"image.map{len(skips)}", B=B))
        return x, skips[:-1]


def folded_conv(x, conv, fold):
    """conv(pixel_unshuffle(x, fold)), but the weights are unfolded, not the pictures: no copy.

    Shapes: x [B, C, H, W], conv of C fold^2 channels -> [B, C', H/fold/stride, W/fold/stride].
    Choice: folding keeps every pixel and moves the work to a smaller map.
    """
    weight = fn.pixel_shuffle(conv.weight, fold)                     # [C', C, 3 fold, 3 fold]
    return fn.conv2d(x, weight, conv.bias, fold * conv.stride[0], padding=fold)


def _stage(owner, module, *inputs):
    """module(*inputs); with config.checkpointing the backward pass recomputes its activations"""
    if owner.config.checkpointing and owner.training:
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


# ---------------------------------------------------------------- S2(3) audio feature selector
def audio_window(frame, spacing, length, count=None):
    """Which of the `count` audio features of a clip frame `frame` hears: dubbing, eval, training.

    Patent: S2(3), frame + spacing * (-(length//2) .. length//2).
    Shapes: frame int -> int64 [length], or int tensor [T] -> [T, length].
    Choice: before the first and after the last feature, these two repeat; count None: numbers
        below 0 and beyond the clip stay.
    """
    offsets = spacing * (torch.arange(length) - length // 2)
    window = torch.as_tensor(frame)[..., None] + offsets
    return window if count is None else window.clamp(0, count - 1)


class AudioSelector(nn.Module):
    """The F audio features around each frame.

    Patent: S2(3), {a_(i-5), ..., a_i, ..., a_(i+5)} for spacing 1 and length 11, or spacing 2.
    Shapes: features [B, L, D] -> [B, L, F, D], or [B, T, F, D] for given frames [B, T] (int).
    Choice: training samples hold their windows already: sampling.audio_input does this to arrays.
    """

    def __init__(self, config):
        super().__init__()
        self.window, self.spacing = config.window, config.spacing

    def forward(self, features, frames=None):
        B, L, D = check(features, "B L D", "selector.features").shape
        if frames is None:
            frames = torch.arange(L).expand(B, L)
        check(frames, "B T", "selector.frames", B=B)
        index = audio_window(frames.cpu(), self.spacing, self.window, L)         # [B, T, F]
        index = index.to(features.device)
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
        logits = logits + mask.expand_as(logits)                     # inductor wants all 4 axes
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


# ---------------------------------------------------------------- S2(5) image decoder
def smooth_blocks(x, fold):
    """The mean of fold x fold pixels at every place, which wipes out any pattern of that period.

    Shapes: x [B, C, H, W] -> [B, C, H, W].
    Choice: losses that reward sharpness like the grid of blocks that pixel_shuffle makes. Detail
        comes from the references' own pixels, so this loses little.
    """
    before, after = (fold - 1) // 2, fold // 2
    H, W = x.shape[2:]
    x = fn.pad(x.contiguous(), (before, after, before, after), mode="replicate")  # for inductor
    x = sum(x[:, :, row:row + H] for row in range(fold))             # [B, C, H, W + fold - 1]
    x = sum(x[..., column:column + W] for column in range(fold))     # [B, C, H, W]
    return x / fold ** 2


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
            x = fn.interpolate(conv(x), scale_factor=2)              # twice as high and wide
            skip = lower_rows(skip)                                  # [B, C_i, 5/8 h_i, w_i]
            x = _stage(self, block, x[:, :, -skip.shape[2]:], skip)  # the first still has all rows
            check(x, "B C h w", f"decoder.map{i}", B=B)
        if self.mix is not None:
            draft = self.mix(x, refs)                                # [B, 3, 5/8 H, W]
            check(draft, "B 3 H W", "decoder.draft", B=B)
            folded = fn.pixel_unshuffle(draft.to(x.dtype), fold)     # [B, 3 fold^2, 5/8 h_i, w_i]
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


def redraw(net, refs, crops, points, audio, amplitude=1.0, lips=None):
    """Crops of a face with their lower halves drawn anew: what samples, eval and dubbing all call.

    Shapes: refs uint8 [R, 256, 256, 3], crops uint8 [B, 256, 256, 3] (RGB), points float32
        [B, R, 2, K, 2] or None, audio [B, F, D], amplitude float, lips float32 [B, P, 2] or None:
        as the sound asks for them -> uint8 [B, 256, 256, 3], on the CPU; numpy in, numpy out but
        for audio.
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
    if lips is not None:
        lips = torch.from_numpy(lips).to(device)
    with torch.inference_mode():
        drawn = net(shared, masked, audio, amplitude, points, lips).float()
        if size != crops.shape[1]:
            drawn = fn.interpolate(drawn, size=crops.shape[1:3], mode="bicubic")
        drawn = (drawn * 255).round().clamp(0, 255).byte()           # [B, 3, 256, 256]
        return drawn.permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------- python lipsync.py
def example(config, batch=1):
    """Random inputs of the right shapes: (refs, masked, audio, amplitude, points)"""
    R, K, size = config.refs, 151, config.image_size              # K: any number that has lips
    masked = torch.rand(batch, 3, size, size)
    points = torch.rand(batch, R, 1, K, 2) * 0.5 + 0.25
    points = points + 0.02 * torch.randn(batch, R, 2, K, 2)
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
    nets = build_audio_encoder(config), AudioSelector(config), LipSync(config)
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
