"""Dubbing: a video and a sound -> the same video, its lower face speaking the sound.

    stage            | code                                     | patent
    pass one: watch  | watch.py                                 | S12, Fig. 7: crops, references
    hear             | watch_and_hear                           | S2(1): audio encoder
    pass two: redraw | redraw_frames                            | S2(2) .. S2(5), a batch at a time
    blend            | put_back, face_mask, match_colour, blend | -
    all of it        | dub                                      | -

A sound's way: main, dub, experts.load_networks, watch_and_hear: features [1, L, D]; redraw_frames:
AudioSelector, lipsync.redraw, LipSync.forward; put_back, media.VideoWriter.

Both passes stream: of a frame pass one keeps its face's points and affine (2 KB), pass two nothing
but the first 10 s of crops, for the sync expert. media.ahead runs a stage in a thread, so that no
core waits. Letters as in common.py. Frames are uint8 RGB [H, W, 3], crops and pictures uint8 RGB
[256, 256, 3], points float32 [.., K, 3].
"""
import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import common
import experts
import faces
import lipsync
import media
import watch
from audio import level_sound, log_mel
from common import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, BadInput
from faces import CROP_PX

BATCH = 8  # frames that go through the network together
REFERENCE_SECONDS, SYNC_SECONDS = 60, 10  # searched for references; measured by the sync expert
PRESET = "superfast"  # of x264: a quarter cheaper than veryfast, at the same quality a larger file
# crop px: first row drawn; rows that fade in; rim
MASK_TOP, RAMP, FEATHER = CROP_PX // 2, 22, 6.0
CHIN_ROOM, CHEEK = 12, 0.4  # the mask's rim: crop px lower at the chin, share narrower
TINT_PX, TINT_SIGMA, TINT_TRUST = 32, 6.0, 10.0  # colour match: map's size, blur; step still a tint


# ---------------------------------------------------------------- the network
def redraw_frames(frames, track, net, features, amplitude):
    """Frame n of the new video has the n-th frame of the sound and shows frame t of the old one.

    frames: (t, frame) for n = 0, 1, ...; features [1, L, D] of the sound -> (t, frame, crop, its
    new picture); the last two None where nobody is dubbed."""
    select = lipsync.AudioSelector(net.config)
    numbered = enumerate(frames)
    while batch := list(itertools.islice(numbered, BATCH)):
        redrawn = {}
        shown = [(n, t, frame) for n, (t, frame) in batch if track.dubbed[t]]
        for person in track.people():
            group = [one for one in shown if track.person_at(one[1]) is person]
            if not group:
                continue
            heard, times, _ = zip(*group)
            crops = np.stack([faces.crop(frame, track.affines[t]) for _, t, frame in group])
            landmarks = np.stack([track.steady_points(t) for t in times])  # [B, K, 3]
            points = faces.place_points(person.points, landmarks)  # [B, R, 2, K, 2]
            audio = select(features, torch.tensor([heard]))[0]  # [B, F, D]
            made = lipsync.redraw(net, person.refs, crops, points, audio, amplitude)
            redrawn |= zip(heard, zip(crops, made))
        for n, (t, frame) in batch:
            yield t, frame, *redrawn.get(n, (None, None))


# ---------------------------------------------------------------- blend
def face_outline(points):
    """Points [K, 3] crop px -> the lower face's rim [21, 2], chin lowered, cheeks narrower"""
    jaw = points[faces.JAW, :2].copy()
    mouth = points[faces.LIPS_OUTER, :2].mean(0)
    below = jaw[:, 1] - mouth[1]
    jaw[:, 1] += CHIN_ROOM * (below / below.max()).clip(0, 1)
    jaw[:, 0] += CHEEK * (mouth[0] - jaw[:, 0])
    return jaw


def face_mask(outline):
    """Outline [n, 2] crop px -> uint8 [256, 256]: 255 on the lower face, soft at the rim, 0 above
    MASK_TOP."""
    half = CROP_PX // 2  # half the size will do: it is blurred anyway
    mask = np.zeros((half, half), np.uint8)
    hull = cv2.convexHull(np.round(outline / 2).astype(np.int32))
    cv2.fillConvexPoly(mask, hull, 255)
    mask = cv2.GaussianBlur(mask, (0, 0), FEATHER / 2)
    mask = cv2.resize(mask, (CROP_PX, CROP_PX))
    rows = np.arange(CROP_PX, dtype=np.float32)
    ramp = ((rows - MASK_TOP) / RAMP).clip(0, 1)
    return cv2.multiply(mask, np.repeat(ramp[:, None], CROP_PX, 1), dtype=cv2.CV_8U)


