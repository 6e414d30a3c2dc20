"""ControlNets (Zhang et al. 2023) for transformers of two streams, then perhaps one: residuals after their blocks.

They are led by the prompt alone: the negative branch, where there is one, gets the residuals of the prompt's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autopipeline.addons import control, controlnet
from autopipeline.models.controlnet import MultiControlNetModel
from autopipeline.models.flux import spread
from autopipeline.models.flux_controlnet import Corrections, FluxMultiControlNetModel
from autopipeline.stage import BoundTask, Cond, Family, Pred, Run, Slot, Stage, Task

Components = Mapping[str, Any]
TAKEN = ("encoder_hidden_states", "pooled_projections", "encoder_hidden_states_mask")
"""Conditioning of the transformer that a ControlNet takes as well, besides the table of places."""


class Part(NamedTuple):
    """A ControlNet and its picture, by number; one network may look at several."""

    net: Any  # FluxControlNetModel or QwenImageControlNetModel
    k: int


def params(picture: bool = False, kinds: bool = True) -> dict[str, Any]:
    """What a call can say: the share of the steps to take part in, the picture (if it stands here), its kind, strength.

    With several pictures, all may be lists.
    """
    window = dict(control_guidance_start=0.0, control_guidance_end=1.0)
    said: dict[str, Any] = ({control.NAME: None} if picture else {}) | (dict(control_mode=None) if kinds else {})
    return window | said | dict(controlnet_conditioning_scale=1.0)


def attach(family: Family, several: type[MultiControlNetModel] = FluxMultiControlNetModel) -> Family:
    """The family with a `controlnet`, a network or a list of them, which `several` holds."""

    def beside(task: Task) -> Task:
        def bound(stage: Stage, run: Run) -> BoundTask:
            parts = _parts(stage.beside, run.args)
            shown = {"control_image_0": control.NAME} if len(parts) == 1 else {}
            return control.Beside(task(stage, run), lambda: _rows(stage, run, parts), shown)

        return bound

    def stages(components: Components, run: Run) -> tuple[Stage, ...]:
        *before, last = family.stages(components, run)
        return (*before, _controlled(last, _parts([components["controlnet"]], run.args)))

    def check(components: Components, args: Mapping[str, Any]) -> None:
        family.check(components, args)
        parts = _parts([components["controlnet"]], args)
        controlnet.check_all(len(parts), args)
        _check_modes(parts, args)
        _check_widths(parts, components["transformer"])

    def take(given: Any) -> Any:
        return several(given) if isinstance(given, list | tuple) else given

    def read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
        return _read(components, family.read(components, args))

    slot = Slot((several.member.__name__, several.__name__), take=take)
    return replace(
        family,
        slots={**family.slots, "controlnet": slot},
        tasks={name: replace(row, task=beside(row.task)) for name, row in family.tasks.items()},
        stages=stages,
        check=check,
        read=read,
    )


def _read(components: Components, args: dict[str, Any]) -> dict[str, Any]:
    """One argument for each picture; a tensor is taken as it is, so it tells the size."""
    given, component = args[control.NAME], components["controlnet"]
    count = len(controlnet.members(component))
    if count == 1 and isinstance(component, MultiControlNetModel) and isinstance(given, list | tuple):
        count = len(given)
    pictures = controlnet.pictures(given, control.NAME, count)
    read = {name: value for name, value in args.items() if name != control.NAME} | pictures
    for picture in pictures.values():
        if isinstance(picture, Tensor) and picture.ndim == 4 and picture.shape[1] == 3:
            for side, length in zip(("height", "width"), picture.shape[-2:], strict=True):
                if read[side] not in (None, length):
                    why = f"A tensor as {control.NAME} is taken as it is"
                    raise ValueError(f"{why}: {side}={read[side]} is not {length}.")
                read[side] = length
    return read


def _parts(given: Any, args: Mapping[str, Any]) -> list[Part]:
    """The ControlNets with their pictures; a single network takes all of them."""
    nets = [net for component in given for net in controlnet.members(component) if hasattr(net, "controlnet_blocks")]
    count = sum(name.startswith("control_image_") for name in args)
    return [Part(nets[k] if len(nets) > 1 else nets[0], k) for k in range(count)]


def _modes(args: Mapping[str, Any], count: int) -> list[int | None]:
    """The kind of each picture; -1 stands for none."""
    mode = args.get("control_mode")
    modes = list(mode) if isinstance(mode, list | tuple) else [mode] * count
    return [None if each == -1 else each for each in modes]


def _check_modes(parts: list[Part], args: Mapping[str, Any]) -> None:
    modes = _modes(args, len(parts))
    if len(modes) != len(parts):
        raise ValueError(f"control_mode has {len(modes)} entries for {len(parts)} control pictures.")
    for (net, _), mode in zip(parts, modes, strict=True):
        kinds = net.config.get("num_mode")
        if kinds is None and mode is not None:
            raise ValueError(f"control_mode={mode} has no effect on this ControlNet, which is no union.")
        if kinds is not None and (not isinstance(mode, int) or not 0 <= mode < kinds):
            raise ValueError(f"control_mode={mode!r} has to be a whole number from 0 to {kinds - 1} for this union.")


def _check_widths(parts: list[Part], transformer: Any) -> None:
    wide = _heads(transformer)
    for net, _ in parts:
        if net.config.get("extra_condition_channels"):
            raise ValueError("This ControlNet was made for inpainting; it takes a mask beside its picture.")
        if _heads(net) != wide:
            own = " heads of ".join(map(str, _heads(net)))
            raise ValueError(f"The controlnet has {own} channels, the transformer {' heads of '.join(map(str, wide))}.")


def _heads(network: Any) -> tuple[int, int]:
    return network.config.num_attention_heads, network.config.attention_head_dim


def _rows(stage: Stage, run: Run, parts: list[Part]) -> Cond:
    """Pictures and their kinds, and the guidance scale, one row for each picture to be made."""
    rows: Cond = {}
    for (net, k), mode in zip(parts, _modes(run.args, len(parts)), strict=True):
        picture = run[f"control_image_{k}"]
        seen = control.pixels(stage, run, picture) if net.sees_pixels else control.latents(stage, run, picture)
        rows[f"control_image_{k}"] = seen
        if mode is not None:
            rows[f"control_mode_{k}"] = torch.full((run.batch,), mode, device=stage.device)
    return rows | {"control_guidance": torch.full((run.batch,), float(run.guidance_scale), device=stage.device)}


def _controlled(stage: Stage, parts: list[Part]) -> Stage:
    """The stage whose network gets the residuals."""
    network = stage.network
    blocks = [len(getattr(network, name, ())) for name in ("transformer_blocks", "single_transformer_blocks")]

    def vary(run: Run, branches: tuple[str, ...]) -> Cond:
        """Strengths (R, pictures), and how many rows further on the row stands whose residuals each row takes."""
        strengths = torch.tensor(controlnet.scales(run, len(parts)), device=stage.device)
        steps = [branches.index("positive") - k for k in range(len(branches))]
        away = torch.tensor(steps, device=stage.device).repeat_interleave(run.batch) * run.batch
        return {**stage.vary(run, branches), "control_scale": strengths.expand(len(away), -1), "control_from": away}

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        if "tokens" in cond:
            raise ValueError("With a ControlNet, prompt and negative prompt have to be of as many tokens.")
        rest: dict[str, Any] = {name: rows for name, rows in cond.items() if not name.startswith("control_")}
        made = [found for part in parts if (found := _residuals(part, x, t, cond))]
        if made:
            source = torch.arange(len(x), device=x.device) + cond["control_from"].to(x.device)
            doubles, singles = (list(kind) for kind in zip(*made, strict=True))
            round_about = any(net.sees_pixels for net, _ in parts)
            rest["residuals"] = (
                _combined(doubles, blocks[0], round_about, source),
                _combined(singles, blocks[1], False, source),
            )
        return stage.predict(x, t, rest)

    nets = list(dict.fromkeys(net for net, _ in parts))
    return replace(stage, vary=vary, predict=predict, beside=(*stage.beside, *nets))


def _combined(lists: list[list[Tensor]], blocks: int, repeat: bool, source: Tensor) -> list[Tensor]:
    """Residuals of all ControlNets for one kind of blocks: summed, taken from the rows `source`, spread out."""
    lists = [each for each in lists if each]
    if len({len(each) for each in lists}) > 1:
        lists = [spread(each, blocks, repeat) for each in lists]
    sums = [reduce(torch.add, same)[source] for same in zip(*lists, strict=True)]
    return spread(sums, blocks, repeat)


def _residuals(part: Part, x: Tensor, t: Tensor, cond: Cond) -> Corrections | None:
    """The residuals of one ControlNet; None if it takes no part.

    It is asked only for the rows in which it counts; the others get zeros.
    """
    net, k = part
    scale = cond["control_scale"][:, k]
    rows = (scale != 0) & (cond["control_from"] == 0)
    if not rows.any():
        return None
    kind: dict[str, Any] = dict(device=net.device, dtype=net.dtype)
    inputs: dict[str, Any] = {name: cond[name][rows].to(**kind) for name in TAKEN if name in cond}
    inputs["rotary"] = cond["rotary"][rows].to(net.device)  # angles keep their precision
    if net.config.get("guidance_embeds"):
        inputs["guidance"] = cond["control_guidance"][rows].to(**kind)
    if f"control_mode_{k}" in cond:
        inputs["mode"] = cond[f"control_mode_{k}"][rows].to(net.device)
    picture = cond[f"control_image_{k}"][rows].to(**kind)
    made = net(x[rows].to(**kind), t[rows].to(x.dtype) / 1000, controlnet_cond=picture, **inputs)

    def full(residual: Tensor) -> Tensor:
        whole = residual.new_zeros(len(x), *residual.shape[1:])
        whole[rows] = residual * scale[rows, None, None].to(residual)
        return whole.to(x.device)

    return Corrections(*([full(each) for each in kind] for kind in made))
