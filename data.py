"""S1: from a folder of talking-head videos to training clips.

    stage     | code                          | patent
    clips     | load_clip, list_clips         | S11: clips of 5 s, one .npz each
    videos    | list_videos, read_text        | -
    cutting   | cut_video, refusal, save_clip | S11, S12
    preparing | prepare, prepare_video        | S1

Sound and frames come from media.py, faces and their crops from faces.py. Letters as in common.py.
Pictures are uint8 RGB, points float32 (x, y, depth) pixels.
`python data.py --data DIR` prepares a folder; `python data.py --demo DIR` draws one.
"""
import argparse
import contextlib
import fnmatch
import json
import math
import os
import re
import time
import zlib
from collections import Counter
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import faces
import media
from audio import level_sound, log_mel
from common import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, BadInput, WorkerPool, cli, first_line


# ---------------------------------------------------------------- clips (S11)
CLIP_FRAMES = 5 * FPS  # 5 s: 125
LAYOUT = 2  # of the clip files: clips of another layout are made again
SMALLEST_FACE_PX = 80  # of the frame
SILENCE = 1e-3  # root mean square, of full scale: -60 dB


@dataclass(frozen=True)
class ClipInfo:
    """What the manifests say of a clip, so that none must be opened to know it."""
    path: Path
    source: str  # relative path of the video it was cut from
    text: str
    frames: int

    def folder(self):
        return str(Path(self.source).parent)

    def readable(self):
        """Has it a text, of at most a byte a frame? Nobody says more, nor has CTC room for it."""
        return 0 < len(self.text.encode()) <= self.frames


@dataclass(frozen=True)
class Clip:
    path: Path
    source: str
    text: str
    jpegs: np.ndarray  # uint8 [bytes], all crops one after the other
    offsets: np.ndarray  # int64 [T + 1] where each picture begins in jpegs
    landmarks: np.ndarray  # float32 [T, K, 3] crop px
    found: np.ndarray  # bool [T]; False: landmarks were interpolated
    wave: np.ndarray  # int16 [640 T], at one level (level_sound)
    mel: np.ndarray  # float16 [80, 4 T]

    def __len__(self):
        return len(self.offsets) - 1

    def sound(self):
        """-> float32 [640 T], -1..1"""
        return self.wave.astype(np.float32) / 32768

    def frame(self, i, half=False):
        """-> uint8 RGB [256, 256, 3]; half: [128, 128, 3], decoded as such, 3 times faster"""
        jpeg = self.jpegs[self.offsets[i]:self.offsets[i + 1]]
        picture = cv2.imdecode(jpeg, cv2.IMREAD_REDUCED_COLOR_2 if half else cv2.IMREAD_COLOR)
        if picture is None:
            raise BadInput(f"{self.path}: frame {i} is no picture")
        return picture[..., ::-1]  # BGR -> RGB


@contextlib.contextmanager
def naming(path):
    """Whatever goes wrong inside becomes a BadInput of one line that names the file."""
    try:
        yield
    except BadInput:  # names it already
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"{path}: cannot be used ({reason})") from error


def load_clip(path):
    """BadInput if the file is broken or foreign (every array is checked by zip's own CRC)."""
    names = ("jpegs", "offsets", "landmarks", "found", "wave", "mel")
    with naming(path), np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in names}
        return Clip(Path(path), str(file["source"]), str(file["text"]), **arrays)


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
        if mark_of(content)[:1] != [LAYOUT] or "clips" not in content:
            continue
        for clip in content["clips"]:
            place = path.with_name(clip["name"])
            infos.append(ClipInfo(place, content["source"], clip["text"], clip["frames"]))
    return infos


def mark_of(content):
    """A manifest's signature, which begins with LAYOUT; [] if it is none of ours"""
    mark = content.get("signature")
    return mark if isinstance(mark, list) else []


