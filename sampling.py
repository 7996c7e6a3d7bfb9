"""S2, S3: training samples from prepared clips, for the generator, the mouth and both experts.

    stage         | code                                                     | patent
    noise         | corrupt_sound                                            | S3
    clips         | draw_chances, load_aligned, audio_input                  | S2(3)
    the generator | ClipDataset, bend, pair_amplitude                        | S2(2), Fig. 7, S3
    the mouth     | MouthSamples                                             | -
    the experts   | SyncDataset, SentenceDataset                             | S3(1), S3(2)
    whole clips   | clip_points, clip_audio, predict_landmarks, lower_halves | -

A clip's way: data.load_clip; ClipDataset.draw, .sample; loop.make_loader; train.make_pictures,
LipSync.forward, train.generator_terms: a term for each loss.

Letters as in common.py. Pictures are uint8 RGB, landmarks float32 (x, y, depth) pixels.
"""
import dataclasses
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
import faces
import lipsync
from audio import MEL_PER_FRAME, N_MELS, log_mel
from common import SAMPLE_RATE, SAMPLES_PER_FRAME, BadInput
from lipreader import PAD, encode_text
from lipsync import audio_window


# ---------------------------------------------------------------- noise (S3)
def add_noise(wave, decibels, rng, exponent=0.0):
    """float32 [N] -> [N], with noise `decibels` below the speech.

    The noise falls with frequency**exponent: 0 white, 1 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(len(wave)))
    frequency = np.arange(len(spectrum)).clip(20)
    noise = np.fft.irfft(spectrum / frequency ** exponent, len(wave))
    level = data.rms(wave) * 10 ** (-decibels / 20)
    return (wave + noise * level / data.rms(noise)).astype(np.float32)


def add_echo(wave, rng):
    """[N] -> [N]: in a room, which answers a clap with decaying noise"""
    length = int(SAMPLE_RATE * rng.uniform(0.1, 0.4))
    decay = np.exp(-6.9 * np.arange(length) / length)  # -60 dB at its end
    room = rng.standard_normal(length) * decay
    room *= rng.uniform(0.1, 0.5) / np.linalg.norm(room)
    room[0] = 1  # the speech itself stays in its place
    size = len(wave) + length
    spectrum = np.fft.rfft(wave, size) * np.fft.rfft(room, size)
    return np.fft.irfft(spectrum, size)[:len(wave)]


def corrupt_sound(wave, rng):
    """Another room and microphone: echo, noise 0..20 dB below the speech, gain -12..6 dB.

    float32 [N] -> float32 [N], -1..1"""
    if rng.random() < 0.5:
        wave = add_echo(wave, rng)
    noisy = add_noise(wave, rng.uniform(0, 20), rng, rng.choice([0, 0.5, 1]))
    gain = np.float32(10 ** (rng.uniform(-12, 6) / 20))
    return (gain * noisy).clip(-1, 1)


# ---------------------------------------------------------------- clips and their sound
def feature_path(clip_path, key, noisy=False):
    """Where a clip's features by a frozen audio encoder are kept: NAME.npz -> NAME.KEY.npy"""
    name = re.sub("[^A-Za-z0-9]+", "-", key) + ("-noisy" if noisy else "")
    return Path(clip_path).with_suffix(f".{name}.npy")


def draw_chances(infos):
    """The chance of each clip to be drawn, adding up to 1.

    Folders in proportion to the square root of their videos, so that one large folder does not
    drown the others; inside a folder all videos (people) alike; inside a video all clips."""
    clips = Counter(info.source for info in infos)
    videos = Counter(str(Path(source).parent) for source in clips)
    weights = [videos[info.folder()] ** -0.5 / clips[info.source] for info in infos]
    return np.array(weights) / sum(weights)


def at_time(series, late):
    """[T, D] -> [T, D]: what comes `late` steps later; the ends repeat."""
    times = np.arange(len(series)) + late
    return series[times.clip(0, len(series) - 1)]


def move_mel(mel, late):
    """[80, 4T] -> [80, 4T]: what comes `late` frames later"""
    return at_time(mel.T, late * MEL_PER_FRAME).T


