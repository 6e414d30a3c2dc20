"""Schedulers whose times are levels of noise, told to the network as fractional steps of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from autopipeline.schedulers import grids
from autopipeline.schedulers.grids import Array, twice
from autopipeline.schedulers.named.keys import BETAS, CURVES, ENDS, LATENT, RESCALED, SPACED, SPACING
from autopipeline.schedulers.scheduler import Grid, Own, Scheduler, Steps
from autopipeline.schedulers.solvers import exploding, multistep


class _OnSigmas(Scheduler):
    """Times are levels of noise, told to the network as fractional steps of training; x is not scaled."""

    rounds: ClassVar[str | None] = None  # the curve whose times are whole
    choices = Scheduler.choices | dict(prediction_type=("epsilon", "sample", "v_prediction"))

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """Evenly spaced, or along a curve, or own ones."""
        own = self.own
        training = grids.ratio(grids.alphas_cumprod(own, floor=2**-24))
        if sigmas is not None:
            levels = np.array(sigmas, dtype=np.float32)
            told = grids.to_timesteps(levels[:-1], training)
        else:
            told = np.array(timesteps, dtype=np.float32) if timesteps is not None else self._spaced(steps or 1)
            levels = np.interp(told, np.arange(len(training)), training)
            if own.get("interpolation_type") == "log_linear":
                levels = np.exp(np.linspace(np.log(training[-1]), np.log(training[0]), len(told) + 1))
            if name := grids.curve_of(own):
                levels = grids.curve(name, self.config, levels[0], levels[-1], len(told))
                told = grids.to_timesteps(levels, training)
                told = told.round() if name == self.rounds else told
            levels = np.append(levels, training[0] if own.get("final_sigmas_type") == "sigma_min" else 0.0)
        steps, most = steps or len(told), float(levels.astype(np.float32).max())
        scaled = own.timestep_spacing in ("linspace", "trailing")
        levels, told = self._walked(levels.astype(np.float32), told, training, steps)
        return Grid.of(told, levels, steps, init_noise_sigma=most if scaled else (most**2 + 1) ** 0.5)

    def _spaced(self, steps: int) -> Array:
        return grids.spaced(self.config, steps).astype(np.float32)

    def _walked(self, levels: Array, told: Array, training: Array, steps: int) -> tuple[Array, Array]:
        """Levels and times as they are walked, from the ends of the steps."""
        return levels, told


class EulerDiscreteScheduler(_OnSigmas):
    """Euler's method (Karras et al. 2022)."""

    defaults = (
        BETAS
        | dict(prediction_type="epsilon", interpolation_type="linear", **CURVES, sigma_min=None, sigma_max=None)
        | dict(timestep_spacing="linspace", timestep_type="discrete", steps_offset=0, **RESCALED, **ENDS)
    )
    solver_class = exploding.Euler
    takes = ("timesteps", "sigmas")
    choices = _OnSigmas.choices | dict(prediction_type=("epsilon", "sample", "original_sample", "v_prediction"))

    @property
    def _continuous(self) -> bool:
        """Whether the network is told a quarter of the level's logarithm."""
        return self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction"

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """Evenly spaced, or along a curve, or own ones; as the network is to be told."""
        grid = super().times(steps, timesteps, sigmas, **extra)
        return replace(grid, timesteps=0.25 * grid.levels[:-1].log()) if self._continuous else grid

    def _check_timesteps(self, own: list[float]) -> None:
        super()._check_timesteps(own)
        if self._continuous:
            raise ValueError("Own timesteps are steps of training, which timestep_type='continuous' does not have.")


class EulerAncestralDiscreteScheduler(_OnSigmas):
    """Euler's method with fresh noise in every step."""

    defaults = BETAS | dict(prediction_type="epsilon", **SPACED)
    solver_class = exploding.EulerAncestral


class LMSDiscreteScheduler(_OnSigmas):
    """Linear multistep (Adams-Bashforth on uneven levels; k-diffusion): slopes of up to four steps."""

    defaults = BETAS | dict(**CURVES, prediction_type="epsilon", **SPACING)
    solver_class = exploding.LMS


class DPMPP3MSDEScheduler(_OnSigmas):
    """DPM-Solver++ as an SDE that remembers three steps, as k-diffusion's sample_dpmpp_3m_sde, with plain noise."""

    defaults = LATENT | dict(**CURVES, prediction_type="epsilon", **SPACING)
    solver_class = multistep.DPMPP3MSDE


class HeunDiscreteScheduler(_OnSigmas):
    """Heun's method (Karras et al. 2022): two evaluations a step."""

    defaults = LATENT | dict(prediction_type="epsilon", **CURVES, clip_sample=False, clip_sample_range=1.0, **SPACING)
    solver_class = exploding.Heun
    order = 2
    takes = ("timesteps",)

    def _walked(self, levels: Array, told: Array, training: Array, steps: int) -> tuple[Array, Array]:
        return twice(levels), twice(np.append(told, 0))[:-1]


