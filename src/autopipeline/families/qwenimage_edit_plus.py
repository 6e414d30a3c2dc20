"""Qwen-Image-Edit 2509 and later (Qwen team 2025): any number of pictures to look at, each at a size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autopipeline import images
from autopipeline.families import flux, qwenimage
from autopipeline.families import qwenimage_edit as edit
from autopipeline.families.qwenimage import Texts
from autopipeline.spaces import factor
from autopipeline.stage import Run, Stage

Components = Mapping[str, Any]

SEEN = 384 * 384
"""Pixels that a picture is scaled to for the text encoder."""


def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """Every prompt has all the pictures, scaled twice; the last one tells the size of the result."""
    args = qwenimage.read(components, args)
    image = args.pop("image")
    many: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
    step, found = 2 * factor(components["vae"]), edit.sizes(many)
    made = [edit.scaled(size) for size in found]
    args["references"] = tuple(
        edit.fitted(picture, height // step * step, width // step * step)
        for picture, (height, width) in zip(many, made, strict=True)
    )
    args["looks"] = tuple(
        edit.fitted(picture, *edit.scaled(size, SEEN)) for picture, size in zip(many, found, strict=True)
    )
    return args | edit.default_size(components, args, made[-1:])


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage: the transformer in packed latents, beside those of the pictures."""
    references, looks = run["references"], run["looks"]
    marks = "".join(f"Picture {k + 1}: {edit.LOOK}" for k in range(len(looks)))

    def texts(components: Components, run: Run) -> list[Texts]:
        shown = looks * run.prompts
        return qwenimage.branches(run, lambda texts: edit.encode(components, [marks + text for text in texts], shown))

    grids = [edit.grid(components, picture.height, picture.width) for picture in references]
    stage = qwenimage.stage(components, flux.packed(components, run), texts, *grids)
    return (edit.beside(stage, [images.pixels(picture, multiple=1) for picture in references]),)


FAMILY = replace(
    edit.FAMILY,
    key="qwenimage-edit-plus",
    stem="QwenImageEditPlus",
    tasks={"image2image": edit.EDIT},
    stages=stages,
    read=read,
)
