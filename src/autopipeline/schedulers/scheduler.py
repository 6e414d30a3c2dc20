"""What all schedulers share: an immutable configuration that gives a grid of times and, for each run, a solver."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from autopipeline.config import Config, falling, listed
from autopipeline.noise import Noise
from autopipeline.schedulers import grids
from autopipeline.schedulers.parameterisation import clean, limited
from autopipeline.stepping.stateful import Stateful

Own = Sequence[float] | None
Steps = int | None
Pair = tuple[Tensor, Tensor]
CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "time_shift_type": ("exponential", "linear"),
    "upscale_mode": ("nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact"),
    "prediction_type": ("epsilon", "sample", "original_sample", "v_prediction", "flow_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}
"""Values that a configuration may have, for the classes that have the key."""


class Step(NamedTuple):
    """X after a step, and the clean sample that the network has in mind."""

    x: Tensor
    x0: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The times of a run. Indices are absolute: a run that begins later walks the same grid from `begin`."""

    timesteps: Tensor  # (N,), as the network is told them
    sigmas: Tensor | None = None  # (N + 1,), noise over signal, on the CPU
    steps: int
    init_noise_sigma: float = 1.0
    begin: int = 0
    end: int = -1  # -1: all

    @classmethod
    def of(cls, told: Any, sigmas: Any = None, steps: int | None = None, *, whole: bool = False, **more: Any) -> Self:
        """From arrays, in single precision; with `whole`, times are cut to whole numbers."""
        times = _tensor(told).to(torch.int64 if whole else torch.float32)
        levels = None if sigmas is None else _tensor(sigmas).float()
        return cls(timesteps=times, sigmas=levels, steps=steps or len(times), **more)

    @property
    def indices(self) -> range:
        """What is walked."""
        return range(self.begin, len(self.timesteps) if self.end < 0 else self.end)

    @property
    def levels(self) -> Tensor:
        """The sigmas of a grid that has some."""
        assert self.sigmas is not None
        return self.sigmas

    def window(self, begin: int | None = None, end: int | None = None) -> Grid:
        """The same grid, walked from `begin` to `end`."""
        return replace(self, begin=self.begin if begin is None else begin, end=self.end if end is None else end)


