"""The transformer of Qwen-Image (Wu et al. 2025): text and picture in two streams all the way.

Shapes: B rows, T tokens of text, L tokens of the picture (2 x 2 latents each), M of reference pictures, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import Mask, masks
from autopipeline.models.controlnet import MultiControlNetModel
from autopipeline.models.embeddings import TimestepEmbedding
from autopipeline.models.flux import FeedForward, Modulation, StreamAttention, modulate, within
from autopipeline.models.flux_controlnet import Corrections
from autopipeline.models.network import Network
from autopipeline.models.rotary import centred_places, rotary

TIME = 256
"""Width of the sinusoidal embedding of time."""


class TimeEmbedding(nn.Module):
    """Time as a vector; `kinds`: plus one for which of two kinds of output is wanted."""

    def __init__(self, width: int, kinds: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME, width)
        self.addition_t_embedding = nn.Embedding(2, width) if kinds else None

    def forward(self, timestep: Tensor, kind: Tensor | None = None) -> Tensor:
        """(B,) in 0..1, in the network's precision, to (B, D)."""
        falling = torch.arange(TIME // 2, dtype=torch.float32, device=timestep.device) / (TIME // 2)
        frequencies = torch.exp(-math.log(10000.0) * falling).to(timestep.dtype)  # rounded so in training, too
        angles = 1000 * (timestep[:, None].float() * frequencies)
        time = self.timestep_embedder(torch.cat([angles.cos(), angles.sin()], -1).to(timestep.dtype))
        if self.addition_t_embedding is None:
            return time
        if kind is None:
            raise ValueError("This network takes kind, 0 or 1 for each row.")
        return time + self.addition_t_embedding(kind).to(time)


class Said(nn.Sequential):
    """What the time says to one stream of a block: shift, scale and gate for attention, and the same for the rest."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) to (B, 6, 1, D)."""
        return super().forward(input).unflatten(-1, (6, 1, -1))


class Block(nn.Module):
    """Text and picture, each with its own weights, meet in attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = Said(width), Said(width)
        self.attn = StreamAttention(width, heads, joint=True)
        self.img_mlp, self.txt_mlp = FeedForward(width), FeedForward(width)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        time: Tensor,
        table: Tensor,
        mask: Mask = None,
        clean: Tensor | None = None,
        own: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Picture (B, L, D) and text (B, T, D), moved on; tokens after the `own` first ones hear the time `clean`."""
        said, heard = self.img_mod(time), self.txt_mod(time)
        if clean is not None:
            rest = image.shape[1] - own
            said = torch.cat([said.expand(-1, -1, own, -1), self.img_mod(clean).expand(-1, -1, rest, -1)], 2)
        image_gates, text_gates = said[:, 2::3], heard[:, 2::3]
        parts = (
            self.attn.added(modulate(text, heard[:, 0], heard[:, 1])),
            self.attn.own(modulate(image, said[:, 0], said[:, 1])),
        )
        q, k, v = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
        mixed = self.attn.mix((q, k, v), table, mask)
        tokens = text.shape[1]
        image = image + image_gates[:, 0] * self.attn.to_out[0](mixed[:, tokens:])
        text = text + text_gates[:, 0] * self.attn.to_add_out(mixed[:, :tokens])
        image = image + image_gates[:, 1] * self.img_mlp(modulate(image, said[:, 3], said[:, 4]))
        text = text + text_gates[:, 1] * self.txt_mlp(modulate(text, heard[:, 3], heard[:, 4]))
        return within(image), within(text)


class Streams(Network):
    """What the transformer and its ControlNets share: embeddings and blocks."""

    def _build(self, channels: int, layers: int, heads: tuple[int, int], text: int, kinds: bool = False) -> int:
        """Make the parts; returns the width D."""
        width = heads[0] * heads[1]
        self.time_text_embed = TimeEmbedding(width, kinds)
        self.txt_norm = nn.RMSNorm(text, eps=1e-6)
        self.img_in, self.txt_in = nn.Linear(channels, width), nn.Linear(text, width)
        self.transformer_blocks = nn.ModuleList([Block(width, heads[0]) for _ in range(layers)])
        return width

    def rotary(self, tokens: int, *grids: tuple[int, int]) -> Tensor:
        """The table (T + L + M, head width / 2, 2) that `forward` takes: made once for a call."""
        layered = bool(self.config.get("use_layer3d_rope"))
        return rotary(places(tokens, *grids, layered=layered), self.config.axes_dims_rope)


class QwenImageControlNetModel(Streams):
    """Residuals for a transformer, from packed latents of a picture."""

    sees_pixels = False

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        extra_condition_channels: int = 0,
    ) -> None:
        width = self._build(in_channels, num_layers, (num_attention_heads, attention_head_dim), joint_attention_dim)
        self.controlnet_blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(num_layers)])
        self.controlnet_x_embedder = nn.Linear(in_channels + extra_condition_channels, width)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        rotary: Tensor,
        *,
        controlnet_cond: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> Corrections:
        """Residuals after each block, unscaled; inputs as the transformer's, `controlnet_cond` (B, L, C)."""
        time = self.time_text_embed(timestep.to(hidden_states.dtype))
        image = self.img_in(hidden_states) + self.controlnet_x_embedder(controlnet_cond)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        mask = joint_mask(encoder_hidden_states_mask, image.shape[1])
        made: list[Tensor] = []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            image, text = block(image, text, time, rotary, mask)
            made.append(out(image))
        return Corrections(made, [])


