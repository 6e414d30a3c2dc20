"""Schedulers whose times are levels of noise, told to the network as fractional steps of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from autopipeline.schedulers import grids
from autopipeline.schedulers.grids import Array
from autopipeline.schedulers.named.keys import BETAS, CURVES
from autopipeline.schedulers.scheduler import Grid, Scheduler
from autopipeline.schedulers.solvers import exploding


class _OnSigmas(Scheduler):
    """Times are levels of noise, told to the network as fractional steps of training; x is not scaled."""

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        **extra: Any,
    ) -> Grid:
        """Evenly spaced, or along a curve, or own ones."""
        product = grids.alphas_cumprod(self.config, floor=2**-24)
        training = grids.ratio(product)
        if sigmas is not None:
            levels = np.array(sigmas, dtype=np.float32)
            told = grids.to_timesteps(levels[:-1], training)
        else:
            told = np.array(timesteps, dtype=np.float32) if timesteps is not None else self._spaced(steps or 1)
            levels = np.interp(told, np.arange(len(training)), training)
            if self.config.get("interpolation_type") == "log_linear":
                levels = np.exp(np.linspace(np.log(training[-1]), np.log(training[0]), len(told) + 1))
            name = grids.curve_of(self.config)
            if name:
                levels = grids.curve(name, self.config, levels[0], levels[-1], len(told))
                told = grids.to_timesteps(levels, training)
            last = training[0] if self.config.get("final_sigmas_type") == "sigma_min" else 0.0
            levels = np.concatenate([levels, [last]])
        return self._grid(torch.from_numpy(levels.astype(np.float32)), told, steps, device)

    def _spaced(self, steps: int) -> Array:
        return grids.spaced(self.config, steps).astype(np.float32)

    def _grid(self, levels: torch.Tensor, told: Array, steps: int | None, device: Any) -> Grid:
        most = float(levels.max())
        scaled = self.config.timestep_spacing in ("linspace", "trailing")
        if self.config.get("timestep_type") == "continuous" and self.config.prediction_type == "v_prediction":
            times = 0.25 * levels[:-1].log()
        else:
            times = torch.from_numpy(told.astype(np.float32))
        return Grid(
            timesteps=times.to(device),
            sigmas=levels,
            steps=steps or len(told),
            init_noise_sigma=most if scaled else (most**2 + 1) ** 0.5,
        )


class EulerDiscreteScheduler(_OnSigmas):
    """Euler's method (Karras et al. 2022)."""

    defaults = (
        BETAS
        | dict(prediction_type="epsilon", interpolation_type="linear")
        | CURVES
        | dict(
            sigma_min=None,
            sigma_max=None,
            timestep_spacing="linspace",
            timestep_type="discrete",
            steps_offset=0,
            rescale_betas_zero_snr=False,
            final_sigmas_type="zero",
        )
    )
    solver_class = exploding.Euler
    takes = ("timesteps", "sigmas")

    def _check_timesteps(self, own: list[float]) -> None:
        super()._check_timesteps(own)
        if self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction":
            raise ValueError("Own timesteps are steps of training, which timestep_type='continuous' does not have.")


class EulerAncestralDiscreteScheduler(_OnSigmas):
    """Euler's method with fresh noise in every step."""

    defaults = BETAS | dict(
        prediction_type="epsilon", timestep_spacing="linspace", steps_offset=0, rescale_betas_zero_snr=False
    )
    solver_class = exploding.EulerAncestral


class HeunDiscreteScheduler(_OnSigmas):
    """Heun's method (Karras et al. 2022): two evaluations a step."""

    defaults = (
        BETAS
        | dict(beta_start=0.00085, beta_end=0.012, prediction_type="epsilon")
        | CURVES
        | dict(clip_sample=False, clip_sample_range=1.0, timestep_spacing="linspace", steps_offset=0)
    )
    solver_class = exploding.Heun
    order = 2
    takes = ("timesteps",)

    def _grid(self, levels: torch.Tensor, told: Array, steps: int | None, device: Any) -> Grid:
        twice = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
        return super()._grid(twice, np.concatenate([told[:1], told[1:].repeat(2)]), steps or len(told), device)
