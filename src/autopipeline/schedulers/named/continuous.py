"""Schedulers on continuous times: those of Karras et al. 2022, and others with a formulation of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from autopipeline.config import falling
from autopipeline.schedulers import grids
from autopipeline.schedulers.grids import Array
from autopipeline.schedulers.named.keys import ENDS, THRESHOLD, Keys
from autopipeline.schedulers.named.multistep import DPMSolverMultistepScheduler
from autopipeline.schedulers.scheduler import Grid, Own, Scheduler, Steps
from autopipeline.schedulers.solvers import continuous
from autopipeline.stepping import forms

_LEVELS: Keys = dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", num_train_timesteps=1000)
_EDM = _LEVELS | dict(prediction_type="epsilon", rho=7.0)
_LATER = dict(solver_type="midpoint", lower_order_final=True, euler_at_final=False, **ENDS)


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

    defaults = _EDM | dict(solver_order=2, **THRESHOLD, algorithm_type="dpmsolver++", **_LATER)
    solver_class = continuous.EDM
    renamed = DPMSolverMultistepScheduler.renamed
    choices = _OnEDM.choices | dict(algorithm_type=("dpmsolver++", "sde-dpmsolver++"), solver_type=("midpoint", "heun"))


class EDMEulerScheduler(_OnEDM):
    """Euler's method for models in the formulation of Karras et al. 2022; own sigmas are levels, the last one too."""

    defaults = _EDM | ENDS
    solver_class = continuous.EDMEuler
    takes = ("sigmas",)


class CosineDPMSolverMultistepScheduler(EDMDPMSolverMultistepScheduler):
    """SDE-DPM-Solver++ for Stable Audio, whose network is told the angle of noise and signal."""

    defaults = (
        _LEVELS
        | dict(sigma_min=0.3, sigma_max=500, sigma_data=1.0, sigma_schedule="exponential")
        | dict(solver_order=2, prediction_type="v_prediction", rho=7.0, **_LATER)
    )
    solver_class = continuous.Cosine
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


class IPNDMScheduler(forms.IPNDM, Scheduler):
    """Improved pseudo numerical methods (Zhang & Chen 2022) on a quarter of a circle."""

    defaults: ClassVar[Mapping[str, Any]] = dict(num_train_timesteps=1000, trained_betas=None)
    solver_class = continuous.IPNDM

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """Shares of noise, and the angles that go with them, from 1 to 0; `trained_betas` are own shares of noise."""
        count, own = steps or 1, self.config.trained_betas
        if own is not None and len(own) != count + 1:
            raise ValueError(f"trained_betas has {len(own)} shares of noise; {count} steps need {count + 1}.")
        share = (torch.linspace(1, 0, count + 1) * math.pi / 2).sin() ** 2 if own is None else torch.tensor(own)
        return Grid.of(torch.atan2(share, (1 - share**2).sqrt())[:-1] / math.pi * 2, share)


class CMStochasticIterativeScheduler(Scheduler):
    """Consistency models (Song et al. 2023): one step or a few."""

    defaults: ClassVar[Mapping[str, Any]] = dict(
        num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, s_noise=1.0, rho=7.0
    ) | dict(clip_denoised=True)
    solver_class = continuous.Consistency
    takes = ("timesteps",)

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """Own timesteps count the levels of training from the noisiest."""
        config, total = self.config, self.config.num_train_timesteps
        even = np.arange(steps or 1) * (total // (steps or 1))
        rising = even if timesteps is None else np.array(timesteps)[::-1].astype(np.int64)
        levels = grids.curve("karras", config, config.sigma_max, config.sigma_min, total, config.rho)[rising]
        ends = np.append(levels, config.sigma_min)
        return Grid.of(self.sigma_to_t(levels), ends, init_noise_sigma=config.sigma_max)

    def sigma_to_t(self, sigmas: Any) -> Any:
        """What the network is told of levels of noise: 250 times the logarithm."""
        return 250 * np.log(sigmas + 1e-44)


class ScoreSdeVeScheduler(forms.ScoreSdeVe, Scheduler):  # type: ignore[override]
    """The variance-exploding diffusion of Song et al. 2021b, with predictor and corrector."""

    defaults: ClassVar[Mapping[str, Any]] = dict(
        num_train_timesteps=2000, snr=0.15, sigma_min=0.01, sigma_max=1348.0, sampling_eps=1e-5, correct_steps=1
    )
    solver_class = continuous.ScoreSdeVe

    def times(
        self, steps: Steps, timesteps: Own, sigmas: Own, *, sampling_eps: float | None = None, **extra: Any
    ) -> Grid:
        """The network is told levels, once for each evaluation; the grid's sigmas are the times from 1 to near 0."""
        config = self.config
        times = torch.linspace(1, sampling_eps or config.sampling_eps, steps or 1)
        levels = config.sigma_min * (config.sigma_max / config.sigma_min) ** times
        told = levels.repeat_interleave(config.correct_steps + 1)
        return Grid.of(told, times, steps or 1, init_noise_sigma=config.sigma_max)


class DDPMWuerstchenScheduler(Scheduler):
    """DDPM on continuous times, as Würstchen (Pernias et al. 2024) and Stable Cascade use it."""

    defaults: ClassVar[Mapping[str, Any]] = dict(scaler=1.0, s=0.008)
    solver_class = continuous.Wuerstchen
    takes = ("timesteps",)

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """Evenly from 1 to 0, or own times, the last of which is where the way ends."""
        walked = torch.linspace(1, 0, (steps or 1) + 1) if timesteps is None else torch.tensor(timesteps)
        return Grid.of(walked[:-1], walked)

    def _check_timesteps(self, own: list[float]) -> None:
        if len(own) < 2 or not falling(own, 0, 1):
            raise ValueError("Own timesteps have to be two or more times in descending order, in 1..0.")
