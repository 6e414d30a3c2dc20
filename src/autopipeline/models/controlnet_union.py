"""ControlNet union (xinsir 2024): one ControlNet for pictures of several kinds, one or several at a time.

Shapes: R rows, P pictures, K kinds, C channels of the first level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autopipeline.errors import CheckpointError
from autopipeline.models.controlnet import MultiControlNetModel, PictureEmbedding, WayDown
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal


class Perceptron(nn.Module):
    """Four times as wide, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        x = self.c_fc(x)
        return self.c_proj(x * (1.702 * x).sigmoid())  # GELU as OpenAI's CLIP approximates it


class Block(nn.Module):
    """Attention and perceptron.

    What attends to each other are the rows: not the pictures of one row, but one picture in all rows, as in training.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = Perceptron(width)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        """(R, P + 1, C) to the same; rows that do not see each other are true in (R, R)."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=apart)[0]
        return x + self.mlp(self.ln_2(x))


class ControlNetUnionModel(WayDown):
    """Residuals for a U-Net from pictures, each of a kind that the call says by its number."""

    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 3,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        projection_class_embeddings_input_dim: int | None = None,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = (48, 96, 192, 384),
        global_pool_conditions: bool = False,
        addition_embed_type_num_heads: int = 64,
        num_control_type: int = 6,
        num_trans_channel: int = 320,
        num_trans_head: int = 8,
        num_trans_layer: int = 1,
        num_proj_channel: int = 320,
    ) -> None:
        if controlnet_conditioning_channel_order != "rgb":
            raise CheckpointError(f"A controlnet for {controlnet_conditioning_channel_order!r} colours is not known.")
        time, width = self._build("controlnet"), block_out_channels[0]
        if not width == num_trans_channel == num_proj_channel:
            raise CheckpointError("num_trans_channel and num_proj_channel have to be those of the first block.")
        embedded = tuple(conditioning_embedding_out_channels or (48, 96, 192, 384))
        self.controlnet_cond_embedding = PictureEmbedding(conditioning_channels, embedded, width)
        self.task_embedding = nn.Parameter(torch.randn(num_control_type, width) * width**0.5)
        self.transformer_layes = nn.ModuleList([Block(width, num_trans_head) for _ in range(num_trans_layer)])
        self.spatial_ch_projs = nn.Linear(width, width)
        self.control_add_embedding = TimestepEmbedding((addition_time_embed_dim or 0) * num_control_type, time)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Sequence[Tensor],
        *,
        modes: Tensor,
        weights: Tensor,
        apart: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """Residuals for the way down, then one for the middle, unscaled.

        `sample` (R, C, H, W) at `timestep` (R,) with a text (R, T, D); P pictures (R, 3, F * H, F * W) in 0..1 of the
        kinds `modes` (R, P), with `weights` (R, P) of their own; rows that do not see each other are true in `apart`
        (R, R); `text_embeds` and `time_ids` as Stable Diffusion XL has them.
        """
        kinds = torch.zeros(len(modes), len(self.task_embedding), device=modes.device).scatter(1, modes, 1.0)
        time = self.embed(sample, timestep, None, text_embeds, time_ids, more=self._kinds(kinds, sample.dtype))
        x, weights = self.conv_in(sample), weights.to(sample.dtype)[..., None]
        pictures = torch.stack([self.controlnet_cond_embedding(picture) for picture in controlnet_cond], 1)
        pictures = pictures * weights[..., None, None]  # (R, P, C, h, w)
        said = pictures.mean((3, 4)) + self.task_embedding[modes] * weights
        tokens = torch.cat([said, x.mean((2, 3))[:, None]], 1)
        for layer in self.transformer_layes:
            tokens = layer(tokens, apart)
        shifts = self.spatial_ch_projs(tokens[:, :-1]) * weights
        return self.down(x + (pictures + shifts[..., None, None]).sum(1), time, encoder_hidden_states)

    def _kinds(self, kinds: Tensor, dtype: torch.dtype) -> Tensor:
        """Which kinds there are (R, K) as a vector beside the time."""
        shape = dict(cosine_first=self.config.flip_sin_to_cos, shift=self.config.freq_shift)
        waves = sinusoidal(kinds.flatten(), self.config.addition_time_embed_dim, **shape).reshape(len(kinds), -1)
        return self.control_add_embedding(waves.to(dtype))


class MultiControlNetUnionModel(MultiControlNetModel):
    """Several of them, whose residuals are summed."""

    member = ControlNetUnionModel
