"""Make the README's pictures with the shipped model: python docs/pictures.py."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import autopipeline as ap
from autopipeline.samplers import SAMPLERS

SCENES = [
    "a large red circle left of a small blue square on a yellow background",
    "a large yellow star in the centre on a striped blue background",
    "a small green triangle above a large purple ring on a white background",
    "a large orange heart on the left on a dotted black background",
    "a small white cross left of a small black diamond left of a small yellow circle on a checkered green background",
    "a large white square below a small red star on a plain purple background",
]
GUIDANCE = dict(guidance_scale=3.0)  # what the command line takes for this model
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
    return row(pipe(SCENES, seed=1, **GUIDANCE).images)


def tasks() -> Image.Image:
    """Text to image; the same from that picture; a mask, and what is painted into it."""
    pipe = ap.DiffusionPipeline.from_pretrained("scenes-128")
    start = pipe("a large blue square in the centre on a white background", seed=3, **GUIDANCE).images[0]
    other = pipe(
        "a large red square in the centre on a white background", image=start, strength=0.8, seed=3, **GUIDANCE
    ).images[0]
    mask = Image.new("L", start.size, 0)
    ImageDraw.Draw(mask).rectangle([0, 0, 127, 40], fill=255)
    prompt = "a small red circle above a large blue square on a white background"
    painted = pipe(prompt, image=start, mask_image=mask, seed=4, **GUIDANCE).images[0]
    return row([start, other, mask, painted])


STEPS = (4, 6, 10, 20)
CELL = 72


def schedulers() -> Image.Image:
    """One prompt and seed over schedulers (rows, in two columns) and steps."""
    pipe = ap.AutoPipelineForText2Image.from_pretrained("scenes-128")
    pipe.set_progress_bar_config(disable=True)
    names = [sampler.name for sampler in SAMPLERS if sampler.plain]
    half = -(-len(names) // 2)
    wide = 160 + len(STEPS) * (CELL + 4)
    sheet = Image.new("RGB", (2 * wide, 24 + half * (CELL + 4)), "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for k, name in enumerate(names):
        left, top = k // half * wide, 24 + k % half * (CELL + 4)
        ink.text((left + 8, top + CELL // 2 - 8), name, "black", font)
        for j, steps in enumerate(STEPS):
            at = left + 160 + j * (CELL + 4)
            if k % half == 0:
                ink.text((at + 4, 4), f"{steps} steps", "black", font)
            made = pipe(SCENES[0], seed=1, num_inference_steps=steps, scheduler=name, **GUIDANCE).images[0]
            sheet.paste(made.resize((CELL, CELL), Image.Resampling.LANCZOS), (at, top))
    return sheet


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    scenes().save(FOLDER / "scenes.png", optimize=True)
    tasks().save(FOLDER / "tasks.png", optimize=True)
    schedulers().save(FOLDER / "schedulers.png", optimize=True)
