"""ControlNet (Zhang et al. 2023): residuals from a picture, added in the U-Net; several are summed.

All that a call says about strengths becomes rows of the conditioning, one for each row of x, ControlNet and residual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autopipeline import images
from autopipeline.models.controlnet import ControlNetModel, MultiControlNetModel
from autopipeline.spaces import crop_box, factor
from autopipeline.stage import Cond, Family, Pred, Predict, Run, Slot, Stage

Components = Mapping[str, Any]
Nets = list[ControlNetModel]
Asked = Callable[[Any, int, Tensor, Tensor, Cond], list[Tensor]]
"""How the k-th ControlNet is asked for residuals of x at t, from the conditioning of these rows."""

TAKEN = ("encoder_hidden_states", "text_embeds", "time_ids")
"""Conditioning of the U-Net that a ControlNet takes as well."""


def params(scale: float) -> dict[str, Any]:
    """What a call can say: strength, whether to do without the prompt, and the share of the steps to take part in.

    With several ControlNets, all but `guess_mode` may be lists.
    """
    return dict(
        controlnet_conditioning_scale=scale, guess_mode=False, control_guidance_start=0.0, control_guidance_end=1.0
    )


def attach(family: Family) -> Family:
    """The family with a `controlnet`, a network or a list of them."""

    def stages(components: Components, run: Run) -> tuple[Stage, ...]:
        *before, last = family.stages(components, run)
        return (*before, _controlled(last, members(components["controlnet"]), run))

    def check(components: Components, args: Mapping[str, Any]) -> None:
        family.check(components, args)
        check_all(len(members(components["controlnet"])), args)

    slot = Slot(("ControlNetModel", "MultiControlNetModel"), take=_take)
    return replace(family, slots={**family.slots, "controlnet": slot}, stages=stages, check=check, read=_read)


def _take(given: Any) -> Any:
    return MultiControlNetModel(given) if isinstance(given, list | tuple) else given


def members(component: Any) -> list[Any]:
    """The ControlNets of a component that is one or several."""
    return component.members if isinstance(component, MultiControlNetModel) else [component]


def _read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """One argument for each ControlNet's picture, and the size of the result where the call gives none.

    Without a picture to start from, `image` is the ControlNet's.
    """
    name = "control_image" if "control_image" in args else "image"
    read = {key: value for key, value in args.items() if key != name}
    read |= pictures(args[name], name, len(members(components["controlnet"])))
    return read | sized(components, args, args["image"] if name == "control_image" else read["control_image_0"])


def sized(components: Components, args: Mapping[str, Any], given: Any) -> dict[str, Any]:
    """Height and width of the result where the call gives none: those of the pictures, in whole latents."""
    read: dict[str, Any] = {}
    multiple = max(8, factor(components["vae"]))
    sizes = images.sizes(given)
    for side, lengths in zip(("width", "height"), zip(*(size or (0, 0) for size in sizes), strict=True), strict=True):
        if args[side] is None:
            rounded = [max(length // multiple, 1) * multiple for length in lengths]
            read[side] = rounded if len(set(sizes)) > 1 else rounded[0]
    return read


def pictures(control: Any, name: str, count: int) -> dict[str, Any]:
    """One argument for each ControlNet's picture."""
    if control is None:
        raise ValueError(f"A ControlNet needs {name}.")
    if count > 1 and isinstance(control, list | tuple) and isinstance(control[0], list | tuple):
        control = list(zip(*control, strict=True))  # one list a prompt -> one list a ControlNet
    if count > 1 and (not isinstance(control, list | tuple) or len(control) != count):
        raise ValueError(f"{name} has to be a list of {count}, a picture for each ControlNet.")
    return {f"control_image_{k}": control[k] if count > 1 else control for k in range(count)}


def check_all(count: int, args: Mapping[str, Any], what: str = "ControlNets") -> None:
    """Refuse lists of other lengths than that of the ControlNets (or of what else), and windows that are none."""
    for name in params(1.0):
        given = args.get(name)
        if isinstance(given, list | tuple) and len(given) != count:
            raise ValueError(f"{name} has {len(given)} entries for {count} {what}.")
    starts, ends = (_each(args[f"control_guidance_{end}"], count) for end in ("start", "end"))
    for start, end in zip(starts, ends, strict=True):
        if not 0 <= start < end <= 1:
            raise ValueError(f"control_guidance_start={start} and _end={end} have to be in 0 to 1, in this order.")


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count


