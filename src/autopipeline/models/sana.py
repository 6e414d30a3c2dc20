"""The transformer of Sana (Xie et al. 2024): linear attention among places, softmax attention to the text.

Shapes: B rows, N places, T text tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import attend
from autopipeline.models.embeddings import plane_sinusoids
from autopipeline.models.linear_attention import GatedConvolutions, attend_linearly
from autopipeline.models.network import Network
from autopipeline.models.pixart import CaptionProjection, SharedModulation
from autopipeline.models.sd3 import Patches, joined_patches, normal

NORMS: dict[str, type[nn.Module]] = {"rms_norm_across_heads": nn.RMSNorm, "layer_norm_across_heads": nn.LayerNorm}


class Attention(nn.Module):
    """Projections, with norms of queries and keys over all heads together where the config asks for them."""

    def __init__(self, width: int, heads: int, size: int, context: int, bias: bool, norm: str | None) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * size
        self.to_q = nn.Linear(width, inner, bias=bias)
        self.to_k, self.to_v = (nn.Linear(context, inner, bias=bias) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])
        self.norm_q, self.norm_k = (NORMS[norm](inner, eps=1e-5) if norm else nn.Identity() for _ in range(2))


class LinearAttention(Attention):
    """Attention among places."""

    def forward(self, x: Tensor, apart: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D); in the rows marked in `apart` (B,) every place sees itself alone.

        As in the reference implementation, queries and keys go without their norms in a layer with such rows.
        """
        q, k, value = self.to_q(x), self.to_k(x), self.to_v(x)
        if apart is None:
            q, k = self.norm_q(q), self.norm_k(k)
        heads = (rows.transpose(1, 2).unflatten(1, (self.heads, -1)) for rows in (q, k, value))
        mixed = attend_linearly(*heads).flatten(1, 2).transpose(1, 2).to(x.dtype)
        if apart is not None:
            mixed = torch.where(apart[:, None, None], value, mixed)
        out = self.to_out[0](mixed)
        return out.clamp(-65504, 65504) if out.dtype == torch.float16 else out


class TextAttention(Attention):
    """Attention to the text."""

    def forward(self, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        """(B, N, D), (B, T, D) and what is added to the scores (B, 1, 1, T) to (B, N, D)."""
        rows = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(text)), self.to_v(text)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in rows)
        return self.to_out[0](attend(q, k, v, mask=bias).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention among places, attention to the text, and convolutions in place of a perceptron."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        heads, size, norm = config.num_attention_heads, config.attention_head_dim, config.qk_norm
        text = config.num_cross_attention_heads, config.cross_attention_head_dim, config.cross_attention_dim
        width, eps = heads * size, config.norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.attn1 = LinearAttention(width, heads, size, width, config.attention_bias, norm)
        self.norm2 = nn.LayerNorm(width, eps=eps, elementwise_affine=config.norm_elementwise_affine)
        self.attn2 = TextAttention(width, *text, True, norm)
        self.ff = GatedConvolutions(width, config.mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, x: Tensor, text: Tensor, bias: Tensor, time: Tensor, rows: int, apart: Tensor | None = None
    ) -> Tensor:
        """(B, N, D) with N places in `rows` rows, (B, T, D), (B, 1, 1, T) and (B, 6, D) to (B, N, D)."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table + time).chunk(6, 1)
        x = x + gate * self.attn1(self.norm1(x) * (1 + scale) + shift, apart)
        x = x + self.attn2(x, text, bias)
        picture = (self.norm2(x) * (1 + ff_scale) + ff_shift).transpose(1, 2).unflatten(2, (rows, -1))
        return x + ff_gate * self.ff(picture).flatten(2).transpose(1, 2)


class SanaTransformer2DModel(Network):
    """The transformer of Sana."""

    attentions = ("transformer_blocks.attn1",)

    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = 32,
        num_attention_heads: int = 70,
        attention_head_dim: int = 32,
        num_layers: int = 20,
        num_cross_attention_heads: int = 20,
        cross_attention_head_dim: int = 112,
        cross_attention_dim: int = 2240,
        caption_channels: int = 2304,
        mlp_ratio: float = 2.5,
        attention_bias: bool = False,
        sample_size: int = 32,
        patch_size: int = 1,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,
        guidance_embeds: bool = False,
        qk_norm: str | None = None,
        timestep_scale: float = 1.0,
    ) -> None:
        if guidance_embeds:
            raise CheckpointError("A Sana transformer with guidance_embeds (Sana-Sprint) is not supported.")
        if qk_norm is not None and qk_norm not in NORMS:
            raise CheckpointError(f"A Sana transformer with qk_norm={qk_norm!r} is not supported.")
        width = num_attention_heads * attention_head_dim
        self.patch_embed = Patches(in_channels, width, patch_size)
        self.time_embed = SharedModulation(width, sized=False)
        self.caption_projection = CaptionProjection(caption_channels, width)
        self.caption_norm = nn.RMSNorm(width, eps=1e-5)
        self.transformer_blocks = nn.ModuleList([Block(self.config) for _ in range(num_layers)])
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """The velocity at x.

        Args:
            x: latents (B, C, h, w).
            t: times (B,), 0..1000 times `timestep_scale`.
            encoder_hidden_states: text (B, T, caption_channels).
            encoder_attention_mask: 1 for the tokens that count, 0 for the others, (B, T).
            perturbed: (B, blocks), in which of the blocks the places of a row don't see each other.
        """
        rows, columns = (side // self.config.patch_size for side in x.shape[-2:])
        tokens = self._placed(self.patch_embed(x), rows, columns)
        text = self.caption_norm(self.caption_projection(encoder_hidden_states))
        bias = (encoder_attention_mask.to(tokens.dtype) - 1)[:, None, None] * 10000.0
        vectors, time = self.time_embed(t, None, None)
        marked = [] if perturbed is None else perturbed.any(0).tolist()
        for k, block in enumerate(self.transformer_blocks):
            apart = perturbed[:, k] if perturbed is not None and marked[k] else None
            tokens = block(tokens, text, bias, vectors, rows, apart)
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, 1)
        picture = self.proj_out(normal(tokens) * (1 + scale) + shift)
        return joined_patches(picture, rows, columns, self.config.patch_size)

    def _placed(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Tokens that know their places, for networks which do not find out by their convolutions alone."""
        stretch, base = self.config.interpolation_scale, self.config.sample_size // self.config.patch_size
        if stretch is None:
            return tokens
        down, across = (torch.arange(count).float() / (count / base) / stretch for count in (rows, columns))
        return (tokens + plane_sinusoids(tokens.shape[-1], down, across).to(tokens.device)).to(tokens.dtype)
