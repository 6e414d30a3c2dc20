"""Numbers as vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "mish": nn.Mish,
}


def sinusoidal(t: Tensor, width: int, *, cosine_first: bool, shift: float, period: float = 10000.0) -> Tensor:
    """Sines and cosines of t at falling frequencies (Vaswani et al. 2017), (N, width) in float32."""
    half = width // 2
    exponent = -math.log(period) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    angles = t.float()[:, None] * exponent.exp()[None]
    parts = [angles.cos(), angles.sin()] if cosine_first else [angles.sin(), angles.cos()]
    return functional.pad(torch.cat(parts, -1), (0, width % 2))


def plane_sinusoids(width: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Places in a plane as sines and cosines of column and row: (R,) and (C,) to (R * C, width) in float32."""
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    waves: list[Tensor] = []
    for places in (columns, rows):
        angles = places.double()[:, None] * frequencies
        waves.append(torch.cat([angles.sin(), angles.cos()], 1))  # (C or R, width / 2)
    across, down = waves[0].expand(len(rows), -1, -1), waves[1][:, None].expand(-1, len(columns), -1)
    return torch.cat([across, down], -1).flatten(0, 1).float()


class TimestepEmbedding(nn.Module):
    """Two linear layers over a sinusoidal embedding; `condition` (such as a guidance scale) is added to it before."""

    def __init__(
        self, channels: int, out: int, activation: str = "silu", condition: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, out, bias=bias)
        self.cond_proj = nn.Linear(condition, channels, bias=False) if condition else None
        self.act = ACTIVATIONS[activation]()
        self.linear_2 = nn.Linear(out, out, bias=bias)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(N, channels) to (N, out)."""
        if condition is not None and self.cond_proj is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(self.act(self.linear_1(x)))
