"""Drawn speakers whose mouth, text and sound are known exactly: demo corpus, tests, figures.

    who       | Speaker; what they say and how it sounds is voice.py
    the head  | Portrait: what does not move, drawn once per speaker
    the frame | render: the jaw, draw_eyes, draw_mouth, the head's turn, the room behind
    clips     | draw_clip, draw_demo

`python data.py --demo DIR` draws a corpus, `python infer.py --demo` two speakers, and dubs one with
the other's sound.
"""
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import media
from bench import voice
from common import FPS, WorkerPool

# ---------------------------------------------------------------- who speaks
# Lengths are in half face widths ("units"): u to the right, v down, (0, 0) on the nose bridge.
TRAITS = {  # and their ranges; the first seven: place in the palette of that name
    "skin": (0, 1), "hair": (0, 1), "iris": (0, 1), "lips": (0, 1), "teeth": (0, 1),
    "cloth": (0, 1), "wall": (0, 1),
    "light": (-0.9, 0.9),         # from the left .. from the right
    "texture": (0, 1e9),          # seed of skin grain and hair strands
    "size": (118, 145),           # half face width on the screen, px
    "taper": (0.06, 0.22),        # square jaw .. pointed chin
    "chin_v": (1.2, 1.38), "eye_gap": (0.40, 0.46), "nose": (0.12, 0.21), "nose_v": (0.28, 0.40),
    "beard": (-2, 1),             # below 0: none
    "volume": (-0.03, 0.32),      # how far the hair stands off the head; below 0: bald
    "length_v": (-1.5, 1.9), "curl": (0, 1),
    "mouth": (0.31, 0.40), "lip": (0.09, 0.14),  # half the closed mouth's width; lip's thickness
    "tooth": (0.075, 0.12), "tooth_v": (0.0, 0.06),  # its width; the upper row's biting edge
    "articulation": (0.9, 1.2),  # how far this person opens the mouth
    "pitch": (90, 230), "tract": (0.9, 1.15),    # of the voice, Hz; factor of the formants
}


class Speaker(namedtuple("Speaker", TRAITS)):
    """One drawn person. Speaker.draw(seed) takes every trait uniformly from its range."""

    @classmethod
    def draw(cls, seed):
        low, high = zip(*TRAITS.values())
        traits = np.random.default_rng(seed).uniform(low, high)
        return cls(*traits.tolist())


# ---------------------------------------------------------------- brushes
PALETTES = {
    "skin": [(84, 54, 42), (141, 94, 68), (198, 146, 112), (226, 178, 148), (243, 208, 186)],
    "hair": [(22, 18, 18), (92, 58, 36), (150, 74, 36), (196, 152, 88), (165, 162, 160)],
    "iris": [(52, 32, 20), (96, 66, 36), (104, 112, 62), (86, 122, 148), (110, 120, 126)],
    "wall": [(58, 66, 82), (188, 178, 160), (92, 112, 92), (142, 96, 84), (206, 210, 214)],
    "cloth": [(28, 34, 58), (150, 32, 40), (226, 222, 214), (40, 92, 74), (208, 150, 40)],
    "lips": [(190, 110, 104), (196, 50, 62)],
    "teeth": [(220, 215, 208), (216, 196, 150)],
}


def palette(name, place):
    """place 0..1 from the first to the last colour -> float32 RGB [3]"""
    stops = np.linspace(0, 1, len(PALETTES[name]))
    colour = [np.interp(place, stops, channel) for channel in zip(*PALETTES[name])]
    return np.array(colour, np.float32)


def paint(canvas, colour, alpha, light=1.0):
    """Lays a colour [3] or [H, W, 3] under light [H, W] over the canvas, in place. alpha 0..1"""
    alpha, light = (np.asarray(field, np.float32)[..., None] for field in (alpha, light))
    lit = light * np.asarray(colour, np.float32)
    canvas += alpha * (lit - canvas)


def below(x, high, soft):
    """1 where x < high, else 0, with an edge `soft` wide: no supersampling needed."""
    inside = (high - x) / soft
    return np.clip(inside + 0.5, 0, 1)


def between(x, low, high, soft):
    return below(low, x, soft) * below(x, high, soft)


def bell(x, wide):
    return np.exp(-(x / wide) ** 2)


