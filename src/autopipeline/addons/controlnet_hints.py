"""ControlNets (Zhang et al. 2023) for transformers of one stream: blocks beside some of theirs.

All branches are led, each by its own text. A network that was taught to inpaint looks at the known part as well: its
control picture, the mask of what is known and the picture without the rest stand beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline import images
from autopipeline.addons import control
from autopipeline.stage import BoundTask, Cond, Family, Pred, Run, Slot, Stage, Task

Components = Mapping[str, Any]
NAME = control.NAME
PARAMS: dict[str, Any] = {NAME: None, "controlnet_conditioning_scale": 0.75}
"""What a call can say: the picture, and how strongly it leads."""


def attach(family: Family) -> Family:
    """The family with a `controlnet`."""

    def beside(task: Task) -> Task:
        def bound(stage: Stage, run: Run) -> BoundTask:
            return control.Beside(task(stage, run), lambda: _rows(stage, run), {})

        return bound

    def stages(components: Components, run: Run) -> tuple[Stage, ...]:
        *before, last = family.stages(components, run)
        return (*before, _controlled(last, components["controlnet"]))

    def check(components: Components, args: Mapping[str, Any]) -> None:
        family.check(components, args)
        _check_networks(components, masked=args.get("mask_image") is not None)
        scale = args["controlnet_conditioning_scale"]
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"controlnet_conditioning_scale={scale!r} has to be a number.")

    def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
        return control.sized(family.read(components, args), [args[NAME]])

    return replace(
        family,
        slots={**family.slots, "controlnet": Slot(("ZImageControlNetModel",))},
        tasks={name: replace(row, task=beside(row.task)) for name, row in family.tasks.items()},
        stages=stages,
        check=check,
        read=read,
    )


def _check_networks(components: Components, masked: bool) -> None:
    net, transformer = components["controlnet"], components["transformer"]
    own, theirs = ((each.config.n_heads, each.config.dim) for each in (net, transformer))
    if own != theirs:
        raise ValueError(f"The controlnet has {own[0]} heads in {own[1]} channels, the transformer {theirs}.")
    if (net.device, net.dtype) != (transformer.device, transformer.dtype):
        raise ValueError("The controlnet has to be where the transformer is, and of its precision; they share parts.")
    channels, latent = net.config.control_in_dim, components["vae"].config.latent_channels
    if channels != 2 * latent + 1 if masked else channels < latent:
        needed = f"inpainting needs {2 * latent + 1}" if masked else f"latents have {latent}"
        raise ValueError(f"The controlnet looks at {channels} channels, but {needed}.")


def _rows(stage: Stage, run: Run) -> Cond:
    """What the ControlNet looks at (B, control_in_dim, h, w), and how strongly it leads (B,)."""
    seen = [_latents(stage, run, control.pixels(stage, run, run[NAME]))]
    if run.get("mask_image") is not None:
        fit: dict[str, Any] = dict(multiple=1, signed=False, grey=True, binary=True)
        given = images.pixels(run["mask_image"], run["height"], run["width"], **fit)
        known, mask = (control.pixels(stage, run, x) for x in (run["image"], given))
        beside = _latents(stage, run, known * (mask < 0.5))
        seen += [stage.space.mask(1 - mask).to(beside), beside]
    rows = torch.cat(seen, 1)
    more = stage.beside[-1].config.control_in_dim - rows.shape[1]  # type: ignore[union-attr]
    scale = torch.full((run.batch,), float(run["controlnet_conditioning_scale"]))
    return {"control_latents": functional.pad(rows, (0, 0, 0, 0, 0, more)), "control_scale": scale}  # type: ignore[arg-type]


def _latents(stage: Stage, run: Run, pixels: Tensor) -> Tensor:
    """The most likely latents of pictures."""
    made = stage.space.encode(pixels, None)
    shape = stage.space.shape(run, run["height"], run["width"])
    if tuple(made.shape) != tuple(shape):
        raise ValueError(f"A picture beside this has latents of {tuple(made.shape[1:])}; they have to be {shape[1:]}.")
    return made.to(stage.dtype)


def _controlled(stage: Stage, net: Any) -> Stage:
    """The stage whose network gets the corrections."""
    network: Any = stage.network

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        rest: dict[str, Any] = {name: rows for name, rows in cond.items() if not name.startswith("control_")}
        if cond["control_scale"].any():
            rest["residuals"] = partial(
                net,
                control=cond["control_latents"].to(net.device, net.dtype),
                scale=cond["control_scale"],
                refiner=network.noise_refiner,
                fill=network.x_pad_token,
            )
        return stage.predict(x, t, rest)

    return replace(stage, predict=predict, beside=(*stage.beside, net))
