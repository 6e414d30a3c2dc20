"""Which part of a scheduler's grid a run walks: for schedulers that make their own times, and for flows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from autopipeline.schedulers.solvers.flow import Flow
from autopipeline.stage import Run

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid, Scheduler


def schedule(scheduler: Scheduler, run: Run, device: Any) -> Grid:
    """The grid of `num_inference_steps` (or `timesteps`, `sigmas`), from where `strength` or `denoising_start` say."""
    timesteps, sigmas = run.get("timesteps"), run.get("sigmas")
    if timesteps is not None and sigmas is not None:
        raise ValueError("Pass either timesteps or sigmas, not both.")
    own = timesteps is not None or sigmas is not None
    grid = scheduler.grid(
        None if own else run["num_inference_steps"], timesteps=timesteps, sigmas=sigmas, device=device
    )
    steps = len(grid.timesteps) if own else run["num_inference_steps"]
    return _until(_since(grid, scheduler, run, steps), scheduler, run)


def _since(grid: Grid, scheduler: Scheduler, run: Run, steps: int) -> Grid:
    start, strength = run.get("denoising_start"), run.get("strength")
    if start is not None:
        left = int((grid.timesteps < _cutoff(scheduler, start)).sum())
        left += scheduler.order == 2 and left % 2 == 0  # never between the two halves of a step
        grid = grid.window(len(grid.timesteps) - left)
    elif strength is not None:
        skipped = max(steps - min(int(steps * strength), steps), 0)
        grid = grid.window(skipped * scheduler.order)
    return _some(grid, f"denoising_start={start}" if start is not None else f"strength={strength}", steps)


def _some(grid: Grid, what: str, steps: int) -> Grid:
    if not len(grid.indices):
        raise ValueError(f"{what} leaves none of the {steps} steps; use more steps or another value.")
    return grid


def flow_schedule(scheduler: Scheduler, run: Run, device: Any, tokens: int, mu: float | None = None) -> Grid:
    """The grid of a flow: evenly spaced shares of noise (or own `sigmas`), shifted for pictures of so many tokens.

    `mu` says how far instead, for networks that want the same for all sizes.
    """
    require_flow(scheduler)
    own = run.get("sigmas")
    steps = run["num_inference_steps"] if own is None else len(own)
    sigmas = np.linspace(1.0, 1 / steps, steps) if own is None else own
    if own is None and (scheduler.own.get("use_flow_sigmas") or "sigmas" not in scheduler.takes):
        sigmas = None  # it makes its own
    count = steps if sigmas is None else None
    mu = shift_of(scheduler, tokens) if mu is None else mu
    shift = mu if scheduler.own.get("use_dynamic_shifting") else None
    grid = scheduler.grid(count, sigmas=sigmas, mu=shift, device=device)  # type: ignore[arg-type]
    return strong(grid, scheduler, run.get("strength"), steps)


def require_flow(scheduler: Scheduler) -> None:
    """ValueError for a scheduler under which the network's velocity would be taken for noise."""
    if not issubclass(scheduler.solver_class, Flow) and not scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} knows no flow, which this network predicts; use one of flow matching, such as "
            "FlowMatchEulerDiscreteScheduler."
        )


def shift_of(scheduler: Scheduler, tokens: int) -> float:
    """How far to shift towards noise, `mu`: on a line through two sizes of pictures, counted in tokens."""
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)


def strong(grid: Grid, scheduler: Scheduler, strength: float | None, steps: int) -> Grid:
    """The part of a grid that `strength` leaves; a fraction of a step counts as a whole one."""
    if strength is None:
        return grid
    skipped = int(max(steps - min(steps * strength, steps), 0))
    return _some(grid.window(skipped * scheduler.order), f"strength={strength}", steps)


def _until(grid: Grid, scheduler: Scheduler, run: Run) -> Grid:
    start, end = run.get("denoising_start"), run.get("denoising_end")
    if end is None or end == 1:
        return grid
    if start is not None and start >= end:
        raise ValueError(f"denoising_start={start} has to be less than denoising_end={end}.")
    walked = grid.timesteps[grid.begin :]
    return grid.window(grid.begin, grid.begin + int((walked >= _cutoff(scheduler, end)).sum()))


def _cutoff(scheduler: Scheduler, share: float) -> int:
    total = scheduler.config["num_train_timesteps"]
    return round(total - share * total)
