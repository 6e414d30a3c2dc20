"""Solvers for the preconditioning of Karras et al. 2022, table 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autopipeline.schedulers.parameterisation import limited
from autopipeline.schedulers.scheduler import Noise
from autopipeline.schedulers.solvers import exploding, multistep
from autopipeline.schedulers.solvers.brownian import BrownianNoise


def preconditioned(config: Mapping[str, Any], x: Tensor, pred: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample: a share of x, and what the network says of the rest."""
    data = config["sigma_data"]
    size = (sigma**2 + data**2).sqrt()
    sign = -1.0 if config["prediction_type"] == "v_prediction" else 1.0
    return (data / size).to(x) ** 2 * x + (sign * sigma * data / size).to(x) * pred


def unit(x: Tensor, sigma: Tensor, data: float) -> Tensor:
    """X at unit variance, for data of the standard deviation sigma_data."""
    return x / (sigma**2 + data**2).sqrt().to(x)


class EDM(multistep.DPMSolver):
    """DPM-Solver++ over x with all of its signal, in the preconditioning of Karras et al. 2022, table 1."""

    def level(self, i: int) -> tuple[Tensor, Tensor]:
        """All of the signal."""
        return torch.tensor(1.0), self.grid.sigmas[i]  # type: ignore[index]

    def scale(self, x: Tensor, i: int) -> Tensor:
        """To unit variance."""
        return unit(x, self.level(i)[1], self.config.sigma_data)

    def converted(self, x: Tensor, pred: Tensor, i: int, as_clean: bool) -> tuple[Tensor, Tensor]:
        """The clean sample, within its limits."""
        x0 = limited(self.config, preconditioned(self.config, x, pred, self.level(i)[1]))
        return x0, x0


class EDMEuler(exploding.Churned):
    """Euler's method in the preconditioning of Karras et al. 2022, table 1."""

    def scale(self, x: Tensor, i: int) -> Tensor:
        """To unit variance."""
        return unit(x, self.sigma(i), self.config.sigma_data)

    def _cleaned(self, x: Tensor, pred: Tensor, here: Tensor, above: Tensor) -> Tensor:
        return preconditioned(self.config, x, pred, above)


class Cosine(EDM):
    """SDE-DPM-Solver++ with noise along a Brownian path.

    Option: `seed`, that of the path, or a list with one for each sample; the reference implementation takes the
    generator's `initial_seed()`. Without it, the first draw of the run's noise decides.
    """

    fixed = EDM.fixed | dict(algorithm_type="sde-dpmsolver++")
    options = ("seed",)
    seed: int | Sequence[int] | None = None
    path: BrownianNoise | None = None

    def drawn(self, i: int, noise: Noise) -> Tensor:
        """The path's increment from grid index i to the next."""
        if self.path is None:
            self.path = BrownianNoise(noise, self.config.sigma_min, self.config.sigma_max, self.seed)
        return self.path(self.level(i)[1], self.level(i + 1)[1])