def match_colour(crop, picture, mask):
    """The picture in the crop's colours: their difference at the mask's rim is spread inwards."""
    size = (TINT_PX, TINT_PX)
    old, new, share = [cv2.resize(plane, size, interpolation=cv2.INTER_AREA).astype(np.float32)
                       for plane in (crop, picture, mask)]
    step = old - new
    trust = np.exp(-(step / TINT_TRUST) ** 2).min(2)  # a large step: things moved
    rim = share * (255 - share) / 255 ** 2 * trust
    total = cv2.GaussianBlur(step * rim[..., None], (0, 0), TINT_SIGMA)
    weight = cv2.GaussianBlur(rim, (0, 0), TINT_SIGMA) + 1e-3
    tint = cv2.resize(total / weight[..., None], (CROP_PX, CROP_PX))
    return cv2.add(picture, tint, dtype=cv2.CV_8U)  # rounds, and stays within 0..255


def blend(frame, picture, affine, mask):
    """A crop-sized picture put back where mask > 0 -> a new frame, bit-equal elsewhere."""
    back = cv2.invertAffineTransform(affine)
    x, y, w, h = cv2.boundingRect(mask)
    corners = np.float32([[x, y], [x + w, y], [x, y + h], [x + w, y + h]])
    corners = corners @ back[:, :2].T + back[:, 2]  # frame px
    H, W = frame.shape[:2]
    x0, y0 = np.clip(corners.min(0) - 1, 0, [W, H]).astype(int).tolist()
    x1, y1 = np.clip(corners.max(0) + 2, 0, [W, H]).astype(int).tolist()
    back[:, 2] -= (x0, y0)
    size = (x1 - x0, y1 - y0)
    patch = cv2.warpAffine(picture, back, size, borderMode=cv2.BORDER_REPLICATE)
    share = cv2.warpAffine(mask, back, size).astype(np.float32) / 255
    result = frame.copy()
    result[y0:y1, x0:x1] = cv2.blendLinear(patch, frame[y0:y1, x0:x1], share, 1 - share)
    return result


# ---------------------------------------------------------------- all of it
def check_outputs(out, compare, refs_sheet, inputs):
    """BadInput if one of the output files cannot be written, or is an input or another output."""
    kinds = (("--out", out, ".mp4 .mov .mkv"), ("--compare", compare, ".png .mp4"),
             ("--refs-sheet", refs_sheet, ".png"))
    for flag, path, suffixes in kinds:
        if path is None:
            continue
        if path.suffix.lower() not in suffixes.split() or path.is_dir():
            raise BadInput(f"{flag} {path}: must be a file that ends in {suffixes}")
        folder = Path(os.path.realpath(path)).parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise BadInput(f"{flag} {path}: its folder does not exist, or is read-only")
        if any(path.exists() and os.path.exists(one) and path.samefile(one) for one in inputs):
            raise BadInput(f"{flag} {path}: is one of the inputs")
    others = [os.path.realpath(path) for path in (out, refs_sheet) if path]
    if compare and os.path.realpath(compare) in others:
        raise BadInput(f"--compare {compare}: is another output, too")


