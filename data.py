"""S1: from a folder of talking-head videos to training clips, and what training and dubbing both need of them.

    stage        | code                                              | patent
    faces        | FaceTracker, follow_face, smooth_affines, crop    | S12: landmarks, upright affine, 256 x 256 crop
    face box     | YoloFace, decode_yolo                             | S12: yolov8-face (with --face-detector)
    references   | select_references, audio_window                   | Fig. 7, S2(3)
    clips        | prepare, load_clip, list_clips                    | S11: clips of 5 s, one .npz each

Letters: T frames of a clip, N samples or boxes, H W pixels, K points. Pictures are uint8 RGB, points float32 (x, y) pixels.
`python data.py --data DIR` prepares a folder; `python data.py --demo DIR` draws one.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import itertools
import json
import math
import multiprocessing
import os
import re
import threading
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import media
from lipsync import (FPS, MEL_PER_FRAME, N_MELS, SAMPLE_RATE, SAMPLES_PER_FRAME, BadInput, audio_window,
                     cli, level_sound, log_mel)

CROP_PX = 256
CLIP_SECONDS = 5

# ---- faces (S12): points with depth, one person, a steady upright crop ---------------------------

LANDMARKER = Path(__file__).parent / "weights" / "face_landmarker.task"  # MediaPipe's, Apache-2.0
MOST_FACES = 4
TRACK_PIXELS = 1280 * 720  # MediaPipe finds no more in larger pictures, it only takes longer

# Numbers of MediaPipe's mesh. Above row 122 of the crop, in the half that the network may see; no
# eyelids, which blink. A point of ..._RIGHT mirrors the one at the same place of ..._LEFT.
RIGID_MESH = [33, 133, 362, 263, 168, 6, 197, 195, 5, 4]  # eye corners, nose bridge down to the tip
UPPER_RIGHT = [33, 133, 35, 36, 54, 55, 63, 65, 67, 71, 103, 108, 109, 118, 120, 123, 127, 131, 227]
UPPER_LEFT = [263, 362, 372, 266, 284, 285, 293, 295, 297, 251, 332, 337, 338, 347, 349, 352, 356,
              360, 447]
UPPER_MESH = UPPER_RIGHT + [168, 6, 197, 195, 5, 4, 9, 10, 151] + UPPER_LEFT
LIPS_OUTER_MESH = [61, 146, 91, 181, 84, 17, 314, 405, 321, 375,  # corner, along the lower lip,
                   291, 409, 270, 269, 267, 0, 37, 39, 40, 185]  # corner, back along the upper lip
LIPS_INNER_MESH = [78, 95, 88, 178, 87, 14, 317, 402, 318, 324,
                   308, 415, 310, 311, 312, 13, 82, 81, 80, 191]
JAW_MESH = [234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152,  # ear, chin,
            377, 400, 378, 379, 365, 397, 288, 361, 323, 454]  # ear
CHEEKS_RIGHT = [32, 50, 98, 137, 138, 142, 147, 177, 187, 192, 201, 204, 205, 206, 207, 210, 213,
                214, 215, 216, 242]  # the rest of the lower face, thinly
CHEEKS_LEFT = [262, 280, 327, 366, 367, 371, 376, 401, 411, 416, 421, 424, 425, 426, 427, 430, 433,
               434, 435, 436, 462]
KEPT_POINTS = (LIPS_OUTER_MESH + LIPS_INNER_MESH + JAW_MESH  # [K], MOUTH first, as LipSync wants
               + UPPER_MESH + CHEEKS_RIGHT + [199] + CHEEKS_LEFT)
K = len(KEPT_POINTS)


def kept(mesh_numbers):
    """Numbers of MediaPipe's mesh -> their places among the K points that we keep."""
    return [KEPT_POINTS.index(number) for number in mesh_numbers]


RIGID, UPPER = kept(RIGID_MESH), kept(UPPER_MESH)
LIPS_OUTER, LIPS_INNER, JAW = kept(LIPS_OUTER_MESH), kept(LIPS_INNER_MESH), kept(JAW_MESH)
MOUTH = LIPS_OUTER + LIPS_INNER + JAW  # [P] what the sound moves: the first P of the K points
MOUTH_CORNERS, INNER_LIPS, OUTER_LIPS = kept([61, 291]), kept([13, 14]), kept([0, 17])  # pairs
EYE_CORNERS, NOSE_TIP = kept([33, 263]), kept([4])[0]
PARTNER = {
    **dict(zip(UPPER_RIGHT + CHEEKS_RIGHT, UPPER_LEFT + CHEEKS_LEFT)),
    **dict(zip(UPPER_LEFT + CHEEKS_LEFT, UPPER_RIGHT + CHEEKS_RIGHT)),
    **dict(zip(JAW_MESH, JAW_MESH[::-1])),
    **{lips[i]: lips[10 - i] for lips in (LIPS_OUTER_MESH, LIPS_INNER_MESH) for i in range(-9, 11)}}
MIRROR = kept([PARTNER.get(number, number) for number in KEPT_POINTS])  # [K]
# The RIGID points of MediaPipe's canonical face, cm, x + iy, y down.
RIGID_TEMPLATE = np.array([-4.446 - 2.664j, -1.856 - 2.585j, 1.856 - 2.585j, 4.446 - 2.664j,
                           -3.271j, -2.473j, -1.728j, -1.059j, -0.366j, 0.463j])
NOSE_ROW = 118  # of 256: the tip's row in the crop, so that the whole mouth lies in the lower half
BOX_MARGIN = 1.1  # crop side / height of the face: leaves room below the chin for an open jaw


@dataclass
class Detection:
    """A face as MediaPipe's detector sees it, px of the picture it was found in."""
    score: float
    box: np.ndarray  # float [4]: x0, y0, x1, y1
    eyes: np.ndarray  # float [2, 2]
    mouth: np.ndarray  # float [2]

    def size(self):
        return float(self.box[3] - self.box[1])


