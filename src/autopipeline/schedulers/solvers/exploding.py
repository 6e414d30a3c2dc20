"""Solvers on levels of noise; x is the clean sample plus sigma times noise."""

from __future__ import annotations

import torch
from torch import Tensor

from autopipeline.schedulers.parameterisation import clean, limited
from autopipeline.schedulers.scheduler import Noise, Solver

Pair = tuple[Tensor, Tensor]


class Exploding(Solver):
    """On sigmas; x is the clean sample plus sigma times noise, and scaled only for the network."""

    def sigma(self, i: int) -> Tensor:
        """Noise at index i."""
        return self.grid.sigmas[i]  # type: ignore[index]

    def level(self, i: int) -> Pair:
        """All of the signal."""
        return torch.tensor(1.0), self.sigma(i)

    def scale(self, x: Tensor, i: int) -> Tensor:
        """To unit variance."""
        return x / (self.sigma(i) ** 2 + 1).sqrt().to(x)

    def denoised(self, x: Tensor, pred: Tensor, i: int) -> Tensor:
        """The clean sample."""
        return limited(self.config, clean(self.config, x, pred, *(v.to(x) for v in self.level(i))))


class Euler(Exploding):
    """Karras et al. 2022, algorithm 2 without churn."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Along the tangent."""
        here, there = self.sigma(i).to(x), self.sigma(i + 1).to(x)
        x0 = clean(self.config, x, pred, torch.ones_like(here), here)
        return x + (x - x0) / here * (there - here), x0


class EulerAncestral(Exploding):
    """Euler's step to a lower level, and noise up to the next one (Song et al. 2021b; k-diffusion)."""

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draws in every step, the last included."""
        here, there = self.sigma(i), self.sigma(i + 1)
        up = (there**2 * (here**2 - there**2) / here**2).sqrt()
        down = (there**2 - up**2).sqrt()
        x0 = clean(self.config, x, pred, torch.ones_like(here).to(x), here.to(x))
        return x + (x - x0) / here.to(x) * (down - here).to(x) + noise() * up.to(x), x0


class Heun(Exploding):
    """Karras et al. 2022, algorithm 1: Euler's step, then the mean of both slopes; the grid has each level twice."""

    held: tuple[Tensor, Tensor, Tensor] | None = None  # x, slope, width of the first half

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> tuple[Tensor, Tensor]:
        """One half of a step."""
        here = self.sigma(i).to(x)
        x0 = self.denoised(x, pred, i)
        slope = (x - x0) / here
        if self.held is None:
            width = self.sigma(i + 1).to(x) - here
            self.held = (x, slope, width)
            return x + slope * width, x0
        begun, before, width = self.held
        self.held = None
        return begun + (before + slope) / 2 * width, x0
