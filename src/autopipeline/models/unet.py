"""The U-Net of Stable Diffusion 1, 2 and XL and its relatives (Ronneberger et al. 2015; Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import AddedAttention, SpatialTransformer, TransformerBlock
from autopipeline.models.embeddings import ACTIVATIONS, TimestepEmbedding, sinusoidal
from autopipeline.models.network import Network
from autopipeline.models.resnet import Downsample, ResnetBlock, Upsample
from autopipeline.models.unet_conditions import ImageTokens, ImageVector, TextVector

PLAIN = {
    "act_fn": ("silu", "swish", "gelu"),
    "addition_embed_type": (None, "text_time", "text", "image", "text_image"),
    "center_input_sample": (False,),
    "class_embed_type": (None, "timestep"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None, "group_norm", "layer_norm"),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None, "text_proj", "image_proj", "text_image_proj"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_act_fn": (None, "silu", "swish", "gelu"),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
"""Configuration values that this network has; others exist and are refused rather than passed over."""

PLAIN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
SIMPLE_BLOCKS = (
    *("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    *("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
)
BLOCKS = (*PLAIN_BLOCKS, *SIMPLE_BLOCKS)


class Seen(NamedTuple):
    """What the transformers look at besides x."""

    text: Tensor  # (B, T, D)
    perturbed: Tensor | None = None  # (B, self-attentions), bool: those that don't mix the places


class Stack(nn.Module):
    """One level: residual blocks, each with a transformer where there are any, then a change of resolution."""

    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: Sequence[SpatialTransformer | AddedAttention],
        down: Downsample | ResnetBlock | None = None,
        up: Upsample | ResnetBlock | None = None,
    ) -> None:
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        if down is not None:
            self.downsamplers = nn.ModuleList([down])
        if up is not None:
            self.upsamplers = nn.ModuleList([up])

    def attended(self, k: int, x: Tensor, seen: Seen) -> Tensor:
        """X after the k-th transformer, if there is one."""
        return self.attentions[k](x, *seen) if hasattr(self, "attentions") else x

    def down(self, x: Tensor, time: Tensor, seen: Seen) -> list[Tensor]:
        """What every block leaves for the way up; the last one goes on down."""
        kept: list[Tensor] = []
        for k, resnet in enumerate(self.resnets):
            x = self.attended(k, resnet(x, time), seen)
            kept.append(x)
        if hasattr(self, "downsamplers"):
            change = self.downsamplers[0]
            kept.append(change(x, time) if isinstance(change, ResnetBlock) else change(x))
        return kept

    def mid(self, x: Tensor, time: Tensor, seen: Seen) -> Tensor:
        """A block, then pairs of transformer and block."""
        x = self.resnets[0](x, time)
        for k, resnet in enumerate(list(self.resnets)[1:]):
            x = resnet(self.attended(k, x, seen), time)
        return x

    def up(self, x: Tensor, time: Tensor, seen: Seen, kept: list[Tensor]) -> Tensor:
        """Take from `kept` what the way down has left."""
        for k, resnet in enumerate(self.resnets):
            x = self.attended(k, resnet(_cat(x, kept.pop()), time), seen)
        if hasattr(self, "upsamplers"):
            change, size = self.upsamplers[0], (kept[-1].shape[-2], kept[-1].shape[-1])
            x = change(x, time, size) if isinstance(change, ResnetBlock) else change(x, size)
        return x


def _cat(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], 1)


def each(value: Any, count: int) -> list[Any]:
    """A value for every level, from one for all or a list."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """The levels of a U-Net, from the finest; lists have an item for each."""

    widths: list[int]
    layers: list[int]
    depths: list[Any]  # of the transformers: one number, or one for each of the level's
    heads: list[int]
    context: list[int]
    only_cross: list[bool]
    time: int  # width of the time embedding
    groups: int
    eps: float
    linear: bool
    upcast: bool
    act: str = "silu"
    modulated: bool = False  # by the time
    scale: float = 1.0  # what the simple blocks' sums are divided by
    head_widths: list[int] = field(default_factory=list[int])  # in the simple blocks
    norm: str | None = None  # of the text, in the simple blocks

    def resnet(self, channels: int, out: int, scale: float = 1.0, change: str | None = None) -> ResnetBlock:
        """A residual block."""
        rest: dict[str, Any] = dict(modulated=self.modulated, activation=self.act, change=change)
        return ResnetBlock(channels, out, self.time, groups=self.groups, eps=self.eps, scale=scale, **rest)

    def scale_of(self, kind: str) -> float:
        """What the sums of that kind of blocks are divided by."""
        return self.scale if kind in SIMPLE_BLOCKS else 1.0

    def transformer(self, level: int, depth: int, cross: bool) -> SpatialTransformer:
        """A transformer of that level; `cross`: with attention to the text alone."""
        return SpatialTransformer(
            self.widths[level],
            self.heads[level],
            depth,
            self.context[level],
            groups=self.groups,
            linear=self.linear,
            only_cross=cross,
            upcast=self.upcast,
        )

    def simple(self, level: int, cross: bool) -> AddedAttention:
        """A simple attention of that level; `cross`: to the text alone."""
        width = self.widths[level]
        heads, rest = width // self.head_widths[level], dict(only_cross=cross, norm=self.norm)
        return AddedAttention(width, heads, self.context[level], groups=self.groups, **rest)  # type: ignore[arg-type]

    def attentions(
        self, kind: str, level: int, depth: Any, count: int
    ) -> Sequence[SpatialTransformer | AddedAttention]:
        """The attentions of a level, one for each residual block; none where its kind has no attention."""
        cross = self.only_cross[level]
        if kind.startswith("SimpleCrossAttn"):
            return [self.simple(level, cross) for _ in range(count)]
        depths = each(depth, count) if kind.startswith("CrossAttn") else []
        return [self.transformer(level, one, cross) for one in depths]

    def downs(self, kinds: Sequence[str], padding: int) -> nn.ModuleList:
        """The way down."""
        stacks: list[Stack] = []
        for level, kind in enumerate(kinds):
            width, before, count = self.widths[level], self.widths[max(level - 1, 0)], self.layers[level]
            scale = self.scale_of(kind)
            resnets = [self.resnet(before if k == 0 else width, width, scale) for k in range(count)]
            attentions = self.attentions(kind, level, self.depths[level], count)
            change = None
            if level < len(self.widths) - 1:
                simple = kind in SIMPLE_BLOCKS
                change = self.resnet(width, width, scale, "down") if simple else Downsample(width, padding)
            stacks.append(Stack(resnets, attentions, change))
        return nn.ModuleList(stacks)

    def middle(self, scale: float, kind: str | None = None, cross: bool = False) -> Stack:
        """The blocks at the bottom; transformers attend to the places too here, whatever `only_cross` says."""
        width, depth, level = self.widths[-1], self.depths[-1], len(self.widths) - 1
        resnets = [self.resnet(width, width, scale) for _ in range(2)]
        if kind == "UNetMidBlock2DSimpleCrossAttn":
            return Stack(resnets, [self.simple(level, cross)])
        deepest = depth if isinstance(depth, int) else depth[0]
        return Stack(resnets, [self.transformer(level, deepest, False)])


class Encoder(Network):
    """What a U-Net and a ControlNet share: how times, pooled texts and sizes become one vector."""

    time_embedding: TimestepEmbedding
    add_embedding: TimestepEmbedding | TextVector | ImageVector
    class_embedding: TimestepEmbedding

    def embed(
        self,
        sample: Tensor,
        timestep: Tensor,
        timestep_cond: Tensor | None,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
        image_embeds: Tensor | None = None,
        text: Tensor | None = None,
        class_labels: Tensor | None = None,
        more: Tensor | None = None,
    ) -> Tensor:
        """The activated embedding (B, W); `more` (B, W) is added to it."""
        config = self.config
        shape = dict(cosine_first=config.flip_sin_to_cos, shift=config.freq_shift)
        time = self.time_embedding(
            sinusoidal(timestep.reshape(-1), config.block_out_channels[0], **shape).to(sample.dtype), timestep_cond
        )
        if config.get("class_embed_type") == "timestep":
            time = time + self._level(class_labels, shape, sample)
        time = time if more is None else time + more
        kind = config.addition_embed_type
        if kind == "text_time":
            time = time + self._added(text_embeds, time_ids, shape, sample)
        elif kind == "text":
            time = time + self.add_embedding(text)
        elif kind is not None:
            time = time + self.add_embedding(image_embeds, text_embeds)
        if config.get("time_embedding_act_fn") is not None:
            time = ACTIVATIONS[config.time_embedding_act_fn]()(time)
        return time if config.get("resnet_skip_time_act") else ACTIVATIONS[config.get("act_fn", "silu")]()(time)

    def _level(self, level: Tensor | None, shape: dict[str, Any], sample: Tensor) -> Tensor:
        """How much noise there is in a picture beside x, as another time."""
        if level is None:
            raise ValueError("This unet needs class_labels: the level of noise of a picture beside x.")
        waves = sinusoidal(level.reshape(-1), self.config.block_out_channels[0], **shape)
        return self.class_embedding(waves.to(sample.dtype))

    def _added(self, text: Tensor | None, ids: Tensor | None, shape: dict[str, Any], sample: Tensor) -> Tensor:
        if text is None or ids is None:
            raise ValueError("This unet needs text_embeds and time_ids.")
        numbers = sinusoidal(ids.flatten(), self.config.addition_time_embed_dim, **shape).reshape(len(ids), -1)
        return self.add_embedding(torch.cat([text, numbers.to(text.dtype)], -1).to(sample.dtype))


class UNet2DConditionModel(Encoder):
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
        refuse_unknown(self.config, "unet")
        widths, count = list(block_out_channels), len(block_out_channels)
        levels = Levels(
            widths=widths,
            layers=each(layers_per_block, count),
            depths=each(transformer_layers_per_block, count),
            # What the configurations call the width of the heads is, in all of these checkpoints, their number.
            heads=each(num_attention_heads or attention_head_dim, count),
            context=each(cross_attention_dim, count),
            only_cross=each(only_cross_attention, count),
            time=time_embedding_dim or widths[0] * 4,
            groups=norm_num_groups or 32,
            eps=norm_eps,
            linear=use_linear_projection,
            upcast=upcast_attention,
            act=act_fn,
            modulated=resnet_time_scale_shift == "scale_shift",
            scale=resnet_out_scale_factor,
            head_widths=each(attention_head_dim, count),
            norm=cross_attention_norm,
        )
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], levels.time, act_fn, condition=time_cond_proj_dim)
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(widths[0], levels.time, act_fn)
        self._conditions(levels.time, levels.context[0])
        self.down_blocks = levels.downs(down_block_types, downsample_padding)
        alone = (
            only_cross_attention is True if mid_block_only_cross_attention is None else mid_block_only_cross_attention
        )
        self.mid_block = levels.middle(mid_block_scale_factor, mid_block_type, alone)
        self.up_blocks = self._ups(levels, up_block_types, reverse_transformer_layers_per_block)
        self.conv_norm_out = nn.GroupNorm(levels.groups, widths[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        for place, block in enumerate(self.self_attentions().values()):
            block.place = place

    def _conditions(self, time: int, context: int) -> None:
        """What texts and pictures become: a vector beside the time, tokens of the width `context`."""
        config, given = self.config, self.config.encoder_hid_dim
        kind = config.addition_embed_type
        if kind == "text_time":
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim or 0, time)
        elif kind == "text":
            self.add_embedding = TextVector(given or context, time, config.addition_embed_type_num_heads)
        elif kind == "image":
            self.add_embedding = ImageVector(given, time)
        elif kind == "text_image":
            self.add_embedding = ImageVector(context, time, text=context)
        tokens = self._tokens()
        if tokens == "text_proj":
            self.encoder_hid_proj = nn.Linear(given, context)
        elif tokens == "image_proj":
            self.encoder_hid_proj = ImageTokens(given, context, 32)
        elif tokens == "text_image_proj":
            self.encoder_hid_proj = ImageTokens(context, context, 10, text=given)

    def _tokens(self) -> str | None:
        """What the tokens are made of that the blocks attend to."""
        named = self.config.encoder_hid_dim_type
        return "text_proj" if named is None and self.config.encoder_hid_dim is not None else named

    @staticmethod
    def _ups(levels: Levels, kinds: Sequence[str], depths: Sequence[Any] | None) -> nn.ModuleList:
        """The way up: at each level one block more than on the way down, each with what that has left."""
        stacks: list[Stack] = []
        widths, last = levels.widths, len(levels.widths) - 1
        depths = list(depths or reversed(levels.depths))
        for position, kind in enumerate(kinds):
            level = last - position
            count, width = levels.layers[level] + 1, widths[level]
            first, below = widths[min(level + 1, last)], widths[max(level - 1, 0)]
            scale = levels.scale_of(kind)
            resnets = [
                levels.resnet((first if k == 0 else width) + (below if k == count - 1 else width), width, scale)
                for k in range(count)
            ]
            attentions = levels.attentions(kind, level, depths[position], count)
            change = None
            if level:
                simple = kind in SIMPLE_BLOCKS
                change = levels.resnet(width, width, scale, "up") if simple else Upsample(width)
            stacks.append(Stack(resnets, attentions, up=change))
        return nn.ModuleList(stacks)

    def self_attentions(self) -> dict[str, TransformerBlock | AddedAttention]:
        """The blocks with self-attention, by its name, in the order of the columns of `perturbed`."""
        kinds = TransformerBlock, AddedAttention
        parts = [(name, x) for name, x in self.named_modules() if isinstance(x, kinds) and not x.only_cross]
        return {f"{name}.attn1" if isinstance(x, TransformerBlock) else name: x for name, x in parts}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        image_embeds: Tensor | None = None,
        class_labels: Tensor | None = None,
        down_block_additional_residuals: Sequence[Tensor] = (),
        mid_block_additional_residual: Tensor | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """The prediction for `sample` (B, C, H, W) at `timestep` (B,) with a text (B, T, D).

        `timestep_cond` (B, W) embeds a guidance scale; `text_embeds` (B, P) and `time_ids` (B, 5 or 6) are the pooled
        text and the sizes of Stable Diffusion XL; `image_embeds` (B, I) is what Kandinsky makes a picture of;
        `class_labels` (B,) is the level of noise, as a time, of a picture beside x; the
        residuals come from a ControlNet; `perturbed` (B, K) is true for those of the K self-attentions that are to
        leave every place as it is.
        """
        text = encoder_hidden_states
        time = self.embed(sample, timestep, timestep_cond, text_embeds, time_ids, image_embeds, text, class_labels)
        seen = Seen(self._seen(text, image_embeds), None if perturbed is None else perturbed.bool())
        x = self.conv_in(sample)
        kept = [x]
        for block in self.down_blocks:
            kept += block.down(kept[-1], time, seen)  # type: ignore[operator]
        x = self.mid_block.mid(kept[-1], time, seen)
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        if len(down_block_additional_residuals):
            kept = [x + more for x, more in zip(kept, down_block_additional_residuals, strict=True)]
        for block in self.up_blocks:
            x = block.up(x, time, seen, kept)  # type: ignore[operator]
        return self.conv_out(ACTIVATIONS[self.config.act_fn]()(self.conv_norm_out(x)))

    def _seen(self, text: Tensor | None, image: Tensor | None) -> Tensor:
        """The tokens that the blocks attend to."""
        kind = self._tokens()
        needed = {"text_proj": [text], "image_proj": [image], "text_image_proj": [image, text]}.get(str(kind), [text])
        if any(part is None for part in needed):
            raise ValueError("This unet needs image_embeds, encoder_hidden_states, or both.")
        return self.encoder_hid_proj(*needed) if kind else needed[0]  # type: ignore[return-value]


def refuse_unknown(
    config: Any, what: str, values: Mapping[str, tuple[Any, ...]] = PLAIN, blocks: Sequence[str] = BLOCKS
) -> None:
    """Raise CheckpointError for configurations of blocks that aren't here."""
    for name, able in values.items():
        if name in config and config[name] not in able:
            raise CheckpointError(f"A {what} with {name}={config[name]!r} is not supported by this version.")
    for kind in (*config["down_block_types"], *config.get("up_block_types", ())):
        if kind not in blocks:
            raise CheckpointError(f"A {what} with blocks of the type {kind} is not supported by this version.")
