"""Rows that are computed one by one, each with something of its own that was made once for the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autopipeline.stage import Cond, Pred, Predict


class Own(nn.Module):
    """What a run has for itself; as a network beside the stage's, it keeps runs from being answered together."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Any] = []  # made with the conditioning


def row_by_row(network: Any, own: Own, velocity: Callable[..., Tensor]) -> Predict:
    """The prediction of `velocity`, for x (1, ...), t (1,) and the part of `own` that `cond["row"]` (R,) numbers.

    And for marks (1, self-attentions), or None, of those that are perturbed.
    """

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Pred:
        inner, time = x.to(network.device, network.dtype), t.to(network.device)
        numbered = enumerate(cond["row"].tolist())
        marks = cond["perturbed"].split(1) if "perturbed" in cond else [None] * len(x)
        made = [velocity(inner[k : k + 1], time[k : k + 1], own.parts[row], marks[k]) for k, row in numbered]
        return Pred(torch.cat(made).to(x.dtype))

    return predict