class FaceTracker:
    """MediaPipe's FaceLandmarker and detector, for many videos. `with FaceTracker() as tracker: ...`

    Once a second, and where no face is followed, the detector surveys the picture. It says
    where to look closer (the mesh's own detector misses faces below an eighth of the picture),
    and in a new shot which way is up: a lying face is turned by 90, 180 or 270 degrees for
    tracking. A mesh that disagrees with the detector's eyes and mouth is no face. The mesh always
    looks for several faces: set to one, MediaPipe smooths over time, and lips lag by half a frame.
    """
    WINDOW = 2.5  # face heights from the face's centre to the window's sides
    SMALL = 0.2  # of the picture's height: a smaller face is looked for in a window
    UPRIGHT_BONUS = 0.05  # of score: nearly as sure as another turn is still upright
    PATIENCE = 4  # frames between two surveys while no face is found

    def __enter__(self):
        with quiet_stderr():
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
            with zipfile.ZipFile(LANDMARKER) as task:
                detector = task.read("face_detector.tflite")
            self.image = partial(mediapipe.Image, mediapipe.ImageFormat.SRGB)
            video = vision.RunningMode.VIDEO
            base = BaseOptions(model_asset_path=str(LANDMARKER))
            self.mesh = vision.FaceLandmarker.create_from_options(vision.FaceLandmarkerOptions(
                base_options=base, running_mode=video, num_faces=MOST_FACES))
            self.detector = vision.FaceDetector.create_from_options(vision.FaceDetectorOptions(
                base_options=BaseOptions(model_asset_buffer=detector)))
            self.talks = True  # MediaPipe's C++ logs until it has seen its first face
            self.clock_ms = 0  # MediaPipe wants rising time stamps, also from video to video
            self.forget()
        return self

    def __exit__(self, *_):
        with quiet_stderr():
            self.mesh.close()  # left to the collector they can hang
            self.detector.close()

    def forget(self):
        """Call between videos and shots: a black picture makes the mesh let go of its faces."""
        self.turns, self.window, self.until_survey, self.lost = 0, None, 0, True
        self.run(np.zeros((128, 128, 3), np.uint8))

    def run(self, rgb):
        self.clock_ms += 1000 // FPS
        return self.mesh.detect_for_video(self.image(data=rgb), self.clock_ms).face_landmarks

    def find(self, rgb):
        """uint8 RGB [H, W, 3] -> list of float32 [K, 3], one per face, at most 4.

        x, y in px of the frame, z (smaller: nearer to the camera) in the same scale. The frames
        of a video come in order."""
        with quiet_stderr() if self.talks else contextlib.nullcontext():
            detections = self.survey(rgb) if self.until_survey <= 0 else None
            faces = self.look(turned(rgb, self.turns))
            if not faces and not self.lost:
                detections = self.survey(rgb)
                faces = self.look(turned(rgb, self.turns))
        self.talks = self.talks and not faces
        if detections is not None:
            faces = [points for points in faces if agrees(points, detections)]
        self.lost = not faces
        self.until_survey = min(self.until_survey - 1, self.PATIENCE if self.lost else FPS)
        return [turn_back(points, self.turns, rgb.shape) for points in faces]

    def look(self, picture):
        """The mesh inside the window -> list of float32 [K, 3], px of the (turned) picture."""
        H, W = picture.shape[:2]
        x0, y0, x1, y1 = self.window or (0, 0, W, H)
        scale = np.float32([x1 - x0, y1 - y0, x1 - x0])  # z comes in widths
        faces = self.run(shrink(picture[y0:y1, x0:x1]))
        points = [[(face[i].x, face[i].y, face[i].z) for i in KEPT_POINTS] for face in faces]
        return [np.float32(face) * scale + np.float32([x0, y0, 0]) for face in points]

    def survey(self, rgb):
        """Sets turns and window for the next second. -> list of Detection, turned px"""
        self.until_survey = FPS
        detections = self.detect_part(turned(rgb, self.turns))
        if self.lost:
            ways = [self.detect_part(turned(rgb, turns)) for turns in range(4)]
            scores = [max((face.score for face in way), default=0) for way in ways]
            scores[0] += self.UPRIGHT_BONUS
            self.turns = int(np.argmax(scores))
            detections = ways[self.turns] or self.detect_small(rgb)
        self.window = None
        if detections:
            H, W = turned(rgb, self.turns).shape[:2]
            face = max(detections, key=Detection.size)
            reach = self.WINDOW * face.size()
            if face.size() < self.SMALL * H:
                centre = (face.box[:2] + face.box[2:]) / 2
                sides = np.r_[centre - reach, centre + reach]
                self.window = tuple(np.clip(sides, 0, [W, H, W, H]).astype(int))
        return detections

    def detect_small(self, picture):
        """The detector on overlapping parts of the picture, first of 2/3, then of 2/5 its size."""
        H, W = picture.shape[:2]
        for parts in (2, 4):
            high, wide = 2 * H // (parts + 1), 2 * W // (parts + 1)
            corners = [(row * high // 2, column * wide // 2)
                       for row in range(parts) for column in range(parts)]
            found = [self.detect_part(picture[y:y + high, x:x + wide], x, y) for y, x in corners]
            if any(found):
                return max(found, key=lambda faces: max((face.score for face in faces), default=0))
        return []

    def detect_part(self, part, left=0, top=0):
        small = shrink(part)
        scale = part.shape[1] / small.shape[1]
        size = np.float32([part.shape[1], part.shape[0]])
        corner = np.float32([left, top])
        detections = []
        for found in self.detector.detect(self.image(data=small)).detections:
            box = found.bounding_box
            low = np.float32([box.origin_x, box.origin_y]) * scale + corner
            high = low + np.float32([box.width, box.height]) * scale
            points = np.float32([(point.x, point.y) for point in found.keypoints]) * size + corner
            detections.append(Detection(found.categories[0].score, np.r_[low, high],
                                        points[:2], points[3]))
        return detections


def turned(picture, turns):
    """uint8 [H, W, 3] -> the same, turned left by `turns` quarters"""
    return np.ascontiguousarray(np.rot90(picture, turns))


def turn_back(points, turns, shape):
    """Points [K, 3] of np.rot90(picture, turns) -> the same in the picture of `shape`."""
    H, W = shape[:2]
    x, y, z = points.T
    x, y = [(x, y), (W - y, x), (W - x, H - y), (y, H - x)][turns]
    return np.stack([x, y, z], 1)


def agrees(points, detections):
    """Do a mesh's eyes and mouth lie where the detector that sees the same face has them?"""
    size = face_size(points)
    centre = points[:, :2].mean(0)
    nearest = min(detections, default=None,
                  key=lambda found: np.linalg.norm(found.box.reshape(2, 2).mean(0) - centre))
    if nearest is None or not (nearest.box[:2] < centre).all() or not (centre < nearest.box[2:]).all():
        return True  # the mesh follows a face that the detector misses
    eyes = points[kept(RIGID_MESH[:4]), :2].reshape(2, 2, 2).mean(1)
    mouth = points[MOUTH_CORNERS, :2].mean(0)
    apart = np.linalg.norm(np.r_[eyes - nearest.eyes, [mouth - nearest.mouth]], axis=1)
    return apart.mean() < 0.15 * size


def shrink(rgb):
    """uint8 [H, W, 3] -> the same, contiguous and of at most TRACK_PIXELS."""
    factor = (TRACK_PIXELS / (rgb.shape[0] * rgb.shape[1])) ** 0.5
    if factor >= 1:
        return np.ascontiguousarray(rgb)
    return cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


STDERR = threading.Lock()  # two threads that swap file descriptor 2 at once would lose it


@contextlib.contextmanager
def quiet_stderr():
    """MediaPipe's C++ logs go straight to file descriptor 2: away with them while it starts."""
    with STDERR:
        saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(null)


def face_size(points):
    """[K, 2 or 3] -> the longer side of the face's box, in the points' unit"""
    return float(np.ptp(points[:, :2], axis=0).max())


def follow_face(tracks, face=None):
    """One person of a shot: tracks, per frame a list of float32 [K, 3] -> float32 [T, K, 3].

    Frames without the person are NaN. Faces are linked to the nearest centre of the frame before.
    Of the people seen more than half as long as the longest-seen the largest is taken, or with
    face=N the N-th from left to right (BadInput if there is none)."""
    people = group_people(tracks)
    if face is not None:
        if not 0 <= face < len(people):
            raise BadInput(f"face {face}: there are {len(people)} faces (from 0, left to right)")
        people = [people[face]]
    landmarks = np.full((len(tracks), K, 3), np.nan, np.float32)
    if people:
        person = max(people, key=person_size)
        for t, points in person:
            landmarks[t] = points
    return landmarks


def group_people(tracks):
    """-> the people of a shot from left to right, each a list of (t, points [K, 3])"""
    people = []
    for t, faces in enumerate(tracks):
        for points in sorted(faces, key=face_size, reverse=True):
            free = [person for person in people if person[-1][0] < t]
            nearest = min(free, default=None, key=lambda person: distance(person[-1][1], points))
            if nearest is None or distance(nearest[-1][1], points) > 0.6 * face_size(points):
                people.append(nearest := [])
            nearest.append((t, points))
    longest = max((len(person) for person in people), default=0)
    people = [person for person in people if len(person) > longest / 2]
    return sorted(people, key=lambda person: np.mean([points[:, 0].mean() for _, points in person]))


def person_size(person):
    """Median face size of one of group_people's people, px"""
    return np.median([face_size(points) for _, points in person])


def distance(a, b):
    """Between the centres of two faces [K, 3], px"""
    return float(np.linalg.norm(a[:, :2].mean(0) - b[:, :2].mean(0)))


def fill_gaps(series):
    """[T, ...] with NaN rows -> the same, interpolated over time. All NaN: ValueError."""
    flat = series.reshape(len(series), -1).copy()
    there = np.isfinite(flat).all(1)
    if not there.any():
        raise ValueError("no frame has a face")
    at = np.arange(len(flat))
    if not there.all():
        for column in flat.T:
            column[:] = np.interp(at, at[there], column[there])
    return flat.reshape(series.shape)


def smooth(series, sigma):
    """Gaussian over time, ends held: [T, ...] -> [T, ...]; sigma in frames."""
    flat = np.ascontiguousarray(series.reshape(len(series), -1), np.float64)
    size = 2 * int(3 * sigma + 0.5) + 1
    blurred = cv2.GaussianBlur(flat, (1, size), sigmaX=1, sigmaY=sigma,
                               borderType=cv2.BORDER_REPLICATE)
    return blurred.reshape(series.shape)


def upright_motion(landmarks):
    """landmarks [T, K, 3], NaN rows allowed -> smooth complex centre [T] px, turn [T] px/cm.

    The least-squares similarity from the canonical face onto the RIGID points, scale * e^(i angle):
    it knows nothing of the mouth."""
    points = fill_gaps(landmarks[:, RIGID, :2].astype(np.float64)) @ [1, 1j]  # [T, 10] complex
    centre = points.mean(1)
    template = RIGID_TEMPLATE - RIGID_TEMPLATE.mean()
    turn = (points - centre[:, None]) @ template.conj() / np.sum(np.abs(template) ** 2)  # [T]
    centre = smooth(centre.real, 1.5) + 1j * smooth(centre.imag, 1.5)
    angle = smooth(np.unwrap(np.angle(turn)), 1.5)
    scale = np.exp(smooth(np.log(np.abs(turn)), 5.0))
    return centre, scale * np.exp(1j * angle)


def upright(landmarks, centre, turn):
    """Frame px -> upright face units (cm from amid the RIGID points): [T, K, 3] -> [T, K, 2]"""
    points = (landmarks[..., :2] @ np.array([1, 1j]) - centre[:, None]) / turn[:, None]
    return np.stack([points.real, points.imag], -1)


def smooth_affines(landmarks, box=None):
    """Where each frame's crop lies: landmarks [T, K, 3] frame px -> affines float32 [T, 2, 3].

    An affine leads from frame px to px of the 256 x 256 crop: upright, centred and scaled by the
    RIGID points alone, smoothed over time. The crop's side is constant over the clip: BOX_MARGIN *
    the median face height; box = (x0, y0, x1, y1) in upright units (YoloFace) takes the place of
    the landmarks' box. NaN rows are bridged."""
    centre, turn = upright_motion(landmarks)
    found = np.flatnonzero(np.isfinite(landmarks[:, 0, 0]))
    some = found[np.linspace(0, len(found) - 1, min(len(found), 500)).astype(int)]
    face = np.median(upright(landmarks[some], centre[some], turn[some]), 0)  # [K, 2]
    x0, y0, x1, y1 = box if box is not None else (*face.min(0), *face.max(0))
    unit = CROP_PX / (BOX_MARGIN * max(y1 - y0, 1.1 * (x1 - x0)))  # crop px per upright unit
    left = CROP_PX / 2 - unit * (x0 + x1) / 2
    top = NOSE_ROW - unit * face[NOSE_TIP, 1]
    rotate = unit / turn  # [T] complex: crop = rotate * (frame - centre) + (left, top)
    shift = left + 1j * top - rotate * centre
    rows = [rotate.real, -rotate.imag, shift.real, rotate.imag, rotate.real, shift.imag]
    return np.stack(rows, 1).reshape(-1, 2, 3).astype(np.float32)


def to_crop(points, affine):
    """points [..., K, 3] frame px, affine [..., 2, 3] -> [..., K, 3] crop px; z keeps its scale."""
    matrix, shift = affine[..., :2], affine[..., None, :, 2]
    flat = points[..., :2] @ np.swapaxes(matrix, -1, -2) + shift
    scale = np.hypot(matrix[..., 0, 0], matrix[..., 1, 0])[..., None, None]
    return np.concatenate([flat, points[..., 2:] * scale], -1).astype(np.float32)


def crop(frame, affine):
    """uint8 [H, W, 3], affine [2, 3] frame px -> crop px -> uint8 [256, 256, 3].

    When shrinking, it is sampled finer and averaged."""
    shrinking = 1 / np.hypot(affine[0, 0], affine[1, 0])
    fine = int(np.clip(np.ceil(shrinking - 0.1), 1, 4))
    scaled = affine * fine
    scaled[:, 2] += (fine - 1) / 2  # pixel centres sit at whole numbers
    size = (CROP_PX * fine, CROP_PX * fine)
    how = cv2.INTER_LINEAR if fine > 1 else cv2.INTER_CUBIC
    picture = cv2.warpAffine(frame, scaled, size, flags=how, borderMode=cv2.BORDER_REPLICATE)
    if fine == 1:
        return picture
    return cv2.resize(picture, (CROP_PX, CROP_PX), interpolation=cv2.INTER_AREA)


def head_motion(reference, frame):
    """The reference's face, mouth and all, with the frame's head pose.

    The 3-D similarity (rotation, scale, shift) that brings the reference's UPPER points onto the
    frame's in the least squares, applied to all its points. Source: Umeyama 1991.
    reference, frame [..., K, 3] px (batch axes broadcast) -> float32 [..., K, 3]; NaN in, NaN out.
    """
    reference, frame = np.broadcast_arrays(reference, frame)
    ours, theirs = (points[..., UPPER, :].astype(np.float64) for points in (reference, frame))
    missing = ~(np.isfinite(ours) & np.isfinite(theirs)).all((-1, -2))  # [...]
    ours, theirs = np.nan_to_num(ours), np.nan_to_num(theirs)
    centre, goal = ours.mean(-2, keepdims=True), theirs.mean(-2, keepdims=True)
    ours, theirs = ours - centre, theirs - goal
    U, S, Vt = np.linalg.svd(np.swapaxes(theirs, -1, -2) @ ours)  # [..., 3, 3]
    S[..., 2] *= (sign := np.sign(np.linalg.det(U @ Vt)))  # a rotation, not a reflection
    U[..., 2] *= sign[..., None]
    scale = S.sum(-1) / np.maximum((ours ** 2).sum((-1, -2)), 1e-9)
    moved = (reference - centre) @ np.swapaxes(U @ Vt, -1, -2) * scale[..., None, None] + goal
    moved[missing] = np.nan
    return moved.astype(np.float32)


def place_points(references, frames):
    """What LipSync.forward takes as `points`: references [R, K, 3], frames [S, K, 3] crop px
    -> float32 [S, R, 2, K, 2] picture widths: where each reference's points lie in its picture,
    and where they would lie with the frame's head pose."""
    posed = head_motion(references[None], frames[:, None])  # [S, R, K, 3]
    both = np.stack([np.broadcast_to(references, posed.shape), posed], 2)
    return both[..., :2].astype(np.float32) / CROP_PX


def mouth_shape(landmarks):
    """[..., K, 2 or 3] crop px -> float32 [..., 3]: inner-lip gap (px), mouth width (px), rounding
    (outer lip height / width)."""
    pairs = [landmarks[..., pair, :2] for pair in (INNER_LIPS, MOUTH_CORNERS, OUTER_LIPS)]
    gap, width, height = [np.linalg.norm(pair[..., 0, :] - pair[..., 1, :], axis=-1)
                          for pair in pairs]
    return np.stack([gap, width, height / np.maximum(width, 1e-6)], -1).astype(np.float32)


def head_pose(landmarks):
    """[..., K, 3] -> float32 [..., 2]: where the nose tip lies between the eyes' outer corners, in
    eye distances: sideways (0 = frontal, grows as the head turns), downwards (less looking up)."""
    flat = landmarks[..., :2] @ np.array([1, 1j])
    right, left = flat[..., EYE_CORNERS[0]], flat[..., EYE_CORNERS[1]]
    place = (flat[..., NOSE_TIP] - (left + right) / 2) / (left - right)
    return np.stack([place.real, place.imag], -1).astype(np.float32)


# ---- references (Fig. 7): one rule for training and dubbing ----------------------------------------

def select_references(landmarks, count, exclude=None, rng=None):
    """Which frames serve as references: the most closed mouth, then those most unlike the chosen.

    Patent: Fig. 7, reference frames chosen in training and inference "without a large gap".
    landmarks [T, K, 3] crop px -> int64 [count] frame numbers, the most closed mouth first.
    Choice: farthest-point sampling of opening and width, so that open, spread and rounded mouths
    and their teeth are there; a frame that moves (its picture is blurred) or whose head is turned
    away from the median pose counts as less unlike. exclude [n]: never a frame less than 5 from
    one of these, unless there is no other. rng (numpy Generator): the same rule on a random
    half of the frames, for training; None: always the same frames, for dubbing."""
    T = len(landmarks)
    allowed = np.arange(T)
    if exclude is not None:
        far = np.abs(allowed[:, None] - exclude).min(1) >= 5
        allowed = allowed[far] if far.any() else allowed
    if rng is not None:
        allowed = rng.permutation(allowed)[:max(4 * count, len(allowed) // 2)]
    gap, width, _ = mouth_shape(landmarks[allowed]).T
    eyes = np.linalg.norm(landmarks[allowed][:, RIGID[0], :2]
                          - landmarks[allowed][:, RIGID[3], :2], axis=1)
    shape = np.stack([gap / eyes, width / eyes], 1)  # [n, 2]
    shape = shape.clip(*np.quantile(shape, (0.02, 0.98), axis=0))  # a bad mesh is no extreme mouth
    pose = head_pose(landmarks)
    turned_away = np.linalg.norm(pose - np.median(pose, 0), axis=1)[allowed]
    speed = np.linalg.norm(np.gradient(landmarks[:, MOUTH, :2].mean(1), axis=0), axis=1)[allowed] \
        if T > 1 else np.zeros(1)
    doubt = 0.5 * turned_away + 0.02 * speed  # in the unit of shape: eye distances
    chosen = [int(np.argmin(shape[:, 0] + doubt))]
    unlike = np.full(len(allowed), np.inf)
    for _ in range(count - 1):
        unlike = np.minimum(unlike, np.linalg.norm(shape - shape[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(unlike - doubt)))
    return allowed[chosen].astype(np.int64)


# ---- face box (S12): yolov8-face through cv2.dnn, only with --face-detector -----------------------------------------------------


def decode_yolo(output, scale=1.0, pad=(0.0, 0.0), conf=0.5, iou=0.45):
    """yolov8-face output float32 [1, 20, A]: per anchor centre x, y, width, height, score, 5 x (x, y, visibility).

    -> boxes [N, 4] (x0, y0, x1, y1), scores [N], keypoints [N, 5, 3], best first, in pixels of the picture before the letterbox
    (which multiplied it by scale and then added pad = (left, top)). Overlaps above iou are suppressed."""
    rows = np.asarray(output, np.float32)[0].T  # [A, 20]
    rows = rows[rows[:, 4] > conf]  # [N, 20]
    corner = rows[:, :2] - rows[:, 2:4] / 2
    kept = cv2.dnn.NMSBoxes(np.hstack([corner, rows[:, 2:4]]).tolist(), rows[:, 4].tolist(), conf, iou)
    kept = np.array(kept, np.int64).reshape(-1)  # cv2 gives an empty tuple for none; sorted by score
    rows, corner = rows[kept], corner[kept]
    boxes = (np.hstack([corner, corner + rows[:, 2:4]]) - np.tile(pad, 2)) / scale
    keypoints = rows[:, 5:].reshape(-1, 5, 3)
    keypoints[..., :2] = (keypoints[..., :2] - pad) / scale
    return boxes.astype(np.float32), rows[:, 4], keypoints


class YoloFace:
    """yolov8n-face.onnx (derronqi/yolov8-face) -> face boxes. find(rgb uint8 [H, W, 3]) -> boxes, scores, keypoints of decode_yolo."""

    def __init__(self, onnx, side=640):
        if not os.path.isfile(onnx):
            raise BadInput(f"{onnx}: no such file")
        try:
            self.net, self.side = cv2.dnn.readNetFromONNX(str(onnx)), side
        except cv2.error as error:
            raise BadInput(f"{onnx}: not an ONNX network that OpenCV can read ({error.err})") from None

    def find(self, rgb):
        height, width = rgb.shape[:2]
        scale = self.side / max(height, width)
        pad = (int(self.side - width * scale) // 2, int(self.side - height * scale) // 2)
        canvas = np.full((self.side, self.side, 3), 114, np.uint8)
        small = cv2.resize(rgb, (round(width * scale), round(height * scale)))
        canvas[pad[1] : pad[1] + small.shape[0], pad[0] : pad[0] + small.shape[1]] = small
        self.net.setInput(cv2.dnn.blobFromImage(canvas, 1 / 255.0))  # [1, 3, 640, 640], RGB
        return decode_yolo(self.net.forward(), scale, pad)


# ---- shots: what happens between two cuts ----------------------------------------------------------

def track_shots(frames, trackers):
    """Yields (frame, faces, whether a new shot begins) for the frames of one video, in order.

    faces: list of float32 [K, 3]. Frames go through the trackers in turn, at the same time. A cut
    ends tracking. A few frames without a face (a hand, a flash) are no cut."""
    with ThreadPoolExecutor(len(trackers)) as pool:
        for tracker in trackers:
            tracker.forget()
        frames = iter(frames)
        before, gap = None, 0  # before: (thumbnail, faces) of the last frame with a face
        while group := list(itertools.islice(frames, len(trackers))):
            found = list(pool.map(FaceTracker.find, trackers, group))
            for i, frame in enumerate(group):
                now = thumbnail(frame), found[i]
                gap = 0 if found[i] else gap + 1
                judged = before is not None and (found[i] or gap > GAP_FRAMES)
                cut = judged and is_cut(before, now)
                if cut:  # or the landmarks crawl from the old face to the new one
                    for tracker in trackers:
                        tracker.forget()
                    found[i:] = pool.map(FaceTracker.find, trackers, group[i:])
                    now = now[0], found[i]
                yield frame, found[i], cut
                if found[i] or before is None or cut:
                    before = now


def thumbnail(frame):
    """uint8 [H, W, 3] -> float32 [48, 48, 3], 0..255"""
    return cv2.resize(frame[::4, ::4], (48, 48), interpolation=cv2.INTER_AREA).astype(np.float32)


def is_cut(before, after):
    """(thumbnail, faces) of two frames in a row -> is there a cut between them?

    Either the picture changes altogether, or its colours do, or all faces jump as it changes."""
    change = np.abs(after[0] - before[0]).mean()  # 0..255
    if change > 30:
        return True
    if change > 12 and colour_change(before[0], after[0]) > 0.4:
        return True
    jumps = [min(jump(a, b) for b in before[1]) for a in after[1] if before[1]]
    return change > 6 and len(jumps) > 0 and min(jumps) > 0.3


def colour_change(before, after):
    """Of two thumbnails: 0 the same colours .. 1 no colour in common"""
    histograms = [np.histogramdd(picture.reshape(-1, 3), bins=6, range=[(0, 256)] * 3)[0]
                  for picture in (before, after)]
    return np.abs(histograms[0] - histograms[1]).sum() / histograms[0].sum() / 2


def jump(a, b):
    """Two faces [K, 3] -> how far apart, in face sizes, position and size together."""
    return distance(a, b) / face_size(a) + abs(np.log(face_size(a) / face_size(b)))


# ---- clips (S11): DIR/.clips/NAME-XXXX_KKK.npz, each a self-contained training clip ----------------

CLIP_FRAMES = CLIP_SECONDS * FPS  # 125
LAYOUT = 2  # of the clip files: clips of another layout are made again
GAP_FRAMES = 5  # so many frames without a face are bridged, whatever they show
SMALLEST_FACE_PX, SILENCE = 80, 1e-3  # px of the frame; root mean square of full scale (-60 dB)


@dataclass(frozen=True)
class ClipInfo:
    """What the manifests say of a clip, so that none must be opened to know it."""
    path: Path
    source: str  # relative path of the video it was cut from
    text: str
    frames: int

    def folder(self):
        return str(Path(self.source).parent)


@dataclass(frozen=True)
class Clip:
    path: Path
    source: str
    text: str
    jpegs: np.ndarray  # uint8 [bytes], all crops one after the other
    offsets: np.ndarray  # int64 [T + 1] into jpegs
    landmarks: np.ndarray  # float32 [T, K, 3] crop px
    found: np.ndarray  # bool [T]; False: landmarks were interpolated
    wave: np.ndarray  # int16 [640 T], at one level (lipsync.level_sound)
    mel: np.ndarray  # float16 [80, 4 T]

    def __len__(self):
        return len(self.offsets) - 1

    def sound(self):
        """-> float32 [640 T], -1..1"""
        return self.wave.astype(np.float32) / 32768

    def frame(self, i, size=CROP_PX):
        """-> uint8 RGB [size, size, 3]; half size is decoded as such, 3 times faster"""
        how = cv2.IMREAD_REDUCED_COLOR_2 if 2 * size <= CROP_PX else cv2.IMREAD_COLOR
        picture = cv2.imdecode(self.jpegs[self.offsets[i]:self.offsets[i + 1]], how)[..., ::-1]
        if len(picture) == size:
            return picture
        return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)


def load_clip(path):
    """BadInput if the file is broken or foreign (every array is checked by zip's own CRC)."""
    names = ("jpegs", "offsets", "landmarks", "found", "wave", "mel")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names}
            return Clip(Path(path), str(file["source"]), str(file["text"]), **arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path}: broken clip ({error})") from None


def load_or_skip(path):
    """-> Clip, or None if its file is broken, which is said."""
    try:
        return load_clip(path)
    except BadInput as error:
        tqdm.write(f"skipped: {error}")
        return None


def list_clips(data_dir):
    """All clips under DIR/.clips that the manifests name -> list of ClipInfo, by path"""
    infos = []
    for path in sorted(Path(data_dir, ".clips").glob("*.json")):
        content = read_json(path)
        if content.get("signature", [None])[0] != LAYOUT:
            continue
        for clip in content.get("clips", []):
            place = path.parent / clip["name"]
            infos.append(ClipInfo(place, content["source"], clip["text"], clip["frames"]))
    return infos


def split_clips(infos, held_out_names=""):
    """(training clips, held-out clips): by name, or, where none is given, by a hash of the video.

    held_out_names: comma-separated parts of the source's path, * and ? allowed; a folder that one
    names is held out whole. Where the hash leaves one half empty (a single video, say), the last
    tenth of the clips is held out."""
    patterns = [name.strip() for name in held_out_names.split(",") if name.strip()]
    training, held_out = [], []
    for info in infos:
        named = any(fnmatch.fnmatch(info.source, f"*{pattern}*") for pattern in patterns)
        chosen = named if patterns else is_held_out(info.source)
        (held_out if chosen else training).append(info)
    if not patterns and not (training and held_out) and len(infos) > 1:
        last = max(1, len(infos) // 10)
        return infos[:-last], infos[-last:]
    return training, held_out


def is_held_out(source):
    """About one source in ten, by a hash of its name: stable when files come and go."""
    return media.hash_of(Path(source).stem) % 10 == 0


def list_videos(data_dir):
    """Every video under a folder, by its suffix, hidden ones left out -> list of Path"""
    return [path for path in list_files(data_dir) if path.suffix.lower() in media.VIDEO_SUFFIXES]


def list_files(data_dir):
    """All files under a folder, links followed once -> sorted list of Path. BadInput: no folder."""
    if Path(data_dir).is_file():
        raise BadInput(f"{data_dir}: is a file: give its folder")
    if not Path(data_dir).is_dir():
        raise BadInput(f"{data_dir}: no such folder")
    found, seen = [], set()
    for folder, inner, names in os.walk(data_dir, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up is walked once
            inner[:] = []
            continue
        seen.add(real)
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def read_text(video):
    """What is said, beside a video -> list of (start s, end s, word).

    NAME.align: a word a line with its times (1/25000 s as GRID has it, or seconds), a header line
    is left out. NAME.txt: LRS's form (Text:, Conf:, WORD START END rows), or any text; without rows
    it knows no times: one entry (0, inf, text). UTF-8 or UTF-16. An unreadable file is named and skipped."""
    align, text = video.with_suffix(".align"), video.with_suffix(".txt")
    try:
        if align.is_file():
            rows = [line.split() for line in decode_file(align).splitlines()]
            rows = [row for row in rows if len(row) == 3]
            unit = 1.0 if any("." in row[0] + row[1] for row in rows) else 25000
            words = [word for row in rows if (word := word_times(*row, unit))]
            if not words:
                raise ValueError("no line of start, end, word")
            return [word for word in words if word[2] not in ("sil", "sp")]
        if text.is_file():
            content = decode_file(text).strip()
            if content.startswith("Text:"):
                rows = [row.split() for row in content.partition("WORD START END")[2].splitlines()]
                words = [word_times(row[1], row[2], row[0]) for row in rows if len(row) >= 3]
                if any(words):
                    return [word for word in words if word]
                content = content.splitlines()[0].removeprefix("Text:")
            sentence = " ".join(content.split())
            return [(0.0, float("inf"), sentence)] if sentence else []
    except (OSError, ValueError) as error:
        name = align if align.is_file() else text
        tqdm.write(f"text skipped: {name}: {str(error).splitlines()[0][:80]}")
    return []


def decode_file(path):
    """A text file's content, UTF-8 or UTF-16, without a byte order mark"""
    content = path.read_bytes()
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content
    return content.decode("utf-16" if wide else "utf-8-sig")


def word_times(start, end, word, unit=1.0):
    """-> (start s, end s, word), or None where the times are no numbers"""
    try:
        return float(start) / unit, float(end) / unit, word
    except ValueError:
        return None


def clip_text(words, start, end, seconds):
    """What is said between start and end (s) of a video of that many seconds.

    Text without times counts only if the clip is (but for a second) the whole video: half a
    sentence under a whole one would teach the lip reader nonsense."""
    whole = end - start > seconds - 1
    inside = [word for first, last, word in words
              if (whole if last == float("inf") else start <= (first + last) / 2 < end)]
    return " ".join(inside)


def segments(frames, tracker):
    """Frames of one video -> yields lists of (faces, piece), at most 125 frames, none across a cut.

    piece: see cut_out, so that no whole pictures are held. The few faceless frames before a cut
    belong to the new scene."""
    held, box = [], None
    for frame, faces, cut in track_shots(frames, [tracker]):
        if cut:
            last = max((t for t, (seen, _) in enumerate(held) if seen), default=-1)
            first = max(last + 1, len(held) - GAP_FRAMES)
            if first:
                yield held[:first]
            held, box = held[first:], None
        elif len(held) == CLIP_FRAMES:
            yield held
            held = []
        piece, box = cut_out(frame, faces, box)
        held.append((faces, piece))
    if held:
        yield held


def cut_out(frame, faces, box):
    """-> (piece, box): the part of the frame within a face's size of any face.

    Without faces: within the last box, without a box the whole frame. piece: its pixels, at most
    TRACK_PIXELS, and the affine [2, 3] that leads from them to the frame's."""
    H, W = frame.shape[:2]
    if faces:
        low = np.min([points[:, :2].mean(0) - face_size(points) for points in faces], 0)
        high = np.max([points[:, :2].mean(0) + face_size(points) for points in faces], 0)
        box = np.clip([*low, *high], 0, [W, H, W, H]).astype(int)
    x0, y0, x1, y1 = (0, 0, W, H) if box is None else box
    if x1 <= x0 or y1 <= y0:
        x0, y0, x1, y1 = 0, 0, W, H
    pixels = shrink(frame[y0:y1, x0:x1]).copy()
    fx, fy = (x1 - x0) / pixels.shape[1], (y1 - y0) / pixels.shape[0]
    affine = np.array([[fx, 0, x0 + (fx - 1) / 2], [0, fy, y0 + (fy - 1) / 2]])
    return (pixels, affine), box


def chain(second, first):
    """The affine [2, 3] that does first, then second."""
    shift = second[:, :2] @ first[:, 2:] + second[:, 2:]
    return np.hstack([second[:, :2] @ first[:, :2], shift])


def refusal(landmarks, wave):
    """landmarks [T, K, 3] frame px, NaN where absent; wave float32 [640 T] -> why not to keep the
    clip, or None."""
    found = np.isfinite(landmarks[:, 0, 0])
    if len(found) < FPS:
        return "shorter than 1 s"
    if np.sqrt(np.mean(wave ** 2)) < SILENCE:
        return "silent sound"
    if found.mean() < 0.9:
        return "face missing in > 10 % of frames"
    if np.median([face_size(points) for points in landmarks[found]]) < SMALLEST_FACE_PX:
        return "face smaller than 80 px"
    return None


def upright_box(detector, pieces, landmarks):
    """S12 with yolov8-face: its box on the upright face, once a second.

    pieces: [T] of cut_out; landmarks [T, K, 3] frame px, NaN rows allowed -> median box
    (x0, y0, x1, y1) in upright units; None: no face found."""
    centre, turn = upright_motion(landmarks)
    side, unit = 640, 18.0  # px; px per upright unit (cm): a face is then about 320 px high
    boxes = []
    for i in range(0, len(pieces), FPS):
        rotate = unit / turn[i]
        shift = (1 + 1j) * side / 2 - rotate * centre[i]
        affine = np.array([[rotate.real, -rotate.imag, shift.real],
                           [rotate.imag, rotate.real, shift.imag]])
        pixels, lead = pieces[i]
        found, _, _ = detector.find(cv2.warpAffine(pixels, chain(affine, lead), (side, side)))
        around = [box for box in found if (box[:2] < side / 2).all() and (box[2:] > side / 2).all()]
        boxes += [(box - side / 2) / unit for box in around[:1]]
    return np.median(boxes, 0) if boxes else None


def save_clip(path, landmarks, affines, pieces, wave, text, source):
    """landmarks [T, K, 3] frame px with NaN rows; pieces [T] of cut_out. Whole or not at all."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95,
               cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    jpegs = []
    for (pixels, lead), affine in zip(pieces, affines):
        rgb = crop(pixels, chain(affine, lead))
        jpegs.append(cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)[1].ravel())
    samples = media.to_int16(wave)
    mel = log_mel(samples.astype(np.float32) / 32768).numpy().astype(np.float16)
    with open(path.with_suffix(f".{os.getpid()}.part"), "wb") as file:
        np.savez(file, jpegs=np.concatenate(jpegs), offsets=np.cumsum([0, *map(len, jpegs)]),
                 landmarks=to_crop(fill_gaps(landmarks), affines), wave=samples, mel=mel,
                 found=np.isfinite(landmarks[:, 0, 0]), text=text, source=source)
    os.replace(file.name, path)


def prepare_video(video, data_dir, face_detector=None, transcribe=None):
    """One video -> its clips in DIR/.clips and a manifest that names them. -> (clips, peak MiB)

    face_detector: path of a yolov8-face model; transcribe: whisper model that writes down what a
    clip without text says. Memory does not grow with the video's length, but for its sound."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    source, stem = video.relative_to(data_dir).as_posix(), clip_stem(video, data_dir)
    mark = signature(video, (face_detector, transcribe))
    for old in (data_dir / ".clips").iterdir():
        if old.name.startswith((stem + "_", stem + ".")):
            old.unlink(missing_ok=True)
    clips, refused, start = [], Counter(), 0
    try:
        detector = YoloFace(face_detector) if face_detector else None
        sound, words = level_sound(media.read_audio(video)), read_text(video)
        with FaceTracker() as tracker, contextlib.closing(media.read_frames(video)) as frames:
            for held in segments(frames, tracker):
                tracks, pieces = zip(*held)
                landmarks = follow_face(tracks)  # [T, K, 3]
                first, last = start * SAMPLES_PER_FRAME, (start + len(held)) * SAMPLES_PER_FRAME
                wave = np.pad(sound[first:last], (0, max(0, last - max(first, len(sound)))))
                if reason := refusal(landmarks, wave):
                    refused[reason] += 1
                else:
                    seconds = start / FPS, (start + len(held)) / FPS
                    text = clip_text(words, *seconds, len(sound) / SAMPLE_RATE)
                    if transcribe and not text:
                        text = transcriber(transcribe).transcribe(wave, fp16=False)["text"].strip()
                    box = upright_box(detector, pieces, landmarks) if detector else None
                    name = f"{stem}_{len(clips):03d}.npz"
                    save_clip(data_dir / ".clips" / name, landmarks,
                              smooth_affines(landmarks, box), pieces, wave, text, source)
                    clips.append({"name": name, "text": text, "frames": len(held)})
                start += len(held)
    except BadInput as error:
        silent = str(error).endswith("no sound track")
        refused["no sound track" if silent else "unreadable file"] += 1
    content = {"source": source, "signature": mark, "clips": clips, "refused": dict(refused)}
    part = manifest(video, data_dir).with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content))
    os.replace(part, manifest(video, data_dir))
    return len(clips), peak_mib()


def clip_stem(video, data_dir):
    source = video.relative_to(data_dir).as_posix()
    return f"{video.stem[:60]}-{media.hash_of(source) % 16**8:08x}"


def manifest(video, data_dir):
    return data_dir / ".clips" / (clip_stem(video, data_dir) + ".json")


def signature(video, options):
    """What a video's clips depend on; another signature, and they are made again. A copied folder
    keeps its signatures."""
    size, ends = video.stat().st_size, 0
    with contextlib.suppress(OSError), open(video, "rb") as file:  # refused later, with its reason
        ends = zlib.crc32(file.read(1 << 16))
        file.seek(max(0, size - (1 << 16)))
        ends = zlib.crc32(file.read(), ends)
    return [LAYOUT, size, ends, f"{media.hash_of(read_text(video)):x}", *options]


def up_to_date(old, new):
    """Same file, same text; and an option not asked for now may have been used then."""
    options = zip(old[-2:], new[-2:])
    return bool(old) and old[:-2] == new[:-2] and all(now in (None, then) for then, now in options)


def read_json(path):
    """-> what the file holds; {} if it is missing or broken"""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def peak_mib():
    """The most memory this process ever held, MiB, as Linux knows it; 0 elsewhere."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) >> 10


@lru_cache(maxsize=1)  # a worker loads it once
def transcriber(model_name):
    """openai-whisper's model of that name or file; BadInput if there is none."""
    import whisper
    names = whisper.available_models()
    if model_name not in names and not os.path.isfile(model_name):
        raise BadInput(f"--transcribe {model_name}: neither a file nor one of {', '.join(names)}")
    return whisper.load_model(model_name, device="cpu")


def prepare(data_dir, workers=None, shard=None, face_detector=None, transcribe=None):
    """Brings DIR/.clips up to date: done videos are skipped, changed ones made again.

    A killed run goes on where it was. shard=(i, n): only every n-th video, by a hash of its path.
    -> report {"videos", "new", "kept", "refused": {why: count}, "refused_names": {why: names},
    "others": names of files of other kinds, "orphans": clips whose video is gone, "outdated": videos whose clips had another layout; of this run "clips_per_s", and
    "peak_mib" of the largest worker}"""
    data_dir = Path(data_dir)
    files = list_files(data_dir)
    videos = [path for path in files if path.suffix.lower() in media.VIDEO_SUFFIXES]
    if not videos:
        raise BadInput(f"{data_dir}: no video in it")
    known = media.VIDEO_SUFFIXES | {".txt", ".align", ".csv"}
    others = [path.name for path in files if path.suffix.lower() not in known]
    stems = {clip_stem(video, data_dir) for video in videos}
    if shard is not None:
        place = [media.hash_of(video.relative_to(data_dir).as_posix()) % shard[1]
                 for video in videos]
        videos = [video for video, at in zip(videos, place) if at == shard[0] % shard[1]]
    if face_detector:
        face_detector = str(face_detector)
        YoloFace(face_detector)  # a bad model is refused here, before any worker starts
    if transcribe:
        transcriber(transcribe)
    (data_dir / ".clips").mkdir(exist_ok=True)
    marks = [read_json(manifest(video, data_dir)).get("signature", []) for video in videos]
    todo = [video for video, mark in zip(videos, marks)
            if not up_to_date(mark, signature(video, (face_detector, transcribe)))]
    outdated = sum(bool(mark) and mark[0] != LAYOUT for mark in marks)
    if outdated:
        tqdm.write(f"{outdated} videos have clips of an older layout: they are made again")
    clips, peak, began = 0, 0, time.monotonic()
    context = multiprocessing.get_context("spawn")
    count = min(workers or os.cpu_count(), len(todo))
    with tqdm(total=len(todo), unit="video", disable=not todo) as bar:
        if todo:
            pool = ProcessPoolExecutor(count, context)
            try:
                jobs = [pool.submit(prepare_video, video, data_dir, face_detector, transcribe)
                        for video in todo]
                for job in as_completed(jobs):
                    made, mib = job.result()
                    clips, peak = clips + made, max(peak, mib)
                    speed = clips / (time.monotonic() - began)
                    bar.set_postfix_str(f"{clips} clips, {speed:.1f} clips/s", refresh=False)
                    bar.update()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    done = [read_json(manifest(video, data_dir)) for video in videos]
    refused = sum((Counter(one.get("refused", {})) for one in done), Counter())
    refused_names = {}
    for video, one in zip(videos, done):
        for reason in one.get("refused", {}):
            refused_names.setdefault(reason, []).append(video.name)
    names = [path.name for path in (data_dir / ".clips").glob("*.npz")]
    return {"videos": len(videos), "new": len(todo),
            "kept": sum(len(one.get("clips", [])) for one in done), "refused": dict(refused),
            "refused_names": refused_names, "others": others,
            "orphans": sum(name.rsplit("_", 1)[0] not in stems for name in names),
            "clips_per_s": clips / max(time.monotonic() - began, 1e-9), "peak_mib": peak}


def print_report(report):
    """prepare's report in words: why each clip that was not kept was refused, with some names"""
    print(f"{report['videos']} videos ({report['new']} of them new or changed)")
    speed = f"; {report['clips_per_s']:.2f} clips/s, {report['peak_mib']} MiB a worker"
    print(f"{report['kept']:6d} clips kept" + (speed if report["new"] else ""))
    for reason, count in sorted(report["refused"].items(), key=lambda item: -item[1]):
        print(f"{count:6d} refused: {reason} ({some_names(report['refused_names'][reason])})")
    if report["others"]:
        print(f"{len(report['others']):6d} files of other kinds were not looked at "
              f"({some_names(report['others'])})")
    if report["orphans"]:
        print(f"{report['orphans']:6d} clips of videos that are gone or renamed: still trained "
              "on, until you delete them from .clips")


def some_names(names, most=3):
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


# ---- text and noise (S3): tokens of a sentence, other rooms and microphones ---------------------------------------------
BOS, EOS, PAD, VOCABULARY = 256, 257, 258, 259  # after the 256 bytes: begin, end, nothing (also CTC's blank); V


def encode_text(text):
    """str -> tokens: its UTF-8 bytes, then EOS. Any language, no vocabulary."""
    return [*text.encode(), EOS]


def decode_tokens(tokens):
    """Tokens up to EOS -> str; bytes that are no UTF-8 become the replacement character."""
    tokens = [*tokens, EOS]
    return bytes(token for token in tokens[:tokens.index(EOS)] if token < BOS).decode(errors="replace")


def add_noise(wave, decibels, rng, exponent=0.0):
    """Noise `decibels` below the speech, falling with frequency**exponent (0 white, 1 brown). float32 [N] -> [N]"""
    spectrum = np.fft.rfft(rng.standard_normal(len(wave)))
    noise = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 20) ** exponent, len(wave))
    level = math.sqrt(np.mean(wave**2) / np.mean(noise**2)) * 10 ** (-decibels / 20)
    return (wave + level * noise).astype(np.float32)


def corrupt_sound(wave, rng):
    """Another room and microphone: echo, noise 0..20 dB below the speech, gain -12..6 dB. float32 [N] -> float32 [N], -1..1."""
    wave = np.asarray(wave, np.float32)
    if rng.random() < 0.5:  # a room answers a clap with decaying noise; the 1 at delay 0 keeps the speech in its place
        length = int(SAMPLE_RATE * rng.uniform(0.1, 0.4))
        room = rng.standard_normal(length) * np.exp(-6.9 * np.arange(length) / length)                   # -60 dB at its end
        room *= rng.uniform(0.1, 0.5) / np.linalg.norm(room)
        room[0] = 1
        size = 1 << (len(wave) + length).bit_length()
        wave = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(room, size), size)[:len(wave)]
    noisy = add_noise(wave, rng.uniform(0, 20), rng, rng.choice([0, 0.5, 1]))
    return (noisy * 10 ** (rng.uniform(-12, 6) / 20)).clip(-1, 1)


