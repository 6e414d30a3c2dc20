"""The transformer of PixArt-alpha (Chen et al. 2023) and PixArt-sigma (Chen et al. 2024).

Shapes: B rows, N image tokens, T text tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import Attention
from autopipeline.models.embeddings import TimestepEmbedding, plane_sinusoids, sinusoidal
from autopipeline.models.network import Network
from autopipeline.models.sd3 import Patches, Perceptron, joined_patches, normal

FIXED: dict[str, tuple[object, ...]] = {
    "norm_type": ("ada_norm_single",),
    "activation_fn": ("gelu-approximate",),
    "attention_type": ("default", None),
}
"""Options that no published network has other than so."""


class CaptionProjection(nn.Module):
    """Text to the width of the network."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        """(B, T, E) to (B, T, D)."""
        return self.linear_2(functional.gelu(self.linear_1(text), approximate="tanh"))


class TimeAndSize(nn.Module):
    """Time, and for some networks the size of the picture, as one vector; sides and aspect take a third of it each."""

    def __init__(self, width: int, sized: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, width)
        if sized:
            self.resolution_embedder = TimestepEmbedding(256, width // 3)
            self.aspect_ratio_embedder = TimestepEmbedding(256, width // 3)

    def forward(self, t: Tensor, resolution: Tensor | None, aspect_ratio: Tensor | None) -> Tensor:
        """(B,), (B, 2) and (B, 1) to (B, D)."""
        emb = self._of(self.timestep_embedder, t[:, None])
        if resolution is None or aspect_ratio is None:
            return emb
        sides = self._of(self.resolution_embedder, resolution)
        return emb + torch.cat([sides, self._of(self.aspect_ratio_embedder, aspect_ratio)], 1)

    @staticmethod
    def _of(embedder: TimestepEmbedding, numbers: Tensor) -> Tensor:
        """Numbers (B, K), each by itself, to (B, K * channels)."""
        waves = sinusoidal(numbers.flatten(), 256, cosine_first=True, shift=0)
        return embedder(waves.to(embedder.linear_1.weight.dtype)).unflatten(0, numbers.shape).flatten(1)


class SharedModulation(nn.Module):
    """Shifts, scales and gates from the time, the same for all blocks, which add their own (section 2.3 of alpha)."""

    def __init__(self, width: int, sized: bool) -> None:
        super().__init__()
        self.emb = TimeAndSize(width, sized)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor, resolution: Tensor | None, aspect_ratio: Tensor | None) -> tuple[Tensor, Tensor]:
        """The vectors (B, 6, D), and the embedding (B, D) that they are made of."""
        emb = self.emb(t, resolution, aspect_ratio)
        return self.linear(functional.silu(emb)).unflatten(1, (6, -1)), emb


class Block(nn.Module):
    """Self-attention and perceptron, modulated; between them attention to the text, which is not."""

    def __init__(self, width: int, heads: int, text: int, bias: bool, eps: float, affine: bool) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.norm1 = nn.LayerNorm(width, eps=eps, elementwise_affine=affine)
        self.attn1 = Attention(width, heads, bias=bias)
        self.attn2 = Attention(width, heads, text, bias=bias)
        self.norm2 = nn.LayerNorm(width, eps=eps, elementwise_affine=affine)
        self.ff = Perceptron(width)

    def forward(
        self, x: Tensor, text: Tensor, unseen: Tensor | None, vectors: Tensor, unmixed: Tensor | None
    ) -> Tensor:
        """(B, N, D), (B, T, D), what is added to scores of text (B, 1, 1, T), (B, 6, D), (B,) to (B, N, D)."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table + vectors).chunk(6, 1)
        x = x + gate * self.attn1(self.norm1(x) * (1 + scale) + shift, unmixed=unmixed)
        x = x + self.attn2(x, text, mask=unseen)
        return x + ff_gate * self.ff(self.norm2(x) * (1 + ff_scale) + ff_shift)


class PixArtTransformer2DModel(Network):
    """The transformer of PixArt."""

    attentions = ("transformer_blocks.attn1",)

    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        cross_attention_dim: int = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
    ) -> None:
        for name, known in FIXED.items():
            if self.config[name] not in known:
                raise CheckpointError(f"A PixArt transformer with {name}={self.config[name]!r} is not supported.")
        width, heads = num_attention_heads * attention_head_dim, num_attention_heads
        self.width = width
        self.sized = sample_size == 128 if use_additional_conditions is None else use_additional_conditions
        self.stretch = max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale
        self.out_channels = out_channels or in_channels
        self.pos_embed = Patches(in_channels, width, patch_size)
        self.adaln_single = SharedModulation(width, self.sized)
        self.caption_projection = CaptionProjection(caption_channels, width) if caption_channels else None
        self.transformer_blocks = nn.ModuleList(
            [
                Block(width, heads, cross_attention_dim, attention_bias, norm_eps, norm_elementwise_affine)
                for _ in range(num_layers)
            ]
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size**2 * self.out_channels)

    def captions(self, text: Tensor) -> Tensor:
        """Text (B, T, E) as the blocks take it, (B, T, D): once for all steps."""
        return text if self.caption_projection is None else self.caption_projection(text)

    def places(self, height: int, width: int) -> Tensor:
        """Where each patch of latents of height x width is, (1, N, D) in float32, once for all steps.

        Whatever the size, places span the grid that the network was made for, finer by its `interpolation_scale`.
        """
        patch = self.config.patch_size
        base, counts = self.config.sample_size // patch, (height // patch, width // patch)
        rows, columns = (torch.arange(count) / (count / base) / self.stretch for count in counts)
        return plane_sinusoids(self.width, rows, columns)[None].to(self.device)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        encoder_hidden_states: Tensor,
        places: Tensor,
        encoder_attention_mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """The noise in x and, in networks with twice the channels, what they learned of its variance: (B, C', h, w).

        Args:
            x: latents (B, C, h, w).
            t: times (B,), 0..1000.
            encoder_hidden_states: text as `captions` makes it, (B, T, D).
            places: as `places` makes them, (B, N, D).
            encoder_attention_mask: (B, T), 1 for tokens that count and 0 for the others.
            resolution: height and width of the picture in pixels (B, 2), for networks that are `sized`.
            aspect_ratio: one divided by the other (B, 1), likewise.
            perturbed: (B, blocks), in which of the blocks the image tokens of a row don't see each other.
        """
        patch = self.config.patch_size
        tokens = (self.pos_embed(x) + places).to(x.dtype)
        vectors, emb = self.adaln_single(t, resolution, aspect_ratio)
        unseen = None if encoder_attention_mask is None else (encoder_attention_mask - 1)[:, None, None] * 10000.0
        for k, block in enumerate(self.transformer_blocks):
            unmixed = None if perturbed is None else perturbed[:, k]
            tokens = block(tokens, encoder_hidden_states, unseen, vectors, unmixed)
        shift, scale = (self.scale_shift_table + emb[:, None]).chunk(2, 1)
        squares = self.proj_out(normal(tokens) * (1 + scale) + shift)
        return joined_patches(squares, x.shape[-2] // patch, x.shape[-1] // patch, patch)

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """Older files hold the table of places, and the text that stands for none in training."""
        return None if key in ("pos_embed.pos_embed", "caption_projection.y_embedding") else key
