"""Solvers for the preconditioning of Karras et al. 2022, table 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopipeline.schedulers.parameterisation import limited
from autopipeline.schedulers.scheduler import Grid, Noise, Scheduler
from autopipeline.schedulers.solvers import multistep
from autopipeline.schedulers.solvers.brownian import BrownianNoise


class EDM(multistep.DPMSolver):
    """DPM-Solver++ over x with all of its signal, in the preconditioning of Karras et al. 2022, table 1."""

    def level(self, i: int) -> tuple[Tensor, Tensor]:
        """All of the signal."""
        return torch.tensor(1.0), self.grid.sigmas[i]  # type: ignore[index]

    def scale(self, x: Tensor, i: int) -> Tensor:
        """To unit variance, for data of the standard deviation sigma_data."""
        return x / (self.level(i)[1] ** 2 + self.config.sigma_data**2).sqrt().to(x)

    def converted(self, x: Tensor, pred: Tensor, i: int, as_clean: bool) -> tuple[Tensor, Tensor]:
        """The clean sample: a share of x, and what the network says of the rest."""
        sigma, data = self.level(i)[1], self.config.sigma_data
        size = (sigma**2 + data**2).sqrt()
        sign = -1.0 if self.config.prediction_type == "v_prediction" else 1.0
        x0 = (data / size).to(x) ** 2 * x + (sign * sigma * data / size).to(x) * pred
        x0 = limited(self.config, x0)
        return x0, x0


class Cosine(EDM):
    """SDE-DPM-Solver++ with noise along a Brownian path.

    `seed` is that of the path, or a list with one for each sample; the reference implementation takes the generator's
    `initial_seed()`. Without it, the first draw of the run's noise decides: the same generator gives the same sample.
    """

    def __init__(self, scheduler: Scheduler, grid: Grid, seed: int | Sequence[int] | None = None) -> None:
        super().__init__(scheduler, grid)
        self.seed, self.path = seed, None

    @property
    def kind(self) -> str:
        """The one algorithm."""
        return "sde-dpmsolver++"

    def drawn(self, i: int, noise: Noise) -> Tensor:
        """The path's increment from grid index i to the next."""
        if self.path is None:
            x, config = noise(), self.config
            seed = int(x.flatten()[0].double().view(torch.int64)) & (2**63 - 1) if self.seed is None else self.seed
            self.path: BrownianNoise | None = BrownianNoise(x, config.sigma_min, config.sigma_max, seed)
        return self.path(self.level(i)[1], self.level(i + 1)[1])
