"""Solvers for flow matching (Lipman et al. 2023): x is a straight line from the clean sample to noise."""

from __future__ import annotations

import torch
from torch import Tensor

from autopipeline.noise import Noise
from autopipeline.schedulers.scheduler import Grid, Pair, Scheduler, Solver
from autopipeline.schedulers.solvers.exploding import Exploding, Heun


class Flow(Exploding):
    """x = (1 - sigma) clean + sigma noise; the network says noise minus clean, which is the slope of x in sigma."""

    fixed = Solver.fixed | dict(prediction_type="flow_prediction")
    scale = Solver.scale

    def level(self, i: int) -> Pair:
        """The shares add up to one."""
        return 1 - self.sigma(i), self.sigma(i)

    def renoised(self, x0: Tensor, i: int, noise: Noise) -> Tensor:
        """A clean sample at grid index i, with noise of its own."""
        alpha, sigma = self.level(i)
        return alpha * x0 + sigma * noise()


class FlowEuler(Flow):
    """Euler's method along the line, or, with `stochastic_sampling`, the clean sample noised again.

    `tokens` (B, L), set before a step, are times of training of the single tokens of x (B, L, C), each of which then
    goes to the next lower level of the grid, against the sign of the prediction.
    """

    tokens: Tensor | None = None

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Straight on."""
        if self.tokens is not None:
            return self._each_token(x, pred, self.tokens.to(x) / self.config.num_train_timesteps, noise)
        x0, width = self.denoised(x, pred, i), self.sigma(i + 1) - self.sigma(i)
        return self.renoised(x0, i + 1, noise) if self.config.stochastic_sampling else x + width * pred, x0

    def _each_token(self, x: Tensor, pred: Tensor, here: Tensor, noise: Noise) -> Pair:
        levels = self.grid.levels.to(x).view(-1, 1, 1)
        there = torch.where(levels < here - 1e-6, levels, 0).amax(0)[..., None]
        here = here[..., None]
        x0 = x - here * pred
        if self.config.stochastic_sampling:
            return (1 - there) * x0 + there * noise(), x0
        return x + (here - there) * pred, x0


class FlowHeun(Flow, Heun):
    """Heun's method along the line: Euler's step, then the mean of both slopes; the grid has each level twice."""

    def _slope(self, x: Tensor, pred: Tensor, x0: Tensor, i: int) -> Tensor:
        return pred


class FlowLCM(Flow):
    """Luo et al. 2023 on a flow: jump to the clean sample, noise it again, and on the way enlarge it.

    `scale_factors` (Starodubcev et al. 2025) are the sizes after each step but the last, over that of the first.
    """

    first: tuple[int, ...] | None = None  # size of the first x

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        super().__init__(scheduler, grid)
        self.factors = list(self.config.scale_factors or [])
        if self.factors and len(self.factors) + 1 != len(grid.timesteps):
            raise ValueError(f"scale_factors has to have {len(grid.timesteps) - 1} numbers: one fewer than the steps.")

    def size(self, x: Tensor, i: int) -> tuple[int, ...]:
        """Of x after step i."""
        self.first = self.first or tuple(x.shape[2:])
        if i >= len(self.factors):
            return tuple(x.shape[2:])
        return tuple(round(self.factors[i] * length) for length in self.first)

    def room(self, x: Tensor, i: int) -> Tensor:
        """As large as x will be after step i."""
        return x.new_empty((*x.shape[:2], *self.size(x, i)))

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """Draws in every step, the last included."""
        x0, size = self.denoised(x, pred, i), self.size(x, i)
        if i < len(self.factors):
            x0 = torch.nn.functional.interpolate(x0, size=size, mode=self.config.upscale_mode)
        return self.renoised(x0, i + 1, noise), x0