def ramp(x, low, high):
    """0 at low, 1 at high and beyond, smooth in between."""
    way = (x - low) / (high - low)
    t = np.clip(way, 0, 1)
    return t * t * (3 - 2 * t)


def shade(depth, side):
    """Lambert's law for light from above and `side` (-1 left .. 1 right), some shine. -> [H, W]"""
    dv, du = np.gradient(depth, np.float32(1 / UNIT))
    steepness = np.hypot(1, np.hypot(du, dv))
    facing = 0.9 + 0.45 * dv - side * du
    facing = np.maximum(facing, 0)
    facing /= np.hypot(1, side) * steepness
    shine = 0.1 * facing ** 24
    return 0.42 + 0.68 * facing + shine


def to_bytes(picture):
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def spot(portrait, w, v, wide, tall):
    """A soft spot around (w, v), on both halves of the face. -> 0..1"""
    across, along = bell(portrait.w - w, wide), bell(portrait.v - v, tall)
    return across * along


# ---------------------------------------------------------------- the head
CANVAS = 630, 500                      # px, height and width of the head's canvas
UNIT, U0, V0 = 150, 250, 310           # px of one unit; x and y px of (u, v) = (0, 0)
EYES_V, EYES = -0.12, np.s_[254:316, 142:358]    # where they lie; the part of the canvas, px
MOUTH_V, MOUTH = 0.74, np.s_[385:505, 172:328]


class Portrait:
    """What does not move of a speaker: the head without eyes and mouth, and the wall behind.

    head: uint8 RGBA [630, 500, 4]; room: uint8 RGB [720, 1280, 3]; all others float32 [630, 500]"""

    def __init__(self, speaker):
        self.speaker = s = speaker
        rng = np.random.default_rng(int(s.texture))
        self.y, self.x = np.mgrid[:CANVAS[0], :CANVAS[1]].astype(np.float32)
        self.u, self.v = (self.x - U0) / UNIT, (self.y - V0) / UNIT
        self.w = np.abs(self.u)  # both halves of the face are alike
        low = np.clip(self.v + 0.1, 0, 1.7)
        narrowing = s.taper * low ** 2
        half_height = np.where(self.v < 0, np.float32(1.42), np.float32(s.chin_v))
        sideways = self.w / (1 - narrowing)
        upright = np.abs(self.v) / half_height
        self.reach = sideways ** 2.3 + upright ** 2.3  # 0 amid the face, 1 on its outline
        self.grain, strands = rng.standard_normal((2, *CANVAS), np.float32)
        strands = cv2.GaussianBlur(strands, (0, 0), sigmaX=1, sigmaY=30 - 27 * s.curl)
        self.strands = strands / strands.std()  # of hair
        hinge_v = MOUTH_V - 0.5 * ramp(self.w, 0.2, 0.7)  # in the cheeks from higher up
        self.jaw = ramp(self.v - hinge_v, 0, 0.45)  # 1: goes all its way
        self.jaw *= ramp(self.w, 1, 0.82)
        self.depth = face_depth(self)
        self.head = draw_head(self)
        self.room = draw_room(s)


portrait_of = lru_cache(maxsize=4)(Portrait)  # a process draws several clips of one speaker in turn


def face_depth(p):
    """How far the head stands out towards us. -> units [630, 500]"""
    s = p.speaker
    depth = 1 - np.minimum(p.reach, 1.2)
    depth += 0.12 * spot(p, 0, s.nose_v - 0.25, 0.1, 0.26)              # bridge of the nose
    depth += 0.16 * spot(p, 0, s.nose_v - 0.02, 0.75 * s.nose, 0.13)    # tip of the nose
    depth -= 0.13 * spot(p, 0.43, EYES_V, 0.2, 0.14)                    # eye sockets
    depth += 0.08 * spot(p, 0, MOUTH_V, 0.35, 0.2)
    return cv2.GaussianBlur(depth + 0.004 * p.grain, (0, 0), 2)


