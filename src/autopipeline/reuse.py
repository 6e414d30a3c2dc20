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

from autopipeline.stage import Cond, Pred


class Reuse:
    """What one run remembers of its network's answers; without a limit, nothing."""

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self._asked: list[tuple[Tensor, Tensor, tuple[Pred, ...]]] = []  # x, t and answer of the last two passes
        self._at = torch.empty(0)  # the x of the step before
        self._cond: Cond = {}
        self._rate = self._changed = 0.0

    def answer(self, x: Tensor, t: Tensor, cond: Cond, last: bool) -> Sequence[Pred] | None:
        """What the network would say for x (B, C, H, W) at t () with `cond`, or None if it has to be asked.

        It is asked at the first two steps, at the last, and where the conditioning is another than before.
        """
        if self.limit is None or last or len(self._asked) < 2 or not _same(self._cond, cond):
            return None
        (_, before, older), (_, then, newer) = self._asked
        if then == before:
            return None
        self._changed += self._rate * _size(x - self._at) / max(_size(_stacked(newer)), 1e-12)
        self._at = x
        if self._changed >= self.limit:
            return None
        ahead = ((t - then) / (then - before)).to(x)
        return [
            Pred(new.mean + ahead * (new.mean - old.mean), new.variance) for old, new in zip(older, newer, strict=True)
        ]

    def note(self, x: Tensor, t: Tensor, cond: Cond, answer: Sequence[Pred]) -> None:
        """Remember what the network said."""
        if self.limit is None:
            return
        if not _same(self._cond, cond):
            self._asked = []
        if self._asked:
            was, _, said = self._asked[-1]
            self._rate = _size(_stacked(answer) - _stacked(said)) / max(_size(x - was), 1e-12)
        self._asked = [*self._asked[-1:], (x, t, tuple(answer))]
        self._at, self._cond, self._changed = x, cond, 0.0


def _same(one: Cond, other: Cond) -> bool:
    equal = (one[key] is rows or torch.equal(one[key], rows) for key, rows in other.items() if key in one)
    return one.keys() == other.keys() and all(equal)


def _stacked(answer: Sequence[Pred]) -> Tensor:
    return torch.stack([each.mean for each in answer])


def _size(x: Tensor) -> float:
    return float(x.float().abs().mean())
