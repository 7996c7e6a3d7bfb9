"""Dubbing: a video and a sound -> the same video, its lower face speaking the sound.

    stage           | code                          | patent
    pass one: watch | watch, Shot, Person           | S12, Fig. 7: crops, references
    hear            | dub                           | S2(1): audio encoder
    pass two: play  | play                          | not in the patent: forward, backward, forward
    redraw          | redraw_frames                 | S2(2) .. S2(5), a batch at a time
    blend           | face_mask, match_colour, blend | not in the patent

Both passes stream: of a frame pass one keeps its face's points and affine (2 KB), pass two nothing.
`ahead` runs a stage in a thread, so that no core waits. Letters as in lipsync.py. Frames are uint8
RGB [H, W, 3], crops and pictures uint8 RGB [256, 256, 3], points float32 [.., K, 3].
"""
import argparse
import collections
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import experts
import faces
import lipsync
import media
from faces import CROP_PX
from lipsync import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, BadInput

BATCH, QUEUE = 8, 12  # frames that go through the network together; that wait between two stages
REFERENCE_SECONDS, SYNC_SECONDS = 60, 10  # searched for references; measured by the sync expert
SWING = 60 * FPS  # frames at a long video's end between which a longer sound swings,
SWING_BYTES = 8 << 30  # but no more than these, uncompressed: 14 s of 4K (on disk about half)
CHUNK_BYTES = 64 << 20  # backward play reads so much at a time
PRESET = "superfast"  # of x264: a quarter cheaper than veryfast, at the same quality a larger file
SAME_PERSON = 20.0  # mean difference of two looks, 0..255, up to which they are of one person
LOOK_PX = 16  # side of the small upper face by which people are told apart
STEADY = 1.0  # frames: sigma of the smoothing of a face's points over time
# crop px: first row drawn; rows that fade in; rim
MASK_TOP, RAMP, FEATHER = CROP_PX // 2, 22, 6.0
CHIN_ROOM, CHEEK = 12, 0.4  # the mask's rim: crop px lower at the chin, share narrower
TINT_PX, TINT_SIGMA, TINT_TRUST = 32, 6.0, 10.0  # colour match: map's size, blur; step still a tint


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


# ---- pass one: where the faces are, and which frames are the references --------------------------
@dataclass
class Shot:
    """What was seen of one person between two cuts, T frames."""
    points: np.ndarray  # float32 [T, K, 3] frame px, NaN where the person is absent
    whole: np.ndarray  # bool [T], the lower face is wholly in the picture
    lying: list  # bool [T], a face that is not upright could not be followed
    look: np.ndarray  # float32 [16, 16, 3], the small upper face; None without a face
    people: int  # how many there are


@dataclass(eq=False)
class Person:
    """Who is seen in some shots, and the references that all of them share."""
    look: np.ndarray  # float32 [16, 16, 3], the small upper face
    frames: list = field(default_factory=list)  # whose lower face is wholly in the picture
    refs: np.ndarray = None  # uint8 [R, 256, 256, 3], the most closed mouth first
    points: np.ndarray = None  # float32 [R, K, 3] crop px


@dataclass
class Track:
    """What pass one keeps of T frames."""
    points: np.ndarray  # float32 [T, K, 3] crop px, NaN where the person is absent
    affines: np.ndarray  # float32 [T, 2, 3], frame px -> crop px
    whole: np.ndarray  # bool [T], the lower face is wholly in the picture
    shots: np.ndarray  # int [T], number of the shot
    people: list  # of each shot its Person, or None where nobody is dubbed
    reasons: list  # [T] why a frame is kept as it was, or ""

    def persons(self):
        """Everybody who is dubbed, once"""
        return [person for person in dict.fromkeys(self.people) if person]

    def steady_points(self, t):
        """The points of frame t, averaged over its neighbours in the shot -> float32 [K, 3]"""
        reach = np.arange(-2, 3)
        near = np.clip(t + reach, 0, len(self.points) - 1)
        points = self.points[near]
        usable = (self.shots[near] == self.shots[t]) & np.isfinite(points[:, 0, 0])
        weight = usable * np.exp(-reach ** 2 / (2 * STEADY ** 2))
        mean = np.average(np.nan_to_num(points), axis=0, weights=weight)
        return mean.astype(np.float32)


