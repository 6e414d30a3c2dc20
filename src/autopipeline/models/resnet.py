"""Residual blocks and the changes of resolution between them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class ResnetBlock(nn.Module):
    """Two convolutions with norms, the time in between, and a way around them (He et al. 2016)."""

    def __init__(
        self, channels: int, out: int, time: int | None, *, groups: int, eps: float, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.scale = scale
        self.norm1 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, out) if time else None
        self.norm2 = nn.GroupNorm(groups, out, eps=eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(B, C, H, W) with the activated time embedding (B, T)."""
        h = self.conv1(functional.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(functional.silu(self.norm2(h)))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return (x + h) / self.scale


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
