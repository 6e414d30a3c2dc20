"""The deep compression autoencoder, DC-AE (Chen et al. 2024): 32 pixels or more a latent, along one side.

Where the resolution changes, channels are folded into places or back beside the convolution, so that it only has to
learn what is to change.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.autoencoder_kl import Posterior
from autopipeline.models.embeddings import ACTIVATIONS
from autopipeline.models.linear_attention import BiasedNorm, GatedConvolutions, attend_linearly
from autopipeline.models.network import Network

NORMS: dict[str, type[nn.Module]] = {"rms_norm": BiasedNorm, "batch_norm": nn.BatchNorm2d}
KINDS = ("ResBlock", "EfficientViTBlock")


class Residual(nn.Module):
    """Two convolutions, a norm, and around."""

    def __init__(self, channels: int, norm: str, activation: str) -> None:
        super().__init__()
        self.nonlinearity = ACTIVATIONS[activation]()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = NORMS[norm](channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        return x + self.norm(self.conv2(self.nonlinearity(self.conv1(x))))


class Neighbourhood(nn.Module):
    """Queries, keys and values gathered from the places around, each channel and then each head by itself."""

    def __init__(self, channels: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=3 * heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        return self.proj_out(self.proj_in(x))


class MultiscaleAttention(nn.Module):
    """Linear attention at several scales side by side (Cai et al. 2023), and around."""

    def __init__(self, channels: int, head: int, norm: str, kernels: Sequence[int]) -> None:
        super().__init__()
        self.head = head
        heads = channels // head
        inner = heads * head
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, inner, bias=False) for _ in range(3))
        self.to_qkv_multiscale = nn.ModuleList([Neighbourhood(3 * inner, heads, kernel) for kernel in kernels])
        self.to_out = nn.Linear(inner * (1 + len(kernels)), channels, bias=False)
        self.norm_out = NORMS[norm](channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        rows = x.movedim(1, -1)
        plain = torch.cat([project(rows) for project in (self.to_q, self.to_k, self.to_v)], -1).movedim(-1, 1)
        scales = torch.cat([plain, *(gather(plain) for gather in self.to_qkv_multiscale)], 1)
        groups = scales.unflatten(1, (-1, 3, self.head)).flatten(4)  # (B, heads of all scales, 3, D, H * W)
        mixed = attend_linearly(*groups.unbind(2)).to(x.dtype).flatten(1, 2)
        out = self.to_out(mixed.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + self.norm_out(out)


class AttentionBlock(nn.Module):
    """Attention, then gated convolutions."""

    def __init__(self, channels: int, head: int, norm: str, kernels: Sequence[int]) -> None:
        super().__init__()
        self.attn = MultiscaleAttention(channels, head, norm, kernels)
        self.conv_out = GatedConvolutions(channels, 4, normed=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        x = self.attn(x)
        return x + self.conv_out(x)


class Down(nn.Module):
    """Half the resolution; the means of the folded pixels go around."""

    def __init__(self, channels: int, out: int, fold: bool, around: bool = True) -> None:
        super().__init__()
        self.fold, self.around, self.out = fold, around, out
        self.conv = nn.Conv2d(channels, out // 4 if fold else out, 3, stride=1 if fold else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, H / 2, W / 2)."""
        made = self.conv(x)
        made = functional.pixel_unshuffle(made, 2) if self.fold else made
        return made + means(functional.pixel_unshuffle(x, 2), self.out) if self.around else made


class Up(nn.Module):
    """Twice the resolution; the pixels, repeated and unfolded, go around."""

    def __init__(self, channels: int, out: int, fold: bool, around: bool = True) -> None:
        super().__init__()
        self.fold, self.around, self.out = fold, around, out
        self.conv = nn.Conv2d(channels, 4 * out if fold else out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, out, 2 h, 2 w)."""
        if self.fold:
            made = functional.pixel_shuffle(self.conv(x), 2)
        else:
            made = self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))
        return made + functional.pixel_shuffle(copies(x, 4 * self.out), 2) if self.around else made


def means(x: Tensor, channels: int) -> Tensor:
    """Neighbouring channels averaged, so that so many are left."""
    return x.unflatten(1, (channels, -1)).mean(2)


def copies(x: Tensor, channels: int) -> Tensor:
    """Each channel repeated, so that there are so many."""
    return x.repeat_interleave(channels // x.shape[1], 1)


class Levels:
    """What a config says about one half of the autoencoder, level by level from the picture's side."""

    def __init__(self, config: Any, half: str, norms: str | Sequence[str], activations: str | Sequence[str]) -> None:
        self.widths: list[int] = list(config[f"{half}_block_out_channels"])
        self.layers: list[int] = list(config[f"{half}_layers_per_block"])
        self.kernels: list[list[int]] = list(config[f"{half}_qkv_multiscales"])
        self.head: int = config["attention_head_dim"]
        self.kinds = self._each(config[f"{half}_block_types"], KINDS)
        self.norms, self.acts = self._each(norms, NORMS), self._each(activations, ACTIVATIONS)
        self.first = self.widths[0] if self.layers[0] > 0 else self.widths[1]  # a level without layers is passed over

    def _each(self, names: str | Sequence[str], known: Container[str]) -> list[str]:
        """A name for each level, from one for all or a list."""
        many = [names] * len(self.widths) if isinstance(names, str) else list(names)
        unknown = [name for name in many if name not in known]
        if unknown:
            raise CheckpointError(f"An AutoencoderDC with {unknown[0]!r} is not supported.")
        return many

    def blocks(self, k: int) -> list[nn.Module]:
        """The blocks of a level."""
        width, norm = self.widths[k], self.norms[k]
        if self.kinds[k] == "ResBlock":
            return [Residual(width, norm, self.acts[k]) for _ in range(self.layers[k])]
        return [AttentionBlock(width, self.head, norm, self.kernels[k]) for _ in range(self.layers[k])]