def watch(video, limit, face, count, progress):
    """Follows one face per shot through the first `limit` frames; chooses `count` references for
    each person. -> Track"""
    shots = list(watch_shots(video, limit, face, progress))
    most = max(shot.people for shot in shots)
    if face is not None and face >= most:
        raise BadInput(f"--face {face}: there are {most} faces (from 0, left to right)")
    track = join_shots(shots, face)
    if not track.whole.any():
        T = len(track.whole)
        if track.reasons.count(faces.LYING) > T / 2:
            raise BadInput(f"{video}: {faces.LYING}")
        raise BadInput(f"{video}: no face in any of its {T} frames, or never the whole of its "
                       "lower half")
    chosen = []  # of each person [R] frame numbers
    for person in track.persons():
        some = np.array(person.frames)
        chosen.append(some[faces.select_references(track.points[some], count)])
    pictures = media.frames_at(video, np.concatenate(chosen).tolist())
    for person, numbers in zip(track.persons(), chosen):
        person.refs = np.stack([faces.crop(pictures[t], track.affines[t]) for t in numbers])
        person.points = track.points[numbers]
    return track


def watch_shots(video, limit, face, progress):
    """Yields the Shots of the first `limit` frames."""
    tracks, looks, lying = [], [], []
    with (faces.FaceTracker() as even, faces.FaceTracker() as odd,  # one for each core
          contextlib.closing(ahead(media.read_frames(video))) as source):
        frames = tqdm(itertools.islice(source, limit), "watch", unit=" frames",
                      disable=None if progress else True)
        for frame, found, lies, cut in faces.track_shots(frames, [even, odd]):
            if cut:
                yield finish_shot(tracks, looks, lying, face, frame.shape)
                tracks, looks, lying = [], [], []
            if len(tracks) % FPS == 0 or not looks:
                looks += [(len(tracks), points, small_face(frame, points)) for points in found]
            tracks.append(found)
            lying.append(lies)
    yield finish_shot(tracks, looks, lying, face, frame.shape)


