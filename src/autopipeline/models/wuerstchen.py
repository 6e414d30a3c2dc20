"""The networks of Würstchen (Pernias et al. 2024): a prior in small embeddings of pictures, and a decoder.

Shapes: B rows, C channels, T tokens of text, E their width, K width of what is attended to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import Mask, attend, masks
from autopipeline.models.embeddings import sinusoidal
from autopipeline.models.network import Network

STEEPNESS = 10000
"""Times in 0..1 are embedded as if they went so far."""
LEAST = 1e-3
"""The network's share of noise stays so far from 0 and 1."""
resized = partial(functional.interpolate, mode="bilinear", align_corners=True)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each place, without weights."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return functional.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=1e-6).movedim(-1, 1)


class ResponseNorm(nn.Module):
    """Channels compete by their strength over the whole picture (Woo et al. 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        strength = x.norm(dim=(1, 2), keepdim=True)
        return self.gamma * (x * (strength / (strength.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class ResBlock(nn.Module):
    """Places of a channel, then channels of a place; `skip` channels join in between."""

    def __init__(self, width: int, skip: int = 0, kernel: int = 3) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = ChannelNorm()
        self.channelwise = nn.Sequential(
            *(nn.Linear(width + skip, 4 * width), nn.GELU(), ResponseNorm(4 * width)),
            *(nn.Identity(), nn.Linear(4 * width, width)),
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to the same."""
        y = self.norm(self.depthwise(x))
        y = y if skip is None else torch.cat([y, skip], 1)
        return x + self.channelwise(y.movedim(1, -1)).movedim(-1, 1)


class TimeBlock(nn.Module):
    """Scales and shifts channels by the time, and by further numbers with mappers of their own."""

    def __init__(self, width: int, time: int, more: Sequence[str] = ()) -> None:
        super().__init__()
        self.mapper = nn.Linear(time, 2 * width)
        self.more = [f"mapper_{name}" for name in more]
        for name in self.more:
            self.add_module(name, nn.Linear(time, 2 * width))

    def forward(self, x: Tensor, times: Sequence[Tensor]) -> Tensor:
        """(B, C, H, W) to the same, for embeddings (B, time) of the time and of what else there is."""
        mappers = [self.mapper, *(self.get_submodule(name) for name in self.more)]
        said = [mapper(time) for mapper, time in zip(mappers, times, strict=True)]
        scale, shift = torch.stack(said).sum(0)[..., None, None].chunk(2, 1)
        return x * (1 + scale) + shift


