"""The held-out table: how good lips, pictures, experts and baselines are on clips never trained on.

    stage    | code
    lips     | measure_lips: no pictures
    pictures | redraw_clip, measure_pictures, save_strip
    experts  | measure_experts
    speed    | forward_parts, measure_speed: on this machine
    table    | evaluate, print_table

`python train.py --stage eval` runs it, on the CPU. Clips, pictures and points as in data.py and
faces.py: crops of 256 x 256 px, uint8; lips and openings in px of such a crop. The pictures are
made by lipsync.redraw, as infer.py makes them.
"""
import collections
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
import sampling

BATCH = 8  # frames that are redrawn together
HALF = faces.CROP_PX // 2  # the first row that is drawn anew
LIPS = faces.LIPS_OUTER + faces.LIPS_INNER
OPEN_PX = 8  # height of a mouth that shows its teeth
AMPLITUDES = (0.5, 1.5, 2)  # measured beside 1
REACH = 3  # frames: a video's own sound may be off by so much
MOMENTS = 10  # of a strip, from left to right
COLUMNS = {
    "lips": ("clips", "r", "r_best", "r_width", "r_rounding", "error", "deviation", "opening",
             "silence", "amp_0.5", "amp_1.5", "jaw", "jaw_posed"),
    "pictures": ("clips", "r", "r_best", "lag", "r_width", "r_rounding", "lmd", "psnr", "ssim",
                 "sharpness", "seam", "teeth", "opening", "offset", "confidence", "cer"),
    "experts": ("clips", "accuracy", "accuracy_10db", "accuracy_1s", "accuracy_1s_10db", "shift",
                "cer", "reads"),
    "speed": ("gmac", "sound+lips", "warp", "image encoder", "fusion", "decoder", "all",
              "threads")}


# ---------------------------------------------------------------- one clip, drawn again
def clip_frames(clip):
    """-> uint8 [T, 256, 256, 3]"""
    return np.stack([clip.frame(i) for i in range(len(clip))])


def redraw_clip(net, clip, features, amplitude=1.0):
    """A clip redrawn from its own upper halves and `features` [L, D] -> uint8 [T, 256, 256, 3]"""
    refs, points = sampling.clip_points(clip, net.config)
    audio, crops = sampling.clip_audio(net, clip, features), clip_frames(clip)
    made = []
    for start in range(0, len(clip), BATCH):
        now = slice(start, start + BATCH)
        made.append(lipsync.redraw(net, crops[refs], crops[now], points[now], audio[now],
                                   amplitude))
    return np.concatenate(made)


@torch.inference_mode()
def predict_shapes(net, clip, features, amplitude=1.0):
    """What the sound alone asks for -> landmarks [T, K, 3] crop px, their mouth_shape [T, 3]"""
    landmarks = sampling.predict_landmarks(net, clip, features, amplitude)
    return landmarks, faces.mouth_shape(landmarks)


@torch.inference_mode()
def warp_reference(net, clip, features, at):
    """The last reference as the network sees it at frames `at` [n], with each frame's head pose
    and predicted lips -> uint8 [n, 256, 256, 3]"""
    refs, points = sampling.clip_points(clip, net.config)
    points = torch.from_numpy(points[at])  # [n, R, 2, K, 2]
    audio = sampling.clip_audio(net, clip, features)[at]
    lips = net.predict_lips(audio, 1.0, points)
    crop = torch.from_numpy(clip.frame(refs[-1]).copy())
    picture = crop.permute(2, 0, 1).float() / 255  # [3, 256, 256]
    last = picture.expand(len(at), 1, -1, -1, -1)
    moved = net.move_references(last, points[:, -1:], lips)[:, 0]
    return (moved * 255).round().byte().permute(0, 2, 3, 1).numpy()


def save_strip(png, net, clip, features, made):
    """A clip over time, MOMENTS frames from left to right. The rows, from the top:

    the first reference, the one with the most closed mouth (the same picture in each column);
    the last reference, unlike the others;
    the last reference, warped: with each frame's head pose and the lips predicted from the sound,
        as the network gets it (no such row where the network warps nothing);
    the output, made [T, 256, 256, 3];
    the truth.
    """
    at = np.linspace(0, len(clip) - 1, MOMENTS).round().astype(int)
    true = clip_frames(clip)
    refs, _ = sampling.clip_points(clip, net.config)
    rows = [true[[number] * MOMENTS] for number in (refs[0], refs[-1])]
    if net.lip_head is not None:
        rows.append(warp_reference(net, clip, features, at))
    rows += [made[at], true[at]]
    sheet = np.concatenate([np.concatenate(row, 1) for row in rows])
    cv2.imwrite(str(png), sheet[..., ::-1])


