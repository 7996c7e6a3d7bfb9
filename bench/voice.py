"""What drawn speakers say, and how it sounds: syllables, lips and voice from one timeline.

    what    | SOUNDS, syllable_timeline
    sound   | synthesize, voiced, noise

Used by drawn.py, which draws the lips that belong to it.
"""
import cv2
import numpy as np

from common import FPS, SAMPLE_RATE

# One consonant per lip shape (b and p would look like m): the lips tell all syllables apart.
# Mouth: opening and width as fractions of the closed mouth's width; rounding 0..1; teeth -1 (upper
# ones on the lower lip) .. 1 (clenched). Sound: formants in Hz; loudness of voice, hiss and breath.
CONTROL_HZ = 1000  # the timeline's own rate
STRESSED = [0, 7, 8, 9]  # columns of SOUNDS that grow with the stress: the opening and the loudness
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
    """-> [(syllable, start s, end s)], mouth float64 [T, 4] per frame, controls float64
    [1000 * seconds, 10]; their columns are those of SOUNDS"""
    ticks = round(seconds * CONTROL_HZ)
    controls = np.tile(SOUNDS[" "], (ticks, 1))
    syllables, now = [], rng.uniform(0.15, 0.5)
    while now + 0.4 < seconds:
        consonant = rng.choice(list("mfs"))
        vowel = rng.choice(list("aiou"))
        middle = now + rng.uniform(0.09, 0.11)
        end = now + rng.uniform(0.25, 0.31)
        stress = rng.uniform(0.8, 1.15)
        for sound, first, last in (consonant, now, middle), (vowel, middle, end):
            first, last = round(first * CONTROL_HZ), round(last * CONTROL_HZ)
            part = controls[first:last]
            part[:] = SOUNDS[sound]
            part[:, STRESSED] *= stress
        syllables.append((consonant + vowel, now, end))
        now = end + rng.choice([0, 0.5], p=[0.88, 0.12])
    for part, sigma_ms in (controls[:, :7], 28), (controls[:, 7:], 10):  # coarticulation
        part[:] = cv2.GaussianBlur(
            part, (1, 0), 0.1, sigmaY=sigma_ms, borderType=cv2.BORDER_REPLICATE)
    opening = controls[:, 0].clip(min=0)
    controls[:, 0] = articulation * opening
    step = CONTROL_HZ // FPS
    mouth = controls[step // 2::step, :4]  # a frame shows the middle of its time
    return syllables, mouth, controls


def synthesize(speaker, controls, rng):
    """Formant synthesis: harmonics of the pitch under three resonances, noise for s and f.
    controls [1000 * seconds, 10] -> float32 [N] at 16 kHz"""
    count = len(controls) * SAMPLE_RATE // CONTROL_HZ
    times = np.arange(count) / SAMPLE_RATE
    middles = np.arange(len(controls)) + 0.5
    ticks = middles / CONTROL_HZ
    f1, f2, f3, voice, hiss, breath = (np.interp(times, ticks, row) for row in controls.T[4:])
    resonances = (f1, 70, 1), (f2, 90, 0.6), (f3, 140, 0.3)  # Hz, half bandwidth in Hz, level
    sound = 0.22 * voice * voiced(speaker, resonances, times, rng)
    sound += 0.10 * hiss * noise(rng, count, 4200)
    sound += 0.04 * breath * noise(rng, count, 900)
    sound = 0.7 * np.tanh(sound)
    sound += 1e-4 * rng.standard_normal(count)
    return sound.astype(np.float32)


def voiced(speaker, resonances, times, rng):
    """A sum of sines at multiples of the pitch, each as loud as the throat lets it."""
    melody = 0.15 * drift(rng, times, 1.5)
    tremor = 0.01 * drift(rng, times, 12)
    pitch = speaker.pitch * (1 + melody + tremor)
    turns = np.cumsum(pitch) / SAMPLE_RATE
    phase = 2 * np.pi * turns
    tone = np.zeros(len(times))
    for k in range(1, int(4000 / speaker.pitch)):
        gain = np.full(len(times), 0.01)
        for formant, half_bandwidth, level in resonances:
            resonance = formant * speaker.tract
            away = (k * pitch - resonance) / half_bandwidth
            gain += level / (1 + away ** 2)
        sine = np.sin(k * phase)
        tone += k ** -0.4 * gain * sine
    return tone


def noise(rng, count, low_hz):
    """Noise from low_hz up to 7300 Hz."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    hz = np.fft.rfftfreq(count, 1 / SAMPLE_RATE)
    rise, fall = (hz - low_hz) / 800, (7300 - hz) / 800
    spectrum *= np.clip(rise + 0.5, 0, 1)
    spectrum *= np.clip(fall + 0.5, 0, 1)
    return np.fft.irfft(spectrum, count)


def drift(rng, times, hz):
    """A smooth random curve within -1..1 that swings at most `hz` times a second."""
    rates = rng.uniform(2 * hz, 6 * hz, 5)  # rad a second
    phases = rng.uniform(0, 6.28, 5)  # rad
    waves = np.sin(np.outer(times, rates) + phases)
    return np.tanh(waves.sum(1) / 2)
