"""PixArt-sigma (Chen et al. 2024): alpha's transformer for larger pictures and longer texts."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from autopipeline.addons import pag
from autopipeline.families import pixart_alpha as alpha
from autopipeline.stage import Run, Stage

Components = alpha.Components


def stages(components: Components, run: Run) -> tuple[Stage, ...]:
    """As alpha's; one step alone is a step as any other."""
    (stage,) = alpha.stages(components, run)

    def emit(x: Tensor, x0: Tensor) -> Tensor:
        return x

    return (replace(stage, emit=emit),)


FAMILY = replace(
    alpha.FAMILY,
    key="pixart-sigma",
    stem="PixArtSigma",
    tasks=alpha.rows(300),
    stages=stages,
    variants={frozenset({"PAG"}): alpha.rows(300, pag.PARAMS)},
)
