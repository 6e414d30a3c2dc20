"""Schedulers for models in the formulation of Karras et al. 2022, such as Playground 2.5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from autopipeline.schedulers import grids
from autopipeline.schedulers.grids import Array
from autopipeline.schedulers.named.keys import THRESHOLD
from autopipeline.schedulers.named.multistep import DPMSolverMultistepScheduler
from autopipeline.schedulers.scheduler import Grid, Own, Scheduler, Steps
from autopipeline.schedulers.solvers import edm

_EDM = dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", num_train_timesteps=1000)
_LATER = dict(solver_type="midpoint", lower_order_final=True, euler_at_final=False, final_sigmas_type="zero")


class _OnEDM(Scheduler):
    """Levels of noise along a curve."""

    choices = Scheduler.choices | dict(
        sigma_schedule=("karras", "exponential"), prediction_type=("epsilon", "v_prediction")
    )

    def check(self) -> None:
        """Levels that have a logarithm."""
        super().check()
        low, high = self.config.sigma_min, self.config.sigma_max
        if low is None or high is None or not 0 < low < high:
            raise ValueError(f"sigma_min={low} and sigma_max={high} have to be numbers with 0 < sigma_min < sigma_max.")

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """Sigmas along the curve, or own ones."""
        last = self.config.sigma_min if self.config.final_sigmas_type == "sigma_min" else 0.0
        levels, high = self._levels(steps or 1), self.config.sigma_max
        if sigmas is not None:
            levels, last, high = np.array(sigmas[:-1], dtype=np.float32), sigmas[-1], sigmas[0]
        return Grid.of(self._told(levels), np.append(levels, last), init_noise_sigma=(high**2 + 1) ** 0.5)

    def _levels(self, count: int) -> Array:
        config = self.config
        levels = grids.curve(config.sigma_schedule, config, config.sigma_max, config.sigma_min, count, config.rho)
        return levels.astype(np.float32)

    def _told(self, sigma: Array) -> Array:
        """What the network is told: a quarter of the logarithm."""
        return 0.25 * np.log(sigma)


class EDMDPMSolverMultistepScheduler(_OnEDM):
    """DPM-Solver++ for models in the formulation of Karras et al. 2022, such as Playground 2.5."""

    defaults: ClassVar[Mapping[str, Any]] = (
        _EDM
        | dict(prediction_type="epsilon", rho=7.0, solver_order=2, **THRESHOLD, sample_max_value=1.0)
        | dict(algorithm_type="dpmsolver++", **_LATER)
    )
    solver_class = edm.EDM
    renamed = DPMSolverMultistepScheduler.renamed
    choices = _OnEDM.choices | dict(algorithm_type=("dpmsolver++", "sde-dpmsolver++"), solver_type=("midpoint", "heun"))


class EDMEulerScheduler(_OnEDM):
    """Euler's method for models in the formulation of Karras et al. 2022; own sigmas are levels, the last one too."""

    defaults = _EDM | dict(prediction_type="epsilon", rho=7.0, final_sigmas_type="zero")
    solver_class = edm.EDMEuler
    takes = ("sigmas",)


class CosineDPMSolverMultistepScheduler(EDMDPMSolverMultistepScheduler):
    """SDE-DPM-Solver++ for Stable Audio, whose network is told the angle of noise and signal."""

    defaults = (
        _EDM
        | dict(sigma_min=0.3, sigma_max=500, sigma_data=1.0, sigma_schedule="exponential")
        | dict(solver_order=2, prediction_type="v_prediction", rho=7.0, **_LATER)
    )
    solver_class = edm.Cosine
    choices = EDMDPMSolverMultistepScheduler.choices | dict(solver_order=(1, 2))

    def _levels(self, count: int) -> Array:
        """In float32 all the way: the noise of the path depends on every digit."""
        low, high, rho = self.config.sigma_min, self.config.sigma_max, self.config.rho
        if self.config.sigma_schedule == "exponential":
            return torch.linspace(math.log(low), math.log(high), count).exp().flip(0).numpy()
        ends = low ** (1 / rho), high ** (1 / rho)
        return ((ends[1] + torch.linspace(0, 1, count) * (ends[0] - ends[1])) ** rho).numpy()

    def _told(self, sigma: Array) -> Array:
        return np.arctan(sigma) / math.pi * 2
