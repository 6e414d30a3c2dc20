"""The autoencoder of Paella (Rampas et al. 2022), whose latents Würstchen and Stable Cascade work in.

Shapes: B pictures, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.network import Network


class MixingBlock(nn.Module):
    """Places of a channel, then channels of a place, are mixed; six numbers say how much."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(width, width, 3, groups=width))
        self.channelwise = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        scale, shift, gate, scale_2, shift_2, gate_2 = self.gammas
        normed = _normed(x.movedim(1, -1)).movedim(-1, 1)
        x = x + self.depthwise(normed * (1 + scale) + shift) * gate
        normed = _normed(x.movedim(1, -1)) * (1 + scale_2) + shift_2
        return x + self.channelwise(normed).movedim(-1, 1) * gate_2


def _normed(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class Codebook(nn.Module):
    """The vectors that latents were rounded to in training."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)


class PaellaVQModel(Network):
    """From pictures in 0..1 to latents and back."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        up_down_scale_factor: int = 2,
        levels: int = 2,
        bottleneck_blocks: int = 12,
        embed_dim: int = 384,
        latent_channels: int = 4,
        num_vq_embeddings: int = 8192,
        scale_factor: float = 0.3764,
    ) -> None:
        widths, step = [embed_dim // 2**k for k in reversed(range(levels))], up_down_scale_factor
        self.in_block = nn.Sequential(nn.PixelUnshuffle(step), nn.Conv2d(in_channels * step**2, widths[0], 1))
        self.down_blocks, self.up_blocks = nn.Sequential(), nn.Sequential()
        for k, width in enumerate(widths):
            if k:
                self.down_blocks.append(nn.Conv2d(widths[k - 1], width, 4, stride=2, padding=1))
            self.down_blocks.append(MixingBlock(width))
        last = nn.Conv2d(widths[-1], latent_channels, 1, bias=False), nn.BatchNorm2d(latent_channels)
        self.down_blocks.append(nn.Sequential(*last))
        self.vquantizer = Codebook(num_vq_embeddings, latent_channels)
        self.up_blocks.append(nn.Sequential(nn.Conv2d(latent_channels, widths[-1], 1)))
        for k, width in enumerate(reversed(widths)):
            self.up_blocks.extend(MixingBlock(width) for _ in range(1 if k else bottleneck_blocks))
            if k < levels - 1:
                self.up_blocks.append(nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1))
        self.out_block = nn.Sequential(nn.Conv2d(widths[0], out_channels * step**2, 1), nn.PixelShuffle(step))

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, C, H / f, W / f), not rounded, of pictures (B, 3, H, W)."""
        return self.down_blocks(self.in_block(x))

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), roughly in 0..1, of latents (B, C, H / f, W / f)."""
        return self.out_block(self.up_blocks(z))
