"""The transformer of NucleusMoE-Image (2026): tokens of a picture look at each other and at a text, and experts choose
which of the tokens they work on (Zhou et al. 2022).

Shapes: B rows, T tokens of text, L tokens of the picture, D = heads x head width, X experts, C tokens for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import Mask, RowWise, attend, masks
from autopipeline.models.embeddings import sinusoidal
from autopipeline.models.flux import Modulation, modulate, within
from autopipeline.models.network import Network
from autopipeline.models.qwenimage import joint_mask, places
from autopipeline.models.rotary import rotary, turn

DENSE: dict[str, tuple[int, int]] = {
    "leave_first_three_and_last_block_dense": (3, 1),
    "leave_first_three_blocks_dense": (3, 0),
    "leave_first_block_dense": (1, 0),
    "all_moe": (0, 0),
}
"""Of which strategy so many first and last blocks have no experts."""
Heard = Sequence[tuple[Tensor, Tensor]]
"""For each block what its tokens hear of a text: keys and values (B, shared heads, T, head width)."""


class TimeEmbedding(nn.Module):
    """Time as a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(width, 4 * width), "linear_2": nn.Linear(4 * width, width)}
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, timestep: Tensor) -> Tensor:
        """(B,) in 0..1, in the network's precision, to (B, D)."""
        waves = sinusoidal(timestep.float() * 1000, self.norm.normalized_shape[0], cosine_first=True, shift=0)
        first, second = self.timestep_embedder["linear_1"], self.timestep_embedder["linear_2"]
        return self.norm(second(functional.silu(first(waves.to(timestep.dtype)))))


