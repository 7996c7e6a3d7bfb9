"""Drawn speakers whose mouth, text and sound are known exactly: demo corpus, tests, figures.

    stage    | code
    who      | Speaker
    what     | syllable_timeline, synthesize
    pictures | Portrait, draw_eyes, draw_mouth, render
    clips    | draw_clip, draw_demo

`python data.py --demo DIR` draws a corpus, `python infer.py --demo` dubs one of them.
"""
import multiprocessing
import os
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data import VideoWriter
from lipsync import FPS, SAMPLE_RATE

# ---- demo: who speaks ------------------------------------------------------------------------------------------------------------
# Lengths are in half face widths ("units"): u to the right, v down, (0, 0) on the nose bridge.


def trait(low, high):
    return field(metadata={"range": (low, high)})


@dataclass(frozen=True)
class Speaker:
    """One drawn person. Speaker.draw(seed) takes every trait uniformly from its range; a volume, beard or glasses below 0 is none."""
    texture: float = trait(0, 1e9)  # seed of skin grain and hair strands
    skin: float = trait(0, 1)  # place in its palette, as for hair, iris, wall and cloth
    blush: float = trait(0, 1)
    freckles: float = trait(-1, 1)
    taper: float = trait(0.06, 0.22)  # square jaw .. pointed chin
    chin: float = trait(1.2, 1.38)
    hair: float = trait(0, 1)
    volume: float = trait(-0.04, 0.32)
    length: float = trait(-2, 1.9)
    hairline: float = trait(0.62, 1.0)
    parting: float = trait(-0.6, 0.6)
    fringe: float = trait(-0.1, 0.7)
    curl: float = trait(0, 1)
    brow: float = trait(0.025, 0.06)
    brow_tilt: float = trait(-0.12, 0.12)
    eye: float = trait(0.17, 0.23)
    eye_height: float = trait(0.42, 0.58)
    eye_gap: float = trait(0.40, 0.46)
    eye_tilt: float = trait(-0.12, 0.12)
    iris: float = trait(0, 1)
    nose: float = trait(0.12, 0.21)
    nose_length: float = trait(0.40, 0.52)
    beard: float = trait(-2, 1)
    glasses: float = trait(-2, 1)
    mouth: float = trait(0.31, 0.40)  # half the width of the closed mouth
    lip: float = trait(0.07, 0.14)
    lip_red: float = trait(0, 1)
    tooth: float = trait(0.085, 0.13)  # width of a middle incisor
    tooth_length: float = trait(0.10, 0.16)
    tooth_gap: float = trait(-0.02, 0.016)  # between the middle incisors, none below 0
    tooth_yellow: float = trait(0, 1)
    tongue: float = trait(0, 1)  # dark red .. pink
    wall: float = trait(0, 1)
    cloth: float = trait(0, 1)
    light: float = trait(-0.7, 0.7)  # from the left .. from the right
    size: float = trait(118, 145)  # half face width on the screen, px
    pitch: float = trait(90, 230)  # Hz
    tract: float = trait(0.9, 1.15)  # factor of the formants: long .. short throat
    articulation: float = trait(0.8, 1.15)  # how far this person opens the mouth

    @classmethod
    def draw(cls, seed):
        rng = np.random.default_rng(seed)
        return cls(**{each.name: rng.uniform(*each.metadata["range"]) for each in fields(cls)})


# ---- demo: what is said, seen and heard --------------------------------------------------------------------------------------------
# One consonant per lip shape (b and p would look like m), so that the lips alone tell the twelve syllables apart.
# Mouth: opening and width as fractions of the closed mouth's width; rounding 0..1; teeth -1 (upper ones on the lower lip) .. 1 (clenched).
# Sound: three formants in Hz; loudness of voice, of hiss and of breath.

