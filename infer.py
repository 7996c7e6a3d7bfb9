"""Dubbing: a video and a sound -> the same video, its lower face speaking the sound.

    stage            | code                          | patent
    pass one: watch  | watch, outlines               | S12: landmarks, upright crops; Fig. 7: references
    listen           | dub                           | S2(1): audio encoder
    pass two: play   | between, sweep                | not in the patent: forward, backward, forward
    draw             | draw                          | S12: the crop of each frame; S2(2) .. S2(5), a batch at a time
    blend            | face_mask, match_colour, blend | not in the patent

Both passes stream: a frame is held only while it is worked on, so memory does not grow with the video. `ahead` runs each
stage in a thread (ffmpeg decodes and encodes in processes), so that no core waits. Letters as in lipsync.py; K points of an
outline. Frames are uint8 RGB [H, W, 3], crops and pictures uint8 RGB [256, 256, 3].
"""
import argparse
import collections
import contextlib
import itertools
import math
import os
import signal
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import data
import experts
import lipsync
from data import CROP_PX
from lipsync import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, BadInput

BATCH, QUEUE = 8, 12               # frames that go through the network together; that wait between two stages (33 MB of 720p)
CHUNK_BYTES = 64 << 20             # backward play decodes this much at a time, forwards, and hands it out in reverse
REFERENCE_SECONDS, SYNC_SECONDS = 60, 10  # searched for references, however short the sound; measured by the sync expert
PRESET = "superfast"               # of x264: a quarter cheaper than veryfast, at the same quality (crf) a larger file
MASK_TOP, RAMP, FEATHER = CROP_PX // 2, 22, 6.0  # crop px: first row drawn; rows that fade in below it; sigma of the mask's rim
CHIN_ROOM, CHEEK, OUTLINE_SIGMA = 12, 0.4, 2.0  # the mask's rim: crop px lower at the chin, share narrower, frames of smoothing
TINT_PX, TINT_SIGMA, TINT_TRUST = 32, 6.0, 10.0  # colour match: size and blur of its map, px; step (of 255) still taken for a tint


@contextlib.contextmanager
def timed(clock, stage, frames=1):
    """Adds to clock[stage] = [frames, seconds]. Stages overlap, so their seconds add up to more than the wall's."""
    start = time.perf_counter()
    yield
    clock[stage] += (frames, time.perf_counter() - start)


def ahead(source, clock=None, stage=None):
    """The items of the generator `source`, which runs in a thread, at most QUEUE items ahead. Closing this closes that."""
    def step():
        start = time.perf_counter()
        item = next(source, None)
        if stage and item is not None:
            clock[stage] += (1, time.perf_counter() - start)
        return item
    pool = ThreadPoolExecutor(1)
    try:
        coming = collections.deque(pool.submit(step) for _ in range(QUEUE))
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(step))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        source.close()


# ---- pass one: where the face is, and which frames are the references ------------------------------------------------------
@dataclass
class Track:
    """What pass one keeps: 0.4 KB a frame, and no pictures but the references."""
    affines: np.ndarray            # float32 [T, 2, 3], frame px -> crop px
    outlines: np.ndarray           # float32 [T, K, 2], of the lower face, crop px
    seen: np.ndarray               # bool [T], the lower face is wholly in the picture
    prints: list                   # [T] checksums, to know a frame again
    refs: np.ndarray               # uint8 [R, 256, 256, 3], closed mouth to widest


def fingerprint(frame):
    return zlib.crc32(np.ascontiguousarray(frame[::8]))


