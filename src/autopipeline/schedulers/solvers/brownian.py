"""Noise along a Brownian path, so that it does not depend on how many steps the path is walked in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BrownianNoise:
    """Increments of a path over sigma, divided by the root of their length; one path for each seed of a list."""

    def __init__(self, x: Tensor, low: float, high: float, seed: int | Sequence[int]) -> None:
        try:
            from torchsde import BrownianInterval  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError("Noise along a Brownian path needs the package torchsde: pip install torchsde.") from None
        self.batched = not isinstance(seed, int)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        if self.batched and len(seeds) != len(x):
            raise ValueError(f"{len(seeds)} seeds were given for {len(x)} samples; give one, or one for each sample.")
        shape = x.shape[1:] if self.batched else x.shape
        options = dict(size=shape, dtype=x.dtype, device=x.device, tol=1e-6, pool_size=24, halfway_tree=True)
        # ends as tensors: the halving of the path stops where float32 does
        self.paths = [
            BrownianInterval(t0=torch.tensor(float(low)), t1=torch.tensor(float(high)), entropy=entropy, **options)
            for entropy in seeds
        ]

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        """Unit noise for the way from one sigma to another."""
        ends, sign = ((start, end), 1.0) if start < end else ((end, start), -1.0)
        rows = torch.stack([path(*ends) for path in self.paths])
        rows = rows * (sign / (ends[1] - ends[0]).sqrt()).to(rows)
        return rows if self.batched else rows[0]
