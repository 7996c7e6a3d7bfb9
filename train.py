"""S3: trains the sync expert, the lip reader, the mouth, and then the generator.

    stage     | code                              | patent
    sync      | train_sync                        | S3(1): syncXnet, trained as SyncNet was
    lip       | train_lip                         | S3(2): the lip reader
    mouth     | train_mouth, find_offsets         | S2(4)a-f and LipHead, from landmarks alone
    generator | train_generator, generator_terms  | S3: five losses, Adam, warm-up, cosine
    eval      | bench/evaluate.py                 | the held-out table, with its baselines

`python train.py --data DIR --preset edge` runs the stages that are not yet done and ends with the
table. RUN/ holds config.json, log.csv, samples/, curves.png, offsets.json, the resumable sync.pt,
lip.pt, mouth.pt, generator.pt, and weights.pt for infer.py. Axes as in lipsync.py and experts.py.
"""
import argparse
import csv
import dataclasses
import datetime
import functools
import json
import math
import os
import signal
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as fn
from tqdm import tqdm

import data
import experts
import faces
import lipsync
import losses
import media
from lipsync import BadInput

STAGES = ("sync", "lip", "mouth", "generator")
LATEST = 6  # frames that a video's own sound may be off


# ---------------------------------------------------------------- configuration
def option(default, group, help, choices=None):
    """A field of TrainConfig: its default, the group it stands in, its help, its allowed values."""
    return field(default=default, metadata=dict(group=group, help=help, choices=choices))


@dataclass(frozen=True)
class TrainConfig:
    """Every number of a training run; each is a flag. Weights of losses are here, none in code."""
    data: str = option("", "data", "folder of talking-head videos")
    held_out: str = option("", "data", "comma-separated parts of the paths of videos never trained "
                           "on; empty: a hashed tenth")
    amplitude_share: float = option(0.3, "data", "share of samples that teach the amplitude")
    random_refs: bool = option(False, "data", "references at random, not by the rule (ablation)")
    keep_offsets: bool = option(False, "data", "leave each video's sound where it is")

    preset: str = option("edge", "network", "size of the network", tuple(lipsync.PRESETS))
    audio_encoder: str = option("", "network", "whisper name or file, wav2vec2:.., hubert:.., "
                                "scratch; empty: the preset's")
    decoder: str = option("", "network", "empty: the preset's", ("", "spade", "conv"))
    refs: int = option(0, "network", "reference pictures R; 0: the preset's")
    spacing: int = option(0, "network", "of the audio window, frames; 0: the preset's")
    one_way: bool = option(False, "network", "audio does not look at the image (ablation)")
    no_mask: bool = option(False, "network", "fusion without the upper-half mask (ablation)")
    no_warp: bool = option(False, "network", "the patent's plain network: no lips, no warp")
    weights: str = option("", "network", "start from this checkpoint")
    expert_size: str = option("small", "network", "of both experts", ("small", "full"))
    expert_weights: str = option("", "network", "the full sync expert's ResNeXt starts from: "
                                 "imagenet, or a file; empty: from nothing")
    sync_audio: str = option("", "network", "what the sync expert hears; empty: by encoder",
                             ("", "features", "mel"))

    sync_steps: int = option(4_000, "stage lengths", "optimizer steps of the sync expert")
    lip_steps: int = option(4_000, "stage lengths", "of the lip reader")
    mouth_steps: int = option(1_500, "stage lengths", "of the mouth")
    steps: int = option(20_000, "stage lengths", "of the generator")
    batch: int = option(16, "stage lengths", "groups of S frames per step and process (S3); the "
                        "sync expert takes four times as many")
    group: int = option(5, "stage lengths", "S, frames of a group (S3(1))")
    micro: int = option(0, "stage lengths", "groups per forward; fewer than batch accumulates "
                        "gradients; 0: batch")
    mouth_batch: int = option(24, "stage lengths", "clips per step of the mouth, ten frames each")
    lr: float = option(1e-4, "stage lengths", "Adam's rate for the generator, after warm-up (S3)")
    discriminator_lr: float = option(4e-4, "stage lengths", "for the discriminator")
    sync_lr: float = option(1e-3, "stage lengths", "for the sync expert")
    lip_lr: float = option(1e-3, "stage lengths", "for the lip reader")
    mouth_lr: float = option(1e-3, "stage lengths", "for the mouth")
    warmup: float = option(0.03, "stage lengths", "share of the steps in which the rate rises")

    rec_weight: float = option(0.5, "losses", "reconstruction loss")
    coarse_weight: float = option(1.0, "losses", "the same on 4 x 4 means: it does not blur")
    mouth_weight: float = option(8.0, "losses", "extra weight of the mouth's pixels; 0: patent")
    sync_weight: float = option(0.01, "losses", "sync loss")
    lip_weight: float = option(0.1, "losses", "lip-reading loss")
    perceptual_weight: float = option(0.01, "losses", "perceptual loss, sum over scales")
    gan_weight: float = option(0.03, "losses", "adversarial loss")
    sync_start: float = option(0.5, "losses", "share of the steps before sync and lip losses enter")
    gan_start: float = option(0.15, "losses", "share of the steps before the adversarial enters")
    gan: str = option("hinge", "losses", "form of the adversarial loss", losses.GAN_FORMS)
    vgg: str = option("imagenet", "losses", "perceptual features: imagenet, a file, or random")
    true_lips: float = option(0.8, "losses", "share of the generator's steps that see the true "
                              "lips, with noise; predicted ones otherwise")
    lips_noise_px: float = option(0.7, "losses", "of true lips, common to a face, px of 256; each "
                                  "point's own is 0.7 of it")
    min_sync_accuracy: float = option(0.75, "losses", "below it the sync expert is not used")

    out: str = option("run", "machine", "folder for checkpoints, log and pictures")
    stage: str = option("all", "machine", "what to run", ("all", *STAGES, "eval"))
    resume: bool = option(False, "machine", "continue the run in --out")
    seed: int = option(0, "machine", "of all random numbers")
    workers: int = option(1, "machine", "loader processes")
    device: str = option("auto", "machine", "auto, cpu, cuda, cuda:1")
    checkpointing: bool = option(False, "machine", "recompute activations: less memory, more time")
    compile: bool = option(False, "machine", "torch.compile the generator")
    save_minutes: float = option(5.0, "machine", "between checkpoints")
    sample_steps: int = option(500, "machine", "between sample pictures")
    eval_clips: int = option(20, "machine", "held-out clips of each folder measured by eval")


FREE = ("out", "stage", "resume", "workers", "device", "checkpointing", "compile", "save_minutes",
        "sample_steps", "eval_clips")  # what a resumed run may change
