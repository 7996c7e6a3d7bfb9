"""The held-out table: how good pictures, experts and baselines are on clips never trained on.

    stage    | code
    pictures | generate, measure_pictures, evaluate
    experts  | evaluate_experts
    table    | average, print_table

`python train.py --stage eval` runs it.
"""
import pathlib

import cv2
import numpy as np
import torch
from torch.nn import functional as fn
from tqdm import tqdm

import data
import experts
import lipsync
import losses
from lipsync import FPS

OPEN_PX = 8                          # height of a mouth that shows its teeth, px of the 256 px crop
AMPLITUDES = (0.5, 1.5, 2)           # that eval measures beside 1
COLUMNS = {"pictures": ("clips", "r", "lag", "lmd", "psnr", "ssim", "sharpness", "teeth", "opening", "offset", "confidence", "cer"),
           "experts": ("clips", "accuracy", "accuracy_10db", "accuracy_1s", "accuracy_1s_10db", "shift", "cer", "reads")}


# ---------------------------------------------------------------- measuring (design: held-out clips, baselines on the same rows)
def generate(net, clip, features, amplitude=1.0, device="cpu"):
    """A clip redrawn from its own upper halves and `features` [T, D]. -> uint8 [T, 256, 256, 3]"""
    size, config = net.config.image_size, net.config
    stack = lambda frames: torch.from_numpy(np.stack([clip.frame(i, size) for i in frames])).permute(0, 3, 1, 2).to(device).float() / 255
    refs = stack(data.select_references(clip.shapes, clip.poses, config.refs))   # [R, 3, H, W]
    windows = lipsync.AudioSelector(config)(features[None].to(device))[0]        # [T, F, D]
    made = []
    for start in range(0, len(clip), 8):
        target = stack(range(start, min(start + 8, len(clip))))      # [n, 3, H, W]
        with torch.inference_mode():
            output = net(refs.expand(len(target), -1, -1, -1, -1), target * lipsync.half_mask(target),
                         windows[start:start + 8], amplitude)
        made.append((output.float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    made = np.concatenate(made)
    return made if size == data.CROP_PX else np.stack([cv2.resize(m, (data.CROP_PX,) * 2, interpolation=cv2.INTER_CUBIC) for m in made])


def find_landmarks(tracker, pictures):
    """MediaPipe on crops: uint8 [T, 256, 256, 3] -> float32 [T, 478, 2] px, gaps interpolated; None if no face at all."""
    tracker.forget()
    points = np.full((len(pictures), data.MESH_POINTS, 2), np.nan, np.float32)
    for i, picture in enumerate(pictures):
        faces = tracker.find(picture)
        if faces:
            points[i] = faces[0]
    return data.fill_gaps(points) if np.isfinite(points).any() else None


def correlation(a, b):
    """Pearson r of two series; 0 if one of them does not move."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-9))


def lag_of(made, true, reach=5):
    """Shift in frames at which the correlation peaks; + = the made mouth is late."""
    T = len(true)
    scores = {s: correlation(made[max(0, s):T + min(0, s)], true[max(0, -s):T - max(0, s)]) for s in range(-reach, reach + 1)}
    return max(scores, key=lambda s: (scores[s], -abs(s)))


def ssim(a, b):
    """Structural similarity of two uint8 pictures, on luma, Gaussian window of 1.5 px (Wang et al. 2004). 1 = the same."""
    a, b = (cv2.cvtColor(x, cv2.COLOR_RGB2GRAY).astype(np.float64) for x in (a, b))
    blur = lambda x: cv2.GaussianBlur(x, (11, 11), 1.5)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))).mean())


def sharpness(picture, box):
    """Variance of the Laplacian inside the box (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    return float(cv2.Laplacian(cv2.cvtColor(picture[y0:y1, x0:x1], cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


def teeth_variation(pictures, points):
    """How much the inside of an open mouth changes its look over time: the mean deviation of its luma, 0..255; None with fewer than 5
    open frames. pictures uint8 [T, 256, 256, 3], points [T, 478, 2] px"""
    inner, looks = points[:, data.LIPS_INNER], []                    # [T, n, 2]
    for picture, lips in zip(pictures, inner):
        (x0, y0), (x1, y1) = lips.min(0).astype(int).clip(0), lips.max(0).astype(int) + 1
        if y1 - y0 >= OPEN_PX:
            looks.append(cv2.resize(cv2.cvtColor(picture[y0:y1, x0:x1], cv2.COLOR_RGB2GRAY), (24, 12), interpolation=cv2.INTER_AREA))
    return float(np.std(looks, 0).mean()) if len(looks) >= 5 else None


def measure_pictures(made, true, clip, tracker, sync, reader, sound):
    """One row of the table: what is made of a clip against what is true, both uint8 [T, 256, 256, 3]; sound as the sync expert hears it"""
    half = data.CROP_PX // 2
    error = ((made[:, half:].astype(np.float64) - true[:, half:]) ** 2).mean((1, 2, 3))
    boxes = mouth_boxes(clip.landmarks)
    row = dict(psnr=float(np.mean(10 * np.log10(255 ** 2 / np.maximum(error, 1e-2)))),
               ssim=float(np.mean([ssim(a, b) for a, b in zip(made[::5, half:], true[::5, half:])])),
               sharpness=float(np.median([sharpness(m, b) / max(sharpness(t, b), 1e-6) for m, t, b in zip(made, true, boxes)])))
    points = find_landmarks(tracker, made)
    if points is not None:
        lips = data.LIPS_INNER + data.LIPS_OUTER
        shapes = data.mouth_shape(points)
        row.update(r=correlation(shapes[:, 0], clip.shapes[:, 0]), lag=lag_of(shapes[:, 0], clip.shapes[:, 0]),
                   opening=float(shapes[:, 0].mean()),
                   lmd=float(np.linalg.norm(points[:, lips] - clip.landmarks[:, lips], axis=-1).mean()))
        teeth = teeth_variation(made, points), teeth_variation(true, clip.landmarks)
        row.update({} if None in teeth else dict(teeth=teeth[0] / max(teeth[1], 1e-6)))
    lower = torch.from_numpy(np.ascontiguousarray(made[:, half:].transpose(0, 3, 1, 2)))     # [T, 3, 128, 256]
    lower = fn.interpolate(lower.float() / 255, scale_factor=0.5, mode="area")
    if sync is not None:
        row.update({k: v for k, v in experts.measure_offset(sync, lower, sound).items() if k in ("offset", "confidence")})
    if reader is not None and clip.text:
        row["cer"] = experts.character_error_rate(reader.read(lower[None])[0], clip.text)
    return row


def mouth_boxes(landmarks):
    """[T, 478, 2] crop px -> int [T, 4] (x0, y0, x1, y1), the outer lips with a margin of a fifth"""
    lips = landmarks[:, data.LIPS_OUTER]
    low, high = lips.min(1), lips.max(1)
    margin = (high - low).max(1, keepdims=True) * 0.2
    return np.concatenate([low - margin, high + margin], 1).clip(0, data.CROP_PX).round().astype(int)


def spread_over_folders(paths, count):
    """About `count` of the clips, as many from each folder: [(folder, path)]"""
    by_folder = {}
    for path in paths:
        by_folder.setdefault(str(pathlib.Path(data.clip_label(path)[0]).parent), []).append(path)
    each = max(1, count // max(1, len(by_folder)))
    return [(folder, path) for folder, some in by_folder.items() for path in some[::max(1, len(some) // each)][:each]]


def average(rows):
    """Dicts with some of the same keys -> one: how many, and the mean of each column; of a lag or an offset the median."""
    middle = lambda k: (np.median if k in ("lag", "offset") else np.mean)([r[k] for r in rows if k in r])
    return {"clips": len(rows), **{k: float(middle(k)) for k in sorted({k for r in rows for k in r})}}


def evaluate(run, weights):
    """The held-out table {folder: {row: {column: number}}}: rows model, copy (a reference's lower half), silence, real, amplitude A.

    The sync expert first moves a clip's own sound to its lips, as find_offsets does by video in training, unless --keep-offsets."""
    _, net, audio_encoder, sync, reader = experts.load_networks(weights, run.device)
    cost, _ = lipsync.gmac(net, *(x.to(run.device) for x in lipsync.example(net.config)))
    print(f"network: {cost:.3f} GMAC a frame, {1 / lipsync.seconds_a_frame(net, 8):.0f} frames/s in batches of 8")
    table = {}
    with data.FaceTracker() as tracker:
        for folder, path in tqdm(spread_over_folders(run.held_out, run.config.eval_clips), desc="eval", unit="clip"):
            clip, rows = data.load_or_skip(path), table.setdefault(folder, {})
            if clip is None:
                continue
            wave = torch.from_numpy(clip.sound())
            features, silent = (audio_encoder(w[None].to(run.device))[0] for w in (wave, torch.zeros_like(wave)))    # [T, D]
            true = np.stack([clip.frame(i) for i in range(len(clip))])
            copy, refs = true.copy(), data.select_references(clip.shapes, clip.poses, net.config.refs)
            copy[:, data.CROP_PX // 2:] = true[refs[len(refs) // 2], data.CROP_PX // 2:]
            sound = sync and experts.hear(sync, clip.mel, features)
            if sync is not None and not run.config.keep_offsets:
                pairs = experts.embed_clip(sync, data.lower_halves(clip, range(len(clip))), sound)
                features = data.move_sound(clip, features, experts.lateness([experts.sync_curve(*pairs, max_shift=experts.OFFSETS)]))
                sound = experts.hear(sync, clip.mel, features)       # moved, too
            for name, made in (("model", generate(net, clip, features, 1.0, run.device)), ("copy", copy),
                               ("silence", generate(net, clip, silent, 1.0, run.device)), ("real", true)):
                if name == "model" and name not in rows:
                    save_strip(run.out / f"strip_{folder.replace('/', '_') if folder != '.' else 'videos'}.png", true[refs[0]], true, made)
                rows.setdefault(name, []).append(measure_pictures(made, true, clip, tracker, sync, reader, sound))
            for amplitude in AMPLITUDES:
                points = find_landmarks(tracker, generate(net, clip, features, amplitude, run.device))
                rows.setdefault(f"amplitude {amplitude:g}", []).append(
                    {} if points is None else {"opening": float(data.mouth_shape(points)[:, 0].mean())})
    for folder, rows in evaluate_experts(run, audio_encoder, sync, reader).items():
        table.setdefault(folder, {})["experts"] = rows
    return {folder: {name: average(rows) for name, rows in names.items()} for folder, names in table.items()}


def save_strip(png, reference, true, made, count=10):
    """A clip over time, `count` moments from left to right; rows reference | masked | output | truth."""
    at = np.linspace(0, len(true) - 1, count).round().astype(int)
    masked = true[at].copy()
    masked[:, data.CROP_PX // 2:] = 0
    rows = np.stack([np.stack([reference] * count), masked, made[at], true[at]])         # [4, count, 256, 256, 3]
    cv2.imwrite(str(png), rows.transpose(0, 2, 1, 3, 4).reshape(4 * data.CROP_PX, -1, 3)[..., ::-1])


@torch.no_grad()
def evaluate_experts(run, audio_encoder, sync, reader):
    """How well the experts judge real held-out clips: {folder: [a row per clip]}.

    accuracy of S frames alone, accuracy_1s of a second's mean, the same with white noise 10 dB below the speech: sync_accuracy, 0..1;
    shift: 1 if a shift of the sound, -7..7 frames, is found to within one; cer: character error rate; reads: 1 if the true text costs
    less than another clip's.
    """
    table, rng = {}, np.random.default_rng(0)
    texts = sorted({data.clip_label(path)[1] for path in run.held_out} - {""}) if reader else []
    for folder, path in tqdm(spread_over_folders(run.held_out, 4 * run.config.eval_clips), desc="experts", unit="clip"):
        clip, row = data.load_or_skip(path), {}
        if clip is None:
            continue
        table.setdefault(folder, []).append(row)
        pictures = torch.from_numpy(data.lower_halves(clip, range(len(clip))))       # [T, 3, 64, 128]
        if sync is not None and len(clip) > 2 * experts.GROUP + 7:
            wave = clip.sound()
            for name, heard in (("_10db", data.add_noise(wave, 10, rng).clip(-1, 1)), ("", wave)):
                features = audio_encoder(torch.from_numpy(heard)[None].to(run.device))[0]
                video, audio = experts.embed_clip(sync, pictures, experts.hear(sync, lipsync.log_mel(heard), features))
                row["accuracy" + name] = experts.sync_accuracy(video, audio)
                row["accuracy_1s" + name] = experts.sync_accuracy(video, audio, min(FPS, len(video) // 2))
            late, G = int(rng.integers(-7, 8)), len(video)
            curve = experts.sync_curve(video[max(0, late):G + min(0, late)], audio[max(0, -late):G - max(0, late)])
            row["shift"] = float(abs(experts.read_curve(curve)[0] - late) <= 1)
        if reader is not None and clip.text:
            memory = reader.watch(pictures[None].to(run.device) / 255)
            row["cer"] = experts.character_error_rate(reader.read_one(memory[0], 1), clip.text)
            other = texts[(texts.index(clip.text) + 1 + int(rng.integers(max(1, len(texts) - 1)))) % len(texts)]
            costs = [float(losses.lip_reading_loss(reader.spell(*memory, tokens), tokens, data.PAD)) for tokens in
                     (torch.tensor([data.encode_text(text)], device=run.device) for text in (clip.text, other))]
            row["reads"] = float(costs[0] < costs[1])
    return table


def print_table(table):
    """Two: how good the pictures are, then how good the experts are."""
    for kind, columns in COLUMNS.items():
        widths = [max(11, len(c) + 2) for c in columns]
        for folder, rows in table.items():
            print(f"\n{folder:14}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths)))
            for name, row in rows.items():
                if (name == "experts") == (kind == "experts"):
                    print(f"{name:14}" + "".join(f"{row[c]:{w}.3g}" if c in row else f"{'-':>{w}}" for c, w in zip(columns, widths)))