CONTROL_HZ = 1000  # the timeline's own rate
SOUNDS = {
    #     open  width round teeth   F1    F2    F3  voice hiss breath
    "a": (0.40, 1.00, 0.0, 0.0,    800, 1250, 2600, 1.00, 0.0, 0.0),
    "i": (0.17, 1.20, 0.0, 0.3,    290, 2250, 3000, 0.80, 0.0, 0.0),
    "o": (0.28, 0.74, 0.7, 0.0,    480,  850, 2500, 0.90, 0.0, 0.0),
    "u": (0.12, 0.55, 1.0, 0.0,    310,  650, 2300, 0.80, 0.0, 0.0),
    "m": (-0.2, 1.00, 0.0, 0.0,    250, 1050, 2200, 0.35, 0.0, 0.0),  # below 0: pressed shut
    "f": (0.05, 1.03, 0.0, -1.,    400, 1200, 2400, 0.00, 0.0, 1.0),
    "s": (0.13, 1.14, 0.0, 1.0,    350, 1700, 2600, 0.00, 1.0, 0.0),
    " ": (-0.04, 1.0, 0.0, 0.0,    450, 1300, 2500, 0.00, 0.0, 0.0),
}


def syllable_timeline(rng, seconds, articulation=1.0):
    """-> [(syllable, start s, end s)], mouth float64 [T, 4] (opening, width, rounding, teeth) per frame, controls [1000 * seconds, 10]"""
    controls = np.tile(SOUNDS[" "], (round(seconds * CONTROL_HZ), 1))
    syllables, now = [], rng.uniform(0.15, 0.5)
    while now + 0.4 < seconds:
        consonant, vowel = rng.choice(list("mfs")), rng.choice(list("aiou"))
        middle, end, stress = now + rng.uniform(0.09, 0.11), now + rng.uniform(0.25, 0.31), rng.uniform(0.8, 1.15)
        for sound, start, stop in (consonant, now, middle), (vowel, middle, end):
            controls[round(start * CONTROL_HZ):round(stop * CONTROL_HZ)] = np.multiply(SOUNDS[sound], [stress] + [1] * 6 + [stress] * 3)
        syllables.append((consonant + vowel, now, end))
        now = end + (rng.uniform(0.25, 0.8) if rng.random() < 0.12 else 0)
    controls[:, :7] = cv2.GaussianBlur(controls[:, :7], (1, 0), 0.1, sigmaY=28, borderType=cv2.BORDER_REPLICATE)  # coarticulation, ms
    controls[:, 7:] = cv2.GaussianBlur(controls[:, 7:], (1, 0), 0.1, sigmaY=10, borderType=cv2.BORDER_REPLICATE)
    controls[:, 0] = np.maximum(controls[:, 0], 0) * articulation
    shown = (np.arange(round(seconds * FPS)) + 0.5) / FPS  # s: a frame shows the middle of the time it stays on screen
    return syllables, controls[np.minimum((shown * CONTROL_HZ).astype(int), len(controls) - 1), :4], controls


def synthesize(speaker, controls, rng):
    """Formant synthesis: harmonics of the pitch under three resonances, noise for s and f. -> float32 [N] at 16 kHz"""
    count = len(controls) * SAMPLE_RATE // CONTROL_HZ
    times, ticks = np.arange(count) / SAMPLE_RATE, (np.arange(len(controls)) + 0.5) / CONTROL_HZ
    f1, f2, f3, voice, hiss, breath = (np.interp(times, ticks, control) for control in controls[:, 4:].T)
    pitch = speaker.pitch * (1 + 0.12 * drift(rng, times, 1.5) + 0.01 * drift(rng, times, 12))
    phase, tone = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE, np.zeros(count)
    for k in range(1, int(4000 / speaker.pitch)):
        resonances = ((f1, 70, 1), (f2, 90, 0.6), (f3, 140, 0.3))  # Hz, half bandwidth in Hz, level
        gain = 0.01 + sum(level / (1 + ((k * pitch - formant * speaker.tract) / half) ** 2) for formant, half, level in resonances)
        tone += gain * k ** -0.4 * np.sin(k * phase)
    hz, noise = np.fft.rfftfreq(count, 1 / SAMPLE_RATE), np.fft.rfft(rng.standard_normal(count))
    sharp, soft = (np.fft.irfft(noise * band(hz, low, 7300, 800), count) for low in (4200, 900))
    sound = 0.22 * voice * tone + 0.10 * hiss * sharp + 0.04 * breath * soft
    return (0.7 * np.tanh(sound) + 1e-4 * rng.standard_normal(count)).astype(np.float32)


def drift(rng, times, hz):
    """A smooth random curve, -1..1 most of the time, that swings at most `hz` times a second."""
    rates, phases = rng.uniform(0.3, 1, 5) * hz, rng.uniform(0, 2 * np.pi, 5)
    return np.sin(2 * np.pi * times[:, None] * rates + phases).sum(1) / 2.5


