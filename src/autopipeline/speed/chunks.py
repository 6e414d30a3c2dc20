"""Feed-forwards a few rows at a time, so that their wide middle stays in the processor's cache.

In one go, the middle of a feed-forward over 8192 places is tens of megabytes, written to memory and read back once for
the activation, once for the gate and once for the layer after; each time slower than the products of matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autopipeline.models.attention import RowWise
from autopipeline.speed.swapped import Swapped, become, mixed

MIDDLE = 1 << 22
"""Bytes of the widest layer's output in one part."""
LEAST = 512
"""Rows in a part; with fewer, reading the weights would take longer than computing."""


def in_parts(layer: Callable[[Tensor], Tensor], x: Tensor, rows: int, width: int) -> Tensor:
    """What a layer makes of (..., C), so many rows at a time: (..., width)."""
    flat = x.reshape(-1, x.shape[-1])
    made = x.new_empty(len(flat), width)
    for begin in range(0, len(flat), rows):
        made[begin : begin + rows] = layer(flat[begin : begin + rows])
    return made.view(*x.shape[:-1], width)


class Chunked(Swapped):
    """The rows of a `RowWise` in parts of the same size."""

    rows: int

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        count = x.shape[:-1].numel()
        if torch.compiler.is_compiling() or count <= self.rows:
            return super().forward(x)
        return in_parts(super().forward, x, self.rows, x.shape[-1])


def chunk(network: nn.Module) -> int:
    """Have those modules of a network compute in parts that map rows to rows of the same width; gives how many."""
    plain = [each for each in network.modules() if isinstance(each, RowWise) and not isinstance(each, Swapped)]
    for module in plain:
        weights = [each.weight for each in module.modules() if isinstance(each, nn.Linear)]
        module.rows = max(LEAST, MIDDLE // max(len(each) * each.element_size() for each in weights))  # type: ignore[assignment]
        become(module, mixed(Chunked, type(module)))
    return len(plain)