# What a preset changes. VGG costs more than the edge network, so without a GPU it stays away.
TRAINING = {
    "full": {},
    "edge": dict(batch=4, lr=6e-4, sync_lr=2e-3, perceptual_weight=0.0),
    "tiny": dict(batch=4, lr=1e-3, sync_lr=2e-3, perceptual_weight=0.0, sync_start=0.9, steps=1500,
                 sync_steps=600, lip_steps=650, mouth_steps=600, sample_steps=300, eval_clips=8),
}


def parse_flags(argv=None):
    """The command line -> TrainConfig: flags over the preset's defaults; with --resume over what
    RUN/config.json says, where a flag that would change what is trained is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS,
        epilog="--preset changes defaults: " + "; ".join(
            f"{name}: {', '.join(f'{k} {v}' for k, v in some.items())}"
            for name, some in TRAINING.items() if some))
    groups = {}
    for one in dataclasses.fields(TrainConfig):
        name = one.metadata["group"]
        group = groups[name] = groups.get(name) or parser.add_argument_group(name)
        kind = {"type": type(one.default), "metavar": one.name.upper()}
        if isinstance(one.default, bool):
            kind = {"action": "store_true"}
        choices = [choice for choice in one.metadata["choices"] or () if choice]
        words = one.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        flag = "--" + one.name.replace("_", "-")
        group.add_argument(flag, help=f"{words} ({one.default})", **kind)
    given = vars(parser.parse_args(argv))
    saved_path = Path(given.get("out", TrainConfig.out), "config.json")
    if given.get("resume") and saved_path.is_file():
        saved = read_saved_config(saved_path)
        for name, value in given.items():
            text = (f"--{name.replace('_', '-')} {value}: the run in {saved_path.parent} "
                    f"was begun with {saved.get(name)}")
            if name not in FREE and value != saved.get(name):
                raise BadInput(f"{text}; resume it as it was")
            if name not in ("out", "stage", "resume") and value != saved.get(name):
                print(text)
        base = {**saved, "resume": False}
    else:
        base = TRAINING.get(given.get("preset", TrainConfig.preset), {})
    return check_config(TrainConfig(**{**base, **given}))


def read_saved_config(path):
    """RUN/config.json as a dict; BadInput if a field is unknown or of another type."""
    kinds = {one.name: type(one.default) for one in dataclasses.fields(TrainConfig)}
    saved = data.read_json(path)
    fits = isinstance(saved, dict) and bool(saved) and set(saved) <= set(kinds)
    if not fits or any(type(value) is not kinds[name] for name, value in saved.items()):
        raise BadInput(f"{path}: not the config of a run of this version")
    return saved


def check_config(config):
    """The config, if every value is allowed; else BadInput that names the flag."""
    positive = ("batch", "group", "steps", "sync_steps", "lip_steps", "mouth_steps", "mouth_batch",
                "sample_steps", "eval_clips", "lr", "sync_lr", "lip_lr", "mouth_lr",
                "discriminator_lr")
    for one in dataclasses.fields(config):
        value, flag = getattr(config, one.name), "--" + one.name.replace("_", "-")
        choices = one.metadata["choices"]
        if choices and value not in choices:
            raise BadInput(f"{flag} {value}: choose from {', '.join(filter(None, choices))}")
        if one.name in positive and not 0 < value < math.inf:
            raise BadInput(f"{flag} {value}: must be positive")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise BadInput(f"{flag} {value}: must be a number, not a negative one")
    if not config.data:
        raise BadInput("--data DIR is missing: a folder of talking-head videos")
    if config.group != experts.GROUP and config.sync_weight:
        raise BadInput(f"--group {config.group}: the sync expert sees {experts.GROUP} frames; "
                       "use that, or --sync-weight 0")
    return config


# ---------------------------------------------------------------- what a run is made of
@dataclass
class Run:
    """What the stages share: config, device, clips, audio encoder; no training state."""
    config: TrainConfig
    out: Path
    rank: int
    world: int
    device: torch.device
    clips: list  # of data.ClipInfo, to train on
    held_out: list
    net_config: lipsync.Config
    audio_encoder: nn.Module
    features: str  # key of a frozen encoder's feature files; None: it learns

    @property
    def sync_audio(self):
        return self.config.sync_audio or ("features" if self.features else "mel")


def open_run(config):
    """Prepares what is new in the folder, and puts a Run together."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    own_gpu = world > 1 and config.device == "auto" and torch.cuda.is_available()
    device = lipsync.pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if own_gpu else config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank == 0 and (not data.list_clips(config.data) or data.list_videos(config.data)):
        data.print_report(data.prepare(config.data))  # prepared clips alone are fine, too
    wait_for_all(world)
    clips, held_out = data.split_clips(data.list_clips(config.data), config.held_out)
    torch.manual_seed(config.seed)  # of the audio encoder, if it learns
    net_config, audio_encoder = network_config(config)
    features = features_key(net_config.audio_encoder, audio_encoder)
    return Run(config, Path(config.out), rank, world, device, clips, held_out, net_config,
               audio_encoder.to(device), features)


def wait_for_all(world):
    if world > 1:
        torch.distributed.barrier()


def network_config(config):
    """The preset, or the config inside --weights, with what the flags change; and its audio
    encoder -> lipsync.Config, module"""
    saved = lipsync.load_checkpoint(config.weights) if config.weights else None
    try:
        base = lipsync.Config(**saved["config"]) if saved else lipsync.PRESETS[config.preset]
        names = ("audio_encoder", "decoder", "refs", "spacing")
        changes = {name: getattr(config, name) for name in names if getattr(config, name)}
        off = dict(one_way="bidirectional", no_mask="mask_upper", no_warp="warp")
        changes |= {name: False for flag, name in off.items() if getattr(config, flag)}
        net_config = dataclasses.replace(base, checkpointing=config.checkpointing, **changes)
    except (KeyError, TypeError, ValueError) as error:
        where = f"{config.weights}: " if saved else ""
        raise BadInput(where + str(error).split(", got")[0]) from None
    kept = saved["audio_encoder"] if saved and not config.audio_encoder else None
    encoder = lipsync.build_audio_encoder(net_config, kept)
    family, source = lipsync.parse_audio_encoder(net_config.audio_encoder)
    path = Path(source)  # no path of this machine in the checkpoint
    source = path.stem if path.is_file() else path.name if path.is_dir() else source
    name = f"{family}:{source}" if source else family
    return dataclasses.replace(net_config, audio_encoder=name, audio_dim=encoder.dim), encoder


def features_key(name, encoder):
    """Names the cached features of a frozen encoder: another encoder, or other weights, other
    files. None if it learns."""
    if not encoder.frozen:
        return None
    digest = 0
    for value in encoder.state_dict().values():
        digest = zlib.crc32(value.numpy().tobytes(), digest)
    return f"{name}-{digest:08x}"


