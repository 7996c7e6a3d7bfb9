"""The flags of train.py: every number of a training run, its default, its help, its limits.

    what      | code
    numbers   | TrainConfig, TRAINING (what a preset changes)
    flags     | parse_flags
    --resume  | read_saved_config
    refusals  | check_config
"""
import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import data
import experts
import lipsync
import losses
from common import BadInput

STAGES = ("sync", "lip", "mouth", "generator")


def option(default, help, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass(frozen=True)
class TrainConfig:
    """Every number of a training run; each is a flag."""
    data: str = option("", "folder of talking-head videos")
    held_out: str = option("", "videos never trained on: parts of their paths, with commas "
                           "between; empty: a hashed tenth")
    amplitude_share: float = option(0.3, "share of samples that teach the amplitude")
    random_refs: bool = option(False, "references at random, not by the rule (ablation)")
    keep_offsets: bool = option(False, "leave each video's sound where it is")

    preset: str = option("edge", "the network, if no --weights bring theirs, and how it is trained",
                         tuple(lipsync.PRESETS))
    audio_encoder: str = option("", "whisper name or file, wav2vec2:X, hubert:X, scratch; empty: "
                                    "the network's own")
    decoder: str = option("", "the decoder of the pictures; empty: the network's own",
                          ("", "spade", "conv"))
    refs: int = option(0, "reference pictures R; 0: the network's own")
    spacing: int = option(0, "frames between the features of the audio window; 0: the network's "
                             "own")
    one_way: bool = option(False, "audio does not look at the image (ablation)")
    no_mask: bool = option(False, "fusion without the upper-half mask (ablation)")
    no_warp: bool = option(False, "the patent's plain network: no lips, no warp")
    weights: str = option("", "start from this checkpoint")
    expert_size: str = option("small", "the size of both experts", ("small", "full"))
    expert_weights: str = option("", "start of the full sync expert's ResNeXt: imagenet, or a file")
    sync_audio: str = option("", "what the sync expert hears", ("", "features", "mel"))

    sync_steps: int = option(4_000, "optimizer steps of the sync expert")
    lip_steps: int = option(4_000, "optimizer steps of the lip reader")
    mouth_steps: int = option(1_500, "optimizer steps of the mouth")
    steps: int = option(20_000, "optimizer steps of the generator")
    batch: int = option(16, "groups of S frames per step and process (S3); sync: four times that")
    group: int = option(5, "S, frames of a group (S3(1))")
    micro: int = option(0, "groups per forward, to save memory; 0: batch")
    mouth_batch: int = option(24, "clips per step of the mouth, ten frames each")
    lr: float = option(1e-4, "Adam's rate for the generator, after warm-up (S3)")
    discriminator_lr: float = option(4e-4, "Adam's rate for the discriminator")
    sync_lr: float = option(1e-3, "Adam's rate for the sync expert")
    lip_lr: float = option(1e-3, "Adam's rate for the lip reader")
    mouth_lr: float = option(1e-3, "Adam's rate for the mouth")
    warmup: float = option(0.03, "share of the steps in which the rate rises")

    rec_weight: float = option(0.5, "weight of the reconstruction loss")
    coarse_weight: float = option(1.0, "weight of the same of 4 x 4 means: it does not blur")
    mouth_weight: float = option(8.0, "extra weight of the mouth's pixels in both; 0: patent")
    sync_weight: float = option(0.01, "weight of the sync loss")
    lip_weight: float = option(0.1, "weight of the lip-reading loss")
    perceptual_weight: float = option(0.01, "weight of the perceptual loss, a sum over scales")
    gan_weight: float = option(0.004, "weight of the adversarial loss")
    sync_start: float = option(0.5, "share of the steps before sync and lip losses enter; till "
                                    "then a group's frames lie anywhere in the clip")
    gan_start: float = option(0.15, "share of the steps before the adversarial enters")
    gan: str = option("hinge", "form of the adversarial loss", losses.GAN_FORMS)
    vgg: str = option("imagenet", "perceptual features: imagenet, a file, or random")
    true_lips: float = option(0.8, "share of steps that see the true lips, not predicted ones")
    lips_noise_px: float = option(0.7, "error added to true lips as a whole, px of 256, and 0.7 of "
                                  "it to each point")
    min_sync_accuracy: float = option(0.75, "below it the sync expert is not used")

    out: str = option("run", "folder for checkpoints, log and pictures")
    stage: str = option("all", "what to run", ("all", *STAGES, "eval"))
    resume: bool = option(False, "continue the run in --out")
    seed: int = option(0, "seed of all random numbers")
    workers: int = option(1, "loader processes")
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    checkpointing: bool = option(False, "recompute activations: less memory, more time")
    compile: bool = option(False, "torch.compile the generator; slower on a CPU")
    save_minutes: float = option(5.0, "minutes between checkpoints")
    sample_steps: int = option(500, "steps between sample pictures")
    eval_clips: int = option(20, "held-out clips of each folder measured by eval")


FREE = ("out", "stage", "resume", "workers", "device", "checkpointing", "compile", "save_minutes",
        "sample_steps", "eval_clips")  # what a resumed run may change
POSITIVE = ("steps", "batch", "group", "lr", "clips")  # numbers whose names end so are not 0


# What a preset changes. VGG costs more than the edge network, so without a GPU it stays away.
TRAINING = {
    "full": {},
    "edge": dict(batch=4, lr=6e-4, sync_lr=2e-3, perceptual_weight=0.0),
    "tiny": dict(batch=4, lr=1e-3, sync_lr=2e-3, perceptual_weight=0.0, sync_start=0.9, steps=560,
                 sync_steps=350, lip_steps=300, mouth_steps=500, sample_steps=280, eval_clips=8),
}


def flag(name):
    return "--" + name.replace("_", "-")


def parse_flags(argv=None):
    """Flags over the preset's defaults, or with --resume over RUN/config.json -> TrainConfig"""
    parser = argparse.ArgumentParser(
        argument_default=argparse.SUPPRESS, description="Trains the sync expert, the lip reader, "
        "the mouth, and then the generator; or measures them on held-out clips.",
        epilog=f"--preset changes defaults: {TRAINING}")
    for one in dataclasses.fields(TrainConfig):
        kind = {"type": type(one.default), "metavar": one.name.upper()}
        if isinstance(one.default, bool):
            kind = {"action": "store_true"}
        choices = ", ".join(filter(None, one.metadata["choices"] or ()))
        words = ": ".join(filter(None, (one.metadata["help"], choices)))
        parser.add_argument(flag(one.name), help=f"{words} ({one.default})", **kind)
    given = vars(parser.parse_args(argv))
    base = TRAINING.get(given.get("preset", TrainConfig.preset), {})
    path = Path(given.get("out", TrainConfig.out), "config.json")
    if given.get("resume") and path.is_file():
        base = {**read_saved_config(path), "resume": False}
        for name, value in given.items():
            there = base.get(name)
            if name in ("out", "stage", "resume") or value == there:
                continue
            text = f"{flag(name)} {value}: the run in {path.parent} was begun with {there}"
            if name not in FREE:
                raise BadInput(f"{text}; resume it as it was")
            print(text)
    config = TrainConfig(**{**base, **given})
    check_config(config)
    return config


def read_saved_config(path):
    """-> dict; BadInput if a field is unknown or of another type"""
    saved = data.read_json(path)
    kinds = {one.name: type(one.default) for one in dataclasses.fields(TrainConfig)}
    good = isinstance(saved, dict) and len(saved) > 0
    if not good or any(type(value) is not kinds.get(name) for name, value in saved.items()):
        raise BadInput(f"{path}: not the config of a run of this version")
    return saved


def check_config(config):
    """BadInput names the flag whose value is not allowed."""
    for one in dataclasses.fields(config):
        value, choices = getattr(config, one.name), one.metadata["choices"]
        text = f"{flag(one.name)} {value}"
        if choices and value not in choices:
            raise BadInput(f"{text}: choose from {', '.join(filter(None, choices))}")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise BadInput(f"{text}: must be a number, not a negative one")
        if value == 0 and not isinstance(value, bool) and one.name.endswith(POSITIVE):
            raise BadInput(f"{text}: must be positive")
    if not config.data:
        raise BadInput("--data DIR is missing: a folder of talking-head videos")
    if config.group != experts.GROUP and config.sync_weight:
        raise BadInput(f"--group {config.group}: the sync expert sees {experts.GROUP} frames; "
                       "use that, or --sync-weight 0")
