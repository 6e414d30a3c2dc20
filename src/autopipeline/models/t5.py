"""T5's encoder (Raffel et al. 2020; version 1.1 with gated perceptrons) and UMT5's (Chung et al. 2023)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import attend
from autopipeline.models.network import Network

ACTIVATIONS: dict[str, Any] = {
    "relu": functional.relu,
    "gelu": partial(functional.gelu, approximate="tanh"),  # "gated-gelu" has always meant the approximation
    "silu": functional.silu,
}


def distance_buckets(length: int, buckets: int, furthest: int, device: torch.device) -> Tensor:
    """Which row of the bias table each pair of places takes, (L, L).

    Half of the rows are for places ahead; of each half, one half is for exact distances and the other grows with the
    logarithm up to `furthest` (Raffel et al. 2020, section 2.1).
    """
    places = torch.arange(length, device=device)
    ahead = places[None, :] - places[:, None]
    distance, half = ahead.abs(), buckets // 2
    exact = half // 2
    share = torch.log(distance.float() / exact) / math.log(furthest / exact)
    far = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (ahead > 0)


class SelfAttention(nn.Module):
    """Attention without scaling; the bias by distance does its part."""

    def __init__(self, width: int, heads: int, size: int, buckets: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, heads * size, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * size, width, bias=False)
        if buckets is not None:
            self.relative_attention_bias = nn.Embedding(buckets, heads)

    def bias(self, rows: Tensor) -> Tensor:
        """The table's entries for distance buckets (L, L): (1, heads, L, L)."""
        return self.relative_attention_bias(rows).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, L, D) with (1 or B, heads, L, L) to (B, L, D)."""
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        return self.o(attend(q, k, v, mask=bias, scale=1.0).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Two linear layers; in version 1.1 the first has a gate beside it."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        gate, _, name = activation.rpartition("-")
        if name not in ACTIVATIONS or gate not in ("", "gated"):
            raise CheckpointError(f"A T5 encoder with feed_forward_proj={activation!r} is not supported.")
        self.gated, self.activation = gate == "gated", ACTIVATIONS[name]
        if self.gated:
            self.wi_0, self.wi_1 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        else:
            self.wi = nn.Linear(width, inner, bias=False)
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        inner = self.activation(self.wi_0(x)) * self.wi_1(x) if self.gated else self.activation(self.wi(x))
        return self.wo(inner.to(self.wo.weight.dtype)).to(x.dtype)


class SelfAttentionLayer(nn.Module):
    """Norm, attention, and around."""

    def __init__(self, width: int, heads: int, size: int, buckets: int | None, eps: float) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(width, heads, size, buckets)
        self.layer_norm = nn.RMSNorm(width, eps=eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return x + self.SelfAttention(self.layer_norm(x), bias)


class PerceptronLayer(nn.Module):
    """Norm, perceptron, and around."""

    def __init__(self, width: int, inner: int, activation: str, eps: float) -> None:
        super().__init__()
        self.DenseReluDense = Perceptron(width, inner, activation)
        self.layer_norm = nn.RMSNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    """One layer of each kind."""

    layer: Any

    def __init__(self, config: Any, biased: bool) -> None:
        super().__init__()
        width, eps = config.d_model, config.layer_norm_epsilon
        buckets = config.relative_attention_num_buckets if biased else None
        self.layer = nn.ModuleList(
            [
                SelfAttentionLayer(width, config.num_heads, config.d_kv, buckets, eps),
                PerceptronLayer(width, config.d_ff, config.feed_forward_proj, eps),
            ]
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D); float16 is kept from running over."""
        for layer, more in zip(self.layer, ((bias,), ()), strict=True):
            x = layer(x, *more)
            if x.dtype == torch.float16:
                x = x.clamp(-65504, 65504)
        return x


class Blocks(nn.Module):
    """A row of blocks and the norm after them; the bias is the first block's, or each has its own."""

    def __init__(self, config: Any, each_biased: bool) -> None:
        super().__init__()
        self.buckets, self.furthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
        self.block = nn.ModuleList([Block(config, each_biased or k == 0) for k in range(config.num_layers)])
        self.final_layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        rows = distance_buckets(x.shape[1], self.buckets, self.furthest, x.device)
        unseen = x.new_zeros(1, 1, 1, 1)
        if mask is not None:
            unseen = x.new_zeros(mask.shape).masked_fill(mask == 0, torch.finfo(x.dtype).min)[:, None, None]
        bias = unseen
        for block in self.block:
            attention = block.layer[0].SelfAttention  # type: ignore[index,union-attr]
            if hasattr(attention, "relative_attention_bias"):
                bias = attention.bias(rows).to(x.dtype) + unseen
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5EncoderModel(Network):
    """T5's encoder."""

    library = "transformers"
    each_biased = False  # whether every block has a table of biases, or the first alone

    def __init__(
        self,
        vocab_size: int = 32128,
        d_model: int = 512,
        d_kv: int = 64,
        d_ff: int = 2048,
        num_layers: int = 6,
        num_heads: int = 8,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        layer_norm_epsilon: float = 1e-6,
        feed_forward_proj: str = "relu",
    ) -> None:
        self.shared = nn.Embedding(vocab_size, d_model)
        self.encoder = Blocks(self.config, self.each_biased)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode token ids (B, L) to (B, L, D), after the final norm; where the mask (B, L) is 0 nobody looks."""
        return self.encoder(self.shared(ids), mask)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As all networks; in float16 the perceptrons' last layers, which would run over, stay in float32."""
        network = super().from_pretrained(*args, **kwargs)
        if network.dtype == torch.float16:
            for block in network.encoder.block:
                block.layer[1].DenseReluDense.wo.float()  # type: ignore[union-attr,index]
        return network

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """The embeddings stand in some files twice; decoders, where there is one, are of no use."""
        if key == "encoder.embed_tokens.weight" or key.startswith(("decoder.", "lm_head.")):
            return None
        return key


class UMT5EncoderModel(T5EncoderModel):
    """UMT5's encoder: every block has its own bias by distance."""

    each_biased = True

    def __init__(
        self,
        vocab_size: int = 250112,
        d_model: int = 512,
        d_kv: int = 64,
        d_ff: int = 1024,
        num_layers: int = 8,
        num_heads: int = 6,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        layer_norm_epsilon: float = 1e-6,
        feed_forward_proj: str = "gated-gelu",
    ) -> None:
        self.shared = nn.Embedding(vocab_size, d_model)
        self.encoder = Blocks(self.config, self.each_biased)
