"""The transformer of Lumina-Next (Zhuo et al. 2024), which looks at picture and text with the same queries.

Shapes: B rows, N places, T text tokens, D width, H heads, S = D / H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import Mask, RowWise, attend, masks
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal
from autopipeline.models.network import Network
from autopipeline.models.rotary import grid_places, rotary, turn
from autopipeline.models.sd3 import joined_patches, normal


def attend_shared(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Attention in which several heads of queries (B, H, L, S) share one of keys and values, to (B, H, L, S)."""
    times = q.shape[1] // k.shape[1]
    return attend(q, *(rows.repeat_interleave(times, 1) if times > 1 else rows for rows in (k, v)), mask=mask)


def narrow(width: int) -> int:
    """The width of the vector that says time."""
    return min(width, 1024)


class FeedForward(RowWise):
    """A wider layer with a gate (SwiGLU, Shazeer 2020), and back."""

    def __init__(self, width: int, inner: int, multiple: int, factor: float | None) -> None:
        super().__init__()
        inner = inner if factor is None else int(factor * inner)
        inner = -(-inner // multiple) * multiple
        self.linear_1, self.linear_3 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.linear_2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.linear_2(functional.silu(self.linear_1(x)) * self.linear_3(x))


class Modulated(nn.Module):
    """A norm scaled by the vector of time, and what the rest of a block needs of it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(narrow(width), 4 * width)
        self.norm = nn.RMSNorm(width, eps=eps)

    def forward(self, x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, N, D) to the same, then gate, scale and gate of the perceptron (B, 1, D)."""
        scale, gate, ff_scale, ff_gate = self.linear(functional.silu(vector))[:, None].chunk(4, -1)
        return self.norm(x) * (1 + scale), gate.tanh(), 1 + ff_scale, ff_gate.tanh()


class Output(nn.Module):
    """What the tokens have become, as latents."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(narrow(width), width)
        self.linear_2 = nn.Linear(width, out)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """(B, N, D) to (B, N, out)."""
        return self.linear_2(normal(x) * (1 + self.linear_1(functional.silu(vector)))[:, None])


class Attention(nn.Module):
    """Projections, with norms over all heads together where the config asks for them."""

    def __init__(self, config: Any, context: int, output: bool = False) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.size = width // heads
        shared = self.size * (config.num_kv_heads or heads)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, shared, bias=False) for _ in range(2))
        self.norm_q, self.norm_k = (
            nn.LayerNorm(inner, eps=1e-5) if config.qk_norm else nn.Identity() for inner in (width, shared)
        )
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)] if output else [])

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of (B, N, D), keys and values of the context (B, L, C), all as (B, heads, L, S)."""
        rows = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        q, k, v = (each.unflatten(-1, (-1, self.size)).transpose(1, 2) for each in rows)
        return q, k, v


class Block(nn.Module):
    """Attention to picture and text, added head by head, and a perceptron; a norm before and after each."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps, text = config.hidden_size, config.norm_eps, config.cross_attention_dim
        self.gate = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.attn1, self.attn2 = Attention(config, width), Attention(config, text, output=True)
        self.feed_forward = FeedForward(width, int(8 * width / 3), config.multiple_of, config.ffn_dim_multiplier)
        self.norm1, self.norm1_context = Modulated(width, eps), nn.RMSNorm(text, eps=eps)
        self.norm2, self.ffn_norm1, self.ffn_norm2 = (nn.RMSNorm(width, eps=eps) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        seen: Tensor,
        vector: Tensor,
        turns: Tensor,
        sharpness: Tensor,
        mask: Mask = None,
    ) -> Tensor:
        """(B, N, D), (B, T, C), which words count (B, 1, 1, T), (B, D), (B, N, S / 2, 2), (B, 1) to (B, N, D)."""
        flat, gate, ff_scale, ff_gate = self.norm1(x, vector)
        q, k, v = self.attn1.project(flat, flat)
        q = turn(q, turns) * sharpness[..., None, None]
        mixed = attend_shared(q, turn(k, turns), v, mask)
        q, k, v = self.attn2.project(flat, self.norm1_context(text))
        mixed = mixed + attend_shared(turn(q, turns), k, v, seen) * self.gate.tanh()[:, None, None]
        x = x + gate * self.norm2(self.attn2.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return x + ff_gate * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * ff_scale))


class LuminaNextDiT2DModel(Network):
    """The transformer of Lumina-Next."""

    attentions = ("layers.attn1",)

    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 2304,
        num_layers: int = 32,
        num_attention_heads: int = 32,
        num_kv_heads: int | None = None,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        learn_sigma: bool = True,
        qk_norm: bool = True,
        cross_attention_dim: int = 2048,
        scaling_factor: float = 1.0,
    ) -> None:
        if hidden_size // num_attention_heads % 4:
            raise CheckpointError(f"Heads of {hidden_size // num_attention_heads} channels, which 4 does not divide.")
        vector, out = narrow(hidden_size), in_channels * (2 if learn_sigma else 1)
        self.patch_embedder = nn.Module()
        self.patch_embedder.proj = nn.Linear(patch_size**2 * in_channels, hidden_size)
        self.pad_token = nn.Parameter(torch.zeros(hidden_size))  # in checkpoints, but of no use
        self.time_caption_embed = nn.Module()
        self.time_caption_embed.timestep_embedder = TimestepEmbedding(256, vector)
        self.time_caption_embed.caption_embedder = nn.Sequential(
            nn.LayerNorm(cross_attention_dim), nn.Linear(cross_attention_dim, vector)
        )
        self.layers = nn.ModuleList([Block(self.config) for _ in range(num_layers)])
        self.norm_out = Output(hidden_size, patch_size**2 * out)

    def turns(self, rows: int, columns: int, linear: float = 1.0, ntk: float = 1.0) -> Tensor:
        """Rotary places (N, S / 2, 2) of so many rows and columns, closer together or turning more slowly.

        Pairs of channels turn by row and column in turn.
        """
        size = self.config.hidden_size // self.config.num_attention_heads
        table = rotary(grid_places(rows, columns)[:, 1:] / linear, (size // 2, size // 2), 10000.0 * ntk)
        return table.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).to(self.device)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor,
        turns: Tensor,
        sharpness: Tensor,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """The velocity at x, from noise to picture; then, where `learn_sigma`, as many channels of no use.

        Args:
            x: latents (B, C, h, w).
            t: times (B,), from 0 (noise) to 1 (picture).
            encoder_hidden_states: text (B, T, cross_attention_dim).
            encoder_mask: 1 for the tokens that count, 0 for the others, (B, T).
            turns: rotary places (B, N, S / 2, 2).
            sharpness: (B, 1), what scores between places are multiplied by.
            perturbed: (B, layers), in which of them the places of a row see only themselves.
        """
        patch, (height, width) = self.config.patch_size, x.shape[-2:]
        squares = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
        tokens = self.patch_embedder.proj(squares.flatten(3).flatten(1, 2))  # type: ignore[operator]
        vector = self._vector(t, encoder_hidden_states, encoder_mask)
        seen, sharpness = encoder_mask[:, None, None].bool(), sharpness.to(x.dtype)
        each = masks(len(self.layers), None, perturbed, slice(None))
        for block, mask in zip(self.layers, each, strict=True):
            tokens = block(tokens, encoder_hidden_states, seen, vector, turns, sharpness, mask)
        return joined_patches(self.norm_out(tokens, vector), height // patch, width // patch, patch)

    def _vector(self, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Time and the mean of the text, as one vector (B, D)."""
        embed: Any = self.time_caption_embed
        waves = sinusoidal(t, 256, cosine_first=True, shift=0).to(text.dtype)
        counted = mask[..., None].float()
        mean = (text * counted).sum(1) / counted.sum(1)
        return embed.timestep_embedder(waves) + embed.caption_embedder(mean.to(text.dtype))
