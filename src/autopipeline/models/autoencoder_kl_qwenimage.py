"""Qwen-Image's autoencoder (Wu et al. 2025): one of films, whose first frame depends on nothing before it.

So for a picture only the last slice in time of each convolution counts, and everything is done in two dimensions; the
parameters have the shapes of the checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import attend
from autopipeline.models.autoencoder_kl import Posterior
from autopipeline.models.network import Network

# fmt: off
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on


class FrameConv(nn.Conv3d):
    """A convolution that looks back in time, for a first frame: nothing stands before it."""

    def __init__(self, channels: int, out: int, side: int) -> None:
        super().__init__(channels, out, side)
        self.around = side // 2

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, H, W)."""
        return functional.conv2d(input, self.weight[:, :, -1], self.bias, padding=self.around)


Conv = Callable[[int, int, int], nn.Module]
"""From channels, channels made and the side of its window to a convolution that keeps the size."""


class ChannelNorm(nn.Module):
    """Each place's channels to length sqrt(C), then scaled; the weight has `axes` more axes, as in the checkpoint."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W); lengths in float32."""
        unit = functional.normalize(x.float(), dim=1).to(x.dtype)
        return unit * x.shape[1] ** 0.5 * self.gamma.view(-1, 1, 1)


class Residual(nn.Module):
    """Two convolutions, and around."""

    def __init__(self, channels: int, out: int, conv: Conv = FrameConv) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(channels, 3), conv(channels, out, 3)
        self.norm2, self.conv2 = ChannelNorm(out, 3), conv(out, out, 3)
        self.conv_shortcut = conv(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, H, W)."""
        made = self.conv1(functional.silu(self.norm1(x)))
        return self.conv2(functional.silu(self.norm2(made))) + self.conv_shortcut(x)


class Mixing(nn.Module):
    """Self-attention of one head over all places, and around."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)  # (B, 1, H * W, C)
        return x + self.proj(attend(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:]))


class Resample(nn.Module):
    """Half or twice the resolution (then half the channels); `timed`: with weights for further frames."""

    def __init__(self, channels: int, *, up: bool, timed: bool) -> None:
        super().__init__()
        change = nn.Upsample(scale_factor=2.0, mode="nearest") if up else nn.ZeroPad2d((0, 1, 0, 1))
        conv = nn.Conv2d(channels, channels // 2, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)
        self.resample = nn.Sequential(change, conv)
        if timed:
            self.time_conv = nn.Conv3d(channels, channels * (2 if up else 1), (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2) or (B, C / 2, 2 H, 2 W)."""
        return self.resample(x)


class Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, channels: int, conv: Conv = FrameConv) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Mixing(channels)])
        self.resnets = nn.ModuleList([Residual(channels, channels, conv) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Pictures to moments of latents."""

    def __init__(self, channels: int, out: int, widths: Sequence[int], layers: int, timed: Sequence[bool]) -> None:
        super().__init__()
        self.conv_in = FrameConv(channels, widths[0], 3)
        self.down_blocks = nn.ModuleList()
        for k, (before, width) in enumerate(itertools.pairwise(widths)):
            self.down_blocks.extend(Residual(width if j else before, width) for j in range(layers))
            if k < len(timed):
                self.down_blocks.append(Resample(width, up=False, timed=timed[k]))
        self.mid_block = Middle(widths[-1])
        self.norm_out = ChannelNorm(widths[-1], 3)
        self.conv_out = FrameConv(widths[-1], out, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, out, h, w)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(functional.silu(self.norm_out(self.mid_block(x))))


class UpBlock(nn.Module):
    """One level of the decoder; `timed` is None for the last, which keeps its resolution."""

    def __init__(self, channels: int, out: int, layers: int, timed: bool | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Residual(out if j else channels, out) for j in range(layers)])
        if timed is not None:
            self.upsamplers = nn.ModuleList([Resample(out, up=True, timed=timed)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, out, h, w) or (B, out / 2, 2 h, 2 w)."""
        for block in self.resnets:
            x = block(x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, channels: int, out: int, widths: Sequence[int], layers: int, timed: Sequence[bool]) -> None:
        super().__init__()
        self.conv_in = FrameConv(channels, widths[0], 3)
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(before // 2 if k else before, width, layers + 1, timed[k] if k < len(timed) else None)
                for k, (before, width) in enumerate(itertools.pairwise(widths))
            ]
        )
        self.norm_out = ChannelNorm(widths[-1], 3)
        self.conv_out = FrameConv(widths[-1], out, 3)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 3, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class AutoencoderKLQwenImage(Network):
    """Pictures to latents and back; the encoder gives a distribution."""

    def __init__(
        self,
        base_dim: int = 96,
        z_dim: int = 16,
        dim_mult: tuple[int, ...] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_scales: tuple[float, ...] = (),
        temperal_downsample: tuple[bool, ...] = (False, True, True),
        dropout: float = 0.0,
        input_channels: int = 3,
        latents_mean: tuple[float, ...] = MEAN,
        latents_std: tuple[float, ...] = STD,
    ) -> None:
        if attn_scales:
            raise CheckpointError("An AutoencoderKLQwenImage with attn_scales is not supported.")
        if len(temperal_downsample) != len(dim_mult) - 1:
            raise CheckpointError(f"{len(dim_mult)} levels have {len(dim_mult) - 1} steps of temperal_downsample.")
        timed, widths = list(temperal_downsample), [base_dim * times for times in dim_mult]
        self.encoder = Encoder(input_channels, 2 * z_dim, [base_dim, *widths], num_res_blocks, timed)
        self.quant_conv, self.post_quant_conv = FrameConv(2 * z_dim, 2 * z_dim, 1), FrameConv(z_dim, z_dim, 1)
        self.decoder = Decoder(z_dim, input_channels, [widths[-1], *widths[::-1]], num_res_blocks, timed[::-1])

    def encode(self, x: Tensor) -> Posterior:
        """Pictures (B, 3, H, W) in -1..1 to a distribution over latents (B, C, h, w), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return Posterior(mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0)))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w), unscaled, to pictures (B, 3, H, W) in -1..1."""
        return self.decoder(self.post_quant_conv(z)).clamp(-1.0, 1.0)