# ---- datasets (S2, S3): training samples -----------------------------------------------------------

def feature_path(clip_path, key, noisy=False):
    """Where a clip's features by a frozen audio encoder are kept: NAME.npz -> NAME.KEY.npy"""
    name = re.sub("[^A-Za-z0-9]+", "-", key) + ("-noisy" if noisy else "")
    return Path(clip_path).with_suffix(f".{name}.npy")


def draw_chances(infos):
    """The chance of each clip to be drawn, adding up to 1.

    Folders in proportion to the square root of their videos, so that one large folder does not
    drown the others; inside a folder all videos (people) alike; inside a video all clips."""
    clips = Counter(info.source for info in infos)
    videos = Counter(str(Path(source).parent) for source in clips)
    weights = np.array([videos[info.folder()] ** -0.5 / clips[info.source] for info in infos])
    return weights / weights.sum()


def at_time(series, late):
    """[T, D] -> [T, D]: what comes `late` steps later; the ends repeat."""
    return series[(np.arange(len(series)) + late).clip(0, len(series) - 1)]


def move_sound(clip, late):
    """A new clip whose mel is taken `late` frames later: its sound was late by so much."""
    mel = at_time(clip.mel.T, late * MEL_PER_FRAME).T
    return dataclasses.replace(clip, mel=mel) if late else clip


