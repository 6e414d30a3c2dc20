"""What the latents are: 16 numbers for each cell of 8x8 pixels, a linear map of its pixels.

The map is the principal components of the cells of drawn scenes, each scaled so that broad and fine components come
nearer to each other. It is known before anything is trained, so the denoiser and the autoencoder are trained side by
side: the autoencoder's encoder learns the map, its decoder learns to invert it sharply.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

import scenes

CELL, CHANNELS = 8, 16


def pictures(seed: int, start: int, count: int) -> torch.Tensor:
    """Pictures number `start`.. of the stream `seed`, (count, 3, 128, 128) in -1..1."""
    drawn = np.stack([scenes.draw(scenes.sample(seed, i)) for i in range(start, start + count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def _cells(x: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, H/8 * W/8, 192)."""
    return torch.nn.functional.unfold(x, CELL, stride=CELL).mT


@cache
def basis() -> tuple[torch.Tensor, torch.Tensor]:
    """The map (192, 16) and the mean cell (192,), from the first 2000 pictures of a stream of their own."""
    cells = torch.cat([_cells(pictures(5, i, 100)).flatten(0, 1) for i in range(0, 2000, 100)]).double()
    mean = cells.mean(0)
    values, vectors = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))
    values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    vectors = vectors * vectors.sum(0).sign()  # an eigenvector's sign is arbitrary
    weight = vectors * values**-0.25
    return (weight / values.sqrt().mean().sqrt()).float(), mean.float()


def encode(x: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in -1..1 -> latents (B, 16, H/8, W/8) of unit variance over all channels."""
    weight, mean = (part.to(x.device) for part in basis())
    codes = (_cells(x) - mean) @ weight
    return codes.mT.unflatten(2, (x.shape[2] // CELL, x.shape[3] // CELL))
