"""Where noise comes from: a generator, or a Brownian path that is the same however many steps walk it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Noise = Callable[[], Tensor]


def normal(
    shape: Sequence[int], generator: torch.Generator | None, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Standard-normal draws, made where the generator lives (torch's global one, if none is given) and moved."""
    home = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=home).to(device)


class BrownianNoise:
    """Increments of a path over sigma, divided by the root of their length; one path for each seed of a list.

    Without a seed, the first draw of the run's own noise decides: the same generator gives the same path.
    """

    def __init__(self, noise: Noise, low: float, high: float, seed: int | Sequence[int] | None) -> None:
        x = noise()
        self.batched = isinstance(seed, Sequence)
        self.seeds = list(seed) if isinstance(seed, Sequence) else [_seed(x) if seed is None else int(seed)]
        if self.batched and len(self.seeds) != len(x):
            count = len(self.seeds)
            raise ValueError(f"{count} seeds were given for {len(x)} pictures; give one, or one for each picture.")
        self.low, self.high = torch.tensor(float(low)), torch.tensor(float(high))
        self.like = (x.shape[1:] if self.batched else x.shape, x.dtype, x.device)
        self.paths = self._laid()

    def _laid(self) -> list[Any]:
        try:
            from torchsde import BrownianInterval  # type: ignore[import-not-found,import-untyped]
        except ImportError:
            raise ImportError("This scheduler needs torchsde: pip install 'autopipeline[sde]'.") from None
        size, dtype, device = self.like
        kind: dict[str, Any] = dict(size=size, dtype=dtype, device=device, tol=1e-6, pool_size=24, halfway_tree=True)
        return [BrownianInterval(self.low, self.high, entropy=seed, **kind) for seed in self.seeds]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "paths"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.paths = self._laid()  # paths can't be copied, but their seeds say all

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        """Unit noise for the way from one sigma to another; the path stands still outside of its ends."""
        low, high = (round(float(bound), 6) for bound in (self.low, self.high))  # as finely as the path is divided
        first, last = sorted(min(max(float(level), low), high) for level in (start, end))
        if last - first < 1e-6:
            last = first
        rows = torch.stack([path(first, last) for path in self.paths])
        rows = rows * ((end - start).sign() / (end - start).abs().sqrt()).to(rows)
        return rows if self.batched else rows[0]


def _seed(x: Tensor) -> int:
    return int(x.flatten()[0].double().view(torch.int64)) & (2**63 - 1)
