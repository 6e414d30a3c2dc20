"""From noise alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from autopipeline.stage import Cond, Run, Stage

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid, Solver


class Text2Image:
    """Begins with noise (or the caller's `latents`) and keeps whatever the steps give."""

    def __init__(self, stage: Stage, run: Run) -> None:
        self.stage, self.run = stage, run

    def begin(self, solver: Solver, grid: Grid) -> Tensor:
        """Noise at the first level of the grid."""
        height, width = self.run.get("height", 0), self.run.get("width", 0)  # embeddings have none
        shape = self.stage.space.shape(self.run, height, width)
        return given_or_drawn(self.stage, self.run, shape) * grid.init_noise_sigma

    def condition(self) -> Cond:
        """Nothing."""
        return {}

    def keep(self, x: Tensor, solver: Solver, i: int, last: bool) -> Tensor:
        """All of it."""
        return x

    def end(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def tensors(self) -> dict[str, Tensor]:
        """Nothing beyond the latents."""
        return {}

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""


def given_or_drawn(stage: Stage, run: Run, shape: tuple[int, ...]) -> Tensor:
    """The caller's `latents`, or fresh noise of `shape`."""
    latents = run.get("latents")
    if latents is None:
        return stage.space.noise(run.random, shape, dtype=stage.dtype, device=stage.device)
    latents = stage.space.pack(latents)
    if tuple(latents.shape) != tuple(shape):
        raise ValueError(f"latents have the shape {tuple(latents.shape)}, but this call needs {tuple(shape)}.")
    return latents.to(device=stage.device, dtype=stage.dtype)
