"""The autoencoder of latent diffusion (Rombach et al. 2022)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import PixelAttention
from autopipeline.models.network import Network
from autopipeline.models.resnet import Downsample, ResnetBlock, Upsample


class Posterior(NamedTuple):
    """What an encoder believes: mean and standard deviation (None: it has no doubt), (B, C, h, w)."""

    mean: Tensor
    std: Tensor | None = None

    def mode(self) -> Tensor:
        """The most likely latents."""
        return self.mean

    def sample(self, noise: Tensor | Callable[[], Tensor]) -> Tensor:
        """Latents drawn with standard-normal noise of the shape of the mean."""
        if self.std is None:
            return self.mean
        return self.mean + self.std * (noise if isinstance(noise, Tensor) else noise())


class Level(nn.Module):
    """One level of the autoencoder: residual blocks, then a change of resolution."""

    def __init__(self, widths: list[int], groups: int, down: bool = False, up: bool = False) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.resnets = nn.ModuleList([ResnetBlock(a, b, None, groups=groups, eps=1e-6) for a, b in pairs])
        if down:
            self.downsamplers = nn.ModuleList([Downsample(widths[-1], padding=0)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(widths[-1])])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) through all blocks."""
        for block in self.resnets:
            x = block(x)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)[0](x)
        return x


class Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        if attention:
            self.attentions = nn.ModuleList([PixelAttention(width, 1, groups, 1e-6)])
        self.resnets = nn.ModuleList([ResnetBlock(width, width, None, groups=groups, eps=1e-6) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Pictures to moments of latents."""

    def __init__(self, channels: int, out: int, widths: list[int], layers: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        befores = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            [
                Level([before] + [width] * layers, groups, down=k < len(widths) - 1)
                for k, (before, width) in enumerate(zip(befores, widths, strict=True))
            ]
        )
        self.mid_block = Middle(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, out, h, w)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(functional.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, channels: int, out: int, widths: list[int], layers: int, groups: int, attention: bool) -> None:
        super().__init__()
        back = widths[::-1]
        self.conv_in = nn.Conv2d(channels, back[0], 3, padding=1)
        self.mid_block = Middle(back[0], groups, attention)
        befores = [back[0], *back[:-1]]
        self.up_blocks = nn.ModuleList(
            [
                Level([before] + [width] * (layers + 1), groups, up=k < len(back) - 1)
                for k, (before, width) in enumerate(zip(befores, back, strict=True))
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, back[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(back[-1], out, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 3, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))


def check_blocks(kinds: tuple[str, ...], act_fn: str) -> None:
    """CheckpointError for blocks or activations of other autoencoders."""
    for kind in kinds:
        if kind not in ("DownEncoderBlock2D", "UpDecoderBlock2D"):
            raise CheckpointError(f"An autoencoder with blocks of the type {kind} is not supported.")
    if act_fn not in ("silu", "swish"):
        raise CheckpointError(f"An autoencoder with act_fn={act_fn!r} is not supported.")


class AutoencoderKL(Network):
    """Pictures to latents and back; the encoder gives a distribution."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        check_blocks((*down_block_types, *up_block_types), act_fn)
        rest: tuple[Any, ...] = (list(block_out_channels), layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *rest)
        self.decoder = Decoder(latent_channels, out_channels, *rest)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

    def encode(self, x: Tensor) -> Posterior:
        """Pictures (B, 3, H, W) in -1..1 to a distribution over latents (B, C, h, w), unscaled."""
        moments = self.encoder(x)
        mean, logvar = (moments if self.quant_conv is None else self.quant_conv(moments)).chunk(2, 1)
        return Posterior(mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0)))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w), unscaled, to pictures (B, 3, H, W) of about -1..1."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """Old checkpoints name the attention's layers differently."""
        if ".attentions." not in key:
            return key
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            key = key.replace(f".{old}.", f".{new}.")
        return key