def watch(video, limit, face, count, clock, progress):
    """Follows one face through the first `limit` frames and chooses `count` references. -> Track"""
    tracks, prints = [], []
    with (data.FaceTracker() as even, data.FaceTracker() as odd, ThreadPoolExecutor(2) as pool,
          contextlib.closing(ahead(data.read_frames(video), clock, "decode, pass one")) as source):
        frames = iter(tqdm(itertools.islice(source, limit), "watch", unit=" frames", disable=None if progress else True))
        while pair := list(itertools.islice(frames, 2)):             # a tracker for each core; each sees every other frame
            with timed(clock, "landmarks", len(pair)):
                tracks += pool.map(data.FaceTracker.find, (even, odd), pair)
            prints += map(fingerprint, pair)
            height, width = pair[0].shape[:2]
    points = data.follow_face(tracks, face)                          # [T, 478, 2], NaN where absent
    del tracks
    rim = points[:, data.JAW + data.LIPS_OUTER] / np.float32([width, height])                 # [T, K, 2], 0..1
    seen = ((rim > -0.02) & (rim < 1.02)).all((1, 2))                # False where NaN
    if not seen.any():
        raise BadInput(f"{video}: no face in any of its {len(points)} frames, or never the whole of its lower half")
    affines = data.smooth_affines(points)                            # [T, 2, 3]
    for t, affine in enumerate(affines):                             # in place: a copy would double the peak
        points[t] = data.warp(points[t], affine)
    shown = np.flatnonzero(seen)
    chosen = shown[data.select_references(data.mouth_shape(points[shown]), data.head_pose(points[shown]), count)].tolist()
    with ThreadPoolExecutor() as pool:
        refs = np.stack([*pool.map(lambda i: data.crop(between(video, i, i + 1, prints)[0], affines[i]), chosen)])
    return Track(affines, outlines(points), seen, prints, refs)


def outlines(points):
    """Landmarks [T, 478, 2] crop px, NaN where absent -> [T, K, 2]: the lower face, its chin lowered, smooth over time."""
    jaw, mouth = points[:, data.JAW].copy(), points[:, data.LIPS_OUTER].mean(1, keepdims=True)  # [T, K, 2], [T, 1, 2]
    below = (jaw - mouth)[..., 1]                                    # [T, K]
    jaw[..., 1] += CHIN_ROOM * (below / below.max(1, keepdims=True)).clip(0, 1)
    jaw[..., 0] += CHEEK * (mouth - jaw)[..., 0]
    return data.smooth(data.fill_gaps(jaw.reshape(len(jaw), -1)), OUTLINE_SIGMA).reshape(jaw.shape).astype(np.float32)


# ---- pass two: the frames again, also backwards ----------------------------------------------------------------------------
def between(video, low, high, prints):
    """-> list of frames low .. high-1, exactly those that pass one saw, however badly the file seeks."""
    for lead in (0.2, 5, math.inf):                                  # seconds decoded before the first frame wanted
        start, window = max(0, low / FPS - lead), collections.deque(maxlen=high - low)
        limit = None if start == 0 else high - low + int((lead + 1) * FPS)
        with contextlib.closing(data.read_frames(video, start=start)) as frames:
            for frame in itertools.islice(frames, limit):
                window.append((fingerprint(frame), frame))
                if window[-1][0] == prints[high - 1] and [seen for seen, _ in window] == prints[low:high]:
                    return [frame for _, frame in window]
    raise BadInput(f"{video}: changed while it was being read")


def sweep(video, prints):
    """Yields (t, frame) for ever: forward, backward, forward ... through the T frames, never a jump, no end twice."""
    T = len(prints)
    for first in itertools.chain([0], itertools.repeat(1)):
        with contextlib.closing(data.read_frames(video)) as frames:
            for t, frame in enumerate(itertools.islice(frames, T)):
                if t >= first:
                    yield t, frame
        while T == 1:                                                # a still picture
            yield t, frame
        chunk = max(1, CHUNK_BYTES // frame.nbytes)
        for high in range(T - 1, 0, -chunk):                         # T-2 .. 0
            low = max(0, high - chunk)
            piece = between(video, low, high, prints)
            while piece:
                yield low + len(piece) - 1, piece.pop()


# ---- the network -----------------------------------------------------------------------------------------------------------
def to_network(crops, size, device):
    """uint8 [B, 256, 256, 3] -> float32 [B, 3, size, size], 0..1, channels_last"""
    crops = [crop if size == CROP_PX else cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA) for crop in crops]
    return torch.from_numpy(np.stack(crops)).to(device).permute(0, 3, 1, 2).float() / 255


