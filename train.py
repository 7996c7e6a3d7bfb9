"""S3: trains the sync expert, the lip reader, and then the generator against both.

    stage     | code                       | patent
    sync      | sync_task                  | S3(1): syncXnet, trained as SyncNet was, robust to noise
    lip       | lip_task                   | S3(2): the lip reader
    generator | generator_task             | S3: five losses, Adam, warm-up, cosine, frozen experts
    eval      | bench/evaluate.py | the held-out table, with its baselines
    all       | fit                        | one loop for the three: schedule, log, checkpoint, resume

`python train.py --data DIR --preset edge` runs the stages that are not yet done and ends with the table. RUN/ holds config.json,
log.csv, samples/, curves.png, offsets.json, the resumable sync.pt, lip.pt, generator.pt, and weights.pt for infer.py; eval adds eval.json,
amplitude.png and a strip of pictures over time for each folder.
Axes as in lipsync.py and experts.py.
"""
import argparse
import csv
import dataclasses
import datetime
import inspect
import json
import math
import os
import pathlib
import re
import signal
import time
import zlib
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as fn
from tqdm import tqdm

import data
import experts
import lipsync
import losses
from lipsync import BadInput

STAGES = ("sync", "lip", "generator")
CHOICES = {"preset": (*lipsync.PRESETS,), "stage": ("all", *STAGES, "eval"), "gan": ("non_saturating", "patent"), "decoder": ("", "spade", "conv"),
           "expert_size": ("small", "full"), "sync_audio": ("", "features", "mel")}


@dataclass(frozen=True)
class TrainConfig:
    """Every number of a training run; each is a flag. Weights and schedules of the losses are here, none in code."""
    data: str = ""                   # folder of talking-head videos
    out: str = "run"                 # folder for checkpoints, log and pictures
    preset: str = "edge"             # size of the network: full, edge, tiny
    stage: str = "all"               # all, sync, lip, generator or eval
    audio_encoder: str = ""          # whisper name or file, wav2vec2:.., hubert:.., scratch; empty: the preset's
    decoder: str = ""                # spade or conv; empty: the preset's
    refs: int = 0                    # reference pictures R; 0: the preset's
    spacing: int = 0                 # of the audio window, frames; 0: the preset's
    one_way: bool = False            # fusion without audio looking at the image (ablation)
    no_mask: bool = False            # fusion without the upper-half mask (ablation)
    no_copy: bool = False            # decoder without ReferenceCopy: the patent's plain Sigmoid
    random_refs: bool = False        # references drawn at random instead of by the rule (ablation)
    steps: int = 20_000              # optimizer steps of the generator
    sync_steps: int = 4_000          # of the sync expert
    lip_steps: int = 4_000           # of the lip reader
    batch: int = 16                  # groups of S frames per step and process (S3); the sync expert takes four times as many
    group: int = 5                   # S, frames of a group (S3(1))
    micro: int = 0                   # groups per forward; fewer than batch accumulates gradients; 0: batch
    lr: float = 1e-4                 # Adam's, after warm-up (S3)
    sync_lr: float = 1e-3            # of the sync expert
    lip_lr: float = 1e-3             # of the lip reader
    warmup: float = 0.03             # share of the steps in which the rate rises from 0
    rec_weight: float = 1.0          # reconstruction loss
    mouth_weight: float = 4.0        # extra weight of the mouth's pixels inside it; 0 = the patent
    sync_weight: float = 0.01        # sync loss
    lip_weight: float = 0.1          # lip-reading loss
    perceptual_weight: float = 0.01  # perceptual loss, sum over scales
    gan_weight: float = 0.05         # adversarial loss
    sync_start: float = 0.5          # share of the steps before sync and lip losses enter
    gan_start: float = 0.5           # share of the steps before the adversarial loss enters
    gan: str = "non_saturating"      # or patent
    vgg: str = "imagenet"            # perceptual features: imagenet, a weight file, or random
    keep_offsets: bool = False       # leave each video's sound where it is, not where the sync expert finds it
    amplitude_share: float = 0.3     # share of samples that teach the amplitude coefficient
    expert_size: str = "small"       # small or full experts
    expert_weights: str = ""         # the full sync expert's ResNeXt starts from: imagenet, or a file; empty: from nothing
    sync_audio: str = ""             # what the sync expert hears: features (whisper's) or mel, through an encoder of its own; empty: by encoder
    min_sync_accuracy: float = 0.75  # below it the generator refuses to train on the expert
    held_out: str = ""               # comma-separated parts of the paths of videos never trained on, beside a hashed tenth
    weights: str = ""                # start from this checkpoint
    resume: bool = False             # continue the run in --out
    seed: int = 0
    workers: int = 1                 # loader processes
    device: str = "auto"             # auto, cpu, cuda, cuda:1
    checkpointing: bool = False      # recompute activations: less memory, more time
    compile: bool = False            # torch.compile the generator
    save_minutes: float = 5.0        # between checkpoints
    sample_steps: int = 500          # between sample pictures
    eval_clips: int = 40             # held-out clips measured by eval, spread over folders


# The weights above keep every gradient near the reconstruction's. Norms at weight 1 (by hand), edge preset after 50,000 frames: reconstruction 0.12,
# sync 8, GAN 0.9, and lip 0.1 (tiny preset). Sync at 0.03 drowned the picture; GAN at 0.01 did nothing.