# ---------------------------------------------------------------- figures of lips
def correlation(a, b):
    """Pearson r of two series; 0 if one of them does not move."""
    a, b = a - a.mean(), b - b.mean()
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / max(size, 1e-9)


def shifted(made, true, reach):
    """{shift in frames: r}; + = the made mouth is late"""
    scores = {}
    for shift in range(-reach, reach + 1):
        late, early = max(0, shift), max(0, -shift)
        common = len(true) - abs(shift)
        scores[shift] = correlation(made[late:late + common], true[early:early + common])
    return scores


def lag_of(made, true, reach=5):
    """Shift in frames at which the correlation peaks; + = the made mouth is late."""
    scores = shifted(made, true, reach)
    nearest_first = sorted(scores, key=abs)
    return max(nearest_first, key=scores.get)


def compare_shapes(made, true):
    """mouth_shape [T, 3] of made and true mouths -> the columns that both tables share: r of the
    gap, also at the best shift, of the width, of the rounding; the mean gap in px."""
    row = {"opening": made[:, 0].mean()}
    for name, a, b in zip(("r", "r_width", "r_rounding"), made.T, true.T):
        row[name] = correlation(a, b)
    scores = shifted(made[:, 0], true[:, 0], REACH)
    row["r_best"] = max(scores.values())
    return row


def point_error(made, true, which):
    """Mean distance in px of the points `which`; made, true [T, K, 2 or 3]"""
    step = made[:, which, :2] - true[:, which, :2]
    return np.linalg.norm(step, axis=-1).mean()


def measure_lips(net, clip, features, silent):
    """One row without a picture: what the sound asks for against what the landmarks say.

    error: of the lips, px; deviation: of the gap over time, made / true; silence: mean gap in
    silence, px; amp_A: mean gap at amplitude A / at 1; jaw, jaw_posed: how far the closed
    reference's jaw lies from the frame's, as it is and with the frame's head pose, px."""
    true = clip.landmarks
    landmarks, shapes = predict_shapes(net, clip, features)
    row = compare_shapes(shapes, faces.mouth_shape(true))
    row["error"] = point_error(landmarks, true, LIPS)
    row["deviation"] = shapes[:, 0].std() / max(faces.mouth_shape(true)[:, 0].std(), 0.1)
    _, shapes = predict_shapes(net, clip, silent)
    row["silence"] = shapes[:, 0].mean()
    for amplitude in (0.5, 1.5):
        _, shapes = predict_shapes(net, clip, features, amplitude)
        row[f"amp_{amplitude}"] = shapes[:, 0].mean() / max(row["opening"], 0.1)
    _, points = sampling.clip_points(clip, net.config)
    here, posed = points[:, 0, 0], points[:, 0, 1]  # [T, K, 2]
    row["jaw"] = point_error(here * faces.CROP_PX, true, faces.JAW)
    row["jaw_posed"] = point_error(posed * faces.CROP_PX, true, faces.JAW)
    return row


# ---------------------------------------------------------------- figures of pictures
def psnr(made, true):
    """Mean over the frames of 10 log10(255^2 / mean squared error), decibels; uint8 [T, h, w, 3]"""
    step = made.astype(np.float64) - true
    error = (step ** 2).mean((1, 2, 3))
    decibels = 10 * np.log10(255 ** 2 / error.clip(0.01))
    return decibels.mean()


def ssim(a, b):
    """Structural similarity of two pictures uint8 [h, w, 3], on luma, Gaussian window of 1.5 px;
    1 = the same. Source: Wang et al. 2004."""
    a, b = np.float64(luma(a)), np.float64(luma(b))
    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a ** 2
    var_b = blur(b * b) - mean_b ** 2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 2.55 ** 2, 7.65 ** 2  # 1 % and 3 % of 255
    light = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (light * structure).mean()


def blur(x):
    return cv2.GaussianBlur(x, (11, 11), 1.5)


def luma(picture):
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)


