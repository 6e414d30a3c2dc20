"""Make the README's pictures with the shipped model: python docs/pictures.py."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

import autopipeline as ap

SCENES = [
    "a large red circle left of a small blue square on a yellow background",
    "a large yellow star in the centre on a striped blue background",
    "a small green triangle above a large purple ring on a white background",
    "a large orange heart on the left on a dotted black background",
    "a small white cross left of a small black diamond left of a small yellow circle on a checkered green background",
    "a large white square below a small red star on a plain purple background",
]
FOLDER = Path(__file__).parent / "pictures"
GAP = 8


def row(pictures: list[Image.Image], scale: int = 1) -> Image.Image:
    """Pictures side by side on white."""
    shown = [p.convert("RGB").resize((p.width * scale, p.height * scale), Image.Resampling.LANCZOS) for p in pictures]
    width, height = shown[0].size
    sheet = Image.new("RGB", (len(shown) * (width + GAP) - GAP, height), "white")
    for k, picture in enumerate(shown):
        sheet.paste(picture, (k * (width + GAP), 0))
    return sheet


def scenes() -> Image.Image:
    """Six prompts."""
    pipe = ap.AutoPipelineForText2Image.from_pretrained("scenes-128")
    return row(pipe(SCENES, seed=1).images)


def tasks() -> Image.Image:
    """Text to image; the same from that picture; a mask, and what is painted into it."""
    pipe = ap.DiffusionPipeline.from_pretrained("scenes-128")
    start = pipe("a large blue square in the centre on a white background", seed=3).images[0]
    other = pipe("a large red square in the centre on a white background", image=start, strength=0.8, seed=3).images[0]
    mask = Image.new("L", start.size, 0)
    ImageDraw.Draw(mask).rectangle([0, 0, 127, 40], fill=255)
    prompt = "a small red circle above a large blue square on a white background"
    painted = pipe(prompt, image=start, mask_image=mask, seed=4).images[0]
    return row([start, other, mask, painted])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    scenes().save(FOLDER / "scenes.png", optimize=True)
    tasks().save(FOLDER / "tasks.png", optimize=True)
