"""S3: trains the sync expert, the lip reader, the mouth, and then the generator.

    stage     | code                              | patent
    sync      | train_sync                        | S3(1): syncXnet, trained as SyncNet was
    lip       | train_lip                         | S3(2): the lip reader
    mouth     | train_mouth, find_offsets         | S2(4)a-f and LipHead, from landmarks alone
    generator | train_generator, generator_terms  | S3: five losses, Adam, warm-up, cosine
    eval      | bench/evaluate.py                 | the held-out table, with its baselines

`python train.py --data DIR --preset edge` runs the stages that are not yet done and ends with the
table. RUN/ holds config.json, log.csv, samples/, curves.png, offsets.json, the resumable sync.pt,
lip.pt, mouth.pt, generator.pt, and weights.pt for infer.py. What all loops share is in loop.py.
Axes as in lipsync.py and experts.py.
"""
import argparse
import dataclasses
import datetime
import json
import math
import os
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

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
import sampling
from lipsync import BadInput
from loop import Keeper, make_adam, make_loader, update, wait_for_all, warm_cosine

STAGES = ("sync", "lip", "mouth", "generator")
LATEST = 6  # frames that a video's own sound may be off


# ---------------------------------------------------------------- configuration
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

    preset: str = option("edge", "the network; what is empty or 0 below comes from it",
                         tuple(lipsync.PRESETS))
    audio_encoder: str = option("", "whisper name or file, wav2vec2:X, hubert:X, scratch")
    decoder: str = option("", "of the pictures", ("", "spade", "conv"))
    refs: int = option(0, "reference pictures R")
    spacing: int = option(0, "of the audio window, frames")
    one_way: bool = option(False, "audio does not look at the image (ablation)")
    no_mask: bool = option(False, "fusion without the upper-half mask (ablation)")
    no_warp: bool = option(False, "the patent's plain network: no lips, no warp")
    weights: str = option("", "start from this checkpoint")
    expert_size: str = option("small", "of both experts", ("small", "full"))
    expert_weights: str = option("", "start of the full sync expert's ResNeXt: imagenet, or a file")
    sync_audio: str = option("", "what the sync expert hears", ("", "features", "mel"))

    sync_steps: int = option(4_000, "optimizer steps of the sync expert")
    lip_steps: int = option(4_000, "of the lip reader")
    mouth_steps: int = option(1_500, "of the mouth")
    steps: int = option(20_000, "of the generator")
    batch: int = option(16, "groups of S frames per step and process (S3); sync: four times that")
    group: int = option(5, "S, frames of a group (S3(1))")
    micro: int = option(0, "groups per forward, to save memory; 0: batch")
    mouth_batch: int = option(24, "clips per step of the mouth, ten frames each")
    lr: float = option(1e-4, "Adam's rate for the generator, after warm-up (S3)")
    discriminator_lr: float = option(4e-4, "for the discriminator")
    sync_lr: float = option(1e-3, "for the sync expert")
    lip_lr: float = option(1e-3, "for the lip reader")
    mouth_lr: float = option(1e-3, "for the mouth")
    warmup: float = option(0.03, "share of the steps in which the rate rises")

    rec_weight: float = option(0.5, "reconstruction loss")
    coarse_weight: float = option(1.0, "the same on 4 x 4 means: it does not blur")
    mouth_weight: float = option(8.0, "extra weight of the mouth's pixels; 0: patent")
    sync_weight: float = option(0.01, "sync loss")
    lip_weight: float = option(0.1, "lip-reading loss")
    perceptual_weight: float = option(0.01, "perceptual loss, sum over scales")
    gan_weight: float = option(0.004, "adversarial loss")
    sync_start: float = option(0.5, "share of the steps before sync and lip losses enter")
    gan_start: float = option(0.15, "share of the steps before the adversarial enters")
    gan: str = option("hinge", "form of the adversarial loss", losses.GAN_FORMS)
    vgg: str = option("imagenet", "perceptual features: imagenet, a file, or random")
    true_lips: float = option(0.8, "share of steps that see the true lips, not predicted ones")
    lips_noise_px: float = option(0.7, "of true lips as a whole, px of 256; each point adds 0.7")
    min_sync_accuracy: float = option(0.75, "below it the sync expert is not used")

    out: str = option("run", "folder for checkpoints, log and pictures")
    stage: str = option("all", "what to run", ("all", *STAGES, "eval"))
    resume: bool = option(False, "continue the run in --out")
    seed: int = option(0, "of all random numbers")
    workers: int = option(1, "loader processes")
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    checkpointing: bool = option(False, "recompute activations: less memory, more time")
    compile: bool = option(False, "torch.compile the generator")
    save_minutes: float = option(5.0, "between checkpoints")
    sample_steps: int = option(500, "between sample pictures")
    eval_clips: int = option(20, "held-out clips of each folder measured by eval")


