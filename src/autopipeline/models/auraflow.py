"""The transformer of AuraFlow (fal 2024): blocks over image and text apart, then blocks over both together.

Shapes: B rows, N image tokens, T text tokens, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import Mask, RowWise, attend, masks
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal
from autopipeline.models.network import Network

REGISTERS = 8
"""Learned tokens before the text, which take up what attention would else leave in the image (Darcet et al. 2023)."""


def normal(x: Tensor) -> Tensor:
    """Layer norm without weights."""
    return functional.layer_norm(x, x.shape[-1:], eps=1e-5)


def linears(count: int, width: int) -> list[nn.Linear]:
    """Square layers without biases."""
    return [nn.Linear(width, width, bias=False) for _ in range(count)]


class Squares(nn.Module):
    """Squares of x as tokens; what is learned of places is cropped from the middle of a grid."""

    def __init__(self, channels: int, width: int, patch: int, places: int) -> None:
        super().__init__()
        self.patch, self.side = patch, math.isqrt(places)
        self.proj = nn.Linear(patch * patch * channels, width)
        self.pos_embed = nn.Parameter(torch.randn(1, places, width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, N, D)."""
        squares = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # (B, C, rows, p, columns, p)
        height, width = squares.shape[2], squares.shape[4]
        if max(height, width) > self.side:
            raise ValueError(
                f"This network knows places in a grid of {self.side} x {self.side} patches; "
                f"the picture has {height} x {width}."
            )
        top, left = self.side // 2 - height // 2, self.side // 2 - width // 2
        grid = self.pos_embed[:, : self.side**2].unflatten(1, (self.side, self.side))
        places = grid[:, top : top + height, left : left + width].flatten(1, 2)
        return self.proj(squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)) + places


class Modulation(nn.Module):
    """Vectors for shifting, scaling and gating, from the time (Peebles & Xie 2023, adaLN)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width, bias=False)

    def forward(self, emb: Tensor) -> Sequence[Tensor]:
        """(B, D) to `count` vectors (B, 1, D)."""
        return self.linear(functional.silu(emb))[:, None].chunk(self.count, -1)


class GatedPerceptron(RowWise):
    """SwiGLU (Shazeer 2020), two thirds of four times as wide, in steps of 256."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = math.ceil(int(8 * width / 3) / 256) * 256
        self.linear_1 = nn.Linear(width, inner, bias=False)
        self.linear_2 = nn.Linear(width, inner, bias=False)
        self.out_projection = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.out_projection(functional.silu(self.linear_1(x)) * self.linear_2(x))


