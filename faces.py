"""S12: from frames to faces: points with depth, one person, a steady upright crop; and Fig. 7, the
references.

    stage        | code                                              | patent
    points       | KEPT_POINTS, FaceTracker                          | S12: landmarks
    one person   | follow_face, group_people                         | -
    crop         | smooth_affines, to_crop, crop                     | S12: upright 256 x 256 crop
    head pose    | with_head_pose, place_points                         | -
    mouth        | mouth_shape                                       | -
    references   | select_references, head_turn                      | Fig. 7
    face box     | YoloFace, decode_yolo                             | S12: --face-detector
    shots        | track_shots, is_cut                               | -

Letters as in common.py. Pictures are uint8 RGB, points float32 (x, y) pixels, mostly with a depth
z.
"""

import contextlib
import itertools
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from common import FPS, BadInput

LANDMARKER = Path(__file__).parent / "weights" / "face_landmarker.task"  # MediaPipe's, Apache-2.0
CROP_PX = 256
MOST_FACES = 4
TRACK_PIXELS = 1280 * 720  # MediaPipe finds no more in larger pictures, it only takes longer
LYING = "the face lies on its side or is upside down: turn the video upright"

# Numbers of MediaPipe's mesh. A point of ..._RIGHT mirrors the one at the same place of ..._LEFT.
RIGID_MESH = [33, 133, 362, 263, 168, 6, 197, 195, 5, 4]  # eye corners, nose bridge down to the tip
# Above row 122 of the crop, in the half that the network may see; no eyelids, which blink.
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
MOUTH_CORNERS, GAP_ENDS, HEIGHT_ENDS = kept([61, 291]), kept([13, 14]), kept([0, 17])  # pairs
EYE_CORNERS, NOSE_TIP = kept([33, 263]), kept([4])[0]


def mirror_partners():
    """{number in MediaPipe's mesh: the number of the point that it becomes in a mirror}"""
    right, left = UPPER_RIGHT + CHEEKS_RIGHT, UPPER_LEFT + CHEEKS_LEFT
    partners = {**dict(zip(right, left)), **dict(zip(left, right))}
    partners |= zip(JAW_MESH, JAW_MESH[::-1])
    for lips in (LIPS_OUTER_MESH, LIPS_INNER_MESH):  # 20 points around, from corner to corner
        partners |= {lips[i]: lips[10 - i] for i in range(-9, 11)}
    return partners


MIRROR = kept(map(mirror_partners().get, KEPT_POINTS, KEPT_POINTS))  # [K]
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
    """MediaPipe's FaceLandmarker and detector, for many videos; a context manager.

    Once a second, and where no face is followed, the detector surveys the picture. It says
    where to look closer (the mesh's own detector misses faces below an eighth of the picture),
    and in a new shot which way is up: a lying face is turned by 90, 180 or 270 degrees for
    tracking. A mesh that disagrees with the detector's eyes and mouth is no face. The mesh always
    looks for several faces: set to one, MediaPipe smooths over time, and lips lag by half a frame.
    `lying`: the last frame shows a face that the mesh cannot follow, and none that is upright.
    """
    WINDOW = 2.5  # face heights from the face's centre to the window's sides
    SMALL = 0.2  # of the picture's height: a smaller face is looked for in a window
    UPRIGHT_BONUS = 0.05  # of score: nearly as sure as another turn is still upright
    SURELY_LYING = 0.6  # score: less sure is often half a face, or none
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
        self.turns, self.window, self.until_survey = 0, None, 0
        self.lost, self.lying = True, False
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
        self.lying = self.lying and self.lost
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
        picture = shrink(rgb)
        if self.lost:
            ways = [self.detect_part(turned(picture, turns)) for turns in range(4)]
            scores = [max((face.score for face in way), default=0) for way in ways]
            scores[0] += self.UPRIGHT_BONUS
            self.turns = int(np.argmax(scores))
            self.lying = not ways[0] and scores[self.turns] > self.SURELY_LYING
            detections = ways[self.turns] or self.detect_small(picture)
        else:
            detections = self.detect_part(turned(picture, self.turns))
        unit = rgb.shape[0] / picture.shape[0]  # px of the frame per px of the small picture
        detections = [Detection(face.score, face.box * unit, face.eyes * unit, face.mouth * unit)
                      for face in detections]
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
        size = np.float32([part.shape[1], part.shape[0]])
        corner = np.float32([left, top])
        detections = []
        image = self.image(data=np.ascontiguousarray(part))
        for found in self.detector.detect(image).detections:
            box = found.bounding_box
            low = np.float32([box.origin_x, box.origin_y]) + corner
            high = low + np.float32([box.width, box.height])
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
    if nearest is None:
        return True
    low, high = nearest.box.reshape(2, 2)
    if not ((low < centre) & (centre < high)).all():
        return True  # the mesh follows a face that the detector misses
    eyes = points[RIGID[:4], :2].reshape(2, 2, 2).mean(1)
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


