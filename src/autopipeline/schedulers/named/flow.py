"""Schedulers of flow matching (Lipman et al. 2023), whose times are shares of noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from autopipeline.config import falling
from autopipeline.schedulers import grids
from autopipeline.schedulers.grids import Array, shifted, stretched, twice
from autopipeline.schedulers.named.keys import CURVES
from autopipeline.schedulers.scheduler import Grid, Own, Scheduler, Steps
from autopipeline.schedulers.solvers import flow

_SHIFTS = (
    dict(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False, base_shift=0.5, max_shift=1.15)
    | dict(base_image_seq_len=256, max_image_seq_len=4096, invert_sigmas=False, shift_terminal=None)
    | CURVES
    | dict(time_shift_type="exponential")
)


class _OnFlow(Scheduler):
    """Times are shares of noise; the network is told them as fractional steps of training."""

    def check(self) -> None:
        """A shift of 0 would leave no noise at all."""
        super().check()
        if not self.config.shift > 0:
            raise ValueError(f"shift={self.config.shift} has to be above 0.")

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, *, mu: Any = None, shift: Any = None, **_: Any) -> Grid:
        """Evenly spaced, or own sigmas, shifted: by `shift`, or with `use_dynamic_shifting` by `mu`.

        Own timesteps are told to the network as they are, and give the sigmas where there are no own ones.
        """
        total, inverted = self.config.num_train_timesteps, bool(self.own.get("invert_sigmas"))
        own = None if timesteps is None else np.array(timesteps, dtype=np.float64)
        if sigmas is not None:
            levels = np.array(sigmas, dtype=np.float64)
        else:
            levels = own / total if own is not None else self._even(steps or 1)
        levels = stretched(shifted(levels, self._shift(mu, shift)), self.own.get("shift_terminal"))
        if name := grids.curve_of(self.own):
            if name == "exponential" and levels[-1] <= 0:
                raise ValueError("use_exponential_sigmas needs sigmas above 0.")
            levels = grids.curve(name, self.config, levels[0], levels[-1], len(levels))
        levels = 1 - levels if inverted else levels
        return Grid.of(levels * total if own is None or inverted else own, np.append(levels, float(inverted)))

    def _even(self, steps: int) -> Array:
        """Between the ends of training, which a fixed shift has moved already."""
        least = 1 / self.config.num_train_timesteps
        if not self.own.get("use_dynamic_shifting"):
            least = shifted(least, self.config.shift)
        return np.linspace(1.0, least, steps)

    def _shift(self, mu: float | None, shift: float | None) -> float:
        if not self.own.get("use_dynamic_shifting"):
            return self.config.shift if shift is None else shift
        if mu is None:
            raise ValueError("use_dynamic_shifting needs mu, which follows from the size of the picture.")
        return math.exp(mu) if self.config.time_shift_type == "exponential" else mu

    def _check_together(self, steps: int | None, own: dict[str, list[float]]) -> None:
        counts = {len(values) for values in own.values()} | ({steps} if steps is not None else set())
        if len(counts) != 1:
            raise ValueError("Pass num_inference_steps, timesteps or sigmas; where there are more, of equal lengths.")

    def _check_timesteps(self, own: list[float]) -> None:
        total = self.config.num_train_timesteps
        if not falling(own, 0, total):
            raise ValueError(f"Own timesteps have to be in descending order, without repetition, in 0..{total}.")

    def _check_sigmas(self, own: list[float]) -> None:
        if not falling(own, 0, 1):
            raise ValueError("Own sigmas have to be in descending order, without repetition, in 0..1.")


class FlowMatchEulerDiscreteScheduler(_OnFlow):
    """Euler's method on a flow (Esser et al. 2024)."""

    defaults = _SHIFTS | dict(stochastic_sampling=False)
    solver_class = flow.FlowEuler
    takes = ("timesteps", "sigmas")


class FlowMatchHeunDiscreteScheduler(_OnFlow):
    """Heun's method on a flow: two evaluations a step."""

    defaults: ClassVar[Mapping[str, Any]] = dict(num_train_timesteps=1000, shift=1.0)
    solver_class = flow.FlowHeun
    order = 2

    def times(self, steps: Steps, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """Each level but the first and the last twice."""
        once = super().times(steps, timesteps, sigmas, **extra)
        return Grid.of(twice(np.append(once.timesteps.numpy(), 0))[:-1], twice(once.levels.numpy()), steps)


class FlowMatchLCMScheduler(_OnFlow):
    """Latent consistency models (Luo et al. 2023) on a flow, which may grow from step to step."""

    defaults = _SHIFTS | dict(scale_factors=None, upscale_mode="bicubic")
    solver_class = flow.FlowLCM
    takes = ("timesteps", "sigmas")