def small_face(frame, points):
    """-> float32 [16, 16, 3]: the upper half of the face's crop, small"""
    affine = faces.smooth_affines(points[None])[0]
    upper = faces.crop(frame, affine)[:CROP_PX // 2]
    return cv2.resize(upper, (LOOK_PX, LOOK_PX), interpolation=cv2.INTER_AREA).astype(np.float32)


def finish_shot(tracks, looks, lying, face, shape):
    """Per frame its faces, and some (t, points, small face) -> Shot of the largest face whose lower
    half is inside the picture; with `face` of the one of that number."""
    people = faces.group_people(tracks)
    if face is None:
        fit = [person for person in people if np.mean(inside(person, shape)) > 0.5]
        person = max(fit or people, key=faces.person_size, default=[])
    else:
        person = (people[face:face + 1] or [[]])[0]
    points = faces.spread_out(person, len(tracks))
    whole = np.zeros(len(tracks), bool)
    if person:
        whole[[t for t, _ in person]] = inside(person, shape)
    pictures = [picture for t, there, picture in looks if np.array_equal(there, points[t])]
    look = np.median(pictures, 0) if pictures else None
    return Shot(points, whole, lying, look, len(people))


def inside(person, shape):
    """person: list of (t, points [K, 3]) -> bool [n]: are the lips in the picture, and the jaw but
    for a little of it?"""
    place = np.stack([points[faces.MOUTH, :2] for _, points in person])
    place = place / np.float32([shape[1], shape[0]])  # 0..1
    room = np.full((len(faces.MOUTH), 1), 0.1)  # jaw
    room[:lipsync.LIP_POINTS] = 0.0
    return ((place > -room) & (place < 1 + room)).all((1, 2))


def join_shots(shots, face):
    """Shots one after the other, and who is in them -> Track"""
    people = tell_people(shots, face)
    points, affines, reasons, start = [], [], [], 0
    for shot, person in zip(shots, people):
        motion = np.zeros((len(shot.points), 2, 3), np.float32)
        places = np.full_like(shot.points, np.nan)
        if person is not None:
            person.frames += (start + np.flatnonzero(shot.whole)).tolist()
            motion = faces.smooth_affines(shot.points)
            places = faces.to_crop(shot.points, motion)
        affines.append(motion)
        points.append(places)
        reasons += why_kept(shot, person, face)
        start += len(shot.points)
    whole = np.array([reason == "" for reason in reasons])
    numbers = np.repeat(np.arange(len(shots)), [len(shot.points) for shot in shots])
    return Track(np.concatenate(points), np.concatenate(affines), whole, numbers, people, reasons)


def tell_people(shots, face):
    """-> of each shot its Person, or None where nobody is dubbed.

    A shot belongs to the person whose look (a small picture of the aligned upper face) it resembles
    most, if nearly enough; else to somebody new, who is not dubbed where `face` chose somebody."""
    known, people = [], []
    for shot in shots:
        person = None
        if shot.whole.any() and shot.look is not None:
            apart = [np.abs(someone.look - shot.look).mean() for someone in known]
            if min(apart, default=SAME_PERSON) < SAME_PERSON:
                person = known[int(np.argmin(apart))]
            elif face is None or not known:
                person = Person(shot.look)
                known.append(person)
        people.append(person)
    return people


def why_kept(shot, person, face):
    """-> of each frame of a shot why it is kept as it was, or "" """
    if person is None and shot.whole.any():
        return ["another person"] * len(shot.whole)
    missing = "another person" if shot.people and face is not None else "no face"
    reasons = []
    for whole, points, lies in zip(shot.whole, shot.points, shot.lying):
        reason = faces.LYING if lies else missing
        if np.isfinite(points[0, 0]):
            reason = "" if whole else "partly outside"
        reasons.append(reason)
    return reasons


# ---- pass two: the frames again, also backwards --------------------------------------------------
def play(video, T, count):
    """Yields (t, frame) `count` times: forward, backward, forward ... through the T frames, never a
    jump. A long video swings through its last SWING frames only (or SWING_BYTES).

    A file is read forwards only, frames known by their number: seeking and decoding twice are not
    to be trusted. What swings is read from a lossless copy in a temporary folder."""
    with contextlib.ExitStack() as stack:
        copy = None
        if count > T:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            copy = media.VideoWriter(f"{folder}/copy.mkv", lossless=True)
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
    with contextlib.closing(media.read_frames(video)) as source:
        t = 0
        for t, frame in enumerate(itertools.islice(source, T), 1):
            yield frame
        if t == 0:
            raise BadInput(f"{video}: changed while it was being read")
        for _ in range(T - t):
            yield frame


def read_copy(path, low, high, shape):
    """Frames low .. high-1 of our own lossless copy -> uint8 [n, H, W, 3]"""
    H, W = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2  # VideoWriter makes sides even
    command = [media.ffmpeg_exe(), "-v", "error", "-nostdin", "-ss", str(max(0, low - 0.5) / FPS),
               "-i", f"file:{path}", "-frames:v", str(high - low), "-f", "rawvideo",
               "-pix_fmt", "rgb24", "pipe:1"]
    content = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return np.frombuffer(content, np.uint8).reshape(-1, H, W, 3)[:, :shape[0], :shape[1]]


# ---- the network ---------------------------------------------------------------------------------
def redraw_frames(frames, track, net, features, amplitude):
    """(t, frame) in playing order, features [1, L, D] -> (t, frame, crop, its new picture); the
    last two None where nobody is dubbed."""
    select = lipsync.AudioSelector(net.config)
    numbered = enumerate(frames)
    while batch := list(itertools.islice(numbered, BATCH)):
        redrawn = {}
        shown = [(i, t, frame) for i, (t, frame) in batch if track.whole[t]]
        for person in track.persons():
            group = [one for one in shown if track.people[track.shots[one[1]]] is person]
            if not group:
                continue
            numbers, times, _ = zip(*group)
            crops = np.stack([faces.crop(frame, track.affines[t]) for _, t, frame in group])
            landmarks = np.stack([track.steady_points(t) for t in times])  # [B, K, 3]
            points = faces.place_points(person.points, landmarks)  # [B, R, 2, K, 2]
            audio = select(features, torch.tensor([numbers]))[0]  # [B, F, D]
            made = lipsync.redraw(net, person.refs, crops, points, audio, amplitude)
            redrawn |= zip(numbers, zip(crops, made))
        for i, (t, frame) in batch:
            yield t, frame, *redrawn.get(i, (None, None))


# ---- blend ---------------------------------------------------------------------------------------
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
    half = CROP_PX // 2  # size: it is soft anyway
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


# ---- all of it -----------------------------------------------------------------------------------
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
    if compare and compare.resolve() in (out.resolve(), refs_sheet and refs_sheet.resolve()):
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
    device = lipsync.pick_device(device)
    if not isinstance(networks, experts.Networks):
        networks = experts.load_networks(networks, device)
    count = max(1, round(len(wave) / SAMPLES_PER_FRAME))  # frames of the dubbed video
    track, features = watch_and_hear(video, wave, count, networks, face, progress)
    mouths, strip, kept, first_frame_s = [], [], {}, None
    moments = {int((i + 0.5) * count / 8) for i in range(8)}
    options = dict(sound=audio, seconds=count / FPS, preset=PRESET, like=video)
    with contextlib.ExitStack() as stack:
        movie = compare and compare.suffix.lower() == ".mp4"
        side = stack.enter_context(media.VideoWriter(compare, **options)) if movie else None
        target = stack.enter_context(media.VideoWriter(out, **options))
        frames = ahead(play(video, len(track.whole), count))
        stack.enter_context(contextlib.closing(frames))
        drawn = ahead(redraw_frames(frames, track, networks.net, features, amplitude))
        stack.enter_context(contextlib.closing(drawn))
        bar = tqdm(drawn, "dub", count, unit=" frames", disable=None if progress else True)
        for i, (t, frame, crop, picture) in enumerate(bar):
            first_frame_s = first_frame_s or time.perf_counter() - start
            if picture is None:
                kept.setdefault(track.reasons[t], []).append(i / FPS)
                dubbed = made = None
            else:
                dubbed = put_back(frame, crop, picture, track, t)
                made = faces.crop(dubbed, track.affines[t])  # as it is seen
            shown = frame if dubbed is None else dubbed
            target.write(shown)
            if i < SYNC_SECONDS * FPS:
                mouths.append(made)
            if side:
                side.write(np.concatenate([frame, shown], 1))
            elif compare and i in moments and made is not None:
                strip.append(np.concatenate([crop, made]))
    seconds = time.perf_counter() - start
    report = dict(out=str(out), frames=count, seconds=seconds, fps=count / seconds,
                  first_frame_s=first_frame_s, kept=sum(map(len, kept.values())),
                  reasons={reason: (len(times), times[0]) for reason, times in kept.items()})
    report |= measure_sync(mouths, wave, features, networks)
    if refs_sheet:
        save_png(refs_sheet, reference_sheet(track, networks.net))
    if strip:
        save_png(compare, np.concatenate(strip, 1))
    return report


def read_sound(audio):
    """-> wave float32 [N] at 16 kHz, brought to one loudness; silence is said on stderr."""
    sound = media.read_audio(audio)
    if not sound.any():
        print(f"{audio}: digital silence, the mouth rests", file=sys.stderr)
    return lipsync.level_sound(sound)


def watch_and_hear(video, wave, count, networks, face, progress):
    """Pass one, while the audio encoder works -> Track, features [1, L, D]"""
    limit = max(count, REFERENCE_SECONDS * FPS)  # a short sound still gets good references
    device = next(networks.net.parameters()).device
    encode = torch.inference_mode()(networks.audio_encoder)  # the mode is each thread's own
    with ThreadPoolExecutor(1) as pool:
        hearing = pool.submit(encode, wave[None].to(device))
        track = watch(video, limit, face, networks.net.config.refs, progress)
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
    mel = lipsync.log_mel(wave[:SYNC_SECONDS * SAMPLE_RATE])
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
    for person in track.persons():
        middle = person.frames[len(person.frames) // 2]
        landmarks = track.steady_points(middle)
        points = faces.place_points(person.points, landmarks[None])  # [1, R, 2, K, 2]
        source, posed = torch.from_numpy(points).unbind(2)
        refs = torch.from_numpy(person.refs).permute(0, 3, 1, 2) / 255
        moved = net.warp(refs[None], source, posed)[0]  # [R, 3, 256, 256]
        moved = (moved * 255).round().byte().permute(0, 2, 3, 1)
        rows += [np.hstack(person.refs), np.hstack(moved.numpy())]
    return np.concatenate(rows)


def save_png(path, picture):
    """Through a link, and whole or not at all."""
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{os.getpid()}.png")
    part.write_bytes(cv2.imencode(".png", picture[..., ::-1])[1])
    os.replace(part, path)


def default_name(video):
    """VIDEO's name + _dubbed.mp4, short enough for a file system (255 bytes)"""
    stem = os.fsencode(Path(video).stem)[:200]
    return os.fsdecode(stem.decode(errors="ignore").encode() or stem) + "_dubbed.mp4"


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill also cleans up
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
    lipsync.cli(main)