class ClipDataset(torch.utils.data.Dataset):
    """Training samples: S frames of a clip, its references, and the sound of each frame.

    Patent: S2(2) the groups of S frames, S2(3) the audio window, Fig. 7 the references, S3 gamma
        and brightness.
    Shapes: sample = dict of
        refs [R, 3, H, W] uint8, target [S, 3, H, W] uint8 (masked = its upper half),
        points [S, R, 2, K, 2], lips [S, P, 2] float32 picture widths (see LipSync.forward),
        audio [S, F, D] float32 selected features (frozen encoder), or mel [80, 4 x 125] and
        window [S, F] int64 (scratch),
        sync [S, D] or [80, 4S] the sound of just these frames for the sync expert, in_sync bool,
        mouth [S, 4] int64 box (x0, y0, x1, y1) of the lips with a margin, px,
        amplitude [S], gamma, brightness float32, flip bool, clip int64, start int64.
        features: key of the frozen encoder's files (feature_path); None: scratch, from the mel.
        offsets {source: frames}: by how much a video's own sound is late.
    Choice: sample i depends on (seed, i) only, so a resumed run sees what it would have seen. In
        a share of the samples frame t's sound is paired, within the clip, with the picture whose
        mouth is a times as open as at t, and a is the amplitude. In the first `spread` samples the
        S frames lie anywhere in the clip: neighbours look alike, so these teach more, and the
        sync loss, which needs a row, comes later. `augment`: mirroring, gamma and brightness, and
        a smooth random bend and colour mix of all pictures alike, new people out of old.
    """

    def __init__(self, infos, config, group=5, seed=0, amplitude_share=0.3, random_refs=False,
                 augment=True, features=None, sync_audio=None, offsets=None, spread=0):
        if not infos:
            raise BadInput("no clips to train on: is DIR right, and were clips kept?")
        self.infos, self.config, self.group, self.seed = list(infos), config, group, seed
        self.amplitude_share, self.random_refs, self.augment = amplitude_share, random_refs, augment
        self.features, self.sync_audio = features, sync_audio or ("features" if features else "mel")
        self.offsets, self.spread = offsets or {}, spread
        self.limits = np.cumsum(draw_chances(self.infos))
        self.broken = set()

    def __len__(self):
        return len(self.infos)

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, int(index)])
        for _ in range(20):  # a broken file is named once, and another clip takes its place
            number = min(np.searchsorted(self.limits, rng.random()), len(self.infos) - 1)
            info = self.infos[number]
            if info.path in self.broken or info.frames < self.group + 12:
                continue
            try:
                clip, features = self.load(info)
            except (BadInput, OSError, ValueError) as error:
                self.broken.add(info.path)
                tqdm.write(f"skipped from now on: {info.path.name}: {error}")
                continue
            return self.sample(clip, features, number, rng, index < self.spread)
        raise BadInput(f"{self.infos[0].path.parent}: hardly a clip there can be read; "
                       "prepare the folder again")

    def load(self, info):
        """-> Clip and its features [T, D] (None for scratch), the sound moved to the lips"""
        late = self.offsets.get(info.source, 0)
        clip = move_sound(load_clip(info.path), late)
        if not self.features:
            return clip, None
        return clip, at_time(np.load(feature_path(info.path, self.features)), late)

    def sample(self, clip, features, number, rng, spread):
        S, size = self.group, self.config.image_size
        start = int(rng.integers(0, len(clip) - S + 1))
        heard = np.arange(start, start + S)  # whose sound
        if spread:
            heard = np.sort(rng.choice(len(clip), S, replace=False))
        shown, amplitude = heard, np.ones(S, np.float32)
        if rng.random() < self.amplitude_share:
            shown, amplitude = pair_amplitude(clip, heard, rng)
        if self.random_refs:
            refs = rng.choice(len(clip), self.config.refs)
        else:
            refs = select_references(clip.landmarks, self.config.refs, exclude=shown, rng=rng)
        pictures = np.stack([clip.frame(i) for i in [*refs, *shown]])  # [R+S, 256, 256, 3]
        points = clip.landmarks[[*refs, *shown]]  # [R+S, K, 3]
        flip = bool(self.augment and rng.random() < 0.5)
        gamma, brightness = 1.0, 1.0
        if self.augment:
            pictures, points = bend(pictures, points, rng)
            gamma, brightness = np.exp(rng.normal(0, 0.2)), rng.uniform(0.8, 1.2)
        if flip:
            pictures, points = pictures[:, :, ::-1], mirror(points)
        R = self.config.refs
        sample = dict(
            refs=to_planes(pictures[:R], size), target=to_planes(pictures[R:], size),
            points=torch.from_numpy(place_points(points[:R], points[R:])),
            lips=torch.from_numpy(points[R:, MOUTH, :2] / CROP_PX),
            mouth=torch.from_numpy(mouth_boxes(points[R:], size)),
            amplitude=torch.from_numpy(amplitude), flip=torch.tensor(flip),
            in_sync=torch.tensor(bool((shown == heard).all() and not spread)),
            gamma=torch.tensor(gamma, dtype=torch.float32),
            brightness=torch.tensor(brightness, dtype=torch.float32),
            clip=torch.tensor(number), start=torch.tensor(start))
        sample.update(self.sound(clip, features, heard, start))
        return sample

    def sound(self, clip, features, heard, start):
        """What a sample holds of the sound: its windows, and the piece for the sync expert"""
        window = audio_window(heard, self.config.spacing, self.config.window)  # [S, F]
        window = window.clamp(0, len(clip) - 1)
        piece = slice(start * MEL_PER_FRAME, (start + self.group) * MEL_PER_FRAME)
        sync = torch.from_numpy(clip.mel[:, piece].astype(np.float32))
        if not self.features:
            mel = np.zeros((N_MELS, MEL_PER_FRAME * CLIP_FRAMES), np.float32)
            mel[:, :clip.mel.shape[1]] = clip.mel[:, :mel.shape[1]]
            return dict(mel=torch.from_numpy(mel), window=window, sync=sync)
        if self.sync_audio == "features":
            sync = torch.from_numpy(features[start:start + self.group].astype(np.float32))
        audio = torch.from_numpy(features[window.numpy()].astype(np.float32))  # [S, F, D]
        return dict(audio=audio, sync=sync)


