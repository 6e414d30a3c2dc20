"""The transformer of Ideogram 4 (Ideogram AI 2026): text and picture in one stream, modulated by the time.

Shapes: B rows, T tokens of text, L tokens of the picture (2 x 2 latents each), D = heads x head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import Mask, RowWise, attend, masks
from autopipeline.models.network import Network


def interleaved(places: Tensor, width: int, theta: float, sections: tuple[int, ...]) -> Tensor:
    """Cosines and sines (..., L, D / 2, 2) for places (..., L, 3): of three neighbouring channels each axis turns one.

    Channels beyond an axis' section turn with the first axis. The angles are computed in float32: so far away from the
    origin as pictures stand here, its rounding is part of what the networks learned.
    """
    channel = torch.arange(width // 2)
    axis = channel % 3
    axis = torch.where(channel < 3 * torch.tensor(sections)[axis], axis, 0)
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = places[..., axis].float() * frequencies
    return torch.stack([angles.cos(), angles.sin()], -1)


def turn_halves(x: Tensor, table: Tensor) -> Tensor:
    """Turn channels k and k + D / 2 of x (B, heads, L, D) as pairs, by a table (B, L, D / 2, 2)."""
    cos, sin = table[:, None].to(x.dtype).unbind(-1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Everything attends to everything; queries and keys are normalised head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-5) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, x: Tensor, table: Tensor, mask: Mask) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        rows = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.to_q, self.to_k, self.to_v))
        q, k, v = (each.transpose(1, 2) for each in rows)
        q, k = turn_halves(self.norm_q(q), table), turn_halves(self.norm_k(k), table)
        return self.to_out[0](attend(q, k, v, mask).transpose(1, 2).flatten(2))


class GatedFeedForward(RowWise):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, normalised before and after; the time scales what goes in and what comes out."""

    def __init__(self, width: int, inner: int, heads: int, eps: float, said: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = GatedFeedForward(width, inner)
        self.attention_norm1, self.ffn_norm1 = (nn.RMSNorm(width, eps=eps) for _ in range(2))
        self.attention_norm2, self.ffn_norm2 = (nn.RMSNorm(width, eps=eps) for _ in range(2))
        self.adaln_modulation = nn.Linear(said, 4 * width)

    def forward(self, x: Tensor, time: Tensor, table: Tensor, mask: Mask = None) -> Tensor:
        """(B, L, D), moved on, with the time as (B, 1, said)."""
        scale, gate, ff_scale, ff_gate = self.adaln_modulation(time).chunk(4, -1)
        mixed = self.attention(self.attention_norm1(x) * (1 + scale), table, mask)
        x = x + gate.tanh() * self.attention_norm2(mixed)
        fed = self.feed_forward(self.ffn_norm1(x) * (1 + ff_scale))
        return x + ff_gate.tanh() * self.ffn_norm2(fed)


class TimeEmbedding(nn.Module):
    """The time as sines and cosines (Vaswani et al. 2017), then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp_in, self.mlp_out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """(B,) in 0..1 to (B, D)."""
        half = self.width // 2
        steps = torch.arange(half, dtype=torch.float32, device=time.device)
        angles = 1e4 * time.float()[:, None] * torch.exp(steps * -(math.log(1e4) / (half - 1)))
        waves = functional.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, self.width % 2))
        return self.mlp_out(functional.silu(self.mlp_in(waves.to(time.dtype))))


class LastLayer(nn.Module):
    """From the stream to channels of latents."""

    def __init__(self, width: int, out: int, said: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaln_modulation = nn.Linear(said, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, L, D) to (B, L, out)."""
        scale = 1 + self.adaln_modulation(functional.silu(time))
        return self.linear(functional.layer_norm(x, x.shape[-1:], eps=1e-6) * scale)


class Ideogram4Transformer2DModel(Network):
    """Predicts the velocity of latents in patches, from noise towards the picture."""

    attentions = ("layers.attention",)

    def __init__(
        self,
        in_channels: int = 128,
        num_layers: int = 34,
        attention_head_dim: int = 256,
        num_attention_heads: int = 18,
        intermediate_size: int = 12288,
        adaln_dim: int = 512,
        llm_features_dim: int = 53248,
        rope_theta: int = 5_000_000,
        mrope_section: tuple[int, int, int] = (24, 20, 20),
        norm_eps: float = 1e-5,
    ) -> None:
        width = attention_head_dim * num_attention_heads
        self.input_proj = nn.Linear(in_channels, width)
        self.llm_cond_norm = nn.RMSNorm(llm_features_dim, eps=1e-6)
        self.llm_cond_proj = nn.Linear(llm_features_dim, width)
        self.t_embedding = TimeEmbedding(width)
        self.adaln_proj = nn.Linear(width, adaln_dim)
        self.embed_image_indicator = nn.Embedding(2, width)
        self.layers = nn.ModuleList(
            [Block(width, intermediate_size, num_attention_heads, norm_eps, adaln_dim) for _ in range(num_layers)]
        )
        self.final_layer = LastLayer(width, in_channels, adaln_dim)

    def rotary(self, places: Tensor) -> Tensor:
        """The table (..., head width / 2, 2) that `forward` takes, for places (..., 3): made once for a call."""
        config = self.config
        return interleaved(places, config.attention_head_dim, config.rope_theta, tuple(config.mrope_section))

    def forward(self, x: Tensor, time: Tensor, text: Tensor, table: Tensor, perturbed: Tensor | None = None) -> Tensor:
        """Velocity (B, L, C) of patches (B, L, C) at `time` (B,), 0 for noise and 1 for pictures.

        With a text (B, T, J), which may be of no tokens, and a table of places (B, T + L, ., 2) from `self.rotary`.
        `perturbed` (B, layers): in which of them the tokens of a row's picture see of it only themselves.
        """
        said = functional.silu(self.adaln_proj(self.t_embedding(time)[:, None]))
        words, picture = self.embed_image_indicator.weight
        stream = self.input_proj(x) + picture
        tokens = text.shape[1]
        if tokens:
            stream = torch.cat([self.llm_cond_proj(self.llm_cond_norm(text)) + words, stream], 1)
        for layer, mask in zip(self.layers, masks(len(self.layers), None, perturbed, slice(tokens, None)), strict=True):
            stream = layer(stream, said, table, mask)
        return self.final_layer(stream[:, tokens:], said)


class Ideogram4PromptEnhancerHead(Network):
    """What a text encoder lacks for writing; kept with the checkpoint, and never asked here."""

    def __init__(self, hidden_size: int = 4096, vocab_size: int = 151936) -> None:
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
