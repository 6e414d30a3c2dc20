"""Attention, and the transformer blocks of the U-Nets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor]
_kernel: Kernel | None = None


def use(kernel: Kernel | None) -> None:
    """Have all attention in this process computed by another function of the same result; None: by torch's."""
    global _kernel
    _kernel = kernel


class Apart(NamedTuple):
    """In place of a mask: in some rows, a picture's tokens see of the picture only themselves (Ahn et al. 2024)."""

    rows: Tensor  # (B,), true for those
    picture: slice  # its tokens among the keys
    mask: Tensor | None = None  # what is seen besides


Mask = Tensor | Apart | None
"""Which keys are seen: (B, 1 or heads, 1 or L, K), false or added to the scores where they are less so."""


def masks(count: int, mask: Tensor | None, perturbed: Tensor | None, picture: slice) -> list[Mask]:
    """A mask for each of so many attentions; `perturbed` (B, count) says in which of them a row's picture is apart."""
    if perturbed is None:
        return [mask] * count
    marks = perturbed.bool()
    return [Apart(marks[:, k], picture, mask) if some else mask for k, some in enumerate(marks.any(0).tolist())]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention over (B, heads, L, D), by 1/sqrt(D) unless said; the one place that computes it."""
    if isinstance(mask, Apart):
        return _attend_apart(q, k, v, mask)
    if _kernel is not None and not torch.compiler.is_compiling():
        return _kernel(q, k, v, mask, causal, scale)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def _attend_apart(q: Tensor, k: Tensor, v: Tensor, apart: Apart) -> Tensor:
    """Attention in which some rows have a picture apart; where there are more keys than queries, they stand before."""
    mixed, rows = attend(q, k, v, apart.mask), apart.rows.to(q.device)
    start, stop, _ = apart.picture.indices(k.shape[2])
    before = k.shape[2] - q.shape[2]
    asking = slice(start - before, stop - before)
    q, k, v = q[rows][:, :, asking], k[rows], v[rows]
    rest = torch.cat([torch.arange(start), torch.arange(stop, k.shape[2])]).to(q.device)
    others = q @ k[:, :, rest].transpose(-1, -2)
    own = (q * k[:, :, start:stop]).sum(-1, keepdim=True)
    scores = torch.cat([others, own], -1) / q.shape[-1] ** 0.5
    if apart.mask is not None:
        mask = apart.mask.expand(len(rows), -1, -1, -1)[rows]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        mask = mask if mask.shape[2] == 1 else mask[:, :, asking]
        itself = mask.expand(-1, -1, stop - start, -1)[..., start:stop].diagonal(dim1=-2, dim2=-1)[..., None]
        scores = scores + torch.cat([mask.expand(-1, -1, stop - start, -1)[..., rest], itself], -1)
    weights = scores.float().softmax(-1).to(v.dtype)
    mixed[rows, :, asking] = weights[..., :-1] @ v[:, :, rest] + weights[..., -1:] * v[:, :, start:stop]
    return mixed


def attend_upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in float32, for networks whose scores leave the range of half precision."""
    return attend(q.float(), k.float(), v.float()).to(q.dtype)


