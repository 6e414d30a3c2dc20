"""The transformer of Lumina-Image 2.0 (Qin et al. 2025): text and picture refined apart, then one sequence.

Shapes: B rows, N places, T text tokens, D width, S width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import Mask, masks
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal
from autopipeline.models.lumina import FeedForward, Modulated, Output, attend_shared, narrow
from autopipeline.models.network import Network
from autopipeline.models.rotary import grid_places, rotary, turn
from autopipeline.models.sd3 import joined_patches


class Attention(nn.Module):
    """Attention with norms of queries and keys, head by head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.size = width // heads
        shared = self.size * (config.num_kv_heads or heads)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(width, shared, bias=False) for _ in range(2))
        self.norm_q, self.norm_k = (nn.RMSNorm(self.size, eps=1e-5) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, x: Tensor, seen: Mask, turns: Tensor) -> Tensor:
        """(B, L, D), which tokens count (B, 1, 1, L) and rotary places (B, L, S / 2, 2) to (B, L, D)."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = attend_shared(turn(self.norm_q(q), turns), turn(self.norm_k(k), turns), v, seen)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


class PlainBlock(nn.Module):
    """Attention and perceptron, with a norm before and after each; knows no time."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.attn = Attention(config)
        self.feed_forward = FeedForward(width, 4 * width, config.multiple_of, config.ffn_dim_multiplier)
        self.norm1, self.norm2, self.ffn_norm1, self.ffn_norm2 = (nn.RMSNorm(width, eps=eps) for _ in range(4))

    def forward(self, x: Tensor, seen: Mask, turns: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        x = x + self.norm2(self.attn(self.norm1(x), seen, turns))
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))


class Block(PlainBlock):
    """The same, led by a vector of time."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm1 = Modulated(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, seen: Mask, turns: Tensor, vector: Tensor) -> Tensor:  # type: ignore[override]
        """(B, L, D) and (B, D) to (B, L, D)."""
        flat, gate, ff_scale, ff_gate = self.norm1(x, vector)
        x = x + gate * self.norm2(self.attn(flat, seen, turns))
        return x + ff_gate * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * ff_scale))


class Lumina2Transformer2DModel(Network):
    """The transformer of Lumina-Image 2.0."""

    attentions = ("layers.attn",)

    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2304,
        num_layers: int = 26,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 24,
        num_kv_heads: int = 8,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        scaling_factor: float = 1.0,
        axes_dim_rope: tuple[int, int, int] = (32, 32, 32),
        axes_lens: tuple[int, int, int] = (300, 512, 512),
        cap_feat_dim: int = 1024,
    ) -> None:
        if sum(axes_dim_rope) != hidden_size // num_attention_heads:
            raise CheckpointError(
                f"axes_dim_rope={tuple(axes_dim_rope)} has to make up heads of {hidden_size // num_attention_heads}."
            )
        embed = self.time_caption_embed = nn.Module()
        embed.timestep_embedder = TimestepEmbedding(256, narrow(hidden_size))
        embed.caption_embedder = nn.Sequential(
            nn.RMSNorm(cap_feat_dim, eps=norm_eps), nn.Linear(cap_feat_dim, hidden_size)
        )
        self.x_embedder = nn.Linear(patch_size**2 * in_channels, hidden_size)
        self.noise_refiner = nn.ModuleList([Block(self.config) for _ in range(num_refiner_layers)])
        self.context_refiner = nn.ModuleList([PlainBlock(self.config) for _ in range(num_refiner_layers)])
        self.layers = nn.ModuleList([Block(self.config) for _ in range(num_layers)])
        self.norm_out = Output(hidden_size, patch_size**2 * (out_channels or in_channels))

    def turns(self, mask: Tensor, rows: int, columns: int) -> Tensor:
        """Rotary places (B, T + N, S / 2, 2) of the words, then of so many rows and columns, which follow the words.

        `mask` (B, T): 1 for the words that count.
        """
        words = torch.zeros(*mask.shape, 3, dtype=torch.long)
        words[..., 0] = torch.arange(mask.shape[1])
        places = grid_places(rows, columns).repeat(len(mask), 1, 1)
        places[..., 0] = mask.sum(1, keepdim=True)
        return rotary(torch.cat([words, places], 1), self.config.axes_dim_rope).to(self.device)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        turns: Tensor,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """The velocity at x, from noise to picture.

        Args:
            x: latents (B, C, h, w).
            t: times (B,), from 0 (noise) to 1 (picture).
            encoder_hidden_states: text (B, T, cap_feat_dim).
            encoder_attention_mask: 1 for the words that count, which come first, 0 for the others, (B, T).
            turns: rotary places of text and picture (B, T + N, S / 2, 2).
            perturbed: (B, layers), in which of them the tokens of a row's picture see of it only themselves.
        """
        embed: Any = self.time_caption_embed
        vector = embed.timestep_embedder(sinusoidal(t, 256, cosine_first=True, shift=0).to(x.dtype))
        counts: list[int] = encoder_attention_mask.sum(1).tolist()
        longest = max(counts)  # nobody looks at what is behind it
        seen = encoder_attention_mask[:, :longest].bool()
        words, here = turns[:, :longest], turns[:, encoder_attention_mask.shape[1] :]
        text = embed.caption_embedder(encoder_hidden_states[:, :longest])
        for block in self.context_refiner:
            text = block(text, seen[:, None, None], words)
        tokens = self._tokens(x)
        for block in self.noise_refiner:
            tokens = block(tokens, None, here, vector)
        both, places = torch.cat([text, tokens], 1), torch.cat([words, here], 1)
        every = torch.cat([seen, seen.new_ones(tokens.shape[:2])], 1)[:, None, None]
        each = masks(len(self.layers), None if min(counts) == longest else every, perturbed, slice(longest, None))
        for block, mask in zip(self.layers, each, strict=True):
            both = block(both, mask, places, vector)
        patch, (height, width) = self.config.patch_size, x.shape[-2:]
        return joined_patches(self.norm_out(both[:, longest:], vector), height // patch, width // patch, patch)

    def _tokens(self, x: Tensor) -> Tensor:
        """Latents (B, C, h, w) as tokens (B, N, D)."""
        patch = self.config.patch_size
        squares = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1)
        return self.x_embedder(squares.flatten(3).flatten(1, 2))
