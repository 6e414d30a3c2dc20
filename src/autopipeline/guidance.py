"""Which conditioning branches are evaluated, and how their predictions are combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from autopipeline.stage import Pred


class Guidance(Protocol):
    """A guidance rule."""

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, in the order of their rows."""
        ...

    def combine(self, preds: Sequence[Pred], push: Tensor | None = None) -> Pred:
        """One prediction from those of the branches; `push`, of another rule, is added before any rescaling."""
        ...


class Unguided(NamedTuple):
    """One branch, taken as it is."""

    branches: tuple[str, ...] = ("positive",)

    def combine(self, preds: Sequence[Pred], push: Tensor | None = None) -> Pred:
        """The prediction itself."""
        return preds[0] if push is None else Pred(preds[0].mean + push, preds[0].variance)


class ClassifierFree(NamedTuple):
    """Away from the negative prompt, towards the prompt (Ho & Salimans 2022, eq. 6), optionally rescaled.

    `rescale` in 0..1 brings the standard deviation back to the conditional one (Lin et al. 2023, section 3.4).
    """

    scale: float
    rescale: float = 0.0
    branches: tuple[str, ...] = ("negative", "positive")

    def combine(self, preds: Sequence[Pred], push: Tensor | None = None) -> Pred:
        """The guided prediction, with the variance of the conditional branch."""
        negative, positive = preds[0].mean, preds[1].mean
        guided = negative + self.scale * (positive - negative)
        guided = guided if push is None else guided + push
        if self.rescale > 0:
            axes = tuple(range(1, guided.ndim))
            level = positive.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
            guided = guided * (1 - self.rescale + self.rescale * level)
        return Pred(guided, preds[1].variance)


class NormPreserving(NamedTuple):
    """Classifier-free guidance, each token brought back to the length that the prompt alone gives it (Qwen-Image)."""

    scale: float
    branches: tuple[str, ...] = ("negative", "positive")

    def combine(self, preds: Sequence[Pred], push: Tensor | None = None) -> Pred:
        """The guided prediction (B, L, C)."""
        negative, positive = preds[0].mean, preds[1].mean
        guided = negative + self.scale * (positive - negative)
        guided = guided if push is None else guided + push
        length, made = (each.norm(dim=-1, keepdim=True) for each in (positive, guided))
        return Pred(guided * (length / made), preds[1].variance)


class Perturbed(NamedTuple):
    """Another rule, and away from what a weaker network says: without self-attention (Ahn et al. 2024), say."""

    guide: Guidance
    scale: float | Tensor
    weaker: str = "perturbed"

    @property
    def branches(self) -> tuple[str, ...]:
        """Those of the other rule, whose last one is the prompt's; then the prompt's again, by the weaker network."""
        return (*self.guide.branches, self.weaker)

    def combine(self, preds: Sequence[Pred], push: Tensor | None = None) -> Pred:
        """The other rule's prediction, pushed by scale * (positive - perturbed)."""
        away = self.scale * (preds[-2].mean - preds[-1].mean)
        return self.guide.combine(preds[:-1], away if push is None else away + push)
