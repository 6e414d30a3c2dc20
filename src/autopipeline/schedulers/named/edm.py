"""Schedulers for models in the formulation of Karras et al. 2022, such as Playground 2.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from autopipeline.schedulers import grids
from autopipeline.schedulers.named.multistep import own_solver
from autopipeline.schedulers.scheduler import Grid, Scheduler
from autopipeline.schedulers.solvers import edm


class _OnEDM(Scheduler):
    """Levels of noise along a curve."""

    able: ClassVar[dict[str, tuple[str, ...]]] = dict(
        sigma_schedule=("karras", "exponential"), prediction_type=("epsilon", "v_prediction")
    )

    def check(self) -> None:
        """Known algorithms, curves and predictions, and levels that have a logarithm."""
        super().check()
        for name, values in self.able.items():
            if self.config[name] not in values:
                raise ValueError(f"{name}={self.config[name]!r} has to be {' or '.join(map(repr, values))}.")
        low, high = self.config.sigma_min, self.config.sigma_max
        if low is None or high is None or not 0 < low < high:
            raise ValueError(f"sigma_min={low} and sigma_max={high} have to be numbers with 0 < sigma_min < sigma_max.")

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
        high = config.sigma_max
        last = config.sigma_min if config.final_sigmas_type == "sigma_min" else 0.0
        if sigmas is None:
            levels = grids.curve(config.sigma_schedule, config, high, config.sigma_min, count, config.rho).tolist()
        else:
            *levels, last = sigmas
            high = levels[0]
        sigma = torch.tensor(levels, dtype=torch.float32)
        return Grid(
            timesteps=(0.25 * sigma.log()).to(device),
            sigmas=torch.cat([sigma, torch.tensor([last])]),
            steps=len(sigma),
            init_noise_sigma=(high**2 + 1) ** 0.5,
        )


class EDMDPMSolverMultistepScheduler(_OnEDM):
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
    able = _OnEDM.able | dict(algorithm_type=("dpmsolver++", "sde-dpmsolver++"), solver_type=("midpoint", "heun"))

    def _configure(self, given: Any) -> None:
        super()._configure(dict(given) | own_solver(given))


class EDMEulerScheduler(_OnEDM):
    """Euler's method for models in the formulation of Karras et al. 2022; own sigmas are levels, the last one too."""

    defaults: ClassVar[Mapping[str, Any]] = dict(
        sigma_min=0.002,
        sigma_max=80.0,
        sigma_data=0.5,
        sigma_schedule="karras",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        rho=7.0,
        final_sigmas_type="zero",
    )
    solver_class = edm.EDMEuler
    takes = ("sigmas",)