def to_planes(pictures, size):
    """uint8 [n, 256, 256, 3] -> uint8 [n, 3, size, size]"""
    if size != CROP_PX:
        pictures = [cv2.resize(np.ascontiguousarray(picture), (size, size),
                               interpolation=cv2.INTER_AREA) for picture in pictures]
    return torch.from_numpy(np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)))


def mouth_boxes(points, size=CROP_PX):
    """points [S, K, 3] crop px -> int64 [S, 4] (x0, y0, x1, y1): the lips with a margin, px of a
    picture of that size"""
    lips = points[:, LIPS_OUTER, :2]
    centre, width = lips.mean(1), np.ptp(lips[..., 0], axis=1)[:, None]
    box = np.concatenate([centre - width * (0.75, 0.6), centre + width * (0.75, 0.8)], 1)
    return (box * size / CROP_PX).clip(0, size).round().astype(np.int64)


def mirror(points):
    """points [..., K, 3] of a crop -> those of the mirrored crop"""
    points = points[..., MIRROR, :].copy()
    points[..., 0] = CROP_PX - 1 - points[..., 0]
    return points


def bend(pictures, points, rng):
    """One smooth random warp and one colour matrix for all pictures: a person like no other.

    pictures uint8 [n, 256, 256, 3], points [n, K, 3] crop px -> the same. Scale and shear +-6 %
    about the middle, 5 px of low-frequency bend, colour matrix +-0.12."""
    grid = np.stack(np.meshgrid(np.arange(CROP_PX), np.arange(CROP_PX)), -1).astype(np.float32)
    matrix = np.float32(rng.uniform(-0.06, 0.06, (2, 2)))
    low = np.float32(rng.normal(0, 2.5, (4, 4, 2)))
    shift = cv2.resize(low, (CROP_PX, CROP_PX), interpolation=cv2.INTER_CUBIC)
    shift += (grid - CROP_PX / 2) @ matrix  # [256, 256, 2]: a pixel is fetched from grid + shift
    colour = np.eye(3) + rng.uniform(-0.12, 0.12, (3, 3))
    colour /= colour.sum(1, keepdims=True)  # grey stays grey: brightness is another's matter
    bent = [cv2.transform(cv2.remap(picture, grid + shift, None, cv2.INTER_LINEAR,
                                    borderMode=cv2.BORDER_REPLICATE), colour)
            for picture in pictures]
    points = points.copy()
    place = points[..., :2].copy()
    for _ in range(3):  # where a point goes is the inverse of where a pixel is fetched from
        x, y = place.clip(0, CROP_PX - 1).round().astype(int).transpose(2, 0, 1)
        place = points[..., :2] - shift[y, x]
    points[..., :2] = place
    return np.stack(bent), points


