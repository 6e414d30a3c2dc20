"""The prior of unCLIP (Ramesh et al. 2022): a causal transformer that imagines the embedding of a picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import Attention
from autopipeline.models.embeddings import TimestepEmbedding, sinusoidal
from autopipeline.models.network import Network

FAR = -10000.0
"""Added to the scores of tokens that nobody is to look at; published pictures know it to be finite."""


class Inner(nn.Module):
    """The wide layer of a perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., 4 D)."""
        return functional.gelu(self.proj(x))


class Perceptron(nn.Module):
    """A layer four times as wide, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Inner(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Self-attention and a perceptron, with norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, bias=True)
        self.ff = Perceptron(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D), with scores to add (B, 1, L, L)."""
        x = x + self.attn1(self.norm1(x), mask=mask)
        return x + self.ff(self.norm3(x))


class PriorTransformer(Network):
    """Texts to the embedding of a picture: tokens of the text, its vector, the time, the noisy embedding, an answer."""

    def __init__(
        self,
        num_attention_heads: int = 32,
        attention_head_dim: int = 64,
        num_layers: int = 20,
        embedding_dim: int = 768,
        num_embeddings: int = 77,
        additional_embeddings: int = 4,
        dropout: float = 0.0,
        time_embed_act_fn: str = "silu",
        norm_in_type: str | None = None,
        embedding_proj_norm_type: str | None = None,
        encoder_hid_proj_type: str | None = "linear",
        added_emb_type: str | None = "prd",
        time_embed_dim: int | None = None,
        embedding_proj_dim: int | None = None,
        clip_embed_dim: int | None = None,
    ) -> None:
        if encoder_hid_proj_type != "linear" or added_emb_type != "prd" or additional_embeddings != 4:
            raise CheckpointError("A prior without tokens of the text and of its answer is not supported.")
        if norm_in_type not in (None, "layer") or embedding_proj_norm_type not in (None, "layer"):
            raise CheckpointError(f"A prior with norms of the type {norm_in_type} is not supported.")
        width, out = num_attention_heads * attention_head_dim, clip_embed_dim or embedding_dim
        text = embedding_proj_dim or embedding_dim
        self.time_embedding = TimestepEmbedding(width, time_embed_dim or width, time_embed_act_fn)
        self.time_embedding.linear_2 = nn.Linear(time_embed_dim or width, width)
        self.proj_in = nn.Linear(embedding_dim, width)
        self.embedding_proj_norm = nn.LayerNorm(text) if embedding_proj_norm_type else None
        self.embedding_proj = nn.Linear(text, width)
        self.encoder_hidden_states_proj = nn.Linear(embedding_dim, width)
        self.positional_embedding = nn.Parameter(torch.zeros(1, num_embeddings + additional_embeddings, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_blocks = nn.ModuleList([Block(width, num_attention_heads) for _ in range(num_layers)])
        self.norm_in = nn.LayerNorm(width) if norm_in_type else None
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, out)
        self.clip_mean, self.clip_std = nn.Parameter(torch.zeros(1, out)), nn.Parameter(torch.zeros(1, out))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        *,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """The embedding (B, E) behind a noisy one x (B, E) at `timestep` (B,).

        `proj_embedding` (B, P) and `encoder_hidden_states` (B, T, E) are those of the text; the mask (B, T) is true for
        tokens that count.
        """
        waves = sinusoidal(timestep, self.proj_in.out_features, cosine_first=True, shift=0).to(x.dtype)
        if self.embedding_proj_norm is not None:
            proj_embedding = self.embedding_proj_norm(proj_embedding)
        vectors = [self.embedding_proj(proj_embedding), self.time_embedding(waves), self.proj_in(x)]
        text, last = self.encoder_hidden_states_proj(encoder_hidden_states), self.prd_embedding.expand(len(x), -1, -1)
        rows = torch.cat([text, torch.stack(vectors, 1), last], 1) + self.positional_embedding  # (B, T + 4, D)
        rows = rows if self.norm_in is None else self.norm_in(rows)
        mask = self._far(attention_mask, rows)
        for block in self.transformer_blocks:
            rows = block(rows, mask)
        return self.proj_to_clip_embeddings(self.norm_out(rows)[:, -1])

    @staticmethod
    def _far(mask: Tensor, rows: Tensor) -> Tensor:
        """What is added to the scores (B, 1, L, L): tokens look back, and at no padding."""
        padding = functional.pad((1 - mask.to(rows.dtype)) * FAR, (0, rows.shape[1] - mask.shape[1]))
        ahead = torch.full((rows.shape[1],) * 2, FAR, dtype=rows.dtype, device=rows.device).triu(1)
        return padding[:, None, None] + ahead

    def denormed(self, x: Tensor) -> Tensor:
        """An embedding (B, E) as CLIP gives it, from one of mean 0 and deviation 1."""
        return x * self.clip_std + self.clip_mean
