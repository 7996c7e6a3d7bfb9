"""S1: from a folder of talking-head videos to training clips, and what training and dubbing both need of them.

    stage        | code                                              | patent
    media        | read_audio, read_frames, VideoWriter              | S11: 25 fps frames, 16 kHz mono sound
    faces        | FaceTracker, follow_face, smooth_affines, crop    | S12: landmarks, upright affine, 256 x 256 crop
    face box     | YoloFace, decode_yolo                             | S12: yolov8-face (with --face-detector)
    references   | select_references, audio_window                   | Fig. 7, S2(3)
    clips        | prepare, load_clip, list_clips                    | S11: clips of 5 s, one .npz each

Letters: T frames of a clip, N samples or boxes, H W pixels, K points. Pictures are uint8 RGB, points float32 (x, y) pixels.
`python data.py --data DIR` prepares a folder; `python data.py --demo DIR` draws one.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import json
import math
import multiprocessing
import os
import queue
import re
import subprocess
import tempfile
import threading
import time
import wave as wave_file
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from lipsync import FPS, MEL_PER_FRAME, N_MELS, SAMPLE_RATE, SAMPLES_PER_FRAME, BadInput, audio_window, cli, log_mel

CROP_PX = 256
CLIP_SECONDS = 5

# ---- media (S11): whatever ffmpeg can read, at 25 fps and 16 kHz mono ------------------------------------------------------

VIDEO_SUFFIXES = set(".3gp .asf .avi .dv .f4v .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split())
PICTURE_SUFFIXES = set(".bmp .jpeg .jpg .png .tif .tiff .webp".split())
# Containers that hold their own data. Playlists and scripts (hls, dash, concat, image2 ...) would make ffmpeg open other files.
SAFE_FORMATS = ("aac,ac3,aiff,amr,asf,au,avi,caf,dv,eac3,flac,flv,gif,h264,hevc,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,"
                "mpegts,mpegvideo,mxf,nut,ogg,rm,w64,wav,wv,bmp_pipe,jpeg_pipe,png_pipe,tiff_pipe,webp_pipe,ivf,m4v,mjpeg,obu,y4m,yuv4mpegpipe")


def ffmpeg_exe():
    import imageio_ffmpeg
    return imageio_ffmpeg.get_ffmpeg_exe()


@contextlib.contextmanager
def ffmpeg_reader(path, *output_args, start=0.0):
    """Starts ffmpeg on one local file; gives (its stdout, fail), where fail(default) is the BadInput that says what went wrong."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file")
    command = [ffmpeg_exe(), "-v", "error", "-nostdin", "-protocol_whitelist", "file,pipe", "-format_whitelist", SAFE_FORMATS,
               *(["-ss", str(start)] if start else []), "-i", f"file:{path}", *output_args, "pipe:1"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, pipesize=1 << 20) as process:
        def fail(default):
            process.wait()
            log.seek(0)
            text = log.read().decode(errors="replace")
            if "matches no streams" in text or "does not contain any stream" in text:
                return BadInput(f"{path}: {default}")
            if "whitelist" in text:
                return BadInput(f"{path}: unreadable (a playlist, a script or a container we do not open)")
            lines = [line for line in text.splitlines() if line.strip()]
            return BadInput(f"{path}: unreadable ({lines[0].split('] ')[-1].strip()})" if lines else f"{path}: {default}")
        try:
            yield process.stdout, fail
        finally:
            process.kill()


