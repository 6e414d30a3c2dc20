"""The transformers of CogView3-Plus (Zheng et al. 2024), CogView4 (Z.ai 2025) and GLM-Image (Z.ai 2026): text and
picture in two streams that share their weights, and differ in what time and sizes say to them.

Shapes: R rows, N tokens of the picture, T tokens of text, D = heads x head width, E width of what time and sizes say.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import Mask, attend, masks
from autopipeline.models.embeddings import TimestepEmbedding, plane_sinusoids, sinusoidal
from autopipeline.models.flux import within
from autopipeline.models.network import Network
from autopipeline.models.rotary import rotary, turn_halves
from autopipeline.models.sd3 import Perceptron

Split = Sequence[Tensor]


def normal(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm without weights."""
    return functional.layer_norm(x, x.shape[-1:], eps=eps)


class Squares(nn.Module):
    """Squares of x, and text, as tokens of one width."""

    def __init__(self, channels: int, width: int, patch: int, text: int | None = None) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch**2, width)
        if text is not None:
            self.text_proj = nn.Linear(text, width)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, h, w) to (R, N, D)."""
        squares = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # (R, C, rows, p, columns, p)
        return self.proj(squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))


class TimeAndSizes(nn.Module):
    """Time, and the sizes that a picture had, as one vector."""

    def __init__(self, width: int, time: int, numbers: int, told: int = 6) -> None:
        super().__init__()
        self.width = width
        self.timestep_embedder = TimestepEmbedding(width, time)
        self.condition_embedder = TimestepEmbedding(told * numbers, time)

    def forward(self, t: Tensor, sizes: Tensor) -> Tensor:
        """(R,) and (R, E) to (R, E), activated."""
        waves = sinusoidal(t, self.width, cosine_first=True, shift=0).to(sizes.dtype)
        return functional.silu(self.timestep_embedder(waves) + sizes)


class Modulation(nn.Module):
    """Vectors for shifting, scaling and gating (Peebles & Xie 2023, adaLN)."""

    def __init__(self, time: int, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(time, count * width)

    def forward(self, emb: Tensor) -> Split:
        """(R, E) to `count` vectors (R, 1, D)."""
        return self.linear(emb)[:, None].chunk(self.count, -1)


class Memory:
    """Keys and values of other pictures in one block, (P, heads, S, D / heads): being gathered, or recalled."""

    def __init__(self) -> None:
        self.gathering = True
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @classmethod
    def of(cls, gathered: Sequence[Memory], times: int) -> Memory:
        """Those of several prompts as one to recall, each for so many rows."""
        one = cls()
        one.gathering = False
        for own, kind in ((one.keys, "keys"), (one.values, "values")):
            rows = torch.cat([torch.cat(getattr(each, kind), 2) for each in gathered])
            own.append(rows.repeat_interleave(times, 0))
        return one

    def met(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens' own, (R, heads, L, D / heads); when recalling, after those of the pictures of each row."""
        if self.gathering:
            self.keys.append(k)
            self.values.append(v)
            return k, v
        return tuple(torch.cat([*known, own], 2) for known, own in ((self.keys, k), (self.values, v)))  # type: ignore[return-value]


class JointAttention(nn.Module):
    """Text and picture attend to each other, queries and keys normed; places may turn those of the picture."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, rows: Tensor, table: Tensor | None, memory: Memory | None = None, mask: Mask = None) -> Tensor:
        """(R, T + N, D) to the same; `table` (R, N, D / heads / 2, 2)."""
        q, k, v = (
            project(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        q, k = normal(q, self.eps), normal(k, self.eps)
        if table is not None:
            before = q.shape[2] - table.shape[1]
            q, k = (torch.cat([x[:, :, :before], turn_halves(x[:, :, before:], table)], 2) for x in (q, k))
        if memory is not None:
            k, v = memory.met(k, v)
        return self.to_out[0](attend(q, k, v, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block over text and picture; `in_turns`: its vectors stand in turn for the picture and for the text."""

    def __init__(self, width: int, heads: int, time: int, *, eps: float, in_turns: bool) -> None:
        super().__init__()
        self.in_turns = in_turns
        self.norm1 = Modulation(time, width, 12)
        self.attn1 = JointAttention(width, heads, eps)
        self.ff = Perceptron(width)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        emb: Tensor,
        table: Tensor | None,
        memory: Memory | None = None,
        mask: Mask = None,
    ) -> tuple[Tensor, Tensor]:
        """(R, N, D), (R, T, D) and (R, E) to the next tokens of the picture and of the text."""
        all_of_them, count = self.norm1(emb), text.shape[1]
        mine, its = (all_of_them[::2], all_of_them[1::2]) if self.in_turns else (all_of_them[:6], all_of_them[6:])
        mixed = self.attn1(torch.cat([moved(text, its[:2]), moved(image, mine[:2])], 1), table, memory, mask)
        text, image = text + its[2] * mixed[:, :count], image + mine[2] * mixed[:, count:]
        fed = self.ff(torch.cat([moved(text, its[3:5]), moved(image, mine[3:5])], 1))
        return within(image + mine[5] * fed[:, count:]), within(text + its[5] * fed[:, :count])


def moved(x: Tensor, vectors: Split) -> Tensor:
    """Normalised, then scaled and shifted."""
    shift, scale = vectors
    return normal(x) * (1 + scale) + shift


