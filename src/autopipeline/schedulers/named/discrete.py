"""Schedulers whose times are steps of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from autopipeline.schedulers import grids
from autopipeline.schedulers.grids import Array
from autopipeline.schedulers.named.keys import BETAS, LATENT, LEADING, LINEAR, RESCALED, THRESHOLD, Keys
from autopipeline.schedulers.scheduler import Grid, Own, Scheduler, Steps
from autopipeline.schedulers.solvers import discrete
from autopipeline.stepping import forms

_LIMITS: Keys = dict(thresholding=False, dynamic_thresholding_ratio=0.995, clip_sample_range=1.0, sample_max_value=1.0)
_DDIM: Keys = dict(set_alpha_to_one=True, steps_offset=0, prediction_type="epsilon")


class _OnTrainingSteps(Scheduler):
    """Times are steps of training."""

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """Whole steps, evenly spaced."""
        own = timesteps if timesteps is not None else grids.spaced(self.config, steps or 1).round()
        return Grid.of(own, steps=steps, whole=True)


class DDIMScheduler(_OnTrainingSteps):
    """Denoising diffusion implicit models (Song et al. 2021)."""

    defaults = BETAS | dict(clip_sample=True, **_DDIM, **_LIMITS, timestep_spacing="leading", **RESCALED)
    solver_class = discrete.DDIM
    takes_eta = True


class CogVideoXDDIMScheduler(_OnTrainingSteps):
    """DDIM with less signal at each step than the betas say (Zheng et al. 2024)."""

    defaults = (
        LATENT
        | dict(beta_schedule="scaled_linear", clip_sample=True, **_DDIM, clip_sample_range=1.0, sample_max_value=1.0)
        | dict(timestep_spacing="leading", **RESCALED, snr_shift_scale=3.0)
    )
    solver_class = discrete.CogVideoXDDIM


class CogVideoXDPMScheduler(forms.CogVideoXDPM, CogVideoXDDIMScheduler):  # type: ignore[reportIncompatibleMethodOverride]
    """SDE-DPM-Solver++ (Lu et al. 2022b) on the same steps; scripts tell a step what the one before gave."""

    solver_class = discrete.CogVideoXDPM


class DDPMScheduler(_OnTrainingSteps):
    """Denoising diffusion probabilistic models (Ho et al. 2020)."""

    defaults = BETAS | dict(
        variance_type="fixed_small", clip_sample=True, prediction_type="epsilon", **_LIMITS, **LEADING, **RESCALED
    )
    solver_class = discrete.DDPM
    takes = ("timesteps",)


class DDIMParallelScheduler(forms.RowByRow, DDIMScheduler):
    """DDIM for parallel sampling (Shih et al. 2023), where the rows of a batch stand at times of their own."""


class DDPMParallelScheduler(forms.RowByRow, DDPMScheduler):
    """DDPM for parallel sampling (Shih et al. 2023), where the rows of a batch stand at times of their own."""

    row_solver = discrete.DDPMParallel


class DDIMInverseScheduler(_OnTrainingSteps):
    """DDIM backwards: from a picture to the noise that leads to it (Song et al. 2021, section 5.4)."""

    defaults = BETAS | dict(clip_sample=True, **_DDIM, clip_sample_range=1.0, timestep_spacing="leading", **RESCALED)
    also = tuple(THRESHOLD)
    solver_class = discrete.DDIMInverse
    choices = Scheduler.choices | dict(timestep_spacing=("leading", "trailing"))

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """The times of DDIM, rising."""
        grid = super().times(steps, timesteps, sigmas)
        if self.config.prediction_type == "sample" and self.config.set_alpha_to_one:
            raise ValueError("prediction_type='sample' tells no noise in a clean x; use set_alpha_to_one=False.")
        return replace(grid, timesteps=grid.timesteps.flip(0))


class UnCLIPScheduler(forms.UnCLIP, Scheduler):
    """DDPM as unCLIP and Kandinsky use it (Ramesh et al. 2022)."""

    defaults: ClassVar[Mapping[str, Any]] = dict(
        num_train_timesteps=1000, variance_type="fixed_small_log", clip_sample=True, clip_sample_range=1.0
    ) | dict(prediction_type="epsilon", beta_schedule="squaredcos_cap_v2")
    solver_class = discrete.UnCLIP
    choices = Scheduler.choices | dict(
        variance_type=("fixed_small_log", "learned_range"),
        prediction_type=("epsilon", "sample"),
        beta_schedule=("squaredcos_cap_v2",),
    )

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """From the last step of training to the first."""
        if steps == 1 and self.config.num_train_timesteps > 1:
            raise ValueError("UnCLIPScheduler needs 2 steps or more: it takes the last of training and the first.")
        even = grids.spaced({**self.config, "timestep_spacing": "linspace"}, steps or 1)
        return Grid.of(even.round(), whole=True)


class RePaintScheduler(Scheduler):
    """RePaint (Lugmayr et al. 2022): inpainting that goes back to noise again and again."""

    defaults = LINEAR | dict(eta=0.0, trained_betas=None, clip_sample=True)
    solver_class = discrete.RePaint
    takes_eta = True

    def times(
        self, steps: Steps, timesteps: Own, sigmas: Own, *, jump_length: int = 10, jump_n_sample: int = 10, **_: Any
    ) -> Grid:
        """Every `jump_length` steps are walked `jump_n_sample` times; the ways back take no evaluation."""
        if jump_length < 1 or jump_n_sample < 1:
            raise ValueError("jump_length and jump_n_sample have to be 1 or more.")
        count = steps or 1
        left = dict.fromkeys(range(0, count - jump_length, jump_length), jump_n_sample - 1)
        walked, t = [], count
        while t > 0:
            t -= 1
            walked.append(t)
            if left.get(t, 0) > 0:
                left[t] -= 1
                t += jump_length
        return Grid.of(np.array(walked) * (self.config.num_train_timesteps // count), steps=count, whole=True)


class PNDMScheduler(forms.PNDM, Scheduler):
    """Pseudo numerical methods (Liu et al. 2022)."""

    defaults = BETAS | dict(skip_prk_steps=False, set_alpha_to_one=False, prediction_type="epsilon", **LEADING)
    solver_class = discrete.PNDM
    choices = Scheduler.choices | dict(prediction_type=("epsilon", "v_prediction"))

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """The second time is done twice; with a Runge-Kutta start, the first three steps take four evaluations."""
        steps = steps or 1
        rising = grids.spaced(self.config, steps).round()[::-1]
        if self.config.skip_prk_steps:
            falling = np.concatenate([rising[:-1], rising[-2:-1], rising[-1:]])[::-1]
        else:
            if steps < 4:
                raise ValueError("PNDMScheduler with Runge-Kutta steps needs at least 4 steps.")
            half = self.config.num_train_timesteps // steps // 2
            pairs = np.stack([rising[-4:], rising[-4:] + half], 1).reshape(-1)
            start = pairs[:-1].repeat(2)[1:-1][::-1]
            falling = np.concatenate([start, rising[:-3][::-1]])
        return Grid.of(falling, steps=steps, whole=True)


class LCMScheduler(Scheduler):
    """Latent consistency models (Luo et al. 2023): a few of the steps that the model was distilled on."""

    defaults = (
        LATENT
        | dict(beta_schedule="scaled_linear", original_inference_steps=50, clip_sample=False, clip_sample_range=1.0)
        | dict(**_DDIM, **THRESHOLD, timestep_spacing="leading", timestep_scaling=10.0, **RESCALED)
    )
    solver_class = discrete.LCM
    takes = ("timesteps",)

    def times(
        self,
        steps: Steps,
        timesteps: Own,
        sigmas: Own,
        *,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
        **extra: Any,
    ) -> Grid:
        """`original_inference_steps`: of the distillation; `strength`: the share of them to choose from."""
        total = self.config.num_train_timesteps
        original = original_inference_steps or self.config.original_inference_steps
        if original > total:
            raise ValueError(f"original_inference_steps={original} has to be at most {total}.")
        if timesteps is not None:
            kept = len(timesteps) - min(int(len(timesteps) * strength), len(timesteps))
            return Grid.of(timesteps[kept:], whole=True)
        distilled = self._distilled(original_inference_steps, original, strength)
        if not 1 <= (steps or 1) <= len(distilled):
            raise ValueError(
                f"num_inference_steps={steps} has to be at most {len(distilled)}: "
                f"original_inference_steps={original} times strength={strength}."
            )
        chosen = np.floor(np.linspace(0, len(distilled), steps or 1, endpoint=False)).astype(np.int64)
        return Grid.of(distilled[chosen], whole=True)

    def _distilled(self, asked: int | None, original: int, strength: float) -> Array:
        """Steps of training to choose from, falling."""
        return np.arange(1, int(original * strength) + 1)[::-1] * (self.config.num_train_timesteps // original) - 1


class TCDScheduler(LCMScheduler):
    """Trajectory consistency distillation (Zheng et al. 2024): a few steps, as detailed as eta says."""

    solver_class = discrete.TCD
    takes_eta = True

    def _distilled(self, asked: int | None, original: int, strength: float) -> Array:
        """All of training where `original_inference_steps` is asked for."""
        if asked is None:
            return super()._distilled(asked, original, strength)
        return np.arange(int(self.config.num_train_timesteps * strength))[::-1]
