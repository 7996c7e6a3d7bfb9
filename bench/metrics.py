"""What the held-out table measures, one function each: of lips, of pictures, of the experts.

Clips, pictures and points as in data.py and faces.py: crops of 256 x 256 px, uint8 RGB; lips and
openings in px of such a crop.
"""
import cv2
import numpy as np
import torch
from torch.nn import functional as fn

import common
import experts
import faces
import lipreader
import losses
import sampling
from audio import log_mel

HALF = faces.CROP_PX // 2  # the first row that is drawn anew
LIPS = faces.LIPS_OUTER + faces.LIPS_INNER
OPEN_PX = 8  # height of a mouth that shows its teeth
REACH = 3  # frames within which r_best looks: a video's own sound may be late


# ---------------------------------------------------------------- of lips
def correlation(a, b):
    """Pearson r of two series; 0 if one of them does not move."""
    a, b = a - a.mean(), b - b.mean()
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / max(size, 1e-9)


def shifted(made, true, reach):
    """{shift in frames: r}; + = the made mouth is late"""
    scores = {}
    for shift in range(-reach, reach + 1):
        scores[shift] = correlation(*overlap(made, true, shift))
    return scores


def overlap(a, b, shift):
    """What two series of one length share once a is moved to be `shift` frames earlier"""
    count, late = len(a) - abs(shift), max(0, shift)
    early = late - shift
    return a[late:late + count], b[early:early + count]


def lag_of(made, true, reach=5):
    """Shift in frames at which the correlation peaks; + = the made mouth is late."""
    scores = shifted(made, true, reach)
    nearest_first = sorted(scores, key=abs)
    return max(nearest_first, key=scores.get)


def lips_find_shift(made, true, late):
    """Whether lips made from a sound that is moved to be `late` frames later tell so, to within one
    frame; openings [T]. A video's own delay counts as a miss."""
    seen, made_late = overlap(true, made, late)
    found = lag_of(made_late, seen, experts.MAX_SHIFT)
    return abs(found - late) <= 1


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


# ---------------------------------------------------------------- of pictures
def psnr(made, true):
    """Mean over the frames of 10 log10(255^2 / mean squared error), decibels; uint8 [T, h, w, 3]"""
    step = made.astype(np.float64) - true
    square = step ** 2
    error = square.mean((1, 2, 3)).clip(0.01)  # [T]
    ratio = 255 ** 2 / error
    decibels = 10 * np.log10(ratio)
    return decibels.mean()


def ssim(a, b):
    """Structural similarity of two pictures uint8 [h, w, 3], on luma, Gaussian window of 1.5 px;
    1 = the same. Source: Wang et al. 2004."""
    a, b = luma(a).astype(np.float64), luma(b).astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    light = alike(mean_a * mean_b, mean_a ** 2, mean_b ** 2, 2.55)  # 1 % of 255
    variance_a = blur(a * a) - mean_a ** 2
    variance_b = blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    structure = alike(covariance, variance_a, variance_b, 7.65)  # 3 % of 255
    return (light * structure).mean()


def alike(product, square_a, square_b, least):
    """1 where a = b: both factors of SSIM; `least` keeps flat places from dividing 0 by 0"""
    least = least ** 2
    shared = 2 * product + least
    return shared / (square_a + square_b + least)


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
        ours = laplacian_variance(ours[y0:y1, x0:x1])
        theirs = laplacian_variance(theirs[y0:y1, x0:x1])
        ratios.append(ours / max(theirs, 1e-6))
    return np.median(ratios)


def laplacian_variance(picture):
    edges = cv2.Laplacian(luma(picture), cv2.CV_64F)
    return edges.var()


def seam(pictures):
    """Mean absolute step across the middle row, 0..255. uint8 [T, 256, 256, 3]"""
    above, below = pictures[:, HALF - 1], pictures[:, HALF]
    step = below.astype(int) - above
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
    if len(looks) < 5:
        return None
    deviation = np.std(looks, 0)
    return deviation.mean()


def find_landmarks(tracker, pictures):
    """MediaPipe on crops: uint8 [T, 256, 256, 3] -> float32 [T, K, 3] px, gaps interpolated; None
    if no face at all."""
    tracker.forget()
    found = [tracker.find(picture) for picture in pictures]
    points = faces.follow_face(found)
    seen = np.isfinite(points)
    return faces.fill_gaps(points) if seen.any() else None


