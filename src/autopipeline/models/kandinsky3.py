"""The U-Net of Kandinsky 3 (Arkhipkin et al. 2023): deep narrow blocks, T5's words, no skip within a level.

Shapes: B pictures, C channels, T tokens of text, E width of T5's states, J width of attended words, W of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import Mask, attend, masks
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal
from autopipeline.models.network import Network

ATTENDED = (False, True, True, True)
"""Levels, from the finest, whose places look at each other and at the words."""
UNSEEN = -10000.0
"""What the scores of words that do not count are lowered by."""
KERNELS = (1, 3, 3, 1)


class TimedNorm(nn.Module):
    """Group norm whose weights follow the time."""

    def __init__(self, groups: int, width: int, time: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, affine=False)
        self.context_mlp = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        scale, shift = self.context_mlp(time)[..., None, None].chunk(2, 1)
        return self.norm(x) * (1 + scale) + shift


class Convolution(nn.Module):
    """One layer of a block, which may double the sides before or halve them after."""

    def __init__(self, width: int, out: int, time: int, groups: int, kernel: int, scale: str) -> None:
        super().__init__()
        self.group_norm = TimedNorm(groups, width, time)
        self.up_sample = nn.ConvTranspose2d(width, width, 2, stride=2) if scale == "up" else nn.Identity()
        self.projection = nn.Conv2d(width, out, kernel, padding=kernel // 2)
        self.down_sample = nn.Conv2d(out, out, 2, stride=2) if scale == "down" else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, h, w)."""
        x = self.up_sample(functional.silu(self.group_norm(x, time)))
        return self.down_sample(self.projection(x))


class Residual(nn.Module):
    """Four layers, the inner ones half as wide, and a shortcut."""

    def __init__(self, width: int, out: int, time: int, groups: int, scale: str = "") -> None:
        super().__init__()
        inner = max(width, out) // 2
        scales = ("", "up" if scale == "up" else "", "down" if scale == "down" else "", "")
        shapes = zip(pairwise((width, inner, inner, inner, out)), KERNELS, scales, strict=True)
        self.resnet_blocks = nn.ModuleList(
            [Convolution(*ends, time, groups, kernel, each) for ends, kernel, each in shapes]
        )
        self.shortcut_up_sample = nn.ConvTranspose2d(width, width, 2, stride=2) if scale == "up" else nn.Identity()
        self.shortcut_projection = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        self.shortcut_down_sample = nn.Conv2d(out, out, 2, stride=2) if scale == "down" else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, h, w)."""
        y = x
        for layer in self.resnet_blocks:
            y = layer(y, time)
        return self.shortcut_down_sample(self.shortcut_projection(self.shortcut_up_sample(x))) + y


class Attention(nn.Module):
    """Attention with a bias on the scores."""

    def __init__(self, width: int, context: int, out: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.to_q, self.to_k, self.to_v = (nn.Linear(each, out, bias=False) for each in (width, context, context))
        self.to_out = nn.ModuleList([nn.Linear(out, out, bias=False)])

    def forward(self, x: Tensor, context: Tensor, bias: Mask) -> Tensor:
        """(B, L, width) and (B, T, context), whose scores are moved by (B, 1, 1, T), to (B, L, out)."""
        q, k, v = (
            project(rows).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for project, rows in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        mixed = attend(q, k, v, bias)
        return self.to_out[0](mixed.transpose(1, 2).flatten(2))


class Attending(nn.Module):
    """Attention to words, or among the places themselves, and a perceptron."""

    def __init__(self, width: int, time: int, context: int | None, groups: int, head: int) -> None:
        super().__init__()
        self.place = 0  # among the network's self-attentions, which number themselves
        self.in_norm, self.out_norm = TimedNorm(groups, width, time), TimedNorm(groups, width, time)
        self.attention = Attention(width, context or width, width, head)
        self.feed_forward = nn.Sequential(
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.SiLU(), nn.Conv2d(4 * width, width, 1, bias=False)
        )

    def forward(self, x: Tensor, time: Tensor, text: Tensor | None = None, bias: Mask = None) -> Tensor:
        """(B, C, H, W) to the same."""
        rows = self.in_norm(x, time).flatten(2).transpose(1, 2)
        rows = self.attention(rows, rows if text is None else text, bias)
        x = x + rows.transpose(1, 2).unflatten(2, tuple(x.shape[-2:]))
        return x + self.feed_forward(self.out_norm(x, time))


class Level(nn.Module):
    """The blocks of a level: each a pair of residual blocks with attention to the words between them.

    `widths`: channels of what enters each pair, of what is between its blocks, and of what leaves it. On the way up
    (`rising`) the first block doubles the sides, else the last one halves them, unless the level stays at its size.
    """

    def __init__(
        self,
        widths: Sequence[tuple[int, int, int]],
        time: int,
        context: int | None,
        groups: int,
        head: int,
        *,
        rising: bool,
        stays: bool,
    ) -> None:
        super().__init__()
        self.rising, last = rising, len(widths) - 1
        own = widths[-1][2] if rising else widths[0][0]
        attends = context is not None
        self.attentions = nn.ModuleList([Attending(own, time, None, groups, head) if attends else nn.Identity()])
        self.resnets_in, self.resnets_out = nn.ModuleList(), nn.ModuleList()
        for k, (first, between, out) in enumerate(widths):
            up, down = rising and not stays and k == 0, not (rising or stays) and k == last
            self.resnets_in.append(Residual(first, between, time, groups, "up" if up else ""))
            self.attentions.append(Attending(between, time, context, groups, head) if attends else nn.Identity())
            self.resnets_out.append(Residual(between, out, time, groups, "down" if down else ""))

    def forward(self, x: Tensor, time: Tensor, text: Tensor, bias: Tensor, perturbed: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, out, h, w); places look at each other first on the way down, last on the way up."""
        own, *words = self.attentions
        attends = isinstance(own, Attending)
        apart = perturbed[:, [own.place]] if perturbed is not None and attends else None
        mask = masks(1, None, apart, slice(None))[0]
        x = own(x, time, None, mask) if attends and not self.rising else x
        for begin, attention, end in zip(self.resnets_in, words, self.resnets_out, strict=True):
            x = begin(x, time)
            x = end(attention(x, time, text, bias) if attends else x, time)
        return own(x, time, None, mask) if attends and self.rising else x


