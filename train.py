"""S3: trains the sync expert, the lip reader, the mouth, and then the generator.

    stage     | code                              | patent
    sync      | train_sync                        | S3(1): syncXnet, trained as SyncNet was
    lip       | train_lip                         | S3(2): the lip reader
    mouth     | train_mouth, find_offsets         | S2(4)a-f and LipHead, from landmarks and sound
    generator | train_generator, generator_terms  | S3: five losses, Adam, warm-up, cosine
    eval      | bench/evaluate.py                 | the held-out table, with its baselines

`python train.py --data DIR --preset edge` runs the stages that are not yet done and ends with the
table. RUN/ holds config.json, log.csv, samples/, curves.png, offsets.json, eval.json, a strip of
each held-out folder, the resumable sync.pt, lip.pt, mouth.pt, generator.pt, and weights.pt for
infer.py. The flags are in options.py, what all stages share in loop.py. Letters as in common.py.
"""
import dataclasses
import datetime
import json
import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as fn
from tqdm import tqdm

import common
import data
import experts
import faces
import lipreader
import lipsync
import losses
import sampling
from common import BadInput
from lips import mouth_width
from loop import (Keeper, begin_expert, build_networks, copy_states, is_finished, load_experts,
                  make_adam, make_loader, open_run, prepare_features, update, wait_for_all,
                  warm_cosine)
from options import STAGES, parse_flags

LATEST = 6  # frames within which find_offsets looks