# ---- demo: how it is drawn ---------------------------------------------------------------------------------------------------------

UNIT, CENTRE, CANVAS = 150, (250, 310), (630, 500)  # the head's canvas: px per unit, x and y of (u, v) = (0, 0), height and width
EYES_V, MOUTH_V = -0.12, 0.74
PALETTES = {
    "skin": [(84, 54, 42), (141, 94, 68), (198, 146, 112), (226, 178, 148), (243, 208, 186)],
    "hair": [(22, 18, 18), (48, 32, 24), (92, 58, 36), (150, 74, 36), (196, 152, 88), (226, 202, 150), (165, 162, 160)],
    "iris": [(52, 32, 20), (96, 66, 36), (104, 112, 62), (86, 122, 148), (110, 120, 126)],
    "wall": [(58, 66, 82), (120, 140, 150), (188, 178, 160), (92, 112, 92), (142, 96, 84), (70, 52, 78), (206, 210, 214)],
    "cloth": [(28, 34, 58), (150, 32, 40), (226, 222, 214), (40, 92, 74), (36, 36, 38), (208, 150, 40), (96, 130, 180)],
}


def palette(name, place):
    colours = np.array(PALETTES[name]) / 255
    return np.array([np.interp(place * (len(colours) - 1), range(len(colours)), channel) for channel in colours.T], np.float32)


def band(x, low, high, soft):
    """1 where x is within low..high, else 0, with edges `soft` wide: anti-aliasing without supersampling."""
    return np.clip((x - low) / soft + 0.5, 0, 1) * np.clip((high - x) / soft + 0.5, 0, 1)


def bump(x, y, wide, tall):
    return np.exp(-(x / wide) ** 2 - (y / tall) ** 2)


def ramp(x, low, high):
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def paint(canvas, colour, alpha):
    canvas += np.asarray(alpha, np.float32)[..., None] * (np.asarray(colour, np.float32) - canvas)


def grain(rng, shape, wide, tall):
    """Smooth noise of unit size in blobs of wide x tall px. -> float32 `shape`"""
    small = rng.standard_normal((int(shape[0] / tall) + 2, int(shape[1] / wide) + 2), np.float32)
    return cv2.resize(small, shape[::-1], interpolation=cv2.INTER_CUBIC)


@lru_cache(maxsize=16)
def part(u_range, v_range):
    """A rectangle in units -> its slices of the canvas, and the u and v of each pixel, float32."""
    x0, x1 = np.clip([round(CENTRE[0] + UNIT * u) for u in u_range], 0, CANVAS[1])
    y0, y1 = np.clip([round(CENTRE[1] + UNIT * v) for v in v_range], 0, CANVAS[0])
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    return (slice(y0, y1), slice(x0, x1)), (x - CENTRE[0]) / UNIT, (y - CENTRE[1]) / UNIT


def shade(relief, side, shine):
    """Lambert's law for light from above and from `side` (-1 left .. 1 right), and some shine. -> factor of the colour [H, W, 1]"""
    dv, du = np.gradient(relief, np.float32(1 / UNIT))
    facing = np.maximum(0.9 + 0.45 * dv - side * du, 0) / np.sqrt((1 + du ** 2 + dv ** 2) * (1.01 + side ** 2))
    return (0.38 + 0.72 * facing + shine * facing ** 24)[..., None]


def to_bytes(picture):
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


