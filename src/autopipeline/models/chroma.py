"""The transformer of Chroma (Lodestone Rock 2025): Flux's blocks; a small network tells each what the time means.

Shapes: B rows, T tokens of text, L tokens of the picture, D width, M vectors of modulation for all blocks together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.embeddings import sinusoidal
from autopipeline.models.flux import STREAMS, DoubleBlock, SingleBlock, each_mask, modulate
from autopipeline.models.network import Network
from autopipeline.models.rotary import rotary


class Layer(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) to (..., W)."""
        return self.linear_2(functional.silu(self.linear_1(x)))


class Approximator(nn.Module):
    """Time, and which vector is asked for, to that vector."""

    def __init__(self, channels: int, inner: int, out: int, layers: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(channels, inner)
        self.layers = nn.ModuleList([Layer(inner) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.RMSNorm(inner) for _ in range(layers)])
        self.out_proj = nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, channels) to (B, M, D)."""
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)


class ChromaTransformer2DModel(Network):
    """Predicts the velocity of packed latents."""

    attentions = STREAMS

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        approximator_num_channels: int = 64,
        approximator_hidden_dim: int = 5120,
        approximator_layers: int = 5,
    ) -> None:
        width, heads = num_attention_heads * attention_head_dim, num_attention_heads
        self.distilled_guidance_layer = Approximator(
            approximator_num_channels, approximator_hidden_dim, width, approximator_layers
        )
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels, width)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(width, heads, False) for _ in range(num_layers)])
        self.single_transformer_blocks = nn.ModuleList(
            [SingleBlock(width, heads, False) for _ in range(num_single_layers)]
        )
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
        attention_mask: Tensor,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, L, C) of packed latents (B, L, C) at `timestep` (B,) in 0..1.

        With a text (B, T, J) and a table of places (B, T + L, ., 2) from `self.rotary`. `attention_mask` (B, T + L) is
        1 for tokens that count; as in the reference implementation, what two of them think of each other is raised by
        one, and nothing is hidden. `perturbed` (B, attentions): in which of them the tokens of a row's picture see of
        it only themselves.
        """
        favour = attention_mask[:, None, :, None] * attention_mask[:, None, None, :]
        singles, to_image, to_text, last = self._modulations(timestep.to(hidden_states.dtype) * 1000)
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        doubles, masks = each_mask(self, favour, perturbed, text.shape[1])
        for k, block in enumerate(self.transformer_blocks):
            image, text = block.move(image, text, to_image[:, k], to_text[:, k], rotary, doubles[k])  # type: ignore[operator]
        x = torch.cat([text, image], 1)
        for k, block in enumerate(self.single_transformer_blocks):
            x = block.move(x, singles[:, k], rotary, masks[k])  # type: ignore[operator]
        shift, scale = last.unbind(1)
        return self.proj_out(modulate(x[:, text.shape[1] :], shift, scale))

    def _modulations(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For time (B,), in the order of the vectors: one-stream blocks (B, S, 3, 1, D), pictures and texts of
        two-stream blocks (B, N, 6, 1, D), the output (B, 2, 1, D)."""
        singles, doubles = len(self.single_transformer_blocks), len(self.transformer_blocks)
        counts = [3 * singles, 6 * doubles, 6 * doubles, 2]
        quarter, total = self.config.approximator_num_channels // 4, sum(counts)
        told = [self._waves(time, quarter), self._waves(torch.zeros_like(time), quarter)]
        which = self._waves(1000 * torch.arange(total, device=time.device), 2 * quarter).to(time.dtype)
        parts = [
            *(each.to(time.dtype)[:, None].expand(-1, total, -1) for each in told),
            which.expand(len(time), -1, -1),
        ]
        single, image, text, last = self.distilled_guidance_layer(torch.cat(parts, -1))[:, :, None].split(counts, 1)
        return (
            single.unflatten(1, (singles, 3)),
            image.unflatten(1, (doubles, 6)),
            text.unflatten(1, (doubles, 6)),
            last,
        )

    @staticmethod
    def _waves(x: Tensor, width: int) -> Tensor:
        return sinusoidal(x, width, cosine_first=True, shift=0)
