"""Flux Kontext (Black Forest Labs 2025): the tokens of a reference picture stand beside those of the new one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autopipeline import images
from autopipeline.families import flux, flux_tasks
from autopipeline.models.rotary import grid_places
from autopipeline.spaces import LatentSpace, Packed, factor
from autopipeline.stage import Cond, Finished, Pred, Predict, Run, Stage, TaskRow
from autopipeline.tasks.image2image import repeat_to
from autopipeline.tasks.text2image import Text2Image

Components = Mapping[str, Any]

TRAINED = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
SIZES = (*TRAINED, (1024, 1024), *((b, a) for a, b in reversed(TRAINED)))
"""Width and height of the reference pictures that the network was trained with."""

ROW = TaskRow(
    task=Text2Image,
    params={"image": None, **flux_tasks.TEXT2IMAGE.params, "max_area": 1024**2, "_auto_resize": True},
    tensors=flux_tasks.TENSORS,
)


def size_made(components: Components, args: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width that are made: of the shape that the call asks for and of about `max_area` pixels."""
    step, area = 2 * factor(components["vae"]), args["max_area"]
    ratio = args["width"] / args["height"]
    return round((area / ratio) ** 0.5) // step * step, round((area * ratio) ** 0.5) // step * step


def reference_pixels(components: Components, run: Run) -> Tensor:
    """The reference pictures (P, 3, H, W) at the nearest size of `SIZES`, or latents as they are given."""
    image, step, latent = run["image"], 2 * factor(components["vae"]), components["vae"].config.latent_channels
    if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == latent:
        return image
    size = images.sizes(image)[0]
    if size is None:
        raise TypeError(f"A picture has to be a PIL picture, an array, a tensor or a path, not {type(image).__name__}.")
    width, height = (side // step * step for side in size)
    if run["_auto_resize"] and height:
        ratio = width / height
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in SIZES)
    return images.pixels(image, height or 1, width or 1, multiple=step)


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """One stage; with a picture, its tokens (place 1 on the first axis) go along and are cut off the prediction."""
    step = factor(components["vae"])
    height, width = size_made(components, run.args)
    space = Packed(LatentSpace(components["vae"], patch=2), height // step, width // step)
    if run.get("image") is None:
        return (flux.stage(components, space),)
    pixels = reference_pixels(components, run)
    latents = pixels.shape[1] != 3
    grid = [side if latents else side // step for side in pixels.shape[-2:]]
    stage = flux.stage(components, space, grid_places(grid[0] // 2, grid[1] // 2, first=1))

    def condition(run: Run, x: Tensor) -> Cond:
        cond = stage.condition(run, x)
        rows = space.pack(pixels.to(stage.device)) if latents else space.encode(pixels, None)
        rows = repeat_to(rows.to(stage.device, stage.dtype), run.batch, "image")
        return cond | {"reference": rows.repeat(len(cond["pooled_projections"]) // len(x), 1, 1)}

    return (replace(stage, condition=condition, predict=beside(stage.predict)),)


def beside(predict: Predict) -> Predict:
    """The prediction for x, with the tokens of `reference` (R, N, C) beside it where there are some."""

    def joined(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        rest = {name: rows for name, rows in cond.items() if name != "reference"}
        if "reference" in cond:
            return Pred(predict(torch.cat([x, cond["reference"].to(x)], 1), t, rest).mean[:, : x.shape[1]])
        return predict(x, t, rest)

    return joined


def check(components: Components, args: Mapping[str, Any]) -> None:
    """What Flux refuses; the size that is made may be another than the one asked for."""
    flux.check_call(components, args)
    made = size_made(components, args)
    if not all(made):
        raise ValueError(f"max_area={args['max_area']} is too small for pictures of this shape.")
    if made != (args["height"], args["width"]):
        said = f"max_area={args['max_area']} makes pictures of {made[0]} x {made[1]} pixels (height x width)"
        warnings.warn(f"{said}, not of {args['height']} x {args['width']}.", stacklevel=2)


def finish(components: Components, run: Run, x: Tensor) -> Finished:
    """Decode."""
    return Finished(stages(components, run)[0].space.decode(x))


FAMILY = replace(
    flux.FAMILY,
    key="flux-kontext",
    stem="FluxKontext",
    tasks={"text2image": ROW, "image2image": ROW},
    stages=stages,
    check=check,
    finish=finish,
)