class Attention(nn.Module):
    """Queries from x, keys and values from `context` (x itself without one)."""

    def __init__(
        self, channels: int, heads: int, context: int | None = None, bias: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context or channels, channels, bias=bias)
        self.to_v = nn.Linear(context or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(
        self, x: Tensor, context: Tensor | None = None, unmixed: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, L, C) to (B, L, C); where `unmixed` (B,) is true, every place attends to itself alone.

        `mask` (B, 1, 1 or L, T) is added to the scores.
        """
        source = x if context is None else context
        q, k, v = (  # (B, heads, L, D)
            rows.unflatten(-1, (self.heads, -1)).transpose(1, 2) for rows in self.projected(x, source)
        )
        mixed = attend_upcast(q, k, v) if self.upcast else attend(q, k, v, mask)
        if unmixed is not None:
            mixed = torch.where(unmixed[:, None, None, None], v, mixed)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))

    def projected(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of the source, (B, L, C) each."""
        return self.to_q(x), self.to_k(source), self.to_v(source)


class RowWise(nn.Module):
    """A module that maps each row of its one argument (..., C) by itself, to one as wide."""


class GatedLinear(nn.Module):
    """GEGLU (Shazeer 2020)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., inner)."""
        value, gate = self.proj(x).chunk(2, -1)
        return value * functional.gelu(gate)


class FeedForward(RowWise):
    """A gated layer four times as wide, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = 4 * channels
        self.net = nn.ModuleList([GatedLinear(channels, inner), nn.Identity(), nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention (or attention to the text alone), attention to the text, feed-forward."""

    def __init__(self, channels: int, heads: int, context: int, only_cross: bool, upcast: bool) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.place = 0  # among the network's self-attentions, which number themselves
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, context if only_cross else None, upcast=upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context, upcast=upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor, perturbed: Tensor | None = None) -> Tensor:
        """(B, L, C) with text (B, T, D); `perturbed` (B, self-attentions): which of them don't mix, row by row."""
        unmixed = None if perturbed is None or self.only_cross else perturbed[:, self.place]
        x = x + self.attn1(self.norm1(x), context if self.only_cross else None, unmixed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the places of a feature map."""

    def __init__(
        self,
        channels: int,
        heads: int,
        layers: int,
        context: int,
        *,
        groups: int,
        linear: bool,
        only_cross: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, heads, context, only_cross, upcast) for _ in range(layers)]
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, perturbed: Tensor | None = None) -> Tensor:
        """(B, C, H, W) with text (B, T, D) and, if any, marks of self-attentions to switch off."""
        height, width = x.shape[-2:]
        rows = self._in(self.norm(x))
        for block in self.transformer_blocks:
            rows = block(rows, context, perturbed)
        return x + self._out(rows, height, width)

    def _in(self, x: Tensor) -> Tensor:
        if self.linear:
            return self.proj_in(x.flatten(2).transpose(1, 2))  # (B, H * W, C)
        return self.proj_in(x).flatten(2).transpose(1, 2)

    def _out(self, rows: Tensor, height: int, width: int) -> Tensor:
        if self.linear:
            return self.proj_out(rows).transpose(1, 2).unflatten(2, (height, width))
        return self.proj_out(rows.transpose(1, 2).unflatten(2, (height, width)))


class PixelAttention(nn.Module):
    """Self-attention over the places of a feature map, as autoencoders have it in the middle."""

    def __init__(self, channels: int, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        rows = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H * W, C)
        q, k, v = (
            project(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = self.to_out[0](attend(q, k, v).transpose(1, 2).flatten(2))
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[-2:])


class AddedAttention(nn.Module):
    """Places look at a text and at each other in one attention, with keys and values of the text beside their own.

    `only_cross`: they look at the text alone. `norm`: of the text, "group_norm", "layer_norm" or None.
    """

    def __init__(
        self, channels: int, heads: int, context: int, *, groups: int, only_cross: bool = False, norm: str | None = None
    ) -> None:
        super().__init__()
        self.heads, self.only_cross = heads, only_cross
        self.place = 0  # among the network's self-attentions, which number themselves
        norms: dict[str | None, nn.Module | None] = {None: None}
        if norm is not None:
            norms = {"group_norm": nn.GroupNorm(32, context), "layer_norm": nn.LayerNorm(context)}
        self.group_norm = nn.GroupNorm(groups, channels)
        self.norm_cross = norms[norm]
        self.to_q = nn.Linear(channels, channels)
        self.to_k = None if only_cross else nn.Linear(channels, channels)
        self.to_v = None if only_cross else nn.Linear(channels, channels)
        self.add_k_proj = nn.Linear(context, channels)
        self.add_v_proj = nn.Linear(context, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor, perturbed: Tensor | None = None) -> Tensor:
        """(B, C, H, W) with text (B, T, D); `perturbed` (B, self-attentions): where places see of x only themselves."""
        rows = self.group_norm(x.flatten(2)).transpose(1, 2)  # (B, H * W, C)
        context = self._normed(context)
        q, k, v = self.to_q(rows), self.add_k_proj(context), self.add_v_proj(context)
        if self.to_k is not None and self.to_v is not None:
            k, v = torch.cat([k, self.to_k(rows)], 1), torch.cat([v, self.to_v(rows)], 1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        apart = None if perturbed is None or self.only_cross else perturbed[:, [self.place]]
        mixed = attend(q, k, v, masks(1, None, apart, slice(context.shape[1], None))[0])
        return x + self.to_out[0](mixed.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[-2:])

    def _normed(self, context: Tensor) -> Tensor:
        if isinstance(self.norm_cross, nn.GroupNorm):
            return self.norm_cross(context.transpose(1, 2)).transpose(1, 2)
        return context if self.norm_cross is None else self.norm_cross(context)
