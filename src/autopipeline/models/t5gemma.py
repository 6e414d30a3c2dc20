"""The encoder of T5Gemma (Zhang et al. 2025): Gemma 2 whose tokens see what comes after them as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autopipeline.config import Config
from autopipeline.errors import CheckpointError
from autopipeline.models.gemma2 import Attention, Norm, Perceptron, rotations
from autopipeline.models.network import Network

SHAPE: dict[str, Any] = dict(
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    rms_norm_eps=1e-6,
    attention_bias=False,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    attn_logit_softcapping=50.0,
    layer_types=None,
    rope_parameters=None,
)
"""What a configuration says of the encoder, where it says nothing else."""


class Layer(nn.Module):
    """Attention and perceptron, each with a norm before and after."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = Perceptron(width, config.intermediate_size)
        self.pre_self_attn_layernorm, self.post_self_attn_layernorm = Norm(width, eps), Norm(width, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = Norm(width, eps), Norm(width, eps)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        x = x + self.post_self_attn_layernorm(self.self_attn(self.pre_self_attn_layernorm(x), turns, seen))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class T5GemmaEncoder(Network):
    """The encoder alone; every second layer sees only the nearest tokens."""

    library = "transformers"

    def __init__(self, encoder: Mapping[str, Any] | None = None) -> None:
        shape = Config(SHAPE | dict(self.config if encoder is None else encoder))  # its own, or that of a whole model
        rope = shape.rope_parameters or {}
        if shape.hidden_activation != "gelu_pytorch_tanh" or rope.get("rope_type", "default") != "default":
            raise CheckpointError("A T5Gemma of another activation or other rotary positions is not supported.")
        self.shape = shape
        self.theta = rope.get("rope_theta", shape.get("rope_theta", 10000.0))
        kinds = shape.layer_types or ["sliding_attention", "full_attention"] * shape.num_hidden_layers
        self.slides = [kind == "sliding_attention" for kind in kinds[: shape.num_hidden_layers]]
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList([Layer(shape) for _ in self.slides])
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode token ids (B, L) to (B, L, D), after the final norm; where the mask (B, L) is 0 nobody looks."""
        x = self.embed_tokens(ids)
        x = x * torch.tensor(self.shape.hidden_size**0.5, dtype=x.dtype)
        places = torch.arange(ids.shape[1], device=ids.device)
        every = (mask[:, None, None] > 0).expand(-1, 1, len(places), -1)
        near = every & ((places[:, None] - places).abs() <= self.shape.sliding_window)
        turns = rotations(places, self.shape.head_dim, self.theta, x.dtype)
        for layer, slides in zip(self.layers, self.slides, strict=True):
            x = layer(x, turns, near if slides else every)
        return self.norm(x)

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """Whole models have a decoder and a head, and names before the rest."""
        key = key.removeprefix("model.")
        return None if key.startswith(("decoder.", "lm_head.")) else key.removeprefix("encoder.")
