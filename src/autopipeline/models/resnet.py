"""Residual blocks and the changes of resolution between them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.embeddings import ACTIVATIONS


class ResnetBlock(nn.Module):
    """Two convolutions with norms, the time in between, and a way around them (He et al. 2016).

    `modulated`: the time scales and shifts the second norm, in place of being added before it. `change`: the
    resolution changes in front of the first convolution, "up" or "down".
    """

    def __init__(
        self,
        channels: int,
        out: int,
        time: int | None,
        *,
        groups: int,
        eps: float,
        scale: float = 1.0,
        modulated: bool = False,
        activation: str = "silu",
        change: str | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.modulated, self.change = scale, modulated, change
        self.act = ACTIVATIONS[activation]()
        self.norm1 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, 2 * out if modulated else out) if time else None
        self.norm2 = nn.GroupNorm(groups, out, eps=eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, time: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) with the activated time embedding (B, T); upwards twice as large, or exactly `size`."""
        h = self.act(self.norm1(x))
        if self.change is not None:
            h, x = self._changed(h, size), self._changed(x, size)
        h = self.conv1(h)
        moved = self.time_emb_proj(time)[:, :, None, None] if self.time_emb_proj is not None else None
        if moved is not None and not self.modulated:
            h = h + moved
        h = self.norm2(h)
        if moved is not None and self.modulated:
            scale, shift = moved.chunk(2, 1)
            h = h * (1 + scale) + shift
        h = self.conv2(self.act(h))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return x + h if self.scale == 1 else (x + h) / self.scale

    def _changed(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        if self.change == "down":
            return functional.avg_pool2d(x, 2)
        return functional.interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest")


class Downsample(nn.Module):
    """Half the resolution; with padding 0 the last row and column are padded alone, as autoencoders do."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad = padding == 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2)."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)) if self.pad else x)


class Upsample(nn.Module):
    """Twice the resolution, or exactly `size`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W)."""
        scale = None if size else 2.0
        return self.conv(functional.interpolate(x, size=size, scale_factor=scale, mode="nearest"))