class CogView(Network):
    """What both have; a class without a build of its own."""

    attentions = ("transformer_blocks.attn1",)

    patch_embed: Squares
    time_condition_embed: TimeAndSizes
    norm_out: Modulation
    proj_out: nn.Linear
    transformer_blocks: nn.ModuleList
    eps: float
    """Of the norms of queries, keys and the last tokens; of the others, it is 1e-5 in both."""

    def _build(self, *, in_turns: bool) -> None:
        c = self.config
        width, heads, time = c.num_attention_heads * c.attention_head_dim, c.num_attention_heads, c.time_embed_dim
        self.patch_embed = Squares(c.in_channels, width, c.patch_size, c.text_embed_dim)
        self.time_condition_embed = TimeAndSizes(width, time, c.condition_dim)
        blocks = [Block(width, heads, time, eps=self.eps, in_turns=in_turns) for _ in range(c.num_layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = Modulation(time, width, 2)
        self.proj_out = nn.Linear(width, c.patch_size**2 * c.out_channels)

    def sizes(self, numbers: Tensor) -> Tensor:
        """What six numbers (R, 6) say, (R, E): original height and width, crops from the top and left, size made."""
        waves = sinusoidal(numbers.flatten(), self.config.condition_dim, cosine_first=True, shift=0)
        told = waves.unflatten(0, numbers.shape).flatten(1).to(self.device, self.dtype)
        return self.time_condition_embed.condition_embedder(told)

    def _walked(
        self,
        tokens: Tensor,
        t: Tensor,
        text: Tensor,
        sizes: Tensor,
        table: Tensor | None,
        memories: Sequence[Memory] | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """Tokens (R, N, D), with a text (R, T, D), through all blocks, to (R, N, p * p * C).

        `perturbed` (R, blocks): in which of them the picture's tokens see of it only themselves.
        """
        emb = self.time_condition_embed(t, sizes)
        each = masks(len(self.transformer_blocks), None, perturbed, slice(-tokens.shape[1], None))
        for block, memory, mask in zip(self.transformer_blocks, memories or cycle([None]), each, strict=False):
            tokens, text = block(tokens, text, emb, table, memory, mask)
        scale, shift = self.norm_out(emb)
        return self.proj_out(normal(tokens, self.eps) * (1 + scale) + shift)

    def _picture(self, made: Tensor, height: int, width: int) -> Tensor:
        patch = self.config.patch_size
        squares = made.unflatten(2, (-1, patch, patch)).unflatten(1, (height // patch, width // patch))
        return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class CogView3PlusTransformer2DModel(CogView):
    """The transformer of CogView3-Plus, which is told places as sines and cosines beside the tokens."""

    eps = 1e-6

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 30,
        attention_head_dim: int = 40,
        num_attention_heads: int = 64,
        out_channels: int = 16,
        text_embed_dim: int = 4096,
        time_embed_dim: int = 512,
        condition_dim: int = 256,
        pos_embed_max_size: int = 128,
        sample_size: int = 128,
    ) -> None:
        self._build(in_turns=False)

    def places(self, height: int, width: int) -> Tensor:
        """What tells the places of latents of this size, (1, N, D)."""
        c = self.config
        rows, columns, side = height // c.patch_size, width // c.patch_size, c.pos_embed_max_size
        if max(rows, columns) > side:
            raise ValueError(
                f"This network knows places in a grid of {side} x {side} patches; the picture has {rows} x {columns}."
            )
        table = plane_sinusoids(c.num_attention_heads * c.attention_head_dim, torch.arange(rows), torch.arange(columns))
        return table[None].to(self.device, self.dtype)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        encoder_hidden_states: Tensor,
        sizes: Tensor,
        places: Tensor,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """The prediction at x.

        Args:
            x: latents (R, C, h, w).
            t: times (R,), steps of training.
            encoder_hidden_states: text (R, T, text_embed_dim).
            sizes: what `sizes` gives, (R, E).
            places: what `places` gives, (R, N, D).
            perturbed: (R, blocks), in which of them the tokens of a row's picture see of it only themselves.
        """
        text = self.patch_embed.text_proj(encoder_hidden_states)
        made = self._walked(self.patch_embed(x) + places, t, text, sizes, None, perturbed=perturbed)
        return self._picture(made, *x.shape[-2:])


class CogView4Transformer2DModel(CogView):
    """The transformer of CogView4, in which places turn queries and keys."""

    eps = 1e-5

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int = 16,
        num_layers: int = 30,
        attention_head_dim: int = 40,
        num_attention_heads: int = 64,
        text_embed_dim: int = 4096,
        time_embed_dim: int = 512,
        condition_dim: int = 256,
        pos_embed_max_size: int = 128,
        sample_size: int = 128,
        rope_axes_dim: tuple[int, int] = (256, 256),
    ) -> None:
        self._build(in_turns=True)

    def places(self, height: int, width: int) -> Tensor:
        """Cosines and sines (1, N, D / heads / 2, 2) for latents of this size, which any grid is stretched to."""
        c = self.config
        sides = [side // c.patch_size for side in (height, width)]
        steps = [torch.arange(n) * most // n for n, most in zip(sides, c.rope_axes_dim, strict=True)]
        grid = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1).flatten(0, 1)  # (N, 2)
        return rotary(grid, [c.attention_head_dim // 2] * 2)[None].to(self.device)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        encoder_hidden_states: Tensor,
        sizes: Tensor,
        places: Tensor,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """The velocity at x.

        Args:
            x: latents (R, C, h, w).
            t: times (R,), 0..1000.
            encoder_hidden_states: text (R, T, text_embed_dim).
            sizes: what `sizes` gives, (R, E).
            places: what `places` gives, (R, N, D / heads / 2, 2).
            perturbed: (R, blocks), in which of them the tokens of a row's picture see of it only themselves.
        """
        text = self.patch_embed.text_proj(encoder_hidden_states)
        made = self._walked(self.patch_embed(x), t, text, sizes, places, perturbed=perturbed)
        return self._picture(made, *x.shape[-2:])
