"""3 x 3 convolutions in float32 with a quarter of the products: Winograd's minimal filtering, F(4 x 4, 3 x 3).

Each 4 x 4 places of the result come from 6 x 6 of the picture, turned into 36 numbers of which each is multiplied with
one of the 36 that a kernel is turned into, in place of 4 x 4 x 9 products (Lavin and Gray 2016, arXiv:1509.09308). The
points of the polynomials behind it are 0, infinity, and plus and minus sqrt(1/2) and sqrt(2), with which rounding is
a fifth of what it is with the usual 1 and 2: 2e-6 of the largest value, where oneDNN's own convolutions are off by
1.5e-6. Pictures here have their channels last: (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.speed import machine

ROOT = 2**0.5
LEAST = 1024
"""Places of a picture below which there are too few tiles for fast products."""
CHANNELS = 64
"""On either side below which the sums around the products take longer than is won."""
SHARE = 128
"""The part of the machine's memory that the 36 numbers of all of a layer's kernels may take: one in so many."""
STRIP = 1 << 25
"""Bytes of a picture's tiles that are computed together: they stay in the processor's cache."""

ROWS = 1024
"""Of the input that a linear layer's weights are ordered for; others are as right, and hardly slower."""

Spread = list[list[Tensor]]
"""A layer's kernels, (out, in) in oneDNN's order for each of 6 x 6."""


def fits(layer: nn.Conv2d, height: int, width: int) -> bool:
    """Whether a layer can go this way, and is so large over such pictures that it may pay."""
    form = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    if form != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or layer.weight.dtype != torch.float32:
        return False
    large = height * width >= LEAST and min(layer.in_channels, layer.out_channels) >= CHANNELS
    return large and 36 * 4 * layer.in_channels * layer.out_channels * SHARE <= machine.memory()


def ordered(weight: Tensor) -> Tensor:
    """Weights (out, in) of a linear layer in the order that oneDNN computes in."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def spread(weight: Tensor) -> Spread:
    """Kernels (out, in, 3, 3) turned into the numbers that tiles are multiplied with."""
    turned = torch.mm(_KERNELS, weight.reshape(-1, 9).t()).view(6, 6, *weight.shape[:2])
    return [[ordered(each) for each in row] for row in turned]


def convolve(x: Tensor, kernels: Spread, bias: Tensor | None) -> Tensor:
    """(B, H, W, C) with zeros around it to (B, H, W, out)."""
    count, height, width, channels = x.shape
    down, across = -(-height // 4), -(-width // 4)
    x = functional.pad(x, (0, 0, 1, 1 + 4 * across - width, 1, 1 + 4 * down - height))
    made = x.new_empty(count, down, 4, across, 4, len(kernels[0][0]))
    rows = max(STRIP // (36 * x.element_size() * count * across * channels), 1)
    for begin in range(0, down, rows):
        part = made[:, begin : begin + rows]
        _strip(x[:, 4 * begin : 4 * (begin + part.shape[1]) + 2], kernels, part)
        if bias is not None:
            part += bias
    return made.view(count, 4 * down, 4 * across, -1)[:, :height, :width]


def _strip(x: Tensor, kernels: Spread, made: Tensor) -> None:
    """(B, 4 h + 2, 4 w + 2, C) to (B, h, 4, w, 4, out), written in place."""
    count, down, _, across, _, out = made.shape
    rows = _taken([x[:, i : i + 4 * down - 3 : 4] for i in range(6)])
    tiles = _taken([rows[:, :, :, j : j + 4 * across - 3 : 4] for j in range(6)])  # (6 across, 6 down, B, h, w, C)
    tiles = tiles.flatten(2, 4)
    columns: list[Sequence[Tensor]] = []
    for j in range(6):
        products = [
            torch.ops.mkldnn._linear_pointwise(tiles[j, i], kernels[i][j], None, "none", [], "") for i in range(6)
        ]
        columns.append(_back([each.view(count, down, across, out) for each in products], [None] * 4))
    for i in range(4):
        _back([column[i] for column in columns], [made[:, :, i, :, j] for j in range(4)])


def _taken(x: Sequence[Tensor]) -> Tensor:
    """Six neighbours along one side as values of a polynomial: (6, ...)."""
    made = x[0].new_empty(6, *x[0].shape)
    even, odd = torch.sub(x[4], x[2], alpha=2), torch.sub(x[3], x[1], alpha=2)
    torch.add(even, odd, alpha=1 / ROOT, out=made[1])
    torch.sub(even, odd, alpha=1 / ROOT, out=made[2])
    torch.sub(x[4], x[2], alpha=0.5, out=even)
    torch.sub(x[3], x[1], alpha=0.5, out=odd)
    torch.add(even, odd, alpha=ROOT, out=made[3])
    torch.sub(even, odd, alpha=ROOT, out=made[4])
    for end, (low, middle, high) in ((made[0], (x[0], x[2], x[4])), (made[5], (x[1], x[3], x[5]))):
        torch.sub(low, middle, alpha=2.5, out=end)
        end += high
    return made


def _back(m: Sequence[Tensor], out: Sequence[Tensor | None]) -> list[Tensor]:
    """Six values of a product of polynomials as four neighbours; uses up what it is given.

    The four in the middle come multiplied by sqrt(2) (`_kernel`), which saves multiplications here.
    """
    made = [torch.empty_like(m[0]) if each is None else each for each in out]
    sums, differences = m[1] + m[2], m[1].sub_(m[2])
    others, apart = (m[3] + m[4]).mul_(ROOT), m[3].sub_(m[4])
    torch.add(others, sums, alpha=ROOT / 4, out=made[2])
    torch.add(m[0].add_(sums, alpha=1 / ROOT), others, alpha=0.5, out=made[0])
    torch.add(apart, differences, alpha=0.5, out=made[1])
    torch.add(m[5].add_(apart, alpha=2), differences, alpha=0.25, out=made[3])
    return made


def _kernel() -> Tensor:
    """(6, 3): the values of a kernel's polynomial at the points, over what they are to be divided by."""
    rows = [[1.0, 0.0, 0.0]]
    for square, other in ((0.5, 2.0), (2.0, 0.5)):
        share = ROOT / (2 * square * (square - other))
        rows += [[share, share * root, share * square] for root in (square**0.5, -(square**0.5))]
    return torch.tensor([*rows, [0.0, 0.0, 1.0]])


_KERNELS = torch.kron(_kernel(), _kernel())  # (36, 9), for both sides at once


def pays() -> bool:
    """Whether this machine is faster this way, tried once on a layer of a common size."""
    sample = cache(_sample)  # made only if it is tried
    ways = {"direct": lambda: _direct(*sample()[:2]), "winograd": lambda: convolve(*sample()[2:], None)}
    return machine.fastest("convolution 3 x 3", ways) == "winograd"


def _direct(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, weight, None, *_FORM, "none", [], "")


def _sample() -> tuple[Tensor, Tensor, Tensor, Spread]:
    x, weight = torch.randn(1, 64, 64, 256), torch.randn(256, 256, 3, 3)
    picture = x.permute(0, 3, 1, 2)
    return picture, torch.ops.mkldnn._reorder_convolution_weight(weight, *_FORM, picture.shape), x, spread(weight)


_FORM = ([1, 1], [1, 1], [1, 1], 1)
"""Padding, stride, dilation and groups of a convolution that can go this way."""
