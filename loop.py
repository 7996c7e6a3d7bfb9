"""What the training loops of all stages share: checkpoint, log, signals, processes, the rate.

    for step, batch in keeper.steps(make_loader(run, dataset, keeper, size)):
        loss = ...
        loss.backward()
        keeper.log(dict(total=loss.item(), grad_norm=update(run, optimizer, scheduler)))
"""
import csv
import math
import signal
import time

import torch
from torch import nn
from tqdm import tqdm

import lipsync
from lipsync import BadInput


class Keeper:
    """Owns a stage's checkpoint, log and signals: `for step, batch in keeper.steps(batches): ...`

    parts: name -> module, optimizer or scheduler: saved, resumed, the same in every process.
    content: what else the checkpoint holds. infos: the clips that batch["clip"] counts.
    `stopped` says after the loop that a signal ended it early."""
    COLUMNS = ("stage", "step", "total", "reconstruction", "coarse", "perceptual", "sync", "lip",
               "mouth", "gan", "discriminator", "accuracy", "lr", "grad_norm", "frames_per_s",
               "loader_share")

    def __init__(self, run, name, parts, total, frames, content, infos=()):
        self.run, self.name, self.parts, self.total, self.frames = run, name, parts, total, frames
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
        content = lipsync.load_checkpoint(self.path, self.content["kind"])
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
            lipsync.save_checkpoint(self.path, {**self.content, "state": state, "step": self.step,
                                                "steps": self.total, "random": random})
        self.saved_at = time.perf_counter()

    def steps(self, batches):
        """(step, batch on the device) until all steps are done or a signal comes."""
        run, waited = self.run, time.perf_counter()
        self.began, self.logged, self.waiting = waited, self.step, 0.0
        handlers = {number: signal.signal(number, self.note_signal)
                    for number in (signal.SIGTERM, signal.SIGINT)}
        self.bar = tqdm(total=self.total, initial=self.step, desc=self.name, unit="step",
                        disable=run.rank > 0, mininterval=1)
        try:
            for batch in batches:
                self.batch = batch
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
            with open(self.log_path) as file:
                rows = [row for row in csv.DictReader(file)
                        if row["stage"] != self.name or int(row["step"]) <= self.step]
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
        if self.run.rank > 0 or done % 20 and done != self.total:
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


def wait_for_all(world):
    if world > 1:
        torch.distributed.barrier()


def make_loader(run, dataset, keeper, batch):
    """The batches that a stage still needs: batch b of this process has its own sample numbers."""
    starts = [(b * run.world + run.rank) * batch for b in range(keeper.step, keeper.total)]
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