def split_clips(infos, held_out_names=""):
    """(training clips, held-out clips): by name, or, where none is given, by a hash of the video.

    held_out_names: comma-separated parts of the source's path, * and ? allowed; a folder that one
    names is held out whole. Where the hash leaves one half empty (a single video, say), the last
    tenth of the clips is held out."""
    patterns = [f"*{name.strip()}*" for name in held_out_names.split(",") if name.strip()]
    sources = {info.source for info in infos}
    chosen = {source for source in sources if is_held_out(source)}
    if patterns:
        chosen = set()
        for one in patterns:
            named = fnmatch.filter(sources, one)
            if infos and not named:
                raise BadInput(f"--held-out {one[1:-1]}: no video of that name")
            chosen.update(named)
    training = [info for info in infos if info.source not in chosen]
    held_out = [info for info in infos if info.source in chosen]
    one_is_empty = not (training and held_out)
    if one_is_empty and not patterns and len(infos) > 1:
        last = max(1, len(infos) // 10)
        return infos[:-last], infos[-last:]
    return training, held_out


def is_held_out(source):
    """About one source in ten, by a hash of its name: stable when files come and go."""
    return media.hash_of(Path(source).stem) % 10 == 0


# ---------------------------------------------------------------- videos and their texts
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
            inner.clear()
            continue
        seen.add(real)
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def read_text(video):
    """What is said, beside a video in NAME.align or NAME.txt -> list of (start s, end s, word).

    UTF-8 or UTF-16. A file that cannot be read is named and skipped."""
    for suffix, words_of in ((".align", words_of_align), (".txt", words_of_txt)):
        path = video.with_suffix(suffix)
        if not path.is_file():
            continue
        try:
            return words_of(decode_file(path))
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            tqdm.write(f"text skipped: {path}: {reason[:80]}")
    return []


def words_of_align(text):
    """GRID's form: a line a word with its times, in 1/25000 s, or with a point in seconds"""
    rows = [line.split() for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 3]
    in_seconds = any("." in start + end for start, end, _ in rows)
    unit = 1.0 if in_seconds else 25000
    words = timed_words(rows, unit)
    if not words:
        raise ValueError("no line of start, end, word")
    return [word for word in words if word[2] not in ("sil", "sp")]


def words_of_txt(text):
    """LRS's form (Text:, Conf:, rows of WORD START END), or any text. What has no rows has no
    times: one entry (0, inf, text)."""
    text = text.strip()
    if text.startswith("Text:"):
        _, _, table = text.partition("WORD START END")
        rows = [line.split()[:3] for line in table.splitlines()]
        rows = [row for row in rows if len(row) == 3]
        words = timed_words((start, end, word) for word, start, end in rows)
        if words:
            return words
        text = text.splitlines()[0].removeprefix("Text:")
    sentence = " ".join(text.split())
    return [(0.0, math.inf, sentence)] if sentence else []


def decode_file(path):
    """A text file's content, UTF-8 or UTF-16, without a byte order mark"""
    content = path.read_bytes()
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content
    return content.decode("utf-16" if wide else "utf-8-sig")


def timed_words(rows, unit=1.0):
    """Rows of (start, end, word) -> list of (start s, end s, word), without headers"""
    words = []
    for start, end, word in rows:
        with contextlib.suppress(ValueError):  # times that are no numbers
            words.append((float(start) / unit, float(end) / unit, word))
    return words


def clip_text(words, start, end, seconds):
    """What is said between start and end (s) of a video of that many seconds.

    Text without times counts only if the clip is (but for a second) the whole video: half a
    sentence under a whole one would teach the lip reader nonsense."""
    whole = end - start > seconds - 1
    said = []
    for first, last, word in words:
        middle = (first + last) / 2  # infinite without times
        if start <= middle < end or (whole and middle == math.inf):
            said.append(word)
    return " ".join(said)


# ---------------------------------------------------------------- cutting (S11, S12)
def segments(frames, tracker):
    """Frames of one video -> yields lists of (found, lying, piece), at most 125 frames, none across
    a cut.

    found, lying: see track_shots; piece: see cut_out, so that no whole pictures are held."""
    held, box = [], None
    for frame, found, lying, cut in faces.track_shots(frames, [tracker]):
        if cut:
            first = scene_start(held)
            if first:
                yield held[:first]
            held, box = held[first:], None
        if len(held) == CLIP_FRAMES:
            yield held
            held = []
        piece, box = cut_out(frame, found, box)
        held.append((found, lying, piece))
    if held:
        yield held


def scene_start(held):
    """Before a cut: the few faceless frames at the end of those held belong to the new scene."""
    start = len(held)
    earliest = max(0, start - faces.GAP_FRAMES)
    while start > earliest and not held[start - 1][0]:
        start -= 1
    return start


def cut_out(frame, found, box):
    """-> (piece, box): the part of the frame within a face's size of any face found.

    Without faces: within the last box, without a box the whole frame. piece: its pixels, at most
    TRACK_PIXELS, and the affine [2, 3] that leads from them to the frame's."""
    H, W = frame.shape[:2]
    if found:
        centres = np.array([points[:, :2].mean(0) for points in found])  # [n, 2]
        sizes = np.array([[faces.face_size(points)] for points in found])  # [n, 1]
        low, high = (centres - sizes).min(0), (centres + sizes).max(0)
        box = np.clip([*low, *high], 0, [W, H, W, H]).astype(int)
    if box is None or (box[2:] <= box[:2]).any():
        box = np.array([0, 0, W, H])
    x0, y0, x1, y1 = box
    pixels = faces.shrink(frame[y0:y1, x0:x1]).copy()
    height, width = pixels.shape[:2]
    fx, fy = (x1 - x0) / width, (y1 - y0) / height
    left, top = x0 + (fx - 1) / 2, y0 + (fy - 1) / 2  # pixel centres sit at whole numbers
    affine = np.array([[fx, 0, left], [0, fy, top]])
    return (pixels, affine), box


def chain(second, first):
    """The affine [2, 3] that does first, then second."""
    return second @ np.vstack([first, [0, 0, 1]])


def rms(wave, axis=None):
    """Root mean square"""
    return np.sqrt(np.mean(wave ** 2, axis))


def refusal(landmarks, lying, wave):
    """landmarks [T, K, 3] frame px, NaN where absent; lying bool [T]; wave float32 [640 T] -> why
    not to keep the clip, or None."""
    found = np.isfinite(landmarks[:, 0, 0])
    if len(found) < FPS:
        return "shorter than 1 s"
    if rms(wave) < SILENCE:
        return "silent sound"
    if found.mean() < 0.9 and np.sum(lying) > len(found) / 2:
        return faces.LYING
    if found.mean() < 0.9:
        return "face missing in > 10 % of frames"
    sizes = [faces.face_size(points) for points in landmarks[found]]
    if np.median(sizes) < SMALLEST_FACE_PX:
        return "face smaller than 80 px"
    return None


def upright_box(detector, pieces, landmarks):
    """S12 with yolov8-face: its box on the upright face, once a second.

    pieces: [T] of cut_out; landmarks [T, K, 3] frame px, NaN rows allowed -> median box
    (x0, y0, x1, y1) in upright units; None: no face found."""
    centre, turn = faces.upright_motion(landmarks)
    half, unit = 320, 18.0  # px; px per upright unit (cm): a face is then about 320 px high
    boxes = []
    for i in range(0, len(pieces), FPS):
        rotate = unit / turn[i]
        shift = complex(half, half) - rotate * centre[i]
        affine = np.array([[rotate.real, -rotate.imag, shift.real],
                           [rotate.imag, rotate.real, shift.imag]])
        pixels, lead = pieces[i]
        upright = cv2.warpAffine(pixels, chain(affine, lead), (2 * half, 2 * half))
        found, _, _ = detector.find(upright)
        begins = (found[:, :2] < half).all(1)
        ends = (found[:, 2:] > half).all(1)
        boxes += list(found[begins & ends][:1])  # the one around the middle
    return (np.median(boxes, 0) - half) / unit if boxes else None


def save_clip(path, landmarks, affines, pieces, wave, text, source):
    """landmarks [T, K, 3] frame px with NaN rows; pieces [T] of cut_out. Whole or not at all."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95,
               cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    jpegs = []
    for (pixels, lead), affine in zip(pieces, affines):
        rgb = faces.crop(pixels, chain(affine, lead))
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)
        jpegs.append(jpeg.ravel())
    samples = media.to_int16(wave)
    mel = log_mel(samples.astype(np.float32) / 32768)
    mel = mel.numpy().astype(np.float16)
    offsets = np.cumsum([0, *map(len, jpegs)])
    found = np.isfinite(landmarks[:, 0, 0])
    points = faces.to_crop(faces.fill_gaps(landmarks), affines)
    with open(path.with_suffix(f".{os.getpid()}.part"), "wb") as file:
        np.savez(file, jpegs=np.concatenate(jpegs), offsets=offsets, landmarks=points, found=found,
                 wave=samples, mel=mel, text=text, source=source)
    os.replace(file.name, path)


def prepare_video(video, data_dir, face_detector=None, transcribe=None):
    """One video -> its clips in DIR/.clips and a manifest that names them. -> (clips, peak MiB)

    face_detector: path of a yolov8-face model; transcribe: whisper model that writes down what a
    clip without text says. Memory does not grow with the video's length, but for its sound."""
    path, clips, refused = manifest(video, data_dir), [], Counter()
    content = {"source": source_of(video, data_dir), "clips": clips, "refused": refused,
               "signature": signature(video, (face_detector, transcribe))}
    for old in path.parent.iterdir():
        if old.name.startswith((path.stem + "_", path.stem + ".")):
            old.unlink(missing_ok=True)
    try:
        detector = faces.YoloFace(face_detector) if face_detector else None
        for landmarks, lying, pieces, wave, text in cut_video(video):
            if reason := refusal(landmarks, lying, wave):
                refused[reason] += 1
                continue
            if transcribe and not text:
                text = transcriber(transcribe).transcribe(wave, fp16=False)["text"].strip()
            box = upright_box(detector, pieces, landmarks) if detector else None
            affines = faces.smooth_affines(landmarks, box)
            clip = path.with_name(f"{path.stem}_{len(clips):03d}.npz")
            save_clip(clip, landmarks, affines, pieces, wave, text, content["source"])
            clips.append({"name": clip.name, "text": text, "frames": len(pieces)})
    except BadInput as error:
        silent = str(error).endswith("no sound track")
        refused["no sound track" if silent else "unreadable file"] += 1
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content))
    os.replace(part, path)
    return len(clips), peak_mib()


