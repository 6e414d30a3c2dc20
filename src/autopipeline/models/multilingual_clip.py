"""The text encoder of Kandinsky 2.1: XLM-RoBERTa (Conneau et al. 2020), whose mean lies with CLIP's pictures."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

from autopipeline.models import bert
from autopipeline.models.network import Network


class MultilingualOutput(NamedTuple):
    """What the encoder gives."""

    pooled: Tensor  # (B, P)
    last: Tensor  # (B, L, D)


class Embeddings(bert.Embeddings):
    """Places are counted from after the number of the padding, which has a place of its own."""

    def __init__(self, config: Any, padding: int) -> None:
        super().__init__(config)
        self.padding = padding

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) to (B, L, D)."""
        counted = (ids != self.padding).long()
        places = self.position_embeddings(counted.cumsum(1) * counted + self.padding)
        return self.LayerNorm(self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + places)


class MultilingualCLIP(Network):
    """XLM-RoBERTa, and a linear layer over the mean of its states."""

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
        pad_token_id: int = 1,
        position_embedding_type: str = "absolute",
    ) -> None:
        config = self.config
        own = {name: value for name, value in config.items() if name in inspect.signature(bert.BertModel).parameters}
        self.transformer = bert.BertModel(**own)
        self.transformer.embeddings = Embeddings(self.transformer.config, pad_token_id)
        width = config.get("transformerDimensions") or config.get("transformerDimSize", 1024)
        self.LinearTransformation = nn.Linear(width, config.get("numDims") or config.get("imageDimSize", 768))

    def forward(self, ids: Tensor, mask: Tensor) -> MultilingualOutput:
        """Encode token ids (B, L); where the mask (B, L) is 0 nobody looks, and the mean is of the rest."""
        states = self.transformer(ids, mask)
        counted = mask.to(states.dtype)[..., None]
        return MultilingualOutput(self.LinearTransformation((states * counted).sum(1) / counted.sum(1)), states)

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """Old files hold the numbers of the places."""
        return None if key.endswith("position_ids") else key
