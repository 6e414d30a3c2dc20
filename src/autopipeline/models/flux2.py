"""The transformer of Flux 2 (Black Forest Labs 2025): Flux's two streams and one, all blocks modulated alike.

Shapes: B rows, T tokens of text, L tokens of the picture (2 x 2 latents each), D = heads x head width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import Mask, RowWise, attend
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal
from autopipeline.models.flux import STREAMS, DoubleBlock, Modulation, each_mask, modulate, within
from autopipeline.models.network import Network
from autopipeline.models.rotary import rotary, turn


def gated(x: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020): (..., 2 inner) to (..., inner)."""
    gate, value = x.chunk(2, -1)
    return functional.silu(gate) * value


class GatedFeedForward(RowWise):
    """Wider by `ratio`, gated, and back."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        inner = int(width * ratio)
        self.linear_in = nn.Linear(width, 2 * inner, bias=False)
        self.linear_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.linear_out(gated(self.linear_in(x)))


class ParallelAttention(nn.Module):
    """Attention and feed-forward side by side, with one matrix before both and one after (Dehghani et al. 2023)."""

    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        inner = int(width * ratio)
        self.heads, self.parts = heads, [width, width, width, 2 * inner]
        self.to_qkv_mlp_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads, eps=1e-6), nn.RMSNorm(width // heads, eps=1e-6)
        self.to_out = nn.Linear(width + inner, width, bias=False)

    def forward(self, x: Tensor, table: Tensor, mask: Mask) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        *rows, fed = self.to_qkv_mlp_proj(x).split(self.parts, -1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in rows)
        mixed = attend(turn(self.norm_q(q), table), turn(self.norm_k(k), table), v, mask).transpose(1, 2).flatten(2)
        return self.to_out(torch.cat([mixed, gated(fed)], -1))


class ParallelBlock(nn.Module):
    """Text and picture in one sequence."""

    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.attn = ParallelAttention(width, heads, ratio)

    def forward(self, x: Tensor, said: Tensor, table: Tensor, mask: Mask = None) -> Tensor:
        """Text and picture (B, T + L, D), moved on, with a modulation (B, 3, 1, D)."""
        shift, scale, gate = said.unbind(1)
        return within(x + gate * self.attn(modulate(x, shift, scale), table, mask))


class TimeGuidanceEmbedding(nn.Module):
    """Time, and the guidance scale where the network was distilled to take one, as one vector."""

    def __init__(self, waves: int, width: int, guidance: bool) -> None:
        super().__init__()
        self.waves = waves
        self.timestep_embedder = TimestepEmbedding(waves, width, bias=False)
        self.guidance_embedder = TimestepEmbedding(waves, width, bias=False) if guidance else None

    def forward(self, timestep: Tensor, guidance: Tensor | None) -> Tensor:
        """(B, D), activated; `timestep` and `guidance` (B,) are multiplied by 1000 already."""
        said = self.timestep_embedder(self._waves(timestep))
        if guidance is not None and self.guidance_embedder is not None:
            said = said + self.guidance_embedder(self._waves(guidance))
        return functional.silu(said)

    def _waves(self, x: Tensor) -> Tensor:
        return sinusoidal(x, self.waves, cosine_first=True, shift=0).to(x.dtype)


class Flux2Transformer2DModel(Network):
    """Predicts the velocity of latents in patches."""

    attentions = STREAMS

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 128,
        out_channels: int | None = None,
        num_layers: int = 8,
        num_single_layers: int = 48,
        attention_head_dim: int = 128,
        num_attention_heads: int = 48,
        joint_attention_dim: int = 15360,
        timestep_guidance_channels: int = 256,
        mlp_ratio: float = 3.0,
        axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32),
        rope_theta: int = 2000,
        eps: float = 1e-6,
        guidance_embeds: bool = True,
    ) -> None:
        if eps != 1e-6:
            raise CheckpointError(f"A Flux 2 transformer with eps={eps} is not supported.")
        width, heads = num_attention_heads * attention_head_dim, num_attention_heads
        self.time_guidance_embed = TimeGuidanceEmbedding(timestep_guidance_channels, width, guidance_embeds)
        self.double_stream_modulation_img = Modulation(width, 6, bias=False)
        self.double_stream_modulation_txt = Modulation(width, 6, bias=False)
        self.single_stream_modulation = Modulation(width, 3, bias=False)
        self.x_embedder = nn.Linear(in_channels, width, bias=False)
        self.context_embedder = nn.Linear(joint_attention_dim, width, bias=False)
        feed = partial(GatedFeedForward, ratio=mlp_ratio)
        self.transformer_blocks = nn.ModuleList(
            [DoubleBlock(width, heads, False, feed, bias=False) for _ in range(num_layers)]
        )
        self.single_transformer_blocks = nn.ModuleList(
            [ParallelBlock(width, heads, mlp_ratio) for _ in range(num_single_layers)]
        )
        self.norm_out = Modulation(width, 2, bias=False)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels), bias=False)

    def rotary(self, places: Tensor) -> Tensor:
        """The table (..., head width / 2, 2) that `forward` takes, for places (..., 4): made once for a call."""
        return rotary(places, self.config.axes_dims_rope, self.config.rope_theta)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        rotary: Tensor,
        *,
        guidance: Tensor | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, L, C) of patches (B, L, C) at `timestep` (B,) in 0..1.

        With a text (B, T, J) and a table of places (B, T + L, ., 2) from `self.rotary`; `guidance` (B,) is the scale of
        a distilled network. `perturbed` (B, attentions): in which of them the tokens of a row's pictures see of these
        only themselves.
        """
        dtype = hidden_states.dtype
        scaled = None if guidance is None else guidance.to(dtype) * 1000
        time = self.time_guidance_embed(timestep.to(dtype) * 1000, scaled)
        said, said_text = self.double_stream_modulation_img(time), self.double_stream_modulation_txt(time)
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        masks, single_masks = each_mask(self, None, perturbed, text.shape[1])
        for block, mask in zip(self.transformer_blocks, masks, strict=True):
            image, text = block.move(image, text, said, said_text, rotary, mask)  # type: ignore[operator]
        x, said = torch.cat([text, image], 1), self.single_stream_modulation(time)
        for block, mask in zip(self.single_transformer_blocks, single_masks, strict=True):
            x = block(x, said, rotary, mask)
        scale, shift = self.norm_out(time).unbind(1)
        return self.proj_out(modulate(x[:, text.shape[1] :], shift, scale))