def measure_pictures(made, true, clip, tracker, networks, sound):
    """One row: what is made of a clip against what is true, both uint8 [T, 256, 256, 3]; sound as
    the sync expert hears it. psnr, ssim: of the lower halves; seam: made - true."""
    lower, true_lower = made[:, HALF:], true[:, HALF:]
    row = {"psnr": psnr(lower, true_lower)}
    every_fifth = zip(lower[::5], true_lower[::5])
    row["ssim"] = np.mean([ssim(a, b) for a, b in every_fifth])
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
    gap, true_gap = shapes[:, 0], wanted[:, 0]
    row["lag"] = lag_of(gap, true_gap)
    row["lmd"] = point_error(points, landmarks, LIPS)
    ours, theirs = teeth_variation(made, points), teeth_variation(true, landmarks)
    if ours is not None and theirs is not None:
        row["teeth"] = ours / max(theirs, 1e-6)
    return row


def ask_experts(networks, lower, sound, text):
    """What the experts say of lower halves, uint8 [T, 128, 256, 3]: offset, frames; confidence;
    cer: character error rate of the text that is read"""
    row, planes = {}, torch.from_numpy(lower).permute(0, 3, 1, 2)
    planes = planes.float() / 255  # [T, 3, 128, 256]
    small = fn.avg_pool2d(planes, 2)  # [T, 3, 64, 128]
    if networks.sync is not None:
        found = experts.measure_offset(networks.sync, small, sound)
        row |= dict(offset=found["offset"], confidence=found["confidence"])
    if networks.reader is not None and text:
        read = networks.reader.read(small[None])[0]
        row["cer"] = lipreader.character_error_rate(read, text)
    return row


# ---------------------------------------------------------------- of the experts
@torch.no_grad()
def measure_experts(networks, clip, texts, rng, late):
    """One row: how well the experts judge a real clip; _10db: with white noise 10 dB below the
    speech; shift: whether a sound moved by `late` frames is found to be; texts: other clips'."""
    row, sync = {}, networks.sync
    pictures = sampling.lower_halves(clip, range(len(clip)))
    pictures = torch.from_numpy(pictures)  # [T, 3, 64, 128]
    if sync is not None and len(clip) > 2 * experts.GROUP + 7:
        wave = clip.sound()
        noisy = sampling.add_noise(wave, 10, rng).clip(-1, 1)
        for name, heard in (("_10db", noisy), ("", wave)):
            batch = torch.from_numpy(heard)[None]
            features = networks.audio_encoder(batch)[0]
            sound = experts.sync_sound(sync, log_mel(heard), features)
            video, audio = experts.embed_clip(sync, pictures, sound)
            row["accuracy" + name] = experts.sync_accuracy(video, audio)
            second = min(common.FPS, len(video) // 2)
            row["accuracy_1s" + name] = experts.sync_accuracy(video, audio, second)
        row["shift"] = shift_found(video, audio, late)
    if networks.reader is not None and clip.text:
        other = [str(rng.choice(texts))] if texts else []
        row |= measure_reader(networks.reader, pictures[None] / 255, clip.text, other)
    return row


def shift_found(video, audio, late):
    """Whether a sound that is moved to be `late` frames later is found so, to within one frame, by
    the sync expert; video, audio [G, E] of a clip. A video's own delay counts as a miss."""
    curve = experts.sync_curve(*overlap(video, audio, late))
    offset, _, _ = experts.read_curve(curve)
    return abs(offset - late) <= 1


def measure_reader(reader, video, text, other):
    """cer: character error rate; reads: whether the true text costs less than the one in `other`,
    a list; left out where that is empty"""
    row = dict(cer=lipreader.character_error_rate(reader.read(video)[0], text))
    if other:
        costs = []
        for some in (text, *other):
            tokens = torch.tensor([lipreader.encode_text(some)])
            cost = losses.lip_reading_loss(reader(video, tokens), tokens, lipreader.PAD)
            costs.append(float(cost))
        row["reads"] = costs[0] < costs[1]
    return row
