"""The U-Net of Stable Diffusion 1, 2 and XL and its relatives (Ronneberger et al. 2015; Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import SpatialTransformer
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal
from autopipeline.models.network import Network
from autopipeline.models.resnet import Downsample, ResnetBlock, Upsample

PLAIN = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
"""Configuration values that this network has; others exist and are refused rather than passed over."""

BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")


class Stack(nn.Module):
    """One level: residual blocks, each with a transformer where there are any, then a change of resolution."""

    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: list[SpatialTransformer],
        down: Downsample | None = None,
        up: Upsample | None = None,
    ) -> None:
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        if down is not None:
            self.downsamplers = nn.ModuleList([down])
        if up is not None:
            self.upsamplers = nn.ModuleList([up])

    def attended(self, k: int, x: Tensor, text: Tensor) -> Tensor:
        """X after the k-th transformer, if there is one."""
        return self.attentions[k](x, text) if hasattr(self, "attentions") else x

    def down(self, x: Tensor, time: Tensor, text: Tensor) -> list[Tensor]:
        """What every block leaves for the way up; the last one goes on down."""
        kept: list[Tensor] = []
        for k, resnet in enumerate(self.resnets):
            x = self.attended(k, resnet(x, time), text)
            kept.append(x)
        if hasattr(self, "downsamplers"):
            kept.append(self.downsamplers[0](x))
        return kept

    def mid(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """A block, then pairs of transformer and block."""
        x = self.resnets[0](x, time)
        for k, resnet in enumerate(list(self.resnets)[1:]):
            x = resnet(self.attended(k, x, text), time)
        return x

    def up(self, x: Tensor, time: Tensor, text: Tensor, kept: list[Tensor]) -> Tensor:
        """Take from `kept` what the way down has left."""
        for k, resnet in enumerate(self.resnets):
            x = self.attended(k, resnet(_cat(x, kept.pop()), time), text)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, tuple(kept[-1].shape[-2:]))
        return x


def _cat(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], 1)


def _each(value: Any, count: int) -> list[Any]:
    """A value for every level, from one for all or a list."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count


