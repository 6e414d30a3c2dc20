"""The transformer of Hunyuan-DiT (Li et al. 2024): blocks that also look at text, with skips as in a U-Net.

Shapes: B rows, N image tokens, T text tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import attend
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal
from autopipeline.models.network import Network
from autopipeline.models.rotary import rotary, turn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu-approximate": partial(functional.gelu, approximate="tanh"),
}
POOLING_HEADS = 8
SIZES = 6
"""Numbers that say how big the picture was, where it was cropped and how big it shall be."""


class Projection(nn.Module):
    """Two linear layers."""

    def __init__(self, channels: int, inner: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, inner)
        self.linear_2 = nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to (..., out)."""
        return self.linear_2(functional.silu(self.linear_1(x)))


class AttentionPool(nn.Module):
    """The mean of a text asks all of its tokens (Radford et al. 2021, section 2.4)."""

    def __init__(self, length: int, width: int, out: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(length + 1, width) / width**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, out)

    def forward(self, text: Tensor) -> Tensor:
        """(B, T, E) to (B, out)."""
        rows = torch.cat([text.mean(1, keepdim=True), text], 1) + self.positional_embedding.to(text.dtype)
        made = (self.q_proj(rows[:, :1]), self.k_proj(rows), self.v_proj(rows))
        q, k, v = (each.unflatten(-1, (POOLING_HEADS, -1)).transpose(1, 2) for each in made)
        mixed = attend(q, k, v)
        return self.c_proj(mixed.transpose(1, 2).flatten(2)[:, 0])


class TimeTextSize(nn.Module):
    """Time, pooled text and, up to version 1.1, sizes and a style (of which there is one) as one vector."""

    def __init__(self, width: int, pooled: int, length: int, text: int, sized: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, width)
        self.pooler = AttentionPool(length, text, pooled)
        if sized:
            self.style_embedder = nn.Embedding(1, width)
        self.extra_embedder = Projection(pooled + (256 * SIZES + width if sized else 0), 4 * width, width)

    def forward(self, t: Tensor, text: Tensor, sizes: Tensor | None) -> Tensor:
        """(B,), (B, T, E) and (B, 6) to (B, D)."""
        time = sinusoidal(t, 256, cosine_first=True, shift=0).to(text.dtype)
        known = [self.pooler(text)]
        if sizes is not None:
            numbers = sinusoidal(sizes.flatten(), 256, cosine_first=True, shift=0).to(text.dtype)
            known += [numbers.unflatten(0, (-1, SIZES)).flatten(1), self.style_embedder.weight.expand(len(t), -1)]
        return self.timestep_embedder(time) + self.extra_embedder(torch.cat(known, 1))


