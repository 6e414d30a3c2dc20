"""Repaint what a mask covers, keep the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autopipeline.stage import Cond, Run, Stage
from autopipeline.tasks.image2image import repeat_to, sampled_rows
from autopipeline.tasks.text2image import Text2Image, given_or_drawn

if TYPE_CHECKING:
    from autopipeline.schedulers import Grid, Solver


class Inpaint(Text2Image):
    """Two ways, by the network: one that sees mask and masked picture (Concat), or an ordinary one (Blend).

    Draws: posterior of the picture (where it is needed), noise, posterior of the masked picture (always).
    `apart`: with a list of generators, each draws its own posterior of a picture that they share.
    """

    apart = True
    noise_alone = True  # a run over all steps begins with noise, whatever of the picture its first level would leave

    def __init__(self, stage: Stage, run: Run) -> None:
        super().__init__(stage, run)
        self.concat = self._concat()
        self.image: Tensor | None = None
        if not self.concat and run.get("masked_image_latents") is not None:
            raise ValueError(
                "masked_image_latents has an effect only on networks made for inpainting, not on this one."
            )

    def _concat(self) -> bool:
        """Whether the network takes mask and masked picture beside x."""
        channels, inner = self.stage.space.channels, int(self.stage.network.config.in_channels)  # type: ignore[union-attr,arg-type]
        if inner not in (channels, 2 * channels + 1):
            raise ValueError(
                f"The {self.stage.name} takes {inner} channels; inpainting needs one with {channels} "
                f"(an ordinary network) or {2 * channels + 1} (one made for inpainting)."
            )
        return inner != channels

    def begin(self, solver: Solver, grid: Grid) -> Tensor:
        """Noise, or the picture and noise, at the first level of the grid."""
        run, stage = self.run, self.stage
        space = stage.space
        pixels, mask = space.masked_pixels(run)
        full = run["strength"] == 1.0
        needs_image = not self.concat or (run.get("latents") is None and not full)
        shape = space.shape(run, run["height"], run["width"])
        if needs_image:
            self.image = self._latents(pixels, run.batch, "image")
            if self.image.shape[1:] != shape[1:]:
                raise ValueError(f"image has latents of {tuple(self.image.shape[1:])}; this call needs {shape[1:]}.")
        if run.get("denoising_start") is not None:
            self.noise = space.noise(run.random, shape, dtype=stage.dtype, device=stage.device)
            x = self._source()
        else:
            self.noise = given_or_drawn(stage, run, shape)
            as_noise = (full and self.noise_alone) or run.get("latents") is not None
            x = (
                self.noise * grid.init_noise_sigma
                if as_noise
                else solver.noised(self._source(), self.noise, grid.begin)
            )
        self.mask = repeat_to(space.mask(mask).to(device=stage.device, dtype=stage.dtype), run.batch, "mask_image")
        self.masked = self._masked(pixels, mask)
        return x

    def _masked(self, pixels: Tensor, mask: Tensor) -> Tensor:
        given = self.run.get("masked_image_latents")
        if given is not None:
            return self._latents(given, self.run.batch, "masked_image_latents")
        if pixels.shape[-1] != mask.shape[-1]:  # latents were given as the image; only a blend can take them
            return self._source()
        return self._latents(pixels * (mask < 0.5), self.run.batch, "masked image")

    def _source(self) -> Tensor:
        if self.image is None:
            raise ValueError("This inpainting network begins with noise; it can't take up a half-denoised picture.")
        return self.image

    def _latents(self, pixels: Tensor, batch: int, what: str) -> Tensor:
        stage = self.stage
        if pixels.shape[1] == stage.space.channels:
            x = stage.space.pack(pixels.to(device=stage.device, dtype=stage.dtype))
        else:
            rows = sampled_rows(self.run, len(pixels), self.apart)
            x = stage.space.encode(repeat_to(pixels, rows, what), self.run.random, plain=True).to(stage.dtype)
        return repeat_to(x, batch, what)

    def condition(self) -> Cond:
        """Mask and masked picture, for the network that takes them."""
        return {"concat": torch.cat([self.mask, self.masked], 1)} if self.concat else {}

    def keep(self, x: Tensor, solver: Solver, i: int, last: bool) -> Tensor:
        """Blend: outside the mask, the original at the noise level reached (the clean original at the end)."""
        if self.concat:
            return x
        known = self._source() if last else solver.noised(self._source(), self.noise, i)
        return (1 - self.mask) * known + self.mask * x

    def tensors(self) -> dict[str, Tensor]:
        """The mask and the masked picture's latents."""
        return {"mask": self.mask, "masked_image_latents": self.masked}

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a changed mask or masked picture."""
        self.mask = tensors.get("mask", self.mask)
        self.masked = tensors.get("masked_image_latents", self.masked)


class Blend(Inpaint):
    """The second way alone, for families whose networks never take the mask, on schedules that begin with noise."""

    apart = False
    noise_alone = False

    def _concat(self) -> bool:
        return False