def draw_head(p):
    """The head without eyes and mouth. -> uint8 RGBA [630, 500, 4]"""
    s, hair = p.speaker, hair_shape(p)
    skin_colour, hair_colour = palette("skin", s.skin), palette("hair", s.hair)
    head = np.multiply.outer(1 + 0.01 * p.grain, skin_colour)
    blush, shadow = skin_colour * (1.08, 0.72, 0.68), 0.5 * skin_colour
    paint(head, blush, 0.4 * spot(p, 0.6, 0.35, 0.25, 0.2))                   # cheeks
    paint(head, shadow, 0.4 * spot(p, s.eye_gap, EYES_V, 0.26, 0.13))         # eye sockets
    paint(head, shadow, 0.5 * spot(p, 0, s.nose_v + 0.13, s.nose, 0.035))     # under the nose
    paint(head, 0, 0.7 * spot(p, 0.06, s.nose_v + 0.1, 0.3 * s.nose, 0.03))   # nostrils
    beard = ramp(p.reach, 0.35, 0.6) * ramp(p.v, 0.2, 0.6)
    beard *= below(-p.grain, 0.5, 2)
    paint(head, hair_colour, max(s.beard, 0) * beard)
    paint(head, hair_colour, spot(p, s.eye_gap, EYES_V - 0.28, 0.25, 0.05))   # brows
    paint(head, 0, 0.35 * cv2.GaussianBlur(hair, (0, 0), 9))                  # the hair's shadow
    paint(head, head, 1, shade(p.depth, s.light))
    hair_light = 0.7 + 0.15 * p.strands - 0.3 * s.light * p.u
    paint(head, hair_colour, hair, hair_light)
    face = below(p.reach, 1, 0.03)
    from_ear = np.hypot(p.w - 0.99, 0.5 * p.v - 0.05)
    ears = below(from_ear, 0.13, 0.013)
    alpha = np.maximum.reduce([face, ears, hair])
    return to_bytes(np.dstack([head, 255 * alpha]))


def hair_shape(p):
    """A larger, ragged skull without the opening for the face. -> 0..1 [630, 500]"""
    s, ragged_v = p.speaker, p.v + 0.02 * p.strands
    high = np.minimum(ragged_v, 0) / (1.46 + s.volume)
    wide = p.w / (1.03 + s.volume)
    skull = below(np.hypot(wide, high), 1, 0.03)
    skull *= below(ragged_v, max(s.length_v, -0.1), 0.08)
    face = below(-ragged_v, 0.8, 0.04) * below(p.w, 0.92, 0.05)
    face *= np.maximum(ramp(p.reach, 1, 0.9), ramp(p.v, 0.3, 0.6))
    return skull * (1 - face) * (s.volume > 0)


def draw_room(s):
    """Wall, neck and clothes. -> uint8 RGB [720, 1280, 3]"""
    y, x = np.mgrid[:720, :1280].astype(np.float32)
    u, v = (x - 640) / s.size, (y - 320) / s.size
    side_light = 0.75 - 0.15 * s.light * u
    room = np.zeros((720, 1280, 3), np.float32)
    paint(room, palette("wall", s.wall), 1, side_light - 0.05 * v)
    neck = below(np.abs(u), 0.58, 0.02) * below(0.5, v, 0.1)
    paint(room, palette("skin", s.skin), neck, 0.5 * bell(u, 1))
    collar_v = 1.55 + 0.2 * u ** 2
    collar_v += 0.3 * bell(u, 0.5)
    paint(room, palette("cloth", s.cloth), below(collar_v, v, 0.02), side_light)
    return to_bytes(room)


# ---------------------------------------------------------------- the frame
def draw_eyes(head, portrait, blink):
    s = portrait.speaker
    eyes = head[EYES][..., :3].astype(np.float32)
    u, y = portrait.u[EYES], portrait.v[EYES] - EYES_V
    x = u - s.eye_gap * np.sign(u)  # from the middle of the nearer eye
    round_eye = 1 - (x / 0.2) ** 2
    almond = 0.1 * np.maximum(round_eye, 0)
    lower_lid = 0.5 * almond
    upper_lid = (1.5 * blink - 1) * almond
    within = below(np.abs(x), 0.2, 0.02)
    ball = within * between(y, upper_lid, lower_lid, 0.012)
    from_pupil = np.hypot(x, y + 0.02)
    from_glint = np.hypot(x + 0.03, y + 0.055)
    lid_shadow = 0.4 * bell(y - upper_lid, 0.04)
    iris = below(from_pupil, 0.09, 0.014)
    paint(eyes, (214, 207, 201), ball, 1 - lid_shadow)
    paint(eyes, palette("iris", s.iris), ball * iris)
    paint(eyes, 5, ball * below(from_pupil, 0.042, 0.014))
    paint(eyes, 255, ball * below(from_glint, 0.017, 0.012))
    lashes = bell(y - upper_lid, 0.016)
    paint(eyes, 20, within * lashes)
    head[EYES][..., :3] = to_bytes(eyes)


