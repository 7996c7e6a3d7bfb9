"""S1: from a folder of talking-head videos to training clips, and from clips to training samples.

    stage        | code                                              | patent
    clips        | prepare, load_clip, list_clips                    | S11: clips of 5 s, one .npz each
    cutting      | segments, refusal, save_clip                      | S11, S12
    text, noise  | encode_text, corrupt_sound                        | S3(2), S3(1)
    samples      | ClipDataset, MouthSamples                         | S2(2), S2(3), Fig. 7: references
    for experts  | SyncDataset, SentenceDataset                      | S3(1), S3(2)

Sound and frames come from media.py, faces and their crops from faces.py.
Letters as in lipsync.py. Pictures are uint8 RGB, points float32
(x, y) pixels.
`python data.py --data DIR` prepares a folder; `python data.py --demo DIR` draws one.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import json
import math
import multiprocessing
import os
import re
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import faces
import media
from faces import select_references  # to be had as data.select_references, too
from lipsync import (FPS, MEL_PER_FRAME, N_MELS, SAMPLE_RATE, SAMPLES_PER_FRAME, BadInput, audio_window,
                     cli, level_sound, log_mel)

CLIP_SECONDS = 5

# ---- clips (S11): DIR/.clips/NAME-XXXX_KKK.npz, each a self-contained training clip ----------------

CLIP_FRAMES = CLIP_SECONDS * FPS  # 125
LAYOUT = 2  # of the clip files: clips of another layout are made again
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

    def frame(self, i, size=faces.CROP_PX):
        """-> uint8 RGB [size, size, 3]; half size is decoded as such, 3 times faster"""
        how = cv2.IMREAD_REDUCED_COLOR_2 if 2 * size <= faces.CROP_PX else cv2.IMREAD_COLOR
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
    """Frames of one video -> yields lists of (found, piece), at most 125 frames, none across a cut.

    found: the frame's faces; piece: see cut_out, so that no whole pictures are held. The few
    faceless frames before a cut belong to the new scene."""
    held, box = [], None
    for frame, found, cut in faces.track_shots(frames, [tracker]):
        if cut:
            last = max((t for t, (seen, _) in enumerate(held) if seen), default=-1)
            first = max(last + 1, len(held) - faces.GAP_FRAMES)
            if first:
                yield held[:first]
            held, box = held[first:], None
        elif len(held) == CLIP_FRAMES:
            yield held
            held = []
        piece, box = cut_out(frame, found, box)
        held.append((found, piece))
    if held:
        yield held


def cut_out(frame, found, box):
    """-> (piece, box): the part of the frame within a face's size of any face found.

    Without faces: within the last box, without a box the whole frame. piece: its pixels, at most
    TRACK_PIXELS, and the affine [2, 3] that leads from them to the frame's."""
    H, W = frame.shape[:2]
    if found:
        low = np.min([points[:, :2].mean(0) - faces.face_size(points) for points in found], 0)
        high = np.max([points[:, :2].mean(0) + faces.face_size(points) for points in found], 0)
        box = np.clip([*low, *high], 0, [W, H, W, H]).astype(int)
    x0, y0, x1, y1 = (0, 0, W, H) if box is None else box
    if x1 <= x0 or y1 <= y0:
        x0, y0, x1, y1 = 0, 0, W, H
    pixels = faces.shrink(frame[y0:y1, x0:x1]).copy()
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
    if np.median([faces.face_size(points) for points in landmarks[found]]) < SMALLEST_FACE_PX:
        return "face smaller than 80 px"
    return None


def upright_box(detector, pieces, landmarks):
    """S12 with yolov8-face: its box on the upright face, once a second.

    pieces: [T] of cut_out; landmarks [T, K, 3] frame px, NaN rows allowed -> median box
    (x0, y0, x1, y1) in upright units; None: no face found."""
    centre, turn = faces.upright_motion(landmarks)
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
        rgb = faces.crop(pixels, chain(affine, lead))
        jpegs.append(cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)[1].ravel())
    samples = media.to_int16(wave)
    mel = log_mel(samples.astype(np.float32) / 32768).numpy().astype(np.float16)
    with open(path.with_suffix(f".{os.getpid()}.part"), "wb") as file:
        np.savez(file, jpegs=np.concatenate(jpegs), offsets=np.cumsum([0, *map(len, jpegs)]),
                 landmarks=faces.to_crop(faces.fill_gaps(landmarks), affines),
                 wave=samples, mel=mel,
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
        detector = faces.YoloFace(face_detector) if face_detector else None
        sound, words = level_sound(media.read_audio(video)), read_text(video)
        with faces.FaceTracker() as tracker, contextlib.closing(media.read_frames(video)) as frames:
            for held in segments(frames, tracker):
                tracks, pieces = zip(*held)
                landmarks = faces.follow_face(tracks)  # [T, K, 3]
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
                              faces.smooth_affines(landmarks, box), pieces, wave, text, source)
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
        faces.YoloFace(face_detector)  # a bad model is refused here, before any worker starts
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
            points=torch.from_numpy(faces.place_points(points[:R], points[R:])),
            lips=torch.from_numpy(points[R:, faces.MOUTH, :2] / faces.CROP_PX),
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
    if size != faces.CROP_PX:
        pictures = [cv2.resize(np.ascontiguousarray(picture), (size, size),
                               interpolation=cv2.INTER_AREA) for picture in pictures]
    return torch.from_numpy(np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)))


