"""Perturbed-attention guidance (Ahn et al. 2024): a further branch, in which chosen self-attentions don't mix places.

The marks for it are rows of the conditioning, so that nothing is set on the network and others may use it meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autopipeline.guidance import Guidance, Perturbed
from autopipeline.stage import Cond, Family, Run, Stage, TaskRow

Components = Mapping[str, Any]

MIDDLE = "mid"
PARAMS: dict[str, Any] = dict(pag_scale=3.0, pag_adaptive_scale=0.0)
"""What a call can say: the strength, and how fast it falls as the timesteps go from 1000 to 0."""


def row(task: TaskRow, *without: str) -> TaskRow:
    """A task's row with these parameters, and without those that it does not have with them."""
    return replace(task, params={name: v for name, v in task.params.items() if name not in without} | PARAMS)


def attach(family: Family, layers: str = MIDDLE, stage: int = -1) -> Family:
    """The family with one branch more in that stage.

    The setting `pag_applied_layers` names the self-attentions to perturb.
    """

    def stages(components: Components, run: Run) -> tuple[Stage, ...]:
        made = list(family.stages(components, run))
        columns = _columns(made[stage].network, run.settings["pag_applied_layers"])
        if run["pag_scale"] > 0 and len(columns):
            made[stage] = _perturbed(made[stage], columns)
        return tuple(made)

    def check(components: Components, args: Mapping[str, Any]) -> None:
        family.check(components, args)
        for name in PARAMS:
            if args[name] < 0:
                raise ValueError(f"{name}={args[name]} has to be 0 or more.")

    settings = {**family.settings, "pag_applied_layers": layers}
    return replace(family, settings=settings, stages=stages, check=check)


def _perturbed(stage: Stage, columns: Tensor) -> Stage:
    def condition(run: Run, x: Tensor) -> Cond:
        """The rows of the last branch, the prompt's, once more."""
        cond = stage.condition(run, x)
        return {name: torch.cat([rows, rows[-len(x) :]]) for name, rows in cond.items()}

    def guide(run: Run) -> Guidance:
        return Perturbed(stage.guide(run), _scale(run, ends=stage.scheduler.config.get("num_train_timesteps", 1)))

    def vary(run: Run, branches: tuple[str, ...]) -> Cond:
        marks = torch.stack([columns * (branch == "perturbed") for branch in branches])
        marks = marks.repeat_interleave(run.batch, 0).to(stage.device)
        return {**stage.vary(run, branches), "perturbed": marks}

    return replace(stage, condition=condition, guide=guide, vary=vary)


def _scale(run: Run, ends: int) -> float | Tensor:
    """The strength at this step; times go up to 1000, or to 1 where the scheduler counts so."""
    scale, fall, t = run["pag_scale"], run["pag_adaptive_scale"], run.now.t if ends > 1 else run.now.t * 1000
    return (scale - fall * (1000 - t)).clamp(min=0) if fall > 0 else scale


def _columns(network: Any, layers: str | list[str]) -> Tensor:
    """Which of the self-attentions (K,) are named; each name is a regular expression for parts of a module's name.

    "mid" is the middle of a U-Net, and of networks without such a part the one in the middle.
    """
    names = list(network.self_attentions())
    layers = [layers] if isinstance(layers, str) else list(layers)
    if MIDDLE in layers and not any(MIDDLE in name for name in names) and names:
        layers = [re.escape(names[len(names) // 2]) + "$" if layer == MIDDLE else layer for layer in layers]
    for layer in layers:
        if not any(re.search(layer, name) for name in names):
            near = ", ".join(dict.fromkeys(name.split(".transformer_blocks")[0] for name in names))
            raise ValueError(f"pag_applied_layers names {layer!r}, but there is self-attention only in {near}.")
    found = [any(re.search(layer, name) for layer in layers) for name in names]
    return torch.tensor(found, dtype=torch.bool) if layers else torch.zeros(0, dtype=torch.bool)