# ---------------------------------------------------------------- the experts
def train_sync(run):
    """S3(1): in sync or not, for S frames and their sound. -> False if stopped early"""
    config = run.config
    prepare_features(run, noisy=run.sync_audio == "features")
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
    offsets = read_offsets(run)  # of an earlier mouth stage; in a first run late sounds stay late
    dataset = sampling.SyncDataset(run.clips, run.net_config, experts.GROUP, config.seed,
                                   features_key=run.features_key, sync_audio=run.sync_audio,
                                   offsets=offsets)
    for step, batch in keeper.steps(make_loader(run, dataset, keeper, batch_size)):
        with common.autocast(run.device):
            pictures = batch["pictures"].float() / 255  # [B, S, 3, 64, 128]
            if config.expert_size == "small":  # only what it sees
                pictures = lipreader.mouth_view(pictures, lipreader.VIEW_PX["small"])
            pictures, negatives = lipreader.jitter_pictures(pictures), all_negatives(batch)
            loss, accuracy = experts.sync_batch_loss(net, pictures, batch["sound"], negatives)
        loss.backward()
        norm = update(run, optimizer, scheduler)
        keeper.log(dict(total=loss.item(), sync=loss.item(), accuracy=accuracy.item(),
                        grad_norm=norm))
    return not keeper.stopped


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
    infos = [info for info in run.clips if info.readable()]
    too_long = sum(bool(info.text) for info in run.clips) - len(infos)
    if too_long and run.rank == 0:
        print(f"lip: {too_long} clips left out, whose text is too long for their frames")
    if not infos:
        if run.rank == 0:
            print("lip: skipped, no clip has a text")
        return True
    net = begin_expert(run, "lip", lipreader.LipReader(config.expert_size))
    net.to(run.device).train()
    optimizer, scheduler = make_adam(net.parameters(), config.lip_lr, config.lip_steps,
                                     config.warmup)
    parts = dict(net=net, optimizer=optimizer, scheduler=scheduler)
    keeper = Keeper(run, "lip", parts, config.lip_steps, config.batch * data.CLIP_FRAMES,
                    {"kind": "lip", "config": net.config}, infos)
    dataset = sampling.SentenceDataset(infos, config.seed)
    view = lipreader.VIEW_PX[config.expert_size]
    for step, batch in keeper.steps(make_loader(run, dataset, keeper, config.batch)):
        with common.autocast(run.device):
            video = lipreader.mouth_view(batch["video"].float() / 255, view)  # [B, T, 3, h, w]
            video = lipreader.jitter_pictures(video, 0.5)
            loss = lipreader.lip_batch_loss(net, video, batch["tokens"], batch["length"])
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
    silence = None
    if run.features_key:
        wave = torch.zeros(1, data.CLIP_FRAMES * common.SAMPLES_PER_FRAME, device=run.device)
        silence = run.audio_encoder(wave)[0].cpu().numpy()  # [125, D]
    samples = sampling.MouthSamples(run.clips, run.net_config, run.features_key, config.seed,
                                    silence)
    if not config.keep_offsets and not (config.resume and path.is_file()):
        net, encoder, parts = build_mouth(run, config.mouth_steps // 3)
        for step in tqdm(range(config.mouth_steps // 3), desc="mouth, first try", unit="step",
                         disable=run.rank > 0):
            mouth_step(run, net, encoder, parts, samples.batch(step, config.mouth_batch))
        offsets = find_offsets(run, net, encoder, samples)
        if run.rank == 0:
            common.write_whole(path, json.dumps(offsets, indent=1))
            counts = dict(Counter(offsets.values()))
            print(f"videos whose sound is moved to the lips, by frames: {counts}")
        wait_for_all(run.world)
    samples.move_sounds(read_offsets(run))
    net, encoder, parts = build_mouth(run, config.mouth_steps)
    keeper = Keeper(run, "mouth", parts, config.mouth_steps, 10 * config.mouth_batch,
                    {"kind": "mouth", "config": dataclasses.asdict(run.net_config)})
    numbers = range(keeper.step, keeper.planned)
    batches = (samples.batch(step * run.world + run.rank, config.mouth_batch) for step in numbers)
    for step, batch in keeper.steps(batches):
        loss, norm = mouth_step(run, net, encoder, parts, batch)
        keeper.log(dict(total=loss, mouth=loss, grad_norm=norm))
    return not keeper.stopped


def read_offsets(run):
    """What the mouth stage found -> {source: frames}; {} before it and with --keep-offsets"""
    path = run.out / "offsets.json"
    if run.config.keep_offsets or not path.is_file():
        return {}
    with data.naming(path):
        offsets = json.loads(path.read_text())
        if not all(type(late) is int for late in offsets.values()):
            raise BadInput(f"{path}: must hold whole frames")
    return offsets


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
    loss = losses.mouth_loss(lips, batch["lips"], mouth_width(batch["points"]))
    loss.backward()
    return loss.item(), update(run, parts["optimizer"], parts["scheduler"])


def batch_audio(batch, encoder):
    """The audio windows of all frames of a batch of samples, read or encoded -> [BS, F, D]"""
    if "audio" in batch:
        return batch["audio"].flatten(0, -3)  # [B, S, F, D] or [BS, F, D]
    features = encoder.encode_mel(batch["mel"])  # [B, L, D]
    rows = torch.arange(len(features), device=features.device)[:, None, None]
    return features[rows, batch["window"]].flatten(0, 1)  # window [B, S, F]


@torch.no_grad()
def find_offsets(run, net, encoder, samples):
    """By how many frames the sound of each source video is late -> {source: frames}.

    The shift at which the predicted opening correlates best with the true one, where that is
    clear. Videos from the web are often one to three frames off, which teaches a generator to
    mumble (LatentSync, 2024, shifts them, too)."""
    net.eval()
    curves, offsets, places = {}, {}, range(2 * LATEST + 1)
    pairs = zip(samples.infos, samples.clips)
    for info, clip in tqdm(pairs, "offsets", len(samples.infos), disable=run.rank > 0):
        if info.frames < 40:
            continue
        lips = predict_clip(run, net, encoder, clip)
        made, true = (faces.mouth_shape(points)[:, 0] for points in (lips, clip.landmarks))
        true = true[LATEST:-LATEST]
        shifted = [made[start:start + len(true)] for start in places]
        with np.errstate(invalid="ignore"):  # a mouth that stands still: 0
            curve = np.nan_to_num(np.corrcoef([true, *shifted])[0, 1:])
        curves.setdefault(info.source, []).append(curve)
    for source, some in curves.items():
        curve = np.mean(some, 0)
        late, best, as_it_is = int(curve.argmax()) - LATEST, curve.max(), curve[LATEST]
        clear = best > 0.45 and best - as_it_is > 0.05
        if clear and abs(late) < LATEST:
            offsets[source] = late
    return offsets


def predict_clip(run, net, encoder, clip):
    """A sampling.MouthClip's landmarks with the lips and jaw that its sound asks for
    -> [T, K, 3] crop px"""
    if run.features_key:
        features = torch.from_numpy(clip.features).float().to(run.device)
    else:
        features = encoder.encode_mel(torch.from_numpy(clip.mel[None]).float().to(run.device))[0]
    return sampling.predict_landmarks(net, clip.landmarks, features)


# ---------------------------------------------------------------- the generator
def train_generator(run):
    """S3: the weighted sum of losses.py. -> False if stopped early

    The experts are frozen. So are audio encoder, S2(4)a-f and LipHead, but for --no-warp."""
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
    d_steps = config.steps - math.ceil(config.gan_start * config.steps)  # it learns in these
    d_optimizer, d_scheduler = make_adam(discriminator.parameters(), config.discriminator_lr,
                                         max(1, d_steps), warmup=0, momentum=0.5)
    parts = dict(net=net, optimizer=optimizer, scheduler=scheduler, discriminator=discriminator,
                 d_optimizer=d_optimizer, d_scheduler=d_scheduler)
    if not encoder.frozen:
        parts["audio"] = encoder
    content = weights_content(run, net, encoder, judges)
    keeper = Keeper(run, "generator", parts, config.steps, config.batch * config.group, content,
                    run.clips)
    offsets = read_offsets(run)
    path = run.out / "offsets.json"
    if run.rank == 0 and not path.is_file() and not config.keep_offsets:
        print(f"{path}, of stage mouth, is missing: sounds stay where they are")
    sync_audio = judges.sync.config["audio"] if judges.sync else run.sync_audio
    spread_until = round(config.sync_start * config.steps) * config.batch * run.world
    dataset = sampling.ClipDataset(run.clips, run.net_config, config.group, config.seed,
                                   config.amplitude_share, config.random_refs, run.features_key,
                                   sync_audio, offsets, spread_until)
    forward = torch.compile(net) if config.compile else net
    micro = config.micro or config.batch
    for step, batch in keeper.steps(make_loader(run, dataset, keeper, config.batch)):
        # 1. generator
        set_training(net, encoder, learn_sound)
        figures, pairs = Counter(), []  # sums over the parts of the batch
        for first in range(0, config.batch, micro):
            part = {name: value[first:first + micro] for name, value in batch.items()}
            share = len(part["clip"]) / config.batch
            with common.autocast(run.device):
                output, target = make_pictures(run, forward, encoder, part, step)
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
                with common.autocast(run.device):
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
        common.save_checkpoint(run.out / "weights.pt", halved(content))
    return not keeper.stopped


@dataclass
class Judges:
    """Who judges the generator's pictures, each None if there is none."""
    sync: nn.Module
    reader: nn.Module
    perceptual: nn.Module
    discriminator: nn.Module
    on: set  # names of the losses that loss_report has as on


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
    on = {name for name, text in report.items() if text.startswith("on")}
    return Judges(sync, reader, perceptual, discriminator, on)


@torch.no_grad()
def grade_sync(run, sync):
    """Held-out accuracy of the sync expert, 0..1; NaN if no clip could be read."""
    infos, grades = run.held_out or run.clips, []
    for info in infos[::max(1, len(infos) // 60)]:
        clip = data.load_or_skip(info.path)
        if clip is None or len(clip) <= 2 * experts.GROUP:
            continue
        features = run.features_key and sampling.load_features(info, run.features_key, 0)
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
    """mouth.pt's fusion, LipHead and scratch encoder into the network; without it those of
    --weights. Frozen either way: the lips are learned."""
    path = run.out / "mouth.pt"
    if path.is_file():
        saved = common.load_checkpoint(path, "mouth")
        modules = dict(fusion=net.fusion, lip_head=net.lip_head)
        if not encoder.frozen:
            modules["audio"] = encoder
        with data.naming(path):
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


def make_pictures(run, forward, encoder, batch, step):
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
    c, terms, share_done = run.config, {}, step / run.config.steps
    low, in_sync = lower_half(output), batch["in_sync"]
    groups = low.unflatten(0, (-1, c.group))  # [B, S, 3, H/2, W]
    experts_on = share_done >= c.sync_start
    # S3(1): BCE(cos(sound, lips), 1)
    if "sync" in judges.on and experts_on and in_sync.any():
        sound = judges.sync.embed_audio(batch["sync_sound"][in_sync])
        seen = judges.sync.embed_video(groups[in_sync])
        terms["sync"] = c.sync_weight, losses.sync_loss(sound, seen)
    # S3(2): -log p(text | video)
    if "lip" in judges.on and experts_on:
        loss = lip_term(run, judges.reader, groups, batch)
        if loss is not None:
            terms["lip"] = c.lip_weight, loss
    # S3(3): mean |output - target|, the mouth weighted; also of 4 x 4 means
    mask = mouth_mask(batch["mouth_box"].flatten(0, 1), output.shape[2])
    loss = losses.reconstruction_loss(output, target, c.mouth_weight, mask)
    terms["reconstruction"] = c.rec_weight, loss
    if c.coarse_weight:
        made, true, at = [fn.avg_pool2d(x.float(), 4) for x in (output, target, mask)]
        loss = losses.reconstruction_loss(made, true, c.mouth_weight, at)
        terms["coarse"] = c.coarse_weight, loss
    # S3(4): mean |VGG(output) - VGG(target)|
    if "perceptual" in judges.on:
        terms["perceptual"] = c.perceptual_weight, judges.perceptual(output, target)
    # S3(5): what the discriminator makes of the lower half
    if "gan" in judges.on and share_done >= c.gan_start:
        terms["gan"] = c.gan_weight, losses.generator_loss(judges.discriminator(low), c.gan)
    return terms


def mouth_mask(boxes, size):
    """boxes [BS, 4] px (x0, y0, x1, y1) -> [BS, 1, H, W], 1 inside"""
    at = torch.arange(size, device=boxes.device)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)  # [BS, 1]
    across, down = (at >= x0) & (at < x1), (at >= y0) & (at < y1)  # [BS, size]
    return (down[:, None, :, None] & across[:, None, None, :]).float()


def lip_term(run, reader, groups, batch):
    """S3(2): the S generated frames of the first group that has a text and is in sync replace the
    real ones in their clip, and the whole sentence is read. The real ones get the group's gamma and
    brightness, the generated ones are mirrored back; the bend stays: the reader is used to jitter.
    groups [B, S, 3, H/2, W] lower halves -> scalar, or None: no such group."""
    infos = [run.clips[int(number)] for number in batch["clip"]]
    usable = [b for b, info in enumerate(infos) if batch["in_sync"][b] and info.readable()]
    if not usable:
        return None
    b = usable[0]
    clip, start = data.load_clip(infos[b].path), int(batch["start"][b])
    video = torch.from_numpy(sampling.lower_halves(clip, range(len(clip)))).to(groups) / 255
    gamma, brightness = batch["gamma"][b], batch["brightness"][b]
    video = (video ** gamma * brightness).clamp(0, 1)  # [T, 3, h', w']
    made = fn.interpolate(groups[b], size=video.shape[-2:], mode="area")
    made = made.flip(-1) if batch["flip"][b] else made
    video = torch.cat([video[:start], made, video[start + len(made):]])[None]
    tokens = torch.tensor([lipreader.encode_text(clip.text)], device=groups.device)  # [1, U]
    return losses.lip_reading_loss(reader(video, tokens), tokens, lipreader.PAD)


def weights_content(run, net, encoder, judges):
    """What infer.py and experts.py need. The tensors are the networks' own: they go on learning."""
    notice = ""
    if "whisper" in run.net_config.audio_encoder:
        notice = "openai/whisper encoder, MIT licence, Copyright (c) 2022 OpenAI"
    recipe = dataclasses.asdict(run.config)
    for name in ("data", "out", "weights", "audio_encoder", "vgg", "expert_weights"):  # paths
        del recipe[name]
    clips = f"{len(run.clips)} training clips, {len(run.held_out)} held out"
    about = dict(recipe=recipe, notice=notice, date=time.strftime("%Y-%m-%d"), data=clips)
    return {"kind": "lipsync", "config": dataclasses.asdict(net.config),
            "model": net.state_dict(),
            "audio_encoder": {"dims": encoder.dims, "state": encoder.state_dict()},
            "sync": experts.pack_expert(judges.sync),
            "lip": experts.pack_expert(judges.reader),
            "about": about}


def halved(content):
    """The same dict of dicts, its floating-point tensors as float16"""
    if isinstance(content, dict):
        return {name: halved(value) for name, value in content.items()}
    if torch.is_tensor(content) and content.is_floating_point():
        return content.half()
    return content


# ---------------------------------------------------------------- python train.py
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
            content = json.dumps(dataclasses.asdict(config), indent=1)
            common.write_whole(out / "config.json", content)
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
        common.write_whole(out / "eval.json", json.dumps(table, indent=1))
        evaluate.print_table(table)
        print(json.dumps(table))


if __name__ == "__main__":
    common.cli(main)