def prepare_features(run, noisy=False):
    """A frozen audio encoder hears every clip once; its features lie beside it, float16 [T, D].

    noisy: also with noise, gain and reverb, which the sync expert learns to see through."""
    if not run.features:
        return
    jobs = [(info.path, noise) for info in run.clips + run.held_out for noise in {False, noisy}]
    jobs = jobs[run.rank::run.world]  # shared out before anyone writes: no clip falls between two
    jobs = [job for job in jobs if not data.feature_path(job[0], run.features, job[1]).is_file()]
    bar = tqdm(jobs, desc="audio features", unit="clip", disable=not jobs)
    for path, noise in bar:
        clip = data.load_or_skip(path)
        if clip is None:
            continue
        wave = clip.sound()
        if noise:
            rng = np.random.default_rng([run.config.seed, media.hash_of(path.name)])
            wave = data.corrupt_sound(wave, rng)
        features = run.audio_encoder(torch.from_numpy(wave)[None].to(run.device))[0]  # [T, D]
        missing = max(0, len(clip) - len(features))
        features = torch.cat([features, features[-1:].expand(missing, -1)])[:len(clip)]
        target = data.feature_path(path, run.features, noise)
        part = target.with_name(f".{os.getpid()}.{target.name}")
        np.save(part, features.half().cpu().numpy())
        os.replace(part, target)
    wait_for_all(run.world)


def read_features(run, info):
    """A clip's features by the frozen encoder -> float32 [T, D]"""
    features = np.load(data.feature_path(info.path, run.features))
    return torch.from_numpy(features.astype(np.float32))


def make_loader(run, dataset, keeper, batch):
    """The batches that a stage still needs: batch b of this process has its own sample numbers."""
    left = range(keeper.step, keeper.total)
    starts = [(b * run.world + run.rank) * batch for b in left]
    order = [start + i for start in starts for i in range(batch)]
    workers = run.config.workers
    return torch.utils.data.DataLoader(
        dataset, batch, sampler=order, num_workers=workers, generator=torch.Generator(),
        collate_fn=getattr(dataset, "collate", None), worker_init_fn=ignore_signals,
        prefetch_factor=4 if workers else None)


def ignore_signals(worker):
    """A signal to the whole group stops a run between two steps; its loader must outlive it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------- what every stage does
class Keeper:
    """Owns a stage's checkpoint, log and signals: `for step, batch in keeper.steps(batches): ...`

    parts: name -> module, optimizer or scheduler; all of it is saved, resumed, and at the start the
    same in every process. content: what else the checkpoint holds, a dict, or a function that
    makes it. `stopped` says after the loop that a signal ended it early."""
    COLUMNS = ("stage", "step", "total", "reconstruction", "coarse", "perceptual", "sync", "lip",
               "mouth", "gan", "discriminator", "accuracy", "lr", "grad_norm", "frames_per_s",
               "loader_share")

    def __init__(self, run, name, parts, total, frames, content):
        self.run, self.name, self.parts, self.total, self.frames = run, name, parts, total, frames
        self.content, self.step, self.stopped, self.signals = content, 0, False, []
        self.saved_at = time.perf_counter()
        self.path = run.out / f"{name}.pt"
        torch.manual_seed(run.config.seed + 1000 * run.rank)  # noise and dropout may differ
        if run.config.resume and self.path.is_file():
            self.load()
        self.share()
        if self.step == 0:
            self.save()  # a full disk or a wrong folder shows before the work, not after it
        self.log_path, self.logged, self.began = run.out / "log.csv", self.step, None
        if run.rank == 0:
            self.begin_log()

    def load(self):
        content = lipsync.load_checkpoint(self.path, kind_of(self.name))
        try:
            for name, part in self.parts.items():
                part.load_state_dict(content["state"][name])
            self.step = content["step"]
            torch.set_rng_state(content["random"][0])
            gpus = torch.cuda.device_count()  # a run may go on where there are fewer
            torch.cuda.set_rng_state_all(content["random"][1:1 + gpus])
            if self.run.rank > 0:  # the states are rank 0's
                torch.manual_seed(self.run.config.seed + 1000 * self.run.rank + self.step)
        except (KeyError, ValueError, RuntimeError, TypeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"{self.path}: holds another network or is damaged ({reason})") from None

    def share(self):
        """Every process gets rank 0's parameters and buffers."""
        if self.run.world > 1:
            for part in self.parts.values():
                for value in part.state_dict().values() if isinstance(part, nn.Module) else ():
                    torch.distributed.broadcast(value.data, 0)

    def save(self):
        if self.run.rank == 0:
            content = self.content() if callable(self.content) else self.content
            state = {name: part.state_dict() for name, part in self.parts.items()}
            random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
            lipsync.save_checkpoint(self.path, {**content, "state": state, "step": self.step,
                                                "steps": self.total, "random": random})
        self.saved_at = time.perf_counter()

    def steps(self, batches):
        """(step, batch on the device) until all steps are done or a signal comes."""
        run, waited, self.waiting = self.run, time.perf_counter(), 0.0
        self.began = time.perf_counter()
        handlers = {number: signal.signal(number, self.note_signal)
                    for number in (signal.SIGTERM, signal.SIGINT)}
        self.bar = tqdm(total=self.total, initial=self.step, desc=self.name, unit="step",
                        disable=run.rank > 0, mininterval=1)
        try:
            for batch in batches:
                self.waiting += time.perf_counter() - waited
                yield self.step, {name: value.to(run.device, non_blocking=True)
                                  for name, value in batch.items()}
                self.step += 1
                self.bar.update()
                self.stopped = self.asked_to_stop() and self.step < self.total
                if self.stopped:
                    break
                if time.perf_counter() - self.saved_at > 60 * run.config.save_minutes:
                    self.save()
                waited = time.perf_counter()
            self.share()
            self.save()
        except (BadInput, RuntimeError) as error:  # from a loader process, with a traceback
            reason = str(error).strip().splitlines()[-1].split("BadInput: ")[-1]
            raise BadInput(reason) from None
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if run.rank == 0:
            draw_curves(self.log_path, run.out / "curves.png")
        wait_for_all(run.world)  # the next stage reads what rank 0 has written
        if self.stopped and run.rank == 0:
            print(f"{self.name}: stopped; {self.path} is saved, --resume goes on")

    def note_signal(self, number, frame):
        self.signals.append(number)

    def asked_to_stop(self):
        """Whether any process got a signal."""
        if self.run.world == 1:
            return bool(self.signals)
        asked = torch.tensor(len(self.signals), device=self.run.device)
        torch.distributed.all_reduce(asked)
        return bool(asked.item())

    def begin_log(self):
        """Rows that a resumed run will write again are dropped."""
        rows = []
        if self.log_path.is_file():
            with open(self.log_path) as file:
                rows = [row for row in csv.DictReader(file)
                        if row["stage"] != self.name or int(row["step"]) <= self.step]
        with open(self.log_path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def log(self, figures, infos=(), batch=None):
        """Every 20 steps a row of log.csv; a figure that is not finite is BadInput with the clips'
        names."""
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            clips = sorted({infos[int(i)].path.name for i in batch["clip"]}) if infos else []
            raise BadInput(f"{self.name}: {', '.join(bad)} is not finite at step {self.step}; "
                           f"clips of the batch: {', '.join(clips)}; the last good checkpoint is "
                           f"{self.path}")
        done = self.step + 1
        if self.run.rank > 0 or done % 20 and done != self.total:
            return
        passed = time.perf_counter() - self.began
        rate = (done - self.logged) * self.frames * self.run.world / passed
        figures = {**figures, "frames_per_s": rate, "loader_share": self.waiting / passed}
        row = {name: f"{value:.5g}" for name, value in figures.items()}
        with open(self.log_path, "a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerow({"stage": self.name, "step": done, **row})
        shown = ("total", "accuracy", "frames_per_s")
        self.bar.set_postfix({name: row[name] for name in shown if name in row})
        self.began, self.waiting, self.logged = time.perf_counter(), 0.0, done


def kind_of(stage):
    """The kind that a stage's checkpoint names; the generator's can be used as weights."""
    return "lipsync" if stage == "generator" else stage


def warm_cosine(optimizer, steps, warmup):
    """The rate rises in `warmup` of the steps, then falls as CosineAnnealingLR does (S3)."""
    rising = max(1, round(steps * warmup)) if warmup else 0
    if not rising:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first = 1 / (rising + 1)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, first, total_iters=rising)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - rising))
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[rising])


