"""S12: from frames to faces: points with depth, one person, a steady upright crop; and Fig. 7, the
references.

    stage       | code                                                 | patent
    points      | KEPT_POINTS, FaceTracker                             | S12: landmarks
    one person  | follow_face, find_trails                             | -
    crop        | smooth_affines, to_crop, crop                        | S12: upright 256 x 256 crop
    head, mouth | with_head_pose, place_points, mouth_shape, head_turn | -
    references  | select_references                                    | Fig. 7
    face box    | YoloFace, decode_yolo                                | S12: --face-detector
    shots       | track_shots, is_cut                                  | -

Letters as in common.py. Pictures are uint8 RGB, points float32 (x, y) pixels, mostly with a depth
z.
"""
import contextlib
import itertools
import math
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
MOUTH = LIPS_OUTER + LIPS_INNER + JAW  # [P] what the sound moves: the first P of the K points,
# as lips.py and LipSync count them
MOUTH_CORNERS, GAP_ENDS, HEIGHT_ENDS = kept([61, 291]), kept([13, 14]), kept([0, 17])  # pairs
EYE_CORNERS, NOSE_TIP = kept([33, 263]), kept([4])[0]


def mirror_partners():
    """{number in MediaPipe's mesh: the number of the point that it becomes in a mirror}"""
    right, left = UPPER_RIGHT + CHEEKS_RIGHT, UPPER_LEFT + CHEEKS_LEFT
    partners = dict(zip(right + left, left + right))
    partners |= zip(JAW_MESH, JAW_MESH[::-1])
    for lips in (LIPS_OUTER_MESH, LIPS_INNER_MESH):  # 20 points around, from corner to corner
        mirrored = lips[10::-1] + lips[:10:-1]
        partners |= zip(lips, mirrored)
    return partners


MIRROR = kept(map(mirror_partners().get, KEPT_POINTS, KEPT_POINTS))  # [K]
# The RIGID points of MediaPipe's canonical face, cm, x + iy, y down.
RIGID_TEMPLATE = np.array([-4.446 - 2.664j, -1.856 - 2.585j, 1.856 - 2.585j, 4.446 - 2.664j,
                           -3.271j, -2.473j, -1.728j, -1.059j, -0.366j, 0.463j])
NOSE_ROW = 118  # of 256: the tip's row in the crop, so that the whole mouth lies in the lower half
BOX_MARGIN = 1.1  # crop side / (height or 1.1 width) of the face: room below for an open jaw


# ---------------------------------------------------------------- points of a frame (S12)
@dataclass
class Detection:
    """A face as MediaPipe's detector sees it, px of the picture it was found in."""
    score: float
    box: np.ndarray  # float [4]: x0, y0, x1, y1
    eyes: np.ndarray  # float [2, 2]
    mouth: np.ndarray  # float [2]

    def size(self):
        _, top, _, bottom = self.box
        return float(bottom - top)

    def centre(self):
        return self.box.reshape(2, 2).mean(0)

    def scaled(self, unit):
        return Detection(self.score, self.box * unit, self.eyes * unit, self.mouth * unit)