def read_audio(path):
    """The sound of any media file -> float32 [N], 16 kHz mono, -1..1, on the video's clock (padded or cut at the start to time 0).

    Raises BadInput: unreadable, "no sound track"."""
    with ffmpeg_reader(path, "-map", "0:a:0", "-af", "aresample=async=1:first_pts=0", "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "s16le") as (pipe, fail):
        samples = np.frombuffer(pipe.read(), np.int16)
        if samples.size == 0:
            raise fail("no sound track")
    return samples.astype(np.float32) / 32768  # [N]


def read_frames(path, fps=FPS, start=0.0):
    """Frames of a video (or the one frame of a picture) at a constant rate -> iterator of uint8 RGB [H, W, 3].

    Frame i shows time start + i / fps (seconds) on the clock of read_audio. Rotation flags and non-square pixels are undone. One frame in memory.
    Raises BadInput: unreadable, "no picture"."""
    if Path(path).suffix.lower() in PICTURE_SUFFIXES and os.path.isfile(path):
        picture = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            raise BadInput(f"{path}: unreadable picture")
        yield picture[..., ::-1].copy()  # BGR -> RGB
        return
    filters = f"fps={fps}:start_time=0,scale=iw*sar:ih,setsar=1"
    with ffmpeg_reader(path, "-an", "-sn", "-dn", "-vf", filters, "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", start=start) as (pipe, fail):
        count = 0
        while pipe.readline() == b"P6\n":
            width, height = map(int, pipe.readline().split())
            pipe.readline()  # the maximum, 255
            frame = np.empty((height, width, 3), np.uint8)
            if pipe.readinto(frame.data.cast("B")) < frame.nbytes:
                break
            yield frame
            count += 1
        if count == 0:
            raise fail("no picture")


class VideoWriter:
    """Streams frames and a finished sound to an H.264/AAC file; the file appears only when all went well.

    with VideoWriter("out.mp4", audio) as writer: writer.write(rgb)   # uint8 [H, W, 3], all of one size; audio float32 [N] at 16 kHz
    Raises BadInput when the file cannot be written (no folder, no permission, disk full, unknown suffix)."""

    def __init__(self, path, audio=None, fps=FPS, crf=18, preset="veryfast"):
        self.path, self.audio, self.fps, self.quality = Path(path), audio, fps, ["-crf", str(crf), "-preset", preset]
        self.part = self.path.with_name(f".{self.path.stem}.{os.getpid()}{self.path.suffix}")
        self.process = None

    def __enter__(self):
        if not self.path.parent.is_dir():
            raise BadInput(f"{self.path}: no such folder")
        if self.path.is_dir():
            raise BadInput(f"{self.path}: is a folder")
        self.log, self.sound = tempfile.TemporaryFile(), None
        return self

    def start(self, height, width):
        inputs = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self.fps), "-i", "pipe:0"]
        if self.audio is not None:
            self.sound = tempfile.NamedTemporaryFile(suffix=".wav")
            with wave_file.open(self.sound, "wb") as out:
                out.setparams((1, 2, SAMPLE_RATE, 0, "NONE", None))
                out.writeframes(to_int16(self.audio).tobytes())
            self.sound.flush()
            inputs += ["-f", "wav", "-i", f"file:{self.sound.name}", "-c:a", "aac", "-b:a", "128k"]
        video = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-c:v", "libx264", "-pix_fmt", "yuv420p", *self.quality,
                 "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-movflags", "+faststart"]
        command = [ffmpeg_exe(), "-v", "error", "-y", "-protocol_whitelist", "file,pipe", *inputs, *video, f"file:{self.part}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.log)

    def write(self, rgb):
        height, width = rgb.shape[:2]
        rgb = cv2.copyMakeBorder(rgb, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)  # yuv420p wants even sides
        if self.process is None:
            self.start(*rgb.shape[:2])
        try:
            self.process.stdin.write(np.ascontiguousarray(rgb).data)
        except BrokenPipeError:
            raise self.failure() from None

    def failure(self):
        self.process.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").splitlines() or ["ffmpeg stopped"]
        return BadInput(f"{self.path}: cannot be written ({lines[0].split('] ')[-1].strip()})")

    def __exit__(self, kind, error, trace):
        try:
            if self.process is None:
                if kind is None:
                    raise BadInput(f"{self.path}: no frame to write")
                return
            if kind is not None:
                self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            if self.process.wait() != 0 and kind is None:
                raise self.failure()
            if kind is None:
                os.replace(self.part, self.path)
        finally:
            self.part.unlink(missing_ok=True)
            self.log.close()
            if self.sound is not None:
                self.sound.close()


def to_int16(wave):
    return (np.clip(wave, -1, 1) * 32767).round().astype(np.int16)


# ---- faces (S12): landmarks, one person, a steady upright crop ---------------------------------------------------------------

MESH_POINTS = 478
# What speech does not move: outer and inner eye corners, nose bridge down to the tip; and where they lie in MediaPipe's canonical face (cm, y down).
RIGID = [33, 133, 362, 263, 168, 6, 197, 195, 5, 4]
RIGID_TEMPLATE = np.array([-4.446 - 2.664j, -1.856 - 2.585j, 1.856 - 2.585j, 4.446 - 2.664j, -3.271j, -2.473j, -1.728j, -1.059j, -0.366j, 0.463j])
LIPS_OUTER = [61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185]
LIPS_INNER = [78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191]
JAW = [234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 288, 361, 323, 454]  # ear, chin (152), ear
NOSE_TIP = 4
NOSE_ROW = 118  # of 256: the tip's row in the crop, so that the whole mouth lies in the lower half
BOX_MARGIN = 1.1  # crop side / height of the face (hairline to chin): leaves room below the chin for an open jaw
TRACK_PIXELS = 1280 * 720  # MediaPipe finds no more in larger pictures, it only takes longer


class FaceTracker:
    """MediaPipe FaceMesh, made once for many videos (a new object per clip leaks until the machine dies). with FaceTracker() as t: ...

    FaceMesh's own detector misses faces below about a sixth of the picture, so where it finds none, MediaPipe's full-range detector
    says where to look closer: a window around the largest face, kept as long as the face stays well inside. Each 25 frames that
    detector also counts: a lone face is left to a mesh for one, which is a third faster."""

    def __enter__(self):
        with quiet_stderr():
            from mediapipe import solutions
            self.one, self.many = (solutions.face_mesh.FaceMesh(static_image_mode=False, refine_landmarks=True, max_num_faces=n) for n in (1, 4))
            self.detector = solutions.face_detection.FaceDetection(model_selection=1)
            self.talks = True  # MediaPipe's C++ logs until it has seen its first face
            self.forget()
            self.detector.process(np.zeros((128, 128, 3), np.uint8))  # wait for it: a graph logs from its own threads as it starts
        return self

    def __exit__(self, *_):
        for graph in (self.one, self.many, self.detector):
            graph.close()

    def forget(self):
        """Call between videos: a black picture makes the tracker let go of the faces it follows."""
        self.window, self.count = None, 0  # window: (x0, y0, x1, y1) px, None: the whole picture; count: of frames
        for mesh in (self.one, self.many) * 2:
            mesh.process(np.zeros((128, 128, 3), np.uint8))

    def find(self, rgb):
        """uint8 RGB [H, W, 3] -> list of float32 [478, 2] in pixels, one per face (at most 4). Frames of a video come in order."""
        with quiet_stderr() if self.talks else contextlib.nullcontext():
            if self.count % FPS == 0:
                self.mesh = self.one if len(self.detector.process(shrink(rgb)).detections or []) == 1 else self.many
            self.count += 1
            faces = self.look(rgb)
            if not faces:
                self.window = self.search(rgb)
                faces = self.look(rgb) if self.window else []
            elif self.window and not self.well_inside(max(faces, key=face_size), rgb):
                self.window = None
        self.talks = self.talks and not faces
        return faces

    def look(self, rgb):
        x0, y0, x1, y1 = self.window or (0, 0, rgb.shape[1], rgb.shape[0])
        faces = self.mesh.process(shrink(rgb[y0:y1, x0:x1])).multi_face_landmarks or []
        return [np.array([(x0 + p.x * (x1 - x0), y0 + p.y * (y1 - y0)) for p in face.landmark], np.float32) for face in faces]

    def search(self, rgb):
        height, width = rgb.shape[:2]
        found = self.detector.process(shrink(rgb)).detections or []
        box = max((d.location_data.relative_bounding_box for d in found), key=lambda box: box.width * box.height, default=None)
        if box is None:
            return None
        x, y, reach = (box.xmin + box.width / 2) * width, (box.ymin + box.height / 2) * height, 2 * box.height * height
        x0, y0, x1, y1 = max(0, int(x - reach)), max(0, int(y - reach)), min(width, int(x + reach)), min(height, int(y + reach))
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None

    def well_inside(self, points, rgb):
        """Is the face half its size away from the window's sides (those inside the picture)?"""
        x0, y0, x1, y1 = self.window
        room, low, high = face_size(points) / 2, points.min(0), points.max(0)
        return all((low[i] - room > edge or edge == 0) and (high[i] + room < end or end == rgb.shape[1 - i]) for i, edge, end in ((0, x0, x1), (1, y0, y1)))


def shrink(rgb):
    """uint8 [H, W, 3] -> the same, contiguous and of at most TRACK_PIXELS."""
    factor = (TRACK_PIXELS / (rgb.shape[0] * rgb.shape[1])) ** 0.5
    return cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA) if factor < 1 else np.ascontiguousarray(rgb)


STDERR = threading.Lock()             # two threads that swap file descriptor 2 at once would lose it


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
            os.close(saved), os.close(null)