FREE = ("out", "stage", "resume", "workers", "device", "checkpointing", "compile", "save_minutes",
        "sample_steps", "eval_clips")  # what a resumed run may change
POSITIVE = ("steps", "batch", "group", "lr", "clips")  # numbers whose names end so are not 0
# What a preset changes. VGG costs more than the edge network, so without a GPU it stays away.
TRAINING = {
    "full": {},
    "edge": dict(batch=4, lr=6e-4, sync_lr=2e-3, perceptual_weight=0.0),
    "tiny": dict(batch=4, lr=1e-3, sync_lr=2e-3, perceptual_weight=0.0, sync_start=0.9, steps=1500,
                 sync_steps=600, lip_steps=650, mouth_steps=600, sample_steps=300, eval_clips=8),
}


def flag(name):
    return "--" + name.replace("_", "-")


def parse_flags(argv=None):
    """Flags over the preset's defaults, or with --resume over RUN/config.json -> TrainConfig"""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS,
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
    features: str  # key of a frozen encoder's feature files; None: it learns
    start: dict = field(default_factory=dict)  # what the checkpoint of --weights holds

    @property
    def sync_audio(self):
        return self.config.sync_audio or ("features" if self.features else "mel")


def open_run(config):
    """Prepares the videos that are new, and puts a Run together."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    own_gpu = world > 1 and config.device == "auto" and torch.cuda.is_available()
    device = lipsync.pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if own_gpu else config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank == 0 and (not data.list_clips(config.data) or data.list_videos(config.data)):
        data.print_report(data.prepare(config.data))  # prepared clips alone are fine, too
    wait_for_all(world)
    clips, held_out = data.split_clips(data.list_clips(config.data), config.held_out)
    start = lipsync.load_checkpoint(config.weights) if config.weights else {}
    torch.manual_seed(config.seed)  # of the audio encoder, if it learns
    net_config, encoder = network_config(config, start)
    features = features_key(net_config.audio_encoder, encoder) if encoder.frozen else None
    return Run(config, Path(config.out), rank, world, device, clips, held_out, net_config,
               encoder.to(device), features, start)


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
    encoder = lipsync.build_audio_encoder(net_config, kept)
    family, source = lipsync.parse_audio_encoder(net_config.audio_encoder)
    path = Path(source)  # no path of this machine in the checkpoint
    source = path.stem if path.is_file() else path.name if path.is_dir() else source
    name = f"{family}:{source}" if source else family
    return dataclasses.replace(net_config, audio_encoder=name, audio_dim=encoder.dim), encoder


def features_key(name, encoder):
    """Names the feature files of a frozen encoder: other weights, other files."""
    digest = 0
    for value in encoder.state_dict().values():
        digest = zlib.crc32(value.numpy().tobytes(), digest)
    return f"{name}-{digest:08x}"


def prepare_features(run, noisy=False):
    """A frozen audio encoder hears every clip once (noisy: also a corrupted copy); its features lie
    beside the clip, float16 [T, D]."""
    if not run.features:
        return
    jobs = [(info.path, noise) for info in run.clips + run.held_out for noise in {False, noisy}]
    jobs = jobs[run.rank::run.world]  # shared out before anyone writes: no clip falls between two
    targets = [sampling.feature_path(path, run.features, noise) for path, noise in jobs]
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
        begin = lipsync.build_audio_encoder(run.net_config)
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
        differ = [f"{name} {saved.get(name)} there, {value} here" for name, value in ours.items()
                  if tuple(np.ravel(saved.get(name))) != tuple(np.ravel(value))]
        reason = "; ".join(differ) or "other layers"
        raise BadInput(f"{path}: does not fit this network: {reason}") from None


def load_experts(run):
    """This run's experts, else those inside --weights, frozen -> sync or None, reader or None"""
    nets = []
    for name in ("sync", "lip"):
        path, content = run.out / f"{name}.pt", run.start.get(name)
        if path.is_file():
            saved = lipsync.load_checkpoint(path, name)
            content = {"config": saved["config"], "state": saved["state"]["net"]}
        net = experts.load_expert(content)  # in eval mode: BatchNorm's statistics stay (S3)
        nets.append(net and net.to(run.device).requires_grad_(False))
    config = nets[0].config if nets[0] else {}
    dim = run.net_config.audio_dim
    if config.get("audio") == "features" and not (run.features and config["audio_dim"] == dim):
        raise BadInput(f"the sync expert hears {config['audio_dim']} features of a frozen encoder, "
                       f"this run's is {run.net_config.audio_encoder} ({dim}): train one for it "
                       "(--stage sync), or use --sync-weight 0 and another --out")
    return nets


