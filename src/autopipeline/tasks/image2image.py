"""From a picture, noised to the level that `strength` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from autopipeline.stage import Run, Stage
from autopipeline.tasks.text2image import Text2Image

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid, Solver


class Image2Image(Text2Image):
    """Begins with the picture's latents and noise; draws: posterior of the picture, then the noise."""

    def begin(self, solver: Solver, grid: Grid) -> Tensor:
        """The picture at the first level of the grid; `latents`, or a picture half-denoised elsewhere, as they are."""
        latents = self.run.get("latents")
        if latents is not None:
            rows, channels = self.run.batch, self.stage.space.channels
            if latents.ndim != 4 or latents.shape[:2] != (rows, channels):
                wanted = f"({rows}, {channels}, height, width)"
                raise ValueError(f"latents have the shape {tuple(latents.shape)}, but this call needs {wanted}.")
            return latents.to(device=self.stage.device, dtype=self.stage.dtype)
        image = source_latents(self.stage, self.run)
        if self.run.get("denoising_start") is not None:
            return image
        return solver.noised(image, self.run.random.like(image), grid.begin)


def source_latents(stage: Stage, run: Run) -> Tensor:
    """The latents of `image`, one row for each picture to be made."""
    x = stage.space.pixels(run, run["image"]).to(stage.device)
    if x.shape[1] != stage.space.channels or stage.space.channels == 3:
        rows = run.batch if isinstance(run.random.generator, list) else len(x)
        x = stage.space.encode(repeat_to(x, rows, "image"), run.random)
    return repeat_to(x.to(stage.dtype), run.batch, "image")


def repeat_to(x: Tensor, rows: int, what: str) -> Tensor:
    """Tile x along the batch (a b a b) to `rows` rows."""
    if rows % len(x):
        raise ValueError(f"{len(x)} pictures were given as {what}, which can't be dealt out to {rows} results.")
    return x.repeat(rows // len(x), *[1] * (x.ndim - 1))
