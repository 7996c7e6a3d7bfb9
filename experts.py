"""The experts of S3: does the mouth fit the sound? And both of them on a whole video.

    stage         | code                                    | patent
    sync expert   | SyncXNet, sync_batch_loss               | S3(1), Fig. 8
    offset        | measure_offset, embed_clip, sync_curve  | -
    checkpoint    | pack_expert, load_expert, load_networks | -
    a whole video | python experts.py VIDEO: measure_video  | S12

The lip reader, and the mouth as both experts see it, are in lipreader.py. Letters as in common.py,
pictures as in lipreader.py. Offsets are in frames of 40 ms, + = the sound comes late.
"""
import argparse
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as fn

import common
import data
import faces
import lipsync
import media
from audio import MEL_PER_FRAME, ScratchEncoder, build_audio_encoder, level_sound, log_mel
from common import SAMPLES_PER_FRAME, BadInput, check
from lipreader import VIEW_PX, LipReader, Residual, conv, mouth_view
from losses import cosine, sync_loss

GROUP = 5  # S, frames that the sync expert sees at once: 200 ms
MEL_PER_GROUP = GROUP * MEL_PER_FRAME  # 20
MAX_SHIFT = 15  # frames that a sound is looked for before and after the lips
STILL_PX = 0.5  # deviation of a still mouth's opening: 0.4 px where a still picture is noisy
TEMPERATURE = 0.07  # of the multi-way loss (CLIP, 2021)


