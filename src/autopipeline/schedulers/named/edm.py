"""Schedulers for models in the formulation of Karras et al. 2022, such as Playground 2.5."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from autopipeline.schedulers import grids
from autopipeline.schedulers.named.multistep import own_solver
from autopipeline.schedulers.scheduler import Grid, Scheduler
from autopipeline.schedulers.solvers import edm


class EDMDPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++ for models in the formulation of Karras et al. 2022, such as Playground 2.5."""

    defaults: ClassVar[Mapping[str, Any]] = dict(
        sigma_min=0.002,
        sigma_max=80.0,
        sigma_data=0.5,
        sigma_schedule="karras",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        rho=7.0,
        solver_order=2,
        thresholding=False,
        dynamic_thresholding_ratio=0.995,
        sample_max_value=1.0,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        lower_order_final=True,
        euler_at_final=False,
        final_sigmas_type="zero",
    )
    solver_class = edm.EDM

    def _configure(self, given: Any) -> None:
        own = {key: value for key, value in own_solver(given).items() if key in self.defaults}
        super()._configure(dict(given) | own)

    def check(self) -> None:
        """Known algorithms, curves and predictions."""
        super().check()
        able = {
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "solver_type": ("midpoint", "heun"),
            "sigma_schedule": ("karras", "exponential"),
            "prediction_type": ("epsilon", "v_prediction"),
            "final_sigmas_type": ("zero", "sigma_min"),
        }
        for name, values in able.items():
            if name in self.defaults and self.config[name] not in values:
                raise ValueError(f"{name}={self.config[name]!r} has to be {' or '.join(map(repr, values))}.")

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        **extra: Any,
    ) -> Grid:
        """Sigmas along the curve."""
        config, count = self.config, steps or 1
        sigma = self._levels(count)
        last = config.sigma_min if config.final_sigmas_type == "sigma_min" else 0.0
        return Grid(
            timesteps=self._told(sigma).to(device),
            sigmas=torch.cat([sigma, torch.tensor([last])]),
            steps=count,
            init_noise_sigma=(config.sigma_max**2 + 1) ** 0.5,
        )

    def _levels(self, count: int) -> Tensor:
        config = self.config
        levels = grids.curve(config.sigma_schedule, config, config.sigma_max, config.sigma_min, count, config.rho)
        return torch.from_numpy(levels.astype(np.float32))

    def _told(self, sigma: Tensor) -> Tensor:
        """What the network is told: a quarter of the logarithm."""
        return 0.25 * sigma.log()


class CosineDPMSolverMultistepScheduler(EDMDPMSolverMultistepScheduler):
    """SDE-DPM-Solver++ for Stable Audio, whose network is told the angle of noise and signal."""

    defaults: ClassVar[Mapping[str, Any]] = dict(
        sigma_min=0.3,
        sigma_max=500,
        sigma_data=1.0,
        sigma_schedule="exponential",
        num_train_timesteps=1000,
        solver_order=2,
        prediction_type="v_prediction",
        rho=7.0,
        solver_type="midpoint",
        lower_order_final=True,
        euler_at_final=False,
        final_sigmas_type="zero",
    )
    solver_class = edm.Cosine

    def check(self) -> None:
        """Orders 1 and 2."""
        super().check()
        if self.config.solver_order not in (1, 2):
            raise ValueError(f"solver_order={self.config.solver_order} has to be 1 or 2.")

    def _levels(self, count: int) -> Tensor:
        """In float32 all the way: the noise of the path depends on every digit."""
        low, high, rho = self.config.sigma_min, self.config.sigma_max, self.config.rho
        if self.config.sigma_schedule == "exponential":
            return torch.linspace(math.log(low), math.log(high), count).exp().flip(0)
        ends = low ** (1 / rho), high ** (1 / rho)
        return (ends[1] + torch.linspace(0, 1, count) * (ends[0] - ends[1])) ** rho

    def _told(self, sigma: Tensor) -> Tensor:
        return sigma.atan() / math.pi * 2

    def solver(self, grid: Grid, *, eta: float = 0.0, seed: int | Sequence[int] | None = None) -> edm.Cosine:
        """A solver for one run; see `edm.Cosine` for the seed."""
        super().solver(grid, eta=eta)
        return edm.Cosine(self, grid, seed)
