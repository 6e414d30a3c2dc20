"""ControlNets for Z-Image (Alibaba PAI 2025): blocks beside some of the transformer's, which they correct.

They share the transformer's embeddings and the refinement of text and picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autopipeline.models.network import Network
from autopipeline.models.z_image import PATCH, Block, Streams, patches, refined

SHARED = ("all_x_embedder", "cap_embedder", "context_refiner", "noise_refiner", "t_embedder", "x_pad", "cap_pad")
"""What the transformer has; folders saved with it hold a second copy."""


class ControlBlock(Block):
    """A block on the control stream; the `first` one takes the transformer's stream in, all give a correction."""

    def __init__(self, width: int, heads: int, eps: float, normed: bool, first: bool) -> None:
        super().__init__(width, heads, eps, normed)
        self.before_proj = nn.Linear(width, width) if first else None
        self.after_proj = nn.Linear(width, width)


def walked(
    blocks: Iterable[Any], control: Tensor, x: Tensor, table: Tensor, mask: Tensor | None, time: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The corrections of all blocks, and the control stream (B, L, D) behind them."""
    made: list[Tensor] = []
    for block in blocks:
        if block.before_proj is not None:
            control = block.before_proj(control) + x
        control = block(control, table, mask, time)
        made.append(block.after_proj(control))
    return made, control


class ZImageControlNetModel(Network):
    """Corrections for some of a transformer's blocks, from latents of a picture (and of what else it was taught).

    `add_control_noise_refiner`: the picture is refined with corrections as well, by the same blocks or by its own.
    """

    def __init__(
        self,
        control_layers_places: Sequence[int] | None = None,
        control_refiner_layers_places: Sequence[int] | None = None,
        control_in_dim: int | None = None,
        add_control_noise_refiner: str | None = None,
        all_patch_size: tuple[int, ...] = (2,),
        all_f_patch_size: tuple[int, ...] = (1,),
        dim: int = 3840,
        n_refiner_layers: int = 2,
        n_heads: int = 30,
        n_kv_heads: int = 30,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
    ) -> None:
        sizes = list(zip(all_patch_size, all_f_patch_size, strict=True))
        if not control_layers_places or control_layers_places[0] != 0 or not control_in_dim or (2, 1) not in sizes:
            raise ValueError("it needs control_layers_places from 0 on, control_in_dim, and patches of 2 x 2 latents")
        if add_control_noise_refiner not in (None, "control_layers", "control_noise_refiner"):
            raise ValueError(f"add_control_noise_refiner={add_control_noise_refiner!r} is not known")
        kind = (dim, n_heads, norm_eps, qk_norm)
        self.control_layers = nn.ModuleList([ControlBlock(*kind, first=k == 0) for k in control_layers_places])
        self.control_all_x_embedder = nn.ModuleDict(
            {f"{side}-{frames}": nn.Linear(side * side * frames * control_in_dim, dim) for side, frames in sizes}
        )
        self.control_noise_refiner: nn.ModuleList | None = None
        if add_control_noise_refiner is None:
            self.control_noise_refiner = nn.ModuleList([Block(*kind) for _ in range(n_refiner_layers)])
        elif add_control_noise_refiner == "control_noise_refiner":
            self.control_noise_refiner = nn.ModuleList(
                [ControlBlock(*kind, first=k == 0) for k in range(n_refiner_layers)]
            )

    @classmethod
    def renamed(cls, key: str) -> str | None:
        """The key itself; None for what is the transformer's."""
        return None if key.startswith(SHARED) else key

    def forward(
        self, before: Streams, *, control: Tensor, scale: Tensor, refiner: nn.ModuleList, fill: Tensor
    ) -> dict[int, Tensor]:
        """Corrections (B, X + T, D) by the numbers of the blocks that they come after.

        `control` (B, control_in_dim, h, w), with strengths (B,); `refiner` and `fill` are the transformer's.
        """
        rows = patches(control, self.control_all_x_embedder[PATCH], fill)
        table, time = before.table[:, : rows.shape[1]], before.time
        strength = scale.to(rows)[:, None, None]
        picture, own = before.picture, self.control_noise_refiner
        if self.config.add_control_noise_refiner is not None:
            blocks = self.control_layers if own is None else own
            hints, rows = walked(blocks, rows, before.plain, table, None, time)
            places: Sequence[int] = self.config.control_refiner_layers_places or ()
            added = {k: hint * strength for k, hint in zip(places, hints, strict=False)}
            picture = refined(refiner, before.plain, table, time, added)
        elif own is not None:
            rows = refined(own, rows, table, time)
        joint, beside = (torch.cat([each, before.text], 1) for each in (picture, rows))
        hints, _ = walked(self.control_layers, beside, joint, before.table, before.mask, time)
        return {k: hint * strength for k, hint in zip(self.config.control_layers_places, hints, strict=True)}