def update(run, parameters, optimizer, scheduler, limit=1.0):
    """Average gradients over processes, clip their norm, step. -> the norm before clipping"""
    parameters = [p for p in parameters if p.grad is not None]
    if run.world > 1:
        for p in parameters:
            torch.distributed.all_reduce(p.grad)
            p.grad /= run.world
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def freeze(module):
    """No gradient to its weights, and eval mode: BatchNorm statistics stay. (S3)"""
    return module.eval().requires_grad_(False)


def draw_curves(log, png, width=480, height=200):
    """log.csv -> a panel per stage and figure over the steps, two in a row."""
    with open(log) as file:
        rows, panels = list(csv.DictReader(file)), []
    for stage in STAGES:
        for name in Keeper.COLUMNS[2:12]:
            points = [(int(row["step"]), float(row[name])) for row in rows
                      if row["stage"] == stage and row[name]]
            if not points:
                continue
            steps, values = np.array(points).T
            panel = np.full((height, width, 3), 255, np.uint8)
            x = 10 + (width - 20) * (steps - steps[0]) / max(np.ptp(steps), 1)
            y = height - 10 - (height - 40) * (values - values.min()) / max(np.ptp(values), 1e-9)
            line = np.stack([x, y], 1).round().astype(np.int32)
            cv2.polylines(panel, [line], False, (160, 60, 20), 1, cv2.LINE_AA)
            words = f"{stage} {name}: {values[0]:.3g} .. {values[-1]:.3g}"
            cv2.putText(panel, words, (10, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0))
            panels.append(panel)
    if panels:
        panels += [np.full_like(panels[0], 255)] * (len(panels) % 2)
        pairs = [np.hstack(panels[i:i + 2]) for i in range(0, len(panels), 2)]
        cv2.imwrite(str(png), np.vstack(pairs))


# ---------------------------------------------------------------- the experts
def mouths(pictures, size):
    """uint8 lower halves [..., 3, H, 2H] -> float 0..1; for small experts only what they see"""
    pictures = pictures.float() / 255
    return experts.mouth_view(pictures, experts.VIEW_PX[size]) if size == "small" else pictures


def train_sync(run):
    """S3(1): in sync or not, for S frames and their sound; half of the negatives come from the
    same clip. -> False if stopped early"""
    config = run.config
    prepare_features(run, noisy=True)
    net = experts.SyncXNet(config.expert_size, run.sync_audio, run.net_config.audio_dim,
                           config.expert_weights or None)
    net.to(run.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), config.sync_lr, betas=(0.9, 0.99))
    scheduler = warm_cosine(optimizer, config.sync_steps, config.warmup)
    dataset = data.SyncDataset(run.clips, run.net_config, experts.GROUP, config.seed,
                               features=run.features, sync_audio=run.sync_audio)
    parts = dict(net=net, optimizer=optimizer, scheduler=scheduler)
    batch_size = 4 * config.batch
    keeper = Keeper(run, "sync", parts, config.sync_steps, batch_size * experts.GROUP,
                    {"kind": "sync", "config": net.config})
    net.train()
    for step, batch in keeper.steps(make_loader(run, dataset, keeper, batch_size)):
        with lipsync.autocast(run.device):
            pictures = experts.jitter_pictures(mouths(batch["pictures"], config.expert_size))
            negatives = all_negatives(batch)
            loss, accuracy = experts.sync_batch_loss(net, pictures, batch["sound"], negatives)
        loss.backward()
        norm = update(run, net.parameters(), optimizer, scheduler)
        keeper.log(dict(total=loss.item(), sync=loss.item(), accuracy=float(accuracy),
                        lr=scheduler.get_last_lr()[0], grad_norm=norm), run.clips, batch)
    return not keeper.stopped


def all_negatives(batch):
    """Sounds that do not belong: X of the same clip, X of others. sound [B, ...], negatives
    [B, X, ...] -> [B, 2X, ...]

    A neighbour in the batch lends its sound; if it shows the same clip, this clip's own negative
    stands in."""
    sound, negatives, others = batch["sound"], batch["negatives"], []
    for k in range(negatives.shape[1]):
        same = batch["clip"] == batch["clip"].roll(k + 1, 0)  # [B]
        same = same.view(-1, *[1] * (sound.dim() - 1))
        others.append(torch.where(same, negatives[:, k], sound.roll(k + 1, 0)))
    return torch.cat([negatives, torch.stack(others, 1)], 1)


def train_lip(run):
    """S3(2): the text of a whole clip from its lower halves. -> False if stopped early"""
    config = run.config
    infos = [info for info in run.clips if info.text]
    if not infos:
        if run.rank == 0:
            print("lip: skipped, no clip has a text")
        return True
    net = experts.LipReader(config.expert_size).to(run.device)
    optimizer = torch.optim.Adam(net.parameters(), config.lip_lr, betas=(0.9, 0.99))
    scheduler = warm_cosine(optimizer, config.lip_steps, config.warmup)
    parts = dict(net=net, optimizer=optimizer, scheduler=scheduler)
    keeper = Keeper(run, "lip", parts, config.lip_steps, config.batch * data.CLIP_FRAMES,
                    {"kind": "lip", "config": net.config})
    dataset = data.SentenceDataset(infos, config.seed)
    net.train()
    for step, batch in keeper.steps(make_loader(run, dataset, keeper, config.batch)):
        with lipsync.autocast(run.device):
            video = experts.jitter_pictures(mouths(batch["video"], config.expert_size), 0.5)
            loss = experts.lip_batch_loss(net, video, batch["tokens"], batch["length"])
        loss.backward()
        norm = update(run, net.parameters(), optimizer, scheduler)
        keeper.log(dict(total=loss.item(), lip=loss.item(), lr=scheduler.get_last_lr()[0],
                        grad_norm=norm), infos, batch)
    return not keeper.stopped