def lip_boxes(landmarks):
    """[T, K, 3] crop px -> int [T, 4] (x0, y0, x1, y1), the outer lips with a margin of a fifth"""
    lips = landmarks[:, faces.LIPS_OUTER, :2]
    low, high = lips.min(1), lips.max(1)
    size = high - low
    margin = 0.2 * size.max(1, keepdims=True)
    boxes = np.concatenate([low - margin, high + margin], 1)
    return boxes.clip(0, faces.CROP_PX).round().astype(int)


def sharpness(made, true, landmarks):
    """Variance of the Laplacian around the lips, made / true, median over the frames"""
    ratios = []
    for ours, theirs, (x0, y0, x1, y1) in zip(made, true, lip_boxes(landmarks)):
        ours = cv2.Laplacian(luma(ours[y0:y1, x0:x1]), cv2.CV_64F)
        theirs = cv2.Laplacian(luma(theirs[y0:y1, x0:x1]), cv2.CV_64F)
        ratios.append(ours.var() / max(theirs.var(), 1e-6))
    return np.median(ratios)


def seam(pictures):
    """Mean absolute step across the middle row, 0..255. uint8 [T, 256, 256, 3]"""
    step = pictures[:, HALF].astype(int) - pictures[:, HALF - 1]
    return np.abs(step).mean()


def teeth_variation(pictures, landmarks):
    """How much the inside of an open mouth changes its look over time: the mean deviation of its
    luma, 0..255; None with fewer than 5 open frames."""
    looks = []
    for picture, lips in zip(pictures, landmarks[:, faces.LIPS_INNER, :2]):
        x0, y0 = lips.min(0).astype(int).clip(0)
        x1, y1 = lips.max(0).astype(int) + 1
        if y1 - y0 >= OPEN_PX:
            inside = luma(picture[y0:y1, x0:x1])
            looks.append(cv2.resize(inside, (24, 12), interpolation=cv2.INTER_AREA))
    return np.std(looks, 0).mean() if len(looks) >= 5 else None


def find_landmarks(tracker, pictures):
    """MediaPipe on crops: uint8 [T, 256, 256, 3] -> float32 [T, K, 3] px, gaps interpolated; None
    if no face at all."""
    tracker.forget()
    found = [tracker.find(picture) for picture in pictures]
    points = faces.follow_face(found)
    return faces.fill_gaps(points) if np.isfinite(points).any() else None


def measure_pictures(made, true, clip, tracker, networks, sound):
    """One row: what is made of a clip against what is true, both uint8 [T, 256, 256, 3]; sound as
    the sync expert hears it. psnr, ssim: of the lower halves; seam: made - true."""
    lower, true_lower = made[:, HALF:], true[:, HALF:]
    row = {"psnr": psnr(lower, true_lower)}
    row["ssim"] = np.mean([ssim(a, b) for a, b in zip(lower[::5], true_lower[::5])])
    row["sharpness"] = sharpness(made, true, clip.landmarks)
    row["seam"] = seam(made) - seam(true)
    points = find_landmarks(tracker, made)
    if points is not None:
        row |= measure_mouths(points, made, true, clip.landmarks)
    return row | ask_experts(networks, lower, sound, clip.text)


def measure_mouths(points, made, true, landmarks):
    """lmd: distance of the lips found in the made pictures, px; teeth: their variation, made / true
    (no entry where one has none); points, landmarks [T, K, 3]"""
    shapes, wanted = faces.mouth_shape(points), faces.mouth_shape(landmarks)
    row = compare_shapes(shapes, wanted)
    row["lag"] = lag_of(shapes[:, 0], wanted[:, 0])
    row["lmd"] = point_error(points, landmarks, LIPS)
    ours, theirs = teeth_variation(made, points), teeth_variation(true, landmarks)
    if ours is not None and theirs is not None:
        row["teeth"] = ours / max(theirs, 1e-6)
    return row


def ask_experts(networks, lower, sound, text):
    """What the experts say of lower halves, uint8 [T, 128, 256, 3]: offset, frames; confidence;
    cer: character error rate of the text that is read"""
    row, planes = {}, torch.from_numpy(lower).permute(0, 3, 1, 2)
    small = fn.avg_pool2d(planes.float() / 255, 2)  # [T, 3, 64, 128]
    if networks.sync is not None:
        found = experts.measure_offset(networks.sync, small, sound)
        row |= dict(offset=found["offset"], confidence=found["confidence"])
    if networks.reader is not None and text:
        read = networks.reader.read(small[None])[0]
        row["cer"] = experts.character_error_rate(read, text)
    return row