class FaceTracker:
    """MediaPipe's FaceLandmarker and detector, for many videos; a context manager.

    Each 25 pictures, and where no face is followed, the detector surveys the picture. It says
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
    PATIENCE = 4  # pictures between two surveys while no face is found

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
        wide, high = x1 - x0, y1 - y0
        scale = np.float32([wide, high, wide])  # z comes in widths
        corner = np.float32([x0, y0, 0])
        found = self.run(shrink(picture[y0:y1, x0:x1]))
        return [kept_points(mesh) * scale + corner for mesh in found]

    def survey(self, rgb):
        """Sets turns and window until the next survey. -> list of Detection, turned px"""
        self.until_survey = FPS
        picture = shrink(rgb)
        if self.lost:
            ways = [self.detect_part(turned(picture, turns)) for turns in range(4)]
            scores = [best_score(way) for way in ways]
            scores[0] += self.UPRIGHT_BONUS
            self.turns = int(np.argmax(scores))
            self.lying = not ways[0] and scores[self.turns] > self.SURELY_LYING
            detections = ways[self.turns] or self.detect_small(picture)
        else:
            detections = self.detect_part(turned(picture, self.turns))
        unit = rgb.shape[0] / picture.shape[0]  # px of the frame per px of the small picture
        detections = [face.scaled(unit) for face in detections]
        H, W = turned(rgb, self.turns).shape[:2]
        self.window = None
        if detections:
            face = max(detections, key=Detection.size)
            if face.size() < self.SMALL * H:
                self.window = self.window_around(face, H, W)
        return detections

    def window_around(self, face, H, W):
        """-> (x0, y0, x1, y1) inside a picture of H x W px"""
        reach = self.WINDOW * face.size()
        sides = np.r_[face.centre() - reach, face.centre() + reach]
        return tuple(sides.clip(0, [W, H, W, H]).astype(int))

    def detect_small(self, picture):
        """The detector on overlapping parts of the picture, first of 2/3, then of 2/5 its size."""
        H, W = picture.shape[:2]
        if min(H, W) < 5:  # its parts would be empty
            return []
        for parts in (2, 4):
            down, across = H // (parts + 1), W // (parts + 1)  # half a part
            found = []
            for row, column in itertools.product(range(parts), repeat=2):
                top, left = row * down, column * across
                part = picture[top:top + 2 * down, left:left + 2 * across]
                found.append(self.detect_part(part, left, top))
            if any(found):
                return max(found, key=best_score)
        return []

    def detect_part(self, part, left=0, top=0):
        """The detector on a part of a picture, whose corner lies there -> list of Detection"""
        size, corner = np.float32(part.shape[1::-1]), np.float32([left, top])
        detections = []
        image = self.image(data=np.ascontiguousarray(part))
        for found in self.detector.detect(image).detections:
            box, score = found.bounding_box, found.categories[0].score
            low = np.float32([box.origin_x, box.origin_y]) + corner
            high = low + np.float32([box.width, box.height])
            points = np.float32([(point.x, point.y) for point in found.keypoints])
            points = points * size + corner
            box = np.r_[low, high]
            detections.append(Detection(score, box, eyes=points[:2], mouth=points[3]))
        return detections


def kept_points(mesh):
    """MediaPipe's 478 landmarks of a face -> float32 [K, 3], its units"""
    points = [mesh[number] for number in KEPT_POINTS]
    return np.float32([(point.x, point.y, point.z) for point in points])


def best_score(detections):
    return max((face.score for face in detections), default=0)


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
    if not detections:
        return True
    centre = centre_of(points)
    nearest = min(detections, key=lambda found: length(found.centre() - centre))
    low, high = nearest.box.reshape(2, 2)
    if not ((low < centre) & (centre < high)).all():
        return True  # the mesh follows a face that the detector misses
    right_eye, left_eye = centre_of(points[RIGID[:2]]), centre_of(points[RIGID[2:4]])
    ours = np.stack([right_eye, left_eye, centre_of(points[MOUTH_CORNERS])])
    theirs = np.vstack([nearest.eyes, nearest.mouth])
    return length(ours - theirs).mean() < 0.15 * face_size(points)


def shrink(rgb):
    """uint8 [H, W, 3] -> the same, contiguous, of at most TRACK_PIXELS and no side that MediaPipe
    cannot count."""
    H, W = rgb.shape[:2]
    factor = min((TRACK_PIXELS / (H * W)) ** 0.5, 32_000 / max(H, W))
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
    sides = np.ptp(points[:, :2], axis=0)
    return float(sides.max())


def centre_of(points):
    """[K, 2 or 3] -> [2]"""
    return points[:, :2].mean(0)


def length(vectors):
    """[..., n] -> [...]"""
    return np.linalg.norm(vectors, axis=-1)


def as_complex(points):
    """[..., 2 or 3] -> complex [...]: x + iy, so that a turn is a product"""
    return points[..., 0] + 1j * points[..., 1]


# ---------------------------------------------------------------- one person
def follow_face(seen):
    """The largest face of a shot: seen, per frame a list of float32 [K, 3] -> as spread_out."""
    return spread_out(max(find_trails(seen), key=trail_size, default=[]), len(seen))


def spread_out(trail, T):
    """-> float32 [T, K, 3], NaN where the face is absent"""
    landmarks = np.full((T, K, 3), np.nan, np.float32)
    for t, points in trail:
        landmarks[t] = points
    return landmarks


def find_trails(seen):
    """Who is who in a shot: per frame a list of faces [K, 3] -> trails, from left to right: each a
    list of (t, points [K, 3]).

    A face is linked to the nearest one of the frames before. Only trails more than half as long as
    the longest count."""
    trails = []
    for t, faces in enumerate(seen):
        for points in sorted(faces, key=face_size, reverse=True):
            free = [trail for trail in trails if trail[-1][0] < t]
            last = [last_points(trail) for trail in free]
            number = nearest(points, last)
            if number is not None:
                trail = free[number]
            else:
                trails.append(trail := [])
            trail.append((t, points))
    longest = max(map(len, trails), default=0)
    trails = [trail for trail in trails if len(trail) > longest / 2]
    return sorted(trails, key=mean_x)