def load_aligned(info, features_key, offsets):
    """-> Clip and its features [T, D] (None without a key). Features and mel, not the wave, are
    moved from the sound's time to the lips' by offsets {source: frames that the sound is late}."""
    late = offsets.get(info.source, 0)
    clip = data.load_clip(info.path)
    clip = dataclasses.replace(clip, mel=move_mel(clip.mel, late))
    return clip, load_features(info, features_key, late) if features_key else None


def load_features(info, features_key, late, noisy=False):
    """What a frozen encoder made of a clip's sound, or of its noisy copy -> [T, D]"""
    path = feature_path(info.path, features_key, noisy)
    with data.naming(path):
        return at_time(np.load(path), late)


def audio_input(config, frames, mel, features=None):
    """What the network hears at `frames` [S] of a clip -> dict.

    audio [S, F, D] where there are features [T, D]; else mel [80, 4 x 125] and window [S, F]"""
    T = mel.shape[1] // MEL_PER_FRAME
    window = audio_window(frames, config.spacing, config.window, T).numpy()  # [S, F]
    if features is not None:
        return dict(audio=features[window].astype(np.float32))
    whole = np.zeros((N_MELS, MEL_PER_FRAME * data.CLIP_FRAMES), np.float32)
    whole[:, :mel.shape[1]] = mel
    return dict(mel=whole, window=window)


def as_tensors(sample):
    """dict of arrays and numbers -> dict of tensors"""
    return {name: torch.as_tensor(value) for name, value in sample.items()}


