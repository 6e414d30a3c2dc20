"""Sizes that networks were trained on: pictures are made at the nearest of them and cut to the size asked for."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

Bins = tuple[tuple[int, int], ...]
"""Heights and widths in sixteenths of the side of the square."""

_WIDE = (
    *((8, 32), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21)),
    *((12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16)),
)
_LONG = ((8, 31), (8, 30))


def _both_ways(wide: Bins, *but: tuple[int, int]) -> Bins:
    """Wide sizes, and tall ones but for some, by their proportions."""
    sizes = {*wide, *((height, width) for width, height in wide if (height, width) not in but)}
    return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))


SIZES = {
    **dict.fromkeys((256, 512, 1024), _both_ways(_WIDE, (29, 8), (28, 9), (26, 9), (21, 11))),
    **dict.fromkeys((2048, 4096), _both_ways(_WIDE + _LONG, (21, 11))),
}
"""Side of the square in pixels -> the sizes for it, those of PixArt's training (Chen et al. 2023, 2024)."""


def nearest(side: int, height: int, width: int) -> tuple[int, int]:
    """The height and width in pixels whose proportions (to two digits) are nearest to those asked for.

    Raises ValueError for networks of a side without a list.
    """
    if side not in SIZES:
        raise ValueError(
            f"There is no list of sizes for networks of {side} x {side} pixels; pass use_resolution_binning=False."
        )
    high, wide = closest(SIZES[side], height, width)
    return high * side // 16, wide * side // 16


def closest(sizes: Bins, height: int, width: int) -> tuple[int, int]:
    """The one whose proportions, to two digits, are nearest; the first of several."""
    return min(sizes, key=lambda size: abs(round(size[0] / size[1], 2) - height / width))


def cut(pictures: Tensor, height: int, width: int) -> Tensor:
    """Pictures (B, C, H, W), scaled until they cover height x width; what stands out is cut off on both sides."""
    high, wide = pictures.shape[-2:]
    if (high, wide) == (height, width):
        return pictures
    ratio = max(height / high, width / wide)
    size = int(high * ratio), int(wide * ratio)
    scaled = functional.interpolate(pictures, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[:, :, top : top + height, left : left + width]
