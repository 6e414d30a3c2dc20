"""GLM-Image's transformer (Z.ai 2026): CogView4's, led by tokens that a language model has chosen, one a patch.

Shapes: R rows, N patches, T tokens of text, D = heads x head width, E width of what time and sizes say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.cogview import Block, CogView, Memory, Modulation, Squares, TimeAndSizes
from autopipeline.models.rotary import rotary


class Projector(nn.Module):
    """Two layers, with GELU or SiLU between them."""

    def __init__(self, given: int, width: int, smooth: bool) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(given, width)
        self.smooth = smooth
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., given) to (..., D)."""
        inner: Tensor = self.net[0].proj(x)  # type: ignore[operator]
        return self.net[2](functional.gelu(inner) if self.smooth else functional.silu(inner))


class GlmImageTransformer2DModel(CogView):
    """The transformer of GLM-Image, in which places turn queries and keys; it can look at other pictures too."""

    eps = 1e-5

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int = 16,
        num_layers: int = 30,
        attention_head_dim: int = 40,
        num_attention_heads: int = 64,
        text_embed_dim: int = 1472,
        time_embed_dim: int = 512,
        condition_dim: int = 256,
        prior_vq_quantizer_codebook_size: int = 16384,
    ) -> None:
        width = num_attention_heads * attention_head_dim
        self.image_projector = Squares(in_channels, width, patch_size)
        self.glyph_projector = Projector(text_embed_dim, width, smooth=True)
        self.prior_token_embedding = nn.Embedding(prior_vq_quantizer_codebook_size, width)
        self.prior_projector = Projector(width, width, smooth=False)
        self.time_condition_embed = TimeAndSizes(time_embed_dim, time_embed_dim, condition_dim, told=4)
        blocks = [Block(width, num_attention_heads, time_embed_dim, eps=1e-5, in_turns=True) for _ in range(num_layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = Modulation(time_embed_dim, width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)

    def places(self, height: int, width: int) -> Tensor:
        """Cosines and sines (1, N, D / heads / 2, 2) for latents of this size."""
        sides = [torch.arange(side // self.config.patch_size) for side in (height, width)]
        grid = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1)
        return rotary(grid, [self.config.attention_head_dim // 2] * 2)[None].to(self.device)

    def prior(self, ids: Tensor, dropped: bool) -> Tensor:
        """What tokens (R, N) say of the patches, (R, N, D); `dropped`: as if there were none."""
        known = self.prior_token_embedding(ids.to(self.device))
        return self.prior_projector(torch.zeros_like(known) if dropped else known)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        encoder_hidden_states: Tensor,
        prior: Tensor,
        sizes: Tensor,
        places: Tensor,
        memories: Sequence[Memory] | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """The velocity at x.

        Args:
            x: latents (R, C, h, w).
            t: times (R,), 0..999.
            encoder_hidden_states: text (R, T, D), as `glyph_projector` gives it.
            prior: what `prior` gives, (R, N, D).
            sizes: what `sizes` gives of crops from the top and left, height and width, (R, E).
            places: what `places` gives, (R, N, D / heads / 2, 2).
            memories: of other pictures, one for each block.
            perturbed: (R, blocks), in which of them the tokens of a row's picture see of it only themselves.
        """
        tokens = self.image_projector(x) + prior
        made = self._walked(tokens, t, encoder_hidden_states, sizes, places, memories, perturbed)
        return self._picture(made, *x.shape[-2:])
