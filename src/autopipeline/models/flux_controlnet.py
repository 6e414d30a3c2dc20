"""ControlNets for Flux: fewer blocks of the same kind, which look at a picture and correct the transformer's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from autopipeline.models.controlnet import MultiControlNetModel, PictureEmbedding
from autopipeline.models.flux import Streams


class Corrections(NamedTuple):
    """Residuals (B, L, D) for the blocks of two streams and for those of one."""

    doubles: list[Tensor]
    singles: list[Tensor]


class FluxControlNetModel(Streams):
    """Residuals for a transformer, from packed latents of a picture or from the picture itself.

    Union networks (`num_mode`) are told which kind of picture it is.
    """

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        num_mode: int | None = None,
        conditioning_embedding_channels: int | None = None,
    ) -> None:
        width = self._build(
            in_channels,
            (num_layers, num_single_layers),
            (num_attention_heads, attention_head_dim),
            joint_attention_dim,
            pooled_projection_dim,
            guidance_embeds,
        )
        self.controlnet_blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(num_layers)])
        self.controlnet_single_blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(num_single_layers)])
        self.controlnet_mode_embedder = nn.Embedding(num_mode, width) if num_mode is not None else None
        channels = conditioning_embedding_channels
        self.input_hint_block = PictureEmbedding(3, (16,) * 4, channels) if channels is not None else None
        self.controlnet_x_embedder = nn.Linear(in_channels, width)

    @property
    def sees_pixels(self) -> bool:
        """Whether it takes the picture itself rather than its latents."""
        return self.input_hint_block is not None

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        rotary: Tensor,
        *,
        controlnet_cond: Tensor,
        guidance: Tensor | None = None,
        mode: Tensor | None = None,
    ) -> Corrections:
        """Residuals after each block, unscaled; inputs as the transformer's.

        `controlnet_cond` (B, L, C), or (B, 3, H, W) in -1..1; `mode` (B,): the kind of the picture, for unions.
        """
        time = self._time(timestep, pooled_projections, guidance)
        image = self.x_embedder(hidden_states) + self.controlnet_x_embedder(self._seen(controlnet_cond))
        text = self.context_embedder(encoder_hidden_states)
        if self.controlnet_mode_embedder is not None:
            if mode is None:
                raise ValueError("A union ControlNet needs mode, the kind of its picture.")
            text = torch.cat([self.controlnet_mode_embedder(mode)[:, None], text], 1)
            rotary = torch.cat([rotary[:, :1], rotary], 1)  # a token of text more, which stands where texts stand
        doubles: list[Tensor] = []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            image, text = block(image, text, time, rotary)
            doubles.append(out(image))
        tokens, x = text.shape[1], torch.cat([text, image], 1)
        singles: list[Tensor] = []
        for block, out in zip(self.single_transformer_blocks, self.controlnet_single_blocks, strict=True):
            x = block(x, time, rotary)
            singles.append(out(x[:, tokens:]))
        return Corrections(doubles, singles)

    def _seen(self, picture: Tensor) -> Tensor:
        """Tokens (B, L, C) of the picture."""
        if self.input_hint_block is None:
            return picture
        side = self.config.patch_size
        patches = self.input_hint_block(picture).unflatten(3, (-1, side)).unflatten(2, (-1, side))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, C, h, p, w, p) -> (B, h w, C p p)


class FluxMultiControlNetModel(MultiControlNetModel):
    """Several ControlNets for one transformer, or one for several pictures."""

    member = FluxControlNetModel