def _controlled(stage: Stage, nets: Nets, run: Run) -> Stage:
    """The stage whose network gets the residuals."""

    def condition(run: Run, x: Tensor) -> Cond:
        cond = stage.condition(run, x)
        branches = len(cond["encoder_hidden_states"]) // len(x)
        pictures = {f"control_image_{k}": picture(run, net, k).to(stage.device) for k, net in enumerate(nets)}
        return cond | {name: rows.repeat(branches, 1, 1, 1) for name, rows in pictures.items()}

    def vary(run: Run, branches: tuple[str, ...]) -> Cond:
        table = strengths(nets, run, branches, scales(run, len(nets)))
        return {**stage.vary(run, branches), "control_scale": table.to(stage.device)}

    shown = "control_image" if run.get("image") is not None else "image"
    public = {**stage.public, "control_image_0": shown} if len(nets) == 1 else stage.public
    return replace(
        stage,
        condition=condition,
        vary=vary,
        predict=corrected(stage, nets, _ask),
        public=public,
        beside=(*stage.beside, *nets),
    )


def corrected(stage: Stage, nets: Sequence[Any], ask: Asked) -> Predict:
    """The stage's prediction with the residuals of ControlNets, by how they are asked."""

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        rest: dict[str, Any] = {name: rows for name, rows in cond.items() if not name.startswith("control_")}
        every = [made for k, net in enumerate(nets) if (made := _residuals(net, k, ask, x, t, cond))]
        if every:
            *down, middle = [sum(same[1:], same[0]) for same in zip(*every, strict=True)]
            rest |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return stage.predict(x, t, rest)

    return predict


def picture(run: Run, net: Any, k: int) -> Tensor:
    """The k-th picture for a ControlNet, 0..1, one row for each picture to be made."""
    box = crop_box(run)
    fit: dict[str, Any] = {"multiple": net.reduction, "signed": False, "crop": box, "fill": box is not None}
    x = images.pixels(run[f"control_image_{k}"], run["height"], run["width"], **fit)
    if len(x) not in (1, run.prompts):
        raise ValueError(f"A ControlNet has {len(x)} pictures for {run.prompts} prompts; give one, or one for each.")
    return x.repeat_interleave(run.batch // len(x), 0)


def scales(run: Run, count: int) -> list[float]:
    """The strength of each ControlNet at this step: 0 outside its window."""
    position, total, _ = run.now
    full = _each(run["controlnet_conditioning_scale"], count)
    starts, ends = (_each(run[f"control_guidance_{end}"], count) for end in ("start", "end"))
    inside = [a <= position / total and (position + 1) / total <= b for a, b in zip(starts, ends, strict=True)]
    return [scale * part for scale, part in zip(full, inside, strict=True)]


def strengths(nets: Sequence[Any], run: Run, branches: tuple[str, ...], scales: Sequence[float]) -> Tensor:
    """What to multiply each residual with, for these scales: (branches * B, ControlNets, residuals)."""
    pooled = nets[0].config.global_pool_conditions
    guess = run.get("guess_mode", False)
    table = torch.zeros(len(branches), len(nets), nets[0].residuals)
    for k, (net, scale) in enumerate(zip(nets, scales, strict=True)):
        if scale:
            rising = guess and not net.config.global_pool_conditions  # the finer, the weaker
            table[:, k] = scale * (torch.logspace(-1, 0, net.residuals) if rising else torch.ones(net.residuals))
    if guess or pooled:
        table[[branch == "negative" for branch in branches]] = 0
    return table.repeat_interleave(run.batch, 0)


def _residuals(net: Any, k: int, ask: Asked, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
    """The residuals of one ControlNet, asked only for the rows in which they count; none if there is no such row."""
    scale = cond["control_scale"][:, k]  # (R, residuals)
    rows = scale.any(-1)
    if not rows.any():
        return []
    seen = {name: entry[rows] for name, entry in cond.items()}
    full: list[Tensor] = []
    for j, residual in enumerate(ask(net, k, x[rows].to(net.device, net.dtype), t[rows].to(net.device), seen)):
        whole = residual.new_zeros(len(x), *residual.shape[1:])
        whole[rows] = residual * scale[rows, j, None, None, None].to(residual)
        full.append(whole)
    return full


def _ask(net: ControlNetModel, k: int, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
    return net(x, t, controlnet_cond=cond[f"control_image_{k}"].to(net.device, net.dtype), **taken(net, cond))


def taken(net: Any, cond: Cond) -> dict[str, Tensor]:
    """What a ControlNet hears of the U-Net's conditioning."""
    return {name: cond[name].to(net.device, net.dtype) for name in TAKEN if name in cond}
