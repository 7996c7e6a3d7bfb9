"""The two experts whose judgement S3 turns into losses: does the mouth fit the sound, and can its words be read?

    stage         | code                                               | patent
    mouth         | mouth_view                                         | -
    sync expert   | SyncXNet, sync_batch_loss                          | S3(1), Fig. 8
    robustness    | corrupt_sound, jitter_pictures                     | S3(1)
    offset        | hear, embed_clip, sync_curve, read_curve           | -
    lip reader    | LipReader, lip_batch_loss, encode_text             | S3(2)
    a whole video | python experts.py VIDEO: measure_video             | S12

Axes: lipsync.py's, and S = 5 frames of a group, E embedding, G groups, K wrong sounds, U tokens of a text, V kinds of token, M memory
width. "Pictures" are RGB 0..1, the lower half of an upright face crop [3, H, 2H] (128 x 256 of the 256 px crop, half of that in
training clips), or the view of the mouth that mouth_view has already cut from it. Offsets are in frames of 40 ms, + = the sound comes late.
"""
import argparse
import json
import math

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as fn

import data
import lipsync
from data import BOS, EOS, PAD, VOCABULARY, decode_tokens
from lipsync import FPS, MEL_PER_FRAME, N_MELS, SAMPLES_PER_FRAME, BadInput, check, position_code
from losses import cosine, lip_reading_loss, sync_loss

GROUP = 5                            # S, frames that the sync expert sees at once: 200 ms
OFFSETS, SURE = 5, 0.05              # frames that a video's own sound may be off; confidence from which it is believed
MAX_SHIFT = 15                       # frames that a sound is looked for before and after the lips
VIEW = (8 / 128, 88 / 128, 48 / 256, 208 / 256)  # the mouth with room around it, in a lower half: top, bottom, left, right
VIEW_PX = {"small": 40, "full": 80}  # height of the view, half its width; a mouth is about 33 or 66 px wide in it
TEMPERATURE = 0.07                   # of the multi-way loss (CLIP, 2021)


def mouth_view(pictures, height):
    """The mouth alone, small. pictures [..., 3, H, 2H] -> [..., 3, height, 2 height]; a view of that size passes unchanged."""
    H, W = pictures.shape[-2:]
    if (H, W) == (height, 2 * height):
        return pictures
    top, bottom, left, right = VIEW
    mouth = pictures[..., round(top * H):round(bottom * H), round(left * W):round(right * W)]
    return fn.adaptive_avg_pool2d(mouth.flatten(0, -4), (height, 2 * height)).unflatten(0, pictures.shape[:-3])


# ---------------------------------------------------------------- S3(1) the sync expert
def conv(before, after, kernel=1, stride=1, groups=1):
    return nn.Sequential(nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(after))


class Residual(nn.Module):
    """body(x) beside a shortcut, a 1x1 convolution where the shape changes. ResNet (2015); grouped, ResNeXt (Xie et al., 2017)."""

    def __init__(self, body, shortcut=None):
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