# ---------------------------------------------------------------- the experts
def train_sync(run):
    """S3(1): in sync or not, for S frames and their sound. -> False if stopped early"""
    config = run.config
    prepare_features(run, noisy=True)
    net = experts.SyncXNet(config.expert_size, run.sync_audio, run.net_config.audio_dim,
                           config.expert_weights or None)
    net = begin_expert(run, "sync", net)
    net.to(run.device, memory_format=torch.channels_last).train()
    optimizer, scheduler = make_adam(net.parameters(), config.sync_lr, config.sync_steps,
                                     config.warmup)
    parts = dict(net=net, optimizer=optimizer, scheduler=scheduler)
    batch_size = 4 * config.batch
    keeper = Keeper(run, "sync", parts, config.sync_steps, batch_size * experts.GROUP,
                    {"kind": "sync", "config": net.config}, run.clips)
    dataset = sampling.SyncDataset(run.clips, run.net_config, experts.GROUP, config.seed,
                                   features=run.features, sync_audio=run.sync_audio)
    for step, batch in keeper.steps(make_loader(run, dataset, keeper, batch_size)):
        with lipsync.autocast(run.device):
            pictures = batch["pictures"].float() / 255  # [B, S, 3, 64, 128]
            if config.expert_size == "small":  # only what it sees
                pictures = experts.mouth_view(pictures, experts.VIEW_PX["small"])
            pictures, negatives = experts.jitter_pictures(pictures), all_negatives(batch)
            loss, accuracy = experts.sync_batch_loss(net, pictures, batch["sound"], negatives)
        loss.backward()
        norm = update(run, optimizer, scheduler)
        keeper.log(dict(total=loss.item(), sync=loss.item(), accuracy=accuracy.item(),
                        grad_norm=norm))
    return not keeper.stopped


def begin_expert(run, name, net):
    """The expert inside --weights where it has the shape of the new one `net`, else that"""
    saved = run.start.get(name)
    if saved and saved["config"] == net.config:
        return experts.load_expert(saved)
    return net