def cut_video(video):
    """Yields of each segment: landmarks [T, K, 3] frame px, lying bool [T], pieces [T] of cut_out,
    wave float32 [640 T], its text. Raises BadInput: unreadable, "no sound track"."""
    sound, words, start = level_sound(media.read_audio(video)).numpy(), read_text(video), 0
    with faces.FaceTracker() as tracker, contextlib.closing(media.read_frames(video)) as frames:
        for held in segments(frames, tracker):
            seen, lying, pieces = zip(*held)
            end = start + len(held)
            wave = sound[start * SAMPLES_PER_FRAME:end * SAMPLES_PER_FRAME]
            wave = np.pad(wave, (0, len(held) * SAMPLES_PER_FRAME - len(wave)))
            text = clip_text(words, start / FPS, end / FPS, len(sound) / SAMPLE_RATE)
            yield faces.follow_face(seen), lying, pieces, wave, text
            start = end


# ---------------------------------------------------------------- preparing (S1)
def source_of(video, data_dir):
    return video.relative_to(data_dir).as_posix()


def manifest(video, data_dir):
    """Where a video's manifest lies; its clips' names begin like it."""
    digest = media.hash_of(source_of(video, data_dir)) % 16**8
    stem = os.fsdecode(os.fsencode(video.stem[:60])[:150])  # a name has at most 255 bytes
    return data_dir / ".clips" / f"{stem}-{digest:08x}.json"


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
    enough = all(now in (None, then) for then, now in options)
    return bool(old) and old[:-2] == new[:-2] and enough