def nearest(points, others):
    """Which of the other faces this one [K, 3] can be, a frame later -> its number, or None"""
    steps = [distance(other, points) for other in others]
    return int(np.argmin(steps)) if min(steps, default=np.inf) <= 0.6 * face_size(points) else None


def last_points(trail):
    _, points = trail[-1]
    return points


def mean_x(trail):
    centres = [centre_of(points) for _, points in trail]
    return np.mean(centres, 0)[0]


def trail_size(trail):
    """Median size of the face, px"""
    return np.median([face_size(points) for _, points in trail])


def distance(a, b):
    """Between the centres of two faces [K, 3], px"""
    return float(length(centre_of(a) - centre_of(b)))


# ---------------------------------------------------------------- upright crop (S12)
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
    reach = int(3 * sigma + 0.5)
    size = 2 * reach + 1
    blurred = cv2.GaussianBlur(flat, (1, size), sigmaX=1, sigmaY=sigma,
                               borderType=cv2.BORDER_REPLICATE)
    return blurred.reshape(series.shape)


def upright_motion(landmarks):
    """landmarks [T, K, 3], NaN rows allowed -> smooth complex centre [T] px, similarity [T]
    px/cm: its absolute value is the scale, its angle the turn.

    The least-squares similarity from the canonical face onto the RIGID points, scale * e^(i angle):
    it knows nothing of the mouth."""
    rigid = landmarks[:, RIGID].astype(np.float64)
    points = as_complex(fill_gaps(rigid))  # [T, 10]
    centre = points.mean(1, keepdims=True)
    template = RIGID_TEMPLATE - RIGID_TEMPLATE.mean()
    fit = (points - centre) @ template.conj()
    similarity = fit / np.vdot(template, template)  # [T]
    both = np.hstack([centre.real, centre.imag])  # [T, 2]
    centre = as_complex(smooth(both, 1.5))
    angle = smooth(np.unwrap(np.angle(similarity)), 1.5)
    log_scale = smooth(np.log(np.abs(similarity)), 5.0)
    return centre, np.exp(log_scale + 1j * angle)


def upright(landmarks, centre, similarity):
    """Frame px -> upright face units (cm from amid the RIGID points): [T, K, 3] -> [T, K, 2]"""
    points = as_complex(landmarks) - centre[:, None]
    points = points / similarity[:, None]
    return np.stack([points.real, points.imag], -1)


