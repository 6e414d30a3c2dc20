"""ControlNet (Zhang et al. 2023): a copy of a U-Net's way down that looks at a picture and corrects the U-Net."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.embeddings import TimestepEmbedding
from autopipeline.models.network import Network
from autopipeline.models.unet import PLAIN, PLAIN_BLOCKS, Encoder, Levels, Seen, each, refuse_unknown

OWN: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_time_scale_shift": ("default",),
}
"""Where fewer configuration values are known than of U-Nets."""


class PictureEmbedding(nn.Module):
    """The picture at the size of the latents: convolutions, every second one of which halves it."""

    def __init__(self, channels: int, widths: tuple[int, ...], out: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, following in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, following, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, h, w)."""
        x = functional.silu(self.conv_in(picture))
        for convolve in self.blocks:
            x = functional.silu(convolve(x))
        return self.conv_out(x)


class WayDown(Encoder):
    """What looks at pictures and corrects a U-Net: a copy of its way down, and convolutions silent before training."""

    controlnet_cond_embedding: PictureEmbedding

    def _build(self, what: str) -> int:
        """Make the parts; returns the width of the embedding of time."""
        config = self.config
        refuse_unknown(config, what, PLAIN | OWN, PLAIN_BLOCKS)
        widths, count = list(config.block_out_channels), len(config.block_out_channels)
        levels = Levels(
            widths=widths,
            layers=each(config.layers_per_block, count),
            depths=each(config.transformer_layers_per_block, count),
            heads=each(config.num_attention_heads or config.attention_head_dim, count),
            context=each(config.cross_attention_dim, count),
            only_cross=each(config.only_cross_attention, count),
            time=widths[0] * 4,
            groups=config.norm_num_groups or 32,
            eps=config.norm_eps,
            linear=config.use_linear_projection,
            upcast=config.upcast_attention,
        )
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], levels.time)
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim or 0, levels.time)
        self.down_blocks = levels.downs(config.down_block_types, config.downsample_padding)
        self.mid_block = levels.middle(config.mid_block_scale_factor)
        kept = [widths[0]]
        for level, width in enumerate(widths):
            kept += [width] * (levels.layers[level] + (level < count - 1))
        self.controlnet_down_blocks = nn.ModuleList([_silent(width) for width in kept])
        self.controlnet_mid_block = _silent(widths[-1])
        return levels.time

    @property
    def residuals(self) -> int:
        """How many there are, that of the middle included."""
        return len(self.controlnet_down_blocks) + 1

    @property
    def reduction(self) -> int:
        """Pixels of the picture for each of the latents, along one side."""
        return 2 ** (len(self.controlnet_cond_embedding.blocks) // 2)

    def down(self, x: Tensor, time: Tensor, text: Tensor) -> list[Tensor]:
        """Residuals for the way down, then one for the middle, unscaled, from x (B, C, h, w)."""
        seen, kept = Seen(text), [x]
        for block in self.down_blocks:
            kept += block.down(kept[-1], time, seen)  # type: ignore[operator]
        middle = self.mid_block.mid(kept[-1], time, seen)
        made = [convolve(x) for convolve, x in zip(self.controlnet_down_blocks, kept, strict=True)]
        made.append(self.controlnet_mid_block(middle))
        pooled = self.config.global_pool_conditions
        return [x.mean((2, 3), keepdim=True) for x in made] if pooled else made


class ControlNetModel(WayDown):
    """Residuals for a U-Net from a picture such as edges, depths or poses."""

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
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        transformer_layers_per_block: int | tuple[Any, ...] = 1,
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
        conditioning_embedding_out_channels: tuple[int, ...] | None = (16, 32, 96, 256),
        global_pool_conditions: bool = False,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        if controlnet_conditioning_channel_order not in ("rgb", "bgr"):
            raise CheckpointError(f"A controlnet for {controlnet_conditioning_channel_order!r} colours is not known.")
        self._build("controlnet")
        embedded = tuple(conditioning_embedding_out_channels or (16, 32, 96, 256))
        self.controlnet_cond_embedding = PictureEmbedding(conditioning_channels, embedded, block_out_channels[0])

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """Residuals for the way down, then one for the middle, unscaled.

        `sample` (B, C, H, W) at `timestep` (B,) with a text (B, T, D); `controlnet_cond` (B, 3, F * H, F * W) in 0..1;
        `text_embeds` (B, P) and `time_ids` (B, 6) as Stable Diffusion XL has them.
        """
        swapped = self.config.controlnet_conditioning_channel_order == "bgr"
        picture = controlnet_cond.flip(1) if swapped else controlnet_cond
        time = self.embed(sample, timestep, None, text_embeds, time_ids)
        return self.down(self.conv_in(sample) + self.controlnet_cond_embedding(picture), time, encoder_hidden_states)


class MultiControlNetModel(nn.Module):
    """Several ControlNets, whose residuals are summed; in folders they are `controlnet`, `controlnet_1` ..."""

    member: type[Network] = ControlNetModel

    def __init__(self, nets: Iterable[Network]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    @property
    def members(self) -> list[Any]:
        """The ControlNets themselves."""
        return list(self.nets)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Self:
        """Read the ControlNets in `folder`, `folder`_1 and so on; options are those of a network."""
        nets: list[Network] = []
        path = Path(folder)
        while path.is_dir():
            nets.append(cls.member.from_pretrained(path, **options))
            path = Path(f"{folder}_{len(nets)}")
        if not nets:
            raise CheckpointError(f"There is no controlnet in {folder}.")
        return cls(nets)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write each to a folder of its own."""
        for k, net in enumerate(self.nets):
            net.save_pretrained(f"{folder}_{k}" if k else folder, **options)  # type: ignore[operator]


def _silent(width: int) -> nn.Conv2d:
    """A convolution that says nothing before it is trained."""
    convolve = nn.Conv2d(width, width, 1)
    nn.init.zeros_(convolve.weight)
    nn.init.zeros_(convolve.bias)  # type: ignore[arg-type]
    return convolve