class Portrait:
    """What does not move of a speaker: the head without eyes and mouth, lit from two sides (RGBA), its depth, and the room."""

    def __init__(self, speaker):
        self.speaker = s = speaker
        rng = np.random.default_rng(int(s.texture))
        _, u, v = part((-9, 9), (-9, 9))
        w, soft = np.abs(u), partial(cv2.GaussianBlur, ksize=(0, 0))
        fine, coarse, blobs = grain(rng, CANVAS, 2, 2), grain(rng, CANVAS, 30, 30), grain(rng, CANVAS, 5, 5)
        strands = grain(rng, CANVAS, 2 + 4 * s.curl, 60 - 52 * s.curl) + 0.5 * grain(rng, CANVAS, 2, 20)
        skin, hair, nose_v = palette("skin", s.skin), palette("hair", s.hair), EYES_V + s.nose_length
        height = np.where(v < 0, 1.42, s.chin).astype(np.float32)
        reach = (w / (1 - s.taper * np.clip(v + 0.1, 0, 1.7) ** 2)) ** 2.3 + (np.abs(v) / height) ** 2.3  # 1 on the face's outline
        ears = np.clip((1 - ((w - 0.99) / 0.13) ** 2 - ((v - 0.1) / 0.26) ** 2) * 8 + 0.5, 0, 1)
        self.depth = np.maximum(1 - reach, 0) + 0.35 * bump(u, v - nose_v, 0.18, 0.2)
        relief = soft(0.9 * np.sqrt(np.maximum(1 - reach, 0)) - 0.6 * np.maximum(reach - 1, 0) + 0.04 * ears + 0.0015 * fine
                      + 0.16 * bump(u, v - nose_v + 0.02, s.nose * 0.75, 0.13) + 0.12 * bump(u, v - nose_v + 0.25, 0.1, 0.26)  # nose
                      + 0.05 * bump(w - s.nose * 0.8, v - nose_v - 0.03, 0.06, 0.06) - 0.13 * bump(w - s.eye_gap, v - EYES_V, 0.2, 0.14)
                      + 0.05 * bump(w - 0.55, v - 0.3, 0.2, 0.15) + 0.08 * bump(u, v - MOUTH_V, 0.35, 0.2)  # cheekbones, mouth
                      - 0.03 * bump(u, v - MOUTH_V - 0.22, 0.2, 0.07) + 0.06 * bump(u, v - s.chin + 0.16, 0.2, 0.13), sigmaX=2)

        face = skin * (1 + 0.02 * fine + 0.03 * coarse)[..., None]
        side, fold = w - s.eye_gap, w - (s.nose + 0.06 + 0.32 * (v - nose_v))
        paint(face, skin * (1.08, 0.72, 0.68), (0.2 + 0.4 * s.blush) * (bump(w - 0.6, v - 0.35, 0.25, 0.2) + bump(u, v - nose_v, 0.2, 0.15)))
        paint(face, skin * 0.62, np.clip(blobs - 1.3, 0, 1) * max(s.freckles, 0) * bump(u, v - 0.2, 0.8, 0.35))
        paint(face, skin * (0.66, 0.58, 0.58), 0.5 * bump(side, v - EYES_V, 0.26, 0.13))  # eye sockets
        paint(face, skin * 0.25, np.minimum(1.6 * bump(w - s.nose * 0.42, v - nose_v - 0.1, s.nose * 0.28, 0.03), 0.95))  # nostrils
        paint(face, skin * 0.5, 0.5 * bump(u, v - nose_v - 0.13, s.nose * 0.9, 0.035) + 0.3 * bump(u, v - MOUTH_V - s.lip - 0.09, 0.22, 0.035))
        paint(face, skin * 0.6, 0.3 * bump(fold, 0, 0.025, 1) * band(v, nose_v, MOUTH_V - 0.02, 0.15))
        beard = band(reach + 0.25 * bump(u, v - MOUTH_V + 0.15, 0.4, 0.1), 0.47 - 0.12 * ramp(v, 0.7, 0.9), 9, 0.2) * band(v, 0.3, 9, 0.3)
        paint(face, hair * 0.8, max(s.beard, 0) * np.clip(beard * (0.75 + 0.3 * fine) - 1.35 * bump(u, v - MOUTH_V - 0.03, s.mouth, 0.16), 0, 1))
        brow = (v - EYES_V + 0.3 - s.brow_tilt * side - 0.9 * side ** 2) / (1.1 - side)
        paint(face, hair * 0.7, np.clip(bump(brow, 0, s.brow, 1) * band(side, -0.27, 0.3, 0.1) * (0.9 + 0.3 * strands), 0, 1))

        # hair: a larger, ragged skull without the opening for the face
        a, b = u + 0.05 * s.curl * coarse + 0.004 * strands, v + 0.04 * s.curl * blobs + 0.02 * strands
        length, crown = max(s.length, -0.1), 1.46 + s.volume
        outer = (1.03 + s.volume) * np.sqrt(np.clip(1 - (np.minimum(b, 0) / crown) ** 2, 0, 1)) + 0.08 * np.maximum(b, 0)
        opening = band(b, s.fringe * np.maximum(np.abs(a - s.parting) - 0.1, 0) ** 2 - s.hairline, 9, 0.04)
        opening *= band(np.abs(a), -1, 0.94 - 0.08 * np.clip(length * (v + 0.5), 0, 2), 0.05) * np.maximum(ramp(reach, 1, 0.9), ramp(v, 0.3, 0.6))
        mane = band(np.abs(a), -9, outer, 0.03) * band(b, 0.02 - crown, length, 0.08) * (1 - opening) * (s.volume > 0)
        waves = soft(np.sqrt(np.maximum(1.7 - u ** 2 - 0.4 * v ** 2, 0.05)) + 0.012 * strands, sigmaX=1)
        face *= (1 - 0.35 * soft(mane, sigmaX=9))[..., None]  # the hair's shadow
        mane_colour, alpha = hair * (0.95 + 0.14 * strands)[..., None], np.maximum(np.maximum(np.clip((1 - reach) * 30 + 0.5, 0, 1), ears), mane)
        self.lit = []
        for side in s.light - 0.3, s.light + 0.3:
            head = face * shade(relief, side, 0.12)
            paint(head, mane_colour * shade(waves, side, 0.1), mane)
            self.lit.append(np.dstack([to_bytes(head), to_bytes(alpha)]))
        self.ripples, self.room = rng.standard_normal(60), self.draw_room(rng)

    def draw_room(self, rng):
        """Wall, things out of focus, back hair, neck and clothes, at half size: it is out of focus anyway. -> uint8 [720, 1600, 3]"""
        s, shape = self.speaker, (360, 800)
        y, x = np.mgrid[:shape[0], :shape[1]].astype(np.float32)
        u, v = (x - 400) * 2 / s.size, (y - 160) * 2 / s.size
        room = palette("wall", s.wall) * (0.7 - 0.06 * s.light * u + 0.12 * grain(rng, shape, 150, 130) - 0.05 * v)[..., None]
        for _ in range(6):
            (at_x, at_y), (wide, tall) = rng.uniform((0, 0), shape[::-1]), rng.uniform((20, 30), (80, 130))
            paint(room, palette("wall", rng.random()) * rng.uniform(0.5, 1.2), 0.7 * band(x, at_x - wide, at_x + wide, 25) * band(y, at_y - tall, at_y + tall, 25))
        if s.volume > 0 and s.length > 0.6:
            paint(room, palette("hair", s.hair) * 0.45, band(np.abs(u), -9, 0.85, 0.1) * band(v, 0.2, s.length - 0.1, 0.15))
        neck = np.sqrt(np.maximum(1 - (u / 0.75) ** 2, 0.05)) * (1 + 0.5 * s.light * u) * (0.42 + 0.25 * np.clip(v - 1.3, 0, 1))
        paint(room, palette("skin", s.skin) * neck[..., None], band(np.abs(u) - 0.3 * np.maximum(v - 1.6, 0) ** 2, -9, 0.58, 0.02) * band(v, 0.5, 99, 0.1))
        collar = 1.72 + 0.18 * u ** 2 - 0.18 * np.exp(-(u / 0.9) ** 4) + 0.45 * np.exp(-(u / 0.5) ** 2)
        stripes = 1 - 0.15 * (np.sin(u * 100 * (s.cloth % 0.3)) > 0.6)
        folds = (0.75 - 0.15 * s.light * u + 0.06 * grain(rng, shape, 20, 45)) * stripes * (1 - 0.4 * band(v, collar, collar + 0.06, 0.03))
        paint(room, palette("cloth", s.cloth) * folds[..., None], band(v, collar, 99, 0.02))
        room = cv2.resize(room, (1600, 720), interpolation=cv2.INTER_LINEAR)
        return to_bytes(room + 0.01 * rng.standard_normal((720, 1600, 1), np.float32))