# ---------------------------------------------------------------- figures of the experts
@torch.no_grad()
def measure_experts(networks, clip, text_of_another, rng):
    """One row: how well the experts judge a real clip; _10db: with white noise 10 dB below the
    speech."""
    row, sync = {}, networks.sync
    pictures = torch.from_numpy(sampling.lower_halves(clip, range(len(clip))))  # [T, 3, 64, 128]
    if sync is not None and len(clip) > 2 * experts.GROUP + 7:
        wave = clip.sound()
        noisy = sampling.add_noise(wave, 10, rng).clip(-1, 1)
        for name, heard in (("_10db", noisy), ("", wave)):
            features = networks.audio_encoder(torch.from_numpy(heard)[None])[0]
            sound = experts.sync_sound(sync, lipsync.log_mel(heard), features)
            video, audio = experts.embed_clip(sync, pictures, sound)
            row["accuracy" + name] = experts.sync_accuracy(video, audio)
            second = min(lipsync.FPS, len(video) // 2)
            row["accuracy_1s" + name] = experts.sync_accuracy(video, audio, second)
        row["shift"] = shift_found(video, audio, int(rng.integers(-7, 8)))
    if networks.reader is not None and clip.text:
        row |= measure_reader(networks.reader, pictures[None] / 255, clip.text, text_of_another)
    return row


def shift_found(video, audio, late):
    """Whether a sound that is `late` frames too late is found to be so, to within one frame;
    video, audio [G, E] of a clip in sync"""
    common = len(video) - abs(late)
    lips, sound = video[max(0, late):], audio[max(0, -late):]
    curve = experts.sync_curve(lips[:common], sound[:common])
    offset, _, _ = experts.read_curve(curve)
    return abs(offset - late) <= 1


def measure_reader(reader, video, text, text_of_another):
    """cer: character error rate; reads: whether the true text costs less than another's"""
    costs = []
    for some in (text, text_of_another):
        tokens = torch.tensor([sampling.encode_text(some)])
        cost = losses.lip_reading_loss(reader(video, tokens), tokens, sampling.PAD)
        costs.append(float(cost))
    read = reader.read(video)[0]
    return dict(cer=experts.character_error_rate(read, text), reads=costs[0] < costs[1])


# ---------------------------------------------------------------- speed
def forward_parts(net, refs, masked, audio, amplitude, points):
    """LipSync.forward part by part: yields (name, what it has made), the picture last."""
    tokens = net.fusion.encode_audio(audio, amplitude)
    lips = None if net.lip_head is None else net.lip_head(tokens, points)
    yield "sound+lips", lips
    if lips is not None:
        refs = net.move_references(refs, points, lips)
        yield "warp", refs
    image, skips = net.image_encoder(refs, masked)
    yield "image encoder", image
    fused = net.fusion.exchange(image, tokens)
    yield "fusion", fused
    yield "decoder", net.decoder(fused, skips, refs, masked)


@torch.inference_mode()
def measure_speed(net, seconds=1.0):
    """One row: gmac, 1e9 multiply-adds of a frame; milliseconds a frame of each part and of all, in
    batches of BATCH on this CPU, the fastest within `seconds`; threads."""
    gmac, _ = lipsync.gmac(net, *lipsync.example(net.config))  # and all is warm
    inputs = lipsync.example(net.config, BATCH)
    row, laps = {}, collections.defaultdict(list)
    begin = now = time.perf_counter()
    while not laps or now - begin < seconds:
        now = time.perf_counter()
        for part, _ in forward_parts(net, *inputs):
            start, now = now, time.perf_counter()
            laps[part].append(now - start)
    for part, times in laps.items():
        row[part] = 1000 * min(times) / BATCH
    total = sum(row.values())
    return dict(gmac=gmac, **row, all=total, threads=torch.get_num_threads())


def speed_rows(net):
    """measure_speed of this network and of each preset's, with weights of the same type"""
    rows = {"network": measure_speed(net)}
    dtype = next(net.parameters()).dtype
    for preset, config in lipsync.PRESETS.items():
        fresh = lipsync.LipSync(config).to(dtype=dtype, memory_format=torch.channels_last)
        rows[preset] = measure_speed(fresh.eval())
    return rows


# ---------------------------------------------------------------- the table
def evaluate(run, weights):
    """The held-out table {folder: {row: {column: number}}}, and {"speed": {network: {...}}}.

    Rows: lips (no pictures), model, copy (the middle reference's lower half), silence, real,
    each amplitude, experts. At most eval_clips of each folder."""
    networks = experts.load_networks(weights, "cpu")
    collected, rng = {}, np.random.default_rng(0)
    texts = sorted({info.text for info in run.held_out} - {""}) or [""]
    chosen = choose_clips(run.held_out, run.config.eval_clips)
    with faces.FaceTracker() as tracker:
        for info in tqdm(chosen, desc="eval", unit="clip"):
            clip, rows = data.load_or_skip(info.path), collected.setdefault(info.folder(), {})
            if clip is None:
                continue
            folder = {".": "videos"}.get(info.folder(), info.folder().replace("/", "_"))
            strip = None if rows else run.out / f"strip_{folder}.png"
            for name, row in clip_rows(networks, clip, tracker, strip):
                rows.setdefault(name, []).append(row)
            other = texts[int(rng.integers(len(texts)))]
            rows.setdefault("experts", []).append(measure_experts(networks, clip, other, rng))
    table = {}
    for folder, rows in collected.items():
        table[folder] = {name: average(some) for name, some in rows.items()}
    table.setdefault("speed", {}).update(speed_rows(networks.net))
    return table


def clip_rows(networks, clip, tracker, strip):
    """Yields (name, row) of one clip; writes the PNG `strip` if it is not None."""
    net, wave = networks.net, torch.from_numpy(clip.sound())
    with torch.inference_mode():
        features = networks.audio_encoder(wave[None])[0]  # [L, D]
        silent = networks.audio_encoder(torch.zeros_like(wave)[None])[0]
    sound = networks.sync and experts.sync_sound(networks.sync, clip.mel, features)
    if net.lip_head is not None:
        yield "lips", measure_lips(net, clip, features, silent)
    true, made = clip_frames(clip), redraw_clip(net, clip, features)
    if strip:
        save_strip(strip, net, clip, features, made)
    refs, _ = sampling.clip_points(clip, net.config)
    copy = true.copy()
    copy[:, HALF:] = true[refs[len(refs) // 2], HALF:]
    pictures = dict(model=made, copy=copy, silence=redraw_clip(net, clip, silent), real=true)
    for name, these in pictures.items():
        yield name, measure_pictures(these, true, clip, tracker, networks, sound)
    for amplitude in AMPLITUDES:
        points = find_landmarks(tracker, redraw_clip(net, clip, features, amplitude))
        row = {}
        if points is not None:
            row["opening"] = faces.mouth_shape(points)[:, 0].mean()
        yield f"amplitude {amplitude:g}", row


def choose_clips(infos, count):
    """At most `count` clips of each folder, evenly spread, each video once before any twice"""
    folders = collections.defaultdict(list)
    for info in infos:
        folders[info.folder()].append(info)
    chosen = []
    for some in folders.values():
        turns, seen = collections.defaultdict(list), collections.Counter()
        for info in some:
            turns[seen[info.source]].append(info)
            seen[info.source] += 1
        order = sum(turns.values(), [])  # all videos' first clips, then all second ones
        if len(turns[0]) >= count:
            order = turns[0][::len(turns[0]) // count]
        chosen += order[:count]
    return chosen


def average(rows):
    """Dicts with some of the same keys -> one: how many, and the mean of each column; of a lag or
    an offset the median."""
    result = {"clips": len(rows)}
    for name in sorted({name for row in rows for name in row}):
        values = [row[name] for row in rows if name in row]
        middle = np.median if name in ("lag", "offset") else np.mean
        result[name] = float(middle(values))
    return result


def print_table(table):
    """Four: lips, pictures, experts, and the speed of the networks."""
    for kind, columns in COLUMNS.items():
        for folder, rows in table.items():
            some = {name: row for name, row in rows.items() if kind_of(name, row) == kind}
            if some:
                heads = [column.rjust(width_of(column)) for column in columns]
                print(f"\n{folder:14}" + "".join(heads))
            for name, row in some.items():
                print(f"{name:14}" + "".join(cell(row, column) for column in columns))
    print(f"\nspeed: 1e9 multiply-adds and milliseconds a frame, batches of {BATCH}, on this CPU")


def kind_of(name, row):
    """Which of COLUMNS a row has"""
    if "gmac" in row:
        return "speed"
    return name if name in COLUMNS else "pictures"


def width_of(column):
    return max(9, len(column) + 2)


def cell(row, column):
    text = f"{row[column]:.3g}" if column in row else "-"
    return text.rjust(width_of(column))
