"""Adams methods on the logarithm of signal over noise: exponential integrals of a polynomial through what was said."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from autopipeline.schedulers import grids
from autopipeline.schedulers.grids import integrals
from autopipeline.schedulers.scheduler import Noise, Pair
from autopipeline.schedulers.solvers.multistep import DPMSolver, Multistep


def log_ratios(solver: Multistep, newest: int, count: int) -> list[float]:
    """Lambda of a grid index and of those before it, in double precision: weights are differences of large numbers."""
    sigmas = [float(solver.grid.levels[newest - k]) for k in range(count)]
    return [log((1 - sigma if solver.config.use_flow_sigmas else 1) / sigma) for sigma in sigmas]


def adams(
    solver: Multistep, x: Tensor, i: int, newest: int, said: Sequence[Tensor], tau: float = 0.0, as_clean: bool = False
) -> Pair:
    """From index i to i + 1 with what was said (the latest first) at `newest` and before; and the deviation of noise.

    `tau` is how much noise there is on the way; `as_clean`: the clean sample was said, not the noise.
    """
    end, start = log_ratios(solver, i + 1, 2)
    (alpha_s, sigma_s), (alpha, sigma) = solver.level(i), solver.level(i + 1)
    h, nodes, rate = torch.tensor(end - start), log_ratios(solver, newest, len(said)), 1 + tau**2
    if as_clean:
        weights = _second(integrals(nodes, start, end, rate), nodes, start, end, rate)
        carry, size = torch.exp(-(tau**2) * h) * sigma / sigma_s, rate * alpha
        spread = sigma * torch.sqrt(-torch.expm1(-2 * tau**2 * h))
    else:
        weights = integrals(nodes, start, end, -1.0)
        carry, size = alpha / alpha_s, -rate * sigma
        spread = tau * sigma * torch.sqrt(torch.expm1(2 * h))
    new = carry * x
    for weight, entry in zip(weights, said, strict=True):
        new = new + size * weight * entry
    return new, spread


def _second(weights: list[float], nodes: list[float], start: float, end: float, rate: float) -> list[float]:
    """In the second order, the authors' implementation takes h**2 / 2 for the integral over the slope."""
    if len(nodes) != 2:
        return weights
    slope = integrals([start + 1, start], start, end, rate)[0]
    change = ((end - start) ** 2 / 2 - slope) / (nodes[0] - nodes[1])
    return [weights[0] + change, weights[1] - change]


class DEIS(DPMSolver):
    """Zhang & Chen 2023, the Adams-Bashforth kind, with the polynomial in the logarithm of sigma / alpha."""

    def _update(self, x: Tensor, i: int, order: int, noise: Tensor | None) -> Tensor:
        if order == 1:
            return super()._update(x, i, order, noise)
        return adams(self, x, i, i, self.seen[::-1][:order])[0]


class SASolver(Multistep):
    """Xue et al. 2023, algorithm 1: a predictor, and a corrector that reuses the next evaluation and the noise."""

    before: Pair | None = None  # x and the noise that the last step began with
    order = 1  # of the next corrector

    def tau(self, i: int) -> float:
        """How much noise there is on the way from grid index i."""
        t, chosen = self.grid.timesteps[i], self.config.tau_func
        return float(chosen(t) if chosen else 200 <= t <= 800)

    def noised(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """At the level of the timestep as the network is told it, which curves of sigmas round."""
        if self.config.use_flow_sigmas or i >= len(self.grid.timesteps):
            return super().noised(x0, noise, i)
        share = grids.alphas_cumprod(self.config)[int(self.grid.timesteps[i])].to(x0)
        return share.sqrt() * x0 + (1 - share).sqrt() * noise

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Correct the last step with what the network says now, then predict the next."""
        config = self.config
        said, x0 = self.converted(x, pred, i, config.algorithm_type == "data_prediction")
        self.seen = [*self.seen, said]
        if self.before is not None:
            x = self._update(*self.before, i - 1, i, self.order)
        self.before = (x, noise())
        self.seen = self.seen[-max(config.predictor_order, config.corrector_order - 1) :]
        left = len(self.grid.timesteps) - i if config.lower_order_final else len(self.seen)
        known = min(len(self.seen), left)
        self.order = min(config.corrector_order, known + 1)
        return self._update(*self.before, i, i, min(config.predictor_order, known)), x0

    def _update(self, x: Tensor, noise: Tensor, i: int, newest: int, order: int) -> Tensor:
        """From index i to i + 1, with what was said at `newest` and before."""
        as_clean = self.config.algorithm_type == "data_prediction"
        new, spread = adams(self, x, i, newest, self.seen[::-1][:order], self.tau(i), as_clean)
        return new + spread * noise
