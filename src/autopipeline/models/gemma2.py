"""Gemma (Mesnard et al. 2024) and Gemma 2 (Riviere et al. 2024) as encoders of texts: what they know of each token.

Shapes: B texts, L tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.network import Network

APPROXIMATIONS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}
"""Of the perceptron's function, by its name in a config."""


class Norm(nn.Module):
    """Root-mean-square norm in float32 whose weights count from 1."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return functional.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Several heads of queries share one of keys and values; with Gemma 2 no score leaves -cap..cap."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.size, self.cap = config.head_dim, config.get("attn_logit_softcapping")
        self.scale = (config.get("query_pre_attn_scalar") or self.size) ** -0.5
        width, bias = config.hidden_size, config.attention_bias
        heads, shared = config.num_attention_heads * self.size, config.num_key_value_heads * self.size
        self.q_proj = nn.Linear(width, heads, bias=bias)
        self.k_proj = nn.Linear(width, shared, bias=bias)
        self.v_proj = nn.Linear(width, shared, bias=bias)
        self.o_proj = nn.Linear(heads, width, bias=bias)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        """(B, L, D), cosines and sines (L, size / 2), and what each token sees (B, 1, L, L) to (B, L, D)."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        times = q.shape[1] // k.shape[1]
        q, k, v = turned(q, *turns), turned(k, *turns).repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        scores = q @ k.transpose(-1, -2) * self.scale  # (B, H, L, L)
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
        return self.o_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), channel k together with the one half the width away."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotations(places: Tensor, size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, size / 2) for places (L,)."""
    rates = theta ** -(torch.arange(0, size, 2, device=places.device).float() / size)
    angles = places[:, None].float() * rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Perceptron(nn.Module):
    """A wide layer with a gate, and back."""

    def __init__(self, width: int, inner: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.down_proj(functional.gelu(self.gate_proj(x), approximate=self.approximate) * self.up_proj(x))


class PlainLayer(nn.Module):
    """Gemma's: attention and perceptron, each with a norm before."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = Perceptron(width, config.intermediate_size, APPROXIMATIONS[config.hidden_act])
        self.input_layernorm, self.post_attention_layernorm = Norm(width, eps), Norm(width, eps)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        x = x + self.self_attn(self.input_layernorm(x), turns, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Layer(nn.Module):
    """Gemma 2's: attention and perceptron, each with a norm before and after."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = Perceptron(width, config.intermediate_size)
        self.input_layernorm, self.post_attention_layernorm = Norm(width, eps), Norm(width, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = Norm(width, eps), Norm(width, eps)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), turns, seen))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Decoder(Network):
    """What both share: a language model without its head."""

    library = "transformers"

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: Norm

    def forward(self, ids: Tensor, mask: Tensor, skip: int = 0) -> Tensor:
        """Encode token ids (B, L) to (B, L, D), after the final norm; where the mask (B, L) is 0 nobody looks.

        `skip` leaves out so many of the last layers, and the norm with them.
        """
        x = self.embed_tokens(ids)
        x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        places = torch.arange(ids.shape[1], device=ids.device)
        back = places[:, None] - places
        every = (back >= 0) & (mask[:, None, None] > 0)
        near = every & (back < self.config.get("sliding_window", len(places)))
        theta = (self.config.rope_parameters or {}).get("rope_theta", self.config.rope_theta)
        turns = rotations(places, self.config.head_dim, theta, x.dtype)
        for k, layer in enumerate(self.layers[: len(self.layers) - skip]):
            x = layer(x, turns, near if self._slides(k) else every)
        return x if skip else self.norm(x)

    def _slides(self, k: int) -> bool:
        kinds = self.config.get("layer_types")
        return k % 2 == 0 if kinds is None else kinds[k] == "sliding_attention"

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """Whole language models have a head, and a name before the rest."""
        return None if key.startswith("lm_head.") else key.removeprefix("model.")


class GemmaModel(Decoder):
    """Gemma without its head."""

    def __init__(
        self,
        vocab_size: int = 256000,
        hidden_size: int = 3072,
        intermediate_size: int = 24576,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 16,
        head_dim: int = 256,
        hidden_act: str = "gelu_pytorch_tanh",
        rms_norm_eps: float = 1e-6,
        attention_bias: bool = False,
        rope_theta: float = 10000.0,
        rope_parameters: dict[str, Any] | None = None,
        use_bidirectional_attention: bool | None = None,
    ) -> None:
        kind = (rope_parameters or {}).get("rope_type", "default")
        if hidden_act not in APPROXIMATIONS or kind != "default" or use_bidirectional_attention:
            raise CheckpointError(
                f"Gemma with hidden_act={hidden_act!r}, rope_type={kind!r} and "
                f"use_bidirectional_attention={use_bidirectional_attention} is not supported."
            )
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList([PlainLayer(self.config) for _ in range(num_hidden_layers)])
        self.norm = Norm(hidden_size, rms_norm_eps)


class Gemma2Model(Decoder):
    """Gemma 2 without its head; every second layer sees only the nearest tokens."""

    def __init__(
        self,
        vocab_size: int = 256000,
        hidden_size: int = 2304,
        intermediate_size: int = 9216,
        num_hidden_layers: int = 26,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 4,
        head_dim: int = 256,
        hidden_activation: str = "gelu_pytorch_tanh",
        rms_norm_eps: float = 1e-6,
        attention_bias: bool = False,
        query_pre_attn_scalar: float = 256,
        sliding_window: int = 4096,
        attn_logit_softcapping: float | None = 50.0,
        layer_types: tuple[str, ...] | None = None,
        rope_theta: float = 10000.0,
        rope_parameters: dict[str, Any] | None = None,
    ) -> None:
        kind = (rope_parameters or {}).get("rope_type", "default")
        if hidden_activation != "gelu_pytorch_tanh" or kind != "default":
            what = f"hidden_activation={hidden_activation!r}" if kind == "default" else f"rope_type={kind!r}"
            raise CheckpointError(f"Gemma 2 with {what} is not supported.")
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList([Layer(self.config) for _ in range(num_hidden_layers)])
        self.norm = Norm(hidden_size, rms_norm_eps)