class UNet2DConditionModel(Network):
    """A U-Net with attention to a text."""

    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | tuple[int, ...] = 1280,
        transformer_layers_per_block: int | tuple[Any, ...] = 1,
        reverse_transformer_layers_per_block: tuple[Any, ...] | None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,  # of block types that this network does not have
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        time_embedding_act_fn: str | None = None,
        timestep_post_act: str | None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
        attention_type: str = "default",
        class_embeddings_concat: bool = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: str | None = None,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        _refuse_unknown(self.config)
        widths, levels = list(block_out_channels), len(block_out_channels)
        groups = norm_num_groups or 32
        time = time_embedding_dim or widths[0] * 4
        layers, context = _each(layers_per_block, levels), _each(cross_attention_dim, levels)
        depths = _each(transformer_layers_per_block, levels)
        # What the configurations call the width of the heads is, in all of these checkpoints, their number.
        heads = _each(num_attention_heads or attention_head_dim, levels)
        only_cross = _each(only_cross_attention, levels)

        def resnet(channels: int, out: int) -> ResnetBlock:
            return ResnetBlock(channels, out, time, groups=groups, eps=norm_eps)

        def transformer(level: int, depth: int, cross: bool) -> SpatialTransformer:
            return SpatialTransformer(
                widths[level],
                heads[level],
                depth,
                context[level],
                groups=groups,
                linear=use_linear_projection,
                only_cross=cross,
                upcast=upcast_attention,
            )

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time, condition=time_cond_proj_dim)
        if addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(projection_class_embeddings_input_dim or 0, time)

        downs: list[Stack] = []
        for level, kind in enumerate(down_block_types):
            before = widths[max(level - 1, 0)]
            resnets = [resnet(before if k == 0 else widths[level], widths[level]) for k in range(layers[level])]
            attentions = [
                transformer(level, depth, only_cross[level]) for depth in _depths(kind, depths[level], layers[level])
            ]
            last = level == levels - 1
            downs.append(Stack(resnets, attentions, None if last else Downsample(widths[level], downsample_padding)))
        self.down_blocks = nn.ModuleList(downs)

        deepest = depths[-1] if isinstance(depths[-1], int) else depths[-1][0]
        self.mid_block = Stack(
            [
                ResnetBlock(widths[-1], widths[-1], time, groups=groups, eps=norm_eps, scale=mid_block_scale_factor)
                for _ in range(2)
            ],
            [transformer(levels - 1, deepest, False)],  # whatever mid_block_only_cross_attention says
        )

        ups: list[Stack] = []
        up_depths = list(reverse_transformer_layers_per_block or reversed(depths))
        for position, kind in enumerate(up_block_types):
            level = levels - 1 - position
            count = layers[level] + 1
            before, below = widths[min(level + 1, levels - 1)], widths[max(level - 1, 0)]
            resnets = [
                resnet(
                    (before if k == 0 else widths[level]) + (below if k == count - 1 else widths[level]), widths[level]
                )
                for k in range(count)
            ]
            attentions = [
                transformer(level, depth, only_cross[level]) for depth in _depths(kind, up_depths[position], count)
            ]
            ups.append(Stack(resnets, attentions, up=Upsample(widths[level]) if level else None))
        self.up_blocks = nn.ModuleList(ups)

        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        down_block_additional_residuals: Sequence[Tensor] = (),
        mid_block_additional_residual: Tensor | None = None,
    ) -> Tensor:
        """The prediction for `sample` (B, C, H, W) at `timestep` (B,) with a text (B, T, D).

        `timestep_cond` (B, W) embeds a guidance scale; `text_embeds` (B, P) and `time_ids` (B, 5 or 6) are the pooled
        text and the sizes of Stable Diffusion XL; the residuals come from a ControlNet.
        """
        config, text = self.config, encoder_hidden_states
        shape = dict(cosine_first=config.flip_sin_to_cos, shift=config.freq_shift)
        time = self.time_embedding(
            sinusoidal(timestep.reshape(-1), config.block_out_channels[0], **shape).to(sample.dtype), timestep_cond
        )
        if config.addition_embed_type == "text_time":
            time = time + self._added(text_embeds, time_ids, shape, sample)
        time = functional.silu(time)

        x = self.conv_in(sample)
        kept = [x]
        for block in self.down_blocks:
            kept += block.down(kept[-1], time, text)  # type: ignore[operator]
        x = self.mid_block.mid(kept[-1], time, text)
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        if len(down_block_additional_residuals):
            kept = [x + more for x, more in zip(kept, down_block_additional_residuals, strict=True)]
        for block in self.up_blocks:
            x = block.up(x, time, text, kept)  # type: ignore[operator]
        return self.conv_out(functional.silu(self.conv_norm_out(x)))

    def _added(self, text: Tensor | None, ids: Tensor | None, shape: dict[str, Any], sample: Tensor) -> Tensor:
        if text is None or ids is None:
            raise ValueError("This unet needs text_embeds and time_ids.")
        numbers = sinusoidal(ids.flatten(), self.config.addition_time_embed_dim, **shape).reshape(len(ids), -1)
        return self.add_embedding(torch.cat([text, numbers.to(text.dtype)], -1).to(sample.dtype))


def _depths(kind: str, depth: Any, count: int) -> list[int]:
    """Layers of each transformer of a level; none for levels without attention."""
    return _each(depth, count) if kind.startswith("CrossAttn") else []


def _refuse_unknown(config: Any) -> None:
    for name, able in PLAIN.items():
        if config[name] not in able:
            raise CheckpointError(f"A unet with {name}={config[name]!r} is not supported by this version.")
    for kind in (*config["down_block_types"], *config["up_block_types"]):
        if kind not in BLOCKS:
            raise CheckpointError(f"A unet with blocks of the type {kind} is not supported by this version.")