def smooth_affines(landmarks, box=None):
    """Where each frame's crop lies: landmarks [T, K, 3] frame px -> affines float32 [T, 2, 3].

    An affine leads from frame px to px of the 256 x 256 crop: upright, centred and scaled by the
    RIGID points alone, smoothed over time. The crop's side is constant over the clip: BOX_MARGIN *
    the median face's height, or 1.1 times its width where that is more; box = (x0, y0, x1, y1) in
    upright units (YoloFace) takes the place of the landmarks' box. NaN rows are bridged."""
    centre, similarity = upright_motion(landmarks)
    found = np.flatnonzero(np.isfinite(landmarks[:, 0, 0]))
    some = found[::1 + len(found) // 500]  # enough for a median
    shapes = upright(landmarks[some], centre[some], similarity[some])
    face = np.median(shapes, 0)  # [K, 2]
    x0, y0, x1, y1 = box if box is not None else np.r_[face.min(0), face.max(0)]
    height = max(y1 - y0, 1.1 * (x1 - x0))
    unit = CROP_PX / (BOX_MARGIN * height)  # crop px per upright unit
    left = CROP_PX / 2 - unit * (x0 + x1) / 2
    top = NOSE_ROW - unit * face[NOSE_TIP, 1]
    corner = complex(left, top)
    rotate = unit / similarity  # [T] complex: crop = rotate * (frame - centre) + corner
    shift = corner - rotate * centre
    rows = [rotate.real, -rotate.imag, shift.real, rotate.imag, rotate.real, shift.imag]
    return np.stack(rows, 1).reshape(-1, 2, 3).astype(np.float32)


def to_crop(points, affine):
    """points [..., K, 3] frame px, affine [..., 2, 3] -> [..., K, 3] crop px; z keeps its scale."""
    matrix, shift = affine[..., :2], affine[..., None, :, 2]
    flat = points[..., :2] @ np.swapaxes(matrix, -1, -2) + shift
    scale = length(matrix[..., 0])[..., None, None]
    depth = points[..., 2:] * scale
    return np.concatenate([flat, depth], -1).astype(np.float32)


def crop(frame, affine):
    """uint8 [H, W, 3], affine [2, 3] frame px -> crop px -> uint8 [256, 256, 3].

    When shrinking, it is sampled finer and averaged."""
    shrinking = 1 / length(affine[:, 0])
    fine = math.ceil(shrinking - 0.1)
    fine = min(max(fine, 1), 4)
    scaled = affine * fine
    scaled[:, 2] += (fine - 1) / 2  # pixel centres sit at whole numbers
    size = (CROP_PX * fine, CROP_PX * fine)
    how = cv2.INTER_LINEAR if fine > 1 else cv2.INTER_CUBIC
    picture = cv2.warpAffine(frame, scaled, size, flags=how, borderMode=cv2.BORDER_REPLICATE)
    if fine == 1:
        return picture
    return cv2.resize(picture, (CROP_PX, CROP_PX), interpolation=cv2.INTER_AREA)


# ---------------------------------------------------------------- head pose and mouth
def with_head_pose(reference, frame):
    """The reference's face, mouth and all, with the frame's head pose.

    The 3-D similarity (rotation, scale, shift) that brings the reference's UPPER points onto the
    frame's in the least squares, applied to all its points. Source: Umeyama 1991.
    reference, frame [..., K, 3] px (batch axes broadcast) -> float32 [..., K, 3]; NaN in, NaN out.
    """
    reference, frame = np.broadcast_arrays(reference, frame)
    ours, theirs = (points[..., UPPER, :].astype(np.float64) for points in (reference, frame))
    there = np.isfinite(ours + theirs).all((-1, -2))  # [...]
    ours, theirs = np.nan_to_num(ours), np.nan_to_num(theirs)
    centre, goal = ours.mean(-2, keepdims=True), theirs.mean(-2, keepdims=True)
    ours, theirs = ours - centre, theirs - goal
    left, stretch, right = np.linalg.svd(np.swapaxes(theirs, -1, -2) @ ours)  # [..., 3, 3]
    sign = np.sign(np.linalg.det(left @ right))  # -1: a reflection, which is no rotation
    stretch[..., 2] *= sign
    left[..., 2] *= sign[..., None]
    spread = np.square(ours).sum((-1, -2))
    scale = stretch.sum(-1) / spread.clip(1e-9)
    rotation = scale[..., None, None] * (left @ right)
    moved = (reference - centre) @ np.swapaxes(rotation, -1, -2) + goal
    moved[~there] = np.nan
    return moved.astype(np.float32)


def place_points(references, frames):
    """What LipSync.forward takes as `points`: references [R, K, 3], frames [S, K, 3] crop px
    -> float32 [S, R, 2, K, 2] picture widths: where each reference's points lie in its picture,
    and where they would lie with the frame's head pose."""
    posed = with_head_pose(references[None], frames[:, None])  # [S, R, K, 3]
    both = np.stack([np.broadcast_to(references, posed.shape), posed], 2)
    return both[..., :2].astype(np.float32) / CROP_PX


def place_lips(frames):
    """What LipSync.forward takes as `lips`: those of frames [S, K, 3] crop px
    -> float32 [S, P, 2] picture widths."""
    return frames[:, MOUTH, :2].astype(np.float32) / CROP_PX


def mouth_shape(landmarks):
    """[..., K, 2 or 3] crop px -> float32 [..., 3]: inner-lip gap (px), mouth width (px), rounding
    (outer lip height / width)."""
    gap = span(landmarks, GAP_ENDS)
    width = span(landmarks, MOUTH_CORNERS)
    rounding = span(landmarks, HEIGHT_ENDS) / width.clip(1e-6)
    return np.stack([gap, width, rounding], -1).astype(np.float32)


def span(landmarks, ends):
    """How far two points lie apart in the picture: [..., K, 2 or 3] -> [...]"""
    first, second = ends
    return length(landmarks[..., first, :2] - landmarks[..., second, :2])


def head_turn(landmarks):
    """[..., K, 3] -> float32 [..., 2]: where the nose tip lies between the eyes' outer corners, in
    eye distances: sideways (0 = frontal, grows as the head turns), downwards (less looking up)."""
    eyes = as_complex(landmarks[..., EYE_CORNERS, :])  # [..., 2]
    nose = as_complex(landmarks[..., NOSE_TIP, :])
    between = eyes[..., 1] - eyes[..., 0]
    place = (nose - eyes.mean(-1)) / between
    return np.stack([place.real, place.imag], -1).astype(np.float32)


# ---------------------------------------------------------------- references (Fig. 7)
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
        gaps = np.abs(allowed[:, None] - exclude)
        far = gaps.min(1) >= 5
        allowed = allowed[far] if far.any() else allowed
    if rng is not None:
        enough = max(4 * count, len(allowed) // 2)
        allowed = rng.permutation(allowed)[:enough]
    opening_and_width = mouth_shape(landmarks)[:, :2]  # [T, 2] px
    shape = opening_and_width / span(landmarks, EYE_CORNERS)[:, None]
    shape, doubt = shape[allowed], reference_doubt(landmarks)[allowed]
    low, high = np.quantile(shape, (0.02, 0.98), axis=0)
    shape = shape.clip(low, high)  # a bad mesh is no extreme mouth
    best = np.argmin(shape[:, 0] + doubt)
    chosen, unlike = [best], np.full(len(allowed), np.inf)
    for _ in range(count - 1):
        unlike = np.minimum(unlike, length(shape - shape[best]))
        best = np.argmax(unlike - doubt)
        chosen.append(best)
    return allowed[chosen].astype(np.int64)


def reference_doubt(landmarks):
    """What speaks against each frame as a reference, in eye distances: a head turned away from the
    median pose, a mouth that moves. [T, K, 3] -> [T]"""
    pose = head_turn(landmarks)
    turned_away = length(pose - np.median(pose, 0))
    if len(landmarks) == 1:
        return 0.5 * turned_away
    mouth = landmarks[:, MOUTH, :2].mean(1)
    speed = length(np.gradient(mouth, axis=0))  # px a frame
    return 0.5 * turned_away + 0.02 * speed


# ---------------------------------------------------------------- face box (S12)
def decode_yolo(output, scale=1.0, pad=(0.0, 0.0), conf=0.5, iou=0.45):
    """yolov8-face output float32 [1, 20, anchors]: per anchor centre x, y, width, height, score, 5
    x (x, y, visibility).

    -> boxes [boxes, 4] (x0, y0, x1, y1), scores [boxes], keypoints [boxes, 5, 3], best first, in
    pixels of the picture before the letterbox (which multiplied it by scale and then added pad =
    (left, top)). Overlaps above iou are suppressed."""
    rows = np.asarray(output, np.float32)[0].T  # [anchors, 20]
    centre, size, score, points = np.split(rows, [2, 4, 5], axis=1)
    score, corner = score[:, 0], centre - size / 2
    order = cv2.dnn.NMSBoxes(np.hstack([corner, size]).tolist(), score.tolist(), conf, iou)
    order = np.array(order, np.int64).reshape(-1)  # best first; cv2 gives an empty tuple for none
    low, high = corner[order], (corner + size)[order]
    boxes = np.hstack([low - pad, high - pad]) / scale
    keypoints = points[order].reshape(-1, 5, 3)
    keypoints[..., :2] -= pad
    keypoints[..., :2] /= scale
    return boxes.astype(np.float32), score[order], keypoints


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
        scale = self.side / max(rgb.shape)
        width, height = round(scale * rgb.shape[1]), round(scale * rgb.shape[0])
        small = cv2.resize(rgb, (width, height))
        left, top = (self.side - width) // 2, (self.side - height) // 2
        canvas = np.full((self.side, self.side, 3), 114, np.uint8)
        canvas[top:top + height, left:left + width] = small
        self.net.setInput(cv2.dnn.blobFromImage(canvas, 1 / 255))  # [1, 3, 640, 640], RGB
        return decode_yolo(self.net.forward(), scale, (left, top))


# ---------------------------------------------------------------- shots
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
                    found[i:] = pool.map(FaceTracker.find, trackers[i:], group[i:])
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
    (picture, faces), (new_picture, new_faces) = before, after
    change = np.abs(new_picture - picture).mean()  # 0..255
    if change > 30:
        return True
    if change > 12 and colour_change(picture, new_picture) > 0.4:
        return True
    jumps = [jump(a, b) for a in faces for b in new_faces]
    return change > 6 and min(jumps, default=0) > 0.3


def colour_change(before, after):
    """Of two thumbnails: 0 the same colours .. 1 no colour in common"""
    counts = []
    for picture in (before, after):
        colours, _ = np.histogramdd(picture.reshape(-1, 3), bins=6, range=[(0, 256)] * 3)
        counts.append(colours / colours.sum())
    here, there = counts
    return np.abs(here - there).sum() / 2


def jump(a, b):
    """Two faces [K, 3] -> how far apart, in face sizes, position and size together."""
    size, other = face_size(a), face_size(b)
    grown = abs(math.log(size / other))
    return distance(a, b) / size + grown
