"""The held-out table: how good lips, pictures, experts and baselines are on clips never trained on.

    stage    | code
    lips     | measure_lips: no pictures
    pictures | redraw_clip, metrics.measure_pictures, save_strip
    experts  | metrics.measure_experts
    speed    | forward_parts, measure_speed: on this machine
    table    | evaluate, print_table

`python train.py --stage eval` runs it, on the CPU. Clips, pictures and points as in data.py and
faces.py: crops of 256 x 256 px, uint8; lips and openings in px of such a crop. The pictures are
made by lipsync.redraw, as infer.py makes them.
"""
import collections
import time

import numpy as np
import torch
from tqdm import tqdm

import data
import experts
import faces
import lipsync
import media
import sampling
from bench import metrics

BATCH = 8  # frames that are redrawn together
AMPLITUDES = (0.5, 1.5, 2)  # measured beside 1
MOMENTS = 10  # of a strip, from left to right
COLUMNS = {
    "lips": ("clips", "r", "r_best", "r_width", "r_rounding", "error", "deviation", "opening",
             "silence", "shift", "amp_0.5", "amp_1.5", "jaw", "jaw_posed"),
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


def redraw_clip(net, clip, features, amplitude=1.0, true_lips=False):
    """A clip redrawn from its own upper halves and `features` [L, D] -> uint8 [T, 256, 256, 3]

    true_lips: with its own lips, not those that the sound asks for."""
    refs, points = sampling.clip_points(clip.landmarks, net.config)
    audio, crops = sampling.clip_audio(net.config, features, len(clip)), clip_frames(clip)
    shown, made = crops[refs], []
    for start in range(0, len(clip), BATCH):
        now = slice(start, start + BATCH)
        lips = faces.place_lips(clip.landmarks[now]) if true_lips else None
        made.append(lipsync.redraw(net, shown, crops[now], points[now], audio[now], amplitude,
                                   lips))
    return np.concatenate(made)


@torch.inference_mode()
def predict_shapes(net, clip, features, amplitude=1.0):
    """What the sound alone asks for -> landmarks [T, K, 3] crop px, their mouth_shape [T, 3]"""
    landmarks = sampling.predict_landmarks(net, clip.landmarks, features, amplitude)
    return landmarks, faces.mouth_shape(landmarks)


@torch.inference_mode()
def warp_reference(net, clip, features, at):
    """The last reference as the network sees it at frames `at` [n], with each frame's head pose
    and predicted lips -> uint8 [n, 256, 256, 3]"""
    refs, points = sampling.clip_points(clip.landmarks, net.config)
    points = torch.from_numpy(points[at])  # [n, R, 2, K, 2]
    audio = sampling.clip_audio(net.config, features, len(clip))[at]
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
    refs, _ = sampling.clip_points(clip.landmarks, net.config)
    rows = [true[[number] * MOMENTS] for number in (refs[0], refs[-1])]
    if net.lip_head is not None:
        rows.append(warp_reference(net, clip, features, at))
    rows += [made[at], true[at]]
    sheet = np.concatenate([np.concatenate(row, 1) for row in rows])
    media.save_png(png, sheet)


# ---------------------------------------------------------------- the lips alone


def measure_lips(net, clip, features, silent, late):
    """One row without a picture: what the sound asks for against what the landmarks say.

    error: of the lips, px; deviation: of the gap over time, made / true; silence: mean gap in
    silence, px; shift: whether a sound moved by `late` frames is found to be; amp_A: mean gap at
    amplitude A / at 1; jaw, jaw_posed: how far the closed reference's jaw lies from the frame's,
    as it is and with the frame's head pose, px."""
    true = clip.landmarks
    landmarks, shapes = predict_shapes(net, clip, features)
    wanted = faces.mouth_shape(true)  # [T, 3]
    row = metrics.compare_shapes(shapes, wanted)
    row["error"] = metrics.point_error(landmarks, true, metrics.LIPS)
    deviation, true_deviation = shapes[:, 0].std(), wanted[:, 0].std()
    row["deviation"] = deviation / max(true_deviation, 0.1)
    row["shift"] = metrics.lips_find_shift(shapes[:, 0], wanted[:, 0], late)
    _, shapes = predict_shapes(net, clip, silent)
    row["silence"] = shapes[:, 0].mean()
    for amplitude in (0.5, 1.5):
        _, shapes = predict_shapes(net, clip, features, amplitude)
        row[f"amp_{amplitude}"] = shapes[:, 0].mean() / max(row["opening"], 0.1)
    _, points = sampling.clip_points(clip.landmarks, net.config)
    here, posed = points[:, 0, 0], points[:, 0, 1]  # [T, K, 2]
    row["jaw"] = metrics.point_error(here * faces.CROP_PX, true, faces.JAW)
    row["jaw_posed"] = metrics.point_error(posed * faces.CROP_PX, true, faces.JAW)
    return row


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

    Rows: lips (no pictures), model, true lips (the model given them: what is lost in drawing, not
    in hearing), copy (the middle reference's lower half), silence, real, each amplitude, experts.
    At most eval_clips of each folder."""
    networks = experts.load_networks(weights, "cpu")
    collected, rng = {}, np.random.default_rng(0)
    texts = {info.text for info in run.held_out if info.readable()}
    chosen = choose_clips(run.held_out, run.config.eval_clips)
    with faces.FaceTracker() as tracker:
        for info in tqdm(chosen, desc="eval", unit="clip"):
            clip, rows = data.load_or_skip(info.path), collected.setdefault(info.folder(), {})
            if clip is None:
                continue
            folder = {".": "videos"}.get(info.folder(), info.folder().replace("/", "_"))
            strip = None if rows else run.out / f"strip_{folder}.png"
            late = int(rng.integers(-7, 8))
            for name, row in clip_rows(networks, clip, tracker, strip, late):
                rows.setdefault(name, []).append(row)
            others = sorted(texts - {clip.text}) if info.readable() else []
            row = metrics.measure_experts(networks, clip, others, rng, late)
            rows.setdefault("experts", []).append(row)
    table = {}
    for folder, rows in collected.items():
        table[folder] = {name: average(some) for name, some in rows.items()}
    table.setdefault("speed", {}).update(speed_rows(networks.net))
    return table


def clip_rows(networks, clip, tracker, strip, late):
    """Yields (name, row) of one clip; writes the PNG `strip` if it is not None. late: frames by
    which its sound is moved, to see whether that is found."""
    net, wave = networks.net, torch.from_numpy(clip.sound())
    with torch.inference_mode():
        features = networks.audio_encoder(wave[None])[0]  # [L, D]
        silent = networks.audio_encoder(torch.zeros_like(wave)[None])[0]
    sound = networks.sync and experts.sync_sound(networks.sync, clip.mel, features)
    if net.lip_head is not None:
        yield "lips", measure_lips(net, clip, features, silent, late)
    true, made = clip_frames(clip), redraw_clip(net, clip, features)
    if strip:
        save_strip(strip, net, clip, features, made)
    refs, _ = sampling.clip_points(clip.landmarks, net.config)
    copy = true.copy()
    copy[:, metrics.HALF:] = true[refs[len(refs) // 2], metrics.HALF:]
    pictures = dict(model=made)
    if net.lip_head is not None:
        pictures["true lips"] = redraw_clip(net, clip, features, true_lips=True)
    pictures |= dict(copy=copy, silence=redraw_clip(net, clip, silent), real=true)
    for name, these in pictures.items():
        yield name, metrics.measure_pictures(these, true, clip, tracker, networks, sound)
    for amplitude in AMPLITUDES:
        points = metrics.find_landmarks(tracker, redraw_clip(net, clip, features, amplitude))
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
