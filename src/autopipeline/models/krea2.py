"""The transformer of Krea 2 (2026): text and picture in one sequence; the text is what many layers of a model said.

Shapes: B rows, T tokens of text, N layers that are heard, L tokens of the picture, D = heads x head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import Mask, RowWise, attend, masks
from autopipeline.models.embeddings import sinusoidal
from autopipeline.models.gemma2 import Norm
from autopipeline.models.network import Network
from autopipeline.models.rotary import rotary, turn


class Attention(nn.Module):
    """Several heads of queries share one of keys and values; what is seen passes a gate."""

    def __init__(self, width: int, heads: int, shared: int, eps: float) -> None:
        super().__init__()
        size = width // heads
        self.size, self.times = size, heads // shared
        self.to_q, self.to_gate = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.to_k, self.to_v = (nn.Linear(width, shared * size, bias=False) for _ in range(2))
        self.norm_q, self.norm_k = Norm(size, eps), Norm(size, eps)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, x: Tensor, table: Tensor | None = None, mask: Mask = None) -> Tensor:
        """(B, L, D) with places (B, L, ., 2), if there are any, and what may be seen (B, 1, 1, L) to (B, L, D)."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )
        q, k = self.norm_q(q), self.norm_k(k)
        if table is not None:
            q, k = turn(q, table), turn(k, table)
        k, v = (part.repeat_interleave(self.times, 1) for part in (k, v))
        mixed = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.to_out[0](mixed * self.to_gate(x).sigmoid())


class FeedForward(RowWise):
    """SwiGLU (Shazeer 2020), and back."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and feed-forward."""

    def __init__(self, width: int, inner: int, heads: int, shared: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(width, eps), Norm(width, eps)
        self.attn = Attention(width, heads, shared, eps)
        self.ff = FeedForward(width, inner)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D), of which so much may be seen (B, 1, 1, L), to (B, L, D)."""
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.ff(self.norm2(x))


class TimedBlock(nn.Module):
    """The same, scaled, shifted and gated by the time, which says the same to all blocks but for a table of each."""

    def __init__(self, width: int, inner: int, heads: int, shared: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(width, eps), Norm(width, eps)
        self.attn = Attention(width, heads, shared, eps)
        self.ff = FeedForward(width, inner)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, mask: Mask, said: Tensor, table: Tensor) -> Tensor:
        """The same with what the time says (B, 6, D) and a table of places."""
        scale, shift, gate, scale_2, shift_2, gate_2 = (said + self.scale_shift_table)[:, :, None].unbind(1)
        x = x + gate * self.attn((1 + scale) * self.norm1(x) + shift, table, mask)
        return x + gate_2 * self.ff((1 + scale_2) * self.norm2(x) + shift_2)


class TextFusion(nn.Module):
    """Of the states of many layers one for each token; then the tokens look at each other."""

    def __init__(self, layers: int, blocks: tuple[int, int], *shape: int, eps: float) -> None:
        super().__init__()
        across, along = ([Block(*shape, eps=eps) for _ in range(count)] for count in blocks)
        self.layerwise_blocks, self.refiner_blocks = nn.ModuleList(across), nn.ModuleList(along)
        self.projector = nn.Linear(layers, 1, bias=False)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, N, E) to (B, T, E)."""
        x = states.flatten(0, 1)
        for block in self.layerwise_blocks:
            x = block(x)
        x = self.projector(x.unflatten(0, states.shape[:2]).transpose(2, 3)).squeeze(-1)
        for block in self.refiner_blocks:
            x = block(x, mask)
        return x


class Perceptron(nn.Module):
    """Two linear layers; `eps`: a norm before them."""

    def __init__(self, width: int, out: int, eps: float | None = None) -> None:
        super().__init__()
        self.norm = None if eps is None else Norm(width, eps)
        self.linear_1, self.linear_2 = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., out)."""
        x = x if self.norm is None else self.norm(x)
        return self.linear_2(functional.gelu(self.linear_1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """From tokens to patches."""

    def __init__(self, width: int, out: int, eps: float) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.norm = Norm(width, eps)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, L, D) with the time (B, D) to (B, L, C)."""
        scale, shift = (time[:, None] + self.scale_shift_table)[:, :, None].unbind(1)
        return self.linear((1 + scale) * self.norm(x) + shift)