def mouth_boxes(points, size=faces.CROP_PX):
    """points [S, K, 3] crop px -> int64 [S, 4] (x0, y0, x1, y1): the lips with a margin, px of a
    picture of that size"""
    lips = points[:, faces.LIPS_OUTER, :2]
    centre, width = lips.mean(1), np.ptp(lips[..., 0], axis=1)[:, None]
    box = np.concatenate([centre - width * (0.75, 0.6), centre + width * (0.75, 0.8)], 1)
    return (box * size / faces.CROP_PX).clip(0, size).round().astype(np.int64)


def mirror(points):
    """points [..., K, 3] of a crop -> those of the mirrored crop"""
    points = points[..., faces.MIRROR, :].copy()
    points[..., 0] = faces.CROP_PX - 1 - points[..., 0]
    return points


def bend(pictures, points, rng):
    """One smooth random warp and one colour matrix for all pictures: a person like no other.

    pictures uint8 [n, 256, 256, 3], points [n, K, 3] crop px -> the same. Scale and shear +-6 %
    about the middle, 5 px of low-frequency bend, colour matrix +-0.12."""
    grid = np.stack(np.meshgrid(np.arange(faces.CROP_PX), np.arange(faces.CROP_PX)),
                    -1).astype(np.float32)
    matrix = np.float32(rng.uniform(-0.06, 0.06, (2, 2)))
    low = np.float32(rng.normal(0, 2.5, (4, 4, 2)))
    shift = cv2.resize(low, (faces.CROP_PX, faces.CROP_PX), interpolation=cv2.INTER_CUBIC)
    # [256, 256, 2]: a pixel is fetched from grid + shift
    shift += (grid - faces.CROP_PX / 2) @ matrix
    colour = np.eye(3) + rng.uniform(-0.12, 0.12, (3, 3))
    colour /= colour.sum(1, keepdims=True)  # grey stays grey: brightness is another's matter
    bent = [cv2.transform(cv2.remap(picture, grid + shift, None, cv2.INTER_LINEAR,
                                    borderMode=cv2.BORDER_REPLICATE), colour)
            for picture in pictures]
    points = points.copy()
    place = points[..., :2].copy()
    for _ in range(3):  # where a point goes is the inverse of where a pixel is fetched from
        x, y = place.clip(0, faces.CROP_PX - 1).round().astype(int).transpose(2, 0, 1)
        place = points[..., :2] - shift[y, x]
    points[..., :2] = place
    return np.stack(bent), points


def pair_amplitude(clip, heard, rng):
    """For the sound of frames `heard` [S]: pictures whose mouth is a times as open, a random.

    -> shown [S], a float32 [S]"""
    shapes, poses = faces.mouth_shape(clip.landmarks), faces.head_pose(clip.landmarks)
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
    Shapes: batch(step) -> dict of B = clips x frames rows: audio [B, F, D] (frozen encoder), or
        mel [clips, 80, 4 x 125] and window [clips, frames, F]; points [B, R, 2, K, 2],
        lips [B, P, 2] picture widths, amplitude [B], width [B] of the mouth, picture widths.
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
        points = faces.place_points(landmarks[refs], landmarks[at])  # [frames, R, 2, K, 2]
        closed = points[:, 0, 1][:, faces.MOUTH]  # [frames, P, 2]
        amplitude = np.ones(frames, np.float32)
        if rng.random() < self.amplitude_share:
            amplitude[:] = rng.uniform(0.4, 1.8)
        true = landmarks[at][:, faces.MOUTH, :2] / faces.CROP_PX
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
    pictures = np.stack([clip.frame(i, faces.CROP_PX // 2)[faces.CROP_PX // 4:] for i in frames])
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
