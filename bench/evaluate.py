"""The held-out table: how good lips, pictures, experts and baselines are on clips never trained on.

    stage    | code
    lips     | measure_lips: no pictures
    pictures | redraw_clip, measure_pictures
    experts  | measure_experts
    table    | evaluate, print_table

`python train.py --stage eval` runs it. Clips, pictures and points as in data.py and faces.py; the
pictures are made by lipsync.redraw, as infer.py makes them.
"""
import time

import cv2
import numpy as np
import torch
from torch.nn import functional as fn
from tqdm import tqdm

import data
import experts
import faces
import lipsync
import losses
from lipsync import FPS

BATCH = 8  # frames that are redrawn together
OPEN_PX = 8  # height of a mouth that shows its teeth, px of the 256 px crop
AMPLITUDES = (0.5, 1.5, 2)  # measured beside 1
REACH = 3  # frames: a video's own sound may be off by so much
COLUMNS = {
    "lips": ("clips", "r", "r_best", "r_width", "r_rounding", "error", "deviation", "opening",
             "silence", "amp_0.5", "amp_1.5", "jaw", "jaw_posed"),
    "pictures": ("clips", "r", "r_best", "lag", "r_width", "r_rounding", "lmd", "psnr", "ssim",
                 "sharpness", "seam", "teeth", "opening", "offset", "confidence", "cer"),
    "experts": ("clips", "accuracy", "accuracy_10db", "accuracy_1s", "accuracy_1s_10db", "shift",
                "cer", "reads")}


# ---------------------------------------------------------------- one clip, drawn again
def clip_points(clip, config):
    """-> reference numbers [R], points float32 [T, R, 2, K, 2]"""
    refs = faces.select_references(clip.landmarks, config.refs)
    return refs, faces.place_points(clip.landmarks[refs], clip.landmarks)


def redraw_clip(net, clip, features, amplitude=1.0):
    """A clip redrawn from its own upper halves and `features` [T, D]. -> uint8 [T, 256, 256, 3]"""
    refs, points = clip_points(clip, net.config)
    pictures = np.stack([clip.frame(i) for i in refs])
    audio = lipsync.AudioSelector(net.config)(features[None])[0]  # [T, F, D]
    made = []
    for start in range(0, len(clip), BATCH):
        stop = min(start + BATCH, len(clip))
        crops = np.stack([clip.frame(i) for i in range(start, stop)])
        made.append(lipsync.redraw(net, pictures, crops, points[start:stop],
                                   audio[start:stop], amplitude))
    return np.concatenate(made)


def predict_shapes(net, clip, features, amplitude=1.0):
    """What the sound alone asks for -> landmarks [T, K, 3] crop px, their mouth_shape [T, 3]"""
    _, points = clip_points(clip, net.config)
    audio = lipsync.AudioSelector(net.config)(features[None])[0][:len(clip)]
    with torch.inference_mode():
        lips = net.predict_lips(audio, amplitude, torch.from_numpy(points).to(audio.device))
    landmarks = clip.landmarks.copy()
    landmarks[:, faces.MOUTH, :2] = lips.float().cpu().numpy() * faces.CROP_PX
    return landmarks, faces.mouth_shape(landmarks)