portrait_of = lru_cache(maxsize=4)(Portrait)  # a process that draws several clips of one speaker in turn need not start again


def draw_eyes(canvas, s, blink, gaze):
    skin, iris = palette("skin", s.skin), palette("iris", s.iris)
    for side in (-1, 1):
        reach = 0.4 if s.glasses > 0 else 0.26
        where, u, v = part((side * s.eye_gap - reach, side * s.eye_gap + reach), (EYES_V - 0.25, EYES_V + reach - 0.1))
        eye, x = canvas[where][..., :3] / np.float32(255), u - side * s.eye_gap
        y = v - EYES_V - s.eye_tilt * x * side
        low = np.maximum(1 - (x / s.eye) ** 2, 0) ** 0.8 * s.eye * s.eye_height * 0.5
        top, within = low * (3 * blink - 2), band(np.abs(x), -1, s.eye, 0.02)
        ball, radius = band(y, top, low, 0.012) * within, np.hypot(x - gaze[0], y - gaze[1] + 0.02)
        paint(eye, (0.84, 0.81, 0.79), ball * (1 - 0.4 * np.exp(-((y - top) / 0.04) ** 2)))
        for colour, size in (iris * 0.35, 0.098), (iris, 0.086), ((0.03, 0.02, 0.02), 0.042):
            paint(eye, colour, ball * band(radius, -1, size, 0.014))
        paint(eye, (1, 1, 1), 0.9 * ball * band(np.hypot(x - gaze[0] + 0.03, y - gaze[1] + 0.055), -1, 0.017, 0.012))
        paint(eye, skin * 0.17, 0.85 * band(y, top - 0.018, top + 0.012, 0.012) * within)  # lashes
        paint(eye, skin * 0.48, (0.5 * bump(y - low - 0.007, 0, 0.01, 1) + 0.5 * bump(y + 2.7 * low + 0.012, 0, 0.012, 1)) * within)  # lids
        if s.glasses > 0:
            rim = np.abs((np.abs(x / 0.3) ** 3 + np.abs((v - EYES_V - 0.02) / 0.22) ** 3) ** (1 / 3) - 1) * 0.26
            bridge = band(v, EYES_V - 0.015, EYES_V + 0.015, 0.012) * (x * side < -0.3)
            paint(eye, (0.05, 0.05, 0.06), 0.9 * np.maximum(band(rim, -1, 0.01 + 0.02 * s.glasses, 0.012), bridge))
        canvas[where][..., :3] = to_bytes(eye)


