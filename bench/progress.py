"""What a training run shows of itself: losses over the steps, and pictures of held-out clips."""
import csv

import cv2
import numpy as np
import torch

import common
import data
import lipsync
import media
import sampling

WIDTH, HEIGHT = 480, 200  # of a panel, px


def draw_curves(folder):
    """RUN/log.csv -> RUN/curves.png: a panel for each loss of each stage, two in a row"""
    log, curves = folder / "log.csv", {}
    if not log.is_file():
        return
    with open(log) as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        names = list(row)
        for name in names[2:names.index("lr")]:  # after stage and step
            if row[name]:
                point = int(row["step"]), float(row[name])
                curves.setdefault(f"{row['stage']} {name}", []).append(point)
    panels = []
    for title, points in curves.items():
        steps, values = np.array(points).T
        panels.append(draw_panel(title, steps, values))
    if len(panels) % 2 == 1:
        panels.append(np.full_like(panels[0], 255))
    if panels:
        pairs = zip(panels[::2], panels[1::2])
        rows = [np.hstack(pair) for pair in pairs]
        png = folder / "curves.png"
        media.save_png(png, np.vstack(rows)[..., ::-1])


def draw_panel(title, steps, values):
    """-> uint8 BGR [HEIGHT, WIDTH, 3]"""
    panel = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    left, right, top, bottom = 10, WIDTH - 10, 30, HEIGHT - 10
    x = np.interp(steps, [steps[0], steps[-1]], [left, right])
    spread = max(np.ptp(values), 1e-9)
    height = (values - values.min()) / spread  # 0..1
    y = bottom + (top - bottom) * height
    line = np.stack([x, y], 1)
    line = line.round().astype(np.int32)
    cv2.polylines(panel, [line], False, (160, 60, 20), 1, cv2.LINE_AA)
    words = f"{title}: {values[0]:.3g} .. {values[-1]:.3g}"
    cv2.putText(panel, words, (10, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0))
    return panel


@torch.no_grad()
def save_samples(run, net, encoder, step, rows=6):
    """samples/STEP.png: closed reference | last reference | output | truth, of held-out
    clips, or of training clips where none are held out."""
    net.eval()
    encoder.eval()
    infos = run.held_out or run.clips
    sheet = []
    every = max(1, len(infos) // rows)
    for info in infos[::every][:rows]:
        clip = data.load_or_skip(info.path)
        if clip is None:
            continue
        refs, points = sampling.clip_points(clip.landmarks, run.net_config)
        middle = len(clip) // 2
        pictures = np.stack([clip.frame(i) for i in [*refs, middle]])
        sound = torch.from_numpy(clip.sound()).to(run.device)
        features = encoder(sound[None])[0]  # [L, D]
        audio = sampling.clip_audio(net.config, features, len(clip))  # [T, F, D]
        *pictures, true = pictures
        now = points[[middle]], audio[[middle]]
        with common.autocast(run.device):
            made = lipsync.redraw(net, np.stack(pictures), true[None], *now)
        row = pictures[0], pictures[-1], made[0], true
        sheet.append(np.concatenate(row, 1))
    if not sheet:  # every one of them is broken, which load_or_skip said
        return
    folder = run.out / "samples"
    folder.mkdir(exist_ok=True)
    png, sheet = folder / f"{step:06d}.png", np.concatenate(sheet)
    media.save_png(png, sheet)
