"""The autoencoder of Kandinsky (MoVQ, Zheng et al. 2022): latents without doubt, and a decoder led by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import attend
from autopipeline.models.autoencoder_kl import AutoencoderKL
from autopipeline.models.network import Network
from autopipeline.models.resnet import Downsample, Upsample


class PlainNorm(nn.GroupNorm):
    """A group norm that passes the latents over."""

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) to the same."""
        return super().forward(x)


class SpatialNorm(nn.Module):
    """A group norm whose scale and shift the latents give, place by place."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_y = nn.Conv2d(latents, width, 1)
        self.conv_b = nn.Conv2d(latents, width, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """(B, C, H, W) with latents (B, Z, h, w)."""
        z = functional.interpolate(z, size=x.shape[-2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(z) + self.conv_b(z)


Norm = Callable[[int], nn.Module]


class Block(nn.Module):
    """Two convolutions with norms, and a way around them."""

    def __init__(self, channels: int, out: int, norm: Norm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        """(B, C, H, W) with the latents, if any norm takes them."""
        h = self.conv1(functional.silu(self.norm1(x, z)))
        h = self.conv2(functional.silu(self.norm2(h, z)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over the places, of one head."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        made = norm(width)
        self.name = "spatial_norm" if isinstance(made, SpatialNorm) else "group_norm"
        self.add_module(self.name, made)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        """(B, C, H, W) to the same."""
        rows = self.get_submodule(self.name)(x, z).flatten(2).transpose(1, 2)[:, None]  # (B, 1, H * W, C)
        mixed = self.to_out[0](attend(self.to_q(rows), self.to_k(rows), self.to_v(rows))[:, 0])
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[-2:])


class Level(nn.Module):
    """Blocks, each with attention where there is any, then a change of resolution."""

    def __init__(
        self, before: int, width: int, count: int, norm: Norm, attention: bool, change: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Block(before if k == 0 else width, width, norm) for k in range(count)])
        self.attentions = nn.ModuleList([Attention(width, norm) for _ in range(count if attention else 0)])
        self.change = next(iter(change), None)
        for name, part in change.items():
            self.add_module(name, nn.ModuleList([part]))

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        """(B, C, H, W) through all blocks."""
        for k, block in enumerate(self.resnets):
            x = block(x, z)
            x = self.attentions[k](x, z) if len(self.attentions) else x
        return x if self.change is None else getattr(self, self.change)[0](x)


class Middle(nn.Module):
    """Two blocks, with attention between them."""

    def __init__(self, width: int, norm: Norm, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Block(width, width, norm) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(width, norm)] if attention else [])

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        """(B, C, H, W) to the same."""
        x = self.resnets[0](x, z)
        for layer in self.attentions:
            x = layer(x, z)
        return self.resnets[1](x, z)


class Encoder(nn.Module):
    """Pictures to latents."""

    def __init__(
        self, channels: int, out: int, widths: Sequence[int], kinds: Sequence[str], layers: int, norm: Norm, mid: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for k, (kind, width) in enumerate(zip(kinds, widths, strict=True)):
            change: dict[str, nn.Module] = {}
            if k < len(widths) - 1:
                change["downsamplers"] = Downsample(width, padding=0)
            self.down_blocks.append(Level(widths[max(k - 1, 0)], width, layers, norm, kind.startswith("Attn"), change))
        self.mid_block = Middle(widths[-1], norm, mid)
        self.conv_norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, out, h, w)."""
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x, None)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(
        self, channels: int, out: int, widths: Sequence[int], kinds: Sequence[str], layers: int, norm: Norm, mid: bool
    ) -> None:
        super().__init__()
        back = list(widths)[::-1]
        self.conv_in = nn.Conv2d(channels, back[0], 3, padding=1)
        self.mid_block = Middle(back[0], norm, mid)
        self.up_blocks = nn.ModuleList()
        for k, (kind, width) in enumerate(zip(kinds, back, strict=True)):
            change: dict[str, nn.Module] = {"upsamplers": Upsample(width)} if k < len(back) - 1 else {}
            attention = kind.startswith("Attn")
            self.up_blocks.append(Level(back[max(k - 1, 0)], width, layers + 1, norm, attention, change))
        self.conv_norm_out = norm(back[-1])
        self.conv_out = nn.Conv2d(back[-1], out, 3, padding=1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """(B, C, h, w), and the latents that the norms look at, to (B, 3, H, W)."""
        x = self.conv_in(x)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x, z)
        return self.conv_out(functional.silu(self.conv_norm_out(x, z)))


class VQModel(Network):
    """Pictures to latents and back. The codebook is kept for other readers: nobody here rounds latents to it."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
    ) -> None:
        for kind in (*down_block_types, *up_block_types):
            if kind.removeprefix("Attn") not in ("DownEncoderBlock2D", "UpDecoderBlock2D"):
                raise CheckpointError(f"An autoencoder with blocks of the type {kind} is not supported.")
        if act_fn not in ("silu", "swish") or norm_type not in ("group", "spatial") or lookup_from_codebook:
            told = f"act_fn={act_fn!r}, norm_type={norm_type!r}, lookup_from_codebook={lookup_from_codebook}"
            raise CheckpointError(f"An autoencoder with {told} is not supported.")
        codes = vq_embed_dim or latent_channels
        plain = partial(PlainNorm, norm_num_groups, eps=1e-6)
        led: Norm = (lambda width: SpatialNorm(width, latent_channels)) if norm_type == "spatial" else plain
        widths, layers, mid = block_out_channels, layers_per_block, mid_block_add_attention
        self.encoder = Encoder(in_channels, latent_channels, widths, down_block_types, layers, plain, mid)
        self.quant_conv = nn.Conv2d(latent_channels, codes, 1)
        self.quantize = nn.Module()
        self.quantize.add_module("embedding", nn.Embedding(num_vq_embeddings, codes))
        self.post_quant_conv = nn.Conv2d(codes, latent_channels, 1)
        self.decoder = Decoder(latent_channels, out_channels, widths, up_block_types, layers, led, mid)

    def encode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1 to latents (B, C, h, w)."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, H, W) of about -1..1."""
        return self.decoder(self.post_quant_conv(z), z)

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """Old checkpoints name the attention's layers differently."""
        return AutoencoderKL.renamed(key)
