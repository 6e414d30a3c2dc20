"""Which part of a scheduler's grid a run walks: shared by the families whose schedulers make their own times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    if not len(grid.indices):
        what = f"denoising_start={start}" if start is not None else f"strength={strength}"
        raise ValueError(f"{what} leaves none of the {steps} steps; use more steps or another value.")
    return grid


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