class Words(nn.Module):
    """T5's states at the width that is attended to."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.projection_linear = nn.Linear(given, width, bias=False)
        self.projection_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) to (B, T, J)."""
        return self.projection_norm(self.projection_linear(x))


class Pooling(nn.Module):
    """What all words say together: their mean looks at each of them."""

    def __init__(self, out: int, width: int, head: int) -> None:
        super().__init__()
        self.attention = Attention(width, width, out, head)

    def forward(self, words: Tensor, bias: Tensor, counted: Tensor) -> Tensor:
        """(B, T, J), of which the first `counted` (B,) make the mean, to (B, W)."""
        inside = torch.arange(words.shape[1], device=words.device) < counted[:, None]
        mean = (words * inside[..., None]).sum(1, keepdim=True) / counted[:, None, None].to(words.dtype)
        return self.attention(mean, words, bias)[:, 0]


class Kandinsky3UNet(Network):
    """Predicts the noise in latents."""

    def __init__(
        self,
        in_channels: int = 4,
        time_embedding_dim: int = 1536,
        groups: int = 32,
        attention_head_dim: int = 64,
        layers_per_block: int = 3,
        block_out_channels: tuple[int, ...] = (384, 768, 1536, 3072),
        cross_attention_dim: int = 4096,
        encoder_hid_dim: int = 4096,
    ) -> None:
        time, count, first = time_embedding_dim, len(block_out_channels), block_out_channels[0] // 2
        self.time_embedding = TimestepEmbedding(first, time)
        self.add_time_condition = Pooling(time, cross_attention_dim, attention_head_dim)
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.encoder_hid_proj = Words(encoder_hid_dim, cross_attention_dim)
        context = [cross_attention_dim if attended else None for attended in ATTENDED]
        rest, ends = layers_per_block - 1, list(pairwise((first, *block_out_channels)))
        shape = groups, attention_head_dim
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for k, (width, out) in enumerate(ends):
            widths = [(width, out, out)] + [(out, out, out)] * rest
            self.down_blocks.append(Level(widths, time, context[k], *shape, rising=False, stays=k == count - 1))
        for k, (out, width) in enumerate(reversed(ends)):
            joined = width if k == 0 else 2 * width
            widths = [(joined, joined, width)] + [(width, width, width)] * (rest - 1) + [(width, width, out)]
            self.up_blocks.append(Level(widths, time, context[::-1][k], *shape, rising=True, stays=k == 0))
        self.conv_norm_out = nn.GroupNorm(groups, first)
        self.conv_out = nn.Conv2d(first, in_channels, 3, padding=1)
        for place, name in enumerate(self.self_attentions()):
            self.get_submodule(name.removesuffix(".attention")).place = place  # type: ignore[assignment]

    def self_attentions(self) -> list[str]:
        """Names of the attentions that `perturbed` has columns for, in their order."""
        levels = [(name, x) for name, x in self.named_modules() if isinstance(x, Level)]
        return [f"{name}.attentions.0.attention" for name, x in levels if isinstance(x.attentions[0], Attending)]

    def hear(self, states: Tensor, mask: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` takes of a text (B, T, E), whose tokens count where the mask (B, T) is 1: once for a call.

        Words (B, T, J), a bias on their scores (B, 1, 1, T), and all together (B, W); the first `counted` (B,) tokens
        are averaged, those that do not count too.
        """
        words, bias = self.encoder_hid_proj(states), (1 - mask.to(states.dtype))[:, None, None] * UNSEEN
        return words, bias, self.add_time_condition(words, bias, counted)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        words: Tensor,
        bias: Tensor,
        said: Tensor,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """The noise in `sample` (B, C, H, W) at `timestep` (B,), with what `self.hear` gives of a text.

        `perturbed` (B, self-attentions): in which of them the places of a row see only themselves.
        """
        waves = sinusoidal(timestep, self.conv_in.out_channels, cosine_first=False, shift=1)
        time = self.time_embedding(waves.to(sample.dtype)) + said
        x = self.conv_in(sample)
        kept: list[Tensor] = []
        for level in self.down_blocks:
            x = level(x, time, words, bias, perturbed)
            kept.append(x)
        kept.pop()
        for k, level in enumerate(self.up_blocks):
            x = level(x if k == 0 else torch.cat([x, kept.pop()], 1), time, words, bias, perturbed)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))
