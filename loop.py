"""What the stages of train.py share: the run's clips and networks, the checkpoints, the loop.

    a run      | Run, open_run, network_config
    sounds     | name_features, prepare_features: a frozen encoder hears every clip once
    networks   | build_networks, load_experts, begin_expert
    the loop   | Keeper: checkpoint, log, signals; is_finished
    processes  | wait_for_all, make_loader, update
    the rate   | make_adam, warm_cosine

A stage is a straight loop:

    for step, batch in keeper.steps(make_loader(run, dataset, keeper, size)):
        loss = ...
        loss.backward()
        norm = update(run, optimizer, scheduler)
        keeper.log(dict(total=loss.item(), grad_norm=norm))
"""
import csv
import dataclasses
import math
import os
import signal
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import common
import data
import experts
import lipsync
import media
import sampling
from audio import build_audio_encoder, parse_audio_encoder
from common import BadInput
from options import TrainConfig


# ---------------------------------------------------------------- what a run is made of
@dataclass
class Run:
    """What the stages share; no training state."""
    config: TrainConfig
    out: Path
    rank: int
    world: int
    device: torch.device
    clips: list  # of data.ClipInfo, to train on
    held_out: list
    net_config: lipsync.Config
    audio_encoder: nn.Module
    features_key: str  # names a frozen encoder's feature files; None: it learns
    start: dict = field(default_factory=dict)  # what the checkpoint of --weights holds

    @property
    def sync_audio(self):
        return self.config.sync_audio or ("features" if self.features_key else "mel")


def open_run(config):
    """Prepares the videos that are new, and puts a Run together."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    own_gpu = world > 1 and config.device == "auto" and torch.cuda.is_available()
    device = common.pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if own_gpu else config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank == 0 and (not data.list_clips(config.data) or data.list_videos(config.data)):
        data.print_report(data.prepare(config.data))  # prepared clips alone are fine, too
    wait_for_all(world)
    clips, held_out = data.split_clips(data.list_clips(config.data), config.held_out)
    start = common.load_checkpoint(config.weights) if config.weights else {}
    torch.manual_seed(config.seed)  # of the audio encoder, if it learns
    net_config, encoder = network_config(config, start)
    key = name_features(net_config.audio_encoder, encoder) if encoder.frozen else None
    return Run(config, Path(config.out), rank, world, device, clips, held_out, net_config,
               encoder.to(device), key, start)


def network_config(config, start):
    """The config of --weights or the preset, as the flags change it -> it, audio encoder"""
    names = ("audio_encoder", "decoder", "refs", "spacing")
    changes = {name: getattr(config, name) for name in names if getattr(config, name)}
    off = dict(one_way="bidirectional", no_mask="mask_upper", no_warp="warp")
    changes |= {name: False for flag, name in off.items() if getattr(config, flag)}
    try:
        base = lipsync.Config(**start["config"]) if start else lipsync.PRESETS[config.preset]
        net_config = dataclasses.replace(base, checkpointing=config.checkpointing, **changes)
    except (KeyError, TypeError, ValueError) as error:
        where = f"{config.weights}: " if start else ""
        raise BadInput(where + str(error).split(", got")[0]) from None
    kept = None if config.audio_encoder else start.get("audio_encoder")
    with data.naming(config.weights if kept else "--audio-encoder"):
        encoder = build_audio_encoder(net_config, kept)
    family, source = parse_audio_encoder(net_config.audio_encoder)
    path = Path(source)  # no path of this machine in the checkpoint
    source = path.stem if path.is_file() else path.name if path.is_dir() else source
    name = f"{family}:{source}" if source else family
    return dataclasses.replace(net_config, audio_encoder=name, audio_dim=encoder.dim), encoder


def name_features(name, encoder):
    """Names the feature files of a frozen encoder: other weights, other files."""
    digest = 0
    for value in encoder.state_dict().values():
        digest = zlib.crc32(value.numpy().tobytes(), digest)
    return f"{name}-{digest:08x}"


def prepare_features(run, noisy=False):
    """A frozen audio encoder hears every clip once (noisy: also a corrupted copy of those trained
    on); its features lie beside the clip, float16 [T, D]."""
    if not run.features_key:
        return
    jobs = [(info.path, False) for info in run.clips + run.held_out]
    jobs += [(info.path, True) for info in run.clips if noisy]
    jobs = jobs[run.rank::run.world]  # shared out before anyone writes: no clip falls between two
    targets = [sampling.feature_path(path, run.features_key, noise) for path, noise in jobs]
    jobs = [(*job, target) for job, target in zip(jobs, targets) if not target.is_file()]
    for path, noise, target in tqdm(jobs, desc="audio features", unit="clip", disable=not jobs):
        clip = data.load_or_skip(path)
        if clip is None:
            continue
        wave = clip.sound()
        if noise:
            rng = np.random.default_rng([run.config.seed, media.hash_of(path.name)])
            wave = sampling.corrupt_sound(wave, rng)
        features = run.audio_encoder(torch.from_numpy(wave)[None].to(run.device))[0]  # [L, D]
        features = features[torch.arange(len(clip)).clamp(max=len(features) - 1)]  # [T, D]
        part = target.with_name(f".{os.getpid()}.{target.name}")
        np.save(part, features.half().cpu().numpy())
        os.replace(part, target)
    wait_for_all(run.world)


def build_networks(run):
    """The network as --weights or the seed has it, and its audio encoder -> LipSync, module"""
    torch.manual_seed(run.config.seed)  # the same in every process
    net = lipsync.LipSync(run.net_config).to(run.device, memory_format=torch.channels_last)
    encoder = run.audio_encoder
    if run.start:
        states = [(net, run.start.get("model", {}))]
        if not encoder.frozen:
            saved = run.start.get("audio_encoder") or {}
            states.append((encoder, saved.get("state", {})))
        copy_states(run.config.weights, run.start, net, states)
    elif not encoder.frozen:
        begin = build_audio_encoder(run.net_config)
        sync, _ = load_experts(run)
        if sync and sync.audio_encoder is not None and sync.config["audio_dim"] == encoder.dim:
            begin = sync.audio_encoder  # it has learned to hear there
        encoder.load_state_dict(begin.state_dict())
    return net, encoder


def copy_states(path, content, net, states):
    """states: pairs (module, its state in a checkpoint). BadInput names the fields in which the
    checkpoint's config differs from the network's."""
    try:
        for module, state in states:
            module.load_state_dict(state)
    except RuntimeError:
        saved, ours = content.get("config", {}), dataclasses.asdict(net.config)
        differ = []
        for name, here in ours.items():
            there = saved.get(name)
            if np.ravel(there).tolist() != np.ravel(here).tolist():
                differ.append(f"{name} {there} there, {here} here")
        reason = "; ".join(differ) or "other layers"
        raise BadInput(f"{path}: does not fit this network: {reason}") from None


def load_experts(run):
    """This run's experts, else those inside --weights, frozen -> sync or None, reader or None"""
    nets = []
    for name in ("sync", "lip"):
        path, content = run.out / f"{name}.pt", run.start.get(name)
        with data.naming(path if path.is_file() else run.config.weights):
            if path.is_file():
                saved = common.load_checkpoint(path, name)
                content = {"config": saved["config"], "state": saved["state"]["net"]}
            net = experts.load_expert(content)  # in eval mode: BatchNorm's statistics stay (S3)
        nets.append(net and net.to(run.device).requires_grad_(False))
    config = nets[0].config if nets[0] else {}
    dim = run.net_config.audio_dim
    if config.get("audio") == "features" and not (run.features_key and config["audio_dim"] == dim):
        raise BadInput(f"the sync expert hears {config['audio_dim']} features of a frozen encoder, "
                       f"this run's is {run.net_config.audio_encoder} ({dim}): train one for it "
                       "(--stage sync), or use --sync-weight 0 and another --out")
    return nets


