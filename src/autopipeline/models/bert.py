"""BERT (Devlin et al. 2019): an encoder that looks both ways, with norms after each sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import attend
from autopipeline.models.embeddings import ACTIVATIONS
from autopipeline.models.network import Network


class Embeddings(nn.Module):
    """Tokens, their places and their kind (there is only one here), summed and normed."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) to (B, L, D)."""
        places = self.position_embeddings.weight[: ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + places)


class Heads(nn.Module):
    """Queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, D) to (B, L, D); nobody looks where the mask (B, 1, 1, L) is false."""
        parts = (self.query, self.key, self.value)
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in parts)
        return attend(q, k, v, mask=mask).transpose(1, 2).flatten(2)


class Sum(nn.Module):
    """A linear layer, added to what was there, and normed."""

    def __init__(self, channels: int, width: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def forward(self, inner: Tensor, x: Tensor) -> Tensor:
        """(B, L, C) and (B, L, D) to (B, L, D)."""
        return self.LayerNorm(self.dense(inner) + x)


class Layer(nn.Module):
    """Attention, then a perceptron."""

    attention: Any
    intermediate: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.attention, self.intermediate = nn.Module(), nn.Module()
        self.attention.add_module("self", Heads(width, config.num_attention_heads))
        self.attention.add_module("output", Sum(width, width, eps))
        self.intermediate.add_module("dense", nn.Linear(width, inner))
        self.output = Sum(inner, width, eps)
        self.activation = ACTIVATIONS[config.hidden_act]()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        x = self.attention.output(self.attention.get_submodule("self")(x, mask), x)
        return self.output(self.activation(self.intermediate.dense(x)), x)


class BertModel(Network):
    """BERT's encoder; its pooler, which nothing here asks, is kept for other readers of the checkpoint."""

    library = "transformers"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        layer_norm_eps: float = 1e-12,
        position_embedding_type: str = "absolute",
    ) -> None:
        if hidden_act not in ACTIVATIONS or position_embedding_type != "absolute":
            raise CheckpointError(f"A BERT with {hidden_act} and {position_embedding_type} positions is not supported.")
        self.embeddings = Embeddings(self.config)
        self.encoder, self.pooler = nn.Module(), nn.Module()
        self.encoder.add_module("layer", nn.ModuleList([Layer(self.config) for _ in range(num_hidden_layers)]))
        self.pooler.add_module("dense", nn.Linear(hidden_size, hidden_size))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode token ids (B, L) to (B, L, D); where the mask (B, L) is 0 nobody looks."""
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"BERT knows {self.config.max_position_embeddings} places; there are {ids.shape[1]} tokens."
            )
        seen = None if mask is None else (mask > 0)[:, None, None]
        x = self.embeddings(ids)
        for layer in self.encoder.layer:  # type: ignore[union-attr]
            x = layer(x, seen)
        return x

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """Old files hold the numbers of the places; files of models on top of BERT put its name before all keys."""
        key = key.removeprefix("bert.")
        return None if key == "embeddings.position_ids" or key.startswith("cls.") else key
