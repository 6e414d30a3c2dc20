"""The transformer of Qwen-Image 2.1 (Qwen team 2026): text, pictures to look at and x in one stream, read in order.

Text looks back, a picture at itself and back; x comes last and sees everything. What stands before x hears the time 0,
so its keys and values are made once for a call. Shapes: one row, M tokens before x, N of x, D channels of all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import Mask, RowWise, attend, masks
from autopipeline.models.cogview import normal
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal
from autopipeline.models.flux import within
from autopipeline.models.network import Network
from autopipeline.models.rotary import centred_places, rotary, turn

TIME, SLOT = 256, 4
"""Width of the sinusoidal embedding of time; tokens of a picture where the text encoder has one."""
Pair = tuple[Tensor, Tensor]
"""Keys and values (1, heads, M, D / heads)."""


class Before(NamedTuple):
    """What stands before x in one row."""

    hidden: Tensor  # (1, M, D)
    table: Tensor  # (1, M, D / heads / 2, 2)
    own: Tensor  # (1, N, D / heads / 2, 2), of x
    mask: Tensor  # (1, 1, M, M), true where a token looks
    pairs: tuple[Pair, ...]  # for each block, unless made at every step


class CentredNorm(nn.Module):
    """RMS norm whose weight is 1 more than its parameter."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) to the same, in float32 meanwhile."""
        return functional.rms_norm(x.float(), x.shape[-1:], self.weight.float() + 1, self.eps).to(x.dtype)


class TextProjection(nn.Module):
    """States of the text encoder as tokens."""

    def __init__(self, given: int, width: int, eps: float) -> None:
        super().__init__()
        self.text_norm = CentredNorm(given, eps)
        self.in_layer, self.out_layer = nn.Linear(given, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, E) to (1, T, D)."""
        return self.out_layer(functional.gelu(self.in_layer(self.text_norm(x)), approximate="tanh"))


class TimeEmbedding(nn.Module):
    """The time as a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME, width, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        """(1,) in 0..1 to (1, D)."""
        waves = sinusoidal(1000 * t.float(), TIME, cosine_first=True, shift=0)
        return self.timestep_embedder(waves.to(t.dtype))


class FeedForward(RowWise):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj, self.gate_layer = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(1, L, D) to the same."""
        return self.out(functional.silu(self.gate_layer(x)) * self.proj(x))


class Attention(nn.Module):
    """By places, queries and keys normed; keys and values of others may stand before."""

    def __init__(self, width: int, heads: int, head: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, heads * head, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(heads * head, width, bias=False)])
        self.norm_q, self.norm_k = nn.RMSNorm(head, eps=eps), nn.RMSNorm(head, eps=eps)

    def forward(self, x: Tensor, table: Tensor, mask: Mask, before: Pair | None) -> tuple[Tensor, Pair]:
        """(1, L, D) to the same, and its own keys and values."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )
        q, k = turn(self.norm_q(q), table), turn(self.norm_k(k), table)
        keys, values = (k, v) if before is None else (torch.cat([before[0], k], 2), torch.cat([before[1], v], 2))
        return self.to_out[0](attend(q, keys, values, mask).transpose(1, 2).flatten(2)), (k, v)


