"""Z-Image's transformer in sight of other pictures: their tokens, and what a vision encoder sees, stand beside x.

A text comes in pieces, each of which ends where a picture stands. Everything that does not depend on the time is made
once for a call. Shapes: T tokens of text, X of pictures (the one that is made last), S of the vision encoder, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline.models.attention import masks
from autopipeline.models.rotary import grid_places, rotary
from autopipeline.models.z_image import GROUP, PATCH, Clean, ZImageTransformer2DModel, filled, patches


class Look(NamedTuple):
    """A picture to look at."""

    latents: Tensor  # (1, C, h, w)
    seen: Tensor  # (rows, columns, E), by the vision encoder


class Sight(NamedTuple):
    """What stands beside x in one row."""

    words: Tensor  # (1, T, D), refined
    kept: Tensor  # (1, X - those of x, D), clean
    looks: Tensor  # (1, S, D), refined
    tables: tuple[Tensor, Tensor]  # of pictures (1, X, ., 2), of everything (1, T + X + S, ., 2)
    clean: tuple[Tensor, Tensor]  # which tokens are: (1, X, 1), (1, T + X + S, 1)


def sight(
    network: ZImageTransformer2DModel, pieces: Sequence[Tensor], looks: Sequence[Look], size: tuple[int, int]
) -> Sight:
    """Pieces of text (tokens, E), two more than pictures (one without any), and x of that size in latents."""
    starts, position = [], 1
    for piece in pieces:
        starts.append(position)
        position += len(piece) + 2  # a picture, and what is seen of it
    ends = [start + len(piece) for start, piece in zip(starts, pieces, strict=True)]
    words, word_places = _words(network, pieces, starts)
    kept = [words.new_zeros(1, 0, words.shape[2])]
    kept += [patches(look.latents, network.all_x_embedder[PATCH], network.x_pad_token) for look in looks]
    sizes = [(look.latents.shape[-2], look.latents.shape[-1]) for look in looks] + [size]
    pictures = [_padded(grid_places(h // 2, w // 2), end) for (h, w), end in zip(sizes, ends, strict=False)]
    seen, seen_places = _seen(network, looks, ends)
    dims, theta, device = network.config.axes_dims, network.config.rope_theta, words.device

    def table(places: Tensor) -> Tensor:
        return rotary(places, dims, theta)[None].to(device)

    for block in network.context_refiner:
        words = block(words, table(word_places))
    for block in network.siglip_refiner if looks else ():
        seen = block(seen, table(seen_places))
    among = _marked([len(each) for each in pictures], last=1)
    told = _marked([filled(len(piece)) for piece in pieces], last=2)
    sizes_seen = [filled(look.seen.shape[0] * look.seen.shape[1]) for look in looks]
    sighted = _marked([*sizes_seen, len(seen_places) - sum(sizes_seen)], last=1)
    whole = torch.cat([word_places, *pictures, seen_places])
    marks = tuple(each[None, :, None].to(device) for each in (among, torch.cat([told, among, sighted])))
    return Sight(words, torch.cat(kept, 1), seen, (table(torch.cat(pictures)), table(whole)), marks)  # type: ignore[arg-type]


def within_sight(
    network: ZImageTransformer2DModel, x: Tensor, t: Tensor, seen: Sight, perturbed: Tensor | None = None
) -> Tensor:
    """The velocity of latents (1, C, h, w) at the time (1,).

    `perturbed` (1, layers): in which of them the tokens of pictures see of these only themselves.
    """
    scale = network.config.t_scale
    time, bright = (network.t_embedder(each * scale).to(x.dtype) for each in (t, torch.ones_like(t)))
    own = patches(x, network.all_x_embedder[PATCH], network.x_pad_token)
    pictures = torch.cat([seen.kept, own], 1)
    for block in network.noise_refiner:
        pictures = block(pictures, seen.tables[0], None, time, Clean(bright, seen.clean[0]))
    joint = torch.cat([seen.words, pictures, seen.looks], 1)
    words, end = seen.words.shape[1], seen.words.shape[1] + pictures.shape[1]
    each = masks(len(network.layers), None, perturbed, slice(words, end))
    for block, mask in zip(network.layers, each, strict=True):
        joint = block(joint, seen.tables[1], mask, time, Clean(bright, seen.clean[1]))
    begin, (height, width) = words + seen.kept.shape[1], x.shape[-2:]
    return network.unpatched(joint[:, begin : begin + height * width // 4], time, height, width)


def _words(network: ZImageTransformer2DModel, pieces: Sequence[Tensor], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pieces (1, T, D), each filled up, and their places (T, 3).

    As users of a seed know it, a piece that is filled up leaves behind as many places at 0, which the next ones take.
    """
    rows: list[Tensor] = []
    places: list[Tensor] = []
    for piece, start in zip(pieces, starts, strict=True):
        more = filled(len(piece)) - len(piece)
        rows += [network.cap_embedder(piece), network.cap_pad_token.expand(more, -1)]
        places += [torch.arange(start, start + filled(len(piece))), torch.zeros(more, dtype=torch.long)]
    words = torch.cat(rows)[None]
    return words, functional.pad(torch.cat(places)[: words.shape[1], None], (0, 2))


def _seen(network: ZImageTransformer2DModel, looks: Sequence[Look], ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the vision encoder sees (1, S, D), and its places (S, 3): stretched over each picture's latents.

    Its channels and places are read in another order than they have, as the networks were trained.
    """
    if not looks:
        return network.x_pad_token[None, :0], torch.zeros(0, 3, dtype=torch.long)
    rows: list[Tensor] = []
    places: list[Tensor] = []
    for look, end in zip(looks, ends, strict=False):
        height, width, channels = look.seen.shape
        given = look.seen.permute(2, 0, 1).reshape(height * width, channels)
        more = filled(len(given)) - len(given)
        rows += [network.siglip_embedder(given), network.siglip_pad_token.expand(more, -1)]
        grid = grid_places(height, width).float()
        for axis, (count, side) in enumerate(zip((height, width), look.latents.shape[-2:], strict=True), 1):
            grid[:, axis] = grid[:, axis] / max(count - 1, 1) * (side - 1)
        places.append(_padded(grid.long(), end + 1))
    rows.append(network.siglip_pad_token.expand(GROUP, -1))  # of the picture that is made, nothing is seen
    places.append(torch.zeros(GROUP, 3, dtype=torch.long))
    return torch.cat(rows)[None], torch.cat(places)


def _padded(grid: Tensor, along: int) -> Tensor:
    """Places (N, 3) of a picture, moved along the first axis, then 0 for what fills it up."""
    moved = grid + torch.tensor([along, 0, 0])
    return functional.pad(moved, (0, 0, 0, filled(len(moved)) - len(moved)))


def _marked(lengths: Sequence[int], last: int) -> Tensor:
    """True for the tokens of all parts but so many last ones."""
    clean = len(lengths) - last
    return torch.cat([torch.full((length,), k < clean) for k, length in enumerate(lengths)])