# What a preset changes. VGG costs 25 times what the edge network costs, so without a GPU it stays away.
TRAINING = {
    "full": {},
    "edge": dict(batch=4, lr=5e-4, sync_lr=2e-3, perceptual_weight=0.0, mouth_weight=12.0),
    "tiny": dict(batch=4, lr=1e-3, sync_lr=2e-3, perceptual_weight=0.0, mouth_weight=12.0, sync_start=0.9, gan_start=0.9,
                 steps=2050, sync_steps=600, lip_steps=650, sample_steps=300, eval_clips=8),
}


# ---------------------------------------------------------------- what a run is made of
class Run:
    """What the stages share: config, device, clips, audio encoder, loaders; no training state."""

    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        own_gpu = self.world > 1 and config.device == "auto" and torch.cuda.is_available()
        self.config, self.device = config, lipsync.pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if own_gpu else config.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.out = pathlib.Path(config.out)
        if self.rank == 0 and (not data.list_clips(config.data) or data.list_videos(config.data)):
            data.print_report(data.prepare(config.data))             # a folder of prepared clips alone is fine, too
        if self.world > 1:
            torch.distributed.barrier()
        self.clips, self.held_out = data.split_clips(data.list_clips(config.data), config.held_out)
        self.net_config, self.audio_encoder = network_config(config)
        self.features = features_key(self.net_config.audio_encoder, self.audio_encoder)
        self.audio_encoder.to(self.device)
        self.sync_audio = config.sync_audio or ("features" if self.features else "mel")

    def loader(self, dataset, first, last, batch):
        """Batches first..last of an endless dataset: batch b of this process holds its own fixed sample numbers."""
        order = [((b * self.world + self.rank) * batch + i) for b in range(first, last) for i in range(batch)]
        return torch.utils.data.DataLoader(dataset, batch, sampler=order, num_workers=self.config.workers, generator=torch.Generator(),
                                           collate_fn=getattr(dataset, "collate", None), worker_init_fn=ignore_signals,
                                           prefetch_factor=4 if self.config.workers else None)