class NormedAttention(nn.Module):
    """Tokens attend to each other, queries and keys normed; text may have projections of its own."""

    def __init__(self, width: int, heads: int, text: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = linears(3, width)
        self.to_out = nn.ModuleList(linears(1, width))
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj, self.to_add_out = linears(4, width)

    def forward(self, x: Tensor, text: Tensor | None = None, mask: Mask = None) -> tuple[Tensor, Tensor | None]:
        """(B, N, D), and (B, T, D) if any, to the same."""
        mine = self._heads(x, self.to_q, self.to_k, self.to_v)
        if text is None:
            return self.to_out[0](attend(*mine, mask).transpose(1, 2).flatten(2)), None
        words = self._heads(text, self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (torch.cat(both, 2) for both in zip(words, mine, strict=True))
        mixed = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.to_out[0](mixed[:, text.shape[1] :]), self.to_add_out(mixed[:, : text.shape[1]])

    def _heads(self, x: Tensor, *projections: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, L, D / H)."""
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in projections)
        return normal(q), normal(k), v


def fed(x: Tensor, mixed: Tensor, vectors: Sequence[Tensor], perceptron: nn.Module) -> Tensor:
    """What a block makes of tokens x and the attention's answer; the attention itself is not added, only normed."""
    gate, shift, scale, ff_gate = vectors
    return x + ff_gate * perceptron(normal(x + gate * mixed) * (1 + scale) + shift)


class JointBlock(nn.Module):
    """A transformer block over image and text, with weights for each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm1_context = Modulation(width, 6), Modulation(width, 6)
        self.attn = NormedAttention(width, heads, text=True)
        self.ff, self.ff_context = GatedPerceptron(width), GatedPerceptron(width)

    def forward(self, x: Tensor, text: Tensor, emb: Tensor, mask: Mask = None) -> tuple[Tensor, Tensor]:
        """(B, N, D), (B, T, D) and (B, D) to the next tokens of the image and of the text."""
        shift, scale, *rest = self.norm1(emb)
        text_shift, text_scale, *text_rest = self.norm1_context(emb)
        words = normal(text) * (1 + text_scale) + text_shift
        mixed, mixed_text = self.attn(normal(x) * (1 + scale) + shift, words, mask)
        return fed(x, mixed, rest, self.ff), fed(text, mixed_text, text_rest, self.ff_context)


class SingleBlock(nn.Module):
    """A transformer block over the tokens of text and image in one row."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = Modulation(width, 6)
        self.attn = NormedAttention(width, heads, text=False)
        self.ff = GatedPerceptron(width)

    def forward(self, x: Tensor, emb: Tensor, mask: Mask = None) -> Tensor:
        """(B, T + N, D) and (B, D) to (B, T + N, D)."""
        shift, scale, *rest = self.norm1(emb)
        return fed(x, self.attn(normal(x) * (1 + scale) + shift, mask=mask)[0], rest, self.ff)


class AuraFlowTransformer2DModel(Network):
    """The transformer of AuraFlow."""

    attentions = ("joint_transformer_blocks.attn", "single_transformer_blocks.attn")

    def __init__(
        self,
        sample_size: int = 64,
        patch_size: int = 2,
        in_channels: int = 4,
        num_mmdit_layers: int = 4,
        num_single_dit_layers: int = 32,
        attention_head_dim: int = 256,
        num_attention_heads: int = 12,
        joint_attention_dim: int = 2048,
        caption_projection_dim: int = 3072,
        out_channels: int | None = 4,
        pos_embed_max_size: int = 1024,
    ) -> None:
        width, heads = num_attention_heads * attention_head_dim, num_attention_heads
        if width != caption_projection_dim:
            raise CheckpointError(
                f"The width {width} of the network and that of its text, {caption_projection_dim}, differ."
            )
        self.pos_embed = Squares(in_channels, width, patch_size, pos_embed_max_size)
        self.context_embedder = nn.Linear(joint_attention_dim, caption_projection_dim, bias=False)
        self.time_step_proj = TimestepEmbedding(256, width)
        self.joint_transformer_blocks = nn.ModuleList([JointBlock(width, heads) for _ in range(num_mmdit_layers)])
        self.single_transformer_blocks = nn.ModuleList(
            [SingleBlock(width, heads) for _ in range(num_single_dit_layers)]
        )
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels), bias=False)
        self.register_tokens = nn.Parameter(torch.randn(1, REGISTERS, width) * 0.02)

    def forward(
        self, x: Tensor, t: Tensor, *, encoder_hidden_states: Tensor, perturbed: Tensor | None = None
    ) -> Tensor:
        """The velocity at x.

        Args:
            x: latents (B, C, h, w).
            t: times (B,), 0..1.
            encoder_hidden_states: text (B, T, joint_attention_dim).
            perturbed: (B, attentions), in which of them the tokens of a row's picture see of it only themselves.
        """
        height, width = (side // self.config.patch_size for side in x.shape[-2:])
        emb = self.time_step_proj((sinusoidal(t * 1000, 256, cosine_first=True, shift=0)).to(self.dtype))
        tokens, text = self.pos_embed(x), self.context_embedder(encoder_hidden_states)
        text = torch.cat([self.register_tokens.expand(len(text), -1, -1), text], 1)
        blocks = [*self.joint_transformer_blocks, *self.single_transformer_blocks]
        count = len(self.joint_transformer_blocks)
        each = masks(len(blocks), None, perturbed, slice(text.shape[1], None))
        for block, mask in zip(blocks[:count], each, strict=False):
            tokens, text = block(tokens, text, emb, mask)
        row = torch.cat([text, tokens], 1)
        for block, mask in zip(blocks[count:], each[count:], strict=True):
            row = block(row, emb, mask)
        scale, shift = self.norm_out(emb)
        patch = self.config.patch_size
        made = self.proj_out(row[:, text.shape[1] :] * (1 + scale) + shift)
        squares = made.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))
        return squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