class Lips:
    """Four curves over x [W], units below MOUTH_V: outer and inner edge of upper and lower lip."""

    def __init__(self, s, mouth, x):
        opening, width, _, teeth = mouth
        self.gap = 2 * s.mouth * opening
        self.t = np.clip(x / (s.mouth * width), -1, 1)  # from corner to corner
        self.within = below(np.abs(x), s.mouth * width, 0.013)
        hump = 1 - self.t ** 2
        arch = self.gap * hump ** 0.75
        self.inner_top, self.inner_low = -0.2 * arch, 0.8 * arch
        thick = s.lip * (1.3 - 0.3 * width)
        tucked = 1 + 0.65 * min(teeth, 0)  # under the upper teeth
        self.outer_top = self.inner_top - 0.85 * thick * hump
        self.outer_low = self.inner_low + tucked * thick * np.sqrt(hump)

    def area(self, y, top, low):
        """1 between two of the curves, else 0. -> [H, W]"""
        return self.within * between(y, top, low, 0.015)


def draw_mouth(head, portrait, mouth):
    """Lips, teeth, tongue and the dark behind them: each is what lies between two curves."""
    s = portrait.speaker
    x, y = portrait.u[MOUTH][0], portrait.v[MOUTH] - MOUTH_V  # [W], [H, W]
    picture = head[MOUTH][..., :3].astype(np.float32)
    lips = Lips(s, mouth, x)
    draw_lips(picture, s, lips, y)
    inside = draw_inside(s, mouth, lips, x, y)
    paint(picture, inside, lips.area(y, lips.inner_top, lips.inner_low))
    head[MOUTH][..., :3] = to_bytes(picture)


def draw_lips(picture, s, lips, y):
    skin, paint_red = palette("skin", s.skin), palette("lips", s.lips)
    red = 0.4 * skin + 0.6 * paint_red
    light = 1 + 0.25 * s.light * lips.t
    thick = lips.outer_low - lips.inner_low + 1e-3
    across = (y - lips.inner_low) / thick  # 0..1, the lower lip
    shine = 0.4 * bell(across - 0.4, 0.3)
    paint(picture, red, lips.area(y, lips.outer_top, lips.inner_top), 0.65 * light)
    paint(picture, red, lips.area(y, lips.inner_low, lips.outer_low), (0.7 + shine) * light)
    paint(picture, 30, lips.area(y, lips.inner_top - 0.008, lips.inner_low + 0.008))  # their line


def draw_inside(s, mouth, lips, x, y):
    """The dark of the mouth, the tongue and both rows of teeth. -> float32 RGB [H, W, 3]"""
    clenched = max(mouth[3], 0)
    inside = np.full((*y.shape, 3), (18, 6, 6), np.float32)
    hump = 1 - lips.t ** 2
    tongue_top = lips.inner_low - 0.25 * lips.gap * hump
    tongue = below(tongue_top, y, 0.03)
    tongue *= 1 - 0.7 * clenched
    paint(inside, (90, 32, 32), tongue, 1 - 0.25 * bell(x, 0.02))
    apart = (0.8 * lips.gap - 0.01) * (1 - clenched)
    lower_edge = s.tooth_v + apart
    draw_teeth(inside, s, x, s.tooth_v - y, 1)       # the upper row stays with the skull,
    draw_teeth(inside, s, x, y - lower_edge, 0.85)   # the lower goes with the jaw
    lip_shadow = 0.45 * bell(y - lips.inner_top, 0.03)
    return inside * (1 - lip_shadow)[..., None]


def draw_teeth(inside, s, x, up, size):
    """A row of teeth; up: how far a pixel lies from the biting edge towards the gum, units."""
    number = np.abs(x) / (s.tooth * size)
    across = 2 * (number % 1) - 1  # -1..1 within each tooth
    bend, scallop = 0.1 * x ** 2, 0.016 * across ** 4
    teeth = below(scallop + bend, up, 0.012)
    gaps = 0.6 * across ** 8
    paint(inside, palette("teeth", s.teeth), teeth, size * (1 - gaps))


