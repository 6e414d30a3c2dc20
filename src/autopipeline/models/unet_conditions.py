"""What U-Nets make of texts and pictures: vectors beside the time, and tokens to attend to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopipeline.models.attention import attend


class ImageTokens(nn.Module):
    """A picture's embedding as tokens; with a text's hidden states, the tokens of both."""

    def __init__(self, image: int, width: int, count: int, text: int | None = None) -> None:
        super().__init__()
        self.count = count
        self.image_embeds = nn.Linear(image, count * width)
        if text is None:
            self.norm = nn.LayerNorm(width)
        else:
            self.text_proj = nn.Linear(text, width)

    def forward(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        """Embeddings (B, I), and hidden states (B, T, D) if there are any, to (B, count + T, width)."""
        tokens = self.image_embeds(image).unflatten(1, (self.count, -1))
        return self.norm(tokens) if text is None else torch.cat([tokens, self.text_proj(text)], 1)


class ImageVector(nn.Module):
    """A picture's embedding as a vector to add to the time; Kandinsky 2.1 has a text's embedding beside it."""

    def __init__(self, image: int, out: int, text: int | None = None) -> None:
        super().__init__()
        self.image_proj = nn.Linear(image, out)
        if text is None:
            self.image_norm = nn.LayerNorm(out)
        else:
            self.text_proj = nn.Linear(text, out)
            self.text_norm = nn.LayerNorm(out)

    def forward(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        """(B, I), and (B, T) if there is a text, to (B, out)."""
        vector = self.image_proj(image)
        return self.image_norm(vector) if text is None else vector + self.text_norm(self.text_proj(text))


class Pool(nn.Module):
    """Attention of the mean of all tokens to them and itself."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, D)."""
        mean = x.mean(1, keepdim=True) + self.positional_embedding.to(x.dtype)
        x = torch.cat([mean, x], 1)
        q, k, v = (
            project(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, rows in ((self.q_proj, mean), (self.k_proj, x), (self.v_proj, x))
        )
        return attend(q, k, v).transpose(1, 2).flatten(1)


class TextVector(nn.Module):
    """A text's hidden states, pooled, as a vector to add to the time."""

    def __init__(self, text: int, out: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(text)
        self.pool = Pool(heads, text)
        self.proj = nn.Linear(text, out)
        self.norm2 = nn.LayerNorm(out)

    def forward(self, text: Tensor) -> Tensor:
        """(B, T, D) to (B, out)."""
        return self.norm2(self.proj(self.pool(self.norm1(text))))
