"""Qwen-Image 2.1's autoencoder (Qwen team 2026): pictures with transparency, at a sixteenth of their sides.

It was made of one for films: blocks that halve or double the frames too have weights for that, which a picture never
meets, and ways around themselves that take a picture for the last of several frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.autoencoder_kl import Posterior
from autopipeline.models.autoencoder_kl_qwenimage import ChannelNorm, Middle, Residual
from autopipeline.models.network import Network

# fmt: off
MEAN = (
    0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722, 1.8873, -1.7177,
    -0.651, 0.2732, 0.7562, -0.6163, -1.0277, 3.8363, 2.021, 0.0472, 0.932, 2.0087,
    2.4954, -0.1391, -1.4249, 1.8464, -0.5236, 1.2826, 3.7046, -1.3035, 2.7286, -1.4518,
    -1.9036, -1.9955, -0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751, -0.1076, 1.7376,
    -1.0914, -1.9435, -0.2784, -1.368, 0.4809, -0.4433, 0.3764, 0.5729, -2.0595, 1.096,
    -1.326, -2.0211, -5.0179, 0.5275, 4.0162, 1.8505, 0.3026, 1.9373, 1.4937, 0.2632,
    0.5547, -1.7121, -0.1562, 0.0304,
)
STD = (
    3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.791, 3.0785, 3.65,
    3.9308, 3.0904, 2.8778, 3.7675, 3.732, 5.0756, 3.2864, 4.0397, 3.1317, 4.0443,
    2.9249, 3.9454, 3.0988, 4.2489, 3.4896, 3.8513, 3.9323, 3.4719, 3.7498, 4.283,
    3.5694, 4.2467, 3.9037, 3.2947, 5.077, 3.5075, 3.27, 3.4767, 2.8063, 5.1125,
    3.5327, 4.7833, 3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875, 3.9624, 4.0168,
    3.5643, 4.055, 5.5614, 4.2963, 4.408, 3.4959, 3.8747, 3.7608, 3.5735, 3.149,
    3.7662, 3.6746, 3.4563, 3.8161,
)
# fmt: on


def conv(channels: int, out: int, side: int) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(channels, out, side, padding=side // 2)


class Change(nn.Module):
    """Half or twice the resolution; `timed`: with weights for further frames."""

    def __init__(self, channels: int, *, up: bool, timed: bool) -> None:
        super().__init__()
        change = nn.Upsample(scale_factor=2.0, mode="nearest-exact") if up else nn.ZeroPad2d((0, 1, 0, 1))
        moved = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)
        self.resample = nn.Sequential(change, moved)
        if timed:
            self.time_conv = nn.Conv2d(channels, channels * (2 if up else 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2) or (B, C, 2 H, 2 W)."""
        return self.resample(x)


class DownBlock(nn.Module):
    """One level of the encoder; `timed` is None for the last, which keeps its resolution."""

    def __init__(self, channels: int, out: int, layers: int, timed: bool | None) -> None:
        super().__init__()
        self.frames, self.sides = (2 if timed else 1), (1 if timed is None else 2)
        self.out = out
        self.resnets = nn.ModuleList([Residual(out if j else channels, out, conv) for j in range(layers)])
        if timed is not None:
            self.downsampler = Change(out, up=False, timed=timed)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, H / 2, W / 2), or of the same size."""
        around = self._around(x)
        for block in self.resnets:
            x = block(x)
        return (self.downsampler(x) if hasattr(self, "downsampler") else x) + around

    def _around(self, x: Tensor) -> Tensor:
        """Means over channels and neighbours; frames before the picture are black."""
        side = self.sides
        parts = x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 1, 3, 5, 2, 4)  # (B, C, s, s, h, w)
        parts = functional.pad(parts[:, :, None], (0,) * 8 + (self.frames - 1, 0))
        return parts.flatten(1, 4).unflatten(1, (self.out, -1)).mean(2)


class UpBlock(nn.Module):
    """One level of the decoder; `timed` is None for the last, which keeps its resolution."""

    def __init__(self, channels: int, out: int, layers: int, timed: bool | None) -> None:
        super().__init__()
        self.frames, self.out = (2 if timed else 1), out
        self.resnets = nn.ModuleList([Residual(out if j else channels, out, conv) for j in range(layers)])
        if timed is not None:
            self.upsampler = Change(out, up=True, timed=timed)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, out, 2 h, 2 w), or of the same size."""
        start = x
        for block in self.resnets:
            x = block(x)
        return self.upsampler(x) + self._around(start) if hasattr(self, "upsampler") else x

    def _around(self, x: Tensor) -> Tensor:
        """Channels spread over frames, of which the last one stays, and over neighbours."""
        times = self.out * self.frames * 4 // x.shape[1]
        parts = x.repeat_interleave(times, 1).unflatten(1, (self.out, self.frames, 2, 2))[:, :, -1]
        return parts.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


