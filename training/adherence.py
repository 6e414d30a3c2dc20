"""Does a picture show what its caption says? Classic image analysis; knows nothing of how the pictures are drawn.

    python training/adherence.py FOLDER --steps 20 --count 200            # this library
    python training/adherence.py FOLDER --steps 20 --library diffusers

The checker reads the caption itself and looks at the picture alone: ground by the border, things by connected regions,
colours by the nearest name, shapes by holes, fill, convexity and symmetry, sizes by extent, relations by middles.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

PALETTE = {
    "red": (220, 32, 40),
    "green": (32, 150, 60),
    "blue": (36, 70, 214),
    "yellow": (250, 220, 42),
    "orange": (250, 130, 22),
    "purple": (130, 42, 160),
    "black": (22, 22, 22),
    "white": (250, 250, 250),
}
_SHAPES = "circle|square|triangle|diamond|star|cross|ring|heart"
_THING = re.compile(rf"(?:an?) (?:(?P<size>\w+) )?(?P<colour>{'|'.join(PALETTE)}) (?P<shape>{_SHAPES})\b")
_GROUND = re.compile(
    rf" on an? (?:(?P<pattern>plain|striped|checkered|dotted) )?(?P<colour>{'|'.join(PALETTE)}) background$"
)
_SIZES = {"large": "large", "big": "large", "small": "small", "little": "small"}
_RELATIONS = {"left": "left", "right": "right", "above": "above", "over": "above", "below": "below", "under": "below"}


@dataclass(frozen=True)
class Seen:
    """One thing in a picture; x and y of its bounding box's middle, in shares of the side (y downwards)."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class View:
    things: tuple[Seen, ...]
    background: str
    pattern: str


# --- looking ---------------------------------------------------------------------------------------------------------


def _nearest(colour: np.ndarray) -> str:
    names, values = list(PALETTE), np.array(list(PALETTE.values()), float)
    distance = np.linalg.norm(values - colour, axis=1)
    return names[int(distance.argmin())] if distance.min() < 60 else "unclear"


def _second(name: str) -> np.ndarray:
    """The other colour of a patterned ground: a lighter tone (of white: a light grey; of black: a dark one)."""
    base = np.array(PALETTE[name], float)
    return np.full(3, 205.0) if name == "white" else base + (255 - base) * (0.28 if name == "black" else 0.45)


def _ground(picture: np.ndarray) -> str:
    """The colour name that explains most of the picture's border, in its own or its second tone."""
    edge = np.concatenate(
        [picture[:3], picture[-3:], picture[:, :3].swapaxes(0, 1), picture[:, -3:].swapaxes(0, 1)]
    ).reshape(-1, 3)
    share = {}
    for name, value in PALETTE.items():
        near = np.minimum(np.linalg.norm(edge - value, axis=1), np.linalg.norm(edge - _second(name), axis=1)) < 45
        own = np.linalg.norm(edge - value, axis=1) < 45
        share[name] = near.mean() if own.mean() > 0.25 else 0.0
    best = max(share, key=lambda name: share[name])
    return best if share[best] > 0.7 else "unclear"


def _pattern(second: np.ndarray, ground: np.ndarray) -> str:
    """The pattern of the second tone (H, W) bool, among the pixels that are ground (H, W) bool."""
    share = second[ground].mean()
    if share < 0.03:
        return "plain"
    rows = (second & ground).sum(1) / np.maximum(ground.sum(1), 1)
    columns = (second & ground).sum(0) / np.maximum(ground.sum(0), 1)
    if 0.35 < share < 0.65 and rows.std() > 0.35 and columns.std() < 0.2:
        return "striped"
    if 0.35 < share < 0.65 and rows.std() < 0.2 and columns.std() < 0.2:
        return "checkered"
    if 0.1 < share < 0.35:
        spots, count = ndimage.label(second)
        areas = ndimage.sum_labels(second, spots, range(1, count + 1))
        if count >= 20 and np.median(areas) < 100:
            return "dotted"
    return "unclear"


