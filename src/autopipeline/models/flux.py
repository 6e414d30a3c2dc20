"""The transformer of Flux (Black Forest Labs 2024): text and picture in two streams, then in one.

Shapes: B rows, T tokens of text, L tokens of the picture (2 x 2 latents each), D = heads x head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import Mask, RowWise, attend, masks
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal
from autopipeline.models.network import Network
from autopipeline.models.rotary import rotary, turn

TIME = 256
"""Width of the sinusoidal embeddings of time and guidance."""


class Modulation(nn.Module):
    """What the time says to a block: `count` vectors, such as a shift, a scale and a gate (Peebles & Xie 2022)."""

    def __init__(self, width: int, count: int, bias: bool = True) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width, bias=bias)

    def forward(self, time: Tensor) -> Tensor:
        """(B, D), activated, to (B, count, 1, D)."""
        return self.linear(time).unflatten(-1, (self.count, 1, -1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise (B, L, D) without weights of its own, then scale and shift by (B, 1, D)."""
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def within(x: Tensor) -> Tensor:
    """Kept within the range of float16; wider types need no care."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


class TanhLinear(nn.Module):
    """A linear layer and GELU by its tanh approximation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., inner)."""
        return functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(RowWise):
    """Four times as wide, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([TanhLinear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.net[2](self.net[0](x))


class StreamAttention(nn.Module):
    """Attention with normalised queries and keys and rotary places; `joint`: text has projections of its own."""

    def __init__(self, width: int, heads: int, joint: bool, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.joint = heads, joint
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads, eps=1e-6), nn.RMSNorm(width // heads, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        if joint:
            self.norm_added_q = nn.RMSNorm(width // heads, eps=1e-6)
            self.norm_added_k = nn.RMSNorm(width // heads, eps=1e-6)
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width, bias=bias) for _ in range(3))
            self.to_out = nn.ModuleList([nn.Linear(width, width, bias=bias)])
            self.to_add_out = nn.Linear(width, width, bias=bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, D / heads)

    def own(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the picture, or of the one stream."""
        return (
            self.norm_q(self._split(self.to_q(x))),
            self.norm_k(self._split(self.to_k(x))),
            self._split(self.to_v(x)),
        )

    def added(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the text."""
        return (
            self.norm_added_q(self._split(self.add_q_proj(text))),
            self.norm_added_k(self._split(self.add_k_proj(text))),
            self._split(self.add_v_proj(text)),
        )

    def mix(self, qkv: tuple[Tensor, Tensor, Tensor], table: Tensor, mask: Mask) -> Tensor:
        """Everything attends to everything: (B, L, D), not yet projected."""
        q, k, v = qkv
        return attend(turn(q, table), turn(k, table), v, mask).transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    """Text and picture, each with its own weights, meet in attention; `modulated`: the block reads the time itself."""

    def __init__(
        self,
        width: int,
        heads: int,
        modulated: bool = True,
        feed: Callable[[int], nn.Module] = FeedForward,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if modulated:
            self.norm1, self.norm1_context = Modulation(width, 6), Modulation(width, 6)
        self.attn = StreamAttention(width, heads, joint=True, bias=bias)
        self.ff, self.ff_context = feed(width), feed(width)

    def forward(
        self, image: Tensor, text: Tensor, time: Tensor, table: Tensor, mask: Mask = None
    ) -> tuple[Tensor, Tensor]:
        """Picture (B, L, D) and text (B, T, D), moved on."""
        return self.move(image, text, self.norm1(time), self.norm1_context(time), table, mask)

    def move(
        self, image: Tensor, text: Tensor, said: Tensor, said_text: Tensor, table: Tensor, mask: Mask = None
    ) -> tuple[Tensor, Tensor]:
        """The same with the modulations (B, 6, 1, D) of picture and text."""
        shift, scale, gate, *rest = said.unbind(1)
        shift_text, scale_text, gate_text, *rest_text = said_text.unbind(1)
        parts = self.attn.added(modulate(text, shift_text, scale_text)), self.attn.own(modulate(image, shift, scale))
        q, k, v = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
        mixed = self.attn.mix((q, k, v), table, mask)
        tokens = text.shape[1]
        image = _after(image, gate * self.attn.to_out[0](mixed[:, tokens:]), rest, self.ff)
        text = _after(text, gate_text * self.attn.to_add_out(mixed[:, :tokens]), rest_text, self.ff_context)
        return image, within(text)


def _after(x: Tensor, attended: Tensor, said: list[Tensor], feed: nn.Module) -> Tensor:
    """The residuals of attention and feed-forward."""
    shift, scale, gate = said
    x = x + attended
    return x + gate * feed(modulate(x, shift, scale))


class SingleBlock(nn.Module):
    """Text and picture in one sequence; attention and feed-forward side by side (Dehghani et al. 2023)."""

    def __init__(self, width: int, heads: int, modulated: bool = True, inner: int | None = None) -> None:
        super().__init__()
        if modulated:
            self.norm = Modulation(width, 3)
        self.attn = StreamAttention(width, heads, joint=False)
        self.proj_mlp = nn.Linear(width, inner or 4 * width)
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, time: Tensor, table: Tensor, mask: Mask = None) -> Tensor:
        """Text and picture (B, T + L, D), moved on."""
        return self.move(x, self.norm(time), table, mask)

    def move(self, x: Tensor, said: Tensor, table: Tensor, mask: Mask = None) -> Tensor:
        """The same with the modulation (B, 3, 1, D)."""
        shift, scale, gate = said.unbind(1)
        normed = modulate(x, shift, scale)
        mixed = self.attn.mix(self.attn.own(normed), table, mask)
        fed = self.activated(self.proj_mlp(normed))
        return within(x + gate * self.proj_out(torch.cat([mixed, fed], -1)))

    def activated(self, fed: Tensor) -> Tensor:
        """(..., inner) to (..., 4 D)."""
        return functional.gelu(fed, approximate="tanh")


class TimeTextEmbedding(nn.Module):
    """Time, guidance scale (where the network was distilled to take one) and pooled text as one vector."""

    def __init__(self, width: int, pooled: int, guidance: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME, width)
        self.guidance_embedder = TimestepEmbedding(TIME, width) if guidance else None
        self.text_embedder = TimestepEmbedding(pooled, width)

    def forward(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """(B, D), activated; `timestep` and `guidance` (B,) are multiplied by 1000 already."""
        said = self.timestep_embedder(self._waves(timestep).to(pooled.dtype))
        if self.guidance_embedder is not None:
            if guidance is None:
                raise ValueError("This network takes guidance, a scale for each row.")
            said = said + self.guidance_embedder(self._waves(guidance).to(pooled.dtype))
        return functional.silu(said + self.text_embedder(pooled))

    @staticmethod
    def _waves(x: Tensor) -> Tensor:
        return sinusoidal(x, TIME, cosine_first=True, shift=0)


class Streams(Network):
    """What Flux and its ControlNets share: embeddings and blocks."""

    def _build(
        self,
        in_channels: int,
        layers: tuple[int, int],
        heads: tuple[int, int],
        text: int,
        pooled: int,
        guidance: bool,
    ) -> int:
        """Make the parts; returns the width D."""
        width = heads[0] * heads[1]
        self.time_text_embed = TimeTextEmbedding(width, pooled, guidance)
        self.context_embedder = nn.Linear(text, width)
        self.x_embedder = nn.Linear(in_channels, width)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(width, heads[0]) for _ in range(layers[0])])
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(width, heads[0]) for _ in range(layers[1])])
        return width

    def rotary(self, places: Tensor) -> Tensor:
        """The table (..., head width / 2, 2) that `forward` takes, for places (..., 3): made once for a call."""
        return rotary(places, self.config.axes_dims_rope)

    def _time(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        scaled = None if guidance is None else guidance.to(pooled.dtype) * 1000
        return self.time_text_embed(timestep.to(pooled.dtype) * 1000, pooled, scaled)


STREAMS = ("transformer_blocks.attn", "single_transformer_blocks.attn")


def each_mask(
    network: Network, mask: Tensor | None, perturbed: Tensor | None, tokens: int
) -> tuple[list[Mask], list[Mask]]:
    """Masks for the blocks of two streams and of one, behind so many tokens of text."""
    names = list(network.self_attentions())
    made, doubles = masks(len(names), mask, perturbed, slice(tokens, None)), len(network.transformer_blocks)  # type: ignore[arg-type]
    return made[:doubles], made[doubles:]


class FluxTransformer2DModel(Streams):
    """Predicts the velocity of packed latents."""

    attentions = STREAMS

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
    ) -> None:
        width = self._build(
            in_channels,
            (num_layers, num_single_layers),
            (num_attention_heads, attention_head_dim),
            joint_attention_dim,
            pooled_projection_dim,
            guidance_embeds,
        )
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        rotary: Tensor,
        *,
        guidance: Tensor | None = None,
        residuals: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, L, C) of packed latents (B, L, C) at `timestep` (B,) in 0..1.

        With a text (B, T, J), its pooled form (B, P) and a table of places (B, T + L, ., 2) from `self.rotary`;
        `guidance` (B,) is the scale of a distilled network; `residuals` (B, L, D) come from a ControlNet: for the
        blocks of two streams and those of one, spread out to one each, or none at all. `perturbed`  (B, attentions):
        in which of them the tokens of a row's pictures see of these only themselves.
        """
        time = self._time(timestep, pooled_projections, guidance)
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        doubles, singles = residuals
        masks, single_masks = each_mask(self, None, perturbed, text.shape[1])
        for k, block in enumerate(self.transformer_blocks):
            image, text = block(image, text, time, rotary, masks[k])
            if doubles:
                image = image + doubles[k]
        tokens = text.shape[1]
        x = torch.cat([text, image], 1)
        for k, block in enumerate(self.single_transformer_blocks):
            x = block(x, time, rotary, single_masks[k])
            if singles:
                x = torch.cat([x[:, :tokens], x[:, tokens:] + singles[k]], 1)
        scale, shift = self.norm_out(time).unbind(1)
        return self.proj_out(modulate(x[:, tokens:], shift, scale))


def spread(residuals: Sequence[Tensor], blocks: int, repeat: bool) -> list[Tensor]:
    """One residual for each block: neighbours share one, or (`repeat`) they go round."""
    if not residuals:
        return []
    share = -(-blocks // len(residuals))
    return [residuals[k % len(residuals) if repeat else k // share] for k in range(blocks)]