def begin_expert(run, name, net):
    """The expert inside --weights where it has the shape of the new one `net`, else that"""
    saved = run.start.get(name)
    with data.naming(run.config.weights):
        if saved and saved["config"] == net.config:
            return experts.load_expert(saved)
    return net


# ---------------------------------------------------------------- the loop
class Keeper:
    """Owns a stage's checkpoint, log and signals: `for step, batch in keeper.steps(batches): ...`

    parts: name -> module, optimizer or scheduler: saved, resumed, the same in every process.
    planned: number of steps. frames: of one step and process, for the rate that is logged.
    content: what else the checkpoint holds. infos: the clips that batch["clip"] counts.
    `stopped` says after the loop that a signal ended it early."""
    COLUMNS = ("stage", "step", "total", "reconstruction", "coarse", "perceptual", "sync", "lip",
               "mouth", "gan", "discriminator", "accuracy", "lr", "grad_norm", "frames_per_s",
               "loader_share")

    def __init__(self, run, name, parts, planned, frames, content, infos=()):
        self.run, self.name, self.parts = run, name, parts
        self.planned, self.frames = planned, frames
        self.content, self.infos = content, infos
        self.step, self.stopped, self.signals = 0, False, []
        self.saved_at = time.perf_counter()
        self.path, self.log_path = run.out / f"{name}.pt", run.out / "log.csv"
        torch.manual_seed(run.config.seed + 1000 * run.rank)  # noise and dropout may differ
        if run.config.resume and self.path.is_file():
            self.load()
        self.share()
        if self.step == 0:
            self.save()  # a full disk or a wrong folder shows before the work, not after it
        if run.rank == 0:
            self.begin_log()

    def load(self):
        content = common.load_checkpoint(self.path, self.content["kind"])
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
        modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        for module in modules if self.run.world > 1 else ():
            for value in module.state_dict().values():
                torch.distributed.broadcast(value.data, 0)

    def save(self):
        if self.run.rank == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
            common.save_checkpoint(self.path, {**self.content, "state": state, "step": self.step,
                                               "steps": self.planned, "random": random})
        self.saved_at = time.perf_counter()

    def steps(self, batches):
        """(step, batch on the device) until all steps are done or a signal comes."""
        run, waited = self.run, time.perf_counter()
        self.began, self.logged, self.waiting = waited, self.step, 0.0
        handlers = {number: signal.signal(number, self.note_signal)
                    for number in (signal.SIGTERM, signal.SIGINT)}
        self.bar = tqdm(total=self.planned, initial=self.step, desc=self.name, unit="step",
                        disable=run.rank > 0, mininterval=1)
        try:
            for batch in batches:
                self.batch = batch
                self.waiting += time.perf_counter() - waited
                yield self.step, {name: value.to(run.device, non_blocking=True)
                                  for name, value in batch.items()}
                self.step += 1
                self.bar.update()
                self.stopped = self.asked_to_stop() and self.step < self.planned
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
        wait_for_all(run.world)  # the next stage reads what rank 0 has written
        if self.stopped and run.rank == 0:
            print(f"{self.name}: stopped; {self.path} is saved, --resume goes on")

    def note_signal(self, number, frame):
        self.signals.append(number)

    def asked_to_stop(self):
        """Whether any process got a signal."""
        asked = torch.tensor(len(self.signals), device=self.run.device)
        if self.run.world > 1:
            torch.distributed.all_reduce(asked)
        return bool(asked)

    def begin_log(self):
        """Drops the rows that a resumed run will write again."""
        rows = []
        if self.log_path.is_file():
            with open(self.log_path, errors="replace") as file:
                rows = list(csv.DictReader(file))
        rows = [row for row in rows if (row.get("step") or "").isdecimal()]  # a cut one: no more
        rows = [row for row in rows
                if row.get("stage") != self.name or int(row["step"]) <= self.step]
        with open(self.log_path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def log(self, figures):
        """Every 20 steps a row of log.csv; BadInput if a figure is not finite."""
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            clips = {self.infos[int(i)].path.name for i in self.batch.get("clip", ())}
            raise BadInput(f"{self.name}: {', '.join(bad)} is not finite at step {self.step}; "
                           f"clips of the batch: {', '.join(sorted(clips))}; the last good "
                           f"checkpoint is {self.path}")
        done = self.step + 1
        if self.run.rank > 0 or done % 20 and done != self.planned:
            return
        passed = time.perf_counter() - self.began
        rate = (done - self.logged) * self.frames * self.run.world / passed
        figures = {**figures, "lr": self.parts["scheduler"].get_last_lr()[0],
                   "frames_per_s": rate, "loader_share": self.waiting / passed}
        row = {name: f"{value:.5g}" for name, value in figures.items()}
        with open(self.log_path, "a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerow({"stage": self.name, "step": done, **row})
        self.bar.set_postfix(total=row["total"], frames_per_s=row["frames_per_s"])
        self.began, self.waiting, self.logged = time.perf_counter(), 0.0, done


def is_finished(run, stage):
    """Whether RUN/ holds all of a stage's steps (and the generator's weights.pt). BadInput where it
    holds some of them and --resume is missing, or another number of steps was planned."""
    path = run.out / f"{stage}.pt"
    if not path.is_file():
        return False
    generator = stage == "generator"
    steps = run.config.steps if generator else getattr(run.config, f"{stage}_steps")
    saved = common.load_checkpoint(path, "lipsync" if generator else stage)
    step, planned = saved.get("step"), saved.get("steps")
    if type(step) is not int or type(planned) is not int or not 0 <= step <= planned:
        raise BadInput(f"{path}: step {step} of {planned}: damaged, or not of this version")
    if planned != steps and step > 0:
        raise BadInput(f"{path}: was planned for {planned} steps, which its rate follows, not "
                       f"{steps}; to begin anew, delete it or take another --out")
    done = step == planned and (not generator or (run.out / "weights.pt").is_file())
    if step > 0 and not done and not run.config.resume:
        raise BadInput(f"{path}: stopped at step {step} of {planned}; --resume goes on; to begin "
                       "anew, delete it or take another --out")
    return done


def wait_for_all(world):
    if world > 1:
        torch.distributed.barrier()


def make_loader(run, dataset, keeper, batch):
    """The batches that a stage still needs: batch b of this process has its own sample numbers."""
    starts = [(b * run.world + run.rank) * batch for b in range(keeper.step, keeper.planned)]
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


def make_adam(parameters, lr, steps, warmup, momentum=0.9):
    """S3's optimizer and its schedule"""
    optimizer = torch.optim.Adam(parameters, lr, betas=(momentum, 0.99))
    return optimizer, warm_cosine(optimizer, steps, warmup)


def warm_cosine(optimizer, steps, warmup):
    """The rate rises in `warmup` of the steps, then falls as CosineAnnealingLR does (S3)."""
    rising = max(1, round(steps * warmup)) if warmup else 0
    if not rising:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first = 1 / (rising + 1)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, first, total_iters=rising)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - rising))
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[rising])


def update(run, optimizer, scheduler, limit=1.0):
    """Averages gradients over processes, clips their norm, steps. -> the norm before clipping"""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
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
