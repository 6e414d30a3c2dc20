"""The transformer of PRX (Photoroom 2025): picture tokens attend to themselves and to the text, which never changes.

Shapes: B rows, T tokens of text, L tokens of the picture, D = heads x head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import Mask, attend, masks
from autopipeline.models.embeddings import sinusoidal
from autopipeline.models.flux import modulate
from autopipeline.models.network import Network
from autopipeline.models.rotary import grid_places, rotary, turn

WAVES = 256
"""Width of the sinusoidal embeddings of the time, and of the size."""


class Embedder(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(WAVES, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 256) to (B, D)."""
        return self.out_layer(functional.silu(self.in_layer(x)))


class SizeEmbedder(nn.Module):
    """The height and width of the latents as a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = Embedder(width)


class Attention(nn.Module):
    """Queries of the picture; keys and values of the text, which has no places, and of the picture."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, size = heads, width // heads
        self.img_qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.txt_kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.norm_q, self.norm_k, self.norm_added_k = (nn.RMSNorm(size, eps=1e-6) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, x: Tensor, text: Tensor, table: Tensor, mask: Mask) -> Tensor:
        """(B, L, D) with text (B, T, D), places (B, L, ., 2) and what may be seen (B, 1, 1, T + L) to (B, L, D)."""
        q, k, v = self._split(self.img_qkv_proj(x), 3)
        text_k, text_v = self._split(self.txt_kv_proj(text), 2)
        q, k = turn(self.norm_q(q), table), turn(self.norm_k(k), table)
        keys, values = torch.cat([self.norm_added_k(text_k), k], 2), torch.cat([text_v, v], 2)
        return self.to_out[0](attend(q, keys, values, mask).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, D / heads)


class Modulation(nn.Module):
    """What the time says to a block: six vectors (Peebles & Xie 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, 6 * width)


class Block(nn.Module):
    """Attention and a gated perceptron, both shifted, scaled and gated by the time."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.modulation = Modulation(width)

    def forward(self, x: Tensor, text: Tensor, time: Tensor, table: Tensor, mask: Mask) -> Tensor:
        """(B, L, D) with the time (B, D), activated, to (B, L, D)."""
        said = self.modulation.lin(time)[:, None].chunk(6, -1)
        x = x + said[2] * self.attention(modulate(x, said[0], said[1]), text, table, mask)
        y = modulate(x, said[3], said[4])
        gate = functional.gelu(self.gate_proj(y), approximate="tanh")
        return x + said[5] * self.down_proj(gate * self.up_proj(y))


class FinalLayer(nn.Module):
    """From tokens to patches."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.ModuleList([nn.Identity(), nn.Linear(width, 2 * width)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, L, D) to (B, L, out)."""
        shift, scale = self.adaLN_modulation[1](time)[:, None].chunk(2, -1)
        return self.linear(modulate(x, shift, scale))


class PRXTransformer2DModel(Network):
    """Predicts the velocity of latents."""

    attentions = ("blocks.attention",)

    def __init__(
        self,
        in_channels: int = 16,
        patch_size: int = 2,
        context_in_dim: int = 2304,
        hidden_size: int = 1792,
        mlp_ratio: float = 3.5,
        num_heads: int = 28,
        depth: int = 16,
        axes_dim: list[int] | None = None,
        theta: int = 10000,
        time_factor: float = 1000.0,
        time_max_period: int = 10000,
        bottleneck_size: int | None = None,
        resolution_embeds: bool = False,
    ) -> None:
        width, patch, middle = hidden_size, in_channels * patch_size**2, bottleneck_size
        self.axes = tuple(axes_dim or (32, 32))
        if width % num_heads or sum(self.axes) != width // num_heads:
            raise ValueError(f"axes_dim={self.axes} has to add up to the width of a head, {width} / {num_heads}.")
        self.img_in = (
            nn.Linear(patch, width)
            if middle is None
            else nn.Sequential(nn.Linear(patch, middle), nn.Linear(middle, width))
        )
        self.time_in = Embedder(width)
        self.txt_in = nn.Linear(context_in_dim, width)
        self.resolution_embedder = SizeEmbedder(width) if resolution_embeds else None
        self.blocks = nn.ModuleList([Block(width, num_heads, int(width * mlp_ratio)) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch)

    def rotary(self, height: int, width: int) -> Tensor:
        """The table (L, head width / 2, 2) that `forward` takes, for latents of that size: made once for a call."""
        size = self.config.patch_size
        return rotary(grid_places(height // size, width // size)[:, 1:], self.axes, self.config.theta)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        rotary: Tensor,
        *,
        attention_mask: Tensor | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, C, H, W) of latents (B, C, H, W) at `timestep` (B,) in 0..1.

        With a text (B, T, J), of which the tokens count where the mask (B, T) is true, and a table of places
        (B, L, ., 2) from `self.rotary`. `perturbed` (B, blocks): in which of them the tokens of a row's picture see of
        it only themselves.
        """
        size = self.config.patch_size
        rows, columns = (side // size for side in hidden_states.shape[-2:])
        patches = functional.pixel_unshuffle(hidden_states, size).flatten(2).transpose(1, 2)  # (B, L, C * size ** 2)
        x, text = self.img_in(patches), self.txt_in(encoder_hidden_states)
        height, width = hidden_states.shape[-2:]
        time = functional.silu(self._time(timestep, height, width, x.dtype))
        mask = None
        if attention_mask is not None:
            mask = functional.pad(attention_mask.bool(), (0, x.shape[1]), value=True)[:, None, None]
        each = masks(len(self.blocks), mask, perturbed, slice(text.shape[1], None))
        for block, mask in zip(self.blocks, each, strict=True):
            x = block(x, text, time, rotary, mask)
        out = self.final_layer(x, time).transpose(1, 2).unflatten(2, (rows, columns))
        return functional.pixel_shuffle(out, size)

    def _time(self, timestep: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """The time, and the size for networks that are told it: (B, D)."""
        config = self.config
        waves = self._waves(timestep * config.time_factor, WAVES)
        time = self.time_in(waves.to(dtype))
        if self.resolution_embedder is None:
            return time
        sides = self._waves(torch.tensor([height, width], device=time.device), WAVES // 2)
        return time + self.resolution_embedder.mlp(sides.view(1, -1).to(dtype))

    def _waves(self, x: Tensor, width: int) -> Tensor:
        return sinusoidal(x, width, cosine_first=True, shift=0, period=self.config.time_max_period)
