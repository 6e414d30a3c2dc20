"""Schedulers for models in the formulation of Karras et al. 2022, such as Playground 2.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

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
        super()._configure(dict(given) | own_solver(given))

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
            if self.config[name] not in values:
                raise ValueError(f"{name}={self.config[name]!r} has to be {' or '.join(map(repr, values))}.")

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        **extra: Any,
    ) -> Grid:
        """Sigmas along the curve; the network is told a quarter of their logarithm."""
        config, count = self.config, steps or 1
        levels = grids.curve(config.sigma_schedule, config, config.sigma_max, config.sigma_min, count, config.rho)
        sigma = torch.from_numpy(levels.astype(np.float32))
        last = config.sigma_min if config.final_sigmas_type == "sigma_min" else 0.0
        return Grid(
            timesteps=(0.25 * sigma.log()).to(device),
            sigmas=torch.cat([sigma, torch.tensor([last])]),
            steps=count,
            init_noise_sigma=(config.sigma_max**2 + 1) ** 0.5,
        )