# ---------------------------------------------------------------- S3(1) the sync expert
def resnext_block(before, after, stride):
    """[B, before, h, w] -> [B, after, h/stride, w/stride], in groups of 8 channels. Source: ResNeXt
    (Xie et al., 2017)."""
    middle, relu = after // 2, nn.ReLU()
    grouped = conv(middle, middle, 3, stride, groups=middle // 8)
    body = nn.Sequential(conv(before, middle), relu, grouped, relu, conv(middle, after))
    same = before == after and stride == 1
    shortcut = None if same else conv(before, after, 1, stride)
    return nn.Sequential(Residual(body, shortcut), relu)


def resnext50(weights, planes, E):
    """torchvision's ResNeXt-50 32x4d for `planes` input planes and E outputs; weights None,
    "imagenet" or a file, else BadInput."""
    net = torchvision.models.resnext50_32x4d(weights=None)
    if weights:
        source = torchvision.models.ResNeXt50_32X4D_Weights.IMAGENET1K_V2
        common.load_pretrained(net, weights, source, "ResNeXt-50", "--expert-weights FILE")
    rgb = net.conv1.weight.data  # [64, 3, 7, 7]
    net.conv1 = nn.Conv2d(planes, 64, 7, 2, 3, bias=False)
    if weights:
        net.conv1.weight.data = rgb.repeat(1, planes // 3, 1, 1) * 3 / planes
    net.fc = nn.Linear(2048, E)
    return net


class SyncXNet(nn.Module):
    """One embedding of the lips of S frames, one of their sound; their cosine says how likely they
    belong together.

    Patent: syncXnet, S3(1), Fig. 8: whisper's audio encoder for the sound, a pretrained ResNeXt for
        the lower halves of S = 5 frames; trained like SyncNet, robust to noise.
    Shapes: embed_video(pictures [B, S, 3, H, 2H]) -> [B, E] >= 0; embed_audio(features [B, S, D])
        -> [B, E] >= 0, or mel [B, 80, 4S] with audio="mel".
    Choice: both end in BatchNorm and ReLU, so that the cosine lies in 0..1 and starts near the
        middle. Whisper stays outside, frozen; with audio="mel" a ScratchEncoder is learned here,
        and the generator begins with it. "full" is ResNeXt-50 32x4d with 3S input planes,
        weights=None, "imagenet" or a file; "small", for CPUs, sees the mouth at 40 x 80 through
        four ResNeXt blocks, 11 MMAC a group.
    """

    def __init__(self, size="small", audio="features", audio_dim=512, weights=None):
        super().__init__()
        self.config = dict(size=size, audio=audio, audio_dim=audio_dim)  # what load_expert needs
        planes = 3 * GROUP
        E, hidden = {"small": (256, 160), "full": (512, 512)}[size]
        relu, flat = nn.ReLU(), nn.Flatten()
        if size == "full":
            self.video = resnext50(weights, planes, E)
        else:
            widths = ((32, 64, 2), (64, 128, 2), (128, 128, 1), (128, 256, 2))
            blocks = [resnext_block(*width) for width in widths]  # to [B, 256, 3, 5]
            self.video = nn.Sequential(conv(planes, 32, 3, 2), relu, *blocks,
                                       conv(256, 32), relu, flat, nn.Linear(480, E))
        self.audio_encoder = ScratchEncoder(audio_dim) if audio == "mel" else None
        self.norm = nn.LayerNorm(audio_dim)
        self.audio = nn.Sequential(
            nn.Conv1d(audio_dim, hidden, 1), relu, nn.Conv1d(hidden, hidden, 3, padding=1),
            nn.BatchNorm1d(hidden), relu, flat, nn.Linear(hidden * GROUP, E))
        self.video_norm = nn.BatchNorm1d(E)
        self.audio_norm = nn.BatchNorm1d(E)

    def embed_video(self, pictures):
        B = check(pictures, "B S 3 H W", "sync.pictures", S=GROUP).shape[0]
        if self.config["size"] == "small":
            pictures = mouth_view(pictures, VIEW_PX["small"]).flatten(1, 2)  # [B, 3S, 40, 80]
        else:  # the size that training clips have
            pictures = fn.adaptive_avg_pool2d(pictures.flatten(1, 2), (64, 128))
        planes = (pictures * 4 - 2).contiguous(memory_format=torch.channels_last)
        embedding = self.video_norm(self.video(planes)).relu()
        return check(embedding, "B E", "sync.video_embedding", B=B)

    def embed_audio(self, sound):
        if self.audio_encoder is not None:
            check(sound, f"B 80 {MEL_PER_GROUP}", "sync.mel")
            sound = self.audio_encoder.encode_mel(sound)  # [B, S, D]
        check(sound, "B S D", "sync.features", S=GROUP, D=self.config["audio_dim"])
        states = self.norm(sound).mT  # [B, D, S]
        embedding = self.audio_norm(self.audio(states)).relu()
        return check(embedding, "B E", "sync.audio_embedding", B=len(sound))


def sync_batch_loss(sync, pictures, sound, negatives):
    """What the sync expert learns from -> scalar loss, accuracy 0..1 at cosine 0.5

    pictures [B, S, 3, H, 2H], sound [B, S, D] of the same frames, negatives [B, X, S, D] (of
    train.all_negatives): half of them from the same clip but no frame in common, half from other
    clips; or all mel: [B, 80, 4S], [B, X, 80, 4S]. S3(1)'s BCE alone rests long at 0.69, every
    cosine at 0.5. Picking the true sound among X + 1 (Chung et al., "Perfect match", 2019) leaves
    that plateau soon, and BCE then gives the cosine its meaning as a probability.
    """
    B, X = negatives.shape[:2]
    sounds = torch.cat([sound[:, None], negatives], 1).flatten(0, 1)  # the true one first
    video = sync.embed_video(pictures).repeat_interleave(1 + X, 0)  # [B(1+X), E]
    audio = sync.embed_audio(sounds)  # [B(1+X), E]
    cosines = cosine(audio, video).unflatten(0, (B, 1 + X))
    first = torch.zeros(B, dtype=torch.long, device=cosines.device)
    true = fn.one_hot(first, 1 + X).flatten().bool()  # [B(1+X)]
    hit = sync_loss(audio[true], video[true], 1.0)
    miss = sync_loss(audio[~true], video[~true], 0.0)
    choice = fn.cross_entropy(cosines / TEMPERATURE, first)
    yes = (cosines > 0.5).flatten().float()
    right, wrong = yes[true].mean(), yes[~true].mean()
    accuracy = (right + 1 - wrong) / 2
    return (hit + miss) / 2 + choice, accuracy


# ---------------------------------------------------------------- the offset of a clip
def sync_sound(sync, mel, features):
    """A sound as this expert takes it: its mel [80, 4T], or the audio encoder's features [T, D]"""
    sound = mel if sync.config["audio"] == "mel" else features
    return torch.as_tensor(sound, dtype=torch.float32)


@torch.no_grad()
def embed_clip(sync, pictures, sound):
    """Every S frames of a clip and their sound -> video [G, E], audio [G, E], G = T - S + 1

    pictures [T, 3, H, 2H] uint8 or 0..1, sound [T, D] or mel [80, 4T]; the longer is cut. Two empty
    [0, 1] if one is shorter than S frames.
    """
    device = next(sync.parameters()).device
    pictures, sound = torch.as_tensor(pictures), torch.as_tensor(sound)
    mel = sync.config["audio"] == "mel"
    if len(pictures) < GROUP or (sound.shape[1] < MEL_PER_GROUP if mel else len(sound) < GROUP):
        return torch.empty(0, 1), torch.empty(0, 1)
    groups = pictures.unfold(0, GROUP, 1).movedim(-1, 1)  # [G, S, 3, H, 2H], a view
    if mel:
        sounds = sound.unfold(1, MEL_PER_GROUP, MEL_PER_FRAME).movedim(1, 0)  # [G, 80, 4S]
    else:
        sounds = sound.unfold(0, GROUP, 1).mT  # [G, S, D]
    full = 255 if pictures.dtype == torch.uint8 else 1
    G, video, audio = min(len(groups), len(sounds)), [], []
    for seen, heard in zip(groups[:G].split(32), sounds[:G].split(32)):
        seen, heard = seen.to(device).float(), heard.to(device).float()
        video.append(sync.embed_video(seen / full))
        audio.append(sync.embed_audio(heard))
    return torch.cat(video), torch.cat(audio)


def cosines_of(video, audio):
    """Every group's lips with every group's sound: [G, E], [G, E] -> [G lips, G sounds]"""
    video, audio = fn.normalize(video.float()), fn.normalize(audio.float())
    return video @ audio.T


def sync_curve(video, audio, valid=None, max_shift=MAX_SHIFT):
    """Mean distance between the lips at frame i and the sound at frame i + shift, for every shift.

    video [G, E], audio [G, E] of the groups that start at frames 0..G-1, valid bool [G] or None ->
    float32 [2 max_shift + 1] for shifts -max_shift..max_shift; NaN where less than a fifth of the
    valid groups has a partner. Distances are between unit vectors, sqrt(2 - 2 cosine), 0..1.41: not
    the units of SyncNet's published ones.
    """
    G, E = video.shape
    check(audio, "G E", "audio", G=G, E=E)
    if valid is None:
        valid = torch.ones(G, dtype=torch.bool)
    cosines = cosines_of(video, audio).cpu()
    distance = (2 - 2 * cosines).clamp(min=0).sqrt()  # [G lips, G sounds]
    curve = torch.full((2 * max_shift + 1,), math.nan)
    reach = min(max_shift, G - 1)
    for shift in range(-reach, reach + 1):
        has_partner = valid[max(0, -shift):G - max(0, shift)]
        pairs = distance.diagonal(shift)[has_partner]
        if len(pairs) >= max(1, valid.sum() / 5):
            curve[max_shift + shift] = pairs.mean()
    return curve


def read_curve(curve):
    """sync_curve's answer -> offset in frames (+ = sound late), distance (the curve's minimum),
    confidence (its median - minimum)"""
    best = int(curve.nan_to_num(math.inf).argmin())
    offset, distance = best - len(curve) // 2, float(curve[best])
    confidence = float(curve.nanmedian()) - distance
    return offset, distance, confidence


def measure_offset(sync, pictures, sound, found=None):
    """By how many frames the sound differs from the lips (SyncNet: Chung & Zisserman, 2016).

    pictures [T, 3, H, 2H] uint8 or 0..1, sound [T, D] features or [80, 4T] mel, found bool [T]
    frames with a face -> read_curve's "offset", "distance", "confidence", and "curve", a list, None
    where unknown. BadInput if nowhere S frames in a row have a face and a sound.
    """
    video, audio = embed_clip(sync, pictures, sound)
    valid = torch.ones(len(video), dtype=torch.bool)
    if found is not None and len(video) > 0:
        runs = torch.as_tensor(found).unfold(0, GROUP, 1)  # [T-S+1, S]
        valid = runs.all(1)[:len(video)]
    if not valid.any():
        raise BadInput(f"no {GROUP} frames in a row have a face and a sound: nothing to measure")
    curve = sync_curve(video, audio, valid)
    offset, distance, confidence = read_curve(curve)
    values = [None if math.isnan(value) else value for value in curve.tolist()]
    return dict(offset=offset, distance=distance, confidence=confidence, curve=values)


def sync_accuracy(video, audio, span=1):
    """Share of right answers, half of them on true pairs, half on sounds without a common frame:
    is the cosine over 0.5? video, audio [G, E] of one clip, span: how many groups in a row the
    cosine is averaged over -> 0..1."""
    cosines = cosines_of(video, audio)[None]  # [1, G, G]
    window = torch.eye(span).to(cosines)[None, None] / span
    means = fn.conv2d(cosines, window)[0]  # [G-span+1, G-span+1]
    yes = (means > 0.5).float()
    at = torch.arange(len(yes), device=yes.device)
    apart = (at[:, None] - at).abs() >= GROUP
    hits, false_alarms = yes.diagonal().mean(), yes[apart].mean()
    return float(hits + 1 - false_alarms) / 2


# ---------------------------------------------------------------- in a checkpoint
def pack_expert(net):
    """An expert (or None) as plain types and tensors, for a checkpoint"""
    if net is None:
        return None
    state = {name: value.cpu() for name, value in net.state_dict().items()}
    return {"config": net.config, "state": state}


def load_expert(content):
    """What pack_expert packed -> SyncXNet, LipReader or None, in eval mode"""
    if content is None:
        return None
    kind = SyncXNet if "audio" in content["config"] else LipReader
    net = kind(**content["config"])
    net.load_state_dict(content["state"])  # float16 becomes float32
    return net.eval()


@dataclass
class Networks:
    """What a checkpoint holds, ready to use; an expert that it lacks is None."""
    net: lipsync.LipSync
    audio_encoder: nn.Module
    sync: SyncXNet | None
    reader: LipReader | None


def load_networks(path=None, device="cpu"):
    """Everything inside a checkpoint (None: the one in weights/), in eval mode -> Networks

    The LipSync has bfloat16 weights where the device is fast at it: autocast would cast them anew
    for every batch. BadInput if it is missing, damaged, foreign, or its parts do not fit together.
    """
    path = path or common.WEIGHTS
    content = common.load_checkpoint(path)
    try:
        config = lipsync.Config(**content["config"])
        net = lipsync.LipSync(config)
        net.load_state_dict(content["model"])
        audio_encoder = build_audio_encoder(config, content["audio_encoder"])
        sync = load_expert(content.get("sync"))
        reader = load_expert(content.get("lip"))
        if not content["audio_encoder"]:
            raise ValueError("no weights of the audio encoder")
        if not isinstance(sync, SyncXNet | None) or not isinstance(reader, LipReader | None):
            raise ValueError("an expert stands in the other's place")
        hears = sync.config if sync else {}
        if hears.get("audio") == "features" and hears["audio_dim"] != config.audio_dim:
            raise ValueError("the sync expert takes sound of another width")
    except BadInput:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: its parts do not fit together ({reason})") from None
    for module in filter(None, (net, audio_encoder, sync, reader)):
        module.to(device).eval()
    fast = common.fast_bfloat16(torch.device(device))
    net.to(memory_format=torch.channels_last, dtype=torch.bfloat16 if fast else None)
    return Networks(net, audio_encoder, sync, reader)


# ---------------------------------------------------------------- a whole video
def track_face(path):
    """The largest face of each shot of a video -> of each shot landmarks float32 [T, K, 3] px, NaN
    where there is none. BadInput if unreadable or without a face."""
    shots = [[]]
    with faces.FaceTracker() as tracker:
        for _, found, _, cut in faces.track_shots(media.read_frames(path), [tracker]):
            if cut:
                shots.append([])
            shots[-1].append(found)
    landmarks = [faces.follow_face(shot) for shot in shots]
    if not any(np.isfinite(shot).any() for shot in landmarks):
        raise BadInput(f"{path}: no face found")
    return landmarks


def place_crops(landmarks):
    """[T, K, 3] of each shot, as of track_face -> affines [T, 2, 3] of all frames, smoothed within
    a shot; the inner lips' opening [T] in px of the crop. Zeros in a shot without a face."""
    affines, openings = [], []
    for shot in landmarks:
        motion, opening = np.zeros((len(shot), 2, 3), np.float32), np.zeros(len(shot), np.float32)
        if np.isfinite(shot).any():
            motion = faces.smooth_affines(shot)
            in_crop = faces.to_crop(faces.fill_gaps(shot), motion)
            opening = faces.mouth_shape(in_crop)[:, 0]
        affines.append(motion)
        openings.append(opening)
    return np.concatenate(affines), np.concatenate(openings)


def crop_mouths(path, affines):
    """A video's lower half faces as training clips have them: affines [T, 2, 3] of place_crops ->
    uint8 [T, 3, 64, 128], black in a shot without a face. All stay in memory: 25 KB a frame."""
    pictures = []
    for frame, affine in zip(media.read_frames(path), affines):
        picture = torch.zeros(3, 64, 128)
        if affine.any():
            lower = faces.crop(frame, affine)[faces.CROP_PX // 2:]
            lower = torch.from_numpy(lower).permute(2, 0, 1).float()  # [3, 128, 256]
            picture = fn.avg_pool2d(lower, 2)
        pictures.append(picture.round().byte())
    return torch.stack(pictures)


def measure_opening(opening, wave, found):
    """Does the mouth open with the voice and close in pauses? -> dict

    opening px [T], wave [N], found bool [T] frames with a face. r_loudness: correlation of opening
    with loudness, both averaged over 5 frames; 0 for a still mouth, None for a steady sound.
    opening_speech, opening_pause: mean px while the sound is louder or, for 5 frames at least,
    softer than a twentieth of its 95th percentile; None if it never is.
    """
    result = dict(r_loudness=None, opening_speech=None, opening_pause=None)
    T = min(len(opening), len(wave) // SAMPLES_PER_FRAME)
    if T < 5:
        return result
    opening, found = np.float64(opening[:T]), np.asarray(found[:T])
    sound = np.float64(wave[:T * SAMPLES_PER_FRAME]).reshape(T, -1)
    loudness = data.rms(sound, 1)  # [T]
    soft = loudness <= 0.05 * np.quantile(loudness, 0.95)
    pause = np.convolve(soft, np.ones(5), "same") == 5
    for name, at in (("opening_speech", ~pause & found), ("opening_pause", pause & found)):
        if at.any():
            result[name] = float(opening[at].mean())
    # means of 5 frames [T-4]; zeros beyond the ends would make any two series look alike
    seen, gap, voice = [np.convolve(series, np.ones(5) / 5, "valid")
                        for series in (found, opening, loudness)]
    gap, voice = gap[seen > 0.99], voice[seen > 0.99]
    if len(voice) > 1 and voice.std() > 1e-6:
        still = gap.std() <= STILL_PX
        result["r_loudness"] = 0.0 if still else float(np.corrcoef(gap, voice)[0, 1])
    return result


@torch.no_grad()
def measure_video(path, networks):
    """What `python experts.py` prints, as a dict; None where there is nothing to measure. An expert
    that is None leaves its entries out."""
    sync, reader = networks.sync, networks.reader
    device = next(networks.net.parameters()).device
    wave = level_sound(media.read_audio(path))
    landmarks = track_face(path)
    affines, opening = place_crops(landmarks)
    pictures = crop_mouths(path, affines)
    found = np.isfinite(np.concatenate(landmarks)[:, 0, 0])
    result = dict(video=str(path), frames=len(found), frames_with_face=int(found.sum()))
    result |= measure_opening(opening, wave.numpy(), found)
    if sync is not None:
        features = networks.audio_encoder(wave[None].to(device))[0]
        sound = sync_sound(sync, log_mel(wave), features)
        try:
            result |= measure_offset(sync, pictures, sound, found)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
    if reader is not None:
        texts = []
        for piece in pictures.split(data.CLIP_FRAMES):  # as long as training clips
            texts += reader.read(piece[None].to(device) / 255)
        result["text"] = " ".join(texts).strip()
    return result


def print_result(result):
    speech, pause, r = ["none" if result[name] is None else f"{result[name]:.2f}"
                        for name in ("opening_speech", "opening_pause", "r_loudness")]
    print("frames      {frames}, with a face: {frames_with_face}".format(**result))
    print(f"opening     {speech} px in speech, {pause} in pauses (of the 256 px crop); "
          f"r with loudness {r}")
    if "offset" in result:
        print("offset      {offset:+d} frames of 40 ms (+ = the sound comes late)\n"
              "confidence  {confidence:.3f} (median minus least distance)\n"
              "distance    {distance:.3f} (0..1.41, at that offset)".format(**result))
    if "text" in result:
        print("text        {text}".format(**result))


def main():
    parser = argparse.ArgumentParser(
        description="Measure how well the lips of a talking video fit its sound, and read them.")
    parser.add_argument("video", help="any talking video with sound, dubbed or original")
    parser.add_argument("--weights", help="checkpoint with experts (default: the one in weights/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the curve")
    args = parser.parse_args()
    networks = load_networks(args.weights, common.pick_device(args.device))
    if networks.sync is None and networks.reader is None:
        weights = args.weights or common.WEIGHTS
        raise BadInput(f"{weights}: holds neither a sync expert nor a lip reader")
    result = measure_video(args.video, networks)
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        print_result(result)


if __name__ == "__main__":
    common.cli(main)