class Block(nn.Module):
    """Attention and feed-forward, scaled and gated by what the time says to all blocks."""

    def __init__(self, width: int, heads: int, head: int, ratio: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.attn = Attention(width, heads, head, eps)
        self.img_mlp = FeedForward(width, ratio * width)

    def forward(
        self, x: Tensor, said: Tensor, table: Tensor, mask: Mask = None, before: Pair | None = None
    ) -> tuple[Tensor, Pair]:
        """(1, L, D), with `said` (1, 1 or L, 4 D)."""
        scale, gate, scale_fed, gate_fed = said.chunk(4, -1)
        mixed, pair = self.attn(normal(x, self.eps) * (1 + scale), table, mask, before)
        x = x + gate.tanh() * mixed
        return within(x + gate_fed.tanh() * self.img_mlp(normal(x, self.eps) * (1 + scale_fed))), pair


class QwenImage21Transformer2DModel(Network):
    """Predicts the velocity of latents, row by row."""

    attentions = ("transformer_blocks.attn",)

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = 64,
        num_layers: int = 32,
        attention_head_dim: int = 128,
        num_attention_heads: int = 32,
        context_in_dim: int = 4096,
        mlp_ratio: int = 3,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        eps: float = 1e-6,
        causal_condition: bool = True,
    ) -> None:
        heads, head = num_attention_heads, attention_head_dim
        width, square = heads * head, patch_size**2
        self.time_text_embed = TimeEmbedding(width)
        self.txt_in = TextProjection(context_in_dim, width, eps)
        self.img_in = nn.Linear(in_channels * square, width, bias=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width, bias=False))
        blocks = [Block(width, heads, head, mlp_ratio, eps) for _ in range(num_layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = nn.Module()
        self.norm_out.linear = nn.Linear(width, width, bias=False)
        self.proj_out = nn.Linear(width, square * (out_channels or in_channels), bias=False)

    def before(
        self,
        text: Tensor,
        slots: Tensor,
        pictures: Sequence[Tensor],
        grids: Sequence[tuple[int, int]],
        own: tuple[int, int],
        length: int,
        kept: bool = True,
    ) -> Before:
        """What stands before x of the grid `own`, made once for a call.

        Args:
            text: states of the text encoder (1, T, context_in_dim).
            slots: which of them (T,) stand for four tokens of a picture.
            pictures: latents (1, rows * columns, C) to look at, in order.
            grids: rows and columns of each.
            own: those of x.
            length: states that x comes after, T or more where others of a batch are longer.
            kept: whether keys and values are computed here, not at every step.
        """
        parts: list[Tensor] = []
        places: list[Tensor] = []
        marks: list[Tensor] = []
        words, position, cursor = self.txt_in(text), 0, 0
        for k, (latents, grid) in enumerate(zip(pictures, grids, strict=True)):
            begin = cursor + int(slots[cursor:].int().argmax())
            parts += [words[:, cursor:begin], self.img_in(latents)]
            places += [_along(position, begin - cursor), centred_places(*grid, position + begin - cursor)]
            marks += [torch.full((begin - cursor,), -1), torch.full((latents.shape[1],), k)]
            position += begin - cursor + max(grid)
            cursor = begin + latents.shape[1] // SLOT
        rest = text.shape[1] - cursor
        parts.append(words[:, cursor:])
        places.append(_along(position, rest))
        marks.append(torch.full((rest,), -1))
        position += rest + length - text.shape[1]
        seen, mark = torch.cat(parts, 1), torch.cat(marks).to(text.device)
        order = torch.arange(len(mark), device=text.device)
        mask = (order[:, None] >= order) | ((mark[:, None] == mark) & (mark >= 0))
        dims = self.config.axes_dims_rope
        table, last = (
            rotary(each, dims)[None].to(text.device) for each in (torch.cat(places), centred_places(*own, position))
        )
        found = Before(seen, table, last, mask[None, None], ())
        return found._replace(pairs=self._pairs(found)) if kept and self.config.causal_condition else found

    def _pairs(self, before: Before) -> tuple[Pair, ...]:
        said = self.modulation(self.time_text_embed(before.hidden.new_zeros(1)))[:, None]
        x = before.hidden
        pairs: list[Pair] = []
        for block in self.transformer_blocks:
            x, pair = block(x, said, before.table, before.mask)
            pairs.append(pair)
        return tuple(pairs)

    def forward(self, x: Tensor, t: Tensor, before: Before, perturbed: Tensor | None = None) -> Tensor:
        """The velocity of latents (1, N, C) at the time (1,) in 0..1.

        `perturbed` (1, blocks): in which of them the tokens of x see of these only themselves.
        """
        time = self.time_text_embed(t.to(x.dtype))
        said, count = self.modulation(time)[:, None], x.shape[1]
        tokens, table, mask, pairs = self.img_in(x), before.own, None, before.pairs
        if self.config.causal_condition:
            pairs = pairs or self._pairs(before)
        else:
            tokens, table = torch.cat([before.hidden, tokens], 1), torch.cat([before.table, table], 1)
            mask = functional.pad(functional.pad(before.mask, (0, count)), (0, 0, 0, count), value=True)
        each = masks(len(self.transformer_blocks), mask, perturbed, slice(-count, None))
        for k, block in enumerate(self.transformer_blocks):
            tokens, _ = block(tokens, said, table, each[k], pairs[k] if pairs else None)
        scale = self.norm_out.linear(functional.silu(time))[:, None]  # type: ignore[operator]
        return self.proj_out(normal(tokens[:, -count:], self.config.eps) * (1 + scale))


def _along(position: int, count: int) -> Tensor:
    """Places (count, 3) of text, the same on all axes."""
    return torch.arange(position, position + count)[:, None].expand(-1, 3)