class Attention(nn.Module):
    """Several heads of queries share one of keys and values, of the picture and of a text."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.size, self.times = width // heads, heads // shared
        inner = shared * self.size
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v, self.add_k_proj, self.add_v_proj = (nn.Linear(width, inner, bias=False) for _ in range(4))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (
            nn.RMSNorm(self.size, eps=1e-6) for _ in range(4)
        )  # checkpoints have a norm for questions of the text, which asks nothing
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def hear(self, text: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a text (B, T, D) at places (1, T, ., 2)."""
        return turn(self.norm_added_k(self._split(self.add_k_proj(text))), table), self._split(self.add_v_proj(text))

    def forward(self, x: Tensor, heard: tuple[Tensor, Tensor], table: Tensor, mask: Mask) -> Tensor:
        """(B, L, D) at places (1, L, ., 2), with what is heard, to (B, L, D); the mask is (B, 1, 1, T + L)."""
        q, k, v = (self._split(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        q, k = turn(self.norm_q(q), table), turn(self.norm_k(k), table)
        k, v = (torch.cat(pair, 2).repeat_interleave(self.times, 1) for pair in zip(heard, (k, v), strict=True))
        return self.to_out[0](attend(q, k, v, mask).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """The first layer of SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, inner)."""
        up, gate = self.proj(x).chunk(2, -1)
        return up * functional.silu(gate)


class FeedForward(RowWise):
    """SwiGLU, and back."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Gated(width, inner), nn.Identity(), nn.Linear(inner, width, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.net[2](self.net[0](x))


class Experts(nn.Module):
    """Networks side by side, each a SwiGLU."""

    def __init__(self, width: int, inner: int, count: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, width, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(count, inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """(X, N, D), the tokens of each, to (X, N, D)."""
        gate, up = (x @ self.gate_up_proj).chunk(2, -1)
        return (functional.silu(gate) * up) @ self.down_proj


class Mixture(nn.Module):
    """Each expert takes the tokens of a picture that it is best for; one more sees them all."""

    def __init__(self, width: int, inner: int, count: int, capacity: float, sigmoid: bool, scale: float) -> None:
        super().__init__()
        self.capacity, self.sigmoid, self.scale = capacity, sigmoid, scale
        self.gate = nn.Linear(2 * width, count, bias=False)
        self.experts = Experts(width, inner, count)
        self.shared_expert = FeedForward(width, inner)

    def forward(self, x: Tensor, plain: Tensor, time: Tensor) -> Tensor:
        """(B, L, D), the same before the time (B, D) scaled it, to (B, L, D)."""
        logits = self.gate(torch.cat([time[:, None].expand_as(plain), plain], -1))
        scores = logits.float().sigmoid() if self.sigmoid else logits.float().softmax(-1)
        share = scores.to(logits.dtype).transpose(1, 2)  # (B, X, L)
        most = max(1, math.ceil(self.capacity * x.shape[1] / share.shape[1]))
        share, which = share.topk(most, -1)  # (B, X, C)
        which = which.flatten(1)  # (B, X * C)
        total = torch.zeros_like(x[..., 0], dtype=share.dtype).scatter_add(1, which, share.flatten(1))
        weight = self.scale * (share.flatten(1) / (total.gather(1, which) + 1e-12))
        places = which[..., None].expand(-1, -1, x.shape[-1])
        taken = x.gather(1, places).unflatten(1, share.shape[1:])  # (B, X, C, D)
        made = self.experts(taken.transpose(0, 1).flatten(1, 2)).unflatten(1, (len(x), most))  # (X, B, C, D)
        made = (made.transpose(0, 1).flatten(1, 2).float() * weight[..., None]).to(x.dtype)
        return self.shared_expert(x).scatter_add(1, places, made)


class Block(nn.Module):
    """Attention and feed-forward, of one network or of many; the time scales what goes in and gates what comes out."""

    def __init__(self, width: int, heads: tuple[int, int], text: int, feed: nn.Module) -> None:
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width))
        self.encoder_proj = nn.Linear(text, width)
        self.attn = Attention(width, *heads)
        self.img_mlp = feed

    def hear(self, text: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """What its tokens hear of a text (B, T, J)."""
        return self.attn.hear(self.encoder_proj(text), table)

    def forward(self, x: Tensor, heard: tuple[Tensor, Tensor], time: Tensor, table: Tensor, mask: Mask) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        scale, gate, scale_2, gate_2 = self.img_mod(time)[:, None].chunk(4, -1)
        plain = functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        x = x + gate.clamp(-2, 2).tanh() * self.attn(plain * (1 + scale), heard, table, mask)
        plain = functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        scaled = plain * (1 + scale_2)
        fed = self.img_mlp(scaled, plain, time) if isinstance(self.img_mlp, Mixture) else self.img_mlp(scaled)
        return within(x + gate_2.clamp(-2, 2).tanh() * fed)


class NucleusMoEImageTransformer2DModel(Network):
    """Predicts the velocity of packed latents, from the picture to noise."""

    attentions = ("transformer_blocks.attn",)

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 24,
        attention_head_dim: int = 128,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        joint_attention_dim: int = 3584,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        mlp_ratio: float = 4.0,
        moe_enabled: bool = True,
        dense_moe_strategy: str = "leave_first_three_and_last_block_dense",
        num_experts: int = 128,
        moe_intermediate_dim: int = 1344,
        capacity_factors: float | list[float] = 8.0,
        use_sigmoid: bool = False,
        route_scale: float = 2.5,
        use_grouped_mm: bool = False,
    ) -> None:
        if dense_moe_strategy not in {*DENSE, "all_dense"}:
            raise CheckpointError(f"{dense_moe_strategy=} is none of {', '.join(DENSE)} and all_dense.")
        width, heads = num_attention_heads * attention_head_dim, num_attention_heads
        capacities = capacity_factors if isinstance(capacity_factors, list) else [capacity_factors] * num_layers
        first, last = DENSE.get(dense_moe_strategy, (num_layers, 0)) if moe_enabled else (num_layers, 0)
        mixed = range(first, num_layers - last)
        self.time_text_embed = TimeEmbedding(width)
        self.txt_norm = nn.RMSNorm(joint_attention_dim, eps=1e-6)
        self.img_in = nn.Linear(in_channels, width)
        experts = moe_intermediate_dim, num_experts
        feeds = [
            Mixture(width, *experts, capacities[k], use_sigmoid, route_scale)
            if k in mixed
            else FeedForward(width, int(width * mlp_ratio * 2 / 3) // 128 * 128)
            for k in range(num_layers)
        ]
        shared = num_key_value_heads or heads
        self.transformer_blocks = nn.ModuleList(
            [Block(width, (heads, shared), joint_attention_dim, feed) for feed in feeds]
        )
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels), bias=False)

    def rotary(self, tokens: int, height: int, width: int) -> Tensor:
        """The table (T + L, head width / 2, 2) that `hear` and `forward` take: made once for a call."""
        return rotary(places(tokens, (height, width)), self.config.axes_dims_rope)

    def hear(self, states: Tensor, table: Tensor) -> Heard:
        """What the blocks hear of a text (B, T, J) by a table (T + L, ., 2), for `forward`: made once for a call."""
        text, table = self.txt_norm(states), table[None, : states.shape[1]]
        return [block.hear(text, table) for block in self.transformer_blocks]  # type: ignore[operator]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        heard: Heard,
        rotary: Tensor,
        mask: Tensor | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, L, C), towards the picture, of packed latents (B, L, C) at `timestep` (B,) in 0..1.

        `heard` comes from `self.hear`, the table of places (T + L, ., 2) from `self.rotary`; the mask (B, T) is 0 for
        padding. `perturbed` (B, blocks): in which of them the tokens of a row's picture see of it only themselves.
        """
        x = self.img_in(hidden_states)
        time = self.time_text_embed(timestep.to(x.dtype))
        own = rotary[None, len(rotary) - x.shape[1] :]
        hidden = joint_mask(mask, x.shape[1])
        each = masks(len(heard), hidden, perturbed, slice(-x.shape[1], None))
        for block, said, seen in zip(self.transformer_blocks, heard, each, strict=True):
            x = block(x, said, time, own, seen)
        scale, shift = self.norm_out(functional.silu(time)).unbind(1)
        return self.proj_out(modulate(x, shift, scale))