def _solidity(mask: np.ndarray) -> float:
    y, x = np.nonzero(mask)
    corners = np.concatenate([np.stack([x + a, y + b], 1) for a in (0, 1) for b in (0, 1)])
    return float(mask.sum() / ConvexHull(corners).volume)


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def _shape(mask: np.ndarray) -> str:
    """The shape of a region given by its mask, cut to its bounding box; "unclear" when it is none of them clearly."""
    full = ndimage.binary_fill_holes(mask)
    assert full is not None
    hole = 1 - mask.sum() / full.sum()
    fill, solid = full.mean(), _solidity(full)
    across, upside = _agreement(full, full[:, ::-1]), _agreement(full, full[::-1])
    low = ndimage.center_of_mass(full)[0] / len(full)  # where the mass lies: over 0.5 is low
    if across < 0.78:
        return "unclear"
    if hole > 0.15:
        return "ring" if 0.7 < fill < 0.86 and solid > 0.93 and hole < 0.5 else "unclear"
    if hole > 0.03:
        return "unclear"
    if fill > 0.88:
        return "square"
    if solid < 0.84:
        if upside > 0.84 and 0.42 < fill < 0.68:
            return "cross"
        return "star" if upside < 0.7 and 0.25 < fill < 0.6 else "unclear"
    if upside > 0.84:
        if 0.72 < fill < 0.86 and solid > 0.93:
            return "circle"
        return "diamond" if 0.42 < fill < 0.62 else "unclear"
    if low > 0.55 and 0.42 < fill < 0.64:
        return "triangle"
    return "heart" if low < 0.48 and 0.55 < fill < 0.82 else "unclear"


def look(picture: np.ndarray) -> View:
    """What a picture (H, W, 3) uint8, 128 pixels wide, shows."""
    picture = picture.astype(float)
    name = _ground(picture)
    if name == "unclear":
        return View((), name, "unclear")
    first, second = (np.linalg.norm(picture - tone, axis=2) for tone in (np.array(PALETTE[name], float), _second(name)))
    tones = np.array(PALETTE[name], float), _second(name)
    along = np.clip(((picture - tones[0]) @ (tones[1] - tones[0])) / ((tones[1] - tones[0]) ** 2).sum(), 0, 1)
    off = np.linalg.norm(
        picture - (tones[0] + along[..., None] * (tones[1] - tones[0])), axis=2
    )  # from the line between the tones
    if name in ("white", "black"):  # greys are on that line too: beyond the second tone is not ground
        off = np.maximum(off, np.where(np.minimum(first, second) > 70, 70, 0))
    things = ndimage.binary_opening(off > 50)
    regions, count = ndimage.label(things, np.ones((3, 3)))
    pattern = _pattern(second < first, ~ndimage.binary_dilation(things, iterations=3))
    seen = []
    for index in range(1, count + 1):
        mask = regions == index
        if mask.sum() < 40:
            continue
        rows, columns = ndimage.find_objects(mask.astype(int))[0]
        inner = ndimage.binary_erosion(mask, iterations=2)
        colour = _nearest(np.median(picture[inner if inner.any() else mask], axis=0))
        extent = max(rows.stop - rows.start, columns.stop - columns.start) / picture.shape[1]
        size = "small" if 0.15 < extent < 0.27 else "large" if 0.32 < extent < 0.48 else "unclear"
        x, y = (columns.start + columns.stop) / 2 / picture.shape[1], (rows.start + rows.stop) / 2 / picture.shape[0]
        seen.append(Seen(_shape(mask[rows, columns]), colour, size, x, y))
    return View(tuple(seen), name, pattern)


# --- judging ---------------------------------------------------------------------------------------------------------


def _thirds(words: str) -> tuple[str, str] | None:
    """Where a caption puts a lone thing: (column, row) of a 3x3 grid, or None where it says nothing."""
    if not (match := re.search(r" (?:in|at|on) the (.+?)(?: on an? |$)", words)):
        return None
    place = match[1]
    return (
        "left" if "left" in place else "right" if "right" in place else "centre",
        "top" if "top" in place else "bottom" if "bottom" in place else "centre",
    )


def _third(value: float, low: str, high: str) -> str:
    return low if value < 0.375 else high if value > 0.625 else "centre"