def pair_amplitude(clip, heard, rng):
    """For the sound of frames `heard` [S]: pictures whose mouth is a times as open, a random.

    -> shown [S], a float32 [S]"""
    shapes, poses = mouth_shape(clip.landmarks), head_pose(clip.landmarks)
    opening, width = shapes[:, 0] / (shapes[:, 0].std() + 1e-6), shapes[:, 1]
    width, poses = width / (width.std() + 1e-6), poses / (poses.std(0) + 1e-6)
    wanted = opening[heard] * rng.uniform(0.4, 1.7)  # [S]
    cost = 2 * np.abs(opening[None] - wanted[:, None])  # [S, T]
    cost += 0.5 * np.abs(width[None] - width[heard][:, None])
    cost += 0.5 * np.linalg.norm(poses[None] - poses[heard][:, None], axis=-1)
    shown, gap = cost.argmin(1), shapes[:, 0]
    ratio = np.where(gap[heard] > 2, gap[shown] / np.maximum(gap[heard], 2), 1)
    return shown, ratio.clip(0.3, 2).astype(np.float32)


class MouthSamples:
    """What the mouth stage learns from: landmarks and features of all clips, in memory.

    Patent: S2(3) and S2(4)a-f; that lips are predicted is our choice (LipHead).
    Shapes: batch(step) -> dict of N = clips x frames rows: audio [N, F, D] (frozen encoder), or
        mel [clips, 80, 4 x 125] and window [clips, frames, F]; points [N, R, 2, K, 2],
        lips [N, P, 2] picture widths, amplitude [N], width [N] of the mouth, picture widths.
    Choice: the lips of a sample are the true ones, scaled by its amplitude about the closed mouth
        (the most closed reference): so the coefficient means opening. `quiet_share` of the frames
        are drawn from the softest tenth of their clip, so that silence closes the mouth. Mirrored
        at random. batch(step) depends on (seed, step) only.
    """

    def __init__(self, infos, config, features, seed=0, offsets=None, quiet_share=0.15,
                 amplitude_share=0.5):
        self.config, self.features, self.seed = config, features, seed
        self.quiet_share, self.amplitude_share = quiet_share, amplitude_share
        offsets, self.clips = offsets or {}, []
        kept_infos = []
        for info in tqdm(infos, desc="landmarks", unit="clip", leave=False):
            clip = load_or_skip(info.path) if info.frames > config.window + 1 else None
            if clip is None:
                continue
            late = offsets.get(info.source, 0)
            clip = move_sound(clip, late)
            sound = clip.mel
            if features:
                sound = at_time(np.load(feature_path(info.path, features)), late)
            kept_infos.append(info)
            self.clips.append((clip.landmarks, sound, loudness(clip)))
        if not self.clips:
            raise BadInput("no clips to train on: is DIR right, and were clips kept?")
        self.limits = np.cumsum(draw_chances(kept_infos))

    def batch(self, step, clips=24, frames=10):
        rng = np.random.default_rng([self.seed, 7, step])
        rows = []
        for _ in range(clips):
            number = min(np.searchsorted(self.limits, rng.random()), len(self.clips) - 1)
            rows.append(self.rows(*self.clips[number], frames, rng))
        whole = ("mel", "window")  # these keep their clip's axis
        join = {True: torch.stack, False: torch.cat}
        return {name: join[name in whole]([torch.from_numpy(row[name]) for row in rows])
                for name in rows[0]}

    def rows(self, landmarks, sound, loud, frames, rng):
        T = len(landmarks)
        at = rng.integers(0, T, frames)
        quiet = np.argsort(loud)[:max(1, T // 10)]
        at = np.where(rng.random(frames) < self.quiet_share, rng.choice(quiet, frames), at)
        if rng.random() < 0.5:
            landmarks = mirror(landmarks)
        refs = select_references(landmarks, self.config.refs, exclude=at[:1], rng=rng)
        points = place_points(landmarks[refs], landmarks[at])  # [frames, R, 2, K, 2]
        closed = points[:, 0, 1][:, MOUTH]  # [frames, P, 2]
        amplitude = np.ones(frames, np.float32)
        if rng.random() < self.amplitude_share:
            amplitude[:] = rng.uniform(0.4, 1.8)
        true = landmarks[at][:, MOUTH, :2] / CROP_PX
        lips = closed + amplitude[:, None, None] * (true - closed)
        window = audio_window(at, self.config.spacing, self.config.window).clamp(0, T - 1).numpy()
        row = dict(points=points, lips=lips.astype(np.float32), amplitude=amplitude)
        if self.features:
            return row | dict(audio=sound[window].astype(np.float32))
        mel = np.zeros((N_MELS, MEL_PER_FRAME * CLIP_FRAMES), np.float32)
        mel[:, :sound.shape[1]] = sound[:, :mel.shape[1]]
        return row | dict(mel=mel, window=window)


def loudness(clip):
    """-> float32 [T]: root mean square of each frame's sound"""
    return np.sqrt((clip.sound().reshape(len(clip), -1) ** 2).mean(1))


def lower_halves(clip, frames):
    """Half-size lower halves, what the experts see: uint8 RGB [n, 3, 64, 128]"""
    pictures = np.stack([clip.frame(i, CROP_PX // 2)[CROP_PX // 4:] for i in frames])
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))


class SyncDataset(ClipDataset):
    """S frames, their sound, and sounds of the same clip that do not overlap it.

    Patent: S3(1), syncXnet trained as SyncNet.
    Shapes: pictures [S, 3, 64, 128] uint8; sound [S, D] or [80, 4S], negatives [4, S, D] or
        [4, 80, 4S] float32; clip int64.
    Choice: sounds of the same clip are the hard negatives; other clips' are taken from the batch.
        Half of the samples take the noisy copies.
    """
    NEGATIVES = 4

    def sample(self, clip, features, number, rng, spread):
        S = self.group
        starts = np.arange(len(clip) - S + 1)
        start = int(rng.choice(starts))
        negatives = rng.choice(starts[np.abs(starts - start) >= S], self.NEGATIVES)
        pictures = lower_halves(clip, range(start, start + S))
        if rng.random() < 0.5:
            pictures = pictures[..., ::-1].copy()
        series, each = self.series(clip, features, rng)
        pieces = [series[i * each:(i + S) * each] for i in [start, *negatives]]
        sound = torch.from_numpy(np.stack(pieces).astype(np.float32))  # [1+4, S, D]
        if self.sync_audio == "mel":
            sound = sound.mT  # [1+4, 80, 4S]
        return dict(pictures=torch.from_numpy(pictures), sound=sound[0], negatives=sound[1:],
                    clip=torch.tensor(number))

    def series(self, clip, features, rng):
        """-> the sound over time [T, D] or [4T, 80], and its rows a frame"""
        noisy = rng.random() < 0.5
        if self.sync_audio == "features":
            if noisy:
                features = np.load(feature_path(clip.path, self.features, noisy=True))
            return features, 1
        mel = log_mel(corrupt_sound(clip.sound(), rng)).numpy() if noisy else clip.mel
        return mel.T, MEL_PER_FRAME


class SentenceDataset(torch.utils.data.Dataset):
    """Whole clips and their text, for the lip reader.

    Patent: S3(2).
    Shapes: video [T, 3, 64, 128] uint8, text str, number int; `collate` pads a batch to video
        [B, T, ...], length [B], tokens [B, U], clip [B].
    Choice: at random mirrored, and slower or faster by up to a quarter.
    """

    def __init__(self, infos, seed=0):
        self.infos, self.seed = list(infos), seed

    def __len__(self):
        return len(self.infos)

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, int(index)])
        for _ in range(20):  # a broken file is named, and another takes its place
            number = int(rng.integers(len(self.infos)))
            if clip := load_or_skip(self.infos[number].path):
                break
        else:
            raise BadInput(f"{self.infos[0].path.parent}: hardly a clip there can be read; "
                           "prepare the folder again")
        frames = np.arange(0, len(clip) - 0.5, rng.uniform(0.8, 1.25)).round().astype(int)
        video = lower_halves(clip, frames)
        if rng.random() < 0.5:
            video = video[..., ::-1].copy()
        return torch.from_numpy(video), clip.text, number

    @staticmethod
    def collate(samples):
        videos, texts, numbers = zip(*samples)
        tokens = [torch.tensor(encode_text(text)) for text in texts]
        pad = torch.nn.utils.rnn.pad_sequence
        return dict(video=pad(videos, batch_first=True),
                    length=torch.tensor([len(video) for video in videos]),
                    tokens=pad(tokens, batch_first=True, padding_value=PAD),
                    clip=torch.tensor(numbers))


def main():
    parser = argparse.ArgumentParser(description="S1: videos -> training clips; or draw a demo corpus.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="DIR", help="folder of videos; clips go to DIR/.clips")
    what.add_argument("--demo", metavar="DIR", help="draw talking heads into this folder")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--shard", metavar="i/n", help="only the i-th of n equal shares of the videos (i = 1..n), for n machines")
    parser.add_argument("--face-detector", metavar="ONNX", help="yolov8-face model for the face box (default: the landmarks' box)")
    parser.add_argument("--transcribe", metavar="MODEL", help="whisper model that writes down clips without text (default: none)")
    parser.add_argument("--clips", type=int, default=20, help="demo clips to draw, 5 s each (default: 20)")
    parser.add_argument("--speakers", type=int, default=4, help="demo speakers (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="demo seed (default: 0)")
    args = parser.parse_args()
    if args.demo:
        from bench import drawn                   # what is drawn is not in the patent: a room of its own
        drawn.draw_demo(args.demo, clips=args.clips, speakers=args.speakers, seed=args.seed)
        return
    print_report(prepare(args.data, args.workers, parse_shard(args.shard), args.face_detector, args.transcribe))


def parse_shard(text):
    if text is None:
        return None
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) <= int(n) and int(n) > 0):
        raise BadInput(f"--shard {text}: must be i/n, for example 1/4")
    return int(i), int(n)


if __name__ == "__main__":
    cli(main)
