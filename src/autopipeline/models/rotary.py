"""Rotary positions (Su et al. 2021): queries and keys turned by angles that grow with their places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary(places: Tensor, widths: Sequence[int], theta: float = 10000.0) -> Tensor:
    """Cosines and sines (..., D / 2, 2) in float32 for places (..., axes); each axis turns `widths` of the D channels.

    The angles are computed in float64, as far-away places turn many times.
    """
    parts: list[Tensor] = []
    for axis, width in enumerate(widths):
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        parts.append(places[..., axis, None].to("cpu", torch.float64) / theta**exponents)
    angles = torch.cat(parts, -1)
    return torch.stack([angles.cos(), angles.sin()], -1).float().to(places.device)


def turn(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels of x (B, heads, L, D) by a table (B, L, D / 2, 2), in float32."""
    cos, sin = table[:, None].unbind(-1)  # (B, 1, L, D / 2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


def turn_halves(x: Tensor, table: Tensor) -> Tensor:
    """The same where a channel of x (B, heads, L, D) is paired with the one D / 2 further on."""
    cos, sin = table[:, None].unbind(-1)  # (B, 1, L, D / 2)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def grid_places(height: int, width: int, first: int = 0) -> Tensor:
    """Places (height * width, 3) of a picture's tokens, row by row: `first`, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, first), rows, columns], -1).flatten(0, 1)


def centred_places(height: int, width: int, first: int = 0) -> Tensor:
    """The same with the picture's middle at row and column 0."""
    return grid_places(height, width, first) - torch.tensor([0, height - height // 2, width - width // 2])