# ---------------------------------------------------------------- for the generator (S2, S3)
class ClipDataset(torch.utils.data.Dataset):
    """Training samples: S frames of a clip, its references, and the sound of each frame.

    Patent: S2(2) the groups of S frames, S2(3) the audio window, Fig. 7 the references, S3 gamma
        and brightness.
    Shapes: sample = dict of
        refs [R, 3, H, W] uint8, target [S, 3, H, W] uint8 (masked = its upper half),
        points [S, R, 2, K, 2], lips (and jaw) [S, P, 2] float32 picture widths (see LipSync),
        audio [S, F, D] float32 selected features (frozen encoder), or mel [80, 4 x 125] and
        window [S, F] int64 (scratch),
        sync_sound [S, D] or [80, 4S] that of frames start .. start+S-1 for the sync expert, in_sync
        bool: these are the frames shown; else sync and lip losses leave the sample out,
        mouth_box [S, 4] int64 (x0, y0, x1, y1) of the lips with a margin, px,
        amplitude [S], gamma, brightness float32 (train.shade applies them), flip bool, clip int64,
        start int64.
    features_key: names the frozen encoder's files (feature_path); None: scratch, from the mel.
    offsets {source: frames}: by how much a video's own sound is late.
    Choice: sample i depends on (seed, i) only, so a resumed run sees what it would have seen. In
        a share of the samples frame t's sound is paired, within the clip, with the picture whose
        mouth is a times as open as at t, and a is the amplitude. In the first `spread_until` the
        S frames lie anywhere in the clip: neighbours look alike, so these teach more, and the
        sync loss, which needs a row, comes later. Mirroring, gamma and brightness, and a smooth
        random bend and colour mix of all pictures alike make new people out of old.
    """

    def __init__(self, infos, config, group=5, seed=0, amplitude_share=0.3, random_refs=False,
                 features_key=None, sync_audio=None, offsets=None, spread_until=0):
        if not infos:
            raise BadInput("no clips to train on: is DIR right, and were clips kept?")
        self.infos, self.config, self.group, self.seed = list(infos), config, group, seed
        self.amplitude_share, self.random_refs = amplitude_share, random_refs
        self.features_key = features_key
        self.sync_audio = sync_audio or ("features" if features_key else "mel")
        self.offsets, self.spread_until = offsets or {}, spread_until
        self.chances = draw_chances(self.infos)
        self.broken = set()

    def __len__(self):  # of clips; make_loader's sample numbers go on beyond
        return len(self.infos)

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, int(index)])
        number, clip, features = self.draw(rng)
        with data.naming(clip.path):
            return self.sample(clip, features, number, rng, index < self.spread_until)

    def draw(self, rng):
        """-> number, Clip, features. A broken file is named once, and another takes its place."""
        for _ in range(20):
            number = rng.choice(len(self.infos), p=self.chances)
            info = self.infos[number]
            if info.path in self.broken or info.frames < self.group + 12:
                continue
            try:
                with data.naming(info.path):
                    return number, *self.load(info, rng)
            except BadInput as error:
                self.broken.add(info.path)
                tqdm.write(f"skipped from now on: {error}")
        raise BadInput(f"{self.infos[0].path.parent}: hardly a clip there can be read; "
                       "prepare the folder again")

    def load(self, info, rng):
        """-> Clip, features"""
        return load_aligned(info, self.features_key, self.offsets)

    def sample(self, clip, features, number, rng, spread):
        start, heard, shown, amplitude = self.draw_frames(clip, rng, spread)
        if self.random_refs:
            refs = rng.choice(len(clip), self.config.refs)
        else:
            refs = faces.select_references(clip.landmarks, self.config.refs, exclude=shown, rng=rng)
        frames = [*refs, *shown]
        pictures = np.stack([clip.frame(i) for i in frames])  # [R+S, 256, 256, 3]
        points = clip.landmarks[frames]  # [R+S, K, 3]
        flip = rng.random() < 0.5
        pictures, points = bend(pictures, points, rng)
        if flip:
            pictures, points = pictures[:, :, ::-1], mirror(points)
        sample = self.show(pictures, points)
        sample |= audio_input(self.config, heard, clip.mel, features)
        sample |= dict(sync_sound=self.sound_for_sync(clip, features, start), amplitude=amplitude)
        sample |= dict(in_sync=not spread and np.array_equal(shown, heard))
        sample |= dict(gamma=math.exp(rng.normal(0, 0.2)), brightness=rng.uniform(0.8, 1.2))
        return as_tensors(sample | dict(flip=flip, clip=number, start=start))

    def draw_frames(self, clip, rng, spread):
        """-> start, frames whose sound is heard [S], frames that are shown [S], amplitude [S]"""
        S = self.group
        start = int(rng.integers(0, len(clip) - S + 1))
        heard = np.arange(start, start + S)
        if spread:
            heard = np.sort(rng.choice(len(clip), S, replace=False))
        if rng.random() < self.amplitude_share:
            return start, heard, *pair_amplitude(clip, heard, rng)
        return start, heard, heard, np.ones(S, np.float32)

    def show(self, pictures, points):
        """What a sample holds of pictures [R+S, 256, 256, 3] and points [R+S, K, 3]"""
        R, size = self.config.refs, self.config.image_size
        planes, target = to_planes(pictures, size), points[R:]
        placed = faces.place_points(points[:R], target)
        return dict(refs=planes[:R], target=planes[R:], points=placed,
                    lips=faces.place_lips(target), mouth_box=mouth_boxes(target, size))

    def sound_for_sync(self, clip, features, start):
        """The sound of S frames as the sync expert hears it -> float32 [S, D] or [80, 4S]"""
        end = start + self.group
        piece = clip.mel[:, start * MEL_PER_FRAME:end * MEL_PER_FRAME]
        if self.sync_audio == "features":
            piece = features[start:end]
        return piece.astype(np.float32)


def to_planes(pictures, size):
    """uint8 [n, 256, 256, 3] -> uint8 [n, 3, size, size]"""
    pictures = np.ascontiguousarray(pictures)
    if size != faces.CROP_PX:
        pictures = [cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
                    for picture in pictures]
    return np.ascontiguousarray(np.moveaxis(pictures, -1, 1))


def mouth_boxes(points, size):
    """points [S, K, 3] crop px -> int64 [S, 4] (x0, y0, x1, y1): the lips with a margin, px of a
    picture of that size"""
    lips = points[:, faces.LIPS_OUTER, :2]
    centre = lips.mean(1)  # [S, 2]
    width = np.ptp(lips[..., 0], axis=1)[:, None]  # [S, 1]
    low, high = centre - width * (0.75, 0.6), centre + width * (0.75, 0.8)
    box = np.hstack([low, high]) * size / faces.CROP_PX
    return box.clip(0, size).round().astype(np.int64)