# ---------------------------------------------------------------- measures
def correlation(a, b):
    """Pearson r of two series; 0 if one of them does not move."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-9))


def shifted(made, true, reach):
    """{shift in frames: r}; + = the made mouth is late"""
    T = len(true)
    return {s: correlation(made[max(0, s):T + min(0, s)], true[max(0, -s):T - max(0, s)])
            for s in range(-reach, reach + 1)}


def lag_of(made, true, reach=5):
    """Shift in frames at which the correlation peaks; + = the made mouth is late."""
    scores = shifted(made, true, reach)
    return max(scores, key=lambda s: (scores[s], -abs(s)))


def compare_shapes(made, true):
    """mouth_shape [T, 3] of made and true mouths -> the columns that both tables share"""
    return dict(r=correlation(made[:, 0], true[:, 0]), r_width=correlation(made[:, 1], true[:, 1]),
                r_rounding=correlation(made[:, 2], true[:, 2]), opening=float(made[:, 0].mean()),
                r_best=max(shifted(made[:, 0], true[:, 0], REACH).values()))


def ssim(a, b):
    """Structural similarity of two uint8 pictures, on luma, Gaussian window of 1.5 px; 1 = the same.
    Source: Wang et al. 2004."""
    a, b = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY).astype(np.float64) for x in (a, b)]
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return float((light * structure).mean())


def blur(x):
    return cv2.GaussianBlur(x, (11, 11), 1.5)


def sharpness(picture, box):
    """Variance of the Laplacian inside the box (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    grey = cv2.cvtColor(picture[y0:y1, x0:x1], cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def lip_boxes(landmarks):
    """[T, K, 3] crop px -> int [T, 4] (x0, y0, x1, y1), the outer lips with a margin of a fifth"""
    lips = landmarks[:, faces.LIPS_OUTER, :2]
    low, high = lips.min(1), lips.max(1)
    margin = 0.2 * (high - low).max(1, keepdims=True)
    return np.concatenate([low - margin, high + margin], 1).clip(
        0, faces.CROP_PX).round().astype(int)


def seam(pictures):
    """Mean absolute step across the middle row, 0..255. uint8 [T, 256, 256, 3]"""
    half = faces.CROP_PX // 2
    return float(np.abs(pictures[:, half].astype(int) - pictures[:, half - 1]).mean())


def teeth_variation(pictures, landmarks):
    """How much the inside of an open mouth changes its look over time: the mean deviation of its
    luma, 0..255; None with fewer than 5 open frames."""
    looks = []
    for picture, lips in zip(pictures, landmarks[:, faces.LIPS_INNER, :2]):
        (x0, y0), (x1, y1) = lips.min(0).astype(int).clip(0), lips.max(0).astype(int) + 1
        if y1 - y0 >= OPEN_PX:
            inside = cv2.cvtColor(picture[y0:y1, x0:x1], cv2.COLOR_RGB2GRAY)
            looks.append(cv2.resize(inside, (24, 12), interpolation=cv2.INTER_AREA))
    return float(np.std(looks, 0).mean()) if len(looks) >= 5 else None


def find_landmarks(tracker, pictures):
    """MediaPipe on crops: uint8 [T, 256, 256, 3] -> float32 [T, K, 3] px, gaps interpolated; None
    if no face at all."""
    tracker.forget()
    points = np.full((len(pictures), faces.K, 3), np.nan, np.float32)
    for t, picture in enumerate(pictures):
        found = tracker.find(picture)
        if found:
            points[t] = max(found, key=faces.face_size)
    return faces.fill_gaps(points) if np.isfinite(points).any() else None


# ---------------------------------------------------------------- rows of the table
def measure_lips(net, clip, features, silent):
    """One row without a picture: what the sound asks for against what the landmarks say; and how far
    the closed reference's jaw lies from the frame's, as it is and with the frame's head pose, px."""
    landmarks, shapes = predict_shapes(net, clip, features)
    true = faces.mouth_shape(clip.landmarks)
    lips = faces.LIPS_OUTER + faces.LIPS_INNER
    error = np.linalg.norm((landmarks - clip.landmarks)[:, lips, :2], axis=-1)
    row = compare_shapes(shapes, true)
    row |= dict(error=float(error.mean()), deviation=float(shapes[:, 0].std() / max(true[:, 0].std(), 0.1)))
    for name, sound, amplitude in (("silence", silent, 1), ("amp_0.5", features, 0.5), ("amp_1.5", features, 1.5)):
        opening = predict_shapes(net, clip, sound, amplitude)[1][:, 0].mean()
        row[name] = float(opening if name == "silence" else opening / max(row["opening"], 0.1))
    _, points = clip_points(clip, net.config)
    jaw = clip.landmarks[:, faces.JAW, :2]
    for name, there in (("jaw", points[:, 0, 0]), ("jaw_posed", points[:, 0, 1])):
        row[name] = float(np.linalg.norm(there[:, faces.JAW] * faces.CROP_PX - jaw, axis=-1).mean())
    return row


def measure_pictures(made, true, clip, tracker, networks, sound):
    """One row: what is made of a clip against what is true, both uint8 [T, 256, 256, 3]; sound as
    the sync expert hears it."""
    half = faces.CROP_PX // 2
    error = ((made[:, half:].astype(np.float64) - true[:, half:]) ** 2).mean((1, 2, 3))
    boxes = lip_boxes(clip.landmarks)
    sharp = [sharpness(m, box) / max(sharpness(t, box), 1e-6) for m, t, box in zip(made, true, boxes)]
    similar = [ssim(m, t) for m, t in zip(made[::5, half:], true[::5, half:])]
    row = dict(psnr=float(np.mean(10 * np.log10(255 ** 2 / np.maximum(error, 1e-2)))),
               ssim=float(np.mean(similar)), sharpness=float(np.median(sharp)),
               seam=seam(made) - seam(true))
    points = find_landmarks(tracker, made)
    if points is not None:
        shapes, wanted = faces.mouth_shape(points), faces.mouth_shape(clip.landmarks)
        lips = faces.LIPS_OUTER + faces.LIPS_INNER
        distance = np.linalg.norm((points - clip.landmarks)[:, lips, :2], axis=-1)
        row |= compare_shapes(shapes, wanted)
        row |= dict(lag=lag_of(shapes[:, 0], wanted[:, 0]), lmd=float(distance.mean()))
        teeth = teeth_variation(made, points), teeth_variation(true, clip.landmarks)
        if None not in teeth:
            row["teeth"] = teeth[0] / max(teeth[1], 1e-6)
    lower = torch.from_numpy(np.ascontiguousarray(made[:, half:].transpose(0, 3, 1, 2)))
    lower = fn.interpolate(lower.float() / 255, scale_factor=0.5, mode="area")  # [T, 3, 64, 128]
    if networks.sync is not None:
        found = experts.measure_offset(networks.sync, lower, sound)
        row |= {name: found[name] for name in ("offset", "confidence")}
    if networks.reader is not None and clip.text:
        read = networks.reader.read(lower[None])[0]
        row["cer"] = experts.character_error_rate(read, clip.text)
    return row


@torch.no_grad()
def measure_experts(networks, clip, text_of_another, rng):
    """One row: how well the experts judge a real clip.

    accuracy of S frames alone, accuracy_1s of a second's mean, the same with white noise 10 dB
    below the speech: sync_accuracy, 0..1; shift: 1 if a shift of the sound, -7..7 frames, is found
    to within one; cer: character error rate; reads: 1 if the true text costs less than another's.
    """
    row, sync, reader = {}, networks.sync, networks.reader
    pictures = torch.from_numpy(data.lower_halves(clip, range(len(clip))))  # [T, 3, 64, 128]
    if sync is not None and len(clip) > 2 * experts.GROUP + 7:
        wave = clip.sound()
        for name, heard in (("_10db", data.add_noise(wave, 10, rng).clip(-1, 1)), ("", wave)):
            features = networks.audio_encoder(torch.from_numpy(heard)[None])[0]
            sound = experts.sync_sound(sync, lipsync.log_mel(heard), features)
            video, audio = experts.embed_clip(sync, pictures, sound)
            row["accuracy" + name] = experts.sync_accuracy(video, audio)
            second = min(FPS, len(video) // 2)
            row["accuracy_1s" + name] = experts.sync_accuracy(video, audio, second)
        late, G = int(rng.integers(-7, 8)), len(video)
        curve = experts.sync_curve(video[max(0, late):G + min(0, late)],
                                   audio[max(0, -late):G - max(0, late)])
        row["shift"] = float(abs(experts.read_curve(curve)[0] - late) <= 1)
    if reader is not None and clip.text:
        video = pictures[None] / 255
        row["cer"] = experts.character_error_rate(reader.read(video)[0], clip.text)
        tokens = [torch.tensor([data.encode_text(text)]) for text in (clip.text, text_of_another)]
        costs = [float(losses.lip_reading_loss(reader(video, one), one, data.PAD)) for one in tokens]
        row["reads"] = float(costs[0] < costs[1])
    return row


# ---------------------------------------------------------------- the table
def evaluate(run, weights):
    """The held-out table {folder: {row: {column: number}}}.

    Rows: lips (no pictures), model, copy (the middle reference's lower half), silence, real,
    each amplitude, experts. At most eval_clips of each folder. A video's own sound may be late: the
    best lag within 3 frames has a column of its own."""
    networks = experts.load_networks(weights, "cpu")
    print_speed(networks.net)
    table, rng = {}, np.random.default_rng(0)
    texts = sorted({info.text for info in run.held_out} - {""}) or [""]
    with faces.FaceTracker() as tracker:
        for info in tqdm(choose_clips(run.held_out, run.config.eval_clips), desc="eval", unit="clip"):
            clip, rows = data.load_or_skip(info.path), table.setdefault(info.folder(), {})
            if clip is None:
                continue
            for name, row in clip_rows(run, networks, clip, tracker, not rows, info.folder()):
                rows.setdefault(name, []).append(row)
            other = texts[int(rng.integers(len(texts)))]
            rows.setdefault("experts", []).append(measure_experts(networks, clip, other, rng))
    return {folder: {name: average(some) for name, some in rows.items()}
            for folder, rows in table.items()}


def clip_rows(run, networks, clip, tracker, first, folder):
    """Yields (name, row) of one clip; of a folder's first clip also writes the strip."""
    net, wave = networks.net, torch.from_numpy(clip.sound())
    with torch.inference_mode():
        features = networks.audio_encoder(wave[None])[0]  # [T, D]
        silent = networks.audio_encoder(torch.zeros_like(wave)[None])[0]
    true = np.stack([clip.frame(i) for i in range(len(clip))])
    refs, _ = clip_points(clip, net.config)
    copy = true.copy()
    copy[:, faces.CROP_PX // 2:] = true[refs[len(refs) // 2], faces.CROP_PX // 2:]
    sound = networks.sync and experts.sync_sound(networks.sync, clip.mel, features)
    if net.lip_head is not None:
        yield "lips", measure_lips(net, clip, features, silent)
    made = redraw_clip(net, clip, features)
    if first:
        name = "videos" if folder == "." else folder.replace("/", "_")
        save_strip(run.out / f"strip_{name}.png", true[refs], made, true)
    pictures = dict(model=made, copy=copy, silence=redraw_clip(net, clip, silent), real=true)
    for name, these in pictures.items():
        yield name, measure_pictures(these, true, clip, tracker, networks, sound)
    for amplitude in AMPLITUDES:
        points = find_landmarks(tracker, redraw_clip(net, clip, features, amplitude))
        opening = {} if points is None else {
            "opening": float(faces.mouth_shape(points)[:, 0].mean())}
        yield f"amplitude {amplitude:g}", opening


def choose_clips(infos, count):
    """At most `count` clips of each folder, evenly spread over it, each video once before any twice"""
    folders = {}
    for info in infos:
        folders.setdefault(info.folder(), []).append(info)
    chosen = []
    for some in folders.values():
        seen, turns = {}, []
        for info in some:
            turns.append((seen.setdefault(info.source, 0), info.path))
            seen[info.source] += 1
        order = [info for _, info in sorted(zip(turns, some), key=lambda pair: pair[0])]
        first = [info for (turn, _), info in sorted(zip(turns, some), key=lambda pair: pair[0]) if turn == 0]
        step = max(1, len(first) // count)
        spread = first[::step] if len(first) >= count else order
        chosen += spread[:count]
    return chosen


def average(rows):
    """Dicts with some of the same keys -> one: how many, and the mean of each column; of a lag or an
    offset the median."""
    result = {"clips": len(rows)}
    for name in sorted({name for row in rows for name in row}):
        values = [row[name] for row in rows if name in row]
        result[name] = float(np.median(values) if name in ("lag", "offset") else np.mean(values))
    return result


def save_strip(png, refs, made, true, count=10):
    """A clip over time, `count` moments from left to right; rows closed reference | open reference |
    output | truth."""
    at = np.linspace(0, len(true) - 1, count).round().astype(int)
    rows = [np.stack([refs[0]] * count), np.stack([refs[-1]] * count), made[at], true[at]]
    sheet = np.stack(rows).transpose(0, 2, 1, 3, 4).reshape(4 * faces.CROP_PX, -1, 3)
    cv2.imwrite(str(png), sheet[..., ::-1])


@torch.inference_mode()
def print_speed(net):
    """Multiply-adds, and milliseconds a frame of each part in batches of 8"""
    inputs = [x.to(next(net.parameters()).device) for x in lipsync.example(net.config, BATCH)]
    total, _ = lipsync.gmac(net, *inputs)
    whole = 1000 * lipsync.seconds_a_frame(net, BATCH)
    print(f"network: {total / BATCH:.3f} GMAC, {whole:.1f} ms a frame in batches of {BATCH} "
          f"({1000 / whole:.0f} frames/s)")
    refs, masked, audio, _, points = inputs
    image, skips = net.image_encoder(refs, masked)
    tokens = net.fusion.encode_audio(audio)
    parts = {"image encoder": (net.image_encoder, refs, masked), "fusion": (net.fusion.exchange, image, tokens),
             "decoder": (net.decoder, image, skips, refs, masked)}
    if net.lip_head is not None:
        parts["warp"] = net.warp, refs, points[:, :, 0], points[:, :, 1]
    for name, (part, *given) in parts.items():
        times = []
        for _ in range(5):
            start = time.perf_counter()
            part(*given)
            times.append(time.perf_counter() - start)
        print(f"  {name}: {1000 * min(times) / BATCH:.1f} ms")


def print_table(table):
    """Three: lips, pictures, experts."""
    for kind, columns in COLUMNS.items():
        widths = [max(9, len(column) + 2) for column in columns]
        for folder, rows in table.items():
            print(f"\n{folder:14}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths)))
            for name, row in rows.items():
                belongs = name if name in ("lips", "experts") else "pictures"
                if belongs == kind:
                    cells = [f"{row[c]:{w}.3g}" if c in row else f"{'-':>{w}}"
                             for c, w in zip(columns, widths)]
                    print(f"{name:14}" + "".join(cells))
