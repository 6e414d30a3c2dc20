"""ControlNet (Zhang et al. 2023) for transformers: a picture's latents lead to residuals for the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autopipeline import images
from autopipeline.addons import controlnet
from autopipeline.models.controlnet import MultiControlNetModel
from autopipeline.stage import Cond, Family, Pred, Run, Slot, Stage

Components = Mapping[str, Any]
Nets = list[Any]


def params(*inputs: str) -> dict[str, Any]:
    """What a call can say: the share of the steps to take part in, the inputs, and the strength.

    With several ControlNets, all but a mask may be lists.
    """
    window = dict(control_guidance_start=0.0, control_guidance_end=1.0)
    return window | dict.fromkeys(inputs) | dict(controlnet_conditioning_scale=1.0)


def attach(family: Family, several: type[MultiControlNetModel]) -> Family:
    """The family with a `controlnet`: a network, or a list of them, which become `several`."""

    def stages(components: Components, run: Run) -> tuple[Stage, ...]:
        *before, last = family.stages(components, run)
        return (*before, _controlled(last, controlnet.members(components["controlnet"]), run))

    def check(components: Components, args: Mapping[str, Any]) -> None:
        family.check(components, args)
        nets = controlnet.members(components["controlnet"])
        controlnet.check_all(len(nets), args)
        if args["controlnet_pooled_projections"] is not None and nets[0].config.force_zeros_for_pooled_projection:
            raise ValueError("controlnet_pooled_projections has no effect on this ControlNet, which takes zeros there.")

    def take(given: Any) -> Any:
        return several(given) if isinstance(given, list | tuple) else given

    slot = Slot((several.member.__name__, several.__name__), take=take)
    return replace(family, slots={**family.slots, "controlnet": slot}, stages=stages, check=check, read=_read)


def _read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """One argument for each ControlNet's picture; a tensor is taken as it is, so it tells the size."""
    pictures = controlnet.pictures(
        args["control_image"], "control_image", len(controlnet.members(components["controlnet"]))
    )
    read = {name: value for name, value in args.items() if name != "control_image"} | pictures
    for given in (*pictures.values(), args.get("control_mask")):
        if isinstance(given, Tensor):
            for side, length in zip(("height", "width"), given.shape[-2:], strict=True):
                if read[side] not in (None, length):
                    raise ValueError(
                        f"A tensor as control_image is taken as it is: {side}={read[side]} is not {length}."
                    )
                read[side] = length
    return read


def _controlled(stage: Stage, nets: Nets, run: Run) -> Stage:
    """The stage whose network gets the residuals."""

    def condition(run: Run, x: Tensor) -> Cond:
        cond = stage.condition(run, x)
        branches = len(cond["encoder_hidden_states"]) // len(x)
        rows = {f"control_image_{k}": _latents(stage, run, net, k).to(x) for k, net in enumerate(nets)}
        made = {name: each.repeat(branches, 1, 1, 1) for name, each in rows.items()}
        return cond | made | {"control_pooled": _pooled(run, nets[0], cond["pooled_projections"], branches)}

    def vary(run: Run, branches: tuple[str, ...]) -> Cond:
        strengths = torch.tensor(controlnet.scales(run, len(nets)), device=stage.device)
        return {**stage.vary(run, branches), "control_scale": strengths.expand(run.batch * len(branches), -1)}

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        rest: dict[str, Any] = {name: rows for name, rows in cond.items() if not name.startswith("control_")}
        every = [_residuals(net, k, stage.network, x, t, cond) for k, net in enumerate(nets)]
        sums = [sum(same[1:], same[0]) for same in zip(*filter(None, every), strict=True)]
        if sums:
            rest["residuals"] = sums
        return stage.predict(x, t, rest)

    return replace(stage, condition=condition, vary=vary, predict=predict, beside=(*stage.beside, *nets))


def _latents(stage: Stage, run: Run, net: Any, k: int) -> Tensor:
    """The most likely latents of the k-th picture, and for inpainting what to keep as a further channel.

    Users know draws from the global random numbers here, which are nobody's seed.
    """
    space, pixels = stage.space, _pixels(run, run[f"control_image_{k}"], stage.space)
    if run.get("control_mask") is not None:
        mask = _pixels(run, run["control_mask"], space, signed=False, grey=True, binary=True)
        latents = space.encode(torch.where(mask > 0.5, -1.0, pixels), None)
        kept = 1 - space.mask(mask).to(latents)
        latents = torch.cat([latents, kept.expand(len(latents), -1, -1, -1)], 1)
    else:
        shifted = not net.config.force_zeros_for_pooled_projection
        latents = space._replace(shifted=shifted).encode(pixels, None)  # type: ignore[attr-defined]
    if len(latents) not in (1, run.prompts):
        raise ValueError(
            f"A ControlNet has {len(latents)} pictures for {run.prompts} prompts; give one, or one for each."
        )
    return latents.repeat_interleave(run.batch // len(latents), 0)


def _pixels(run: Run, image: Any, space: Any, **kind: Any) -> Tensor:
    if isinstance(image, Tensor) and image.ndim == 4:
        return image.float()
    return images.pixels(image, run["height"], run["width"], multiple=space.factor, **kind)


def _pooled(run: Run, net: Any, pooled: Tensor, branches: int) -> Tensor:
    """The pooled text that the ControlNets see: zeros for some of them, and for all that repaint."""
    given = run["controlnet_pooled_projections"]
    if given is not None:
        return given.repeat_interleave(run.batch // len(given), 0).repeat(branches, 1).to(pooled)
    zero = run.get("control_mask") is not None or net.config.force_zeros_for_pooled_projection
    return torch.zeros_like(pooled) if zero else pooled


def _residuals(net: Any, k: int, network: Any, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
    """The residuals of one ControlNet; none while it doesn't take part."""
    scale = cond["control_scale"][:, k]
    if not scale.any():
        return []
    kind = dict(device=net.device, dtype=net.dtype)
    made = net(
        x.to(**kind),
        t.to(net.device),
        control=cond[f"control_image_{k}"].to(**kind),
        pooled_projections=cond["control_pooled"].to(**kind),
        encoder_hidden_states=cond["encoder_hidden_states"].to(**kind),
        patches=network.pos_embed,
    )
    return [residual * scale[:, None, None].to(residual) for residual in made]
