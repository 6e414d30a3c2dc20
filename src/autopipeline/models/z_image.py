"""The transformer of Z-Image (Tongyi 2025): text and picture are refined apart, then walk in one stream.

Shapes: B rows, T tokens of text, X tokens of the picture (2 x 2 latents each), both filled up to multiples of 32 with
learned tokens that are attended to like the others; D channels in all heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import Mask, RowWise, attend, masks
from autopipeline.models.embeddings import sinusoidal
from autopipeline.models.network import Network
from autopipeline.models.rotary import grid_places, rotary, turn

TIME = 256
"""Width of the sinusoidal embedding, and at most that of what the blocks know of the time."""
GROUP = 32
"""Tokens of text and of the picture are multiples of this."""
PATCH = "2-1"
"""Of the sizes of patches that a network may have, the one for pictures: 2 x 2 latents of 1 frame."""


def filled(count: int) -> int:
    """So many tokens, filled up."""
    return -(-count // GROUP) * GROUP


class Attention(nn.Module):
    """Everything attends to everything, by places; `normed`: queries and keys are normalised."""

    def __init__(self, width: int, heads: int, normed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-5) if normed else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, table: Tensor, mask: Mask) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, D / heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = attend(turn(self.norm_q(q), table), turn(self.norm_k(k), table), v, mask)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


class FeedForward(RowWise):
    """SwiGLU (Shazeer 2020), 8 / 3 as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = int(width / 3 * 8)
        self.w1, self.w3 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Clean(NamedTuple):
    """Tokens without noise among others."""

    time: Tensor  # (B, W), theirs
    tokens: Tensor  # (B, L, 1), true for them


class Block(nn.Module):
    """Attention and feed-forward, normalised before and after; `modulated`: the time scales and gates them."""

    def __init__(self, width: int, heads: int, eps: float, normed: bool, modulated: bool = True) -> None:
        super().__init__()
        self.attention = Attention(width, heads, normed)
        self.feed_forward = FeedForward(width)
        self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2 = (
            nn.RMSNorm(width, eps=eps) for _ in range(4)
        )
        self.adaLN_modulation = nn.Sequential(nn.Linear(min(width, TIME), 4 * width)) if modulated else None

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Mask = None,
        time: Tensor | None = None,
        clean: Clean | None = None,
    ) -> Tensor:
        """(B, L, D) with a table of places (B, L, D / heads / 2, 2) and the time (B, W)."""
        scale: Tensor | float = 1.0
        gate = scale_fed = gate_fed = scale
        if self.adaLN_modulation is not None and time is not None:
            told = self.adaLN_modulation(time)[:, None]
            if clean is not None:
                told = torch.where(clean.tokens, self.adaLN_modulation(clean.time)[:, None], told)
            said = told.chunk(4, -1)  # (B, 1, D) each, or (B, L, D)
            scale, gate, scale_fed, gate_fed = 1 + said[0], said[1].tanh(), 1 + said[2], said[3].tanh()
        x = x + gate * self.attention_norm2(self.attention(self.attention_norm1(x) * scale, table, mask))
        return x + gate_fed * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * scale_fed))


class TimeEmbedding(nn.Module):
    """The time as a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME, 1024), nn.SiLU(), nn.Linear(1024, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, W)."""
        waves = sinusoidal(t, TIME, cosine_first=True, shift=0)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # type: ignore[union-attr]


class FinalLayer(nn.Module):
    """From tokens to patches."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(width, TIME), width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, X, D) with the time (B, W) to (B, X, out)."""
        scale = 1 + self.adaLN_modulation(time)[:, None]
        return self.linear(functional.layer_norm(x, x.shape[-1:], eps=1e-6) * scale)