def all_negatives(batch):
    """Sounds that do not belong: X of the same clip, X of the neighbours in the batch unless these
    show the same clip. sound [B, ...], negatives [B, X, ...] -> [B, 2X, ...]"""
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
    net = begin_expert(run, "lip", experts.LipReader(config.expert_size))
    net.to(run.device).train()
    optimizer, scheduler = make_adam(net.parameters(), config.lip_lr, config.lip_steps,
                                     config.warmup)
    parts = dict(net=net, optimizer=optimizer, scheduler=scheduler)
    keeper = Keeper(run, "lip", parts, config.lip_steps, config.batch * data.CLIP_FRAMES,
                    {"kind": "lip", "config": net.config}, infos)
    dataset = sampling.SentenceDataset(infos, config.seed)
    view = experts.VIEW_PX[config.expert_size]
    for step, batch in keeper.steps(make_loader(run, dataset, keeper, config.batch)):
        with lipsync.autocast(run.device):
            video = experts.mouth_view(batch["video"].float() / 255, view)  # [B, T, 3, h, w]
            video = experts.jitter_pictures(video, 0.5)
            loss = experts.lip_batch_loss(net, video, batch["tokens"], batch["length"])
        loss.backward()
        norm = update(run, optimizer, scheduler)
        keeper.log(dict(total=loss.item(), lip=loss.item(), grad_norm=norm))
    return not keeper.stopped