def resnext_block(before, after, stride, group_width=8):
    """[B, before, h, w] -> [B, after, h/stride, w/stride]"""
    middle = after // 2
    body = nn.Sequential(conv(before, middle), nn.ReLU(), conv(middle, middle, 3, stride, middle // group_width), nn.ReLU(), conv(middle, after))
    return nn.Sequential(Residual(body, conv(before, after, 1, stride) if (before, stride) != (after, 1) else None), nn.ReLU())


def resnext50(weights, planes, E):
    """torchvision's ResNeXt-50 32x4d for `planes` input planes and E outputs; weights None, "imagenet" or a file, else BadInput."""
    source, net = torchvision.models.ResNeXt50_32X4D_Weights.IMAGENET1K_V2, torchvision.models.resnext50_32x4d(weights=None)
    rgb, net.fc = net.conv1, nn.Linear(2048, E)
    if weights:
        try:
            state = source.get_state_dict() if weights == "imagenet" else torch.load(weights, map_location="cpu", weights_only=True)
            net.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")} | {"fc." + n: v for n, v in net.fc.state_dict().items()})
        except Exception as error:  # no network, no such file, or one of another kind
            raise BadInput(f"ResNeXt-50 weights {weights}: {str(error).splitlines()[0][:100]}; the file is {source.url}") from None
    net.conv1 = nn.Conv2d(planes, 64, 7, 2, 3, bias=False)
    if weights:
        net.conv1.weight.data = rgb.weight.data.repeat(1, planes // 3, 1, 1) * 3 / planes                # [64, planes, 7, 7]
    return net


class SyncXNet(nn.Module):
    """One embedding of the lips of S frames, one of their sound; their cosine says how likely they belong together.

    Patent: syncXnet, S3(1), Fig. 8: whisper's audio encoder for the sound, a pretrained ResNeXt for the lower halves of S = 5
        frames; trained like SyncNet, robust to noise.
    Shapes: embed_video(pictures [B, S, 3, H, 2H]) -> [B, E] >= 0; embed_audio(features [B, S, D]) -> [B, E] >= 0, or
        mel [B, 80, 4S] with audio="mel".
    Choice: both end in BatchNorm and ReLU, so that the cosine lies in 0..1 and starts near the middle. Whisper stays outside,
        frozen: its features of the S frames come in; with audio="mel" a ScratchEncoder is learned here, and the generator
        then begins with it, so that it need not learn to hear from pictures. "full" is ResNeXt-50 32x4d with 3S input planes, weights=None, "imagenet"
        or a file; "small", for CPUs, sees the mouth at 40 x 80 through four ResNeXt blocks, 11 MMAC a group.
    """

    def __init__(self, size="small", audio="features", audio_dim=512, weights=None):
        super().__init__()
        self.arch = dict(size=size, audio=audio, audio_dim=audio_dim)  # what load_expert needs
        planes, E, width = 3 * GROUP, *{"small": (256, 160), "full": (512, 512)}[size]
        if size == "full":
            self.video = resnext50(weights, planes, E)
        else:
            blocks = [resnext_block(*sizes) for sizes in ((32, 64, 2), (64, 128, 2), (128, 128, 1), (128, 256, 2))]  # [B, 256, 3, 5]
            self.video = nn.Sequential(conv(planes, 32, 3, 2), nn.ReLU(), *blocks, conv(256, 32), nn.ReLU(), nn.Flatten(), nn.Linear(480, E))
        self.listen = lipsync.ScratchEncoder(audio_dim) if audio == "mel" else None
        self.norm = nn.LayerNorm(audio_dim)
        self.audio = nn.Sequential(nn.Conv1d(audio_dim, width, 1), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1),
                                   nn.BatchNorm1d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * GROUP, E))
        self.video_norm, self.audio_norm = nn.BatchNorm1d(E), nn.BatchNorm1d(E)

    def embed_video(self, pictures):
        B = check(pictures, "B S 3 H W", "sync.pictures", S=GROUP).shape[0]
        if self.arch["size"] == "small":
            pictures = mouth_view(pictures, VIEW_PX["small"])
        else:                                     # the size that training clips have
            pictures = fn.adaptive_avg_pool2d(pictures.flatten(0, 1), (64, 128)).unflatten(0, (B, GROUP))
        planes = (pictures * 4 - 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)          # [B, 3S, h, w]
        return check(self.video_norm(self.video(planes)).relu(), "B E", "sync.video_embedding", B=B)

    def embed_audio(self, sound):
        if self.listen is not None:
            check(sound, "B X Y", "sync.mel", X=N_MELS, Y=GROUP * MEL_PER_FRAME)
            sound = self.listen.encode_mel(sound)                                                        # [B, S, D]
        B = check(sound, "B S D", "sync.features", S=GROUP, D=self.arch["audio_dim"]).shape[0]
        sound = self.norm(sound).mT                                                                      # [B, D, S]
        return check(self.audio_norm(self.audio(sound)).relu(), "B E", "sync.audio_embedding", B=B)


def sync_batch_loss(sync, pictures, sound, others):
    """What the sync expert learns from: S3(1)'s loss on true and false pairs, and picking the true sound among K + 1.

    pictures [B, S, 3, H, 2H], sound [B, S, D] of the same frames, others [B, K, S, D]: half of them from the same clip but no
    frame in common, half from other clips (or all mel: [B, 80, 4S], [B, K, 80, 4S]) -> scalar loss, accuracy 0..1 at cosine
    0.5. BCE alone rests long at 0.69, all cosines at 0.5; the multi-way term (Chung et al., "Perfect match", 2019) leaves
    that plateau soon, and BCE then gives the cosine its meaning as a probability.
    """
    B, K = others.shape[:2]
    video = sync.embed_video(pictures).repeat_interleave(1 + K, 0)                                       # [B(1+K), E]
    audio = sync.embed_audio(torch.cat([sound[:, None], others], 1).flatten(0, 1))                       # [B(1+K), E]
    pairs = cosine(audio, video).unflatten(0, (B, 1 + K))                                                # [B, 1+K], the true pair first
    label = (torch.arange(1 + K, device=pairs.device) == 0).float().repeat(B)                            # [B(1+K)]
    true, false = (sync_loss(audio[label == y], video[label == y], y) for y in (1.0, 0.0))
    choice = fn.cross_entropy(pairs / TEMPERATURE, torch.zeros(B, dtype=torch.long, device=pairs.device))
    accuracy = ((pairs[:, 0] > 0.5).float().mean() + (pairs[:, 1:] <= 0.5).float().mean()) / 2
    return (true + false) / 2 + choice, accuracy


# ---------------------------------------------------------------- S3(1) robustness
def jitter_pictures(pictures, strength=1.0):
    """Another camera: colour, contrast, brightness, blur, shift (one for each clip; the shift for all) and noise.

    pictures [B, T, 3, H, W] in 0..1 -> the same, in 0..1. strength 0 changes nothing.
    """
    B, T, _, H, W = pictures.shape
    random = lambda *shape: (torch.rand(shape, device=pictures.device) * 2 - 1) * strength               # -1..1
    mean = pictures.mean((1, 3, 4), keepdim=True)                                                        # [B, 1, 3, 1, 1]
    contrast, light = 1 + 0.3 * random(B, 1, 1, 1, 1), mean * (1 + 0.15 * random(B, 1, 3, 1, 1)) + 0.15 * random(B, 1, 1, 1, 1)
    reach = W // 24                                                                                      # px, 3 of 80
    x, y = (reach + round(float(random()) * reach) for _ in range(2))
    sharp = fn.pad(pictures.flatten(0, 1), (reach,) * 4, mode="replicate")[..., y:y + H, x:x + W].unflatten(0, (B, T))
    blurred = fn.avg_pool2d(sharp.flatten(0, 1), 3, 1, 1, count_include_pad=False).unflatten(0, (B, T))
    moved = torch.lerp(sharp, blurred, random(B, 1, 1, 1, 1).abs())
    return ((moved - mean) * contrast + light + 0.02 * strength * torch.randn_like(pictures)).clamp(0, 1)


# ---------------------------------------------------------------- the offset of a clip
def sync_curve(video, audio, valid=None, max_shift=MAX_SHIFT):
    """Mean distance between the lips at frame i and the sound at frame i + shift, for every shift.

    video [G, E], audio [G, E] of the groups that start at frames 0..G-1, valid bool [G] or None -> float32 [2 max_shift + 1]
    for shifts -max_shift..max_shift; NaN where less than a fifth of the valid groups has a partner. Distances are between unit
    vectors, sqrt(2 - 2 cosine), 0..1.41: not the units of SyncNet's published ones.
    """
    G, E = video.shape
    check(audio, "G E", "audio", G=G, E=E)
    valid = torch.ones(G, dtype=torch.bool) if valid is None else valid
    distance = (2 - 2 * fn.normalize(video.float()) @ fn.normalize(audio.float()).T).clamp(min=0).sqrt().cpu()  # [G lips, G sounds]
    curve = torch.full((2 * max_shift + 1,), math.nan)
    for shift in range(max(-max_shift, 1 - G), min(max_shift, G - 1) + 1):
        pairs = distance.diagonal(shift)[valid[max(0, -shift):G - max(0, shift)]]
        if len(pairs) >= max(1, valid.sum() / 5):
            curve[shift + max_shift] = pairs.mean()
    return curve


def read_curve(curve):
    """sync_curve's answer -> offset in frames (+ = sound late), distance (the curve's minimum), confidence (its median - minimum)"""
    best = int(curve.nan_to_num(math.inf).argmin())
    return best - len(curve) // 2, float(curve[best]), float(curve.nanmedian() - curve[best])


def lateness(curves):
    """What sync_curve found in the clips of one video -> frames; 0 where the expert is not sure, and for a single frame, its own error."""
    offset, _, confidence = read_curve(torch.stack(curves).nanmean(0))
    return offset if abs(offset) > 1 and confidence > SURE else 0


def hear(sync, mel, features):
    """A sound as this sync expert takes it: its mel [80, 4T], or the audio encoder's features [T, D] of it"""
    return torch.as_tensor(mel if sync.arch["audio"] == "mel" else features, dtype=torch.float32)


@torch.no_grad()
def embed_clip(sync, pictures, sound):
    """Every S frames of a clip and their sound. pictures [T, 3, H, 2H] uint8 or 0..1, sound [T, D] or mel [80, 4T] -> two [G, E], G = T-S+1"""
    device, mel = next(sync.parameters()).device, sync.arch["audio"] == "mel"
    pictures, sound, video, audio = torch.as_tensor(pictures), torch.as_tensor(sound), [], []
    T = min(len(pictures), sound.shape[1] // MEL_PER_FRAME if mel else len(sound))
    for first in range(0, T - GROUP + 1, 32):
        starts = range(first, min(first + 32, T - GROUP + 1))
        groups = torch.stack([pictures[i:i + GROUP] for i in starts]).to(device)                         # [32, S, 3, H, 2H]
        heard = torch.stack([sound[:, i * MEL_PER_FRAME:(i + GROUP) * MEL_PER_FRAME] if mel else sound[i:i + GROUP] for i in starts])
        video.append(sync.embed_video(groups.float() / (255 if groups.dtype == torch.uint8 else 1)))
        audio.append(sync.embed_audio(heard.to(device).float()))
    return (torch.cat(video), torch.cat(audio)) if video else (torch.empty(0, 1), torch.empty(0, 1))


def measure_offset(sync, pictures, sound, found=None):
    """By how many frames the sound differs from the lips, found as SyncNet does (Chung & Zisserman, 2016).

    pictures [T, 3, H, 2H] uint8 or 0..1, sound [T, D] features or [80, 4T] mel, found bool [T] frames with a face ->
    {"offset": frames, + = sound late; "distance": the curve's minimum; "confidence": its median - minimum; "curve": list}.
    BadInput if nowhere S frames in a row have a face and a sound.
    """
    video, audio = embed_clip(sync, pictures, sound)
    found = torch.ones(len(video) + GROUP - 1, dtype=torch.bool) if found is None else torch.as_tensor(found)[:len(video) + GROUP - 1]
    valid = found.unfold(0, GROUP, 1).all(1) if len(video) else found[:0]                                # [G]
    if not valid.any():
        raise BadInput(f"no {GROUP} frames in a row have a face and a sound: nothing to measure")
    curve = sync_curve(video, audio, valid)
    return dict(zip(("offset", "distance", "confidence"), read_curve(curve)),
                curve=[None if math.isnan(value) else value for value in curve.tolist()])


def sync_accuracy(video, audio, span=1):
    """Share of right answers, half of them on true pairs, half on sounds without a common frame: is the cosine over 0.5?

    video, audio [G, E] of one clip, span: how many groups in a row the cosine is averaged over -> 0..1.
    """
    pairs = fn.normalize(video.float()) @ fn.normalize(audio.float()).T                                  # [G lips, G sounds]
    pairs = fn.conv2d(pairs[None, None], torch.eye(span).to(pairs)[None, None] / span)[0, 0]             # [G-span+1, G-span+1]
    at = torch.arange(len(pairs), device=pairs.device)
    apart = (at[:, None] - at).abs() >= GROUP
    return float(((pairs.diagonal() > 0.5).float().mean() + (pairs[apart] <= 0.5).float().mean()) / 2)


# ---------------------------------------------------------------- S3(2) the lip reader
def character_error_rate(read, truth):
    """Edits (insert, delete, replace a character) that turn `read` into `truth`, per character of `truth`: 0 is perfect."""
    row = list(range(len(truth) + 1))
    for i, a in enumerate(read, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(truth, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1] / max(1, len(truth))


class LipReader(nn.Module):
    """From the lower face to text.

    Patent: the lip-reading expert, S3(2): P(Y | V) of the text Y given the video V. Nothing is said of its inside.
    Shapes: pictures [B, T, 3, H, 2H], tokens [B, U] int64 -> logits [B, U, V]; entry n has seen the video and tokens 0..n-1.
        lengths [B]: frames of each clip, where clips are padded. ctc -> [B, T, V]; read -> B str.
    Choice: 3-D convolution, 2-D ResNet, Transformer (Afouras et al., 2018) and a CTC head, which learns first and pulls the
        rest along (Petridis et al., 2018). Grey, each frame normalised: light does not matter. Convolution over time before
        the attention: order is learned sooner. 4 x 4 px strides at once: the rim costs most on a CPU. "small": 9 MMAC a frame.
    """

    def __init__(self, size="small"):
        super().__init__()
        self.arch = dict(size=size)  # what load_expert needs
        channels, M, heads, layers = {"small": ((32, 64, 128), 160, 4, 2), "full": ((64, 128, 256, 512), 512, 8, 6)}[size]
        self.stem = nn.Sequential(nn.Conv3d(1, channels[0], (5, 7, 7), (1, 4, 4), (2, 3, 3), bias=False), nn.BatchNorm3d(channels[0]), nn.ReLU())
        blocks = [layer for before, after in zip(channels, channels[1:])
                  for layer in (conv(before, after, 3, 2), nn.ReLU(), Residual(conv(after, after, 3)), nn.ReLU())]
        self.frames = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels[-1] * 3 * 5, M))           # 40 x 80 / 16 = 80 x 160 / 32 = 3 x 5
        self.time = nn.Sequential(*(Residual(nn.Sequential(nn.Conv1d(M, M, 5, padding=2), nn.BatchNorm1d(M), nn.ReLU())) for _ in range(layers)))
        options = dict(nhead=heads, dim_feedforward=2 * M, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(M, **options), layers, nn.LayerNorm(M), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(M, **options), layers // 2, nn.LayerNorm(M))
        self.embedding, self.ctc_head, self.text_head = nn.Embedding(VOCABULARY, M), nn.Linear(M, VOCABULARY), nn.Linear(M, VOCABULARY)

    def look(self, pictures, lengths=None):
        """pictures [B, T, 3, H, 2H], lengths [B] or None -> frames [B, T, M], padding bool [B, T] (True: no frame) or None."""
        B, T = check(pictures, "B T 3 H W", "lip.pictures").shape[:2]
        mouth = mouth_view(pictures, VIEW_PX[self.arch["size"]])                                         # [B, T, 3, h, w]
        grey = (mouth * mouth.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(2)                   # [B, T, h, w]
        grey = (grey - grey.mean((2, 3), keepdim=True)) / (grey.std((2, 3), keepdim=True) + 0.02)
        padding = None if lengths is None else torch.arange(T, device=grey.device) >= torch.as_tensor(lengths, device=grey.device)[:, None]
        hide = lambda x: x if padding is None else x.masked_fill(padding[..., None, None] if x.dim() == 4 else padding[..., None], 0)
        maps = self.stem(hide(grey)[:, None]).transpose(1, 2).flatten(0, 1)                              # [BT, C, h/4, w/4]
        frames = self.frames(maps.contiguous(memory_format=torch.channels_last)).unflatten(0, (B, T))    # [B, T, M]
        for block in self.time:  # each sees two frames either way, so what is no frame is hidden anew
            frames = block(hide(frames).mT).mT                                                           # [B, T, M]
        return frames, padding

    def link(self, frames, padding):
        """Each frame in the light of all others: [B, T, M] -> memory [B, T, M]"""
        return self.encoder(frames + position_code(*frames.shape[1:]).to(frames), src_key_padding_mask=padding)

    def watch(self, pictures, lengths=None):
        """As look, but -> memory [B, T, M], padding."""
        frames, padding = self.look(pictures, lengths)
        return self.link(frames, padding), padding

    def spell(self, memory, padding, tokens):
        """memory [B, T, M], padding [B, T] or None, tokens [B, U] -> logits [B, U, V]"""
        B, U = check(tokens, "B U", "lip.tokens", B=memory.shape[0]).shape
        query = self.embedding(fn.pad(tokens, (1, -1), value=BOS))                                       # [B, U, M]: entry n is given token n-1
        query = query + position_code(*query.shape[1:]).to(query)
        future = torch.ones(U, U, dtype=torch.bool, device=tokens.device).triu(1)
        return self.text_head(self.decoder(query, memory, tgt_mask=future, memory_key_padding_mask=padding))

    def forward(self, pictures, tokens, lengths=None):
        return self.spell(*self.watch(pictures, lengths), tokens)

    def ctc(self, pictures, lengths=None):
        return self.ctc_head(self.watch(pictures, lengths)[0])

    @torch.no_grad()
    def read(self, pictures, beam=1, lengths=None):
        """The texts: of what CTC's best path and the decoder's beam search propose, that which both like best."""
        memory, _ = self.watch(pictures, lengths)
        ends = [memory.shape[1]] * len(memory) if lengths is None else [int(length) for length in lengths]
        return [self.read_one(memory[b:b + 1, :end], beam) for b, end in enumerate(ends)]

    def read_one(self, memory, beam):
        heard = self.ctc_head(memory)[0].float().log_softmax(-1)                                         # [T, V]
        path = heard.argmax(-1).tolist()
        proposals = {tuple(token for token, last in zip(path, [PAD, *path]) if token != last and token < BOS)}
        beams = [((), 0.0)]
        while beams and len(beams[0][0]) < memory.shape[1]:                                              # one byte a frame at most, as CTC has it
            tokens = torch.tensor([[*text, PAD] for text, _ in beams], device=memory.device)
            chances = self.spell(memory.expand(len(beams), -1, -1), None, tokens)[:, -1].float().log_softmax(-1)  # [beam, V]
            longer = [((*text, token), score + chance) for (text, score), row in zip(beams, chances)
                      for chance, token in zip(*(x.tolist() for x in row.topk(beam)))]
            longer = sorted(longer, key=lambda one: -one[1])[:beam]
            proposals |= {text[:-1] for text, _ in longer if text[-1] >= BOS}
            beams = [(text, score) for text, score in longer if text[-1] < BOS]

        def score(text):
            tokens = torch.tensor([[*text, EOS]], device=memory.device)
            spelled = fn.cross_entropy(self.spell(memory, None, tokens)[0].float(), tokens[0], reduction="sum")
            return -float(spelled + fn.ctc_loss(heard, tokens[0, :-1], [len(heard)], [len(text)], PAD, reduction="sum"))
        return decode_tokens(max(sorted(proposals), key=score))


def lip_batch_loss(reader, pictures, tokens, lengths=None):
    """What the lip reader learns from: S3(2)'s loss plus CTC's, both per token (Watanabe et al., 2017).

    CTC judges the frames before and after the attention (Lee and Watanabe, 2021): those before learn to read first.
    pictures [B, T, 3, H, 2H], tokens [B, U] int64 (bytes, EOS, then PAD), lengths [B] frames or None -> scalar.
    """
    frames, padding = reader.look(pictures, lengths)                                                     # [B, T, M]
    memory = reader.link(frames, padding)
    spelled = lip_reading_loss(reader.spell(memory, padding, tokens), tokens, PAD)
    sizes, ends = (tokens < BOS).sum(1), torch.full((len(tokens),), frames.shape[1]) if lengths is None else torch.as_tensor(lengths)

    def ctc(states):
        heard = reader.ctc_head(states).float().log_softmax(-1).transpose(0, 1)                          # [T, B, V]
        costs = fn.ctc_loss(heard, tokens, ends.to(sizes.device), sizes, PAD, reduction="none", zero_infinity=True)  # [B]; 0: text too long
        return (costs / sizes.clamp(min=1)).mean()
    return spelled + (ctc(frames) + ctc(memory)) / 2


# ---------------------------------------------------------------- in a checkpoint
def pack_expert(net, shrink=lambda value: value):
    """An expert (or None) as plain types and tensors, for a checkpoint; load_expert rebuilds it, in eval mode."""
    return net and {"arch": net.arch, "state": {name: shrink(value).cpu() for name, value in net.state_dict().items()}}


def load_expert(content):
    if content is None:
        return None
    net = (SyncXNet if "audio" in content["arch"] else LipReader)(**content["arch"])
    net.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in content["state"].items()})
    return net.eval()


def load_networks(path=None, device="cpu"):
    """Everything inside a checkpoint, in eval mode: (content, LipSync, audio encoder, SyncXNet or None, LipReader or None).

    The LipSync has bfloat16 weights where the device is fast at it: autocast would cast them anew for every batch.
    """
    content = lipsync.load_checkpoint(path or lipsync.WEIGHTS)
    try:
        config = lipsync.Config(**content["config"])
        net = lipsync.LipSync(config)
        net.load_state_dict({k: v.float() for k, v in content["model"].items()})
        audio = lipsync.build_audio_encoder(config, content["audio_encoder"])
        sync, reader = (load_expert(content.get(name)) for name in ("sync", "lip"))
    except (KeyError, TypeError, RuntimeError) as error:
        raise BadInput(f"{path or lipsync.WEIGHTS}: its parts do not fit together ({str(error).splitlines()[0]})") from None
    nets = [m if m is None else m.to(device).eval() for m in (net, audio, sync, reader)]
    nets[0].to(memory_format=torch.channels_last, dtype=torch.bfloat16 if lipsync.fast_bfloat16(torch.device(device)) else None)
    return (content, *nets)


# ---------------------------------------------------------------- a whole video
def watch_video(path, height=None):
    """Any video, cropped as training clips are: (pictures uint8 [T, 3, H, 2H], opening float32 [T] inner-lip gap in px of the 256 px
    crop, found bool [T] frames with a face).

    height: keep only the mouth view of that height, to save memory. BadInput if unreadable or without a face.
    """
    with data.FaceTracker() as tracker:
        landmarks = data.follow_face([tracker.find(frame) for frame in data.read_frames(path)])          # [T, 478, 2]
    found = np.isfinite(landmarks[:, 0, 0])
    if not found.any():
        raise BadInput(f"{path}: no face found")
    pictures, affines = [], data.smooth_affines(landmarks)
    opening = data.mouth_shape(data.fill_gaps(landmarks))[:, 0] * np.hypot(affines[:, 0, 0], affines[:, 0, 1])
    for frame, affine in zip(data.read_frames(path), affines):
        half = torch.from_numpy(data.crop(frame, affine)[data.CROP_PX // 2:]).permute(2, 0, 1)           # [3, 128, 256]
        pictures.append(half if height is None else mouth_view(half[None].float(), height)[0].round().byte())
    return torch.stack(pictures), opening, torch.from_numpy(found)


def measure_opening(opening, wave, found):
    """Does the mouth open with the voice and close in pauses? opening px [T], wave [N], found bool [T] -> dict

    r_loudness: correlation of opening with loudness, both over 5 frames; opening_speech, opening_pause: mean px while the sound is
    louder or, for 5 frames at least, softer than a twentieth of its 95th percentile.
    """
    T = min(len(opening), len(wave) // SAMPLES_PER_FRAME)
    loudness = np.sqrt((np.asarray(wave[:T * SAMPLES_PER_FRAME]).reshape(T, -1) ** 2).mean(1))           # [T]
    soft = np.convolve(loudness < 0.05 * np.quantile(loudness, 0.95), np.ones(5), "same") == 5
    smooth = lambda series: np.convolve(series, np.ones(5) / 5, "same")[found[:T]]
    places = {"opening_speech": ~soft & found[:T], "opening_pause": soft & found[:T]}
    return dict(r_loudness=float(np.corrcoef(smooth(opening[:T]), smooth(loudness))[0, 1]),
                **{name: float(opening[:T][at].mean()) for name, at in places.items() if at.any()})


@torch.no_grad()
def measure_video(path, sync, reader, audio_encoder, device, beam=4):
    """What `python experts.py` prints, as a dict. An expert that is None leaves its entries out."""
    small = all(net is None or net.arch["size"] == "small" for net in (sync, reader))
    wave = torch.from_numpy(data.read_audio(path))
    pictures, opening, found = watch_video(path, VIEW_PX["small"] if small else None)
    result = dict(video=str(path), frames=len(found), frames_with_face=int(found.sum()), **measure_opening(opening, wave.numpy(), found.numpy()))
    if sync:
        result |= measure_offset(sync, pictures, hear(sync, lipsync.log_mel(wave), audio_encoder(wave[None].to(device))[0]), found)
    if reader:  # in pieces as long as training clips
        pieces = pictures.split(data.CLIP_SECONDS * FPS)
        result["text"] = " ".join(reader.read(piece[None].to(device).float() / 255, beam)[0] for piece in pieces).strip()
    return result


def main():
    parser = argparse.ArgumentParser(description="Measure how well the lips of a talking video fit its sound, and read them.")
    parser.add_argument("video", help="any talking video with sound, dubbed or original")
    parser.add_argument("--weights", help="checkpoint with the experts inside (default: the one in weights/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, the curve included")
    args = parser.parse_args()
    device = lipsync.pick_device(args.device)
    _, _, audio_encoder, sync, reader = load_networks(args.weights, device)
    if not (sync or reader):
        raise BadInput(f"{args.weights or lipsync.WEIGHTS}: holds neither a sync expert nor a lip reader")
    result = measure_video(args.video, sync, reader, audio_encoder, device)
    if args.json:
        return print(json.dumps(result))
    print(f"frames      {result['frames']}, with a face: {result['frames_with_face']}")
    print(f"opening     {result.get('opening_speech', math.nan):.1f} px in speech, {result.get('opening_pause', math.nan):.1f} in pauses "
          f"(of the 256 px crop); r with loudness {result['r_loudness']:.2f}")
    if sync:
        print(f"offset      {result['offset']:+d} frames of 40 ms (+ = the sound comes late)")
        print(f"confidence  {result['confidence']:.3f} (median minus least distance within +-{MAX_SHIFT} frames)")
        print(f"distance    {result['distance']:.3f} (0..1.41, at that offset)")
    if reader:
        print(f"text        {result['text']}")


if __name__ == "__main__":
    lipsync.cli(main)