def draw_mouth(canvas, portrait, mouth):
    """Lips, teeth, tongue and the dark behind them: each is what lies between two curves over x."""
    s, (opening, width, rounding, teeth) = portrait.speaker, (float(value) for value in mouth)
    where, u, v = part((-0.52, 0.52), (MOUTH_V - 0.24, MOUTH_V + 0.56))
    lips, x, y = canvas[where][..., :3] / np.float32(255), u[0], v - MOUTH_V  # [H, W, 3], [W], [H, W]
    gap, half, bite, clench = opening * 2 * s.mouth, s.mouth * width, max(-teeth, 0), max(teeth, 0)
    t = np.clip(x / half, -1, 1)
    within, arch, rest = band(np.abs(x), -1, half, 0.013), (1 - t ** 2) ** (1 - 0.2 * rounding), 0.016 * (1 - 2 * t ** 2) * (1 - rounding)
    inner_top, inner_low = rest - 0.2 * gap * arch, rest + 0.8 * gap * arch
    thick = s.lip * (1 + 0.25 * rounding - max(width - 1, 0))
    outer_top = inner_top - thick * 0.85 * (1 - t ** 2) ** 0.8 * (1 - 0.25 * np.exp(-(t / 0.16) ** 2))
    outer_low = inner_low + thick * (1 - 0.65 * bite) * (1 - t ** 2) ** 0.6

    red = palette("skin", s.skin) * (0.92, 0.62 - 0.18 * s.lip_red, 0.64 - 0.15 * s.lip_red)
    red = red * ((1 + 0.25 * s.light * t) * (1 + 0.03 * np.interp(t, np.linspace(-1, 1, 60), portrait.ripples)))[:, None]  # [W, 3]
    up, low = (y - outer_top) / (inner_top - outer_top + 1e-3), (y - inner_low) / (outer_low - inner_low + 1e-3)  # 0..1 across each lip
    paint(lips, red * (0.78 - 0.25 * np.clip(up, 0, 1) ** 2)[..., None], band(y, outer_top, inner_top + 0.01, 0.03) * within)
    low = np.clip(low, 0, 1)
    paint(lips, red * (0.8 + 0.3 * np.exp(-((low - 0.4) / 0.25) ** 2) - 0.25 * low ** 3)[..., None], band(y, inner_low - 0.01, outer_low, 0.03) * within)
    paint(lips, red * 0.25, 0.9 * band(y, inner_top - 0.008, inner_low + 0.008, 0.016) * band(np.abs(x), -1, half + 0.01, 0.03))  # the line between

    inside = np.full_like(lips, (0.13, 0.035, 0.035))
    tongue = inner_low - (0.01 + 0.22 * gap) * np.sqrt(np.maximum(1 - (x / (0.8 * half)) ** 2, 0))
    flesh = np.array([0.42, 0.14, 0.15]) + s.tongue * np.array([0.15, 0.12, 0.11])
    paint(inside, flesh * ((0.8 - 1.4 * np.abs(y - tongue - 0.06)) * (1 - 0.25 * np.exp(-(x / 0.02) ** 2)))[..., None], band(y, tongue, 9, 0.03) * (1 - 0.7 * clench))
    tip = s.tooth_length - 0.10  # the upper row stays with the skull, the lower one goes with the jaw
    draw_teeth(inside, x, y, tip + 0.01 * bite, 1, s)
    draw_teeth(inside, x, y, tip + max(0.8 * gap * (1 - clench) - 0.03 - 0.2 * max(width - 1, 0), -0.01), -1, s)
    inside *= (1 - 0.45 * np.exp(-((y - inner_top) / 0.03) ** 2) - 0.3 * np.abs(t) ** 3)[..., None]  # shadow of the upper lip and the corners
    paint(lips, inside, band(y, inner_top, inner_low, 0.013) * within)
    canvas[where][..., :3] = to_bytes(lips)