class Encoder(nn.Module):
    """Pictures to moments of latents."""

    def __init__(self, channels: int, out: int, widths: Sequence[int], layers: int, timed: Sequence[bool]) -> None:
        super().__init__()
        self.conv_in = conv(channels, widths[0], 3)
        levels = enumerate(itertools.pairwise(widths))
        self.down_blocks = nn.ModuleList(
            [DownBlock(*pair, layers, timed[k] if k < len(timed) else None) for k, pair in levels]
        )
        self.mid_block = Middle(widths[-1], conv)
        self.norm_out = ChannelNorm(widths[-1], 3)
        self.conv_out = conv(widths[-1], out, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4, H, W) to (B, out, h, w)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(functional.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, channels: int, out: int, widths: Sequence[int], layers: int, timed: Sequence[bool]) -> None:
        super().__init__()
        self.conv_in = conv(channels, widths[0], 3)
        self.mid_block = Middle(widths[0], conv)
        levels = enumerate(itertools.pairwise(widths))
        self.up_blocks = nn.ModuleList(
            [UpBlock(*pair, layers + 1, timed[k] if k < len(timed) else None) for k, pair in levels]
        )
        self.norm_out = ChannelNorm(widths[-1], 3)
        self.conv_out = conv(widths[-1], out, 3)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 4, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class AutoencoderKLQwenImage21(Network):
    """Pictures to latents and back; the encoder gives a distribution."""

    def __init__(
        self,
        base_dim: int = 96,
        decoder_base_dim: int | None = 144,
        z_dim: int = 64,
        dim_mult: tuple[int, ...] = (1, 2, 4, 8, 8),
        num_res_blocks: int = 2,
        attn_scales: tuple[float, ...] = (),
        temperal_downsample: tuple[bool, ...] = (False, True, True, True),
        dropout: float = 0.0,
        latents_mean: tuple[float, ...] = MEAN,
        latents_std: tuple[float, ...] = STD,
        is_residual: bool = True,
        in_channels: int = 4,
        out_channels: int = 4,
        patch_size: int | None = None,
        scale_factor_temporal: int | None = 8,
        scale_factor_spatial: int | None = 16,
    ) -> None:
        if attn_scales or not is_residual or patch_size not in (None, 1):
            raise CheckpointError("Of AutoencoderKLQwenImage21, only the residual one without patches is supported.")
        if len(temperal_downsample) != len(dim_mult) - 1:
            raise CheckpointError(f"{len(dim_mult)} levels have {len(dim_mult) - 1} steps of temperal_downsample.")
        timed = list(temperal_downsample)
        widths, back = ([base * times for times in dim_mult] for base in (base_dim, decoder_base_dim or base_dim))
        self.encoder = Encoder(in_channels, 2 * z_dim, [base_dim, *widths], num_res_blocks, timed)
        self.quant_conv, self.post_quant_conv = conv(2 * z_dim, 2 * z_dim, 1), conv(z_dim, z_dim, 1)
        self.decoder = Decoder(z_dim, out_channels, [back[-1], *back[::-1]], num_res_blocks, timed[::-1])

    def encode(self, x: Tensor) -> Posterior:
        """Pictures (B, 4, H, W) in -1..1 to a distribution over latents (B, C, h, w), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return Posterior(mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0)))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w), unscaled, to pictures (B, 4, H, W) in -1..1."""
        return self.decoder(self.post_quant_conv(z)).clamp(-1.0, 1.0)
