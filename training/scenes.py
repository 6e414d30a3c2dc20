"""Small scenes: what they are, how they are drawn and how they are said in words.

A scene is one to three flat shapes on a plain or patterned background, 128x128 pixels. Everything is drawn from
templates at positions that are multiples of eight pixels, so that a shape looks the same to the autoencoder (eight
pixels a latent) wherever it stands.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np

SIDE = 128
STEP = 8  # positions are multiples of it
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = {
    "red": (222, 30, 38),
    "green": (30, 150, 60),
    "blue": (35, 70, 215),
    "yellow": (250, 222, 40),
    "orange": (250, 130, 20),
    "purple": (130, 40, 160),
    "black": (20, 20, 22),
    "white": (250, 250, 250),
}
SIZES = {"small": 14, "large": 26}  # radius in pixels
PATTERNS = ("plain", "striped", "checkered", "dotted")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = {
    "in the centre": (64, 64),
    "at the top": (64, 32),
    "at the bottom": (64, 96),
    "on the left": (32, 64),
    "on the right": (96, 64),
    "in the top left corner": (32, 32),
    "in the top right corner": (96, 32),
    "in the bottom left corner": (32, 96),
    "in the bottom right corner": (96, 96),
}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_WORDINGS = {
    "large": ("large", "large", "big"),
    "small": ("small", "small", "little"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    "in the centre": ("in the centre", "in the center", "in the middle"),
}


@dataclass(frozen=True)
class Thing:
    """One object: what it is and where its middle stands, in pixels."""

    shape: str
    colour: str
    size: str
    x: int = 64
    y: int = 64

    @property
    def key(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and its caption. `relation` is between a thing and the next, `place` a lone thing's."""

    things: tuple[Thing, ...]
    background: str
    pattern: str
    caption: str
    relation: str | None = None
    place: str | None = None

    @property
    def held_out(self) -> bool:
        """One in ten combinations of objects is never trained on; a checksum of them in reading order decides."""
        things = self.things[::-1] if self.relation in ("right of", "below") else self.things
        return zlib.crc32("; ".join(thing.key for thing in things).encode()) % 10 == 0


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _worded(rng: np.random.Generator, phrase: str) -> str:
    return _pick(rng, _WORDINGS.get(phrase, (phrase,)))


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _positions(rng, things: list[Thing], relation: str | None, place: str | None) -> list[tuple[int, int]]:
    def shifted(value: int, size: str = "small") -> int:
        """Up to a step off, but never over the border."""
        least = -(-(SIZES[size] + 2) // STEP) * STEP
        return min(max(value + STEP * int(rng.integers(-1, 2)), least), SIDE - least)

    if len(things) == 1:
        size = things[0].size
        if place is not None:
            x, y = PLACES[place]
            return [(shifted(x, size), shifted(y, size))]
        low = -(-(SIZES[size] + 2) // STEP)
        most = SIDE // STEP - low
        return [(STEP * int(rng.integers(low, most + 1)), STEP * int(rng.integers(low, most + 1)))]
    along = [32, 96] if len(things) == 2 else [24, 64, 104]
    if relation in ("right of", "below"):
        along.reverse()
    if len(things) == 2:  # small ones may stand further out; large ones have just enough room
        out = [STEP * int(rng.integers(2)) if thing.size == "small" else 0 for thing in things]
        along = [at + (by if at > SIDE // 2 else -by) for at, by in zip(along, out, strict=True)]
    across = [shifted(64) for _ in things]
    pairs = zip(along, across, strict=True)
    return [(a, b) if relation in ("left of", "right of") else (b, a) for a, b in pairs]


def _caption(rng, scene: Scene, plain_words: bool) -> str:
    said = []
    for thing in scene.things:
        size = "" if not plain_words and rng.random() < 0.12 else _worded(rng, thing.size) + " "
        said.append(_article(f"{size}{thing.colour} {thing.shape}"))
    if len(said) == 2 and not plain_words and rng.random() < 0.08:
        words = " and ".join(said)
    else:
        words = said[0] + "".join(f" {_worded(rng, scene.relation or '')} {other}" for other in said[1:])
    if scene.place:
        words += " " + _worded(rng, scene.place)
    default = scene.background == "white" and scene.pattern == "plain"  # what a caption without a background means
    if default and not plain_words and rng.random() < 0.6:
        return words
    pattern = "" if scene.pattern == "plain" and rng.random() < 0.6 else scene.pattern + " "
    return f"{words} on {_article(f'{pattern}{scene.background}')} background"


def sample(seed: int, index: int, *, count: int | None = None, held_out: bool = False, full: bool = False) -> Scene:
    """The scene number `index` of the stream `seed`; `full` captions name every attribute (as the evaluation needs)."""
    rng = np.random.default_rng((seed, index))
    colours = tuple(COLOURS)
    while True:
        n = count or int(rng.choice(3, p=(0.40, 0.42, 0.18))) + 1
        background = "white" if not full and rng.random() < 0.12 else _pick(rng, colours)
        pattern = "plain" if rng.random() < 0.4 else _pick(rng, PATTERNS[1:])
        free = [c for c in colours if c != background]
        things = [
            Thing(_pick(rng, SHAPES), _pick(rng, free), "small" if n == 3 else _pick(rng, ("small", "large")))
            for _ in range(n)
        ]
        relation = _pick(rng, RELATIONS) if n > 1 else None
        place = _pick(rng, tuple(PLACES)) if n == 1 and (full or rng.random() < 0.6) else None
        spots = _positions(rng, things, relation, place)
        placed = tuple(Thing(t.shape, t.colour, t.size, *spot) for t, spot in zip(things, spots, strict=True))
        scene = Scene(placed, background, pattern, "", relation, place)
        if scene.held_out == held_out:
            return Scene(placed, background, pattern, _caption(rng, scene, full), relation, place)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points of the square [-1, 1]² (v downwards) lie in the shape."""
    r = np.hypot(u, v)
    if shape == "circle":
        return r <= 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.88
    if shape == "triangle":
        return (v <= 0.85) & (abs(u) <= (v + 1) / 1.85)
    if shape == "diamond":
        return abs(u) * 1.2 + abs(v) <= 1
    if shape == "star":
        turn = np.arctan2(u, -v + 1e-12)
        fold = abs((turn + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)  # angle to the nearest tip
        inner = 0.42
        edge = (
            inner
            * np.sin(np.pi / 5)
            / (np.sin(fold) * (1 - inner * np.cos(np.pi / 5)) + np.cos(fold) * inner * np.sin(np.pi / 5))
        )
        return r <= edge
    if shape == "cross":
        return ((abs(u) <= 0.32) & (abs(v) <= 1)) | ((abs(v) <= 0.32) & (abs(u) <= 1))
    if shape == "ring":
        return (r <= 1) & (r >= 0.55)
    x, y = u * 1.15, -v * 1.12 + 0.12  # heart
    return (x * x + y * y - 1) ** 3 - x * x * y**3 <= 0


@cache
def _template(shape: str, size: str) -> np.ndarray:
    """Coverage of each pixel (2h, 2h), 0..1, by 8x8 supersampling; the middle is the corner between four pixels."""
    radius, half, fine = SIZES[size], SIZES[size] + 2, 8
    axis = ((np.arange(2 * half * fine) + 0.5) / fine - half) / radius
    mask = _inside(shape, axis[None, :], axis[:, None]).astype(np.float32)
    return mask.reshape(2 * half, fine, 2 * half, fine).mean((1, 3))[..., None]


def tint(colour: str) -> tuple[int, int, int]:
    """The second colour of a pattern: lighter than the named one (darker for white)."""
    if colour == "white":
        return (205, 205, 205)
    share = 0.28 if colour == "black" else 0.45
    return tuple(round(c + (255 - c) * share) for c in COLOURS[colour])  # type: ignore[return-value]


@cache
def _ground(colour: str, pattern: str) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    if pattern == "striped":
        share = (y % 16 >= 8).astype(np.float32)
    elif pattern == "checkered":
        share = ((x // 16 + y // 16) % 2).astype(np.float32)
    elif pattern == "dotted":
        share = np.clip(4.5 - np.hypot(x % 16 - 8, y % 16 - 8), 0, 1)
    else:
        share = np.zeros((SIDE, SIDE))
    first, second = (np.array(c, np.float32) for c in (COLOURS[colour], tint(colour)))
    return (first + share[..., None] * (second - first)).astype(np.float32)


def draw(scene: Scene) -> np.ndarray:
    """The picture, (128, 128, 3) uint8."""
    picture = _ground(scene.background, scene.pattern).copy()
    for thing in scene.things:
        mask = _template(thing.shape, thing.size)
        half = len(mask) // 2
        window = picture[thing.y - half : thing.y + half, thing.x - half : thing.x + half]
        window += mask * (np.array(COLOURS[thing.colour], np.float32) - window)
    return np.round(picture).astype(np.uint8)


def words() -> list[str]:
    """Every word that a caption may hold."""
    found = {"a", "an", "and", "on", "background", *SHAPES, *COLOURS, *PATTERNS, "the", "of", "to"}
    for phrases in (RELATIONS, PLACES, SIZES, *_WORDINGS.values()):
        for phrase in phrases:
            found.update(phrase.split())
    return sorted(found)