def dub(video, audio, out, networks=None, amplitude=1.0, face=None, refs_sheet=None, compare=None,
        device="auto", progress=False):
    """Writes `out`: the person in `video`, or in a still picture, speaks `audio`. -> report, a dict

    networks: experts.Networks, the path of a checkpoint, or None: the one in weights/. amplitude
    0.5 .. 2: how wide the mouth opens. face: which one, from 0, left to right; None: the largest.
    refs_sheet: PNG of the references as chosen and as brought to one frame's head pose. compare:
    MP4, original | dubbed, or PNG, eight moments of both. Raises BadInput (a ValueError); then
    there is no file at `out`."""
    out, compare, refs_sheet = [path and Path(path) for path in (out, compare, refs_sheet)]
    check_outputs(out, compare, refs_sheet, (video, audio))
    if not 0.5 <= amplitude <= 2:
        raise BadInput(f"--amplitude {amplitude}: must lie between 0.5 and 2")
    start = time.perf_counter()
    wave = read_sound(audio)
    device = common.pick_device(device)
    if not isinstance(networks, experts.Networks):
        networks = experts.load_networks(networks, device)
    count = max(1, round(len(wave) / SAMPLES_PER_FRAME))  # frames of the dubbed video
    track, features = watch_and_hear(video, wave, count, networks, face, progress)
    seen_crops, strip, kept, first_frame_s = [], [], {}, None
    moments = [int((i + 0.5) * count / 8) for i in range(8)]  # still to come in a --compare PNG
    options = dict(sound=audio, seconds=count / FPS, preset=PRESET, like=video)
    with contextlib.ExitStack() as stack:
        movie = compare and compare.suffix.lower() == ".mp4"
        side = stack.enter_context(media.VideoWriter(compare, **options)) if movie else None
        target = stack.enter_context(media.VideoWriter(out, **options))
        frames = media.ahead(media.play(video, len(track.dubbed), count))
        stack.enter_context(contextlib.closing(frames))
        drawn = media.ahead(redraw_frames(frames, track, networks.net, features, amplitude))
        stack.enter_context(contextlib.closing(drawn))
        bar = tqdm(drawn, "dub", count, unit=" frames", disable=None if progress else True)
        for i, (t, frame, crop, picture) in enumerate(bar):
            first_frame_s = first_frame_s or time.perf_counter() - start
            if picture is None:
                kept.setdefault(track.reasons[t], []).append(i / FPS)
                dubbed = seen = None
            else:
                dubbed = put_back(frame, crop, picture, track, t)
                seen = faces.crop(dubbed, track.affines[t])
            shown = frame if dubbed is None else dubbed
            target.write(shown)
            if i < SYNC_SECONDS * FPS:
                seen_crops.append(seen)
            if side:
                side.write(np.concatenate([frame, shown], 1))
            elif compare and seen is not None and moments and i >= moments[0]:
                strip.append(np.concatenate([crop, seen]))
                moments = [moment for moment in moments if moment > i]
    seconds = time.perf_counter() - start
    reasons = {reason: (len(times), times[0]) for reason, times in kept.items()}
    report = dict(out=str(out), frames=count, seconds=seconds, fps=count / seconds,
                  first_frame_s=first_frame_s, reasons=reasons,
                  kept=sum(frames for frames, _ in reasons.values()))
    report |= measure_sync(seen_crops, wave, features, networks)
    if refs_sheet:
        media.save_png(refs_sheet, reference_sheet(track, networks.net))
    if strip:
        media.save_png(compare, np.concatenate(strip, 1))
    elif compare and not movie:
        print(f"{compare}: not written, no mouth was drawn from its first moment on",
              file=sys.stderr)
    return report


def read_sound(audio):
    """-> wave float32 [N] at 16 kHz, brought to one loudness; silence is said on stderr."""
    sound = media.read_audio(audio)
    if not sound.any():
        print(f"{audio}: digital silence, the mouth rests", file=sys.stderr)
    return level_sound(sound)


def watch_and_hear(video, wave, count, networks, face, progress):
    """Pass one, while the audio encoder works -> Track, features [1, L, D]"""
    limit = max(count, REFERENCE_SECONDS * FPS)  # a short sound still gets good references
    device = next(networks.net.parameters()).device
    encode = torch.inference_mode()(networks.audio_encoder)  # the mode is each thread's own
    with ThreadPoolExecutor(1) as pool:
        hearing = pool.submit(encode, wave[None].to(device))
        track = watch.watch(video, limit, face, networks.net.config.refs, progress)
        return track, hearing.result()


def put_back(frame, crop, picture, track, t):
    """The new picture of frame t's crop, blended into the frame -> frame"""
    mask = face_mask(face_outline(track.steady_points(t)))
    return blend(frame, match_colour(crop, picture, mask), track.affines[t], mask)