def load_experts(run):
    """The experts trained by this run, else those inside --weights, frozen: sync or None, reader or
    None"""
    given = lipsync.load_checkpoint(run.config.weights) if run.config.weights else {}
    nets = []
    for name in ("sync", "lip"):
        path, content = run.out / f"{name}.pt", given.get(name)
        if path.is_file():
            saved = lipsync.load_checkpoint(path, name)
            content = {"config": saved["config"], "state": saved["state"]["net"]}
        nets.append(content and freeze(experts.load_expert(content).to(run.device)))
    config = nets[0].config if nets[0] else {}
    dim = run.net_config.audio_dim
    if config.get("audio") == "features" and not (run.features and config["audio_dim"] == dim):
        raise BadInput(f"the sync expert hears {config['audio_dim']} features of a frozen encoder, "
                       f"this run's is {run.net_config.audio_encoder} ({dim}): train one for it "
                       "(--stage sync), or use --sync-weight 0 and another --out")
    return nets


@torch.no_grad()
def grade_sync(run, sync):
    """Held-out accuracy of the sync expert, 0..1; NaN if no clip could be read."""
    infos, grades = run.held_out or run.clips, []
    for info in infos[::max(1, len(infos) // 60)]:
        clip = data.load_or_skip(info.path)
        if clip is None or len(clip) <= 2 * experts.GROUP:
            continue
        sound = torch.from_numpy(clip.mel.astype(np.float32))
        if run.features:
            sound = read_features(run, info)
        pictures = data.lower_halves(clip, range(len(clip)))
        grades.append(experts.sync_accuracy(*experts.embed_clip(sync, pictures, sound)))
    return float(np.mean(grades)) if grades else math.nan


# ---------------------------------------------------------------- the mouth
def train_mouth(run):
    """S2(4)a-f and LipHead, from landmarks and sound alone. -> False if stopped early

    Choice: a third of the steps first, to find by how much each video's own sound is late; then
    from the start with sounds moved to their lips."""
    config = run.config
    if config.no_warp:
        return True
    prepare_features(run)
    path = run.out / "offsets.json"
    if not config.keep_offsets and not (config.resume and path.is_file()):
        net, encoder = build_networks(run)
        samples = data.MouthSamples(run.clips, run.net_config, run.features, config.seed)
        parts, optimizer, scheduler = mouth_parts(config, net, encoder, config.mouth_steps // 3)
        for step in tqdm(range(config.mouth_steps // 3), desc="mouth, first try", unit="step",
                         disable=run.rank > 0):
            batch = samples.batch(step, config.mouth_batch)
            mouth_step(run, net, encoder, batch, optimizer, scheduler)
        offsets = find_offsets(run, net, encoder)
        if run.rank == 0:
            path.write_text(json.dumps(offsets, indent=1))
            counts = np.unique(list(offsets.values()), return_counts=True)
            words = [f"{late:+d}: {count}" for late, count in zip(*counts)]
            print("sound moved to the lips, frames: videos  " + (", ".join(words) or "none"))
        wait_for_all(run.world)
    net, encoder = build_networks(run)
    samples = data.MouthSamples(run.clips, run.net_config, run.features, config.seed,
                                read_offsets(run))
    parts, optimizer, scheduler = mouth_parts(config, net, encoder, config.mouth_steps)
    keeper = Keeper(run, "mouth", parts, config.mouth_steps, 10 * config.mouth_batch,
                    {"kind": "mouth", "config": dataclasses.asdict(run.net_config)})
    numbers = range(keeper.step, keeper.total)
    batches = (samples.batch(step * run.world + run.rank, config.mouth_batch) for step in numbers)
    for step, batch in keeper.steps(batches):
        loss, norm = mouth_step(run, net, encoder, batch, optimizer, scheduler)
        keeper.log(dict(total=loss, mouth=loss, lr=scheduler.get_last_lr()[0], grad_norm=norm))
    return not keeper.stopped


def read_offsets(run):
    """What the mouth stage found -> {source: frames}; {} with --keep-offsets"""
    return {} if run.config.keep_offsets else data.read_json(run.out / "offsets.json")


def build_networks(run):
    """The network as --weights or the seed has it, and its audio encoder -> LipSync, module"""
    torch.manual_seed(run.config.seed)  # the same in every process
    net = lipsync.LipSync(run.net_config).to(run.device, memory_format=torch.channels_last)
    encoder = run.audio_encoder
    if run.config.weights:
        start_from(net, encoder, run.config.weights)
    elif not encoder.frozen:
        start = lipsync.build_audio_encoder(run.net_config)
        sync, _ = load_experts(run)
        if sync and sync.audio_encoder is not None and sync.config["audio_dim"] == encoder.dim:
            start = sync.audio_encoder  # it has learned to hear there
        encoder.load_state_dict(start.state_dict())
    return net, encoder


def start_from(net, audio_encoder, path):
    """--weights: copy a checkpoint's networks; a config that differs in shape is named by field."""
    content = lipsync.load_checkpoint(path)
    try:
        net.load_state_dict(content["model"])
        if not audio_encoder.frozen:
            audio_encoder.load_state_dict(content["audio_encoder"]["state"])
    except (KeyError, RuntimeError):
        saved, ours = content.get("config", {}), dataclasses.asdict(net.config)
        differ = [f"{name} {saved.get(name)} there, {value} here" for name, value in ours.items()
                  if tuple(np.ravel(saved.get(name))) != tuple(np.ravel(value))]
        reason = "; ".join(differ) or "other layers"
        raise BadInput(f"{path}: does not fit this network: {reason}") from None


def mouth_parts(config, net, encoder, steps):
    """-> what a mouth.pt holds, optimizer, scheduler"""
    parameters = net.sound_parameters()
    modules = dict(fusion=net.fusion, lip_head=net.lip_head)
    if not encoder.frozen:
        parameters, modules = parameters + list(encoder.parameters()), modules | dict(audio=encoder)
    optimizer = torch.optim.AdamW(parameters, config.mouth_lr, betas=(0.9, 0.99), weight_decay=0.05)
    scheduler = warm_cosine(optimizer, steps, 0.1)
    return dict(**modules, optimizer=optimizer, scheduler=scheduler), optimizer, scheduler


def mouth_step(run, net, encoder, batch, optimizer, scheduler):
    """One step of the mouth stage -> loss, gradient norm"""
    batch = {name: value.to(run.device) for name, value in batch.items()}
    net.train()
    audio = batch_audio(batch, encoder)  # [B, F, D]
    audio = audio + 0.1 * torch.randn_like(audio)  # features that differ a little ask for the same
    lips = net.predict_lips(audio, batch["amplitude"], batch["points"])
    loss = losses.mouth_loss(lips, batch["lips"], lipsync.mouth_width(batch["points"]))
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return loss.item(), update(run, parameters, optimizer, scheduler)


def batch_audio(batch, audio_encoder):
    """The audio windows of a batch of samples, read or encoded -> [B, F, D]"""
    if "audio" in batch:
        return batch["audio"].flatten(0, -3)
    features = audio_encoder.encode_mel(batch["mel"])  # [B, L, D]
    rows = torch.arange(len(features), device=features.device)[:, None, None]
    return features[rows, batch["window"]].flatten(0, 1)


@torch.no_grad()
def find_offsets(run, net, encoder):
    """By how many frames the sound of each source video is late -> {source: frames}.

    The shift at which the predicted opening correlates best with the true one, where that is
    clear. Videos from the web are often one to three frames off, which teaches a generator to
    mumble (LatentSync, 2024, shifts them, too)."""
    net.eval()
    fits = {}
    for info in tqdm(run.clips, desc="offsets", unit="clip", disable=run.rank > 0):
        clip = data.load_or_skip(info.path)
        if clip is None or len(clip) < 40:
            continue
        lips = predict_clip(run, net, encoder, clip, info)
        made, true = (faces.mouth_shape(points)[:, 0] for points in (lips, clip.landmarks))
        fits.setdefault(info.source, []).append(shifted_correlations(made, true, LATEST))
    offsets = {}
    for source, some in fits.items():
        curve = np.mean(some, 0)
        best = int(np.argmax(curve)) - LATEST
        clear = curve.max() > 0.45 and curve.max() - curve[LATEST] > 0.05
        if clear and abs(best) < LATEST:
            offsets[source] = best
    return offsets


def predict_clip(run, net, encoder, clip, info):
    """A clip's landmarks with the lips and jaw that its sound asks for -> [T, K, 3] crop px"""
    refs = faces.select_references(clip.landmarks, run.net_config.refs)
    points = faces.place_points(clip.landmarks[refs], clip.landmarks)
    points = torch.from_numpy(points).to(run.device)  # [T, R, 2, K, 2]
    if run.features:
        features = read_features(run, info)
    else:
        mel = torch.from_numpy(clip.mel.astype(np.float32)).to(run.device)
        features = encoder.encode_mel(mel[None])[0]
    audio = lipsync.AudioSelector(run.net_config)(features[None].to(run.device))[0]  # [T, F, D]
    landmarks = clip.landmarks.copy()
    lips = net.predict_lips(audio[:len(clip)], 1.0, points)
    landmarks[:, faces.MOUTH, :2] = lips.cpu().numpy() * faces.CROP_PX
    return landmarks


def shifted_correlations(made, true, reach):
    """Pearson's r of made[t+s] and true[t] for s = -reach .. reach; 0 where one stands still."""
    T, curve = len(true), []
    for s in range(-reach, reach + 1):
        a, b = made[max(0, s):T + min(0, s)], true[max(0, -s):T - max(0, s)]
        a, b = a - a.mean(), b - b.mean()
        curve.append(float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-9)))
    return curve


# ---------------------------------------------------------------- the generator
def train_generator(run):
    """loss = w_r rec + w_s sync + w_c lip + w_p perceptual + w_g gan, experts and sound frozen (S3).
    -> False if stopped early"""
    config = run.config
    prepare_features(run)
    net, encoder = build_networks(run)
    if not config.no_warp:
        load_mouth(run, net, encoder)
    judges = load_judges(run)
    learn_sound = config.no_warp and not encoder.frozen
    parameters = [p for p in net.parameters() if p.requires_grad]
    parameters += list(encoder.parameters()) if learn_sound else []
    optimizer = torch.optim.Adam(parameters, config.lr, betas=(0.9, 0.99))
    scheduler = warm_cosine(optimizer, config.steps, config.warmup)
    discriminator = judges.discriminator
    d_optimizer = torch.optim.Adam(discriminator.parameters(), config.discriminator_lr,
                                   betas=(0.5, 0.99))
    d_scheduler = warm_cosine(d_optimizer, config.steps, 0)
    parts = dict(net=net, optimizer=optimizer, scheduler=scheduler, discriminator=discriminator,
                 d_optimizer=d_optimizer, d_scheduler=d_scheduler)
    if not encoder.frozen:
        parts["audio"] = encoder
    content = functools.partial(weights_content, run, net, encoder, judges)
    keeper = Keeper(run, "generator", parts, config.steps, config.batch * config.group, content)
    spread = round(config.sync_start * config.steps) * config.batch * run.world
    dataset = data.ClipDataset(run.clips, run.net_config, config.group, config.seed,
                               config.amplitude_share, config.random_refs, features=run.features,
                               sync_audio=judges.sync_audio, spread=spread,
                               offsets=read_offsets(run))
    forward = torch.compile(net) if config.compile else net
    for step, batch in keeper.steps(make_loader(run, dataset, keeper, config.batch)):
        # 1. generator
        set_training(net, encoder, learn_sound)
        figures, pairs = {}, []
        micro = config.micro or config.batch
        for first in range(0, config.batch, micro):
            part = {name: value[first:first + micro] for name, value in batch.items()}
            share = len(part["clip"]) / config.batch
            with lipsync.autocast(run.device):
                output, target = draw(run, forward, encoder, part, step)
                terms = generator_terms(run, judges, output, target, part, step)
            total = sum(weight * term for weight, term in terms.values())
            (total * share).backward()
            pairs.append((output.detach(), target, share))
            for name, (_, value) in {"total": (1, total), **terms}.items():
                figures[name] = figures.get(name, 0) + value.item() * share
        figures["grad_norm"] = update(run, parameters, optimizer, scheduler, limit=0.5)
        figures["lr"] = scheduler.get_last_lr()[0]
        # 2. discriminator
        if "gan" in figures:
            d_optimizer.zero_grad(set_to_none=True)  # what the generator's step left there
            figures["discriminator"] = 0.0
            for output, target, share in pairs:
                with lipsync.autocast(run.device):
                    real = discriminator(lower_half(target))
                    fake = discriminator(lower_half(output))
                    loss = losses.discriminator_loss(real, fake, config.gan) * share
                loss.backward()
                figures["discriminator"] += loss.item()
            update(run, discriminator.parameters(), d_optimizer, d_scheduler)
        # 3. log, pictures
        keeper.log(figures, run.clips, batch)
        if run.rank == 0 and ((step + 1) % config.sample_steps == 0 or step + 1 == config.steps):
            save_samples(run, net, encoder, step + 1)
    if not keeper.stopped and run.rank == 0:
        lipsync.save_checkpoint(run.out / "weights.pt", content(half=True))
    return not keeper.stopped


@dataclass
class Judges:
    """Who judges the generator's pictures; None: that loss is off."""
    sync: nn.Module
    sync_file: nn.Module  # goes into weights.pt, also if it is not good enough to judge
    reader: nn.Module
    perceptual: nn.Module
    discriminator: nn.Module
    sync_audio: str


def load_judges(run):
    """Experts, VGG, discriminator; prints which losses run and why one does not."""
    config = run.config
    sync_file, reader = load_experts(run)
    accuracy = grade_sync(run, sync_file) if sync_file else math.nan
    sync = sync_file if accuracy >= config.min_sync_accuracy else None
    perceptual = None
    if config.perceptual_weight:
        perceptual = losses.PerceptualLoss(config.vgg).to(run.device)
    torch.manual_seed(run.config.seed)
    discriminator = losses.Discriminator().to(run.device, memory_format=torch.channels_last)
    if run.rank == 0:
        print("losses: " + "; ".join(f"{name} {text}" for name, text in
                                     loss_report(config, sync_file, accuracy, reader).items()))
    sync_audio = sync_file.config["audio"] if sync_file else run.sync_audio
    return Judges(sync, sync_file, reader, perceptual, discriminator, sync_audio)


def loss_report(config, sync, accuracy, reader):
    """Which losses run, from when on, and why one does not: {name: text}"""
    since = f"from step {round(config.sync_start * config.steps)}"
    gan_since = f"from step {round(config.gan_start * config.steps)}"
    report = dict(reconstruction=f"{config.rec_weight} + {config.coarse_weight} coarse",
                  perceptual=f"{config.perceptual_weight} ({config.vgg})",
                  sync=f"{config.sync_weight} {since} (held-out accuracy {accuracy:.2f})",
                  lip=f"{config.lip_weight} {since}",
                  gan=f"{config.gan_weight} ({config.gan}) {gan_since}")
    if not reader:
        report["lip"] = "off (no lip reader: no clip has a text, or --stage lip has not run)"
    if not sync:
        report["sync"] = "off (no expert: --stage sync)"
    elif not accuracy >= config.min_sync_accuracy:
        report["sync"] = (f"off (the expert's held-out accuracy {accuracy:.2f} is below "
                          f"--min-sync-accuracy {config.min_sync_accuracy})")
    for name in ("perceptual", "sync", "lip", "gan"):
        if not getattr(config, f"{name}_weight"):
            report[name] = "off (weight 0)"
    return report


def load_mouth(run, net, encoder):
    """mouth.pt's sound parameters into the network, frozen: the lips are learned."""
    path = run.out / "mouth.pt"
    if path.is_file():
        saved = lipsync.load_checkpoint(path, "mouth")
        try:
            net.fusion.load_state_dict(saved["state"]["fusion"])
            net.lip_head.load_state_dict(saved["state"]["lip_head"])
            if not encoder.frozen:
                encoder.load_state_dict(saved["state"]["audio"])
        except (KeyError, RuntimeError):
            raise BadInput(f"{path}: is another network's mouth; take another --out") from None
    elif not run.config.weights:
        raise BadInput(f"{path}: no such file; run --stage mouth first, or give --weights")
    for parameter in [*net.sound_parameters(), *encoder.parameters()]:
        parameter.requires_grad_(False)


def set_training(net, encoder, learn_sound):
    """Training mode, but for the frozen part that hears: no dropout there."""
    net.train()
    encoder.train(learn_sound)
    if net.lip_head is not None:
        net.fusion.adapter.eval()
        net.lip_head.eval()


def draw(run, forward, audio_encoder, batch, step):
    """A batch of B groups -> output and target [BS, 3, H, W]; gamma and brightness (S3) are the
    same for all pictures of a group."""
    B, S = batch["target"].shape[:2]
    refs = shade(batch["refs"], batch).repeat_interleave(S, 0)  # [BS, R, 3, H, W]
    target = shade(batch["target"], batch).flatten(0, 1)  # [BS, 3, H, W]
    audio = batch_audio(batch, audio_encoder)  # [BS, F, D]
    lips = batch["lips"].flatten(0, 1)  # [BS, P, 2]
    noise = torch.randn_like(lips[:, :1]) + 0.7 * torch.randn_like(lips)  # as predictions miss
    lips = lips + run.config.lips_noise_px / faces.CROP_PX * noise
    generator = np.random.default_rng([run.config.seed, step])
    if generator.random() >= run.config.true_lips:
        lips = None
    masked = target * lipsync.half_mask(target)
    output = forward(refs, masked, audio, batch["amplitude"].flatten(),
                     batch["points"].flatten(0, 1), lips)
    return output, target


def shade(pictures, batch):
    """uint8 [B, n, 3, H, W] -> float 0..1 with the batch's gamma and brightness"""
    gamma, brightness = (batch[name].view(-1, 1, 1, 1, 1) for name in ("gamma", "brightness"))
    return ((pictures.float() / 255) ** gamma * brightness).clamp(0, 1)


def lower_half(pictures):
    return pictures[:, :, pictures.shape[2] // 2:]


def generator_terms(run, judges, output, target, batch, step):
    """The losses of S3 in their order: {name: (weight, loss)}; output, target [BS, 3, H, W]"""
    c, terms, progress = run.config, {}, step / run.config.steps
    low, S = lower_half(output), run.config.group
    groups = low.unflatten(0, (-1, S))  # [B, S, 3, H/2, W]
    in_sync = batch["in_sync"]
    # S3(1): BCE(cos(sound, lips), 1)
    if c.sync_weight and judges.sync is not None and progress >= c.sync_start and in_sync.any():
        sound = judges.sync.embed_audio(batch["sync"][in_sync])
        lips = judges.sync.embed_video(groups[in_sync])
        terms["sync"] = c.sync_weight, losses.sync_loss(sound, lips)
    # S3(2): -log p(text | video)
    if c.lip_weight and judges.reader is not None and progress >= c.sync_start:
        loss = lip_term(run, judges.reader, groups, batch)
        if loss is not None:
            terms["lip"] = c.lip_weight, loss
    # S3(3): mean |output - target|, the mouth weighted; also of 4 x 4 means
    mask = mouth_mask(batch["mouth"].flatten(0, 1), output.shape[2])
    loss = losses.reconstruction_loss(output, target, c.mouth_weight, mask)
    terms["reconstruction"] = c.rec_weight, loss
    if c.coarse_weight:
        made, true, at = [fn.avg_pool2d(x.float(), 4) for x in (output, target, mask)]
        loss = losses.reconstruction_loss(made, true, c.mouth_weight, at)
        terms["coarse"] = c.coarse_weight, loss
    # S3(4): mean |VGG(output) - VGG(target)|
    if judges.perceptual is not None:
        terms["perceptual"] = c.perceptual_weight, judges.perceptual(output, target)
    # S3(5): what the discriminator makes of the lower half
    if c.gan_weight and progress >= c.gan_start:
        terms["gan"] = c.gan_weight, losses.generator_loss(judges.discriminator(low), c.gan)
    return terms


def mouth_mask(boxes, size):
    """boxes [B, 4] px (x0, y0, x1, y1) -> [B, 1, H, W], 1 inside"""
    at = torch.arange(size, device=boxes.device)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)  # [B, 1]
    across, down = (at >= x0) & (at < x1), (at >= y0) & (at < y1)  # [B, size]
    return (down[:, None, :, None] & across[:, None, None, :]).float()


def lip_term(run, reader, groups, batch):
    """S3(2): the S generated frames of one group replace the real ones in their clip, and the whole
    sentence is read. groups [B, S, 3, h, w] lower halves -> scalar, or None: no text."""
    for b in range(len(groups)):
        info = run.clips[int(batch["clip"][b])]
        if not batch["in_sync"][b] or not info.text:
            continue
        clip = data.load_clip(info.path)
        video = torch.from_numpy(data.lower_halves(clip, range(len(clip)))).to(groups) / 255
        video = (video ** batch["gamma"][b] * batch["brightness"][b]).clamp(0, 1)  # [T, 3, h', w']
        made = fn.interpolate(groups[b], size=video.shape[-2:], mode="area")
        made = made.flip(-1) if batch["flip"][b] else made
        start = int(batch["start"][b])
        video = torch.cat([video[:start], made, video[start + len(made):]])[None]
        tokens = torch.tensor([data.encode_text(clip.text)], device=groups.device)  # [1, U]
        return losses.lip_reading_loss(reader(video, tokens), tokens, data.PAD)
    return None


def plain_state(module, half):
    """A module's state; half: its floats as float16"""
    state = module.state_dict()
    if half:
        state = {name: v.half() if v.is_floating_point() else v for name, v in state.items()}
    return state


def weights_content(run, net, audio_encoder, judges, half=False):
    """What a lipsync checkpoint holds for infer.py and experts.py: plain types and tensors."""
    notice = ""
    if "whisper" in run.net_config.audio_encoder:
        notice = "openai/whisper encoder, MIT licence, Copyright (c) 2022 OpenAI"
    machine = ("data", "out", "weights", "audio_encoder")
    recipe = {name: value for name, value in dataclasses.asdict(run.config).items()
              if name not in machine}
    encoder = {"dims": audio_encoder.dims, "state": plain_state(audio_encoder, half)}
    return {"kind": "lipsync", "config": dataclasses.asdict(net.config),
            "model": plain_state(net, half), "audio_encoder": encoder,
            "sync": experts.pack_expert(judges.sync_file, half),
            "lip": experts.pack_expert(judges.reader, half),
            "about": {"recipe": recipe, "notice": notice, "date": time.strftime("%Y-%m-%d"),
                      "data": f"{len(run.clips)} training clips, {len(run.held_out)} held out"}}


@torch.no_grad()
def save_samples(run, net, encoder, step, rows=6):
    """samples/STEP.png: closed reference | open reference | output | truth, of held-out clips."""
    net.eval()
    encoder.eval()
    infos = run.held_out or run.clips
    sheet = []
    for info in infos[::max(1, len(infos) // rows)][:rows]:
        clip = data.load_or_skip(info.path)
        if clip is None:
            continue
        refs = faces.select_references(clip.landmarks, run.net_config.refs)
        middle = len(clip) // 2
        pictures = np.stack([clip.frame(i) for i in [*refs, middle]])
        points = faces.place_points(clip.landmarks[refs], clip.landmarks[[middle]])
        sound = torch.from_numpy(clip.sound())[None].to(run.device)
        audio = lipsync.AudioSelector(run.net_config)(encoder(sound))[:, middle]  # [1, F, D]
        with lipsync.autocast(run.device):
            made = lipsync.redraw(net, pictures[:-1], pictures[-1:], points, audio)
        sheet.append(np.concatenate([pictures[0], pictures[-2], made[0], pictures[-1]], 1))
    if not sheet:  # every one of them is broken, which load_or_skip said
        return
    folder = run.out / "samples"
    folder.mkdir(exist_ok=True)
    cv2.imwrite(str(folder / f"{step:06d}.png"), np.concatenate(sheet)[..., ::-1])


# ---------------------------------------------------------------- python train.py
def is_finished(run, stage):
    """Whether RUN/ holds all of a stage's steps (and the generator's weights.pt). BadInput where it
    holds some of them and --resume is missing, or another number of steps was planned."""
    path = run.out / f"{stage}.pt"
    if not path.is_file():
        return False
    steps = run.config.steps if stage == "generator" else getattr(run.config, f"{stage}_steps")
    saved = lipsync.load_checkpoint(path, kind_of(stage))
    step, planned = saved.get("step"), saved.get("steps")
    if type(step) is not int or type(planned) is not int or not 0 <= step <= planned:
        raise BadInput(f"{path}: step {step} of {planned}: damaged, or not of this version")
    if planned != steps and step > 0:
        raise BadInput(f"{path}: was planned for {planned} steps, which its rate follows, not "
                       f"{steps}; to begin anew, delete it or take another --out")
    done = step == planned and (stage != "generator" or (run.out / "weights.pt").is_file())
    if step > 0 and not done and not run.config.resume:
        raise BadInput(f"{path}: stopped at step {step} of {planned}; --resume goes on; to begin "
                       "anew, delete it or take another --out")
    return done


def main():
    config = parse_flags()
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo",
                                             timeout=datetime.timedelta(days=1))  # rank 0 prepares
    if config.perceptual_weight and config.stage in ("all", "generator"):
        losses.load_vgg(config.vgg)  # missing weights are told now, not after hours of training
    if config.stage == "eval" and not config.weights:
        config = dataclasses.replace(config, weights=str(out / "weights.pt"))
    run = open_run(config)
    asked = [stage for stage in STAGES if config.stage in ("all", stage)]
    done = [stage for stage in asked if is_finished(run, stage)]
    if run.rank == 0:
        if asked:  # and none of them refused: the config of a stopped run stays
            (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
        for stage in done:
            print(f"{stage}: done already, {out / stage}.pt; to do it again, delete it")
        print(f"{len(run.clips)} training clips, {len(run.held_out)} held out; {run.device}, "
              f"{run.world} processes, seed {config.seed}")
    trainers = dict(sync=train_sync, lip=train_lip, mouth=train_mouth, generator=train_generator)
    for stage in asked:
        torch.manual_seed(config.seed)  # a stage begins alike, whatever was done before it
        if stage not in done and not trainers[stage](run):
            return
    if config.stage in ("all", "eval") and run.rank == 0:
        from bench import evaluate  # measuring is not in the patent: a room of its own
        weights = config.weights if config.stage == "eval" else out / "weights.pt"
        table = evaluate.evaluate(run, weights)
        (out / "eval.json").write_text(json.dumps(table, indent=1))
        evaluate.print_table(table)
        print(json.dumps(table))


if __name__ == "__main__":
    lipsync.cli(main)
