"""The network of both stages of Stable Cascade (Stability AI 2024), after Würstchen's.

Shapes: B rows, C channels, K width of what is attended to, S tokens that a vector becomes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.network import Network
from autopipeline.models.wuerstchen import (
    AttnBlock,
    ChannelNorm,
    ResBlock,
    TimeBlock,
    embedded,
    number,
    resized,
    self_attentions,
    walked,
)

KINDS = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")


class Resized(nn.Module):
    """A convolution of single places, and twice or half the sides, or the same."""

    def __init__(self, width: int, out: int, up: bool, moved: bool) -> None:
        super().__init__()
        scale = nn.Upsample(scale_factor=2 if up else 0.5, mode="bilinear", align_corners=True)
        parts = [nn.Conv2d(width, out, 1), scale if moved else nn.Identity()]
        self.blocks = nn.ModuleList(reversed(parts) if up else parts)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, h, w)."""
        for block in self.blocks:
            x = block(x)
        return x


class Level(nn.ModuleList):
    """The blocks of a level, in their order."""


def _mapper(given: int, width: int) -> nn.Sequential:
    """What pictures beside the sample become."""
    inner = nn.Conv2d(given, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1)
    return nn.Sequential(*inner, ChannelNorm())


class StableCascadeUNet(Network):
    """Predicts the noise in embeddings of pictures (the prior) or in latents (the decoder)."""

    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        timestep_ratio_embedding_dim: int = 64,
        patch_size: int = 1,
        conditioning_dim: int = 2048,
        block_out_channels: tuple[int, ...] = (2048, 2048),
        num_attention_heads: tuple[int, ...] = (32, 32),
        down_num_layers_per_block: tuple[int, ...] = (8, 24),
        up_num_layers_per_block: tuple[int, ...] = (24, 8),
        down_blocks_repeat_mappers: tuple[int, ...] | None = (1, 1),
        up_blocks_repeat_mappers: tuple[int, ...] | None = (1, 1),
        block_types_per_layer: tuple[tuple[str, ...], ...] = (KINDS, KINDS),
        clip_text_in_channels: int | None = None,
        clip_text_pooled_in_channels: int = 1280,
        clip_image_in_channels: int | None = None,
        clip_seq: int = 4,
        effnet_in_channels: int | None = None,
        pixel_mapper_in_channels: int | None = None,
        kernel_size: int = 3,
        dropout: float | tuple[float, ...] = (0.1, 0.1),
        self_attn: bool | tuple[bool, ...] = True,
        timestep_conditioning_type: tuple[str, ...] = ("sca", "crp"),
        switch_level: tuple[bool, ...] | None = None,
    ) -> None:
        widths, patch = block_out_channels, patch_size
        if effnet_in_channels is not None:
            self.effnet_mapper = _mapper(effnet_in_channels, widths[0])
        if pixel_mapper_in_channels is not None:
            self.pixels_mapper = _mapper(pixel_mapper_in_channels, widths[0])
        self.clip_txt_pooled_mapper = nn.Linear(clip_text_pooled_in_channels, conditioning_dim * clip_seq)
        if clip_text_in_channels is not None:
            self.clip_txt_mapper = nn.Linear(clip_text_in_channels, conditioning_dim)
        if clip_image_in_channels is not None:
            self.clip_img_mapper = nn.Linear(clip_image_in_channels, conditioning_dim * clip_seq)
        first = nn.Conv2d(in_channels * patch**2, widths[0], 1)
        self.embedding = nn.Sequential(nn.PixelUnshuffle(patch), first, ChannelNorm())
        self.down_blocks, self.down_downscalers, self.down_repeat_mappers = (nn.ModuleList() for _ in range(3))
        self.up_blocks, self.up_upscalers, self.up_repeat_mappers = (nn.ModuleList() for _ in range(3))
        count = len(widths)
        down_repeats, up_repeats = (
            each or (1,) * count for each in (down_blocks_repeat_mappers, up_blocks_repeat_mappers)
        )
        for k in range(count):
            self.down_downscalers.append(self._scaled(k, up=False))
            self.down_blocks.append(self._level(k, down_num_layers_per_block[k], False))
            self.down_repeat_mappers.append(_repeats(widths[k], down_repeats[k]))
        for k in reversed(range(count)):
            self.up_upscalers.append(self._scaled(k, up=True))
            self.up_blocks.append(self._level(k, up_num_layers_per_block[::-1][k], k < count - 1))
            self.up_repeat_mappers.append(_repeats(widths[k], up_repeats[::-1][k]))
        last = nn.Conv2d(widths[0], out_channels * patch**2, 1)
        self.clf = nn.Sequential(ChannelNorm(), last, nn.PixelShuffle(patch))
        number(self)

    def self_attentions(self) -> Iterable[str]:
        """Names of the attentions that `perturbed` has columns for, in their order."""
        return self_attentions(self)

    def _scaled(self, k: int, up: bool) -> nn.Module:
        """The way between level k and the one above."""
        if k == 0:
            return nn.Identity()
        config, widths = self.config, self.config.block_out_channels
        ends = (widths[k], widths[k - 1]) if up else (widths[k - 1], widths[k])
        if config.switch_level is not None:
            return nn.Sequential(ChannelNorm(), Resized(*ends, up, config.switch_level[k - 1]))
        kind = nn.ConvTranspose2d if up else nn.Conv2d
        return nn.Sequential(ChannelNorm(), kind(*ends, 2, stride=2))

    def _level(self, k: int, layers: int, joined: bool) -> Level:
        """The blocks of level k; the first may have the same level of the way down join in."""
        config, width = self.config, self.config.block_out_channels[k]
        attends = config.self_attn if isinstance(config.self_attn, bool) else config.self_attn[k]
        blocks: list[nn.Module] = []
        for kind in tuple(config.block_types_per_layer[k]) * layers:
            if kind not in KINDS:
                raise CheckpointError(f"A StableCascadeUNet with blocks of the type {kind} is not supported.")
            if kind == KINDS[0]:
                blocks.append(ResBlock(width, 0 if blocks or not joined else width, config.kernel_size))
            elif kind == KINDS[1]:
                more = config.timestep_conditioning_type
                blocks.append(TimeBlock(width, config.timestep_ratio_embedding_dim, more))
            else:
                heads = config.num_attention_heads[k]
                blocks.append(AttnBlock(width, config.conditioning_dim, heads, alone=not attends))
        return Level(blocks)

    def hear(self, pooled: Tensor, text: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """What `forward` attends to (B, T, K): pooled texts (B, n, P), tokens of text (B, L, E), pictures (B, m, I)."""

        def spread(mapper: nn.Module, rows: Tensor) -> Tensor:
            return mapper(rows).unflatten(-1, (self.config.clip_seq, -1)).flatten(1, 2)

        said = [spread(self.clip_txt_pooled_mapper, pooled)]
        if text is not None and image is not None:
            said = [self.clip_txt_mapper(text), *said, spread(self.clip_img_mapper, image)]
        whole = torch.cat(said, 1)
        return functional.layer_norm(whole, whole.shape[-1:], eps=1e-6)

    def forward(
        self,
        sample: Tensor,
        time: Tensor,
        context: Tensor,
        effnet: Tensor | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """The noise in `sample` (B, C, H, W) at `time` (B,) in 0..1.

        With what `self.hear` gives of the texts, and for a decoder the embedding of a picture (B, 16, h, w).
        `perturbed` (B, self-attentions): in which of them the places of a row see of it only themselves.
        """
        config, x = self.config, self.embedding(sample)
        sides = x.shape[-2:]
        if effnet is not None:
            x = x + self.effnet_mapper(resized(effnet, size=sides))
        if config.pixel_mapper_in_channels is not None:  # no picture is shown
            shown = self.pixels_mapper(sample.new_zeros(1, config.pixel_mapper_in_channels, 8, 8))
            x = x + resized(shown, size=sides)
        every = [time, *(torch.zeros_like(time) for _ in config.timestep_conditioning_type)]
        times = [embedded(one, config.timestep_ratio_embedding_dim) for one in every]
        kept: list[Tensor] = []
        ways = zip(self.down_blocks, self.down_downscalers, self.down_repeat_mappers, strict=True)
        for blocks, scale, repeats in ways:
            x = _walk(blocks, repeats, scale(x), times, context, None, perturbed)  # type: ignore[arg-type]
            kept.append(x)
        ways = zip(self.up_blocks, self.up_upscalers, self.up_repeat_mappers, strict=True)
        for k, (blocks, scale, repeats) in enumerate(ways):
            before = kept.pop()
            x = scale(_walk(blocks, repeats, x, times, context, before if k else None, perturbed))  # type: ignore[arg-type]
        return self.clf(x)


def _repeats(width: int, times: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Conv2d(width, width, 1) for _ in range(times - 1)])


def _walk(
    blocks: nn.ModuleList,
    repeats: nn.ModuleList,
    x: Tensor,
    times: Sequence[Tensor],
    context: Tensor,
    before: Tensor | None,
    perturbed: Tensor | None,
) -> Tensor:
    """All blocks of a level, once more after each of the `repeats`; the first has `before` join in."""
    for between in (*repeats, None):
        for k, block in enumerate(blocks):
            skip = before if k == 0 else None
            if skip is not None and x.shape[-2:] != skip.shape[-2:]:  # odd sides were halved
                x = resized(x.float(), size=skip.shape[-2:]).to(x.dtype)
            x = walked(block, x, times, context, skip, perturbed)
        x = x if between is None else between(x)
    return x
