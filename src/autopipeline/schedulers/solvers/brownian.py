"""Noise along a Brownian path, so that it does not depend on how many steps the path is walked in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class BrownianNoise:
    """Increments of a path over sigma, divided by the root of their length; one path for each seed of a list."""

    def __init__(self, x: Tensor, low: float, high: float, seed: int | Sequence[int]) -> None:
        try:
            from torchsde import BrownianInterval
        except ImportError:
            raise ImportError("Noise along a Brownian path needs the package torchsde: pip install torchsde.") from None
        self.batched = not isinstance(seed, int)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        if self.batched and len(seeds) != len(x):
            raise ValueError(f"{len(seeds)} seeds were given for {len(x)} samples; give one, or one for each sample.")
        self.low, self.high = torch.tensor(float(low)), torch.tensor(float(high))
        options: dict[str, Any] = dict(dtype=x.dtype, device=x.device, tol=1e-6, pool_size=24, halfway_tree=True)
        options["size"] = x.shape[1:] if self.batched else x.shape
        self.paths: list[Any] = [BrownianInterval(self.low, self.high, entropy=entropy, **options) for entropy in seeds]

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        """Unit noise for the way from one sigma to another; the path stands still outside of its ends."""
        first, last = sorted((start.clamp(self.low, self.high), end.clamp(self.low, self.high)))
        if last - first < 1e-6:  # less than the path is divided into
            last = first
        rows = torch.stack([path(first, last) for path in self.paths])
        rows = rows * ((end - start).sign() / (end - start).abs().sqrt()).to(rows)
        return rows if self.batched else rows[0]