def draw_teeth(inside, x, y, tip, up, s):
    """A row of teeth with its biting edge at height `tip`; up = 1: the upper row, -1: the lower, smaller one."""
    sizes = np.array([1, 0.8, 0.85, 0.75, 0.75]) * s.tooth * (0.86 + 0.14 * up)
    ends = np.cumsum([max(s.tooth_gap, 0), *sizes])
    number = np.clip(np.searchsorted(ends, np.abs(x)) - 1, 0, 4)
    across = np.clip((np.abs(x) - ends[number]) / sizes[number], 0, 1) * 2 - 1  # -1..1 within a tooth
    edge = tip - up * (np.array([0, 0.018, 0.004, 0.02, 0.03])[number] + 0.016 * across ** 4 + 0.1 * x ** 2)
    white = np.array([0.84, 0.82 - 0.07 * s.tooth_yellow, 0.79 - 0.24 * s.tooth_yellow]) + 0.05 * up
    light = (1 - 0.5 * across ** 8 - 0.1 * across ** 2) * np.clip(1.05 - 2 * x ** 2, 0.3, 1)
    paint(inside, white * light[:, None], band(up * (edge - y), 0, 9, 0.012) * band(np.abs(x), ends[0], ends[-1], 0.012))


def render(portrait, mouth, pose=(0, 0, 0, 1, 0, 0), blink=0.0, gaze=(0, 0), light=0.5, gain=1.0, place=0):
    """mouth (opening, width, rounding, teeth); pose (x px, y px, roll rad, scale, yaw, pitch); blink, light 0..1 -> uint8 RGB [720, 1280, 3]

    place: px that the speaker sits right of the middle, -160..160; pose is relative to it."""
    s, (dx, dy, roll, scale, yaw, pitch) = portrait.speaker, (float(value) for value in pose)
    canvas = cv2.addWeighted(portrait.lit[0], 1 - light, portrait.lit[1], light, 0)

    where, u, v = part((-1, 1), (MOUTH_V - 0.5, 1.95))  # the jaw: pixels below the mouth slide down, in the cheeks from higher up
    upper = MOUTH_V - 0.5 * ramp(np.abs(u), 0.2, 0.7)
    drop = 0.8 * float(mouth[0]) * 2 * s.mouth * ramp(v, upper, upper + 0.45) * ramp(np.abs(u), 1.0, 0.82)
    canvas[where] = cv2.remap(canvas, u * UNIT + CENTRE[0], (v - drop) * UNIT + CENTRE[1], cv2.INTER_LINEAR)
    draw_eyes(canvas, s, blink, gaze)
    draw_mouth(canvas, portrait, mouth)

    y, x = np.arange(CANVAS[0], dtype=np.float32)[:, None], np.arange(CANVAS[1], dtype=np.float32)  # yaw and pitch shift what is nearer to us further
    canvas = cv2.remap(canvas, x - yaw * UNIT * portrait.depth, y - pitch * UNIT * portrait.depth, cv2.INTER_LINEAR)
    turn = cv2.getRotationMatrix2D(CENTRE, np.degrees(roll), scale * s.size / UNIT)
    left, width = int(640 + place + dx) - 270, 540  # the head's share of the picture
    turn[:, 2] += 640 + place + dx - left - CENTRE[0], 320 + dy - CENTRE[1]
    head = cv2.warpAffine(canvas, turn, (width, 720))
    frame = portrait.room[:, 160 - place:1440 - place].copy()
    alpha, behind = cv2.extractChannel(head, 3) / np.float32(255), frame[:, left:left + width]
    behind[:] = cv2.blendLinear(cv2.cvtColor(head, cv2.COLOR_RGBA2RGB), behind, alpha, 1 - alpha)
    return cv2.convertScaleAbs(frame, dst=frame, alpha=gain)