def follow_face(tracks, face=None):
    """tracks: per frame a list of float32 [478, 2] (all faces) -> float32 [T, 478, 2] of one person, NaN rows where absent.

    Faces are linked to the nearest centre of the frame before. Of the people seen more than half as long as the longest-seen
    the largest is taken, or with face=N the N-th from left to right."""
    people = []  # each: (indices, landmarks)
    for i, faces in enumerate(tracks):
        for points in sorted(faces, key=face_size, reverse=True):
            near = [p for p in people if p[0][-1] < i and np.linalg.norm(p[1][-1].mean(0) - points.mean(0)) < 0.6 * face_size(points)]
            best = min(near, key=lambda p: np.linalg.norm(p[1][-1].mean(0) - points.mean(0)), default=None)
            if best is None:
                people.append(best := ([], []))
            best[0].append(i), best[1].append(points)
    landmarks = np.full((len(tracks), MESH_POINTS, 2), np.nan, np.float32)  # [T, 478, 2]
    longest = max((len(p[0]) for p in people), default=0)
    people = [p for p in people if len(p[0]) > longest / 2]
    if face is not None:
        people = sorted(people, key=lambda p: np.mean([points[:, 0].mean() for points in p[1]]))
        if not 0 <= face < len(people):
            raise BadInput(f"face {face}: there are {len(people)} faces (counted from 0, left to right)")
        people = [people[face]]
    if people:
        indices, points = max(people, key=lambda p: np.median([face_size(points) for points in p[1]]))
        landmarks[indices] = points
    return landmarks


def face_size(points):
    return float(np.ptp(points, axis=0).max())


def fill_gaps(series):
    """[T, ...] with NaN rows -> the same with them interpolated linearly over time (held at the ends). All NaN: ValueError."""
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
    """Gaussian over time: [T, K] -> [T, K]; sigma in frames."""
    radius = int(3 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    padded = np.pad(series, ((radius, radius), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel / kernel.sum(), "valid") for column in padded.T], 1)


def upright_motion(landmarks):
    """landmarks [T, 478, 2], NaN rows allowed -> smoothed complex (centre [T] px, turn [T] = scale px/cm * e^(i angle)).

    The least-squares similarity from the canonical face onto the RIGID points: it knows nothing of the mouth."""
    points = fill_gaps(landmarks[:, RIGID].astype(np.float64)) @ [1, 1j]  # [T, 10] complex
    centre, template = points.mean(1), RIGID_TEMPLATE - RIGID_TEMPLATE.mean()
    turn = (points - centre[:, None]) @ template.conj() / np.sum(np.abs(template) ** 2)  # [T]
    centre = smooth(np.stack([centre.real, centre.imag, np.unwrap(np.angle(turn))], 1), 1.5)  # [T, 3]
    scale = np.exp(smooth(np.log(np.abs(turn))[:, None], 5.0)[:, 0])
    return centre[:, 0] + 1j * centre[:, 1], scale * np.exp(1j * centre[:, 2])


def upright(landmarks, centre, turn):
    """Frame px -> upright face units (cm, origin amid the RIGID points): [T, K, 2] -> [T, K, 2]."""
    points = (landmarks @ np.array([1, 1j]) - centre[:, None]) / turn[:, None]
    return np.stack([points.real, points.imag], -1)


def smooth_affines(landmarks, box=None):
    """landmarks float32 [T, 478, 2] frame px, NaN rows allowed -> affines float32 [T, 2, 3]: frame px -> 256 x 256 crop px.

    Turned upright, centred and scaled by the RIGID points alone, smoothed over time, so that the crop carries no trace of the
    mouth. Its side is constant over the clip: BOX_MARGIN * the median face height; box = (x0, y0, x1, y1) in upright units
    (YoloFace) takes the place of the landmarks' box."""
    centre, turn = upright_motion(landmarks)
    found = np.flatnonzero(np.isfinite(landmarks[:, 0, 0]))
    some = found[np.linspace(0, len(found) - 1, min(len(found), 500)).astype(int)]  # enough for a median, and no copy of a long video
    face = np.median(upright(landmarks[some], centre[some], turn[some]), 0)  # [478, 2] the clip's median face, upright
    x0, y0, x1, y1 = box if box is not None else (*face.min(0), *face.max(0))
    unit = CROP_PX / (BOX_MARGIN * max(y1 - y0, 1.1 * (x1 - x0)))  # crop px per upright unit
    left = CROP_PX / 2 - unit * (x0 + x1) / 2
    top = NOSE_ROW - unit * face[NOSE_TIP, 1]
    rotate = unit / turn  # [T] complex: crop = rotate * (frame - centre) + (left, top)
    shift = left + 1j * top - rotate * centre
    return np.stack([rotate.real, -rotate.imag, shift.real, rotate.imag, rotate.real, shift.imag], 1).reshape(-1, 2, 3).astype(np.float32)


def warp(points, affine):
    """points [..., 2] px, affine [2, 3] (or [..., 2, 3]) -> [..., 2] px."""
    return points @ np.swapaxes(affine[..., :2], -1, -2) + affine[..., None, :, 2]


