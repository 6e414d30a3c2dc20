"""A small autoencoder without doubt, TAESD (Bohan 2023): pictures in 0..1 inside, no norms, no attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.autoencoder_kl import Posterior
from autopipeline.models.network import Network


class Block(nn.Module):
    """Three convolutions and a way around them."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(out, out, 3, padding=1), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1)]
        self.conv = nn.Sequential(*layers)
        self.skip = nn.Conv2d(channels, out, 1, bias=False) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, H, W)."""
        return functional.relu(self.conv(x) + self.skip(x))


class Layers(nn.Module):
    """A row of layers under the name that the checkpoints have."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """All layers."""
        return self.layers(x)


class AutoencoderTiny(Network):
    """Pictures to latents and back, quickly."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "relu",
        upsample_fn: str = "nearest",
        latent_channels: int = 4,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: int = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
    ) -> None:
        if act_fn != "relu":
            raise CheckpointError(f"A tiny autoencoder with act_fn={act_fn!r} is not supported.")
        widths, back = list(encoder_block_out_channels), list(decoder_block_out_channels)
        down: list[nn.Module] = []
        for k, (width, count) in enumerate(zip(widths, num_encoder_blocks, strict=True)):
            first = nn.Conv2d(
                in_channels if k == 0 else width, width, 3, padding=1, stride=1 if k == 0 else 2, bias=k == 0
            )
            down += [first, *(Block(width, width) for _ in range(count))]
        self.encoder = Layers([*down, nn.Conv2d(widths[-1], latent_channels, 3, padding=1)])
        up: list[nn.Module] = [nn.Conv2d(latent_channels, back[0], 3, padding=1), nn.ReLU()]
        for k, (width, count) in enumerate(zip(back, num_decoder_blocks, strict=True)):
            last = k == len(back) - 1
            up += [Block(width, width) for _ in range(count)]
            if not last:
                up.append(nn.Upsample(scale_factor=upsampling_scaling_factor, mode=upsample_fn))
            up.append(nn.Conv2d(width, out_channels if last else width, 3, padding=1, bias=last))
        self.decoder = Layers(up)

    def encode(self, x: Tensor) -> Posterior:
        """Pictures (B, 3, H, W) in -1..1 to latents (B, C, h, w)."""
        return Posterior(self.encoder((x + 1) / 2))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, H, W) in about -1..1."""
        return self.decoder(torch.tanh(z / 3) * 3) * 2 - 1