# ---- demo: clips -------------------------------------------------------------------------------------------------------------------


def draw_clip(path, speaker, seed, seconds=5.0):
    """Writes NAME.mp4, its syllables (NAME.txt) and its true mouth (NAME.csv: frame, and opening, width, rounding as in SOUNDS).

    speaker: a Speaker; equal arguments give equal clips. Raises BadInput if the folder cannot be written."""
    rng, path, portrait = np.random.default_rng(seed), Path(path), portrait_of(speaker)
    syllables, mouth, controls = syllable_timeline(rng, seconds, speaker.articulation * rng.uniform(0.85, 1.1))
    sound, times = synthesize(speaker, controls, rng), np.arange(len(mouth)) / FPS
    place, pose = int(rng.integers(-150, 151)), np.array([0, 0, 0, 1, 0, 0]) + np.stack(
        [size * drift(rng, times, hz) for size, hz in ((25, 0.5), (12, 0.5), (0.05, 0.5), (0.03, 0.3), (0.09, 0.5), (0.05, 0.5))], 1)  # [T, 6]
    blink = np.exp(-((times[:, None] - np.cumsum(rng.uniform(1, 4, int(seconds) + 2))) / 0.07) ** 4).sum(1).clip(0, 1)
    gaze = np.repeat(rng.uniform(-0.03, 0.03, (len(times) // 20 + 1, 2)), 20, 0)
    light, gain = (0.5 + 0.5 * drift(rng, times, 0.3)).clip(0, 1), 1 + 0.06 * drift(rng, times, 0.4) + rng.uniform(-0.08, 0.08)
    with VideoWriter(path, sound) as video:
        for i in range(len(mouth)):
            video.write(render(portrait, mouth[i], pose[i], blink[i], gaze[i], light[i], gain[i], place))
    path.with_suffix(".txt").write_text(" ".join(syllable for syllable, *_ in syllables) + "\n")
    rows = "".join(f"{i},{opening:.5f},{width:.5f},{rounding:.5f}\n" for i, (opening, width, rounding, _) in enumerate(mouth))
    path.with_suffix(".csv").write_text("frame,opening,width,rounding\n" + rows)


def draw_numbered(number, out_dir, clips, speakers, seed, seconds):
    cv2.setNumThreads(1)
    who, take = divmod(number, -(-clips // speakers))  # all takes of one speaker in turn
    path = Path(out_dir) / f"speaker{who:03d}_{take:03d}.mp4"
    draw_clip(path, Speaker.draw([seed, 0, who]), [seed, 1, who, take], seconds)
    return path


def draw_demo(out_dir, clips=20, speakers=4, seed=0, workers=None, seconds=5.0):
    """Draws clips of `speakers` people, speaker by speaker. -> list of paths"""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    draw = partial(draw_numbered, out_dir=out_dir, clips=clips, speakers=speakers, seed=seed, seconds=seconds)
    with multiprocessing.get_context("spawn").Pool(workers or os.cpu_count()) as pool:
        return list(tqdm(pool.imap(draw, range(clips)), total=clips, unit="clip", desc="draw"))
