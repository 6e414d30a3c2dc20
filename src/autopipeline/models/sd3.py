"""The transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024), and the ControlNets for it.

Shapes: B rows, N image tokens, T text tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.errors import CheckpointError
from autopipeline.models.attention import Apart, Mask, attend, masks
from autopipeline.models.controlnet import MultiControlNetModel
from autopipeline.models.embeddings import TimestepEmbedding, plane_sinusoids, sinusoidal
from autopipeline.models.network import Network

NORMS: dict[str, type[nn.Module]] = {"rms_norm": nn.RMSNorm, "layer_norm": nn.LayerNorm}


def grid_sinusoids(width: int, side: int, base: int) -> Tensor:
    """Where each of side * side places is, as sines and cosines of column and row, (1, side * side, width).

    Places are told in units of the grid of `base` places a side that the network was made for.
    """
    places = torch.arange(side, dtype=torch.float32) / (side / base)
    return plane_sinusoids(width, places, places)[None]


class Patches(nn.Module):
    """Squares of x as tokens; with `side`, places are added, cropped from the middle of a grid of side * side."""

    def __init__(self, channels: int, width: int, patch: int, side: int | None = None, base: int = 1) -> None:
        super().__init__()
        self.patch, self.side = patch, side
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        if side is not None:
            self.register_buffer("pos_embed", grid_sinusoids(width, side, base))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, N, D)."""
        tokens = self.proj(x)
        if self.side is None:
            return tokens.flatten(2).transpose(1, 2)
        height, width = tokens.shape[-2:]
        if max(height, width) > self.side:
            raise ValueError(
                f"This network knows places in a grid of {self.side} x {self.side} patches; "
                f"the picture has {height} x {width}."
            )
        top, left = (self.side - height) // 2, (self.side - width) // 2
        grid = self.pos_embed.unflatten(1, (self.side, self.side))  # type: ignore[operator]
        places = grid[:, top : top + height, left : left + width].flatten(1, 2)
        return (tokens.flatten(2).transpose(1, 2) + places).to(tokens.dtype)


class PooledProjection(nn.Module):
    """Pooled text to the width of the network."""

    def __init__(self, pooled: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(pooled, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, P) to (B, D)."""
        return self.linear_2(functional.silu(self.linear_1(pooled)))


class TimeAndText(nn.Module):
    """Time and pooled text as one vector."""

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, width)
        self.text_embedder = PooledProjection(pooled, width)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        """(B,) and (B, P) to (B, D)."""
        time = sinusoidal(t, 256, cosine_first=True, shift=0).to(pooled.dtype)
        return self.timestep_embedder(time) + self.text_embedder(pooled)


class Modulation(nn.Module):
    """Vectors for shifting, scaling and gating, from time and text (Peebles & Xie 2023, adaLN)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, emb: Tensor) -> Sequence[Tensor]:
        """(B, D) to `count` vectors (B, 1, D)."""
        return self.linear(functional.silu(emb))[:, None].chunk(self.count, -1)


def normal(x: Tensor) -> Tensor:
    """Layer norm without weights."""
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class Perceptron(nn.Module):
    """A layer four times as wide, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, 4 * width)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        inner: Tensor = self.net[0].proj(x)  # type: ignore[operator]
        return self.net[2](functional.gelu(inner, approximate="tanh"))


class JointAttention(nn.Module):
    """Image tokens, and text tokens where there are any, attend to each other, with projections of their own."""

    def __init__(self, width: int, heads: int, *, qk_norm: str | None, text: bool = False, last: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        if text and not last:
            self.to_add_out = nn.Linear(width, width)
        if qk_norm is not None and qk_norm not in NORMS:
            raise CheckpointError(f"Attention with qk_norm={qk_norm!r} is not supported.")
        self.normed = qk_norm is not None
        if qk_norm is not None:
            for name in ("norm_q", "norm_k", *(("norm_added_q", "norm_added_k") if text else ())):
                self.add_module(name, NORMS[qk_norm](width // heads, eps=1e-6))

    def forward(self, x: Tensor, text: Tensor | None = None, mask: Mask = None) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) and (B, T, D) to the same.

        As in the reference implementation, queries and keys go without their norms where a row's picture is apart.
        """
        normed = self.normed and not isinstance(mask, Apart)
        q, k, v = self._heads(x, (self.to_q, self.to_k, self.to_v), ("norm_q", "norm_k") if normed else ())
        if text is not None:
            norms = ("norm_added_q", "norm_added_k") if normed else ()
            words = self._heads(text, (self.add_q_proj, self.add_k_proj, self.add_v_proj), norms)
            q, k, v = (torch.cat(both, 2) for both in zip((q, k, v), words, strict=True))
        mixed = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        image, rest = mixed[:, : x.shape[1]], mixed[:, x.shape[1] :]
        seen = text is not None and hasattr(self, "to_add_out")
        return self.to_out[0](image), self.to_add_out(rest) if seen else None

    def _heads(self, x: Tensor, projections: Sequence[nn.Module], norms: Sequence[str]) -> list[Tensor]:
        """Queries, keys and values (B, H, L, D / H)."""
        made = [project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in projections]
        for k, name in enumerate(norms):
            made[k] = self.get_submodule(name)(made[k])
        return made