class Encoder(nn.Module):
    """Pictures to latents."""

    def __init__(self, channels: int, latents: int, levels: Levels, fold: bool, around: bool) -> None:
        super().__init__()
        self.around, self.latents = around, latents
        whole = levels.layers[0] > 0
        self.conv_in = (
            nn.Conv2d(channels, levels.first, 3, padding=1) if whole else Down(channels, levels.first, fold, False)
        )
        self.down_blocks = nn.ModuleList()
        for k, width in enumerate(levels.widths):
            blocks = levels.blocks(k)
            if blocks and k < len(levels.widths) - 1:
                blocks.append(Down(width, levels.widths[k + 1], fold))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(levels.widths[-1], latents, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, h, w)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(x) + means(x, self.latents) if self.around else self.conv_out(x)


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, channels: int, latents: int, levels: Levels, fold: bool, around: bool, activation: str) -> None:
        super().__init__()
        self.around, self.width = around, levels.widths[-1]
        self.conv_in = nn.Conv2d(latents, self.width, 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for k, width in enumerate(levels.widths):
            blocks = levels.blocks(k)
            if blocks and k < len(levels.widths) - 1:
                blocks.insert(0, Up(levels.widths[k + 1], width, fold))
            self.up_blocks.append(nn.Sequential(*blocks))
        self.norm_out = BiasedNorm(levels.first)
        self.conv_act = ACTIVATIONS[activation]()
        whole = levels.layers[0] > 0
        self.conv_out = (
            nn.Conv2d(levels.first, channels, 3, padding=1) if whole else Up(levels.first, channels, fold, False)
        )

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 3, H, W)."""
        x = self.conv_in(z) + copies(z, self.width) if self.around else self.conv_in(z)
        for k in reversed(range(len(self.up_blocks))):
            x = self.up_blocks[k](x)
        return self.conv_out(self.conv_act(self.norm_out(x)))


class AutoencoderDC(Network):
    """Pictures to few latents of many channels and back, without doubt."""

    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        attention_head_dim: int = 32,
        encoder_block_types: str | tuple[str, ...] = "ResBlock",
        decoder_block_types: str | tuple[str, ...] = "ResBlock",
        encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
        encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3),
        decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,)),
        upsample_block_type: str = "pixel_shuffle",
        downsample_block_type: str = "pixel_unshuffle",
        decoder_norm_types: str | tuple[str, ...] = "rms_norm",
        decoder_act_fns: str | tuple[str, ...] = "silu",
        encoder_out_shortcut: bool = True,
        decoder_in_shortcut: bool = True,
        decoder_conv_act_fn: str = "relu",
        scaling_factor: float = 1.0,
    ) -> None:
        down = Levels(self.config, "encoder", "rms_norm", "silu")
        up = Levels(self.config, "decoder", decoder_norm_types, decoder_act_fns)
        fold_down, fold_up = downsample_block_type == "pixel_unshuffle", upsample_block_type != "interpolate"
        self.encoder = Encoder(in_channels, latent_channels, down, fold_down, encoder_out_shortcut)
        self.decoder = Decoder(in_channels, latent_channels, up, fold_up, decoder_in_shortcut, decoder_conv_act_fn)

    def encode(self, x: Tensor) -> Posterior:
        """Pictures (B, 3, H, W) in -1..1 to latents (B, C, h, w), unscaled."""
        return Posterior(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w), unscaled, to pictures (B, 3, H, W) of about -1..1."""
        return self.decoder(z)