def mirror(points):
    """points [..., K, 3] of a crop -> those of the mirrored crop"""
    points = points[..., faces.MIRROR, :].copy()
    points[..., 0] = faces.CROP_PX - 1 - points[..., 0]
    return points


def bend(pictures, points, rng):
    """One smooth random warp and one colour matrix for all pictures: a person like no other.

    pictures uint8 [n, 256, 256, 3], points [n, K, 3] crop px -> the same. Scale and shear +-6 %
    about the middle, 5 px of low-frequency bend, colour matrix +-0.12."""
    size = (faces.CROP_PX, faces.CROP_PX)
    y, x = np.indices(size, np.float32)
    grid = np.stack([x, y], -1)  # [256, 256, 2]
    matrix = rng.uniform(-0.06, 0.06, (2, 2)).astype(np.float32)
    low = rng.normal(0, 2.5, (4, 4, 2)).astype(np.float32)
    shift = cv2.resize(low, size, interpolation=cv2.INTER_CUBIC)
    shift += (grid - faces.CROP_PX / 2) @ matrix
    colour = np.eye(3) + rng.uniform(-0.12, 0.12, (3, 3))
    colour /= colour.sum(1, keepdims=True)  # grey stays grey: brightness is another's matter
    bent = []
    for picture in pictures:  # a pixel is fetched from grid + shift
        picture = cv2.remap(picture, grid + shift, None, cv2.INTER_LINEAR,
                            borderMode=cv2.BORDER_REPLICATE)
        bent.append(cv2.transform(picture, colour))
    points, place = points.copy(), points[..., :2]
    for _ in range(3):  # where a point goes is the inverse of where a pixel is fetched from
        at = place.clip(0, faces.CROP_PX - 1).round().astype(int)
        place = points[..., :2] - shift[at[..., 1], at[..., 0]]
    points[..., :2] = place
    return np.stack(bent), points


def pair_amplitude(clip, heard, rng):
    """For the sound of frames `heard` [S]: frames `shown` [S] with another opening.

    Each comes near, with like width and head turn, to a random multiple of the opening heard.
    -> shown [S], a float32 [S]: how many times as open they are, 0.3..2; 1 where heard is shut"""
    gap, width, _ = faces.mouth_shape(clip.landmarks).T  # [T] each, px
    looks = np.column_stack([gap, width, faces.head_turn(clip.landmarks)])  # [T, 4]
    looks /= looks.std(0) + 1e-6
    wanted = looks[heard]  # [S, 4]
    wanted[:, 0] *= rng.uniform(0.4, 1.7)
    unlike = np.abs(looks - wanted[:, None])  # [S, T, 4]
    opening, width, sideways, downwards = np.moveaxis(unlike, -1, 0)  # [S, T] each
    cost = 2 * opening + 0.5 * width + 0.5 * np.hypot(sideways, downwards)
    shown = cost.argmin(1)
    ratio = gap[shown] / np.maximum(gap[heard], 2)
    amplitude = np.where(gap[heard] > 2, ratio, 1)
    return shown, amplitude.clip(0.3, 2).astype(np.float32)


# ---------------------------------------------------------------- for the mouth
class MouthClip(NamedTuple):
    """What MouthSamples keeps of a clip of T frames."""
    landmarks: np.ndarray  # [T, K, 3] crop px
    mel: np.ndarray  # [80, 4T]
    features: np.ndarray  # [T, D] of a frozen encoder, or None
    loudness: np.ndarray  # [T]