class JointBlock(nn.Module):
    """A transformer block over image and text; the last one of a network drops the text."""

    def __init__(self, width: int, heads: int, qk_norm: str | None, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.norm1 = Modulation(width, 9 if dual else 6)
        self.norm1_context = Modulation(width, 2 if last else 6)
        self.attn = JointAttention(width, heads, qk_norm=qk_norm, text=True, last=last)
        self.attn2 = JointAttention(width, heads, qk_norm=qk_norm) if dual else None
        self.ff = Perceptron(width)
        self.ff_context = None if last else Perceptron(width)

    def forward(self, x: Tensor, text: Tensor, emb: Tensor, mask: Mask = None) -> tuple[Tensor, Tensor]:
        """(B, N, D), (B, T, D) and (B, D) to the next tokens of the image and of the text."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = self.norm1(emb)
        flat = normal(x)
        own = self.norm1_context(emb)
        words = normal(text) * (1 + own[0]) + own[1] if self.last else normal(text) * (1 + own[1]) + own[0]
        mixed, mixed_words = self.attn(flat * (1 + scale) + shift, words, mask)
        x = x + gate * mixed
        if self.attn2 is not None:
            x = x + second[2] * self.attn2(flat * (1 + second[1]) + second[0])[0]
        x = x + ff_gate * self.ff(normal(x) * (1 + ff_scale) + ff_shift)
        if self.ff_context is None:
            return x, text
        text = text + own[2] * mixed_words
        return x, text + own[5] * self.ff_context(normal(text) * (1 + own[4]) + own[3])


class ImageBlock(nn.Module):
    """A transformer block over the image alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = Modulation(width, 6)
        self.attn = JointAttention(width, heads, qk_norm=None)
        self.ff = Perceptron(width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, N, D) and (B, D) to (B, N, D)."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1(emb)
        x = x + gate * self.attn(normal(x) * (1 + scale) + shift)[0]
        return x + ff_gate * self.ff(normal(x) * (1 + ff_scale) + ff_shift)


class SD3Transformer2DModel(Network):
    """The transformer of Stable Diffusion 3; in 3.5 some blocks attend twice, and queries and keys are normed."""

    attentions = ("transformer_blocks.attn",)

    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
    ) -> None:
        width, heads = num_attention_heads * attention_head_dim, num_attention_heads
        _check_widths(width, caption_projection_dim)
        self.pos_embed = Patches(in_channels, width, patch_size, pos_embed_max_size, sample_size // patch_size)
        self.time_text_embed = TimeAndText(width, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, caption_projection_dim)
        self.transformer_blocks = nn.ModuleList(
            [
                JointBlock(width, heads, qk_norm, dual=k in dual_attention_layers, last=k == num_layers - 1)
                for k in range(num_layers)
            ]
        )
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * (out_channels or in_channels))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        residuals: Sequence[Tensor] = (),
        skipped: Tensor | None = None,
        perturbed: Tensor | None = None,
    ) -> Tensor:
        """The velocity at x.

        Args:
            x: latents (B, C, h, w).
            t: times (B,), 0..1000.
            encoder_hidden_states: text (B, T, joint_attention_dim).
            pooled_projections: pooled text (B, pooled_projection_dim).
            residuals: (B, N, D) each, of a ControlNet, dealt out evenly over the blocks.
            skipped: (B, blocks), which of the blocks each row goes without.
            perturbed: (B, blocks), in which of the blocks the image tokens of a row don't see each other.
        """
        height, width = (side // self.config.patch_size for side in x.shape[-2:])
        tokens, emb = self.pos_embed(x), self.time_text_embed(t, pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        skips = _columns(skipped)
        each = masks(len(self.transformer_blocks), None, perturbed, slice(tokens.shape[1]))
        for k, block in enumerate(self.transformer_blocks):
            if k in skips:
                tokens, text = _for_rows(block, ~skips[k], tokens, text, emb)
            else:
                tokens, text = block(tokens, text, emb, each[k])
            if residuals and k < len(self.transformer_blocks) - 1:
                tokens = tokens + residuals[int(k / (len(self.transformer_blocks) / len(residuals)))]
        scale, shift = self.norm_out(emb)
        return joined_patches(
            self.proj_out(normal(tokens) * (1 + scale) + shift), height, width, self.config.patch_size
        )


def joined_patches(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Tokens of height x width patches, (B, N, patch * patch * C), to latents (B, C, h, w)."""
    squares = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))
    return squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _check_widths(width: int, text: int) -> None:
    if width != text:
        raise CheckpointError(f"The width {width} of the network and that of its text, {text}, differ.")


def _columns(marks: Tensor | None) -> dict[int, Tensor]:
    """The columns of (B, blocks) in which any row is marked, by number."""
    if marks is None:
        return {}
    return {k: marks[:, k] for k, some in enumerate(marks.any(0).tolist()) if some}


def _for_rows(block: nn.Module, rows: Tensor, x: Tensor, text: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
    """A block for some of the rows; the others stay as they are."""
    x, text = x.clone(), text.clone()
    if rows.any():
        x[rows], text[rows] = block(x[rows], text[rows], emb[rows])
    return x, text


class SD3ControlNetModel(Network):
    """A copy of the first blocks that also sees a picture's latents, and gives a residual for each block."""

    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int | None = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        extra_conditioning_channels: int = 0,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        pos_embed_type: str | None = "sincos",
        use_pos_embed: bool = True,
        force_zeros_for_pooled_projection: bool = True,
    ) -> None:
        width, heads = num_attention_heads * attention_head_dim, num_attention_heads
        side = pos_embed_max_size if pos_embed_type == "sincos" else None
        base = sample_size // patch_size
        self.pos_embed = Patches(in_channels, width, patch_size, side, base) if use_pos_embed else None
        self.time_text_embed = TimeAndText(width, pooled_projection_dim)
        if joint_attention_dim is None:
            self.context_embedder = None
            blocks: list[nn.Module] = [ImageBlock(width, heads) for _ in range(num_layers)]
        else:
            _check_widths(width, caption_projection_dim)
            self.context_embedder = nn.Linear(joint_attention_dim, caption_projection_dim)
            blocks = [JointBlock(width, heads, qk_norm, k in dual_attention_layers) for k in range(num_layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.controlnet_blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(num_layers)])
        self.pos_embed_input = Patches(in_channels + extra_conditioning_channels, width, patch_size)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        control: Tensor,
        pooled_projections: Tensor,
        encoder_hidden_states: Tensor,
        patches: Patches,
    ) -> list[Tensor]:
        """Residuals (B, N, D), one a block.

        Args:
            x: latents (B, C, h, w).
            t: times (B,), 0..1000.
            control: latents of the picture to follow, and for inpainting the mask, (B, C + extra, h, w).
            pooled_projections: pooled text (B, P).
            encoder_hidden_states: text (B, T, E), for networks that look at it.
            patches: those of the transformer, for networks without their own.
        """
        tokens = (patches if self.pos_embed is None else self.pos_embed)(x) + self.pos_embed_input(control)
        emb = self.time_text_embed(t, pooled_projections)
        text = None if self.context_embedder is None else self.context_embedder(encoder_hidden_states)
        residuals: list[Tensor] = []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            if text is None:
                tokens = block(tokens, emb)
            else:
                tokens, text = block(tokens, text, emb)
            residuals.append(out(tokens))
        return residuals


class SD3MultiControlNetModel(MultiControlNetModel):
    """Several ControlNets for one transformer."""

    member = SD3ControlNetModel
