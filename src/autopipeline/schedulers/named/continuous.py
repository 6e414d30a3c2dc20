"""Schedulers on continuous times, each with a formulation of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from autopipeline.schedulers import grids
from autopipeline.schedulers.scheduler import Grid, Own, Scheduler, Steps, falling
from autopipeline.schedulers.solvers import continuous
from autopipeline.stepping import forms


class IPNDMScheduler(forms.Quarter, Scheduler):
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


class ScoreSdeVeScheduler(forms.PredictedAndCorrected, Scheduler):  # type: ignore[override]
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
