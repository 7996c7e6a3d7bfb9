"""The lip-reading expert of S3(2): the text of a talking mouth, and what it sees of a face.

    stage      | code                                   | patent
    text       | encode_text, decode_tokens             | -
    mouth      | mouth_view                             | -
    robustness | jitter_pictures                        | S3(1)
    lip reader | LipReader, lip_batch_loss, ctc_costs   | S3(2)
    judged     | character_error_rate                   | -

Letters as in common.py. "Pictures" are RGB 0..1: the lower half of an upright face crop
[3, H, 2H] (128 x 256 of the 256 px crop, half of that in training clips), or the view of the mouth
that mouth_view has cut from it.
"""
import torch
from torch import nn
from torch.nn import functional as fn

from common import check
from lipsync import position_code
from losses import lip_reading_loss

VIEW_PX = {"small": 40, "full": 80}  # height of the view; a mouth is about 33 or 66 px wide in it
LUMA = (0.299, 0.587, 0.114)  # of RGB, BT.601
BOS, EOS, PAD = 256, 257, 258  # after the 256 bytes: begin, end, nothing (also CTC's blank)
VOCABULARY = 259


# ---------------------------------------------------------------- text
def encode_text(text):
    """str -> tokens: its UTF-8 bytes, then EOS. Any language, no vocabulary."""
    return [*text.encode(), EOS]


def decode_tokens(tokens):
    """Tokens up to EOS -> str; bytes that are no UTF-8 become the replacement character."""
    tokens = [*tokens, EOS]
    tokens = tokens[:tokens.index(EOS)]
    return bytes(token for token in tokens if token < BOS).decode(errors="replace")


# ---------------------------------------------------------------- what an expert sees
def mouth_view(pictures, height):
    """The mouth with some room around it. pictures [..., 3, H, 2H] -> [..., 3, height, 2 height];
    a view of that size passes unchanged."""
    H, W = pictures.shape[-2:]
    if (H, W) == (height, 2 * height):
        return pictures
    row, column = H // 16, W // 16
    mouth = pictures[..., row:11 * row, 3 * column:13 * column]
    small = fn.adaptive_avg_pool2d(mouth.flatten(0, -4), (height, 2 * height))
    return small.unflatten(0, pictures.shape[:-3])


def jitter_pictures(pictures, strength=1.0):
    """Another camera: colour, contrast, brightness, blur, shift (one for each clip; the shift for
    all) and noise. pictures [B, T, 3, H, W] in 0..1 -> the same. Strength 0 changes nothing."""
    B, T, _, H, W = pictures.shape
    reach = W // 24  # px, 3 of 80
    shift = uniform((2,), strength * reach).round().int()
    x, y = (reach + shift).tolist()
    padded = fn.pad(pictures.flatten(0, 1), (reach,) * 4, mode="replicate")
    moved = padded[..., y:y + H, x:x + W]
    blurred = fn.avg_pool2d(moved, 3, 1, 1, count_include_pad=False)
    contrast, light, blur = uniform((3, B, 1, 1, 1, 1), strength).to(pictures.device)
    tint = uniform((B, 1, 3, 1, 1), strength).to(pictures.device)
    noise = 0.02 * strength * torch.randn_like(pictures)
    pictures = torch.lerp(moved.unflatten(0, (B, T)), blurred.unflatten(0, (B, T)), blur.abs())
    mean = pictures.mean((1, 3, 4), keepdim=True)  # [B, 1, 3, 1, 1]
    pictures = mean + (pictures - mean) * (1 + 0.3 * contrast)
    pictures = pictures + 0.15 * (mean * tint + light)
    return (pictures + noise).clamp(0, 1)


def uniform(shape, reach):
    """Random numbers in -reach..reach"""
    return torch.empty(shape).uniform_(-reach, reach)


# ---------------------------------------------------------------- layers of both experts
def conv(before, after, kernel=1, stride=1, groups=1):
    layer = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after))


class Residual(nn.Module):
    """body(x) beside a shortcut. Source: ResNet (He et al., 2015)."""

    def __init__(self, body, shortcut=None):
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