def ignore_signals(worker):
    """A signal to the whole group stops a run between two steps (fit), so its loader must outlive it."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)


def network_config(config):
    """The preset, or the config inside --weights, with what the flags change; and its audio encoder. -> Config, encoder"""
    saved = lipsync.load_checkpoint(config.weights) if config.weights else None
    base = lipsync.Config(**saved["config"]) if saved else lipsync.PRESETS[config.preset]
    changes = {name: getattr(config, name) for name in ("audio_encoder", "decoder", "refs", "spacing") if getattr(config, name)}
    changes.update({field: False for flag, field in (("one_way", "bidirectional"), ("no_mask", "mask_upper"), ("no_copy", "copy"))
                    if getattr(config, flag)}, checkpointing=config.checkpointing)
    try:
        net_config = dataclasses.replace(base, **changes)
    except ValueError as error:
        raise BadInput(str(error).split(", got")[0]) from None
    encoder = lipsync.build_audio_encoder(net_config, saved and not config.audio_encoder and saved["audio_encoder"] or None)
    family, source = lipsync.parse_audio_encoder(net_config.audio_encoder)
    path = pathlib.Path(source)                   # no path of this machine in the checkpoint
    name = f"{family}:{path.stem if path.is_file() else path.name if path.is_dir() else source}" if source else family
    return dataclasses.replace(net_config, audio_encoder=name, audio_dim=encoder.dim), encoder


def features_key(name, encoder):
    """Names the cached features of a frozen encoder: another encoder, or other weights, other files. None if it learns."""
    if not encoder.frozen:
        return None
    digest = 0
    for value in encoder.state_dict().values():
        digest = zlib.crc32(value.numpy().tobytes(), digest)
    return f"{name}-{digest:08x}"


def prepare_features(run, noisy=False):
    """A frozen audio encoder hears every clip once; its features lie beside the clip, float16 [T, D].

    noisy: also of the clip with noise, gain and reverb, which the sync expert learns to see through.
    """
    if not run.features:
        return
    jobs = [(clip, n) for clip in run.clips + run.held_out for n in ([False, True] if noisy else [False])
            if not data.feature_path(clip, run.features, n).is_file()]
    for path, noise in tqdm(jobs[run.rank::run.world], desc="audio features", unit="clip", disable=not jobs):
        clip = data.load_or_skip(path)
        if clip is None:
            continue
        wave = clip.sound()
        if noise:
            wave = data.corrupt_sound(wave, np.random.default_rng([run.config.seed, data.hash_of(path.name)]))
        features = run.audio_encoder(torch.from_numpy(wave)[None].to(run.device))[0]             # [T, D]
        features = fn.pad(features.mT[None], (0, max(0, len(clip) - len(features))), mode="replicate")[0].mT
        target = data.feature_path(path, run.features, noise)
        temporary = target.with_name(f".{os.getpid()}.{target.name}")
        np.save(temporary, features[:len(clip)].half().cpu().numpy())
        os.replace(temporary, target)
    if run.world > 1:
        torch.distributed.barrier()


# ---------------------------------------------------------------- one loop for the three stages
@dataclass
class Task:
    """What `fit` trains: parts with state_dict (modules, optimizers, schedulers), the step, the samples, the file."""
    name: str
    parts: dict                      # name -> module, optimizer or scheduler; all of it is saved and resumed
    step: object                     # (batch, step number) -> {loss name: float}; does backward and optimizer steps
    dataset: object
    steps: int
    batch: int
    frames: int                      # video frames per step and process, for frames/s
    content: object                  # () -> dict that goes into the checkpoint beside the state
    sample: object = None            # step number -> None, writes pictures


def adam(parameters, lr, steps, warmup):
    """Adam, rate rising from 0 in `warmup` of the steps, then CosineAnnealingLR to 0 (S3). -> optimizer, scheduler"""
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    rising = max(1, round(steps * warmup))
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / rising),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - rising))], milestones=[rising])


def update(run, modules, optimizer, scheduler):
    """Average gradients over processes, clip them to norm 1, step. -> the norm before clipping"""
    parameters = [p for m in modules for p in m.parameters() if p.grad is not None]
    if run.world > 1:
        for p in parameters:
            torch.distributed.all_reduce(p.grad)
            p.grad /= run.world
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def fit(run, task):
    """Train task.parts to task.steps; returns False if a signal stopped it early. Resumes if asked to."""
    config, path, first = run.config, run.out / f"{task.name}.pt", 0
    if config.resume and path.is_file():
        content = lipsync.load_checkpoint(path, task.content()["kind"])
        for name, part in task.parts.items():
            part.load_state_dict(content["state"][name])
        first = content["step"]
        torch.set_rng_state(content["random"][0])
        torch.cuda.set_rng_state_all(content["random"][1:])
    stop = []
    handlers = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGTERM, signal.SIGINT)}

    def save(step):
        if run.rank == 0:
            state = {name: part.state_dict() for name, part in task.parts.items()}
            random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
            lipsync.save_checkpoint(path, {**task.content(), "state": state, "step": step, "steps": task.steps, "random": random})

    if first == 0:
        save(0)                                   # a full disk or a wrong folder shows before the work, not after it
    log = Log(run.out / "log.csv", task.name, first) if run.rank == 0 else None
    bar = tqdm(total=task.steps, initial=first, desc=task.name, unit="step", disable=run.rank > 0, mininterval=1)
    saved_at = waited = began = time.perf_counter()
    waiting = 0.0
    step = logged = saved = first
    try:
        for batch in run.loader(task.dataset, first, task.steps, task.batch):
            waiting += time.perf_counter() - waited
            figures = task.step({k: v.to(run.device, non_blocking=True) for k, v in batch.items()}, step)
            bad = [k for k, v in figures.items() if not math.isfinite(v)]
            if bad:
                names = ", ".join(sorted({pathlib.Path(task.dataset.paths[int(i)]).name for i in batch["clip"]}))
                raise BadInput(f"{task.name}: {', '.join(bad)} is not finite at step {step}; clips of the batch: {names}; "
                               f"the last good checkpoint is {path}")
            step += 1
            bar.update()
            if log and (step % 20 == 0 or step == task.steps):
                passed = time.perf_counter() - began
                figures.update(frames_per_s=(step - logged) * task.frames * run.world / passed, loader_share=waiting / passed)
                log.write(step, figures)
                bar.set_postfix({k: f"{v:.3g}" for k, v in figures.items() if k in ("total", "accuracy", "frames_per_s")})
                began, waiting, logged = time.perf_counter(), 0.0, step
            if task.sample and run.rank == 0 and (step % config.sample_steps == 0 or step == task.steps):
                task.sample(step)
            if stop or time.perf_counter() - saved_at > 60 * config.save_minutes:
                save(step)
                saved, saved_at = step, time.perf_counter()
                if stop:
                    break
            waited = time.perf_counter()
    finally:
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if saved < step:
        save(step)
    if log:
        draw_curves(log.path, run.out / "curves.png")
    if run.world > 1 and not stop:
        torch.distributed.barrier()               # the next stage reads what rank 0 has written
    return not stop


class Log:
    """RUN/log.csv: a row each 20 steps. Rows that a resumed run will write again are dropped first."""
    COLUMNS = ("stage", "step", "total", "reconstruction", "perceptual", "sync", "lip", "gan", "discriminator", "accuracy",
               "lr", "grad_norm", "frames_per_s", "loader_share")

    def __init__(self, path, stage, first):
        rows = list(csv.DictReader(open(path))) if path.is_file() else []
        rows = [r for r in rows if r["stage"] != stage or int(r["step"]) <= first]
        self.path, self.stage = path, stage
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, step, figures):
        with open(self.path, "a", newline="") as file:
            row = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in figures.items()}
            csv.DictWriter(file, self.COLUMNS).writerow({"stage": self.stage, "step": step, **row})


def draw_panel(title, x, y, width=480, height=220):
    """A line through the points (x, y), first to last -> uint8 RGB [height, width, 3]"""
    x, y = np.asarray(x, float), np.asarray(y, float)
    panel = np.full((height, width, 3), 255, np.uint8)
    across = 10 + (width - 20) * (x - x[0]) / max(np.ptp(x), 1e-9)
    up = height - 12 - (height - 50) * (y - y.min()) / max(np.ptp(y), 1e-9)
    cv2.polylines(panel, [np.stack([across, up], 1).round().astype(np.int32)], False, (20, 60, 160), 1, cv2.LINE_AA)
    words = f"{title}: {y[0]:.3g} .. {y[-1]:.3g}, at {x[0]:g} .. {x[-1]:g}"
    return cv2.putText(panel, words, (10, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)


def save_panels(png, panels):
    """Panels two in a row; no file if there is none."""
    if not panels:
        return
    panels = panels + [np.full_like(panels[0], 255)] * (len(panels) % 2)
    cv2.imwrite(str(png), np.vstack([np.hstack(panels[i:i + 2]) for i in range(0, len(panels), 2)])[..., ::-1])


def draw_curves(log, png):
    """log.csv -> one panel per stage and loss over the steps."""
    rows, panels = list(csv.DictReader(open(log))), []
    for stage in STAGES:
        for name in Log.COLUMNS[2:10]:
            points = [(int(r["step"]), float(r[name])) for r in rows if r["stage"] == stage and r[name]]
            if points and not (name == "total" and stage != "generator"):
                panels.append(draw_panel(f"{stage} {name}", *zip(*points)))
    save_panels(png, panels)


def amplitude_panels(table):
    """The mean opening (px of the 256 px crop) over the amplitude, a panel per folder."""
    panels = []
    for folder, rows in table.items():
        points = {1: rows["model"].get("opening"), **{float(name.split()[1]): row.get("opening") for name, row in rows.items() if name.startswith("amplitude")}}
        points = sorted((a, opening) for a, opening in points.items() if opening is not None)
        if points:
            panels.append(draw_panel(f"{folder}: mean opening (px) over amplitude", *zip(*points)))
    return panels


# ---------------------------------------------------------------- the experts
def mouths(pictures, size):
    """uint8 lower halves [..., 3, H, 2H] -> float 0..1; for small experts only what they see of them"""
    return experts.mouth_view(pictures.float() / 255, experts.VIEW_PX[size]) if size == "small" else pictures.float() / 255


def expert_task(run, name, net, dataset, lr, steps, batch, frames, judge):
    """judge(batch) -> loss, {figure: float}; frames of a sample"""
    net.to(run.device)
    optimizer, scheduler = adam(net.parameters(), lr, steps, run.config.warmup)

    def step(batch, number):
        net.train()
        with lipsync.autocast(run.device):
            loss, figures = judge(batch)
        loss.backward()
        norm = update(run, [net], optimizer, scheduler)
        return {"total": loss.item(), name: loss.item(), "lr": scheduler.get_last_lr()[0], "grad_norm": norm, **figures}
    return Task(name, dict(net=net, optimizer=optimizer, scheduler=scheduler), step, dataset, steps, batch, batch * frames,
                lambda: {"kind": name, "arch": net.arch})


def sync_task(run):
    """S3(1): in-sync or not, for S frames and their sound; half of the wrong sounds come from the same clip."""
    config = run.config
    prepare_features(run, noisy=True)
    net = experts.SyncXNet(config.expert_size, run.sync_audio, run.net_config.audio_dim, config.expert_weights or None).to(memory_format=torch.channels_last)

    def judge(batch):
        pictures = experts.jitter_pictures(mouths(batch["pictures"], config.expert_size))             # [B, S, 3, h, w]
        loss, accuracy = experts.sync_batch_loss(net, pictures, batch["sound"], foreign_sounds(batch))
        return loss, {"accuracy": float(accuracy)}

    dataset = data.SyncDataset(run.clips, run.net_config, experts.GROUP, config.seed, features=run.features, sync_audio=run.sync_audio)
    return expert_task(run, "sync", net, dataset, config.sync_lr, config.sync_steps, 4 * config.batch, experts.GROUP, judge)


def foreign_sounds(batch):
    """Sounds that do not belong: K of the same clip, K of others. sound [B, ...], wrong [B, K, ...] -> [B, 2K, ...]

    A neighbour in the batch lends its sound; if it shows the same clip, this clip's own wrong sound stands in."""
    others = []
    for k in range(batch["wrong"].shape[1]):
        same = (batch["clip"] == batch["clip"].roll(k + 1, 0)).view(-1, *[1] * (batch["sound"].dim() - 1))
        others.append(torch.where(same, batch["wrong"][:, k], batch["sound"].roll(k + 1, 0)))
    return torch.cat([batch["wrong"], torch.stack(others, 1)], 1)