class Attention(nn.Module):
    """Attention of places to tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, mask: Mask = None) -> Tensor:
        """(B, L, C) and (B, T, C) to (B, L, C)."""
        q, k, v = (
            project(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, rows in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out[0](attend(q, k, v, mask).transpose(1, 2).flatten(2))


class AttnBlock(nn.Module):
    """Places attend to what is said, and to each other unless `alone`."""

    def __init__(self, width: int, context: int, heads: int, alone: bool = False) -> None:
        super().__init__()
        self.alone = alone
        self.place = 0  # among the network's self-attentions, which number themselves
        self.norm = ChannelNorm()
        self.attention = Attention(width, heads)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(context, width))

    def forward(self, x: Tensor, context: Tensor, perturbed: Tensor | None = None) -> Tensor:
        """(B, C, H, W) with (B, T, K) to (B, C, H, W).

        `perturbed` (B, self-attentions): in which of them places see of x only themselves.
        """
        places, said = self.norm(x).flatten(2).transpose(1, 2), self.kv_mapper(context)
        seen = said if self.alone else torch.cat([said, places], 1)
        apart = None if perturbed is None or self.alone else perturbed[:, [self.place]]
        mask = masks(1, None, apart, slice(said.shape[1], None))[0]
        return x + self.attention(places, seen, mask).transpose(1, 2).unflatten(2, tuple(x.shape[-2:]))


def self_attentions(network: nn.Module) -> dict[str, AttnBlock]:
    """The blocks of a network in which places attend to each other, by the names of those attentions, in order."""
    parts = network.named_modules()
    return {f"{name}.attention": x for name, x in parts if isinstance(x, AttnBlock) and not x.alone}


def number(network: nn.Module) -> None:
    """Tell those blocks their places."""
    for place, block in enumerate(self_attentions(network).values()):
        block.place = place


def embedded(time: Tensor, width: int) -> Tensor:
    """A time (B,) in 0..1 as waves (B, width), in its precision."""
    return sinusoidal(time * STEEPNESS, width, cosine_first=False, shift=1).to(time.dtype)


def walked(
    block: nn.Module,
    x: Tensor,
    times: Sequence[Tensor],
    context: Tensor,
    skip: Tensor | None,
    perturbed: Tensor | None = None,
) -> Tensor:
    """One block, given what its kind takes."""
    if isinstance(block, ResBlock):
        return block(x, skip)
    if isinstance(block, TimeBlock):
        return block(x, times)
    return block(x, context, perturbed) if isinstance(block, AttnBlock) else block(x)


class WuerstchenPrior(Network):
    """Predicts the noise in embeddings of pictures, from a text."""

    def __init__(
        self,
        c_in: int = 16,
        c: int = 1280,
        c_cond: int = 1024,
        c_r: int = 64,
        depth: int = 16,
        nhead: int = 16,
        dropout: float = 0.1,
    ) -> None:
        self.projection = nn.Conv2d(c_in, c, 1)
        self.cond_mapper = nn.Sequential(nn.Linear(c_cond, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.extend([ResBlock(c), TimeBlock(c, c_r), AttnBlock(c, c, nhead)])
        self.out = nn.Sequential(ChannelNorm(), nn.Conv2d(c, 2 * c_in, 1))
        number(self)

    def self_attentions(self) -> Iterable[str]:
        """Names of the attentions that `perturbed` has columns for, in their order."""
        return self_attentions(self)

    def forward(self, sample: Tensor, time: Tensor, text: Tensor, perturbed: Tensor | None = None) -> Tensor:
        """The noise in `sample` (B, C, H, W) at `time` (B,) in 0..1, for a text (B, T, E).

        `perturbed` (B, self-attentions): in which of them the places of a row see of it only themselves.
        """
        x, context, times = self.projection(sample), self.cond_mapper(text), [embedded(time, self.config.c_r)]
        for block in self.blocks:
            x = walked(block, x, times, context, None, perturbed)
        mean, share = self.out(x).chunk(2, 1)
        return (sample - mean) / ((1 - share).abs() + 1e-5)


class WuerstchenDiffNeXt(Network):
    """Predicts the noise in latents, from the embedding of a picture and a text."""

    def __init__(
        self,
        c_in: int = 4,
        c_out: int = 4,
        c_r: int = 64,
        patch_size: int = 2,
        c_cond: int = 1024,
        c_hidden: Sequence[int] = (320, 640, 1280, 1280),
        nhead: Sequence[int] = (-1, 10, 20, 20),
        blocks: Sequence[int] = (4, 4, 14, 4),
        level_config: Sequence[str] = ("CT", "CTA", "CTA", "CTA"),
        inject_effnet: Sequence[bool] = (False, True, True, True),
        effnet_embd: int = 16,
        clip_embd: int = 1024,
        kernel_size: int = 3,
        dropout: float = 0.1,
    ) -> None:
        self.clip_mapper = nn.Linear(clip_embd, c_cond)
        injected = [*inject_effnet, *reversed(inject_effnet)]
        self.effnet_mappers = nn.ModuleList(
            [nn.Conv2d(effnet_embd, c_cond, 1) if here else nn.Identity() for here in injected]
        )
        first = nn.Conv2d(c_in * patch_size**2, c_hidden[0], 1)
        self.embedding = nn.Sequential(nn.PixelUnshuffle(patch_size), first, ChannelNorm())

        def made(kind: str, level: int, skip: int) -> nn.Module:
            width = c_hidden[level]
            if kind == "C":
                return ResBlock(width, skip + (c_cond if inject_effnet[level] else 0), kernel_size)
            return TimeBlock(width, c_r) if kind == "T" else AttnBlock(width, c_cond, nhead[level])

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        deepest = len(c_hidden) - 1
        for k, width in enumerate(c_hidden):
            begin = [nn.Sequential(ChannelNorm(), nn.Conv2d(c_hidden[k - 1], width, 2, stride=2))] if k else []
            self.down_blocks.append(
                nn.ModuleList([*begin, *(made(kind, k, 0) for kind in level_config[k] * blocks[k])])
            )
        for k in range(deepest, -1, -1):
            kinds, width = level_config[k] * blocks[k], c_hidden[k]
            level = [made(kind, k, width if k < deepest and not j else 0) for j, kind in enumerate(kinds)]
            if k:
                level.append(nn.Sequential(ChannelNorm(), nn.ConvTranspose2d(width, c_hidden[k - 1], 2, stride=2)))
            self.up_blocks.append(nn.ModuleList(level))
        last = nn.Conv2d(c_hidden[0], 2 * c_out * patch_size**2, 1)
        self.clf = nn.Sequential(ChannelNorm(), last, nn.PixelShuffle(patch_size))

    def hear(self, picture: Tensor, text: Tensor, height: int, width: int) -> tuple[Tensor, list[Tensor | None]]:
        """What `forward` takes of the embedding of a picture (B, 16, h, w) and a text (B, T, E): once for a call.

        For latents of that height and width: the text (B, T, K), and for each level, down and up, channels or None.
        """
        said = self.clip_mapper(text)
        sides, sizes = (height // self.config.patch_size, width // self.config.patch_size), []
        for _ in self.down_blocks:
            sizes.append(sides)
            sides = sides[0] // 2, sides[1] // 2
        maps: list[Tensor | None] = []
        for mapper, size in zip(self.effnet_mappers, [*sizes, *reversed(sizes)], strict=True):
            if isinstance(mapper, nn.Identity):
                maps.append(None)
                continue
            shown = functional.interpolate(
                picture.float(), size=size, mode="bicubic", antialias=True, align_corners=True
            )
            maps.append(mapper(shown.to(picture.dtype)))
        return functional.layer_norm(said, said.shape[-1:], eps=1e-6), maps

    def forward(self, sample: Tensor, time: Tensor, text: Tensor, maps: Sequence[Tensor | None]) -> Tensor:
        """The noise in `sample` (B, C, H, W) at `time` (B,) in 0..1, with what `self.hear` gives."""
        times = [embedded(time, self.config.c_r)]
        x, kept, count = self.embedding(sample), list[Tensor](), len(self.down_blocks)
        for blocks, shown in zip(self.down_blocks, maps[:count], strict=True):
            for block in blocks:  # type: ignore[union-attr]
                x = walked(block, x, times, text, shown)
            kept.append(x)
        for k, (blocks, shown) in enumerate(zip(self.up_blocks, maps[count:], strict=True)):
            before = kept.pop()
            if x.shape[-2:] != before.shape[-2:]:  # odd sides were halved
                x = resized(x.float(), size=before.shape[-2:]).to(x.dtype)
            for j, block in enumerate(blocks):  # type: ignore[arg-type]
                parts = [before] if k and not j else []
                parts += [] if shown is None else [shown]
                x = walked(block, x, times, text, torch.cat(parts, 1) if parts else None)
        mean, share = self.clf(x).chunk(2, 1)
        return (sample - mean) / (share.sigmoid() * (1 - 2 * LEAST) + LEAST)
