"""The stateful interface that scripts and training loops are written for, on top of grid and solver.

`set_timesteps` begins a walk, which the scheduler then keeps: grid, solver and position. Pipelines never touch it; they
use `grid()` and `solver()`, so that one scheduler serves many threads.

How a class is called stands in `calls.py`; one that is not there is called as the class that it derives from. Keywords
of a step that are not known here (`eta`, `s_churn`, ...) are set as attributes of the solver; one that the solver has
no attribute for is refused unless it is at its default. What a step gives beside the sample is the tensor that the
solver has under that name, or else the clean sample. A solver whose `seed` is None gets that of the generator. Keywords
of set_timesteps go to `Scheduler.times`. What single classes have beside all this stands in `forms.py`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from autopipeline.config import Config, Configured
from autopipeline.noise import normal
from autopipeline.stepping.calls import ALONE, CALLS, KARRAS, Call

if TYPE_CHECKING:
    from autopipeline.schedulers.scheduler import Grid, Solver

Times = Tensor | Sequence[float] | float
CURVES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
PLAIN: dict[str, Any] = dict.fromkeys(CURVES, False) | dict(interpolation_type="linear")
"""Keys that give the levels of training themselves."""


class Output(dict[str, Any]):
    """What a step gives, by name, as an attribute or by position."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the output of this scheduler's step has no {name!r}") from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values alone."""
        return tuple(self.values())


@dataclass(slots=True)
class Walk:
    """Where a walk stands."""

    grid: Grid
    solver: Solver
    begun: bool = True  # by set_timesteps
    begin: int | None = None
    index: int | None = None


class Stateful(Configured):
    """Set times, then step after step."""

    if TYPE_CHECKING:

        def grid(self, steps: int | None = None, **options: Any) -> Grid: ...  # noqa: D102
        def times(self, *args: Any, **extra: Any) -> Grid: ...  # noqa: D102
        def solver(self, grid: Grid, **options: Any) -> Solver: ...  # noqa: D102

    call: ClassVar[Call] = Call()
    has_compatibles = True
    _deprecated_kwargs: ClassVar[list[str]] = []
    _walk: Walk | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (name := cls.__name__.removesuffix("Scheduler")) in CALLS:
            cls.call = CALLS[name]
        for name, first in (("set_timesteps", ()), ("step", ("model_output", "timestep", "sample"))):
            method = getattr(cls, name)
            if method is getattr(Stateful, name) or hasattr(method, "__signature__"):  # not one of its own
                setattr(cls, name, _taking(getattr(Stateful, name), first, cls.call.keywords(name)))

    def set_timesteps(self, **keywords: Any) -> None:
        """Begin a walk down a new grid."""
        steps = keywords.pop("num_inference_steps", None)
        grid = self.grid(steps, **{name: value for name, value in keywords.items() if value is not None})
        self._walk = Walk(grid, self.solver(grid))

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **keywords: Any) -> Any:
        """One step down the walk."""
        as_output, generator = keywords.pop("return_dict", True), keywords.pop("generator", None)
        own_noise = keywords.pop("variance_noise", None)
        if own_noise is not None and generator is not None:
            raise ValueError("Pass generator or variance_noise, not both.")
        solver, i = self.locate(timestep)
        usual = self.call.keywords("step")
        for name, value in keywords.items():
            if hasattr(solver, name) and name not in solver.fixed:
                setattr(solver, name, value)
            elif value is not usual[name] and value != usual[name]:
                raise ValueError(f"{name}={value} has no effect with {type(self).__name__}.")
        if generator is not None and getattr(solver, "seed", 0) is None:
            many = isinstance(generator, list)
            solver.seed = [one.initial_seed() for one in generator] if many else generator.initial_seed()  # type: ignore[attr-defined]
        variance = None
        learns = str(self.config.get("variance_type")).startswith("learned")
        if learns and model_output.shape[1] == 2 * sample.shape[1]:
            model_output, variance = model_output.chunk(2, dim=1)
        like = model_output.float() if self.call.draws_in_single else model_output
        noise = (lambda: drawn(like, generator)) if own_noise is None else (lambda: own_noise)
        try:
            made = solver.step(sample, model_output, i, noise, variance)
        except IndexError:
            if i < len(solver.grid.timesteps):
                raise
            what = type(self).__name__
            raise IndexError(f"{what} has done its last step; set_timesteps begins another walk.") from None
        if not self.call.at_any_time:
            self.walk.index = i + 1
        own = getattr(solver, self.call.gives, None)
        second = own.to(made.x.dtype) if isinstance(own, Tensor) else made.x0
        values = dict(prev_sample=made.x) | ({self.call.gives: second} if self.call.gives else {})
        return Output(values) if as_output else tuple(values.values())

    def locate(self, timestep: Any) -> tuple[Solver, int]:
        """The solver and the index on its grid for a step that is told this time."""
        walk = self.walk
        if self.call.at_any_time:
            told = torch.as_tensor(timestep).flatten()[0].item()  # one time, for a whole batch
            return self.solver(self.grid_at(torch.tensor(self.times_at(told)), walk.grid.steps)), 0
        if walk.index is None:
            walk.index = self.index_for_timestep(timestep) if walk.begin is None else walk.begin
        return walk.solver, walk.index

    def grid_at(self, timesteps: Tensor, steps: int) -> Grid:
        """Single times, in a walk of a number of steps."""
        return replace(self.walk.grid, timesteps=timesteps, steps=steps)

    def times_at(self, timestep: float) -> list[float]:
        """The grid for a single step: one step of training, unless it goes to the next time or the solver knows."""
        after = int(self.previous_timestep(timestep)) if self.call.to_next else timestep - 1
        return [timestep, after] if after >= 0 else [timestep]

    def training_grid(self) -> Grid:
        """All of training, as long as no other times are set."""
        total = self.config.get("num_train_timesteps", 1)
        plain = self.from_config(self.config, **PLAIN)
        return plain.times(total, list(range(total))[::-1], None)

    @property
    def walk(self) -> Walk:
        """The walk that set_timesteps began."""
        if self._walk is None:
            grid = self.training_grid()
            self._walk = Walk(grid, self.solver(grid), begun=False)
        return self._walk

    def scale_model_input(self, sample: Tensor, timestep: Any = None, **unused: Any) -> Tensor:
        """The network's input."""
        from autopipeline.schedulers.scheduler import Solver

        if self.call.at_any_time or type(self.walk.solver).scale is Solver.scale:
            return sample
        solver, i = self.locate(timestep)
        return solver.scale(sample, i)

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """Where a walk that is told this time first begins; of a time that is there twice, the second."""
        times = self.timesteps if schedule_timesteps is None else schedule_timesteps
        told = torch.as_tensor(timestep, device=times.device).flatten()[0]
        found = (times == told).nonzero().flatten().tolist()
        if not found and not self.call.unknown_is_last:
            raise IndexError(f"timestep={timestep} is not one of the timesteps of {type(self).__name__}.")
        return found[:2][-1] if found else len(times) - 1

    def previous_timestep(self, timestep: Any) -> Tensor:
        """The time after this one on the grid; -1 after the last."""
        times = self.timesteps
        after = int((times == torch.as_tensor(timestep, device=times.device)).nonzero()[0]) + 1
        return times[after] if after < len(times) else torch.tensor(-1)

    def levels_at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Share of signal and of noise for a batch of times, (B,)."""
        walk = self.walk
        if walk.grid.sigmas is None or self.call.noises_by_step:
            share = self.alphas_cumprod[timesteps.long().cpu()]
            return share.sqrt(), (1 - share).sqrt()
        if walk.begin is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            indices = [walk.begin if walk.index is None else walk.index] * len(timesteps)
        alphas, sigmas = zip(*(walk.solver.level(i) for i in indices), strict=True)
        return torch.stack(alphas), torch.stack(sigmas)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean samples at the levels of a batch of times."""
        alpha, sigma = (_beside(level, original_samples) for level in self.levels_at(timesteps.reshape(-1)))
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Times, noise: Tensor) -> Tensor:
        """`add_noise` in the order of arguments that flows have."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a network that predicts velocities should say of clean samples and noise (Salimans & Ho 2022)."""
        alpha, sigma = self.levels_at(timesteps.reshape(-1))
        size = (alpha**2 + sigma**2).sqrt()
        return _beside(alpha / size, sample) * noise - _beside(sigma / size, sample) * sample

    def _get_variance(self, timestep: int, prev_timestep: int | None = None) -> Tensor:
        """Ho et al. 2020, eq. 7."""
        after = self.previous_timestep(timestep) if prev_timestep is None else prev_timestep
        here, there = (
            self.alphas_cumprod[timestep],
            self.alphas_cumprod[after] if after >= 0 else self.final_alpha_cumprod,
        )
        return (1 - there) / (1 - here) * (1 - here / there)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the walk there, whatever time the first step is told."""
        self.walk.begin = begin_index

    @property
    def begin_index(self) -> int | None:
        """Where the walk was told to begin."""
        return self.walk.begin

    @property
    def step_index(self) -> int | None:
        """Where the walk stands; None before the first step, and where each step is told its time."""
        return self.walk.index

    @property
    def timesteps(self) -> Tensor:
        """The times of the walk; before `set_timesteps`, all of training."""
        return self.walk.grid.timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._regrid(timesteps=timesteps)

    @property
    def sigmas(self) -> Tensor:
        """The levels of the walk, on the CPU."""
        levels = self.walk.grid.sigmas
        if levels is None:
            raise AttributeError(f"{type(self).__name__} has no sigmas.")
        return levels

    @sigmas.setter
    def sigmas(self, sigmas: Tensor) -> None:
        self._regrid(sigmas=sigmas)

    def _regrid(self, **changes: Any) -> None:
        walk = self.walk
        grid = replace(walk.grid, **changes)
        self._walk = replace(walk, grid=grid, solver=self.solver(grid))

    @property
    def num_inference_steps(self) -> int | None:
        """The number of steps, once it is set."""
        walk = self.walk
        return walk.grid.steps if walk.begun else None

    @property
    def init_noise_sigma(self) -> Any:
        """What noise is multiplied by at the beginning."""
        size = self.walk.grid.init_noise_sigma
        return size if size == 1.0 else torch.tensor(size)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        """Figures of training (which scripts may replace, for themselves), and keys of the configuration."""
        config = self.__dict__.get("config", {})
        if name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod") and "beta_schedule" in self.defaults:
            return _of_training(self.own, name, self.walk.grid.sigmas is not None)
        if name in config:
            what = type(self).__name__
            warnings.warn(f"{what}.{name} is deprecated; read {what}.config.{name}.", FutureWarning, stacklevel=2)
            return config[name]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def register_to_config(self, **changes: Any) -> None:
        """Replace the configuration by one with these keys; grids and solvers that there are keep the old one."""
        self.config = Config(dict(self.config) | changes)

    @classmethod
    def _get_compatibles(cls) -> list[type[Self]]:
        """The classes that can take over this configuration."""
        from autopipeline import schedulers

        alone = cls.__name__.removesuffix("Scheduler") in ALONE
        names = {cls.__name__} | (set() if alone else {f"{name}Scheduler" for name in KARRAS})
        return [getattr(schedulers, name) for name in sorted(names) if hasattr(schedulers, name)]

    @property
    def compatibles(self) -> list[type[Self]]:
        """The classes that can take over this configuration."""
        return self._get_compatibles()


def _taking(function: Callable[..., Any], first: tuple[str, ...], keywords: Mapping[str, Any]) -> Any:
    """`function` with the signature that a class declares."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind) for name in ("self", *first)]
    named += [inspect.Parameter(name, kind, default=default) for name, default in keywords.items()]
    signature = inspect.Signature(named)

    @wraps(function)
    def method(*args: Any, **given: Any) -> Any:
        bound = signature.bind(*args, **given)
        bound.apply_defaults()
        return function(**bound.arguments)

    method.__signature__ = signature  # type: ignore[attr-defined]
    return method


def drawn(like: Tensor, generator: Any) -> Tensor:
    """Noise as large as `like`, from one generator or from one for each sample, wherever they live."""
    if isinstance(generator, list):
        return torch.cat([drawn(part, one) for part, one in zip(like.split(1), generator, strict=True)])
    return normal(like.shape, generator, dtype=like.dtype, device=like.device)


def _beside(level: Tensor, x: Tensor) -> Tensor:
    """One number for each sample."""
    return level.to(x).reshape(-1, *[1] * (x.ndim - 1))


def _of_training(config: Mapping[str, Any], name: str, on_sigmas: bool) -> Tensor:
    from autopipeline.schedulers import grids

    product = grids.alphas_cumprod(config, floor=2**-24 if on_sigmas else None)
    if name == "alphas_cumprod":
        return product
    if name == "final_alpha_cumprod":
        return torch.tensor(1.0) if config.get("set_alpha_to_one", True) else product[0]
    betas = grids.betas(config)
    if config.get("rescale_betas_zero_snr") and "snr_shift_scale" not in config:
        betas = 1 - torch.cat([product[:1], product[1:] / product[:-1]])
    return betas if name == "betas" else 1 - betas
