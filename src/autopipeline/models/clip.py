"""CLIP's text and vision encoders (Radford et al. 2021)."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import attend
from autopipeline.models.network import Network


class TextOutput(NamedTuple):
    """What a text encoder gives."""

    hidden_states: tuple[Tensor, ...]  # embeddings, then every layer: (B, L, D) each
    last: Tensor  # (B, L, D), after the final norm
    pooled: Tensor  # (B, D), at the end of the text; projected where the encoder has a projection


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Any] = {
    "quick_gelu": _quick_gelu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
}


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, causal or not."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) to (B, L, D); each token sees those before it, or where the mask (B, 1, L, L) is true."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(q, k, v, mask, causal=causal and mask is None).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise CheckpointError(f"An encoder with hidden_act={activation!r} is not supported.")
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """A transformer layer with norms first."""

    def __init__(self, width: int, inner: int, heads: int, activation: str, eps: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = Perceptron(width, inner, activation)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x), causal, mask)
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    """A row of layers."""

    def __init__(self, count: int, *args: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(*args) for _ in range(count)])


class TextEmbeddings(nn.Module):
    """Tokens and their places."""

    def __init__(self, vocabulary: int, places: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(places, width)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) to (B, L, D)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    """The text encoder without its projection."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.embeddings = TextEmbeddings(config.vocab_size, config.max_position_embeddings, width)
        shape = (width, config.intermediate_size, config.num_attention_heads, config.hidden_act, config.layer_norm_eps)
        self.encoder = Layers(config.num_hidden_layers, *shape)
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Embeddings and the output of every layer."""
        states, seen = [self.embeddings(ids)], None
        if mask is not None:
            seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
            seen = seen & mask[:, None, None].bool()
        for layer in self.encoder.layers:
            states.append(layer(states[-1], True, seen))
        return tuple(states)


class CLIPTextModel(Network):
    """CLIP's text encoder."""

    library = "transformers"

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        pad_token_id: int = 1,
        bos_token_id: int = 49406,
        eos_token_id: int = 49407,
    ) -> None:
        self.text_model = TextTransformer(self.config)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> TextOutput:
        """Encode token ids (B, L); nobody sees tokens whose mask (B, L) is 0, which most families do without."""
        states = self.text_model(ids, mask)
        last = self.norm(states[-1])
        return TextOutput(states, last, self._project(last[torch.arange(len(ids), device=ids.device), self._end(ids)]))

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm, over the output of any layer."""
        return self.text_model.final_layer_norm(hidden)

    def _end(self, ids: Tensor) -> Tensor:
        """Where each text ends. Published configurations say 2 although the end token is the largest id."""
        end = self.config.eos_token_id
        return (ids if end == 2 else (ids == end).int()).to(torch.int).argmax(-1)

    def _project(self, pooled: Tensor) -> Tensor:
        return pooled

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """Newer files leave the prefix out, older ones have a table of positions that nobody needs."""
        if key.endswith("position_ids"):
            return None
        return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


class CLIPTextModelWithProjection(CLIPTextModel):
    """CLIP's text encoder; the pooled output is projected."""

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        pad_token_id: int = 1,
        bos_token_id: int = 49406,
        eos_token_id: int = 49407,
    ) -> None:
        self.text_model = TextTransformer(self.config)
        self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False)

    def _project(self, pooled: Tensor) -> Tensor:
        return self.text_projection(pooled)


class VisionEmbeddings(nn.Module):
    """Patches and their places, after a token for the whole."""

    def __init__(self, channels: int, width: int, size: int, patch: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((size // patch) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 1 + patches, D)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([whole, patches], 1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """The vision encoder without its projection."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings = VisionEmbeddings(config["num_channels"], width, config["image_size"], config["patch_size"])
        self.pre_layrnorm = nn.LayerNorm(width, eps=eps)
        shape = (width, config["intermediate_size"], config["num_attention_heads"], config["hidden_act"], eps)
        self.encoder = Layers(config["num_hidden_layers"], *shape)
        self.post_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) to the pooled (B, D)."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x, False)
        return self.post_layernorm(x[:, 0])


VISION_DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)


class CLIPVisionModelWithProjection(Network):
    """CLIP's vision encoder."""

    library = "transformers"

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 32,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        self.vision_model = VisionTransformer(self.config)
        self.visual_projection = nn.Linear(hidden_size, projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, P) of pictures (B, 3, H, W)."""
        return self.visual_projection(self.vision_model(pixels))

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """A table of positions in older files is of no use."""
        return None if key.endswith("position_ids") else key
