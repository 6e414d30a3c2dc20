"""Schedulers whose times are steps of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from autopipeline.schedulers import grids
from autopipeline.schedulers.named.keys import BETAS, THRESHOLD
from autopipeline.schedulers.scheduler import Grid, Scheduler, Solver
from autopipeline.schedulers.solvers import discrete


class _OnTrainingSteps(Scheduler):
    """Times are steps of training."""

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        **extra: Any,
    ) -> Grid:
        """Whole steps, evenly spaced."""
        own = timesteps if timesteps is not None else grids.spaced(self.config, steps or 1).round()
        whole = torch.from_numpy(np.array(own).astype(np.int64))
        return Grid(timesteps=whole.to(device), steps=steps or len(whole))


class DDIMScheduler(_OnTrainingSteps):
    """Denoising diffusion implicit models (Song et al. 2021)."""

    defaults = (
        BETAS
        | dict(clip_sample=True, set_alpha_to_one=True, steps_offset=0, prediction_type="epsilon")
        | THRESHOLD
        | dict(clip_sample_range=1.0, sample_max_value=1.0, timestep_spacing="leading", rescale_betas_zero_snr=False)
    )
    takes_eta = True

    def solver(self, grid: Grid, *, eta: float = 0.0, **options: Any) -> Solver:
        """A solver for one run; eta in 0..1."""
        made = discrete.DDIM(self, grid)
        made.eta = eta
        return made


class DDPMScheduler(_OnTrainingSteps):
    """Denoising diffusion probabilistic models (Ho et al. 2020)."""

    defaults = (
        BETAS
        | dict(variance_type="fixed_small", clip_sample=True, prediction_type="epsilon")
        | THRESHOLD
        | dict(
            clip_sample_range=1.0,
            sample_max_value=1.0,
            timestep_spacing="leading",
            steps_offset=0,
            rescale_betas_zero_snr=False,
        )
    )
    solver_class = discrete.DDPM
    takes = ("timesteps",)

    def times_at(self, timestep: float) -> list[float]:
        """The time and the one after it."""
        after = int(self.previous_timestep(timestep))
        return [timestep, after] if after >= 0 else [timestep]


class PNDMScheduler(Scheduler):
    """Pseudo numerical methods (Liu et al. 2022)."""

    defaults = BETAS | dict(
        skip_prk_steps=False,
        set_alpha_to_one=False,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=0,
    )
    solver_class = discrete.PNDM
    pndm_order = 4

    def locate(self, timestep: Any) -> tuple[Solver, int]:
        """At the time it is told; what was said before counts."""
        solver = self.walk.solver
        assert isinstance(solver, discrete.PNDM)
        solver.times.append(int(timestep))
        return solver, len(solver.times) - 1

    @property
    def prk_timesteps(self) -> torch.Tensor:
        """Times of the Runge-Kutta start."""
        return self.timesteps[: 0 if self.config.skip_prk_steps else 12]

    @property
    def plms_timesteps(self) -> torch.Tensor:
        """Times of the linear multistep method."""
        return self.timesteps[len(self.prk_timesteps) :]

    def step_prk(self, *args: Any, **keywords: Any) -> Any:
        """A step of the Runge-Kutta start, whatever was before."""
        return self._step_as(12, *args, **keywords)

    def step_plms(self, *args: Any, **keywords: Any) -> Any:
        """A step of the linear multistep method; the start has to be over."""
        if not self.config.skip_prk_steps and not self.ets:
            raise ValueError("PNDMScheduler with Runge-Kutta steps begins with step_prk.")
        return self._step_as(0, *args, **keywords)

    def _step_as(self, start: int, *args: Any, **keywords: Any) -> Any:
        solver = self.walk.solver
        assert isinstance(solver, discrete.PNDM)
        usual, solver.start = solver.start, solver.count + start
        result = self.step(*args, **keywords)
        solver.start = usual
        return result

    @property
    def ets(self) -> list[torch.Tensor]:
        """What the network said in the last steps."""
        return self.walk.solver.seen  # type: ignore[attr-defined]

    @ets.setter
    def ets(self, seen: list[torch.Tensor]) -> None:
        self.walk.solver.seen = seen  # type: ignore[attr-defined]

    def check(self) -> None:
        """Only predictions of noise or velocity."""
        super().check()
        if self.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"PNDMScheduler can't take prediction_type={self.config.prediction_type!r}.")

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
        **extra: Any,
    ) -> Grid:
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
        return Grid(timesteps=torch.from_numpy(falling.astype(np.int64).copy()).to(device), steps=steps)


class LCMScheduler(Scheduler):
    """Latent consistency models (Luo et al. 2023): a few of the steps that the model was distilled on."""

    defaults = (
        BETAS
        | dict(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            original_inference_steps=50,
            clip_sample=False,
            clip_sample_range=1.0,
            set_alpha_to_one=True,
            steps_offset=0,
            prediction_type="epsilon",
        )
        | THRESHOLD
        | dict(sample_max_value=1.0, timestep_spacing="leading", timestep_scaling=10.0, rescale_betas_zero_snr=False)
    )
    solver_class = discrete.LCM
    takes = ("timesteps",)

    def times(
        self,
        steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        device: Any,
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
            kept = max(len(timesteps) - min(int(len(timesteps) * strength), len(timesteps)), 0)
            falling = np.array(list(timesteps)[kept:])
        else:
            distilled = np.arange(1, int(original * strength) + 1)[::-1] * (total // original) - 1
            if not 1 <= (steps or 1) <= len(distilled):
                raise ValueError(
                    f"num_inference_steps={steps} has to be at most {len(distilled)}: "
                    f"original_inference_steps={original} times strength={strength}."
                )
            chosen = np.floor(np.linspace(0, len(distilled), steps or 1, endpoint=False)).astype(np.int64)
            falling = distilled[chosen]
        return Grid(timesteps=torch.from_numpy(falling.astype(np.int64)).to(device), steps=len(falling))