class TurnedAttention(nn.Module):
    """Image tokens look at each other or at text; queries and keys are normed, and turned by their places."""

    def __init__(self, width: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k, self.to_v = (nn.Linear(context or width, width) for _ in range(2))
        self.norm_q, self.norm_k = (nn.LayerNorm(width // heads, eps=1e-6) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, table: Tensor, context: Tensor | None = None, unmixed: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D); where `unmixed` (B,) is true, every place attends to itself alone."""
        source = x if context is None else context
        q, k, v = (
            project(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D / H)
            for project, rows in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        q, k = turn(self.norm_q(q), table), self.norm_k(k)
        mixed = attend(q, turn(k, table) if context is None else k, v)
        if unmixed is not None:
            mixed = torch.where(unmixed[:, None, None, None], v, mixed)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


class ShiftedNorm(nn.Module):
    """Layer norm, shifted by the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, N, D) and (B, D) to (B, N, D)."""
        return self.norm(x) + self.linear(functional.silu(emb))[:, None]


class Perceptron(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise CheckpointError(f"A Hunyuan-DiT with activation_fn={activation!r} is not supported.")
        self.activation = ACTIVATIONS[activation]
        first = nn.Module()
        first.proj = nn.Linear(width, inner)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.net[2](self.activation(self.net[0].proj(x)))  # type: ignore[operator]


class Block(nn.Module):
    """A transformer block; with `skip`, what an early block gave comes in first."""

    def __init__(self, width: int, heads: int, context: int, inner: int, activation: str, skip: bool) -> None:
        super().__init__()
        self.norm1 = ShiftedNorm(width)
        self.attn1 = TurnedAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn2 = TurnedAttention(width, heads, context)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)
        self.ff = Perceptron(width, inner, activation)
        if skip:
            self.skip_norm = nn.LayerNorm(2 * width, eps=1e-6)
            self.skip_linear = nn.Linear(2 * width, width)

    def forward(
        self, x: Tensor, emb: Tensor, text: Tensor, table: Tensor, skip: Tensor | None, unmixed: Tensor | None
    ) -> Tensor:
        """(B, N, D) to (B, N, D), with text (B, T, E) and angles (B, N, D / H / 2, 2)."""
        if skip is not None:
            x = self.skip_linear(self.skip_norm(torch.cat([x, skip], -1)))
        x = x + self.attn1(self.norm1(x, emb), table, unmixed=unmixed)
        x = x + self.attn2(self.norm2(x), table, text)
        return x + self.ff(self.norm3(x))


class HunyuanDiT2DModel(Network):
    """The transformer of Hunyuan-DiT."""

    attentions = ("blocks.attn1",)

    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 88,
        in_channels: int | None = None,
        patch_size: int | None = None,
        activation_fn: str = "gelu-approximate",
        sample_size: int = 32,
        hidden_size: int = 1152,
        num_layers: int = 28,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        cross_attention_dim: int = 1024,
        norm_type: str = "layer_norm",
        cross_attention_dim_t5: int = 2048,
        pooled_projection_dim: int = 1024,
        text_len: int = 77,
        text_len_t5: int = 256,
        use_style_cond_and_image_meta_size: bool = True,
    ) -> None:
        width, heads, half = num_attention_heads * attention_head_dim, num_attention_heads, num_layers // 2
        self.skipping = half
        if width != hidden_size or attention_head_dim % 4 or in_channels is None or patch_size is None:
            raise CheckpointError("The heads of a Hunyuan-DiT, in fours of channels, have to make up hidden_size.")
        if num_layers > 1 and num_layers % 2:
            raise CheckpointError(f"A Hunyuan-DiT has an even number of layers, not {num_layers}.")
        self.text_embedder = Projection(cross_attention_dim_t5, 4 * cross_attention_dim_t5, cross_attention_dim)
        self.text_embedding_padding = nn.Parameter(torch.randn(text_len + text_len_t5, cross_attention_dim))
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.time_extra_emb = TimeTextSize(
            width, pooled_projection_dim, text_len_t5, cross_attention_dim_t5, use_style_cond_and_image_meta_size
        )
        inner = int(width * mlp_ratio)
        self.blocks = nn.ModuleList(
            [Block(width, heads, cross_attention_dim, inner, activation_fn, k > half) for k in range(num_layers)]
        )
        self.norm_out = nn.Module()
        self.norm_out.linear = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels * (2 if learn_sigma else 1))

    def rotary(self, places: Tensor) -> Tensor:
        """Angles (N, D / H / 2, 2) for the columns and rows of places (N, 2)."""
        half = self.config.attention_head_dim // 2
        return rotary(places, (half, half))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        encoder_hidden_states: Tensor,
        text_embedding_mask: Tensor,
        encoder_hidden_states_t5: Tensor,
        text_embedding_mask_t5: Tensor,
        rotary: Tensor,
        image_meta_size: Tensor | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """What the network says about x, (B, C, h, w); channels for the variance, which was hardly trained, are cut.

        Args:
            x: latents (B, C, h, w).
            t: times (B,), 0..1000.
            encoder_hidden_states: BERT's text (B, text_len, cross_attention_dim).
            text_embedding_mask: (B, text_len), true for tokens that count.
            encoder_hidden_states_t5: T5's text (B, text_len_t5, cross_attention_dim_t5).
            text_embedding_mask_t5: (B, text_len_t5), as above.
            rotary: angles of the places (B, N, D / H / 2, 2).
            image_meta_size: original size, target size and crop (B, 6), for networks that know them.
            perturbed: (B, blocks), in which of the blocks the image tokens of a row see themselves alone.
        """
        height, width = (side // self.config.patch_size for side in x.shape[-2:])
        tokens: Tensor = self.pos_embed.proj(x).flatten(2).transpose(1, 2)  # type: ignore[operator]
        emb = self.time_extra_emb(t, encoder_hidden_states_t5, image_meta_size)
        text = torch.cat([encoder_hidden_states, self.text_embedder(encoder_hidden_states_t5)], 1)
        counts = torch.cat([text_embedding_mask, text_embedding_mask_t5], 1).bool()
        text = torch.where(counts[..., None], text, self.text_embedding_padding)
        skips: list[Tensor] = []
        for k, block in enumerate(self.blocks):
            skip = skips.pop() if k > self.skipping else None
            tokens = block(tokens, emb, text, rotary, skip, None if perturbed is None else perturbed[:, k])
            if k < self.skipping - 1:
                skips.append(tokens)
        scale, shift = self.norm_out.linear(functional.silu(emb))[:, None].chunk(2, -1)  # type: ignore[operator]
        flat = functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        return self._picture(self.proj_out(flat * (1 + scale) + shift), height, width)[:, : x.shape[1]]

    def _picture(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, N, p * p * C) to (B, C, h, w)."""
        patch = self.config.patch_size
        squares = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))
        return squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