def read_json(path):
    """-> the object that the file holds; {} if it is missing or broken"""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
    try:
        return whisper.load_model(model_name, device="cpu")
    except Exception as error:  # no network, no model of whisper's, a broken file
        raise BadInput(f"--transcribe {model_name}: {first_line(error)}") from None


def prepare(data_dir, workers=None, shard=(1, 1), face_detector=None, transcribe=None):
    """Brings DIR/.clips up to date: done videos are skipped, changed ones made again.

    A killed run goes on where it was. shard=(i, n): only every n-th video, by a hash of its path.
    -> report {"videos", "new", "kept", "refused": {why: count}, "refused_names": {why: names},
    "others": names of files of other kinds, "orphans": clips whose video is gone; of this run
    "clips_per_s", and "peak_mib" of the largest worker}"""
    data_dir, began = Path(data_dir), time.monotonic()
    videos = list_videos(data_dir)
    if not videos:
        raise BadInput(f"{data_dir}: no video in it")
    if face_detector:  # a bad model is refused here, before any worker starts
        faces.YoloFace(face_detector)
    if transcribe:
        transcriber(transcribe)
    (data_dir / ".clips").mkdir(exist_ok=True)
    videos = [video for video in videos if in_shard(source_of(video, data_dir), *shard)]
    options = (face_detector and str(face_detector), transcribe)
    todo = find_outdated(videos, data_dir, options)
    clips, peak = prepare_videos(todo, data_dir, workers, options)
    speed = clips / (time.monotonic() - began)
    return {"videos": len(videos), "new": len(todo), "clips_per_s": speed, "peak_mib": peak,
            **count_clips(videos, data_dir), **count_strangers(data_dir)}


def in_shard(source, i, n):
    return media.hash_of(source) % n == i % n


def find_outdated(videos, data_dir, options):
    """The videos that are new, have changed, or want another option or layout"""
    outdated, older = [], 0
    for video in videos:
        mark = mark_of(read_json(manifest(video, data_dir)))
        older += bool(mark) and mark[0] != LAYOUT
        if not up_to_date(mark, signature(video, options)):
            outdated.append(video)
    if older:
        tqdm.write(f"{older} videos have clips of an older layout: they are made again")
    return outdated


