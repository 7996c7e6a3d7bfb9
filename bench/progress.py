"""What a training run shows of itself: losses over the steps, and pictures of held-out clips."""
import csv

import cv2
import numpy as np
import torch

import common
import data
import lipsync
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
    panels = [draw_panel(title, *np.array(points).T) for title, points in curves.items()]
    if panels:
        panels += [np.full_like(panels[0], 255)] * (len(panels) % 2)
        pairs = zip(panels[::2], panels[1::2])
        cv2.imwrite(str(folder / "curves.png"), np.vstack([np.hstack(pair) for pair in pairs]))


def draw_panel(title, steps, values):
    """-> uint8 BGR [HEIGHT, WIDTH, 3]"""
    panel = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    x = 10 + (WIDTH - 20) * (steps - steps[0]) / max(np.ptp(steps), 1)
    y = HEIGHT - 10 - (HEIGHT - 40) * (values - values.min()) / max(np.ptp(values), 1e-9)
    line = np.stack([x, y], 1).round().astype(np.int32)
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
    for info in infos[::max(1, len(infos) // rows)][:rows]:
        clip = data.load_or_skip(info.path)
        if clip is None:
            continue
        refs, points = sampling.clip_points(clip, run.net_config)
        middle = len(clip) // 2
        pictures = np.stack([clip.frame(i) for i in [*refs, middle]])
        sound = torch.from_numpy(clip.sound())[None].to(run.device)
        audio = sampling.clip_audio(net, clip, encoder(sound)[0])[[middle]]  # [1, F, D]
        with common.autocast(run.device):
            made = lipsync.redraw(net, pictures[:-1], pictures[-1:], points[[middle]], audio)
        sheet.append(np.concatenate([pictures[0], pictures[-2], made[0], pictures[-1]], 1))
    if not sheet:  # every one of them is broken, which load_or_skip said
        return
    folder = run.out / "samples"
    folder.mkdir(exist_ok=True)
    cv2.imwrite(str(folder / f"{step:06d}.png"), np.concatenate(sheet)[..., ::-1])