def follow_face(tracks):
    """The largest person of a shot: tracks, per frame a list of float32 [K, 3] -> as spread_out.

    Faces are linked to the nearest centre of the frame before. Only people seen more than half as
    long as the longest-seen count."""
    people = group_people(tracks)
    return spread_out(max(people, key=person_size, default=[]), len(tracks))


def spread_out(person, T):
    """List of (t, points [K, 3]) -> float32 [T, K, 3], NaN where the person is absent"""
    landmarks = np.full((T, K, 3), np.nan, np.float32)
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


def with_head_pose(reference, frame):
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
    left, stretch, right = np.linalg.svd(np.swapaxes(theirs, -1, -2) @ ours)  # [..., 3, 3]
    # a rotation, not a reflection
    stretch[..., 2] *= (sign := np.sign(np.linalg.det(left @ right)))
    left[..., 2] *= sign[..., None]
    scale = stretch.sum(-1) / np.maximum((ours ** 2).sum((-1, -2)), 1e-9)
    moved = (reference - centre) @ np.swapaxes(left @ right, -1, -2) * scale[..., None, None] + goal
    moved[missing] = np.nan
    return moved.astype(np.float32)


def place_points(references, frames):
    """What LipSync.forward takes as `points`: references [R, K, 3], frames [S, K, 3] crop px
    -> float32 [S, R, 2, K, 2] picture widths: where each reference's points lie in its picture,
    and where they would lie with the frame's head pose."""
    posed = with_head_pose(references[None], frames[:, None])  # [S, R, K, 3]
    both = np.stack([np.broadcast_to(references, posed.shape), posed], 2)
    return both[..., :2].astype(np.float32) / CROP_PX


def mouth_shape(landmarks):
    """[..., K, 2 or 3] crop px -> float32 [..., 3]: inner-lip gap (px), mouth width (px), rounding
    (outer lip height / width)."""
    pairs = [landmarks[..., pair, :2] for pair in (GAP_ENDS, MOUTH_CORNERS, HEIGHT_ENDS)]
    gap, width, height = [np.linalg.norm(pair[..., 0, :] - pair[..., 1, :], axis=-1)
                          for pair in pairs]
    return np.stack([gap, width, height / np.maximum(width, 1e-6)], -1).astype(np.float32)


def head_turn(landmarks):
    """[..., K, 3] -> float32 [..., 2]: where the nose tip lies between the eyes' outer corners, in
    eye distances: sideways (0 = frontal, grows as the head turns), downwards (less looking up)."""
    flat = landmarks[..., :2] @ np.array([1, 1j])
    right, left = flat[..., EYE_CORNERS[0]], flat[..., EYE_CORNERS[1]]
    place = (flat[..., NOSE_TIP] - (left + right) / 2) / (left - right)
    return np.stack([place.real, place.imag], -1).astype(np.float32)


# ---- references (Fig. 7): one rule for training and dubbing --------------------------------------