def crop(frame, affine):
    """uint8 [H, W, 3], affine [2, 3] frame px -> crop px -> uint8 [256, 256, 3]; when shrinking, sampled finer and averaged."""
    shrink = 1 / np.hypot(affine[0, 0], affine[1, 0])
    fine = int(np.clip(np.ceil(shrink - 0.1), 1, 4))
    scaled = affine * fine + np.array([[0, 0, (fine - 1) / 2]])  # pixel centres sit at whole numbers
    size = (CROP_PX * fine, CROP_PX * fine)
    picture = cv2.warpAffine(frame, scaled, size, flags=cv2.INTER_LINEAR if fine > 1 else cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return picture if fine == 1 else cv2.resize(picture, (CROP_PX, CROP_PX), interpolation=cv2.INTER_AREA)


def mouth_shape(landmarks):
    """[..., 478, 2] crop px -> float32 [..., 3]: inner-lip gap (px), mouth width (px), outer lip height / width (rounding)."""
    gap, width, height = (np.linalg.norm(landmarks[..., a, :] - landmarks[..., b, :], axis=-1) for a, b in ((13, 14), (61, 291), (0, 17)))
    return np.stack([gap, width, height / np.maximum(width, 1e-6)], -1).astype(np.float32)


def head_pose(landmarks):
    """[..., 478, 2] -> float32 [..., 2]: where the nose tip lies between the eyes' outer corners, in eye distances: sideways
    (0 = frontal, grows as the head turns) and downwards (shrinks as it looks up)."""
    right, left, tip = (landmarks[..., index, :] @ np.array([1, 1j]) for index in (33, 263, NOSE_TIP))
    place = (tip - (left + right) / 2) / (left - right)
    return np.stack([place.real, place.imag], -1).astype(np.float32)


# ---- references and audio windows (Fig. 7, S2(3)): one rule for training and inference ------------------------------------------


def select_references(shapes, poses, count, pose=None, exclude=None, rng=None):
    """Which frames of a clip serve as references: alike in head pose, spread over mouth shapes from closed to widest.

    shapes [T, 3] (mouth_shape), poses [T, 2] (head_pose) -> int64 [count] frame numbers, closed first. pose [2]: whose pose to be
    near (default: the median). exclude [n]: never a frame less than 5 from one of these, unless there is no other. rng (numpy Generator):
    training, the same rule on a random half of the frames with shifted quantiles; None: inference, always the same frames."""
    allowed = np.arange(len(shapes))
    if exclude is not None:
        far = np.abs(allowed[:, None] - exclude).min(1) >= 5
        allowed = allowed[far] if far.any() else allowed
    if rng is not None:
        allowed = rng.permutation(allowed)[: max(4 * count, len(allowed) // 2)]
    distance = np.linalg.norm(poses[allowed] - (np.median(poses, 0) if pose is None else pose), axis=-1)
    pool = allowed[np.argsort(distance, kind="stable")[: max(4 * count, len(allowed) // 2)]]
    pool = pool[np.argsort(shapes[pool, 0], kind="stable")]  # closed .. widest
    quantiles = np.linspace(0, 1, count) if count > 1 else np.array([0.5])
    if rng is not None:
        quantiles = np.sort(np.clip(quantiles + rng.uniform(-0.5, 0.5, count) / count, 0, 1))
    return pool[np.round(quantiles * (len(pool) - 1)).astype(np.int64)].astype(np.int64)  # [count]


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


# ---- clips (S11): DIR/.clips/NAME-XXXX_KKK.npz, each a self-contained training clip ----------------------------------------------

CLIP_FRAMES = CLIP_SECONDS * FPS  # 125
LAYOUT = 1  # of the clip files: a change makes prepare() do everything again
GAP_FRAMES = 5  # so many frames without a face are bridged, whatever they show
SMALLEST_FACE_PX, SILENCE = 80, 1e-3  # px of the original frame; root mean square of full scale (-60 dB)


@dataclass
class Clip:
    path: Path
    source: str  # relative path of the video it was cut from
    jpegs: np.ndarray  # uint8 [bytes], all crops one after the other
    offsets: np.ndarray  # int64 [T + 1] into jpegs
    landmarks: np.ndarray  # float32 [T, 478, 2] crop px
    found: np.ndarray  # bool [T]; False: landmarks were interpolated
    wave: np.ndarray  # int16 [640 T]
    mel: np.ndarray  # float16 [80, 4 T]
    text: str
    shapes: np.ndarray  # float32 [T, 3] mouth_shape
    poses: np.ndarray  # float32 [T, 2] head_pose

    def __len__(self):
        return len(self.offsets) - 1

    def sound(self):
        """-> float32 [640 T], -1..1"""
        return self.wave.astype(np.float32) / 32768

    def frame(self, i, size=CROP_PX):
        """-> uint8 RGB [size, size, 3]; half size is decoded as such, 3 times faster"""
        how = cv2.IMREAD_REDUCED_COLOR_2 if 2 * size <= CROP_PX else cv2.IMREAD_COLOR
        picture = cv2.imdecode(self.jpegs[self.offsets[i] : self.offsets[i + 1]], how)[..., ::-1]
        return picture if len(picture) == size else cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)


@contextlib.contextmanager
def open_clip(path):
    """The arrays of a clip's file; BadInput if it is broken or foreign (every array is checked by zip's own CRC)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path}: broken clip ({error})") from None


def load_clip(path):
    with open_clip(path) as file:
        parts = {name: file[name] for name in ("jpegs", "offsets", "landmarks", "found", "wave", "mel")}
        text, source = str(file["text"]), str(file["source"])
    return Clip(Path(path), source, text=text, shapes=mouth_shape(parts["landmarks"]), poses=head_pose(parts["landmarks"]), **parts)


def load_or_skip(path):
    """-> Clip, or None if its file is broken, which is said."""
    try:
        return load_clip(path)
    except BadInput as error:
        tqdm.write(f"skipped: {error}")
        return None


def list_clips(data_dir):
    return sorted(Path(data_dir, ".clips").glob("*.npz"))


def is_held_out(source):
    """About one source in ten, by a hash of its name: stable when files come and go or the folder moves."""
    return hash_of(Path(source).stem) % 10 == 0


def hash_of(text):
    return int.from_bytes(hashlib.sha256(str(text).encode("utf-8", "surrogateescape")).digest()[:8], "big")


def list_videos(data_dir):
    if not Path(data_dir).is_dir():
        raise BadInput(f"{data_dir}: no such folder")
    found, seen = [], set()
    for folder, inner, names in os.walk(data_dir, followlinks=True):
        real = os.path.realpath(folder)
        inner[:] = [] if real in seen else [name for name in inner if not name.startswith(".")]
        found += [Path(folder, name) for name in names if real not in seen and not name.startswith(".")]
        seen.add(real)                            # a link that leads back up is walked once
    return sorted(p for p in found if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())


def read_text(video):
    """The sentence beside a video -> list of (start s, end s, word); NAME.txt knows no times: one entry (0, inf, text)."""
    align, text = video.with_suffix(".align"), video.with_suffix(".txt")
    if align.is_file():
        rows = [line.split() for line in align.read_text().splitlines() if len(line.split()) == 3]
        return [(int(a) / 25000, int(b) / 25000, word) for a, b, word in rows if word not in ("sil", "sp")]
    if text.is_file():
        return [(0.0, float("inf"), " ".join(text.read_text(encoding="utf-8", errors="replace").split()))]
    return []


def clip_text(words, start, end, seconds):
    """What is said between start and end (s) of a video of that many seconds. Text without times counts only if the clip is (but for
    a second) the whole video: half a sentence under a whole one would teach the lip reader nonsense."""
    whole = end - start > seconds - 1
    return " ".join(w for a, b, w in words if (whole if b == float("inf") else start <= (a + b) / 2 < end))


def is_cut(before, after):
    """before, after: (thumbnail float32 [h, w, 3], list of faces) of two frames in a row -> is there a cut between them?

    Either the picture changes altogether, or its colours do, or all faces jump while it changes."""
    change = np.abs(after[0] - before[0]).mean()  # 0..255
    if change > 30:
        return True
    if change > 12:
        histograms = [np.histogramdd(t.reshape(-1, 3), bins=6, range=[(0, 256)] * 3, density=True)[0] for t in (before[0], after[0])]
        if np.abs(histograms[0] - histograms[1]).sum() / histograms[0].sum() / 2 > 0.4:  # 0 alike .. 1 no colour in common
            return True
    jumps = [min(jump(a, b) for b in before[1]) for a in after[1] if before[1]]
    return change > 6 and len(jumps) > 0 and min(jumps) > 0.3


def jump(a, b):
    """Two faces [478, 2] -> how far apart, in face sizes, position and size together."""
    return np.linalg.norm(a.mean(0) - b.mean(0)) / face_size(a) + abs(np.log(face_size(a) / face_size(b)))


def segments(frames, tracker):
    """Frames of one video -> yields (tracks, pieces) of up to 125 frames, none across a cut: the faces of each frame (see follow_face)
    and the piece of it around them (see cut_out), so that no whole pictures are held.

    A few frames without a face (a hand, a flash) are no cut; a scene without one is, back to its beginning."""
    held, before, gap, box = [], None, 0, None  # before: the last frame with a face; gap: frames since
    for frame in frames:
        faces = tracker.find(frame)
        now = cv2.resize(frame[::4, ::4], (48, 48), interpolation=cv2.INTER_AREA).astype(np.float32), faces
        gap = 0 if faces else gap + 1
        if before is not None and (faces or gap > GAP_FRAMES) and is_cut(before, now):
            start = max(0, len(held) - max(gap - 1, 0))
            if start:
                yield zip(*held[:start])
            held, before = held[start:], now
            tracker.forget()  # or its landmarks crawl from the old face to the new one
            faces = tracker.find(frame)
        elif len(held) == CLIP_FRAMES:
            yield zip(*held)
            held = []
        piece, box = cut_out(frame, faces, box)
        held.append((faces, piece))
        before = now if faces or before is None else before
    if held:
        yield zip(*held)


def cut_out(frame, faces, box):
    """-> (piece, box): the part of the frame within a face's size of any face (without faces: within the last box), of at most
    TRACK_PIXELS, and the affine [2, 3] that leads from its pixels to the frame's."""
    if faces:
        low = np.min([points.mean(0) - face_size(points) for points in faces], 0)
        high = np.max([points.mean(0) + face_size(points) for points in faces], 0)
        box = [int(v) for v in np.clip([*low, *high], 0, np.tile(frame.shape[1::-1], 2))]
    x0, y0, x1, y1 = box if box and box[2] > box[0] and box[3] > box[1] else (0, 0, frame.shape[1], frame.shape[0])
    piece = shrink(frame[y0:y1, x0:x1])
    fx, fy = (x1 - x0) / piece.shape[1], (y1 - y0) / piece.shape[0]
    return (piece.copy(), np.array([[fx, 0, x0 + (fx - 1) / 2], [0, fy, y0 + (fy - 1) / 2]])), box


def chain(second, first):
    """The affine [2, 3] that does first, then second."""
    return np.hstack([second[:, :2] @ first[:, :2], second[:, :2] @ first[:, 2:] + second[:, 2:]])


def refusal(landmarks, wave):
    """landmarks [T, 478, 2] frame px, NaN where absent; wave float32 [640 T] -> why not to keep the clip, or None."""
    found = np.isfinite(landmarks[:, 0, 0])
    if len(found) < FPS:
        return "shorter than 1 s"
    if np.sqrt(np.mean(wave**2)) < SILENCE:
        return "silent sound"
    if found.any() and np.median([face_size(points) for points in landmarks[found]]) < SMALLEST_FACE_PX:
        return "face smaller than 80 px"
    if found.mean() < 0.9:
        return "face missing in > 10 % of frames"
    return None


def upright_box(detector, pieces, landmarks):
    """S12 with yolov8-face: its box on the upright face, once a second -> median (x0, y0, x1, y1) in upright units; None: no face found.

    pieces: [T] of cut_out; landmarks [T, 478, 2] frame px, NaN rows allowed."""
    centre, turn = upright_motion(landmarks)
    boxes, side, unit = [], 640, 18.0  # unit: px per upright unit (cm), a face is then about 320 px high
    for i in range(0, len(pieces), FPS):
        rotate = unit / turn[i]
        shift = (1 + 1j) * side / 2 - rotate * centre[i]
        affine = np.array([[rotate.real, -rotate.imag, shift.real], [rotate.imag, rotate.real, shift.imag]])
        found, _, _ = detector.find(cv2.warpAffine(pieces[i][0], chain(affine, pieces[i][1]), (side, side)))
        boxes += [(box - side / 2) / unit for box in found if (box[:2] < side / 2).all() and (box[2:] > side / 2).all()][:1]
    return np.median(boxes, 0) if boxes else None


def save_clip(path, landmarks, affines, pieces, wave, text, source):
    """landmarks [T, 478, 2] frame px with NaN rows; pieces [T] of cut_out. Written whole or not at all."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    crops = (crop(piece, chain(affine, lead)) for (piece, lead), affine in zip(pieces, affines))
    jpegs = [cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)[1] for rgb in crops]
    samples = to_int16(wave)
    part = path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as file:
        np.savez(file, jpegs=np.concatenate(jpegs), offsets=np.cumsum([0] + [len(j) for j in jpegs]),
                 landmarks=warp(fill_gaps(landmarks), affines).astype(np.float32), found=np.isfinite(landmarks[:, 0, 0]), wave=samples,
                 mel=log_mel(samples.astype(np.float32) / 32768).numpy().astype(np.float16), text=text, source=source)
    os.replace(part, path)


def prepare_video(video, data_dir, tracker, detector=None, listen=None):
    """One video -> its clips in DIR/.clips; -> (clip names, {why refused: count}). Memory does not grow with its length (but for its sound).

    detector: YoloFace or None. listen(wave float32 [N]) -> str writes down what a clip without text says, or None."""
    source, stem, refused, names = video.relative_to(data_dir).as_posix(), clip_stem(video, data_dir), Counter(), []
    try:
        wave, words, start = read_audio(video), read_text(video), 0
        tracker.forget()
        with contextlib.closing(read_frames(video)) as frames:
            for tracks, pieces in segments(frames, tracker):
                end = start + len(tracks)
                landmarks = follow_face(tracks)  # [T, 478, 2]
                sound = wave[start * SAMPLES_PER_FRAME : end * SAMPLES_PER_FRAME]
                sound = np.pad(sound, (0, len(tracks) * SAMPLES_PER_FRAME - len(sound)))  # [640 T]
                if reason := refusal(landmarks, sound):
                    refused[reason] += 1
                else:
                    text = clip_text(words, start / FPS, end / FPS, len(wave) / SAMPLE_RATE) or (listen(sound) if listen else "")
                    affines = smooth_affines(landmarks, upright_box(detector, pieces, landmarks) if detector else None)
                    names.append(f"{stem}_{len(names):03d}.npz")
                    save_clip(data_dir / ".clips" / names[-1], landmarks, affines, pieces, sound, text, source)
                start = end
    except BadInput as error:
        refused["no sound track" if str(error).endswith("no sound track") else "unreadable file"] += 1
    return names, dict(refused)


def clip_stem(video, data_dir):
    source = video.relative_to(data_dir).as_posix()
    return f"{video.stem[:60]}-{hash_of(source) % 16**8:08x}"


def manifest(video, data_dir):
    return data_dir / ".clips" / (clip_stem(video, data_dir) + ".json")


def signature(video, options):
    """What a video's clips depend on; another signature, and they are made again. A copied folder keeps its signatures."""
    size, ends = video.stat().st_size, 0
    with contextlib.suppress(OSError), open(video, "rb") as file:  # what cannot be read is refused later, with its reason
        ends = zlib.crc32(file.read(1 << 16))
        file.seek(max(0, size - (1 << 16)))
        ends = zlib.crc32(file.read(), ends)
    return [LAYOUT, size, ends, f"{hash_of(read_text(video)):x}", *options]


def up_to_date(old, new):
    """Same file, same text; and an option that is not asked for now may have been used then."""
    return bool(old) and old[:-2] == new[:-2] and all(wanted in (None, used) for used, wanted in zip(old[-2:], new[-2:]))


def read_manifest(video, data_dir):
    try:
        return json.loads(manifest(video, data_dir).read_text())
    except (OSError, ValueError):
        return {}


def peak_mib():
    """The most memory this process ever held, MiB, as Linux knows it; 0 elsewhere."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) >> 10 if status.is_file() else 0


def prepare_share(videos, data_dir, options, counter, results):
    """A worker: takes the next video until none is left. options = (path of yolov8-face.onnx or None, whisper model's name or None)."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    detector = YoloFace(options[0]) if options[0] else None
    listen = transcriber(options[1]) if options[1] else None
    parent = multiprocessing.parent_process()
    with FaceTracker() as tracker:
        while parent is None or parent.is_alive():
            with counter.get_lock():
                i, counter.value = counter.value, counter.value + 1
            if i >= len(videos):
                return
            stem, mark = clip_stem(videos[i], data_dir), signature(videos[i], options)
            for old in (data_dir / ".clips").iterdir():
                if old.name.startswith(stem + "_") or old.name.startswith(stem + "."):
                    old.unlink(missing_ok=True)
            names, refused = prepare_video(videos[i], data_dir, tracker, detector, listen)
            part = manifest(videos[i], data_dir).with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps({"source": str(videos[i].relative_to(data_dir)), "signature": mark, "clips": names, "refused": refused}))
            os.replace(part, manifest(videos[i], data_dir))
            results.put((len(names), peak_mib()))


def transcriber(model_name):
    """-> listen(wave float32 [N]) -> str, by openai-whisper's model of that name or file."""
    import whisper
    if model_name not in whisper.available_models() and not os.path.isfile(model_name):
        raise BadInput(f"--transcribe {model_name}: neither a file nor one of {', '.join(whisper.available_models())}")
    model = whisper.load_model(model_name, device="cpu")
    return lambda wave: model.transcribe(wave, fp16=False)["text"].strip()


def prepare(data_dir, workers=None, shard=None, detector=None, transcribe=None):
    """Brings DIR/.clips up to date -> report {"videos", "new", "kept", "refused": {why: count}, "orphans": clips whose video is gone,
    and of this run "clips_per_s", "peak_mib" of the largest worker}. Done videos are skipped, changed ones made again, so a killed run goes on where it was. shard=(i, n): only
    every n-th video, by a hash of its path."""
    data_dir = Path(data_dir)
    videos = list_videos(data_dir)
    if not videos:
        raise BadInput(f"{data_dir}: no video in it")
    stems = {clip_stem(v, data_dir) for v in videos}
    if shard is not None:
        videos = [v for v in videos if hash_of(v.relative_to(data_dir).as_posix()) % shard[1] == shard[0] % shard[1]]
    if detector:
        YoloFace(detector)  # a bad model is refused here, before any worker starts
    if transcribe:
        transcriber(transcribe)
    (data_dir / ".clips").mkdir(exist_ok=True)
    options = (detector and str(detector), transcribe)
    todo = [v for v in videos if not up_to_date(read_manifest(v, data_dir).get("signature"), signature(v, options))]
    context = multiprocessing.get_context("spawn")
    counter, results = context.Value("q", 0), context.Queue()
    share = partial(prepare_share, todo, data_dir, options, counter, results)
    crew = [context.Process(target=share, daemon=True) for _ in range(min(workers or os.cpu_count(), len(todo)))]
    for process in crew:
        process.start()
    try:
        with tqdm(total=len(todo), unit="video", disable=not todo) as bar:
            speed, peak = wait_for(crew, results, bar)
    finally:
        for process in crew:
            process.terminate()
            process.join()
    done = [read_manifest(v, data_dir) for v in videos]
    refused = sum((Counter(d.get("refused", {})) for d in done), Counter())
    orphans = sum(path.name.rsplit("_", 1)[0] not in stems for path in list_clips(data_dir))
    return {"videos": len(videos), "new": len(todo), "kept": sum(len(d.get("clips", [])) for d in done), "refused": dict(refused),
            "orphans": orphans, "clips_per_s": speed, "peak_mib": peak}


def wait_for(crew, results, bar):
    """Waits for the workers. -> (clips/s, MiB of the largest worker)"""
    clips, peak, began = 0, 0, time.monotonic()
    while bar.n < bar.total:
        try:
            count, mib = results.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in crew):
                raise RuntimeError("a worker died (out of memory?); what is done is kept, run the command again") from None
            continue
        clips, peak = clips + count, max(peak, mib)
        bar.set_postfix_str(f"{clips} clips, {clips / (time.monotonic() - began):.1f} clips/s", refresh=False)
        bar.update()
    return clips / max(time.monotonic() - began, 1e-9), peak


def print_report(report):
    print(f"{report['videos']} videos ({report['new']} of them new or changed)")
    print(f"{report['kept']:6d} clips kept" + (f"; {report['clips_per_s']:.2f} clips/s, {report['peak_mib']} MiB a worker" if report["new"] else ""))
    for reason, count in sorted(report["refused"].items(), key=lambda item: -item[1]):
        print(f"{count:6d} refused: {reason}")
    if report["orphans"]:
        print(f"{report['orphans']:6d} clips of videos that are gone or renamed: still trained on, until you delete them from .clips")


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


# ---- dataset (S2, S3): training samples --------------------------------------------------------------------------------
def feature_path(clip_path, key, noisy=False):
    """Where a clip's features by a frozen audio encoder are kept, beside the clip: NAME.npz -> NAME.KEY.npy"""
    return Path(clip_path).with_suffix(f".{re.sub('[^A-Za-z0-9]+', '-', key)}{'-noisy' if noisy else ''}.npy")


def clip_label(path):
    """A clip's (relative path of its video, text), read without its pictures."""
    with open_clip(path) as file:
        return str(file["source"]), str(file["text"])


def split_clips(paths, held_out_names=""):
    """(training clips, held-out clips): by a hash of the source video, or because its name matches a pattern.

    held_out_names: comma-separated parts of the source's path, * and ? allowed. Both halves keep the order of `paths`. Where the hash leaves
    one half empty (a single video, say), the last tenth of the clips is held out. Broken clips are named and left out.
    """
    patterns = [p.strip() for p in held_out_names.split(",") if p.strip()]
    halves, good = ([], []), []
    for path in paths:
        try:
            source = clip_label(path)[0]
        except BadInput as error:
            tqdm.write(f"skipped from now on: {error}")
            continue
        chosen = any(fnmatch.fnmatch(source, f"*{p}*") for p in patterns)
        halves[chosen or is_held_out(source)].append(path)
        good.append(path)
    if not patterns and not all(halves) and len(good) > 1:
        cut = -max(1, len(good) // 10)
        halves = good[:cut], good[cut:]
    return halves


class ClipDataset(torch.utils.data.Dataset):
    """Training samples: S consecutive frames of a clip, its references, and the sound that belongs to each frame.

    Patent: S2(2) the groups of S frames, S2(3) the audio window, Fig. 7 the references, S3 gamma and brightness.
    Shapes: sample = dict of
        refs [R, 3, H, W] uint8, target [S, 3, H, W] uint8 (masked = its upper half, made on the device),
        audio [S, F, D] float32 selected features (frozen encoder), or mel [80, 4 x 125] and window [S, F] int64 (scratch),
        sync [S, D] or [80, 4S] the sound of just these frames for the sync expert, in_sync bool,
        mouth [S, 4] int64 box (x0, y0, x1, y1) of the lips with a margin, amplitude [S] float32,
        flip bool, gamma, brightness float32 scalars, clip int64, start int64.
        features: key of the frozen encoder's files (feature_path); None: scratch, from the mel. offsets {source: frames}:
        by how much a video's own sound is late (train.find_offsets).
    Choice: sample i depends on (seed, i) only, so a resumed run sees what it would have seen. Folders are drawn in
        proportion to the square root of their clips, so one large folder does not drown the others.
        Amplitude: in a share of the samples frame t's sound is paired, within the clip, with the picture whose
        mouth is a times as open as at t, and a is the coefficient: so the coefficient really means opening.
        In the first `spread` samples the S frames lie anywhere in the clip, not in a row: neighbours look alike, so
        these teach more, and the sync loss, which needs a row, comes later.
    """

    def __init__(self, paths, config, group=5, seed=0, amplitude_share=0.3, random_refs=False, augment=True,
                 features=None, sync_audio=None, offsets=None, spread=0):
        self.offsets, self.spread = offsets or {}, spread
        self.paths, self.config, self.group, self.seed = list(paths), config, group, seed
        self.amplitude_share, self.random_refs, self.augment = amplitude_share, random_refs, augment
        self.features, self.sync_audio = features, sync_audio or ("features" if features else "mel")
        if not self.paths:
            raise BadInput("no clips to train on: is DIR right, and were clips kept?")
        folders = [str(Path(clip_label(p)[0]).parent) for p in self.paths]
        counts = Counter(folders)
        weights = np.array([counts[f] ** -0.5 for f in folders])
        self.chances = np.cumsum(weights / weights.sum())
        self.broken = set()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, int(index)])
        for _ in range(20):                       # a broken file is named once, and another clip takes its place
            path = self.paths[min(np.searchsorted(self.chances, rng.random()), len(self.paths) - 1)]
            if path in self.broken:
                continue
            try:
                clip = load_clip(path)
                features = np.load(feature_path(path, self.features)) if self.features else None
            except (BadInput, OSError, ValueError) as error:
                self.broken.add(path)
                tqdm.write(f"skipped from now on: {error}" if str(path) in str(error) else f"skipped from now on: {path}: {error}")
                continue
            features = move_sound(clip, features, self.offsets.get(clip.source, 0))
            if len(clip) >= self.group + 12:
                return self.sample(clip, features, self.paths.index(path), rng, index < self.spread)
        raise BadInput(f"{self.paths[0].parent}: hardly a clip there can be read; prepare the folder again")

    def sample(self, clip, features, number, rng, spread):
        S, size = self.group, self.config.image_size
        start = int(rng.integers(0, len(clip) - S + 1))
        heard = np.arange(start, start + S)       # whose sound
        if spread:
            heard = np.sort(rng.choice(len(clip), S, replace=False))
        shown, amplitude = heard, np.ones(S, np.float32)
        if rng.random() < self.amplitude_share:
            shown, amplitude = pair_amplitude(clip, heard, rng)
        if self.random_refs:
            refs = rng.choice(len(clip), self.config.refs)
        else:
            refs = select_references(clip.shapes, clip.poses, self.config.refs, pose=clip.poses[shown[S // 2]],
                                     exclude=shown, rng=rng)
        flip = self.augment and rng.random() < 0.5
        pictures = np.stack([clip.frame(i, size) for i in [*refs, *shown]])      # [R+S, H, W, 3]
        lips = clip.landmarks[shown][:, LIPS_OUTER].copy()           # [S, n, 2]
        if flip:
            pictures, lips[..., 0] = pictures[:, :, ::-1], CROP_PX - lips[..., 0]
        centre, width = lips.mean(1), np.ptp(lips[..., 0], axis=1)[:, None]
        mouth = np.concatenate([centre - width * (0.75, 0.6), centre + width * (0.75, 0.8)], 1) * size / CROP_PX
        pictures = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))   # [R+S, 3, H, W]
        window = audio_window(heard, self.config.spacing, self.config.window).clamp(0, len(clip) - 1)  # [S, F]
        sample = dict(
            refs=pictures[:self.config.refs], target=pictures[self.config.refs:],
            mouth=torch.from_numpy(mouth.clip(0, size).round().astype(np.int64)),
            amplitude=torch.from_numpy(amplitude), in_sync=torch.tensor(bool((shown == heard).all() and not spread)),
            flip=torch.tensor(bool(flip)), gamma=torch.tensor(np.exp(rng.normal(0, 0.2)) if self.augment else 1.0, dtype=torch.float32),
            brightness=torch.tensor(rng.uniform(0.8, 1.2) if self.augment else 1.0, dtype=torch.float32),
            clip=torch.tensor(number), start=torch.tensor(start))
        if self.features:
            sample["audio"] = torch.from_numpy(features[window.numpy()].astype(np.float32))     # [S, F, D]
        else:
            mel = np.zeros((N_MELS, MEL_PER_FRAME * CLIP_FRAMES), np.float32)
            mel[:, :clip.mel.shape[1]] = clip.mel[:, :mel.shape[1]]
            sample.update(mel=torch.from_numpy(mel), window=window)
        sample["sync"] = torch.from_numpy(
            features[start:start + S].astype(np.float32) if self.sync_audio == "features"
            else clip.mel[:, start * MEL_PER_FRAME:(start + S) * MEL_PER_FRAME].astype(np.float32))
        return sample


def heard_at(series, late):
    """[T, D] -> [T, D]: what comes `late` steps later; the ends repeat."""
    return series[(np.arange(len(series)) + late).clip(0, len(series) - 1)]


def move_sound(clip, features, late):
    """The clip's mel and its features [T, D] (or None), taken `late` frames later. -> features"""
    if not late:
        return features
    clip.mel = heard_at(clip.mel.T, late * MEL_PER_FRAME).T
    return features if features is None else heard_at(features, late)


def pair_amplitude(clip, heard, rng):
    """For the sound of frames `heard` [S]: pictures whose mouth is a times as open, a random. -> shown [S], a [S]"""
    opening, width, poses = clip.shapes[:, 0], clip.shapes[:, 1], clip.poses
    spread = lambda x: x / (x.std(0) + 1e-6)
    wanted = opening[heard] * rng.uniform(0.4, 1.7)                  # [S]
    cost = (2 * np.abs(opening[None] - wanted[:, None]) / (opening.std() + 1e-6)           # [S, T]
            + 0.5 * np.abs(spread(width)[None] - spread(width)[heard][:, None])
            + 0.5 * np.linalg.norm(spread(poses)[None] - spread(poses)[heard][:, None], axis=-1))
    shown = cost.argmin(1)
    coefficient = np.where(opening[heard] > 2, opening[shown] / np.maximum(opening[heard], 2), 1)
    return shown, coefficient.clip(0.3, 2).astype(np.float32)


def lower_halves(clip, frames):
    """Half-size lower halves, what the experts see: uint8 RGB [n, 3, 64, 128]"""
    pictures = np.stack([clip.frame(i, CROP_PX // 2)[CROP_PX // 4:] for i in frames])
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))


class SyncDataset(ClipDataset):
    """S frames, their sound, and sounds of the same clip that do not overlap it, for the sync expert.

    Patent: S3(1), syncXnet trained as SyncNet.
    Shapes: pictures [S, 3, 64, 128] uint8; sound [S, D] or [80, 4S], wrong [4, S, D] or [4, 80, 4S] float32; clip int64.
    Choice: wrong sounds of the same clip are the hard negatives; other clips' are taken from the batch. Half of the
        samples take the noisy copies.
    """
    WRONG = 4

    def sample(self, clip, features, number, rng, spread):
        S = self.group
        start = int(rng.integers(0, len(clip) - S + 1))
        wrong = rng.choice([i for i in range(len(clip) - S + 1) if abs(i - start) >= S], self.WRONG)
        flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
        sound = self.sound(clip, features, rng)
        return dict(pictures=torch.from_numpy(lower_halves(clip, range(start, start + S))[..., flip].copy()),
                    sound=sound(start), wrong=torch.stack([sound(i) for i in wrong]), clip=torch.tensor(number))

    def sound(self, clip, features, rng):
        S, noisy = self.group, rng.random() < 0.5
        if self.sync_audio == "features":
            features = np.load(feature_path(clip.path, self.features, True)) if noisy else features
            return lambda i: torch.from_numpy(features[i:i + S].astype(np.float32))
        mel = clip.mel if not noisy else log_mel(corrupt_sound(clip.sound(), rng)).numpy()
        return lambda i: torch.from_numpy(mel[:, i * MEL_PER_FRAME:(i + S) * MEL_PER_FRAME].astype(np.float32))


class SentenceDataset(torch.utils.data.Dataset):
    """Whole clips and their text, for the lip reader.

    Patent: S3(2).
    Shapes: video [T, 3, 64, 128] uint8, text str, number int; `collate` pads a batch to video [B, T, ...], length [B],
        tokens [B, U], clip [B].
    Choice: at random mirrored, and slower or faster by up to a quarter.
    """

    def __init__(self, paths, seed=0):
        self.paths, self.seed = list(paths), seed

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, int(index)])
        for _ in range(20):                       # a broken file is named, and another takes its place
            number = int(rng.integers(len(self.paths)))
            if clip := load_or_skip(self.paths[number]):
                break
        else:
            raise BadInput(f"{self.paths[0].parent}: hardly a clip there can be read; prepare the folder again")
        frames = np.arange(0, len(clip) - 0.5, rng.uniform(0.8, 1.25)).round().astype(int)
        video = lower_halves(clip, frames)
        video = video[..., ::-1].copy() if rng.random() < 0.5 else video
        return torch.from_numpy(video), clip.text, number

    @staticmethod
    def collate(samples):
        videos, texts, numbers = zip(*samples)
        tokens = [torch.tensor(encode_text(text)) for text in texts]
        pad = torch.nn.utils.rnn.pad_sequence
        return dict(video=pad(videos, batch_first=True), length=torch.tensor([len(v) for v in videos]),
                    tokens=pad(tokens, batch_first=True, padding_value=PAD), clip=torch.tensor(numbers))


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