def _holds(relation: str, a: Seen, b: Seen) -> bool:
    dx, dy = b.x - a.x, b.y - a.y
    ahead, aside = {"left": (dx, dy), "right": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return ahead > 0.15 and ahead > abs(aside)


def _faults(said: list[re.Match[str]], seen: tuple[Seen, ...], relation: str | None) -> list[str]:
    """What is wrong when the things said are taken to be the things seen, in this order."""
    wrong = []
    for name in ("shape", "colour", "size"):
        claims = [_SIZES.get(m["size"]) if name == "size" else m[name] for m in said]
        wrong += [name for c, s in zip(claims, seen, strict=True) if c is not None and c != getattr(s, name)]
    if relation and not all(_holds(relation, a, b) for a, b in itertools.pairwise(seen)):
        wrong.append("place")
    return wrong


def judge(caption: str, picture: np.ndarray) -> list[str]:
    """What is wrong: names among background, pattern, count, shape, colour, size, place; empty when all is right."""
    view, said = look(picture), list(_THING.finditer(caption))
    ground = _GROUND.search(caption)
    wrong = []
    if view.background != (ground["colour"] if ground else "white"):
        wrong.append("background")
    if view.pattern != ((ground and ground["pattern"]) or "plain"):
        wrong.append("pattern")
    if len(view.things) != len(said) or not said:
        return [*wrong, "count"]
    between = (
        re.search(r"\b(left|right|above|over|below|under)\b", caption[said[0].end() : said[1].start()])
        if len(said) > 1
        else None
    )
    relation = _RELATIONS[between[1]] if between else None
    readings = (_faults(said, seen, relation) for seen in itertools.permutations(view.things))
    wrong += dict.fromkeys(min(readings, key=len))
    if len(said) == 1 and (place := _thirds(caption)) is not None:
        (thing,) = view.things
        there = (_third(thing.x, "left", "right"), _third(thing.y, "top", "bottom"))
        wrong += ["place"] * (there != place)
    return wrong


# --- measuring a checkpoint ------------------------------------------------------------------------------------------


def captions(count: int, things: int, seed: int = 1) -> list[str]:
    """Held-out captions that name every attribute; `things` objects each."""
    import scenes

    return [scenes.sample(seed, i, count=things, held_out=True, full=True).caption for i in range(count)]


def pipeline(folder: Path, library: str, scheduler: str | None, device: str):
    import importlib

    module = importlib.import_module(library)
    pipe = module.StableDiffusionXLPipeline.from_pretrained(str(folder))
    if scheduler:
        pipe.scheduler = getattr(module, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def generate(pipe, prompts: list[str], steps: int, guidance: float, batch: int = 10) -> np.ndarray:
    """Pictures (N, 128, 128, 3) uint8; picture number i starts from the noise of seed i."""
    import torch

    found = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        noise = torch.cat(
            [torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(start + i)) for i in range(len(part))]
        )
        out = pipe(
            part,
            height=128,
            width=128,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise.to(pipe.device),
            output_type="np",
        )
        found.append(np.round(np.asarray(out.images) * 255).astype(np.uint8))
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--guidance", type=float, nargs="+", default=[5.0])
    parser.add_argument("--count", type=int, default=100, help="captions of each kind")
    parser.add_argument("--things", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--library", default="autopipeline", choices=("autopipeline", "diffusers"))
    parser.add_argument("--scheduler")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="a PNG of the first pictures; those found wrong have a red frame")
    args = parser.parse_args()
    pipe = pipeline(args.folder, args.library, args.scheduler, args.device)
    rows = []
    for guidance in args.guidance:
        for steps in args.steps:
            for things in args.things:
                began, prompts = time.monotonic(), captions(args.count, things)
                made = generate(pipe, prompts, steps, guidance)
                found = [judge(prompt, picture) for prompt, picture in zip(prompts, made, strict=True)]
                right = sum(not wrong for wrong in found)
                faults = dict(Counter(w for wrong in found for w in wrong))
                share, seconds = right / len(found), time.monotonic() - began
                print(
                    f"{things} thing(s), {steps} steps, guidance {guidance}:",
                    f"{right}/{len(found)} = {share:.1%} {faults} ({seconds:.0f} s)",
                    flush=True,
                )
                rows.append((prompts, made, found))
    if args.sheet:
        sheet(args.sheet, rows)


def sheet(path: Path, rows: list, across: int = 12) -> None:
    from PIL import Image

    lines = []
    for _, made, found in rows:
        cells = []
        for picture, wrong in list(zip(made, found, strict=True))[: 2 * across]:
            cell = np.pad(picture, ((4, 4), (4, 4), (0, 0)))
            if wrong:
                cell[:3], cell[-3:], cell[:, :3], cell[:, -3:] = 4 * ((255, 0, 0),)
            cells.append(cell)
        cells += [np.zeros_like(cells[0])] * (-len(cells) % across)
        lines += [np.concatenate(cells[i : i + across], 1) for i in range(0, len(cells), across)]
    Image.fromarray(np.concatenate(lines, 0)).save(path)


if __name__ == "__main__":
    main()