class Krea2Transformer2DModel(Network):
    """Predicts the velocity of packed latents."""

    attentions = ("transformer_blocks.attn",)

    def __init__(
        self,
        in_channels: int = 64,
        num_layers: int = 28,
        attention_head_dim: int = 128,
        num_attention_heads: int = 48,
        num_key_value_heads: int = 12,
        intermediate_size: int = 16384,
        timestep_embed_dim: int = 256,
        text_hidden_dim: int = 2560,
        num_text_layers: int = 12,
        text_num_attention_heads: int = 20,
        text_num_key_value_heads: int = 20,
        text_intermediate_size: int = 6912,
        num_layerwise_text_blocks: int = 2,
        num_refiner_text_blocks: int = 2,
        axes_dims_rope: tuple[int, int, int] = (32, 48, 48),
        rope_theta: float = 1000.0,
        norm_eps: float = 1e-5,
    ) -> None:
        heads, shared, width = num_attention_heads, num_key_value_heads, num_attention_heads * attention_head_dim
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(f"axes_dims_rope={axes_dims_rope} has to add up to attention_head_dim.")
        text = text_hidden_dim, text_intermediate_size, text_num_attention_heads, text_num_key_value_heads
        self.img_in = nn.Linear(in_channels, width)
        self.time_embed = Perceptron(timestep_embed_dim, width)
        self.time_mod_proj = nn.Linear(width, 6 * width)
        blocks = num_layerwise_text_blocks, num_refiner_text_blocks
        self.text_fusion = TextFusion(num_text_layers, blocks, *text, eps=norm_eps)
        self.txt_in = Perceptron(text_hidden_dim, width, norm_eps)
        self.transformer_blocks = nn.ModuleList(
            [TimedBlock(width, intermediate_size, heads, shared, norm_eps) for _ in range(num_layers)]
        )
        self.final_layer = FinalLayer(width, in_channels, norm_eps)

    def rotary(self, places: Tensor) -> Tensor:
        """The table (..., head width / 2, 2) that `forward` takes, for places (..., 3): made once for a call."""
        return rotary(places, self.config.axes_dims_rope, self.config.rope_theta)

    def fuse(self, states: Tensor, mask: Tensor) -> Tensor:
        """The text (B, T, D) that `forward` takes, of states (B, T, N, E) that count or not (B, T): once for a call."""
        return self.txt_in(self.text_fusion(states, mask[:, None, None]))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        rotary: Tensor,
        mask: Tensor,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, L, C) of packed latents (B, L, C) at `timestep` (B,) in 0..1.

        With a text (B, T, D) from `self.fuse`, of which the tokens count where the mask (B, T) is true, and a table of
        places (B, T + L, ., 2) from `self.rotary`. `perturbed` (B, blocks): in which of them the tokens of a row's
        picture see of it only themselves.
        """
        image, tokens = self.img_in(hidden_states), encoder_hidden_states.shape[1]
        waves = sinusoidal(timestep.float() * 1000, self.config.timestep_embed_dim, cosine_first=True, shift=0)
        time = self.time_embed(waves.to(image.dtype))
        said = self.time_mod_proj(functional.gelu(time, approximate="tanh")).unflatten(-1, (6, -1))
        hidden = functional.pad(mask, (0, image.shape[1]), value=True)[:, None, None]
        x = torch.cat([encoder_hidden_states, image], 1)
        each = masks(len(self.transformer_blocks), hidden, perturbed, slice(tokens, None))
        for block, seen in zip(self.transformer_blocks, each, strict=True):
            x = block(x, seen, said, rotary)
        return self.final_layer(x[:, tokens:], time)
