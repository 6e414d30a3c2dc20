"""ControlNet union: pictures of several kinds for one ControlNet, each with its `control_mode` and its strength.

A single picture's strength is that of the residuals; of several each has its own inside the network. A list of unions
has a picture (or a list of them) for each, and their strengths are those of the residuals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autopipeline.addons import controlnet
from autopipeline.models.controlnet_union import MultiControlNetUnionModel
from autopipeline.stage import Cond, Family, Run, Slot, Stage

Components = Mapping[str, Any]
NAME = "control_image"


def params(scale: float) -> dict[str, Any]:
    """What a call can say: what every ControlNet can be told, and the kind of each picture."""
    return controlnet.params(scale) | dict(control_mode=None)


def attach(family: Family) -> Family:
    """The family with a `controlnet` that is a union, or a list of them."""

    def stages(components: Components, run: Run) -> tuple[Stage, ...]:
        *before, last = family.stages(components, run)
        return (*before, _controlled(last, controlnet.members(components["controlnet"]), run))

    def check(components: Components, args: Mapping[str, Any]) -> None:
        family.check(components, args)
        nets, modes = controlnet.members(components["controlnet"]), args["control_mode"]
        controlnet.check_all(_strengths(nets, modes), args, "control pictures" if len(nets) == 1 else "ControlNets")
        _check_modes(nets, modes)

    slot = Slot(("ControlNetUnionModel", "MultiControlNetUnionModel"), take=_take)
    return replace(family, slots={**family.slots, "controlnet": slot}, stages=stages, check=check, read=_read)


def _take(given: Any) -> Any:
    return MultiControlNetUnionModel(given) if isinstance(given, list | tuple) else given


def _read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """One argument for each picture, kinds as a list for each union, and the size where the call gives none."""
    count = len(controlnet.members(components["controlnet"]))
    if args[NAME] is None:
        raise ValueError(f"A ControlNet needs {NAME}.")
    given, modes = _listed(args[NAME]), _listed(args["control_mode"])
    if count > 1 and len(given) != count:
        raise ValueError(f"{NAME} has to be a list of {count}, a picture or a list of them for each ControlNet.")
    every = [given] if count == 1 else [_listed(pictures) for pictures in given]
    kinds = [modes] if count == 1 else [_listed(mode) for mode in modes]
    if [len(pictures) for pictures in every] != [len(mode) for mode in kinds]:
        raise ValueError("control_mode has to say of each control_image what it is: a number for each of them.")
    read = {name: value for name, value in args.items() if name != NAME} | dict(control_mode=kinds)
    flat = [picture for pictures in every for picture in pictures]
    read |= {f"control_image_{k}": picture for k, picture in enumerate(flat)}
    start = flat[0] if args.get("image") is None else args["image"]
    return read | controlnet.sized(components, args, start)


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _check_modes(nets: list[Any], modes: list[list[Any]]) -> None:
    for net, kinds in zip(nets, modes, strict=True):
        most = net.config.num_control_type
        for kind in kinds:
            if isinstance(kind, bool) or not isinstance(kind, int) or not 0 <= kind < most:
                raise ValueError(f"control_mode={kind!r} has to be a whole number from 0 to {most - 1} for this union.")
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"control_mode={kinds} names a kind twice; a union takes one picture of each.")


def _strengths(nets: list[Any], modes: list[list[int]]) -> int:
    """How many strengths a call can give: one for each picture of a single union, or for each union."""
    return len(modes[0]) if len(nets) == 1 else len(nets)


def _controlled(stage: Stage, nets: list[Any], run: Run) -> Stage:
    """The stage whose network gets the residuals."""
    modes = run["control_mode"]
    ends = [sum(map(len, modes[: k + 1])) for k in range(len(nets))]
    flat = [range(end - len(kinds), end) for end, kinds in zip(ends, modes, strict=True)]  # pictures of each union
    inside = len(nets) == 1 and len(modes[0]) > 1

    def condition(run: Run, x: Tensor) -> Cond:
        cond = stage.condition(run, x)
        branches = len(cond["encoder_hidden_states"]) // len(x)
        rows: Cond = {
            f"control_image_{k}": controlnet.picture(run, net, k).to(stage.device)
            for net, own in zip(nets, flat, strict=True)
            for k in own
        }
        rows |= {f"control_mode_{k}": torch.tensor([kinds]).repeat(len(x), 1) for k, kinds in enumerate(modes)}
        rows["control_group"] = torch.tensor([[id(run), b * run.random.apart] for b in range(len(x))])
        return cond | {name: part.repeat(branches, *[1] * (part.ndim - 1)) for name, part in rows.items()}

    def vary(run: Run, branches: tuple[str, ...]) -> Cond:
        said = controlnet.scales(run, _strengths(nets, modes))
        table = controlnet.strengths(nets, run, branches, [1.0] if inside else said)
        weights = torch.tensor([said if inside else [1.0] * ends[-1]]).repeat(len(table), 1)
        varied = {"control_scale": table.to(stage.device), "control_weight": weights.to(stage.device)}
        return {**stage.vary(run, branches), **varied}

    def ask(net: Any, k: int, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        pictures = [cond[f"control_image_{j}"].to(net.device, net.dtype) for j in flat[k]]
        group = cond["control_group"]
        told = dict(
            modes=cond[f"control_mode_{k}"].to(net.device),
            weights=cond["control_weight"][:, flat[k].start : flat[k].stop].to(net.device),
            apart=(group[:, None] != group[None]).any(-1).to(net.device),
        )
        return net(x, t, controlnet_cond=pictures, **told, **controlnet.taken(net, cond))

    public = {**stage.public, "control_image_0": NAME} if ends[-1] == 1 else stage.public
    predict = controlnet.corrected(stage, nets, ask)
    return replace(stage, condition=condition, vary=vary, predict=predict, public=public, beside=(*stage.beside, *nets))