class Solver:
    """One run's way down a grid; owned by the run, so it may remember what it has seen."""

    eta: float = 0.0  # share of fresh noise, where the class takes it
    options: ClassVar[tuple[str, ...]] = ()  # attributes that `Scheduler.solver` takes by name
    fixed: ClassVar[dict[str, Any]] = {}  # what other classes have in their configuration

    def __init__(self, scheduler: Scheduler, grid: Grid) -> None:
        self.config, self.grid = Config({**scheduler.own, **self.fixed}), grid
        self.said: list[Tensor] = []  # what a solver remembers of the network's predictions, the latest last

    def sigma(self, i: int) -> Tensor:
        """The grid's level at index i."""
        return self.grid.levels[i]

    def scale(self, x: Tensor, i: int) -> Tensor:
        """The network's input at grid index i."""
        return x

    def room(self, x: Tensor, i: int) -> Tensor:
        """What the noise of step i is like; x, unless it grows on the way."""
        return x

    def step(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None = None) -> Step:
        """From grid index i to i + 1; in float32, whatever the precision of x."""
        new, x0 = self.advance(x.float(), pred.float(), i, lambda: noise().float(), variance)
        return Step(new.to(pred.dtype), x0.to(pred.dtype))

    def advance(self, x: Tensor, pred: Tensor, i: int, noise: Noise, variance: Tensor | None) -> Pair:
        """The arithmetic of `step`: the next x, and the clean sample."""
        raise NotImplementedError

    def noised(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """A clean sample at the noise level of grid index i; clean after the last one."""
        if i >= len(self.grid.timesteps):
            return x0
        alpha, sigma = self.level(i)
        return alpha.to(x0) * x0 + sigma.to(x0) * noise

    def level(self, i: int) -> Pair:
        """Share of signal and of noise in x at grid index i."""
        raise NotImplementedError

    def denoised(self, x: Tensor, pred: Tensor, i: int) -> Tensor:
        """The clean sample that the network has in mind at grid index i, within its limits."""
        return limited(self.config, clean(self.config, x, pred, *self.level(i)))

    def noise_in(self, x: Tensor, pred: Tensor, i: int) -> Tensor:
        """The noise in x, without a division where the network gives it."""
        (alpha, sigma), kind = self.level(i), self.config.prediction_type
        if kind == "v_prediction":
            return alpha * pred + sigma * x
        return pred if kind == "epsilon" else (x - alpha * pred) / sigma


class Scheduler(Stateful):
    """An immutable configuration; the keys, their defaults and the class names are those of published checkpoints."""

    config_name = "scheduler_config.json"
    choices = CHOICES
    solver_class: ClassVar[type[Solver]] = Solver
    order: ClassVar[int] = 1  # evaluations for each step
    takes_eta: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ()  # "timesteps", "sigmas": own ones

    def check(self) -> None:
        """Refuse combinations that can't work."""
        curves = [name for name in ("karras", "exponential", "beta") if self.config.get(f"use_{name}_sigmas")]
        if len(curves) > 1:
            raise ValueError(f"{type(self).__name__} takes one curve of sigmas, not {' and '.join(curves)}.")
        super().check()

    def grid(
        self,
        steps: int | None = None,
        *,
        timesteps: Own = None,
        sigmas: Own = None,
        device: torch.device | str | None = None,
        **extra: Any,
    ) -> Grid:
        """The times for a number of steps, or for own timesteps or sigmas where the class takes them."""
        timesteps, sigmas = listed(timesteps), listed(sigmas)
        given = {name: own for name, own in (("timesteps", timesteps), ("sigmas", sigmas)) if own is not None}
        for name in given.keys() - set(self.takes):
            raise ValueError(f"{type(self).__name__} takes no own {name}.")
        self._check_together(steps, given)
        self._refuse_ignored(extra)
        if steps is not None:
            self._check_steps(steps)
        if timesteps is not None:
            self._check_timesteps(timesteps)
        if sigmas is not None:
            self._check_sigmas([float(sigma) for sigma in sigmas])
        made = self.times(steps, timesteps, sigmas, **extra)
        return replace(made, timesteps=made.timesteps.to(device))

    def _refuse_ignored(self, extra: Mapping[str, Any]) -> None:
        """TypeError for a keyword that no `times` of this class reads."""
        readers = [vars(base)["times"] for base in type(self).__mro__ if "times" in vars(base)]
        known = {name for reader in readers for name in inspect.signature(reader).parameters}
        for name, value in extra.items():
            if value is not None and name not in known:
                raise TypeError(f"{type(self).__name__} takes no {name}.")

    def _check_together(self, steps: int | None, own: dict[str, list[float]]) -> None:
        if len(own) + (steps is not None) != 1:
            raise ValueError("Pass one of num_inference_steps, timesteps and sigmas.")

    def _check_steps(self, steps: int) -> None:
        total = self.config.get("num_train_timesteps", 1000)
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= total:
            raise ValueError(f"num_inference_steps={steps} has to be a whole number from 1 to {total}.")

    def _check_timesteps(self, own: list[float]) -> None:
        last = self.config["num_train_timesteps"] - 1
        if not falling(own, 0, last):
            raise ValueError(f"Own timesteps have to be in descending order, without repetition, in 0..{last}.")
        if grids.curve_of(self.config):
            raise ValueError("Own timesteps and a curve of sigmas contradict each other.")

    def _check_sigmas(self, own: list[float]) -> None:
        if len(own) < 2 or not falling(own, 0, sys.float_info.max):
            raise ValueError("Own sigmas have to be two or more finite numbers in descending order, down to 0 at most.")

    def times(self, steps: int | None, timesteps: Own, sigmas: Own, **extra: Any) -> Grid:
        """The grid itself, on the CPU."""
        raise NotImplementedError

    def solver(self, grid: Grid, *, eta: float | None = None, **options: Any) -> Solver:
        """A solver for one run, with those of its class's `options` that are given."""
        if eta and not self.takes_eta:
            raise ValueError(f"eta={eta} has no effect with {type(self).__name__}; it belongs to DDIMScheduler.")
        made = self.solver_class(self, grid)
        if eta is not None:
            made.eta = eta
        for name, value in options.items():
            if name not in made.options:
                raise ValueError(f"{type(self).__name__} has no option {name!r} for its steps.")
            setattr(made, name, value)
        return made


def _tensor(numbers: Any) -> Tensor:
    return numbers if isinstance(numbers, Tensor) else torch.from_numpy(np.array(numbers))
