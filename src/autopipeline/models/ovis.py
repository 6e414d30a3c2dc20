"""The transformer of Ovis-Image (AIDC 2025): Flux's blocks with gated feed-forwards, and text that stands in a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import RowWise
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal
from autopipeline.models.flux import STREAMS, TIME, DoubleBlock, Modulation, SingleBlock, each_mask, modulate
from autopipeline.models.network import Network
from autopipeline.models.rotary import rotary


def swish_gated(x: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020): (..., 2 D) to (..., D); the second half is the gate."""
    value, gate = x.chunk(2, -1)
    return value * functional.silu(gate)


class GatedLinear(nn.Module):
    """A linear layer with a gate."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., inner)."""
        return swish_gated(self.proj(x))


class GatedFeedForward(RowWise):
    """Four times as wide with a gate, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GatedLinear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.net[2](self.net[0](x))


class GatedSingleBlock(SingleBlock):
    """Text and picture in one sequence; the feed-forward beside the attention has a gate."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, inner=8 * width)

    def activated(self, fed: Tensor) -> Tensor:
        """(..., 8 D) to (..., 4 D)."""
        return swish_gated(fed)


class OvisImageTransformer2DModel(Network):
    """Predicts the velocity of packed latents."""

    attentions = STREAMS

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = 64,
        num_layers: int = 6,
        num_single_layers: int = 27,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 2048,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
    ) -> None:
        heads, width = num_attention_heads, num_attention_heads * attention_head_dim
        self.timestep_embedder = TimestepEmbedding(TIME, width)
        self.context_embedder_norm = nn.RMSNorm(joint_attention_dim, eps=1e-6)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            [DoubleBlock(width, heads, feed=GatedFeedForward) for _ in range(num_layers)]
        )
        self.single_transformer_blocks = nn.ModuleList(
            [GatedSingleBlock(width, heads) for _ in range(num_single_layers)]
        )
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))

    def rotary(self, places: Tensor) -> Tensor:
        """The table (..., head width / 2, 2) that `forward` takes, for places (..., 3): made once for a call."""
        return rotary(places, self.config.axes_dims_rope)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        rotary: Tensor,
        *,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, L, C) of packed latents (B, L, C) at `timestep` (B,) in 0..1.

        With a text (B, T, J) and a table of places (B, T + L, ., 2) from `self.rotary`. `perturbed` (B, attentions): in
        which of them the tokens of a row's picture see of it only themselves.
        """
        image = self.x_embedder(hidden_states)
        waves = sinusoidal(timestep.to(image.dtype) * 1000, TIME, cosine_first=True, shift=0)
        time = functional.silu(self.timestep_embedder(waves.to(image.dtype)))
        text = self.context_embedder(self.context_embedder_norm(encoder_hidden_states))
        masks, single_masks = each_mask(self, None, perturbed, text.shape[1])
        for block, mask in zip(self.transformer_blocks, masks, strict=True):
            image, text = block(image, text, time, rotary, mask)
        x = torch.cat([text, image], 1)
        for block, mask in zip(self.single_transformer_blocks, single_masks, strict=True):
            x = block(x, time, rotary, mask)
        scale, shift = self.norm_out(time).unbind(1)
        return self.proj_out(modulate(x[:, text.shape[1] :], shift, scale))