def measure_sync(crops, wave, features, networks):
    """How well the dubbed mouths fit the sound: experts.measure_offset of the first SYNC_SECONDS;
    {} with no sync expert or too few frames. crops: uint8 [256, 256, 3], None where none was made.
    """
    if networks.sync is None:
        return {}
    half = CROP_PX // 2
    nothing = np.zeros((half, CROP_PX, 3), np.uint8)
    mouths = np.stack([nothing if crop is None else crop[half:] for crop in crops])
    mel = log_mel(wave[:SYNC_SECONDS * SAMPLE_RATE])
    sound = experts.sync_sound(networks.sync, mel, features[0])
    made = [crop is not None for crop in crops]
    try:
        return experts.measure_offset(networks.sync, mouths.transpose(0, 3, 1, 2), sound, made)
    except BadInput:
        return {}


def reference_sheet(track, net):
    """Each person's references as chosen, and below with the head pose of one frame (mouth as it
    was) -> uint8 [rows, R * 256, 3]"""
    rows = []
    for person in track.people():
        middle = person.frames[len(person.frames) // 2]
        landmarks = track.steady_points(middle)
        points = faces.place_points(person.points, landmarks[None])  # [1, R, 2, K, 2]
        source, posed = torch.from_numpy(points).unbind(2)
        refs = torch.from_numpy(person.refs).permute(0, 3, 1, 2) / 255
        moved = net.warp(refs[None], source, posed)[0]  # [R, 3, 256, 256]
        moved = (moved * 255).round().byte().permute(0, 2, 3, 1)
        rows += [np.hstack(person.refs), np.hstack(moved.numpy())]
    return np.concatenate(rows)


def default_name(video):
    """VIDEO's name + _dubbed.mp4, short enough for a file system (255 bytes)"""
    stem = os.fsencode(Path(video).stem)[:200]
    return os.fsdecode(stem.decode(errors="ignore").encode() or stem) + "_dubbed.mp4"


# ---------------------------------------------------------------- python infer.py
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", nargs="?", help="a video or a still picture; its face is dubbed")
    parser.add_argument("audio", nargs="?", help="a sound file, or a video whose sound is taken")
    parser.add_argument("--out", help="the dubbed video (default: VIDEO's name + _dubbed.mp4, in "
                        "this folder; demo.mp4)")
    parser.add_argument("--weights", help="a checkpoint (default: weights/edge.pt)")
    parser.add_argument("--amplitude", type=float, default=1.0,
                        help="how wide the mouth opens, 0.5 .. 2 (default: 1, as spoken)")
    parser.add_argument("--face", type=int,
                        help="which face, from 0, left to right (default: the largest)")
    parser.add_argument("--refs-sheet", metavar="PNG", help="write the references, below them as "
                        "brought to one frame's head pose")
    parser.add_argument("--compare", metavar="PNG|MP4",
                        help="write original and dubbed side by side")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--demo", action="store_true",
                        help="draw a speaker, take another speaker's sound, and dub")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.demo:
            from bench import drawn  # what is drawn is not in the patent: a room of its own
            args.video, args.audio = f"{folder}/speaker.mp4", f"{folder}/sound.mp4"
            args.out = args.out or "demo.mp4"
            for path, who in ((args.video, 1), (args.audio, 2)):
                drawn.draw_clip(path, drawn.Speaker.draw(who), seed=who, seconds=6)
        if args.audio is None:
            raise BadInput("VIDEO and AUDIO are needed, or --demo")
        if args.face is not None and args.face < 0:
            raise BadInput(f"--face {args.face}: must be 0 or more")
        report = dub(args.video, args.audio, args.out or default_name(args.video), args.weights,
                     args.amplitude, args.face, args.refs_sheet, args.compare, args.device, True)
    print(f"{report['frames']} frames in {report['seconds']:.1f} s: {report['fps']:.1f} frames/s, "
          f"the first after {report['first_frame_s']:.1f} s")
    for reason, (frames, first_s) in report["reasons"].items():
        print(f"{frames} frames kept as they were, {reason}; first at "
              f"{int(first_s // 60)}:{first_s % 60:05.2f}")
    if "offset" in report:
        print(f"sync expert: offset {report['offset']:+d} frames, "
              f"confidence {report['confidence']:.2f}")
    print(f"written: {report['out']}")


if __name__ == "__main__":
    common.cli(main)
