"""From a picture, noised to the level that `strength` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from autopipeline.stage import Run, Stage
from autopipeline.tasks.text2image import Text2Image, given_or_drawn

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid, Solver


class Image2Image(Text2Image):
    """Begins with the picture's latents and noise; draws: posterior of the picture, then the noise.

    `apart`: with a list of generators, each draws its own posterior of a picture that they share.
    """

    apart = True

    def begin(self, solver: Solver, grid: Grid) -> Tensor:
        """The picture at the first level of the grid; `latents`, or a picture half-denoised elsewhere, as they are."""
        if self.run.get("latents") is not None:
            return self._given()
        image = source_latents(self.stage, self.run, self.apart)
        if self.run.get("denoising_start") is not None:
            return image
        space, shape = self.stage.space, tuple(image.shape)
        if self.run.get("height") is not None and shape != (wanted := space.shape(self.run, *_size(self.run))):
            raise ValueError(f"image has latents of {shape[1:]}; this call needs {wanted[1:]}.")
        noise = space.noise(self.run.random, shape, dtype=self.stage.dtype, device=self.stage.device)
        return solver.noised(image, noise, grid.begin)

    def _given(self) -> Tensor:
        space, run = self.stage.space, self.run
        if run.get("height") is not None:
            return given_or_drawn(self.stage, run, space.shape(run, *_size(run)))
        latents: Tensor = run["latents"]
        if latents.ndim != 4 or latents.shape[:2] != (run.batch, space.channels):
            wanted = f"({run.batch}, {space.channels}, height, width)"
            raise ValueError(f"latents have the shape {tuple(latents.shape)}, but this call needs {wanted}.")
        return latents.to(device=self.stage.device, dtype=self.stage.dtype)


class SharedImage2Image(Image2Image):
    """For families whose users know one posterior of a picture, drawn by the first generator of a list."""

    apart = False


def _size(run: Run) -> tuple[int, int]:
    return run["height"], run["width"]


def source_latents(stage: Stage, run: Run, apart: bool = True) -> Tensor:
    """The latents of `image`, one row for each picture to be made."""
    x = stage.space.pixels(run, run["image"]).to(stage.device)
    if x.shape[1] != stage.space.channels or stage.space.channels == 3:
        x = stage.space.encode(repeat_to(x, sampled_rows(run, len(x), apart), "image"), run.random)
    return repeat_to(stage.space.pack(x).to(stage.dtype), run.batch, "image")


def sampled_rows(run: Run, pictures: int, apart: bool) -> int:
    """How many posteriors are drawn: one for each picture given, or one for each that is made."""
    return run.batch if isinstance(run.random.generator, list) and (apart or run.random.apart) else pictures


def repeat_to(x: Tensor, rows: int, what: str) -> Tensor:
    """Tile x along the batch (a b a b) to `rows` rows."""
    if rows % len(x):
        raise ValueError(f"{len(x)} pictures were given as {what}, which can't be dealt out to {rows} results.")
    return x.repeat(rows // len(x), *[1] * (x.ndim - 1))
