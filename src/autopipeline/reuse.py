"""Steps without a forward pass: what a network says is told from what it said before, while that hardly changes.

The rule knows nothing of the network, so it is one for U-Nets and transformers. How fast outputs change with inputs is
seen at the last two passes; by that and by how far x has moved, the change since the last pass is estimated, as in
EasyCache (Zhou et al. 2025, "Less is Enough"). Below a limit, the output is that of the last two passes continued in a
straight line over time; above it, the network is asked again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopipeline.stage import Pred


class Reuse:
    """What one run remembers of its network's answers; without a limit, nothing."""

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self._asked: list[tuple[Tensor, Tensor, tuple[Pred, ...]]] = []  # x, t and answer of the last two passes
        self._at: Tensor | None = None  # the x of the step before
        self._rate = self._changed = 0.0

    def answer(self, x: Tensor, t: Tensor, branches: int, last: bool) -> Sequence[Pred] | None:
        """What the network would say for x (B, C, H, W) at t () for its branches, or None if it has to be asked.

        It is asked at the first two steps and at the last.
        """
        if self.limit is None or last or len(self._asked) < 2 or self._at is None:
            return None
        (_, before, older), (_, then, newer) = self._asked
        if not len(older) == len(newer) == branches or newer[0].mean.shape[0] != len(x) or then == before:
            return None
        self._changed += self._rate * _size(x - self._at) / _size(_stacked(newer))
        self._at = x
        if self._changed >= self.limit:
            return None
        ahead = ((t - then) / (then - before)).to(x)
        return [
            Pred(new.mean + ahead * (new.mean - old.mean), new.variance) for old, new in zip(older, newer, strict=True)
        ]

    def note(self, x: Tensor, t: Tensor, answer: Sequence[Pred]) -> None:
        """Remember what the network said."""
        if self.limit is None:
            return
        if self._asked and len(self._asked[-1][2]) == len(answer) and self._asked[-1][0].shape == x.shape:
            was, _, said = self._asked[-1]
            self._rate = _size(_stacked(answer) - _stacked(said)) / max(_size(x - was), 1e-12)
        self._asked = [*self._asked[-1:], (x, t, tuple(answer))]
        self._at, self._changed = x, 0.0


def _stacked(answer: Sequence[Pred]) -> Tensor:
    return torch.stack([each.mean for each in answer])


def _size(x: Tensor) -> float:
    return float(x.float().abs().mean())
