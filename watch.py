"""Pass one of dubbing: where the faces are, who is who, and which frames are the references.

    stage  | code                            | patent
    frames | watch, watch_shots, finish_shot | S12
    people | tell_people, small_face         | -
    crops  | join_shots, why_kept, Track     | S12
    chosen | watch, faces.select_references  | Fig. 7

Of a frame it keeps the face's points and affine (2 KB). Letters as in common.py. Frames are uint8
RGB [H, W, 3], crops uint8 RGB [256, 256, 3], points float32 [.., K, 3].
"""
import contextlib
import itertools
from dataclasses import dataclass, field

import cv2
import numpy as np
from tqdm import tqdm

import faces
import media
from common import FPS, BadInput
from faces import CROP_PX
from lips import LIP_POINTS

SAME_PERSON = 20.0  # mean difference of two looks, 0..255, up to which they are of one person
LOOK_PX = 16  # side of the small upper face by which people are told apart
STEADY = 1.0  # frames: sigma of the smoothing of a face's points over time


@dataclass
class Shot:
    """What was seen of one person between two cuts, T frames."""
    points: np.ndarray  # float32 [T, K, 3] frame px, NaN where the person is absent
    whole: np.ndarray  # bool [T], the lower face is wholly in the picture
    lying: list  # bool [T], a face that is not upright could not be followed
    look: np.ndarray  # float32 [16, 16, 3], the small upper face; None without a face
    count: int  # how many people there are


@dataclass(eq=False)
class Person:
    """Who is seen in some shots, and the references that all of them share."""
    look: np.ndarray  # float32 [16, 16, 3], the small upper face
    frames: list = field(default_factory=list)  # numbers: the lower face is wholly in the picture
    refs: np.ndarray = None  # uint8 [R, 256, 256, 3], the most closed mouth first
    points: np.ndarray = None  # float32 [R, K, 3] crop px


@dataclass
class Track:
    """What pass one keeps of T frames."""
    points: np.ndarray  # float32 [T, K, 3] crop px, NaN where the person is absent
    affines: np.ndarray  # float32 [T, 2, 3], frame px -> crop px
    dubbed: np.ndarray  # bool [T], this frame's mouth is drawn anew
    shots: np.ndarray  # int [T], number of the shot
    person_of: list  # of each shot its Person, or None where nobody is dubbed
    reasons: list  # [T] why a frame is kept as it was, or ""

    def person_at(self, t):
        """Who is dubbed in frame t, or None"""
        return self.person_of[self.shots[t]]

    def people(self):
        """Everybody who is dubbed, once"""
        return [person for person in dict.fromkeys(self.person_of) if person]

    def steady_points(self, t):
        """The points of frame t, averaged over its neighbours in the shot -> float32 [K, 3]"""
        reach = np.arange(-2, 3)
        near = np.clip(t + reach, 0, len(self.points) - 1)
        points = self.points[near]
        usable = (self.shots[near] == self.shots[t]) & np.isfinite(points[:, 0, 0])
        weight = usable * np.exp(-reach ** 2 / (2 * STEADY ** 2))
        mean = np.average(np.nan_to_num(points), axis=0, weights=weight)
        return mean.astype(np.float32)


def watch(video, limit, face, refs, progress):
    """Follows one face per shot through the first `limit` frames; chooses `refs` references for
    each person. -> Track"""
    shots = list(watch_shots(video, limit, face, progress))
    most = max(shot.count for shot in shots)
    if face is not None and face >= most:
        raise BadInput(f"--face {face}: found {most}, counted from 0, left to right")
    track = join_shots(shots, face)
    if not track.dubbed.any():
        T = len(track.dubbed)
        if track.reasons.count(faces.LYING) > T / 2:
            raise BadInput(f"{video}: {faces.LYING}")
        raise BadInput(f"{video}: no face in any of its {T} frames, or never the whole of its "
                       "lower half")
    chosen = []  # of each person [R] frame numbers
    for person in track.people():
        some = np.array(person.frames)
        chosen.append(some[faces.select_references(track.points[some], refs)])
    pictures = media.frames_at(video, np.concatenate(chosen).tolist())
    for person, numbers in zip(track.people(), chosen):
        person.refs = np.stack([faces.crop(pictures[t], track.affines[t]) for t in numbers])
        person.points = track.points[numbers]
    return track


def watch_shots(video, limit, face, progress):
    """Yields the Shots of the first `limit` frames."""
    seen, looks, lying = [], [], []
    with (faces.FaceTracker() as even, faces.FaceTracker() as odd,  # two frames at a time
          contextlib.closing(media.ahead(media.read_frames(video))) as source):
        frames = tqdm(itertools.islice(source, limit), "watch", unit=" frames",
                      disable=None if progress else True)
        for frame, found, lies, cut in faces.track_shots(frames, [even, odd]):
            if cut:
                yield finish_shot(seen, looks, lying, face, frame.shape)
                seen, looks, lying = [], [], []
            for points in found:
                comes = bool(seen) and faces.nearest(points, seen[-1]) is None  # into view
                if comes or len(seen) % FPS == 0:
                    looks.append((len(seen), points, small_face(frame, points)))
            seen.append(found)
            lying.append(lies)
    yield finish_shot(seen, looks, lying, face, frame.shape)


def small_face(frame, points):
    """-> float32 [16, 16, 3]: the upper half of the face's crop, small"""
    affine = faces.smooth_affines(points[None])[0]
    upper = faces.crop(frame, affine)[:CROP_PX // 2]
    return cv2.resize(upper, (LOOK_PX, LOOK_PX), interpolation=cv2.INTER_AREA).astype(np.float32)


def finish_shot(seen, looks, lying, face, shape):
    """Per frame its faces, and some (t, points, small face) -> Shot of the largest face whose lower
    half is inside the picture; with `face` of the one of that number."""
    trails = faces.find_trails(seen)
    if face is None:
        fit = [trail for trail in trails if np.mean(inside(trail, shape)) > 0.5]
        trail = max(fit or trails, key=faces.trail_size, default=[])
    else:
        trail = trails[face] if face < len(trails) else []
    points = faces.spread_out(trail, len(seen))
    whole = np.zeros(len(seen), bool)
    if trail:
        whole[[t for t, _ in trail]] = inside(trail, shape)
    pictures = [picture for t, there, picture in looks if np.array_equal(there, points[t])]
    look = np.median(pictures, 0) if pictures else None
    return Shot(points, whole, lying, look, len(trails))


def inside(trail, shape):
    """-> bool [n], of each place of a trail: are the lips in the picture, and the jaw but for a
    little of it?"""
    place = np.stack([points[faces.MOUTH, :2] for _, points in trail])
    place = place / np.float32([shape[1], shape[0]])  # 0..1
    room = np.full((len(faces.MOUTH), 1), 0.1)  # jaw
    room[:LIP_POINTS] = 0.0
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
    dubbed = np.array([reason == "" for reason in reasons])
    numbers = np.repeat(np.arange(len(shots)), [len(shot.points) for shot in shots])
    return Track(np.concatenate(points), np.concatenate(affines), dubbed, numbers, people, reasons)


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
    missing = "another person" if shot.count and face is not None else "no face"
    reasons = []
    for whole, points, lies in zip(shot.whole, shot.points, shot.lying):
        reason = faces.LYING if lies else missing
        if np.isfinite(points[0, 0]):
            reason = "" if whole else "partly outside"
        reasons.append(reason)
    return reasons