def lip_task(run):
    """S3(2): the text of a whole clip from its lower halves. None if no clip has a text."""
    config = run.config
    clips = [p for p in run.clips if data.clip_label(p)[1]]
    if not clips:
        return None
    net = experts.LipReader(config.expert_size)

    def judge(batch):
        pictures = experts.jitter_pictures(mouths(batch["video"], config.expert_size), 0.5)           # [B, T, 3, h, w]
        return experts.lip_batch_loss(net, pictures, batch["tokens"], batch["length"]), {}

    dataset = data.SentenceDataset(clips, config.seed)
    return expert_task(run, "lip", net, dataset, config.lip_lr, config.lip_steps, config.batch, data.CLIP_FRAMES, judge)


def load_experts(run):
    """The experts trained by this run, else those inside --weights, frozen: [sync or None, reader or None]"""
    given = lipsync.load_checkpoint(run.config.weights) if run.config.weights else {}
    nets = []
    for name in ("sync", "lip"):
        path, content = run.out / f"{name}.pt", given.get(name)
        if path.is_file():
            saved = lipsync.load_checkpoint(path, name)
            content = {"arch": saved["arch"], "state": saved["state"]["net"]}
        nets.append(content and freeze(experts.load_expert(content).to(run.device)))
    arch = nets[0] and nets[0].arch
    if arch and arch["audio"] == "features" and not (run.features and arch["audio_dim"] == run.net_config.audio_dim):
        raise BadInput(f"the sync expert hears {arch['audio_dim']} features of a frozen audio encoder, this run's is {run.net_config.audio_encoder} "
                       f"({run.net_config.audio_dim}): train one for it (--stage sync), or use --sync-weight 0 and another --out")
    return nets