def draw(frames, count, track, net, features, amplitude, clock):
    """(t, frame) in playing order, features [1, L, D] -> `count` of (t, frame, crop, its new picture); None where no face is seen."""
    size, select, device = net.config.image_size, lipsync.AudioSelector(net.config), features.device
    refs = to_network(track.refs, size, device)[None]                # [1, R, 3, H, W]
    for start in range(0, count, BATCH):
        group = list(itertools.islice(frames, min(BATCH, count - start)))
        with timed(clock, "crop", len(group)):
            crops = {i: data.crop(frame, track.affines[t]) for i, (t, frame) in enumerate(group) if track.seen[t]}
        pictures, B = {}, len(crops)
        if crops:
            with timed(clock, "network", B), torch.inference_mode():
                masked = to_network(crops.values(), size, device)                            # [B, 3, H, W]
                masked[:, :, size // 2:] = 0
                audio = select(features, start + torch.tensor([list(crops)]))[0]             # [B, F, D]; the sound runs on while t swings back
                drawn = net(refs.expand(B, -1, -1, -1, -1), masked, audio, amplitude)        # [B, 3, H, W]
                drawn = (drawn.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
            pictures = {i: cv2.resize(picture, (CROP_PX, CROP_PX), interpolation=cv2.INTER_CUBIC) for i, picture in zip(crops, drawn)}
        for i, (t, frame) in enumerate(group):
            yield t, frame, crops.get(i), pictures.get(i)


# ---- blend -----------------------------------------------------------------------------------------------------------------
def face_mask(outline):
    """Outline [K, 2] crop px -> uint8 [256, 256]: 255 on the lower face, soft at the rim, 0 above MASK_TOP."""
    mask = np.zeros((CROP_PX // 2, CROP_PX // 2), np.uint8)          # half size: it is soft anyway
    cv2.fillConvexPoly(mask, cv2.convexHull(np.round(outline / 2).astype(np.int32)), 255)
    mask = cv2.resize(cv2.GaussianBlur(mask, (0, 0), FEATHER / 2), (CROP_PX, CROP_PX))
    ramp = ((np.arange(CROP_PX) - MASK_TOP) / RAMP).clip(0, 1).astype(np.float32)            # [256]
    return cv2.multiply(mask, np.repeat(ramp[:, None], CROP_PX, 1), dtype=cv2.CV_8U)


def match_colour(crop, picture, mask):
    """The picture in the crop's colours: their step along the mask's rim, spread smoothly inwards, is added."""
    old, new, share = (cv2.resize(x, (TINT_PX, TINT_PX), interpolation=cv2.INTER_AREA).astype(np.float32) for x in (crop, picture, mask))
    step, rim = old - new, (share * (255 - share) / 255 ** 2)[..., None]                     # [32, 32, 3], [32, 32, 1]
    rim = rim * np.exp(-(step / TINT_TRUST) ** 2).min(2, keepdims=True)                      # a large step is no tint: things moved
    both = cv2.GaussianBlur(np.concatenate([step * rim, rim], 2), (0, 0), TINT_SIGMA)
    tint = cv2.resize(both[..., :3] / (both[..., 3:] + 1e-3), (CROP_PX, CROP_PX))            # [256, 256, 3]
    return cv2.add(picture, tint, dtype=cv2.CV_8U)                   # rounds, and stays within 0..255


def blend(frame, picture, affine, mask):
    """A crop-sized picture put back where mask > 0 -> a new frame, bit-equal to the old one elsewhere."""
    back, (x, y, w, h) = cv2.invertAffineTransform(affine), cv2.boundingRect(mask)
    corners = data.warp(np.float32([[x, y], [x + w, y], [x, y + h], [x + w, y + h]]), back)  # [4, 2] frame px
    (x0, y0), (x1, y1) = np.clip([corners.min(0) - 1, corners.max(0) + 2], 0, frame.shape[1::-1]).astype(int).tolist()
    back[:, 2] -= (x0, y0)
    size, result = (x1 - x0, y1 - y0), frame.copy()
    patch = cv2.warpAffine(picture, back, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    share = cv2.warpAffine(mask, back, size).astype(np.float32) / 255                        # [h, w], 0..1
    result[y0:y1, x0:x1] = cv2.blendLinear(patch, frame[y0:y1, x0:x1], share, 1 - share)
    return result


# ---- all of it -------------------------------------------------------------------------------------------------------------
def dub(video, audio, out, weights=None, amplitude=1.0, face=None, refs_sheet=None, compare=None, device="auto", progress=False):
    """Writes `out`: the person in `video`, or in a still picture, speaks `audio`. -> the report, a dict of plain types.

    weights: a checkpoint; None: the one in weights/; or what experts.load_networks returned. amplitude 0.5 .. 2: how wide the mouth
    opens. face: which one, from 0, left to right; None: the largest. refs_sheet: PNG of the references. compare: MP4, original |
    dubbed, or PNG, eight moments of both. Raises BadInput (a ValueError); then there is no file at `out`."""
    out, compare, refs_sheet = (path and Path(path) for path in (out, compare, refs_sheet))
    for flag, path, suffixes in (("--out", out, ".mp4 .mov .mkv"), ("--compare", compare, ".png .mp4"), ("--refs-sheet", refs_sheet, ".png")):
        if path and (path.suffix.lower() not in suffixes.split() or path.is_dir()):
            raise BadInput(f"{flag} {path}: must be a file that ends in {suffixes}")
        if path and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise BadInput(f"{flag} {path}: its folder does not exist, or is read-only")
        if path and any(path.exists() and os.path.exists(source) and path.samefile(source) for source in (video, audio)):
            raise BadInput(f"{flag} {path}: is one of the inputs")
    if compare and compare.resolve() in (out.resolve(), refs_sheet and refs_sheet.resolve()):
        raise BadInput(f"--compare {compare}: is another output, too")
    if not 0.5 <= amplitude <= 2:
        raise BadInput(f"--amplitude {amplitude}: must lie between 0.5 and 2")
    wave, device = data.read_audio(audio), lipsync.pick_device(device)                       # [N]
    _, net, audio_encoder, sync, _ = weights if isinstance(weights, tuple) else experts.load_networks(weights, device)
    count, clock, start = max(1, round(len(wave) / SAMPLES_PER_FRAME)), collections.defaultdict(lambda: np.zeros(2)), time.perf_counter()

    def listen():
        with timed(clock, "listen", count), torch.inference_mode():
            return audio_encoder(torch.from_numpy(wave)[None].to(device))                         # [1, L, D]
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(listen)
        track = watch(video, max(count, REFERENCE_SECONDS * FPS), face, net.config.refs, clock, progress)
        features = heard.result()
    first_frame_s, strip, lips, changed, moments = None, [], [], [], {int((i + 0.5) * count / 8) for i in range(8)}
    with contextlib.ExitStack() as stack:
        side = stack.enter_context(data.VideoWriter(compare, wave, preset=PRESET)) if compare and compare.suffix.lower() == ".mp4" else None
        writer = stack.enter_context(data.VideoWriter(out, wave, preset=PRESET))
        frames = stack.enter_context(contextlib.closing(ahead(sweep(video, track.prints), clock, "decode, pass two")))
        drawn = stack.enter_context(contextlib.closing(ahead(draw(frames, count, track, net, features, amplitude, clock))))
        for i, (t, frame, crop, picture) in enumerate(tqdm(drawn, "dub", count, unit=" frames", disable=None if progress else True)):
            first_frame_s, dubbed = first_frame_s or time.perf_counter() - start, frame
            if picture is not None:
                with timed(clock, "blend"):
                    mask = face_mask(track.outlines[t])
                    dubbed = blend(frame, match_colour(crop, picture, mask), track.affines[t], mask)
            with timed(clock, "encode"):
                writer.write(dubbed)
            changed.append(picture is not None)
            if sync is not None and i < SYNC_SECONDS * FPS:
                lips.append(data.crop(dubbed, track.affines[t])[CROP_PX // 2:])
            if side:
                side.write(np.concatenate([frame, dubbed], 1))
            elif compare and i in moments:
                strip.append(np.concatenate([data.crop(x, track.affines[t]) for x in (frame, dubbed)]))
    seconds = time.perf_counter() - start
    stages = {stage: {"frames": int(n), "seconds": float(s), "fps": float(n / max(s, 1e-9))} for stage, (n, s) in clock.items()}
    report = dict(out=str(out), frames=count, kept=changed.count(False), seconds=seconds, fps=count / seconds, first_frame_s=first_frame_s,
                  stages=stages)
    if sync is not None:
        with contextlib.suppress(BadInput):                          # too few frames to measure
            sound = experts.hear(sync, lipsync.log_mel(wave[:SYNC_SECONDS * SAMPLE_RATE]), features[0])
            report |= experts.measure_offset(sync, np.stack(lips).transpose(0, 3, 1, 2), sound, changed)
    for path, pictures in ((refs_sheet, list(track.refs)), (compare, strip)):
        if path and pictures:
            path.write_bytes(cv2.imencode(".png", np.concatenate(pictures, 1)[..., ::-1])[1])
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", nargs="?", help="a video or a still picture; the face in it is dubbed")
    parser.add_argument("audio", nargs="?", help="a sound file, or a video whose sound is taken")
    parser.add_argument("--out", help="the dubbed video (default: VIDEO's name + _dubbed.mp4, in this folder; demo.mp4)")
    parser.add_argument("--weights", help="a checkpoint (default: weights/edge.pt)")
    parser.add_argument("--amplitude", type=float, default=1.0, help="how wide the mouth opens, 0.5 .. 2 (default: 1, as spoken)")
    parser.add_argument("--face", type=int, help="which face, from 0, left to right (default: the largest)")
    parser.add_argument("--refs-sheet", metavar="PNG", help="write the chosen reference frames")
    parser.add_argument("--compare", metavar="PNG|MP4", help="write original and dubbed side by side")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--demo", action="store_true", help="draw a speaker, take another speaker's sound, and dub")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)        # a polite kill also cleans up
    with tempfile.TemporaryDirectory() as folder:
        if args.demo:
            from bench import drawn
            args.video, args.audio, args.out = f"{folder}/speaker.mp4", f"{folder}/sound.mp4", args.out or "demo.mp4"
            for path, who in ((args.video, 1), (args.audio, 2)):
                drawn.draw_clip(path, drawn.Speaker.draw(who), seed=who, seconds=6)
        if args.audio is None:
            raise BadInput("VIDEO and AUDIO are needed, or --demo")
        out = args.out or f"{Path(args.video).stem}_dubbed.mp4"
        report = dub(args.video, args.audio, out, args.weights, args.amplitude, args.face, args.refs_sheet, args.compare, args.device, True)
    for stage, row in (*report["stages"].items(), ("all, overlapping", report)):
        print(f"{stage:18}{row['frames']:7} frames {row['seconds']:8.2f} s {row['fps']:8.1f} frames/s")
    print(f"first frame after {report['first_frame_s']:.1f} s")
    print(f"{report['kept']} of {report['frames']} frames kept as they were: no face, or partly outside")
    if "offset" in report:
        print(f"sync expert: offset {report['offset']:+d} frames, confidence {report['confidence']:.2f}")
    print(f"written: {report['out']}")


if __name__ == "__main__":
    lipsync.cli(main)