# ---------------------------------------------------------------- S3(2) the lip reader
class LipReader(nn.Module):
    """From the lower face to text.

    Patent: the lip-reading expert, S3(2): P(Y | V) of the text Y given the video V. Nothing is said
        of its inside.
    Shapes: pictures [B, T, 3, H, 2H], tokens [B, U] int64 -> logits [B, U, V]; entry n has seen the
        video and tokens 0..n-1. lengths [B]: frames of each clip, where padded.
    Choice: 3-D convolution, 2-D ResNet, Transformer (Afouras et al., 2018) and a CTC head, which
        learns first and pulls the rest along (Petridis et al., 2018). Grey, each frame normalised:
        light does not matter. Convolution over time before the attention: order is learned sooner.
        4 x 4 px strides at once: the rim costs most on a CPU. "small": 9 MMAC a frame.
    """

    def __init__(self, size="small"):
        super().__init__()
        self.config = dict(size=size)  # what load_expert needs
        sizes = {"small": ((32, 64, 128), 160, 4, 2), "full": ((64, 128, 256, 512), 512, 8, 6)}
        channels, hidden, heads, layers = sizes[size]
        first, relu = channels[0], nn.ReLU()
        stem = nn.Conv3d(1, first, (5, 7, 7), (1, 4, 4), (2, 3, 3), bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm3d(first), relu)
        blocks = []
        for before, after in zip(channels, channels[1:]):
            blocks += [conv(before, after, 3, 2), relu, Residual(conv(after, after, 3)), relu]
        final = channels[-1] * 3 * 5  # 40 x 80 / 16 = 80 x 160 / 32 = 3 x 5
        self.frames = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(final, hidden))
        self.time = nn.Sequential()
        for _ in range(layers):
            along = nn.Sequential(nn.Conv1d(hidden, hidden, 5, padding=2),
                                  nn.BatchNorm1d(hidden), relu)
            self.time.append(Residual(along))
        options = dict(nhead=heads, dim_feedforward=2 * hidden, batch_first=True, norm_first=True)
        encoder_layer = nn.TransformerEncoderLayer(hidden, **options)
        decoder_layer = nn.TransformerDecoderLayer(hidden, **options)
        self.encoder = nn.TransformerEncoder(encoder_layer, layers, nn.LayerNorm(hidden),
                                             enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder_layer, layers // 2, nn.LayerNorm(hidden))
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.ctc_head = nn.Linear(hidden, VOCABULARY)
        self.text_head = nn.Linear(hidden, VOCABULARY)

    def encode(self, pictures, lengths=None):
        """pictures [B, T, 3, H, 2H], lengths [B] or None -> frames [B, T, hidden], each with its
        neighbours; memory [B, T, hidden], each beside all others; padding bool [B, T] or None"""
        B, T = check(pictures, "B T 3 H W", "lip.pictures").shape[:2]
        mouth = mouth_view(pictures, VIEW_PX[self.config["size"]])  # [B, T, 3, h, w]
        grey = torch.einsum("btchw,c->bthw", mouth, mouth.new_tensor(LUMA))
        contrast = grey.std((2, 3), keepdim=True) + 0.02
        grey = (grey - grey.mean((2, 3), keepdim=True)) / contrast
        padding = None
        if lengths is not None:
            padding = torch.arange(T, device=grey.device) >= lengths.to(grey.device)[:, None]
        maps = self.stem(hide(grey, padding)[:, None])  # [B, C, T, h/4, w/4]
        maps = maps.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        frames = self.frames(maps).unflatten(0, (B, T))  # [B, T, hidden]
        for block in self.time:  # each sees two frames either way: hide anew what is no frame
            frames = block(hide(frames, padding).mT).mT
        placed = frames + position_code(*frames.shape[1:]).to(frames)
        return frames, self.encoder(placed, src_key_padding_mask=padding), padding

    def decode(self, memory, padding, tokens):
        """memory [B, T, hidden], padding [B, T] or None, tokens [B, U] -> logits [B, U, V]"""
        B, U = check(tokens, "B U", "lip.tokens", B=len(memory)).shape
        before = fn.pad(tokens, (1, -1), value=BOS)  # entry n is given token n-1
        query = self.embedding(before)  # [B, U, hidden]
        query = query + position_code(*query.shape[1:]).to(query)
        future = torch.ones(U, U, dtype=torch.bool, device=tokens.device).triu(1)
        states = self.decoder(query, memory, tgt_mask=future, memory_key_padding_mask=padding)
        return self.text_head(states)

    def forward(self, pictures, tokens, lengths=None):
        _, memory, padding = self.encode(pictures, lengths)
        return self.decode(memory, padding, tokens)

    @torch.no_grad()
    def read(self, pictures):
        """The texts, B str: CTC's best path or the decoder's, whichever both together believe."""
        texts = []
        for memory in self.encode(pictures)[1].split(1):  # [1, T, hidden]
            path = self.ctc_head(memory)[0].argmax(-1)  # [T]
            by_ctc = [token for token in path.unique_consecutive().tolist() if token < BOS]
            by_decoder = self.follow_decoder(memory)
            better = self.cost(memory, by_ctc) <= self.cost(memory, by_decoder)
            texts.append(decode_tokens(by_ctc if better else by_decoder))
        return texts

    def follow_decoder(self, memory):
        """The likeliest token, again and again; one a frame at most, as CTC has it."""
        tokens = []
        while len(tokens) < memory.shape[1]:
            given = torch.tensor([[*tokens, PAD]], device=memory.device)
            token = int(self.decode(memory, None, given)[0, -1].argmax())
            if token >= BOS:
                break
            tokens.append(token)
        return tokens

    def cost(self, memory, text):
        """-log P of a text (tokens without EOS), the decoder's and CTC's together"""
        tokens = torch.tensor([[*text, EOS]], device=memory.device)
        logits = self.decode(memory, None, tokens)
        by_decoder = lip_reading_loss(logits, tokens, PAD) * len(tokens[0])
        by_ctc = ctc_costs(self.ctc_head(memory), tokens)
        return float(by_decoder + by_ctc)


def hide(states, padding):
    """states [B, T, ...] with zeros where padding [B, T] is True; None: no padding"""
    if padding is None:
        return states
    missing = padding[(...,) + (None,) * (states.dim() - 2)]
    return states.masked_fill(missing, 0)


def ctc_costs(logits, tokens, lengths=None, zero_infinity=False):
    """-log P of each text by CTC -> [B]; infinite, or 0, where it needs more frames than there are

    logits [B, T, V], tokens [B, U] (bytes, EOS, then PAD), lengths [B] frames or None."""
    chances = logits.float().log_softmax(-1).transpose(0, 1)  # [T, B, V]
    sizes = (tokens < BOS).sum(1)
    if lengths is None:
        lengths = torch.full_like(sizes, logits.shape[1])
    return fn.ctc_loss(chances, tokens, lengths.to(sizes), sizes, PAD, "none", zero_infinity)


def lip_batch_loss(reader, pictures, tokens, lengths=None):
    """What the lip reader learns from: S3(2)'s loss plus CTC's, both per token.

    Source: Watanabe et al., 2017. CTC judges the frames before and after the attention (Lee and
    Watanabe, 2021): those before learn to read first. A text too long for its frames is left to
    the decoder. pictures [B, T, 3, H, 2H], tokens [B, U] int64 (bytes, EOS, then PAD), lengths [B]
    frames or None -> scalar.
    """
    frames, memory, padding = reader.encode(pictures, lengths)  # [B, T, hidden]
    loss = lip_reading_loss(reader.decode(memory, padding, tokens), tokens, PAD)
    sizes = (tokens < BOS).sum(1).clamp(min=1)
    for states in (frames, memory):
        costs = ctc_costs(reader.ctc_head(states), tokens, lengths, zero_infinity=True)  # [B]
        loss = loss + (costs / sizes).mean() / 2
    return loss


def character_error_rate(read, truth):
    """Edits (insert, delete, replace) that turn `read` into `truth`, per character of `truth`"""
    row = list(range(len(truth) + 1))  # edits from the empty text
    for i, a in enumerate(read, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(truth, 1):
            replaced, dropped = above + (a != b), row[j] + 1
            above = row[j]
            row[j] = min(replaced, dropped, row[j - 1] + 1)
    return row[-1] / max(1, len(truth))