def select_references(landmarks, count, exclude=None, rng=None):
    """Which frames serve as references: the most closed mouth, then those most unlike the chosen.

    Patent: Fig. 7, reference frames chosen in training and inference "without a large gap".
    landmarks [T, K, 3] crop px -> int64 [count] frame numbers, the most closed mouth first.
    Choice: farthest-point sampling of opening and width, so that open, spread and rounded mouths
    and their teeth are there; a frame that moves (its picture is blurred) or whose head is turned
    away from the median pose counts as less unlike. exclude [n]: never a frame less than 5 from
    one of these, unless there is no other. rng (numpy Generator): the same rule on a random
    half of the frames, for training; None: always the same frames, for dubbing."""
    allowed = np.arange(len(landmarks))
    if exclude is not None:
        far = np.abs(allowed[:, None] - exclude).min(1) >= 5
        allowed = allowed[far] if far.any() else allowed
    if rng is not None:
        allowed = rng.permutation(allowed)[:max(4 * count, len(allowed) // 2)]
    opening_and_width = mouth_shape(landmarks)[:, :2]  # [T, 2] px
    eyes = landmarks[:, RIGID[0], :2] - landmarks[:, RIGID[3], :2]
    shape = opening_and_width / np.linalg.norm(eyes, axis=1, keepdims=True)
    shape, doubt = shape[allowed], reference_doubt(landmarks)[allowed]
    shape = shape.clip(*np.quantile(shape, (0.02, 0.98), axis=0))  # a bad mesh is no extreme mouth
    chosen = [int(np.argmin(shape[:, 0] + doubt))]
    unlike = np.full(len(allowed), np.inf)
    for _ in range(count - 1):
        unlike = np.minimum(unlike, np.linalg.norm(shape - shape[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(unlike - doubt)))
    return allowed[chosen].astype(np.int64)


def reference_doubt(landmarks):
    """What speaks against each frame as a reference, in eye distances: a head turned away from the
    median pose, a mouth that moves. [T, K, 3] -> [T]"""
    pose = head_turn(landmarks)
    turned_away = np.linalg.norm(pose - np.median(pose, 0), axis=1)
    if len(landmarks) == 1:
        return 0.5 * turned_away
    velocity = np.gradient(landmarks[:, MOUTH, :2].mean(1), axis=0)  # px a frame
    return 0.5 * turned_away + 0.02 * np.linalg.norm(velocity, axis=1)


# ---- face box (S12): yolov8-face through cv2.dnn, only with --face-detector ----------------------


def decode_yolo(output, scale=1.0, pad=(0.0, 0.0), conf=0.5, iou=0.45):
    """yolov8-face output float32 [1, 20, anchors]: per anchor centre x, y, width, height, score, 5
    x (x, y, visibility).

    -> boxes [boxes, 4] (x0, y0, x1, y1), scores [boxes], keypoints [boxes, 5, 3], best first, in
    pixels of the picture before the letterbox (which multiplied it by scale and then added pad =
    (left, top)). Overlaps above iou are suppressed."""
    rows = np.asarray(output, np.float32)[0].T  # [anchors, 20]
    rows = rows[rows[:, 4] > conf]  # [boxes, 20]
    corner = rows[:, :2] - rows[:, 2:4] / 2
    kept = cv2.dnn.NMSBoxes(np.hstack([corner, rows[:, 2:4]]).tolist(), rows[:, 4].tolist(), conf,
                            iou)
    # cv2 gives an empty tuple for none; sorted by score
    kept = np.array(kept, np.int64).reshape(-1)
    rows, corner = rows[kept], corner[kept]
    boxes = (np.hstack([corner, corner + rows[:, 2:4]]) - np.tile(pad, 2)) / scale
    keypoints = rows[:, 5:].reshape(-1, 5, 3)
    keypoints[..., :2] = (keypoints[..., :2] - pad) / scale
    return boxes.astype(np.float32), rows[:, 4], keypoints


class YoloFace:
    """yolov8n-face.onnx (derronqi/yolov8-face) -> face boxes. find(rgb uint8 [H, W, 3]) -> boxes,
    scores, keypoints of decode_yolo."""

    def __init__(self, onnx, side=640):
        if not os.path.isfile(onnx):
            raise BadInput(f"{onnx}: no such file")
        try:
            self.net, self.side = cv2.dnn.readNetFromONNX(str(onnx)), side
        except cv2.error as error:
            reason = f"not an ONNX network that OpenCV can read ({error.err})"
            raise BadInput(f"{onnx}: {reason}") from None

    def find(self, rgb):
        height, width = rgb.shape[:2]
        scale = self.side / max(height, width)
        pad = (int(self.side - width * scale) // 2, int(self.side - height * scale) // 2)
        canvas = np.full((self.side, self.side, 3), 114, np.uint8)
        small = cv2.resize(rgb, (round(width * scale), round(height * scale)))
        canvas[pad[1]:pad[1] + len(small), pad[0]:pad[0] + small.shape[1]] = small
        self.net.setInput(cv2.dnn.blobFromImage(canvas, 1 / 255.0))  # [1, 3, 640, 640], RGB
        return decode_yolo(self.net.forward(), scale, pad)


# ---- shots: what happens between two cuts --------------------------------------------------------

GAP_FRAMES = 5  # so many frames without a face are bridged, whatever they show


def track_shots(frames, trackers):
    """Yields (frame, faces, lying, whether a new shot begins) for a video's frames, in order.

    faces: list of float32 [K, 3]; lying: as of FaceTracker. Frames go through the trackers in turn,
    at the same time. A cut ends tracking. A few frames without a face (a hand, a flash) are no cut.
    """
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
                yield frame, found[i], trackers[i].lying, cut
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
    counts = []
    for picture in (before, after):
        colours, _ = np.histogramdd(picture.reshape(-1, 3), bins=6, range=[(0, 256)] * 3)
        counts.append(colours / colours.sum())
    return np.abs(counts[0] - counts[1]).sum() / 2


def jump(a, b):
    """Two faces [K, 3] -> how far apart, in face sizes, position and size together."""
    moved = distance(a, b) / face_size(a)
    grown = abs(np.log(face_size(a) / face_size(b)))
    return moved + grown