def render(portrait, mouth, pose=(0, 0, 0, 1, 0, 0), blink=0.0):
    """Draws one frame. -> uint8 RGB [720, 1280, 3]

    mouth: opening, width, rounding (as the width), teeth as in SOUNDS; blink: 0 open .. 1 shut
    pose: x px, y px, roll rad, scale, yaw rad, pitch rad"""
    s = portrait.speaker
    x_px, y_px, roll, scale, yaw, pitch = (float(value) for value in pose)
    drop = 1.6 * UNIT * s.mouth * float(mouth[0])  # px: the lower lip's way
    head = cv2.remap(portrait.head, portrait.x, portrait.y - drop * portrait.jaw, cv2.INTER_LINEAR)
    draw_eyes(head, portrait, blink)
    draw_mouth(head, portrait, mouth)
    near = UNIT * portrait.depth  # px: what is nearer to us moves further
    x, y = portrait.x - yaw * near, portrait.y - pitch * near
    head = cv2.remap(head, x, y, cv2.INTER_LINEAR)
    left = 370 + int(x_px)  # the head's share of the picture: 540 px from here
    zoom = scale * s.size / UNIT
    affine = cv2.getRotationMatrix2D((U0, V0), np.degrees(roll), zoom)
    middle_x, middle_y = 640 + x_px - left, 320 + y_px  # of the nose bridge
    affine[:, 2] += middle_x - U0, middle_y - V0
    head = cv2.warpAffine(head, affine, (540, 720))
    alpha = cv2.extractChannel(head, 3) / np.float32(255)
    colours = cv2.cvtColor(head, cv2.COLOR_RGBA2RGB)
    frame = portrait.room.copy()
    behind = frame[:, left:left + 540]
    behind[:] = cv2.blendLinear(colours, behind, alpha, 1 - alpha)
    return frame


# ---------------------------------------------------------------- clips
SWING = (25, 0.5), (12, 0.5), (0.05, 0.5), (0.03, 0.3), (0.18, 0.4), (0.06, 0.4)  # of a pose; Hz


def draw_clip(path, speaker, seed, seconds=5.0):
    """Writes NAME.mp4, its syllables (NAME.txt) and its true mouth as in SOUNDS (NAME.csv).

    Equal arguments give equal clips. Raises BadInput if the folder cannot be written."""
    path, rng = Path(path), np.random.default_rng(seed)
    effort = speaker.articulation * rng.uniform(0.9, 1.1)
    syllables, mouth, controls = voice.syllable_timeline(rng, seconds, effort)
    sound = voice.synthesize(speaker, controls, rng)
    times = np.arange(len(mouth)) / FPS
    swings = [size * voice.drift(rng, times, hz) for size, hz in SWING]
    pose = np.stack(swings, 1) + (0, 0, 0, 1, 0, 0)  # [T, 6]
    pauses = rng.uniform(1, 4, len(mouth) // FPS + 2)
    shut = np.cumsum(pauses)  # s: a blink each 1 to 4 s
    blink = bell(np.subtract.outer(times, shut), 0.06).max(1)
    portrait = portrait_of(speaker)
    with media.VideoWriter(path, sound) as video:
        for shape, *moment in zip(mouth, pose, blink):
            video.write(render(portrait, shape, *moment))
    words = [syllable for syllable, _, _ in syllables]
    text = " ".join(words)
    path.with_suffix(".txt").write_text(text + "\n")
    rows = np.column_stack([range(len(mouth)), mouth[:, :3]])
    np.savetxt(path.with_suffix(".csv"), rows, "%d,%.5f,%.5f,%.5f", comments="",
               header="frame,opening,width,rounding")


def draw_demo(out_dir, clips=20, speakers=4, seed=0):
    """Draws clips of `speakers` people, speaker by speaker, on all cores. -> list of paths"""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    takes = -(-clips // speakers)  # clips of each speaker, rounded up
    numbers = [divmod(i, takes) for i in range(clips)]
    paths = [Path(out_dir, f"speaker{who:03d}_{take:03d}.mp4") for who, take in numbers]
    people = [Speaker.draw([seed, 0, who]) for who, _ in numbers]
    seeds = [[seed, 1, who, take] for who, take in numbers]
    with WorkerPool(None) as pool:
        drawn = pool.map(draw_clip, paths, people, seeds)
        list(tqdm(drawn, total=clips, unit="clip", desc="draw"))
    return paths
