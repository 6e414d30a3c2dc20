"""Attention whose cost grows with the number of places and not with its square (Katharopoulos et al. 2020).

And the convolutions that stand beside it in EfficientViT (Cai et al. 2023) and Sana (Xie et al. 2024): they mix
neighbours, which it is blind to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def attend_linearly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with relu(q) . relu(k) as weights, over (B, heads, D, L), in float32.

    Keys and values are summed up to a matrix first; a value that is 1 everywhere counts the weights.
    """
    q, k, v = functional.relu(q).float(), functional.relu(k).float(), v.float()
    summed = functional.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(-1, -2)  # (B, heads, D + 1, D)
    mixed = summed @ q
    return mixed[..., :-1, :] / (mixed[..., -1:, :] + 1e-15)


class BiasedNorm(nn.Module):
    """Root-mean-square norm over the channels of a feature map, with a bias."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        rows = functional.rms_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.eps)
        return (rows + self.bias).movedim(-1, 1)


class GatedConvolutions(nn.Module):
    """Each pixel to a wider one with a gate, neighbours channel by channel, and back."""

    def __init__(self, channels: int, ratio: float, normed: bool = False) -> None:
        super().__init__()
        inner = int(ratio * channels)
        self.conv_inverted = nn.Conv2d(channels, 2 * inner, 1)
        self.conv_depth = nn.Conv2d(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)
        self.conv_point = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm = BiasedNorm(channels) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        value, gate = self.conv_depth(functional.silu(self.conv_inverted(x))).chunk(2, 1)
        return self.norm(self.conv_point(value * functional.silu(gate)))