def patches(x: Tensor, embed: nn.Module, fill: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, X, D), the last of which are `fill` (1, D)."""
    b, c, h, w = x.shape
    rows = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 4 * c)
    more = filled(rows.shape[1]) - rows.shape[1]
    return torch.cat([embed(rows), fill.to(x.dtype).expand(b, more, -1)], 1)


def refined(
    blocks: Iterable[nn.Module], x: Tensor, table: Tensor, time: Tensor, added: Mapping[int, Tensor] | None = None
) -> Tensor:
    """The picture alone, through its blocks; `added` (B, X, D) goes on top after those of that number."""
    for k, block in enumerate(blocks):
        x = block(x, table, None, time)
        x = x + added[k] if added and k in added else x
    return x


class Streams(NamedTuple):
    """What stands before the common blocks."""

    plain: Tensor  # (B, X, D), the picture before it is refined
    picture: Tensor  # (B, X, D)
    text: Tensor  # (B, T, D)
    time: Tensor  # (B, W)
    table: Tensor  # (B, X + T, D / heads / 2, 2)
    mask: Tensor | None  # (B, 1, 1, X + T), false for tokens that a row does not have


Residuals = Callable[[Streams], Mapping[int, Tensor]]
"""What a network beside this one adds after common blocks, by their numbers: (B, X + T, D)."""


class ZImageTransformer2DModel(Network):
    """The velocity of latents, pointing from noise to the picture."""

    attentions = ("layers.attention",)

    def __init__(
        self,
        all_patch_size: tuple[int, ...] = (2,),
        all_f_patch_size: tuple[int, ...] = (1,),
        in_channels: int = 16,
        dim: int = 3840,
        n_layers: int = 30,
        n_refiner_layers: int = 2,
        n_heads: int = 30,
        n_kv_heads: int = 30,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        cap_feat_dim: int = 2560,
        siglip_feat_dim: int | None = None,
        rope_theta: float = 256.0,
        t_scale: float = 1000.0,
        axes_dims: tuple[int, ...] = (32, 48, 48),
        axes_lens: tuple[int, ...] = (1024, 512, 512),
    ) -> None:
        sizes = list(zip(all_patch_size, all_f_patch_size, strict=True))
        if (2, 1) not in sizes:
            raise ValueError("it has no patches of 2 x 2 latents")
        if dim // n_heads != sum(axes_dims):
            raise ValueError(f"axes_dims={list(axes_dims)} are not the {dim // n_heads} channels of a head")
        volumes = {f"{side}-{frames}": side * side * frames * in_channels for side, frames in sizes}
        self.all_x_embedder = nn.ModuleDict({name: nn.Linear(volume, dim) for name, volume in volumes.items()})
        self.all_final_layer = nn.ModuleDict({name: FinalLayer(dim, volume) for name, volume in volumes.items()})

        def blocks(count: int, modulated: bool = True) -> nn.ModuleList:
            return nn.ModuleList([Block(dim, n_heads, norm_eps, qk_norm, modulated) for _ in range(count)])

        self.noise_refiner, self.context_refiner = blocks(n_refiner_layers), blocks(n_refiner_layers, False)
        self.layers = blocks(n_layers)
        self.t_embedder = TimeEmbedding(min(dim, TIME))
        self.cap_embedder = nn.Sequential(nn.RMSNorm(cap_feat_dim, eps=norm_eps), nn.Linear(cap_feat_dim, dim))
        self.x_pad_token, self.cap_pad_token = (nn.Parameter(torch.zeros(1, dim)) for _ in range(2))
        if siglip_feat_dim is not None:
            norm = nn.RMSNorm(siglip_feat_dim, eps=norm_eps)
            self.siglip_embedder = nn.Sequential(norm, nn.Linear(siglip_feat_dim, dim))
            self.siglip_refiner = blocks(n_refiner_layers, False)
            self.siglip_pad_token = nn.Parameter(torch.zeros(1, dim))

    def rotary(self, tokens: Tensor, length: int, height: int, width: int) -> Tensor:
        """Angles (B, X + length, D / heads / 2, 2) for texts of so many tokens (B,) and latents of that size.

        Texts go along the first axis from 1 on; the picture stands in a plane behind the end of its text.
        """
        own = grid_places(height // 2, width // 2)
        ends = torch.tensor([filled(count) + 1 for count in tokens.tolist()])
        picture = own + functional.pad(ends[:, None, None], (0, 2))  # (B, h / 2 * w / 2, 3)
        picture = functional.pad(picture, (0, 0, 0, filled(len(own)) - len(own)))
        text = functional.pad(torch.arange(1, length + 1)[:, None], (0, 2)).expand(len(tokens), -1, -1)
        return rotary(torch.cat([picture, text], 1), self.config.axes_dims, self.config.rope_theta)

    def _text(self, text: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Texts (B, T, D) with what fills them up, and a mask (B, T) if they are not of one length."""
        ends = torch.tensor([filled(count) for count in tokens.tolist()], device=text.device)
        places = torch.arange(text.shape[1], device=text.device)
        mask = places < ends[:, None] if len(set(map(filled, tokens.tolist()))) > 1 else None
        real = places < tokens.to(text.device)[:, None]
        return torch.where(real[..., None], self.cap_embedder(text), self.cap_pad_token), mask

    def streams(self, x: Tensor, t: Tensor, text: Tensor, tokens: Tensor, table: Tensor) -> Streams:
        """Picture and text as tokens, refined apart."""
        time = self.t_embedder(t * self.config.t_scale).to(x.dtype)
        plain = patches(x, self.all_x_embedder[PATCH], self.x_pad_token)
        own, theirs = table.split([plain.shape[1], text.shape[1]], 1)
        words, mask = self._text(text, tokens)
        keys = None if mask is None else mask[:, None, None]
        for block in self.context_refiner:
            words = block(words, theirs, keys)
        joint = None if keys is None else functional.pad(keys, (plain.shape[1], 0), value=True)
        return Streams(plain, refined(self.noise_refiner, plain, own, time), words, time, table, joint)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        encoder_hidden_states: Tensor,
        tokens: Tensor,
        rotary: Tensor,
        residuals: Residuals | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) at times (B,), 0 for noise and 1 for pictures, to their velocity.

        Texts (B, T, E), T a multiple of 32 and at least that of the longest, are of `tokens` (B,) each. `perturbed`
        (B, layers): in which of them the tokens of a row's picture see of it only themselves.
        """
        height, width = x.shape[-2:]
        before = self.streams(x, t, encoder_hidden_states, tokens, rotary)
        added = residuals(before) if residuals is not None else {}
        joint = torch.cat([before.picture, before.text], 1)
        each = masks(len(self.layers), before.mask, perturbed, slice(before.picture.shape[1]))
        for k, block in enumerate(self.layers):
            joint = block(joint, before.table, each[k], before.time)
            joint = joint + added[k] if k in added else joint
        return self.unpatched(joint[:, : height * width // 4], before.time, height, width)

    def unpatched(self, tokens: Tensor, time: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, h / 2 * w / 2, D) of the picture as latents (B, C, h, w)."""
        out = self.all_final_layer[PATCH](tokens, time)
        whole = out.unflatten(1, (height // 2, width // 2)).unflatten(-1, (2, 2, -1))
        return whole.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