# ---------------------------------------------------------------- the mouth
def train_mouth(run):
    """S2(4)a-f and LipHead, from landmarks and sound alone. -> False if stopped early

    Choice: a third of the steps first, to find by how much each video's own sound is late; then
    from the start with sounds moved to their lips."""
    config, path = run.config, run.out / "offsets.json"
    if config.no_warp:
        return True
    prepare_features(run)
    if not config.keep_offsets and not (config.resume and path.is_file()):
        samples = sampling.MouthSamples(run.clips, run.net_config, run.features, config.seed)
        net, encoder, parts = build_mouth(run, config.mouth_steps // 3)
        for step in tqdm(range(config.mouth_steps // 3), desc="mouth, first try", unit="step",
                         disable=run.rank > 0):
            mouth_step(run, net, encoder, parts, samples.batch(step, config.mouth_batch))
        offsets = find_offsets(run, net, encoder)
        if run.rank == 0:
            path.write_text(json.dumps(offsets, indent=1))
            counts = dict(Counter(offsets.values()))
            print(f"videos whose sound is moved to the lips, by frames: {counts}")
        wait_for_all(run.world)
    samples = sampling.MouthSamples(run.clips, run.net_config, run.features, config.seed,
                                    read_offsets(run))
    net, encoder, parts = build_mouth(run, config.mouth_steps)
    keeper = Keeper(run, "mouth", parts, config.mouth_steps, 10 * config.mouth_batch,
                    {"kind": "mouth", "config": dataclasses.asdict(run.net_config)})
    numbers = range(keeper.step, keeper.total)
    batches = (samples.batch(step * run.world + run.rank, config.mouth_batch) for step in numbers)
    for step, batch in keeper.steps(batches):
        loss, norm = mouth_step(run, net, encoder, parts, batch)
        keeper.log(dict(total=loss, mouth=loss, grad_norm=norm))
    return not keeper.stopped


def read_offsets(run):
    """What the mouth stage found -> {source: frames}; {} with --keep-offsets"""
    return {} if run.config.keep_offsets else data.read_json(run.out / "offsets.json")


def build_mouth(run, steps):
    """-> LipSync, audio encoder, what a mouth.pt holds of them and how they learn"""
    net, encoder = build_networks(run)
    parameters, parts = net.sound_parameters(), dict(fusion=net.fusion, lip_head=net.lip_head)
    if not encoder.frozen:
        parameters += encoder.parameters()
        parts["audio"] = encoder
    optimizer = torch.optim.AdamW(parameters, run.config.mouth_lr, betas=(0.9, 0.99),
                                  weight_decay=0.05)
    parts |= dict(optimizer=optimizer, scheduler=warm_cosine(optimizer, steps, 0.1))
    return net.train(), encoder.train(), parts


def mouth_step(run, net, encoder, parts, batch):
    """-> loss, gradient norm"""
    batch = {name: value.to(run.device) for name, value in batch.items()}
    audio = batch_audio(batch, encoder)  # [B, F, D]
    audio = audio + 0.1 * torch.randn_like(audio)  # features that differ a little ask for the same
    lips = net.predict_lips(audio, batch["amplitude"], batch["points"])
    loss = losses.mouth_loss(lips, batch["lips"], lipsync.mouth_width(batch["points"]))
    loss.backward()
    return loss.item(), update(run, parts["optimizer"], parts["scheduler"])


def batch_audio(batch, encoder):
    """The audio windows of a batch of samples, read or encoded -> [B, F, D]"""
    if "audio" in batch:
        return batch["audio"].flatten(0, -3)
    features = encoder.encode_mel(batch["mel"])  # [B, L, D]
    rows = torch.arange(len(features), device=features.device)[:, None, None]
    return features[rows, batch["window"]].flatten(0, 1)


@torch.no_grad()
def find_offsets(run, net, encoder):
    """By how many frames the sound of each source video is late -> {source: frames}.

    The shift at which the predicted opening correlates best with the true one, where that is
    clear. Videos from the web are often one to three frames off, which teaches a generator to
    mumble (LatentSync, 2024, shifts them, too)."""
    net.eval()
    curves, offsets = {}, {}
    for info in tqdm(run.clips, desc="offsets", unit="clip", disable=run.rank > 0):
        clip = data.load_or_skip(info.path)
        if clip is None or len(clip) < 40:
            continue
        lips = predict_clip(run, net, encoder, clip, info)
        made, true = (faces.mouth_shape(points)[:, 0] for points in (lips, clip.landmarks))
        true = true[LATEST:-LATEST]
        shifted = [made[start:start + len(true)] for start in range(2 * LATEST + 1)]
        with np.errstate(invalid="ignore"):  # a mouth that stands still: 0
            curve = np.nan_to_num(np.corrcoef([true, *shifted])[0, 1:])
        curves.setdefault(info.source, []).append(curve)
    for source, some in curves.items():
        curve = np.mean(some, 0)
        late = int(curve.argmax()) - LATEST
        clear = curve.max() > 0.45 and curve.max() - curve[LATEST] > 0.05
        if clear and abs(late) < LATEST:
            offsets[source] = late
    return offsets


def predict_clip(run, net, encoder, clip, info):
    """A clip's landmarks with the lips and jaw that its sound asks for -> [T, K, 3] crop px"""
    if run.features:
        sound = np.load(sampling.feature_path(info.path, run.features))
        features = torch.from_numpy(sound).float().to(run.device)
    else:
        features = encoder.encode_mel(torch.from_numpy(clip.mel[None]).float().to(run.device))[0]
    return sampling.predict_landmarks(net, clip, features)


# ---------------------------------------------------------------- the generator
def train_generator(run):
    """loss = w_r rec + w_s sync + w_c lip + w_p perceptual + w_g gan, experts and sound frozen
    (S3). -> False if stopped early"""
    from bench import progress  # to look at, not in the patent: a room of its own
    config = run.config
    prepare_features(run)
    net, encoder = build_networks(run)
    if not config.no_warp:
        load_mouth(run, net, encoder)
    judges = load_judges(run)
    discriminator = judges.discriminator
    learn_sound = config.no_warp and not encoder.frozen
    parameters = [p for p in net.parameters() if p.requires_grad]
    parameters += encoder.parameters() if learn_sound else []
    optimizer, scheduler = make_adam(parameters, config.lr, config.steps, config.warmup)
    d_optimizer, d_scheduler = make_adam(discriminator.parameters(), config.discriminator_lr,
                                         config.steps, warmup=0, momentum=0.5)
    parts = dict(net=net, optimizer=optimizer, scheduler=scheduler, discriminator=discriminator,
                 d_optimizer=d_optimizer, d_scheduler=d_scheduler)
    if not encoder.frozen:
        parts["audio"] = encoder
    content = weights_content(run, net, encoder, judges)
    keeper = Keeper(run, "generator", parts, config.steps, config.batch * config.group, content,
                    run.clips)
    sync_audio = judges.sync.config["audio"] if judges.sync else run.sync_audio
    spread = round(config.sync_start * config.steps) * config.batch * run.world
    dataset = sampling.ClipDataset(run.clips, run.net_config, config.group, config.seed,
                                   config.amplitude_share, config.random_refs,
                                   features=run.features, sync_audio=sync_audio, spread=spread,
                                   offsets=read_offsets(run))
    forward = torch.compile(net) if config.compile else net
    micro = config.micro or config.batch
    for step, batch in keeper.steps(make_loader(run, dataset, keeper, config.batch)):
        # 1. generator
        set_training(net, encoder, learn_sound)
        figures, pairs = Counter(), []  # sums over the parts of the batch
        for first in range(0, config.batch, micro):
            part = {name: value[first:first + micro] for name, value in batch.items()}
            share = len(part["clip"]) / config.batch
            with lipsync.autocast(run.device):
                output, target = draw(run, forward, encoder, part, step)
                terms = generator_terms(run, judges, output, target, part, step)
            total = sum(weight * term for weight, term in terms.values())
            (total * share).backward()
            pairs.append((output.detach(), target, share))
            figures["total"] += total.item() * share
            for name, (_, term) in terms.items():
                figures[name] += term.item() * share
        figures["grad_norm"] = update(run, optimizer, scheduler, limit=0.5)
        # 2. discriminator
        if "gan" in figures:
            d_optimizer.zero_grad(set_to_none=True)  # what the generator's step left there
            for output, target, share in pairs:
                with lipsync.autocast(run.device):
                    real = discriminator(lower_half(target))
                    fake = discriminator(lower_half(output))
                    loss = losses.discriminator_loss(real, fake, config.gan) * share
                loss.backward()
                figures["discriminator"] += loss.item()
            update(run, d_optimizer, d_scheduler)
        # 3. log, pictures
        keeper.log(figures)
        if run.rank == 0 and ((step + 1) % config.sample_steps == 0 or step + 1 == config.steps):
            progress.save_samples(run, net, encoder, step + 1)
    if not keeper.stopped and run.rank == 0:
        lipsync.save_checkpoint(run.out / "weights.pt", halved(content))
    return not keeper.stopped


@dataclass
class Judges:
    """Who judges the generator's pictures; None: that loss is off."""
    sync: nn.Module
    reader: nn.Module
    perceptual: nn.Module
    discriminator: nn.Module
    accuracy: float  # of the sync expert, held out; too low: it is kept, but judges nothing


def load_judges(run):
    """Experts, VGG, discriminator; prints which losses are off, and why."""
    config, perceptual = run.config, None
    sync, reader = load_experts(run)
    accuracy = grade_sync(run, sync) if sync else math.nan
    if config.perceptual_weight:
        perceptual = losses.PerceptualLoss(config.vgg).to(run.device)
    torch.manual_seed(run.config.seed)
    discriminator = losses.Discriminator().to(run.device, memory_format=torch.channels_last)
    report = loss_report(config, sync, accuracy, reader)
    if run.rank == 0:
        print("losses: " + "; ".join(f"{name} {text}" for name, text in report.items()))
    return Judges(sync, reader, perceptual, discriminator, accuracy)


@torch.no_grad()
def grade_sync(run, sync):
    """Held-out accuracy of the sync expert, 0..1; NaN if no clip could be read."""
    infos, grades = run.held_out or run.clips, []
    for info in infos[::max(1, len(infos) // 60)]:
        clip = data.load_or_skip(info.path)
        if clip is None or len(clip) <= 2 * experts.GROUP:
            continue
        features = run.features and np.load(sampling.feature_path(info.path, run.features))
        sound = experts.sync_sound(sync, clip.mel, features)
        pictures = sampling.lower_halves(clip, range(len(clip)))
        grades.append(experts.sync_accuracy(*experts.embed_clip(sync, pictures, sound)))
    return float(np.mean(grades)) if grades else math.nan


def loss_report(config, sync, accuracy, reader):
    """Which losses of S3 are on, and why another is off: {name: text}"""
    report = dict(sync=f"on (held-out accuracy {accuracy:.2f})", lip="on", reconstruction="on",
                  perceptual="on", gan="on")
    if not reader:
        report["lip"] = "off (no lip reader: no clip has a text, or --stage lip has not run)"
    if not sync:
        report["sync"] = "off (no expert: --stage sync)"
    elif not accuracy >= config.min_sync_accuracy:
        report["sync"] = (f"off (the expert's held-out accuracy {accuracy:.2f} is below "
                          f"--min-sync-accuracy {config.min_sync_accuracy})")
    for name in ("sync", "lip", "perceptual", "gan"):
        if not getattr(config, f"{name}_weight"):
            report[name] = "off (weight 0)"
    return report


def load_mouth(run, net, encoder):
    """mouth.pt's sound parameters into the network, frozen: the lips are learned."""
    path = run.out / "mouth.pt"
    if path.is_file():
        saved = lipsync.load_checkpoint(path, "mouth")
        modules = dict(fusion=net.fusion, lip_head=net.lip_head)
        if not encoder.frozen:
            modules["audio"] = encoder
        states = [(module, saved["state"].get(name, {})) for name, module in modules.items()]
        copy_states(path, saved, net, states)
    elif not run.start:
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


def draw(run, forward, encoder, batch, step):
    """A batch of B groups -> output and target [BS, 3, H, W]"""
    B, S = batch["target"].shape[:2]
    refs = shade(batch["refs"], batch).repeat_interleave(S, 0)  # [BS, R, 3, H, W]
    target = shade(batch["target"], batch).flatten(0, 1)  # [BS, 3, H, W]
    audio = batch_audio(batch, encoder)  # [BS, F, D]
    lips = batch["lips"].flatten(0, 1)  # [BS, P, 2]
    noise = torch.randn_like(lips[:, :1]) + 0.7 * torch.randn_like(lips)  # as predictions miss
    lips = lips + run.config.lips_noise_px / faces.CROP_PX * noise
    chance = np.random.default_rng([run.config.seed, step]).random()
    if chance >= run.config.true_lips:
        lips = None  # predicted from the sound
    masked = target * lipsync.half_mask(target)
    points, amplitude = batch["points"].flatten(0, 1), batch["amplitude"].flatten()
    return forward(refs, masked, audio, amplitude, points, lips), target


def shade(pictures, batch):
    """uint8 [B, n, 3, H, W] -> float 0..1, with one gamma and brightness for each group (S3)"""
    gamma, brightness = (batch[name].view(-1, 1, 1, 1, 1) for name in ("gamma", "brightness"))
    return ((pictures.float() / 255) ** gamma * brightness).clamp(0, 1)


def lower_half(pictures):
    return pictures.chunk(2, 2)[1]


def generator_terms(run, judges, output, target, batch, step):
    """The losses of S3 in its order: {name: (weight, loss)}; output, target [BS, 3, H, W]"""
    c, terms, progress = run.config, {}, step / run.config.steps
    low, in_sync = lower_half(output), batch["in_sync"]
    groups = low.unflatten(0, (-1, c.group))  # [B, S, 3, H/2, W]
    late = progress >= c.sync_start
    # S3(1): BCE(cos(sound, lips), 1)
    judged = judges.accuracy >= c.min_sync_accuracy
    if c.sync_weight and judged and late and in_sync.any():
        sound = judges.sync.embed_audio(batch["sync"][in_sync])
        lips = judges.sync.embed_video(groups[in_sync])
        terms["sync"] = c.sync_weight, losses.sync_loss(sound, lips)
    # S3(2): -log p(text | video)
    if c.lip_weight and judges.reader is not None and late:
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
    infos = [run.clips[int(number)] for number in batch["clip"]]
    usable = [b for b, info in enumerate(infos) if batch["in_sync"][b] and info.text]
    if not usable:
        return None
    b = usable[0]
    clip, start = data.load_clip(infos[b].path), int(batch["start"][b])
    video = torch.from_numpy(sampling.lower_halves(clip, range(len(clip)))).to(groups) / 255
    video = (video ** batch["gamma"][b] * batch["brightness"][b]).clamp(0, 1)  # [T, 3, h', w']
    made = fn.interpolate(groups[b], size=video.shape[-2:], mode="area")
    made = made.flip(-1) if batch["flip"][b] else made
    video = torch.cat([video[:start], made, video[start + len(made):]])[None]
    tokens = torch.tensor([sampling.encode_text(clip.text)], device=groups.device)  # [1, U]
    return losses.lip_reading_loss(reader(video, tokens), tokens, sampling.PAD)


def weights_content(run, net, encoder, judges):
    """What infer.py and experts.py need. The tensors are the networks' own: they go on learning."""
    notice = ""
    if "whisper" in run.net_config.audio_encoder:
        notice = "openai/whisper encoder, MIT licence, Copyright (c) 2022 OpenAI"
    recipe = dataclasses.asdict(run.config)
    for name in ("data", "out", "weights", "audio_encoder"):  # no path of this machine
        del recipe[name]
    return {"kind": "lipsync", "config": dataclasses.asdict(net.config),
            "model": net.state_dict(),
            "audio_encoder": {"dims": encoder.dims, "state": encoder.state_dict()},
            "sync": experts.pack_expert(judges.sync),
            "lip": experts.pack_expert(judges.reader),
            "about": {"recipe": recipe, "notice": notice, "date": time.strftime("%Y-%m-%d"),
                      "data": f"{len(run.clips)} training clips, {len(run.held_out)} held out"}}


def halved(content):
    """The same dict of dicts, its floating-point tensors as float16"""
    if isinstance(content, dict):
        return {name: halved(value) for name, value in content.items()}
    if torch.is_tensor(content) and content.is_floating_point():
        return content.half()
    return content


# ---------------------------------------------------------------- python train.py
def is_finished(run, stage):
    """Whether RUN/ holds all of a stage's steps (and the generator's weights.pt). BadInput where it
    holds some of them and --resume is missing, or another number of steps was planned."""
    path = run.out / f"{stage}.pt"
    if not path.is_file():
        return False
    generator = stage == "generator"
    steps = run.config.steps if generator else getattr(run.config, f"{stage}_steps")
    saved = lipsync.load_checkpoint(path, "lipsync" if generator else stage)
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
    from bench import evaluate, progress  # measuring is not in the patent: a room of its own
    trainers = dict(sync=train_sync, lip=train_lip, mouth=train_mouth, generator=train_generator)
    for stage in asked:
        torch.manual_seed(config.seed)  # a stage begins alike, whatever was done before it
        ended = stage in done or trainers[stage](run)
        if run.rank == 0:
            progress.draw_curves(out)
        if not ended:
            return
    if config.stage in ("all", "eval") and run.rank == 0:
        weights = config.weights if config.stage == "eval" else out / "weights.pt"
        table = evaluate.evaluate(run, weights)
        (out / "eval.json").write_text(json.dumps(table, indent=1))
        evaluate.print_table(table)
        print(json.dumps(table))


if __name__ == "__main__":
    lipsync.cli(main)
