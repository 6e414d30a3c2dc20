"""DeepFloyd's mark in the lower right corner of a picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

from autopipeline.models.network import Network

SIZE, GAP = 62, 14
"""Pixels of the mark, and from it to the edges, in a picture of 1024 x 1024."""


class IFWatermarker(Network):
    """A small picture, with transparency, that comes with the checkpoint."""

    def __init__(self) -> None:
        self.watermark_image = nn.Parameter(torch.zeros(SIZE, SIZE, 4), requires_grad=False)

    def forward(self, pictures: list[Image.Image], side: int) -> list[Image.Image]:
        """Marked copies; on pictures smaller than `side` pixels the mark is as large as on one of that size."""
        pixels = self.watermark_image.detach().float().cpu().numpy().astype(np.uint8)
        mark = Image.fromarray(pixels, "RGBA")
        return [_marked(picture.copy(), mark, side) for picture in pictures]


def _marked(picture: Image.Image, mark: Image.Image, side: int) -> Image.Image:
    smaller = min(1.0, picture.height / side, picture.width / side)
    height, width = int(picture.height / smaller), int(picture.width / smaller)
    scale = (width * height / 1024**2) ** 0.5
    size, right, bottom = int(scale * SIZE), width - int(GAP * scale), height - int(GAP * scale)
    resized = mark.resize((size, size), Image.Resampling.BICUBIC)
    picture.paste(resized, (right - size, bottom - size, right, bottom), resized.getchannel("A"))
    return picture