def prepare_videos(videos, data_dir, workers, options):
    """prepare_video in processes of their own -> (clips made, peak MiB of the largest process)"""
    clips, peak, began = 0, 0, time.monotonic()
    count = min(workers or os.cpu_count(), max(1, len(videos)))
    with WorkerPool(count) as pool:
        jobs = [pool.submit(prepare_video, video, data_dir, *options) for video in videos]
        bar = tqdm(as_completed(jobs), total=len(jobs), unit="video", disable=not jobs)
        for job in bar:
            made, mib = job.result()
            clips, peak = clips + made, max(peak, mib)
            speed = clips / (time.monotonic() - began)
            bar.set_postfix_str(f"{clips} clips, {speed:.1f} clips/s", refresh=False)
    return clips, peak


def count_clips(videos, data_dir):
    """What the manifests say -> part of prepare's report"""
    kept, refused, names = 0, Counter(), {}
    for video in videos:
        content = read_json(manifest(video, data_dir))
        kept += len(content.get("clips", []))
        for reason, count in content.get("refused", {}).items():
            refused[reason] += count
            names.setdefault(reason, []).append(video.name)
    return {"kept": kept, "refused": refused, "refused_names": names}


def count_strangers(data_dir):
    """Files that are no videos, and clips without a video -> part of prepare's report"""
    known = media.VIDEO_SUFFIXES | {".txt", ".align", ".csv"}
    others = [path.name for path in list_files(data_dir) if path.suffix.lower() not in known]
    stems = {manifest(video, data_dir).stem for video in list_videos(data_dir)}
    clips = [path.stem.rpartition("_") for path in (data_dir / ".clips").glob("*.npz")]
    return {"others": others, "orphans": sum(stem not in stems for stem, _, _ in clips)}


def print_report(report):
    """prepare's report in words: why each clip that was not kept was refused, with some names"""
    speed = ""
    if report["new"]:
        speed = f"; {report['clips_per_s']:.2f} clips/s, {report['peak_mib']} MiB a worker"
    print(f"{report['videos']} videos ({report['new']} of them new or changed)")
    print(f"{report['kept']:6d} clips kept{speed}")
    for reason, count in report["refused"].most_common():
        names = some_names(report["refused_names"][reason])
        print(f"{count:6d} refused: {reason} ({names})")
    if report["others"]:
        names = some_names(report["others"])
        print(f"{len(report['others']):6d} files of other kinds were not looked at ({names})")
    if report["orphans"]:
        print(f"{report['orphans']:6d} clips of videos that are gone or renamed: still trained "
              "on, until you delete them from .clips")


def some_names(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ---------------------------------------------------------------- python data.py
def main():
    parser = argparse.ArgumentParser(
        description="S1: videos -> training clips; or draw a demo corpus.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="DIR", help="folder of videos; clips go to DIR/.clips")
    what.add_argument("--demo", metavar="DIR", help="draw talking heads into this folder")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes (default: one per core)")
    parser.add_argument("--shard", metavar="i/n", default="1/1", help="only the i-th of n equal "
                        "shares of the videos (i = 1..n), for n machines")
    parser.add_argument("--face-detector", metavar="ONNX", help="yolov8-face model for the face "
                        "box (default: the landmarks' box)")
    parser.add_argument("--transcribe", metavar="MODEL", help="whisper model that writes down "
                        "clips without text (default: none)")
    parser.add_argument("--clips", type=int, default=20, help="demo clips, 5 s each (default: 20)")
    parser.add_argument("--speakers", type=int, default=4, help="demo speakers (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="demo seed (default: 0)")
    args = parser.parse_args()
    for name, least in (("workers", 1), ("clips", 1), ("speakers", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise BadInput(f"--{name} {value}: must be {least} or more")
    if args.demo:
        from bench import drawn  # what is drawn is not in the patent: a room of its own
        drawn.draw_demo(args.demo, clips=args.clips, speakers=args.speakers, seed=args.seed)
        return
    shard = parse_shard(args.shard)
    print_report(prepare(args.data, args.workers, shard, args.face_detector, args.transcribe))


def parse_shard(text):
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) <= int(n) and int(n) > 0):
        raise BadInput(f"--shard {text}: must be i/n, for example 1/4")
    return int(i), int(n)


if __name__ == "__main__":
    cli(main)