def embed_clips(run, sync, paths):
    """-> per readable clip: its source, what embed_clip makes of it"""
    for path in tqdm(paths, desc="lips and sound", unit="clip", disable=run.rank > 0):
        clip = data.load_or_skip(path)
        if clip is not None and len(clip) > 2 * experts.GROUP:
            features = np.load(data.feature_path(path, run.features)) if run.features else None
            yield clip.source, *experts.embed_clip(sync, data.lower_halves(clip, range(len(clip))), experts.hear(sync, clip.mel, features))


def grade_sync(run, sync):
    """Held-out accuracy of the sync expert: cosine over 0.5 for true sound, under it for the same clip's other sound. -> 0..1"""
    paths = run.held_out or run.clips
    return float(np.mean([experts.sync_accuracy(video, audio) for *_, video, audio in embed_clips(run, sync, paths[::max(1, len(paths) // 60)])]))


def find_offsets(run, sync):
    """By how many frames the sound of each source video is late: {source: frames}. Videos from the web are often one to three
    frames off, which teaches a generator to mumble (LatentSync, 2024, shifts them, too)."""
    path, curves = run.out / "offsets.json", {}
    offsets = json.loads(path.read_text()) if run.config.resume and path.is_file() else {}   # a resumed run need not look again
    for source, video, audio in embed_clips(run, sync, [p for p in run.clips if data.clip_label(p)[0] not in offsets]):
        curves.setdefault(source, []).append(experts.sync_curve(video, audio, max_shift=experts.OFFSETS))
    offsets.update({source: experts.lateness(some) for source, some in curves.items()})
    if run.rank == 0:
        path.write_text(json.dumps(offsets))
        counts = np.unique(list(offsets.values()), return_counts=True)
        print("sound moved to the lips, frames: videos  " + ", ".join(f"{o:+d}: {n}" for o, n in zip(*counts)))
    return offsets


def freeze(module):
    """No gradient to its weights, eval mode for good: BatchNorm statistics stay, whatever calls train(). (S3)"""
    module.eval().requires_grad_(False)
    module.train = lambda mode=True: module
    return module


# ---------------------------------------------------------------- the generator
def network_inputs(run, batch, audio_encoder):
    """A batch of B groups -> what LipSync.forward takes, with B S rows, and the target.

    -> refs [BS, R, 3, H, W], masked [BS, 3, H, W], audio [BS, F, D], amplitude [BS], target [BS, 3, H, W].
    Gamma and brightness (S3) are the same for all pictures of a group.
    """
    B, S = batch["target"].shape[:2]
    shade = lambda x: ((x.float() / 255) ** batch["gamma"].view(-1, 1, 1, 1, 1)
                       * batch["brightness"].view(-1, 1, 1, 1, 1)).clamp(0, 1)
    refs = shade(batch["refs"]).repeat_interleave(S, 0)              # [BS, R, 3, H, W]
    target = shade(batch["target"]).flatten(0, 1)                    # [BS, 3, H, W]
    if "audio" in batch:
        audio = batch["audio"].flatten(0, 1)                         # [BS, F, D]
    else:
        features = audio_encoder.encode_mel(batch["mel"])            # [B, L, D]
        audio = features[torch.arange(B, device=features.device)[:, None, None], batch["window"]].flatten(0, 1)
    return refs, target * lipsync.half_mask(target), audio, batch["amplitude"].flatten(), target


def mouth_mask(boxes, size):
    """boxes [B, 4] px (x0, y0, x1, y1) -> [B, 1, H, W], 1 inside"""
    at = torch.arange(size, device=boxes.device)
    inside = lambda low, high: (at >= low[:, None]) & (at < high[:, None])       # [B, size]
    return (inside(boxes[:, 1], boxes[:, 3])[:, None, :, None] & inside(boxes[:, 0], boxes[:, 2])[:, None, None, :]).float()


def lip_term(run, reader, output, batch):
    """S3(2): the S generated frames of one group replace the real ones in their clip, and the whole sentence is read.

    output [B, S, 3, h, w] lower halves. -> scalar, or None if no in-sync group of the batch has a text.
    """
    S = output.shape[1]
    for b in range(len(output)):
        clip = data.load_clip(run.clips[int(batch["clip"][b])]) if batch["in_sync"][b] else None
        if clip and clip.text:
            video = torch.from_numpy(data.lower_halves(clip, range(len(clip)))).to(output) / 255     # [T, 3, h', w']
            video = (video ** batch["gamma"][b] * batch["brightness"][b]).clamp(0, 1)
            made = fn.interpolate(output[b], size=video.shape[-2:], mode="area")
            made = made.flip(-1) if batch["flip"][b] else made
            start = int(batch["start"][b])
            video = torch.cat([video[:start], made, video[start + S:]])[None]    # [1, T, 3, h', w']
            tokens = torch.tensor([data.encode_text(clip.text)], device=output.device)    # [1, U]
            return losses.lip_reading_loss(reader(video, tokens), tokens, data.PAD)
    return None


def generator_task(run):
    """The step of S3: L = w_r rec + w_s sync + w_c lip + w_p perceptual + w_g gan, experts frozen."""
    config = run.config
    prepare_features(run)
    sync_expert, reader = load_experts(run)
    accuracy = sync_expert and grade_sync(run, sync_expert)
    reasons = loss_report(run, accuracy, reader)
    sync = sync_expert if sync_expert and accuracy >= config.min_sync_accuracy else None
    ear, sync_audio = sync_expert and sync_expert.listen, sync.arch["audio"] if sync else run.sync_audio
    offsets = find_offsets(run, sync) if sync and not config.keep_offsets else {}
    net = lipsync.LipSync(run.net_config).to(run.device, memory_format=torch.channels_last)
    audio_encoder = run.audio_encoder
    if config.weights:
        start_from(net, audio_encoder, config.weights)
    elif not audio_encoder.frozen and ear and sync_expert.arch["audio_dim"] == audio_encoder.dim:
        audio_encoder.load_state_dict(ear.state_dict())              # it has learned to hear beside the sync expert
    modules = [net] + ([] if audio_encoder.frozen else [audio_encoder])
    optimizer, scheduler = adam([p for m in modules for p in m.parameters()], config.lr, config.steps, config.warmup)
    discriminator = losses.Discriminator().to(run.device, memory_format=torch.channels_last)
    discriminator_optimizer, discriminator_scheduler = adam(discriminator.parameters(), config.lr,
                                                            round(config.steps * (1 - config.gan_start)), config.warmup)
    perceptual = losses.PerceptualLoss(config.vgg).to(run.device) if config.perceptual_weight else None
    if run.rank == 0:
        print("losses: " + "; ".join(f"{k} {v}" for k, v in reasons.items()))
    forward = torch.compile(net) if config.compile else net
    size, micro = run.net_config.image_size, config.micro or config.batch

    def group_losses(part, number):
        """Some groups -> weighted total (with gradient), {loss: float}, made and true lower halves [BS, 3, H/2, W]"""
        progress = number / config.steps
        with lipsync.autocast(run.device):
            refs, masked, audio, amplitude, target = network_inputs(run, part, audio_encoder)
            output = forward(refs, masked, audio, amplitude)         # [BS, 3, H, W]
            low = output[:, :, size // 2:]                           # [BS, 3, H/2, W]
            terms = {"reconstruction": (config.rec_weight, losses.reconstruction_loss(
                output, target, config.mouth_weight, mouth_mask(part["mouth"].flatten(0, 1), size)))}
            if perceptual is not None:
                terms["perceptual"] = config.perceptual_weight, perceptual(output, target)
            if config.sync_weight and sync is not None and progress >= config.sync_start and part["in_sync"].any():
                groups = low.unflatten(0, (-1, config.group))[part["in_sync"]]
                terms["sync"] = config.sync_weight, losses.sync_loss(sync.embed_audio(part["sync"][part["in_sync"]]),
                                                                     sync.embed_video(groups))
            if config.lip_weight and reader is not None and progress >= config.sync_start:
                term = lip_term(run, reader, low.unflatten(0, (-1, config.group)), part)
                terms.update({} if term is None else {"lip": (config.lip_weight, term)})
            if config.gan_weight and progress >= config.gan_start:
                terms["gan"] = config.gan_weight, losses.generator_loss(discriminator(low), config.gan)
        total = sum(weight * term for weight, term in terms.values())
        return total, {k: v.item() for k, (_, v) in terms.items()}, low.detach(), target[:, :, size // 2:]

    def step(batch, number):
        net.train(), audio_encoder.train()
        figures, pairs = {}, []
        for i in range(-(-config.batch // micro)):
            part = {k: v[i * micro:(i + 1) * micro] for k, v in batch.items()}
            share = len(part["clip"]) / len(batch["clip"])
            total, terms, fake, real = group_losses(part, number)
            (total * share).backward()
            pairs.append((fake, real, share))
            for k, v in {"total": total.item(), **terms}.items():
                figures[k] = figures.get(k, 0) + v * share
        figures.update(grad_norm=update(run, modules, optimizer, scheduler), lr=scheduler.get_last_lr()[0])
        discriminator_optimizer.zero_grad(set_to_none=True)          # what the generator's step left there
        if "gan" in figures:
            for fake, real, share in pairs:
                with lipsync.autocast(run.device):
                    loss = losses.discriminator_loss(discriminator(real), discriminator(fake)) * share
                loss.backward()
                figures["discriminator"] = figures.get("discriminator", 0) + loss.item()
            update(run, [discriminator], discriminator_optimizer, discriminator_scheduler)
        return figures

    samples = SampleSheet(run, net, audio_encoder)
    parts = dict(net=net, audio=audio_encoder, optimizer=optimizer, scheduler=scheduler, discriminator=discriminator,
                 discriminator_optimizer=discriminator_optimizer, discriminator_scheduler=discriminator_scheduler)
    if audio_encoder.frozen:
        del parts["audio"]
    content = lambda: weights_content(run, net, audio_encoder, sync_expert, reader)
    dataset = data.ClipDataset(run.clips, run.net_config, config.group, config.seed, config.amplitude_share,
                               config.random_refs, features=run.features, sync_audio=sync_audio, offsets=offsets,
                               spread=round(config.sync_start * config.steps) * config.batch * run.world)
    return Task("generator", parts, step, dataset, config.steps, config.batch, config.batch * config.group, content, samples)


def loss_report(run, accuracy, reader):
    """Which losses run, from when on, and why one does not: {name: text}"""
    c = run.config
    report = {"reconstruction": f"{c.rec_weight}"}
    report["perceptual"] = f"{c.perceptual_weight} ({c.vgg})" if c.perceptual_weight else "off (weight 0)"
    since = f"from step {round(c.sync_start * c.steps)}"
    report["sync"] = ("off (weight 0)" if not c.sync_weight else "off (no expert: --stage sync)" if accuracy is None else
                      f"off (the expert's held-out accuracy {accuracy:.2f} is below --min-sync-accuracy {c.min_sync_accuracy})"
                      if accuracy < c.min_sync_accuracy else f"{c.sync_weight} {since} (held-out accuracy {accuracy:.2f})")
    report["lip"] = ("off (weight 0)" if not c.lip_weight else f"{c.lip_weight} {since}" if reader else
                     "off (no lip reader: no clip has a text, or --stage lip has not run)")
    report["gan"] = f"{c.gan_weight} ({c.gan}) from step {round(c.gan_start * c.steps)}" if c.gan_weight else "off (weight 0)"
    return report


def start_from(net, audio_encoder, path):
    """--weights: copy a checkpoint's networks; a config that differs in shape is named field by field."""
    content = lipsync.load_checkpoint(path)
    saved, ours = content["config"], dataclasses.asdict(net.config)
    try:
        net.load_state_dict(content["model"])
        if not audio_encoder.frozen:
            audio_encoder.load_state_dict(content["audio_encoder"]["state"])
    except RuntimeError:
        differ = [f"{k} {saved.get(k)} there, {v} here" for k, v in ours.items() if tuple(np.ravel(saved.get(k))) != tuple(np.ravel(v))]
        raise BadInput(f"{path}: does not fit this network: {'; '.join(differ) or 'other layers'}") from None


def weights_content(run, net, audio_encoder, sync, reader, half=False):
    """What a lipsync checkpoint holds for infer.py and experts.py: plain types and tensors."""
    shrink = lambda value: value.half() if half and value.is_floating_point() else value
    state = lambda module: {k: shrink(v) for k, v in module.state_dict().items()}
    notice = "openai/whisper encoder, MIT licence, Copyright (c) 2022 OpenAI" if "whisper" in run.net_config.audio_encoder else ""
    recipe = {k: v for k, v in dataclasses.asdict(run.config).items() if k not in ("data", "out", "weights", "audio_encoder")}
    return {"kind": "lipsync", "config": dataclasses.asdict(run.net_config), "model": state(net),
            "audio_encoder": {"dims": audio_encoder.dims, "state": state(audio_encoder)},
            "sync": experts.pack_expert(sync, shrink), "lip": experts.pack_expert(reader, shrink),
            "about": {"recipe": recipe, "notice": notice, "date": time.strftime("%Y-%m-%d"),
                      "data": f"{len(run.clips)} training clips, {len(run.held_out)} held out"}}


class SampleSheet:
    """samples/STEP.png: reference | masked | output | truth, a row for each of some fixed held-out frames."""

    def __init__(self, run, net, audio_encoder, rows=6):
        self.run, self.net, self.audio_encoder = run, net, audio_encoder
        clips = run.held_out or run.clips
        dataset = data.ClipDataset(clips, run.net_config, run.config.group, seed=1, amplitude_share=0, augment=False,
                                   features=run.features, sync_audio=run.sync_audio)
        self.batch = torch.utils.data.default_collate([dataset[i] for i in range(rows)])

    @torch.no_grad()
    def __call__(self, step):
        self.net.eval()
        batch = {k: v.to(self.run.device) for k, v in self.batch.items()}
        with lipsync.autocast(self.run.device):
            refs, masked, audio, amplitude, target = network_inputs(self.run, batch, self.audio_encoder)
            output = self.net(refs, masked, audio, amplitude)
        self.net.train()
        columns = [refs[:, 0], masked, output, target]
        rows = torch.cat(columns, 3)[::self.run.config.group]        # [rows, 3, H, 4W]
        sheet = (rows.permute(0, 2, 3, 1).flatten(0, 1).clamp(0, 1) * 255).byte().cpu().numpy()
        folder = self.run.out / "samples"
        folder.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"{step:06d}.png"), sheet[..., ::-1])


# ---------------------------------------------------------------- python train.py
def parse_flags(cls, description, argv=None):
    """One flag per field of a dataclass, with its comment as help; --preset sets the defaults of some (TRAINING)."""
    notes = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(cls), re.M))
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default=cls.preset)
    preset = first.parse_known_args(argv)[0].preset
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     epilog="--preset changes defaults: " + "; ".join(
                                         f"{name}: " + ", ".join(f"{k} {v}" for k, v in some.items()) for name, some in TRAINING.items() if some))
    for field in dataclasses.fields(cls):
        kind = {"action": "store_true"} if isinstance(field.default, bool) else {"type": type(field.default), "metavar": field.name.upper()}
        default = TRAINING.get(preset, {}).get(field.name, field.default)
        parser.add_argument("--" + field.name.replace("_", "-"), default=default, help=notes.get(field.name, field.name), **kind)
    return cls(**vars(parser.parse_args(argv)))


def is_done(config, stage):
    """Whether RUN/ holds a stage's checkpoint with all the steps asked for (the generator's: weights.pt, too)."""
    path, steps = pathlib.Path(config.out, f"{stage}.pt"), getattr(config, f"{stage}_steps", config.steps)
    kind, files = (stage, [path]) if stage != "generator" else ("lipsync", [path, path.parent / "weights.pt"])
    return all(file.is_file() for file in files) and lipsync.load_checkpoint(path, kind)["step"] >= steps


def check_checkpoint(config, stage):
    """BadInput where RUN/STAGE.pt holds a stopped run and --resume is missing, or where the schedule would be another one's end."""
    path, steps = pathlib.Path(config.out, f"{stage}.pt"), getattr(config, f"{stage}_steps", config.steps)
    if not path.is_file():
        return
    saved = lipsync.load_checkpoint(path, "lipsync" if stage == "generator" else stage)
    step, planned = saved["step"], saved.get("steps", steps)
    if config.resume and planned != steps:
        raise BadInput(f"{path}: was planned for {planned} steps, which its learning rate follows: resume it with as many, not {steps}")
    if not config.resume and 0 < step < planned:
        raise BadInput(f"{path}: stopped at step {step} of {planned}; --resume goes on; to begin anew, delete it or take another --out")


def main():
    config = parse_flags(TrainConfig, __doc__.split("\n\n")[0])
    if not config.data:
        raise BadInput("--data DIR is missing: a folder of talking-head videos")
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(config, name)}: choose from {', '.join(filter(None, allowed))}")
    for name in ("batch", "group", "steps", "sync_steps", "lip_steps", "save_minutes", "sample_steps", "eval_clips", "lr", "sync_lr",
                 "lip_lr", "micro"):
        if getattr(config, name) < 0 or (getattr(config, name) == 0 and name not in ("save_minutes", "micro")):
            raise BadInput(f"--{name.replace('_', '-')} {getattr(config, name)}: must be positive")
    if config.group != experts.GROUP and config.sync_weight and config.stage in ("all", "sync", "generator"):
        raise BadInput(f"--group {config.group}: the sync expert sees {experts.GROUP} frames; use that, or --sync-weight 0")
    torch.manual_seed(config.seed)
    out = pathlib.Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo",
                                             timeout=datetime.timedelta(days=1))     # rank 0 may prepare for hours
    if config.perceptual_weight and config.stage in ("all", "generator"):
        losses.load_vgg(config.vgg)               # missing weights are told now, not after hours of training the experts
    if config.stage == "eval" and not config.weights:
        config = dataclasses.replace(config, weights=str(out / "weights.pt"))
    run = Run(config)
    if run.rank == 0 and config.stage != "eval":
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    if run.rank == 0:
        print(f"{len(run.clips)} training clips, {len(run.held_out)} held out; {run.device}, {run.world} processes, seed {config.seed}")
    for name, make in (("sync", sync_task), ("lip", lip_task), ("generator", generator_task)):
        if config.stage in ("all", name):
            if config.stage == "all" and is_done(config, name):
                print(f"{name}: done already, {out / name}.pt; --stage {name} does it again")
                continue
            check_checkpoint(config, name)
            task = make(run)
            if task is None:
                print(f"{name}: skipped, no clip has a text")
                continue
            count = sum(p.numel() for part in task.parts.values() if isinstance(part, nn.Module) for p in part.parameters())
            if run.rank == 0:
                print(f"{name}: {count:,} parameters, {task.steps} steps of {task.frames * run.world} frames")
            if not fit(run, task):
                return print(f"{name}: stopped; {out / name}.pt is saved, --resume goes on")
            if run.rank == 0 and name == "generator":
                nets = task.parts["net"], run.audio_encoder, *load_experts(run)
                lipsync.save_checkpoint(out / "weights.pt", weights_content(run, *nets, half=True))
    if config.stage in ("all", "eval") and run.rank == 0:
        from bench import evaluate                # measuring is not in the patent: a room of its own
        table = evaluate.evaluate(run, config.weights if config.stage == "eval" else out / "weights.pt")
        (out / "eval.json").write_text(json.dumps(table, indent=1))
        save_panels(out / "amplitude.png", amplitude_panels(table))
        evaluate.print_table(table)
        print(json.dumps(table))


if __name__ == "__main__":
    lipsync.cli(main)
