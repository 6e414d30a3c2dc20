"""Muon: momentum whose update is made orthogonal, for matrices (a convolution counts as one, a row for each output)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from team import Team


def orthogonal(g: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Roughly U Vᵀ of each matrix of g (N, m, n), by the quintic Newton-Schulz iteration in bfloat16."""
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Updates have root-mean-square 0.2 whatever the matrix's shape, so that learning rates are like Adam's."""

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float = 1e-3, momentum: float = 0.95, team: Team | None = None
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.team = team or Team()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        for group in self.param_groups:
            same: dict[tuple[int, int], list[torch.nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same[(p.shape[0], p.numel() // p.shape[0])].append(p)
            for (m, n), params in same.items():
                directions = torch.stack([self._nesterov(p, group["momentum"]).reshape(m, n) for p in params])
                scale = -group["lr"] * 0.2 * max(m, n) ** 0.5
                updates = torch.zeros_like(directions)  # each member works out some of them
                mine = slice(self.team.rank, None, self.team.size)
                if len(directions[mine]):
                    updates[mine] = orthogonal(directions[mine])
                self.team.sum(updates)
                for p, update in zip(params, updates, strict=True):
                    p.add_(update.view_as(p), alpha=scale)

    def _nesterov(self, p: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        mean = state["momentum"].lerp_(p.grad, 1 - momentum)  # type: ignore[arg-type]
        return p.grad.lerp(mean, momentum)  # type: ignore[union-attr]
