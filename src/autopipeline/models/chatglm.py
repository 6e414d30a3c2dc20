"""ChatGLM3 (GLM team 2024) as Kolors' encoder of texts: what it knows of each token, and of the text as a whole.

Shapes: B texts, L tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.network import Network
from autopipeline.models.rotary import rotary, turn


class Encoded(NamedTuple):
    """A text, before the final norm."""

    tokens: Tensor  # (B, L, D), of the last layer but one
    last: Tensor  # (B, D), of the last layer, at the last token


class Norm(nn.Module):
    """Root-mean-square norm in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def norm(config: Any) -> nn.Module:
    """The kind of norm that a configuration asks for."""
    return (Norm if config.rmsnorm else nn.LayerNorm)(config.hidden_size, eps=config.layernorm_epsilon)


class Attention(nn.Module):
    """Several heads of queries share one of keys and values; the first half of each head's channels turns."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.size, self.heads = config.kv_channels, config.num_attention_heads
        self.shared = config.multi_query_group_num if config.multi_query_attention else None
        width, bias = config.hidden_size, config.add_bias_linear or config.add_qkv_bias
        mixed = (self.heads + 2 * (self.shared or self.heads)) * self.size
        self.query_key_value = nn.Linear(width, mixed, bias=bias)
        self.dense = nn.Linear(self.heads * self.size, width, bias=config.add_bias_linear)

    def forward(self, x: Tensor, turns: Tensor, seen: Tensor) -> Tensor:
        """(B, L, D), a table of turns (B, L, size / 4, 2), what each token sees (B, 1, L, L) to (B, L, D)."""
        mixed = self.query_key_value(x)
        if self.shared is None:  # q, k and v side by side in each head
            q, k, v = mixed.unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, -1)
        else:
            heads = mixed.unflatten(-1, (-1, self.size)).transpose(1, 2)
            q, k, v = heads.split([self.heads, self.shared, self.shared], 1)
        times = q.shape[1] // k.shape[1]
        q, k = turned(q, turns), turned(k, turns)
        k, v = (part.repeat_interleave(times, 1) for part in (k, v))
        x = functional.scaled_dot_product_attention(q, k, v, seen)
        return self.dense(x.transpose(1, 2).flatten(2))


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions for as many channels of x (B, H, L, size) as there are turns for."""
    count = 2 * turns.shape[-2]
    return torch.cat([turn(x[..., :count], turns), x[..., count:]], -1)


class Perceptron(nn.Module):
    """A wide layer with a gate, and back."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(width, 2 * inner, bias=bias)
        self.dense_4h_to_h = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        gate, value = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(functional.silu(gate) * value)


class Layer(nn.Module):
    """Attention and perceptron, each with a norm before; some configurations add to the normed x."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.normed = config.apply_residual_connection_post_layernorm
        self.input_layernorm = norm(config)
        self.self_attention = Attention(config)
        self.post_attention_layernorm = norm(config)
        self.mlp = Perceptron(config)

    def forward(self, x: Tensor, turns: Tensor, seen: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        y = self.input_layernorm(x)
        x = (y if self.normed else x) + self.self_attention(y, turns, seen)
        y = self.post_attention_layernorm(x)
        return (y if self.normed else x) + self.mlp(y)


class ChatGLMModel(Network):
    """The language model; its head and its final norm are there only to be saved again."""

    library = "transformers"

    def __init__(
        self,
        num_layers: int = 28,
        padded_vocab_size: int = 65024,
        hidden_size: int = 4096,
        ffn_hidden_size: int = 13696,
        kv_channels: int = 128,
        num_attention_heads: int = 32,
        seq_length: int = 2048,
        layernorm_epsilon: float = 1e-5,
        rmsnorm: bool = True,
        apply_residual_connection_post_layernorm: bool = False,
        post_layer_norm: bool = True,
        add_bias_linear: bool = False,
        add_qkv_bias: bool = False,
        multi_query_attention: bool = False,
        multi_query_group_num: int = 1,
        original_rope: bool = True,  # of no effect, but expected in saved configurations
        pre_seq_len: int | None = None,
    ) -> None:
        if pre_seq_len is not None or num_layers < 1:
            raise CheckpointError(f"ChatGLM with {pre_seq_len=} and {num_layers=} is not supported.")
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(padded_vocab_size, hidden_size)})
        parts: dict[str, nn.Module] = {"layers": nn.ModuleList([Layer(self.config) for _ in range(num_layers)])}
        if post_layer_norm:
            parts["final_layernorm"] = norm(self.config)
        self.encoder = nn.ModuleDict(parts)
        self.output_layer = nn.Linear(hidden_size, padded_vocab_size, bias=False)
        rates = 10000.0 ** -(torch.arange(0, kv_channels // 2, 2) / (kv_channels // 2))
        self.rotary_pos_emb = nn.Module()  # as checkpoints have it; half precision is too coarse to turn by
        self.rotary_pos_emb.register_buffer("inv_freq", rates)

    def forward(self, ids: Tensor, mask: Tensor) -> Encoded:
        """Encode token ids (B, L), of which those count that have 1 in the mask (B, L); padding stands before them.

        Texts count their places from their own first token. Padding sees everything, as those who attend to it expect.
        """
        counts = mask.bool()
        places = (counts.long().cumsum(1) - 1).clamp(min=0)
        turns = rotary(places[..., None], [self.config.kv_channels // 2])
        back = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        seen = (back & counts[:, None]) | ~counts[:, :, None]
        x = before = self.embedding["word_embeddings"](ids)
        for layer in self.encoder["layers"]:  # type: ignore[union-attr]
            before, x = x, layer(x, turns, seen[:, None])
        return Encoded(before, x[:, -1])

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """Whole language models have a name before the rest."""
        return key.removeprefix("transformer.")