class KDPM2DiscreteScheduler(HeunDiscreteScheduler):
    """DPM-Solver-2 (Lu et al. 2022a) in the formulation of Karras et al. 2022: the second look is on the way."""

    defaults = LATENT | dict(**CURVES, prediction_type="epsilon", **SPACING)
    solver_class = exploding.KDPM2
    takes = ()
    rounds = "karras"
    choices = _OnSigmas.choices | dict(prediction_type=("epsilon", "v_prediction"))

    def _walked(self, levels: Array, told: Array, training: Array, steps: int) -> tuple[Array, Array]:
        ends = torch.from_numpy(np.stack([levels[:-1], levels[1:]]))
        looks = self.solver_class.aim(*ends).numpy()  # type: ignore[attr-defined]
        return twice(levels), twice(np.append(told, 0), grids.to_timesteps(looks, training))[:-1]


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """DPM-Solver-2 with fresh noise in every step."""

    solver_class = exploding.KDPM2Ancestral


class DPMPP2SAncestralScheduler(KDPM2AncestralDiscreteScheduler):
    """DPM-Solver++(2S) (Lu et al. 2022b) with fresh noise in every step, as k-diffusion's sample_dpmpp_2s_ancestral."""

    solver_class = exploding.DPMPP2SAncestral
    rounds = None
    choices = _OnSigmas.choices


class DPMSolverSDEScheduler(KDPM2DiscreteScheduler):
    """DPM-Solver++ as an SDE along a Brownian path (Lu et al. 2022b; k-diffusion); needs torchsde."""

    defaults = LATENT | dict(prediction_type="epsilon", **CURVES, noise_sampler_seed=None, **SPACING)
    solver_class = exploding.DPMSolverSDE
    rounds = None

    def _spaced(self, steps: int) -> Array:
        return grids.spaced(self.config, steps)  # in double precision: other roundings meet another path


class RestartScheduler(HeunDiscreteScheduler):
    """Restart sampling (Xu et al. 2023): Heun's method, which goes back up to more noise and down again.

    `restarts` are the paper's [steps, times, sigma_min, sigma_max], one for each interval; their steps count among
    num_inference_steps. Without them, there is one interval from 0.1 to 2: a quarter of the steps twice from 36 steps
    on, nine once from 20 on, and none below.
    """

    defaults: ClassVar[Mapping[str, Any]] = {**HeunDiscreteScheduler.defaults, "restarts": None}
    solver_class = exploding.Restart
    takes = ()

    def check(self) -> None:
        """Intervals that make sense."""
        super().check()
        restarts = self.config.restarts
        if restarts is not None and not (isinstance(restarts, list | tuple) and all(map(_is_restart, restarts))):
            raise ValueError(
                f"restarts={restarts} has to hold [steps, times, sigma_min, sigma_max], with whole numbers from 1 on "
                "and 0 < sigma_min < sigma_max."
            )

    def restarts(self, steps: int) -> Sequence[Sequence[Any]]:
        """The intervals for a number of steps, from the noisiest."""
        count, times = (steps // 4, 2) if steps >= 36 else (9, 1)
        usual = [[count, times, 0.1, 2.0]] if steps >= 20 else []
        return sorted(usual if self.config.restarts is None else self.config.restarts, key=lambda four: -four[2])

    def _spaced(self, steps: int) -> Array:
        again = sum(count * times for count, times, *_ in self.restarts(steps))
        if steps - again < 2:
            raise ValueError(f"num_inference_steps={steps} leaves fewer than 2 steps beside the {again} of restarts.")
        return super()._spaced(steps - again)

    def _walked(self, levels: Array, told: Array, training: Array, steps: int) -> tuple[Array, Array]:
        parts: list[tuple[Array, Array]] = []
        told, begun = np.append(told, 0), 0
        for count, times, low, high in self.restarts(steps):
            at = int(np.abs(levels[:-1] - low).argmin())
            if not levels[at] < high <= levels[0]:
                raise ValueError(f"A restart from {low} to {high} does not lie within the levels of {steps} steps.")
            ladder = grids.curve("karras", {}, high, levels[at], count + 1)
            ladder[-1] = levels[at]  # to the last digit: the solver takes any rise for a restart
            parts += [(levels[begun : at + 1], told[begun : at + 1])]
            parts += [(ladder, grids.to_timesteps(ladder, training))] * times
            begun = at
        parts += [(levels[begun:], told[begun:])]
        walked, times = (np.concatenate([twice(part) for part in kind]) for kind in zip(*parts, strict=True))
        return walked, times[:-1]


def _is_restart(four: Any) -> bool:
    numbers = isinstance(four, list | tuple) and len(four) == 4 and all(isinstance(v, int | float) for v in four)
    return numbers and all(isinstance(v, int) and v > 0 for v in four[:2]) and 0 < four[2] < four[3]