class QwenImageMultiControlNetModel(MultiControlNetModel):
    """Several ControlNets for one transformer, or one for several pictures."""

    member = QwenImageControlNetModel


def places(tokens: int, *grids: tuple[int, int], layered: bool = False) -> Tensor:
    """Places (T + L + M, 3) of text and pictures: the middles of pictures stand at 0, texts where the largest ends.

    Pictures stand one after the other; `layered`: the last one before all, and texts at least after the others.
    """
    edge, last = max(side // 2 for grid in grids for side in grid), len(grids) - 1
    edge = max(edge, last) if layered else edge
    found = [torch.arange(edge, edge + tokens)[:, None].expand(-1, 3)]
    for k, (height, width) in enumerate(grids):
        found.append(centred_places(height, width, -1 if layered and k == last else k))
    return torch.cat(found)


def joint_mask(mask: Tensor | None, tokens: int) -> Tensor | None:
    """A mask (B, T) of text that counts, widened to so many tokens of pictures, which all count: (B, 1, 1, T + L)."""
    return None if mask is None else functional.pad(mask.bool(), (0, tokens), value=True)[:, None, None]


class QwenImageTransformer2DModel(Streams):
    """Predicts the velocity of packed latents."""

    attentions = ("transformer_blocks.attn",)

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ) -> None:
        if guidance_embeds:
            raise CheckpointError("A QwenImageTransformer2DModel with guidance_embeds is not supported.")
        heads = num_attention_heads, attention_head_dim
        width = self._build(in_channels, num_layers, heads, joint_attention_dim, use_additional_t_cond)
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        rotary: Tensor,
        *,
        encoder_hidden_states_mask: Tensor | None = None,
        reference: Tensor | None = None,
        residuals: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
        kind: Tensor | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, L, C) of packed latents (B, L, C) at `timestep` (B,) in 0..1.

        With a text (B, T, J) and a table of places (B, T + L + M, ., 2) from `self.rotary`; the mask (B, T) is 0 for
        padding. `reference` (B, M, C): packed latents of pictures to look at. `residuals` (B, L, D) come from a
        ControlNet: one for each block, or none; there are no blocks of a single stream. `perturbed` (B, blocks): in
        which of them the tokens of a row's pictures see of these only themselves.
        """
        timestep, own = timestep.to(hidden_states.dtype), hidden_states.shape[1]
        time = self.time_text_embed(timestep, kind)
        looked_at = reference is not None and self.config.zero_cond_t
        clean = self.time_text_embed(torch.zeros_like(timestep), kind) if looked_at else None
        image = self.img_in(hidden_states if reference is None else torch.cat([hidden_states, reference], 1))
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        mask = joint_mask(encoder_hidden_states_mask, image.shape[1])
        each = masks(len(self.transformer_blocks), mask, perturbed, slice(text.shape[1], None))
        for k, block in enumerate(self.transformer_blocks):
            image, text = block(image, text, time, rotary, each[k], clean, own)
            if residuals[0]:
                image = image + residuals[0][k]
        scale, shift = self.norm_out(functional.silu(time)).unbind(1)
        return self.proj_out(modulate(image[:, :own], shift, scale))