class MouthSamples:
    """What the mouth stage learns from: landmarks and features of all clips, in memory.

    Patent: S2(3) and S2(4)a-f; that lips are predicted is our choice (LipHead).
    Shapes: batch(step) -> dict of B = clips x frames rows: audio [B, F, D] (frozen encoder), or
        mel [clips, 80, 4 x 125] and window [clips, frames, F]; points [B, R, 2, K, 2],
        lips [B, P, 2] picture widths, amplitude [B].
    Choice: the lips of a sample are the true ones, scaled by its amplitude about the closed mouth
        (the most closed reference): so the coefficient means opening. `quiet_share` of the frames
        are drawn from the softest tenth of their clip; `silent_share` of the clips are given
        digital silence and the closed mouth. Mirrored at random. batch(step) depends on (seed,
        step) only.
    silence: the frozen encoder's features of 5 s of silence [125, D]; None: scratch.
    """

    def __init__(self, infos, config, features_key, seed=0, silence=None, quiet_share=0.15,
                 silent_share=0.1, amplitude_share=0.5):
        self.config, self.seed, self.silence = config, seed, silence
        self.quiet_share, self.silent_share = quiet_share, silent_share
        self.amplitude_share = amplitude_share
        self.silent_mel = log_mel(np.zeros(data.CLIP_FRAMES * SAMPLES_PER_FRAME)).numpy()
        self.infos, self.clips = [], []
        for info in tqdm(infos, desc="landmarks", unit="clip", leave=False):
            if info.frames <= config.window + 1:
                continue
            try:
                clip, features = load_aligned(info, features_key, {})
            except BadInput as error:
                tqdm.write(f"skipped: {error}")
                continue
            self.infos.append(info)
            self.clips.append(MouthClip(clip.landmarks, clip.mel, features, loudness(clip)))
        if not self.clips:
            raise BadInput("no clips to train on: is DIR right, and were clips kept?")
        self.chances = draw_chances(self.infos)

    def move_sounds(self, offsets):
        """Brings sounds to their lips: offsets {source: frames that the sound is late}"""
        for number, (info, clip) in enumerate(zip(self.infos, self.clips)):
            late, features = offsets.get(info.source, 0), clip.features
            if features is not None:
                features = at_time(features, late)
            self.clips[number] = clip._replace(
                mel=move_mel(clip.mel, late), features=features,
                loudness=at_time(clip.loudness, late))

    def batch(self, step, clips=24, frames=10):
        rng = np.random.default_rng([self.seed, 7, step])
        rows = []
        for _ in range(clips):
            number = rng.choice(len(self.clips), p=self.chances)
            with data.naming(self.infos[number].path):
                rows.append(self.rows(*self.clips[number], frames, rng))
        batch = {}
        for name in rows[0]:
            parts = [torch.as_tensor(row[name]) for row in rows]
            join = torch.stack if name in ("mel", "window") else torch.cat  # the clips' own axis
            batch[name] = join(parts)
        return batch

    def rows(self, landmarks, mel, features, loud, frames, rng):
        """What a batch holds of `frames` frames of one clip: dict of arrays"""
        T = len(landmarks)
        anywhere = rng.integers(0, T, frames)
        quiet = np.argsort(loud)[:max(1, T // 10)]
        is_quiet = rng.random(frames) < self.quiet_share
        at = np.where(is_quiet, rng.choice(quiet, frames), anywhere)  # [frames]
        if rng.random() < 0.5:
            landmarks = mirror(landmarks)
        # Not all of `at`: a short clip would have hardly a reference left.
        refs = faces.select_references(landmarks, self.config.refs, exclude=at[:1], rng=rng)
        points = faces.place_points(landmarks[refs], landmarks[at])  # [frames, R, 2, K, 2]
        closed = points[:, 0, 1, faces.MOUTH]  # [frames, P, 2]
        true = faces.place_lips(landmarks[at])
        amplitude = np.ones((frames, 1, 1), np.float32)
        if rng.random() < self.amplitude_share:
            amplitude[:] = rng.uniform(0.4, 1.8)
        lips = closed + amplitude * (true - closed)
        if rng.random() < self.silent_share:
            lips, mel, features = closed, self.silent_mel, self.silence
        return dict(points=points, lips=lips, amplitude=amplitude[:, 0, 0],
                    **audio_input(self.config, at, mel, features))


def loudness(clip):
    """-> float32 [T]: root mean square of each frame's sound"""
    frames = clip.sound().reshape(len(clip), -1)
    return data.rms(frames, axis=1)


# ---------------------------------------------------------------- for the experts
class SyncDataset(ClipDataset):
    """S frames, their sound, and sounds of the same clip that do not overlap it.

    Patent: S3(1), syncXnet trained as SyncNet.
    Shapes: pictures [S, 3, 64, 128] uint8; sound [S, D] or [80, 4S], negatives [4, S, D] or
        [4, 80, 4S] float32; clip int64.
    Choice: sounds of the same clip are the hard negatives; other clips' are taken from the batch.
        Half of the samples take the noisy copies.
    """
    NEGATIVES = 4

    def load(self, info, rng):
        """-> Clip, its sound over time [T, D] or [4T, 80], half of them noisy"""
        noisy, late = rng.random() < 0.5, self.offsets.get(info.source, 0)
        clip = data.load_clip(info.path)
        if self.sync_audio == "features":
            return clip, load_features(info, self.features_key, late, noisy)
        mel = log_mel(corrupt_sound(clip.sound(), rng)).numpy() if noisy else clip.mel
        return clip, move_mel(mel, late).T

    def sample(self, clip, series, number, rng, spread):
        S, each = self.group, 1 if self.sync_audio == "features" else MEL_PER_FRAME
        starts = np.arange(len(clip) - S + 1)
        start = rng.choice(starts)
        apart = starts[np.abs(starts - start) >= S]
        negatives = rng.choice(apart, self.NEGATIVES)
        pictures = lower_halves(clip, range(start, start + S))
        if rng.random() < 0.5:
            pictures = pictures[..., ::-1].copy()
        pieces = [series[i * each:(i + S) * each] for i in (start, *negatives)]
        sound = np.stack(pieces).astype(np.float32)  # [1+4, S, D]
        if self.sync_audio == "mel":
            sound = sound.swapaxes(1, 2)  # [1+4, 80, 4S]
        return as_tensors(
            dict(pictures=pictures, sound=sound[0], negatives=sound[1:], clip=number))


class SentenceDataset(ClipDataset):
    """Whole clips and their text, for the lip reader.

    Patent: S3(2).
    Shapes: video [T, 3, 64, 128] uint8, text str, number int; `collate` pads a batch to video
        [B, T, ...], length [B], tokens [B, U], clip [B].
    Choice: at random mirrored, and slower or faster by up to a quarter. All clips alike.
    """

    def __init__(self, infos, seed=0):
        super().__init__(infos, None, seed=seed)
        self.chances = None  # of draw: all alike

    def sample(self, clip, features, number, rng, spread):
        speed = rng.uniform(0.8, 1.25)
        frames = np.arange(0, len(clip) - 0.5, speed).round().astype(int)
        video = lower_halves(clip, frames)
        if rng.random() < 0.5:
            video = video[..., ::-1].copy()
        return torch.from_numpy(video), clip.text, number

    @staticmethod
    def collate(samples):
        videos, texts, numbers = zip(*samples)
        lengths = torch.tensor([len(video) for video in videos])
        video = nn.utils.rnn.pad_sequence(videos, batch_first=True)
        tokens = [torch.tensor(encode_text(text)) for text in texts]
        tokens = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD)
        return dict(video=video, length=lengths, tokens=tokens, clip=torch.tensor(numbers))


# ---------------------------------------------------------------- whole clips
def lower_halves(clip, frames):
    """Half-size lower halves, what the experts see: uint8 RGB [n, 3, 64, 128]"""
    pictures = np.stack([clip.frame(i, half=True)[64:] for i in frames])
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))


def clip_points(landmarks, config):
    """A clip's landmarks [T, K, 3] -> reference numbers [R], and what LipSync takes as points,
    float32 [T, R, 2, K, 2]"""
    refs = faces.select_references(landmarks, config.refs)
    return refs, faces.place_points(landmarks[refs], landmarks)


def clip_audio(config, features, T):
    """features [L, D] of a clip of T frames -> what each frame hears [T, F, D]"""
    select = lipsync.AudioSelector(config)
    return select(features[None])[0, :T]


def predict_landmarks(net, landmarks, features, amplitude=1.0):
    """A clip's landmarks [T, K, 3] with the lips and jaw that its sound asks for; features [L, D],
    on the network's device -> [T, K, 3] crop px"""
    _, points = clip_points(landmarks, net.config)
    points = torch.from_numpy(points).to(features.device)
    audio = clip_audio(net.config, features, len(landmarks))
    lips = net.predict_lips(audio, amplitude, points)
    landmarks = landmarks.copy()
    landmarks[:, faces.MOUTH, :2] = lips.float().cpu().numpy() * faces.CROP_PX
    return landmarks
