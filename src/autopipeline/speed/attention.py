"""Attention on the CPU by the fastest way for its shape: torch's, or tile by tile with matrix products of oneDNN.

torch's own is written for the vector instructions of every processor; where a processor multiplies matrices faster than
that (bfloat16 with AVX-512, say), products of whole tiles win by a factor. Which way it is, is tried out once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline.models import attention
from autopipeline.speed import machine, packing

Product = Callable[[Tensor, Tensor], Tensor]

TILE = 512
"""Queries whose scores are computed together."""
LEAST = 1 << 18
"""Scores of a head below which it is not worth the trouble."""


def install() -> None:
    """From now on, attention on the CPU goes the fastest way. Results differ by the order of summation alone."""
    attention.use(attend)


def remove() -> None:
    """Attention by torch alone, as before."""
    attention.use(None)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """As `models.attention.attend`; what can't be told apart or is not on the CPU goes torch's way."""
    plain = mask is None and not causal and q.device.type == "cpu" and not torch.is_grad_enabled()
    if plain and q.shape[2] * k.shape[2] >= LEAST and q.dtype in (torch.float32, torch.bfloat16):
        key = _key(q, k)
        way = _chosen.get(key) or machine.fastest(key, _tries(q, k, v))
        _chosen[key] = way
        if way != "torch":
            return tiled(q, k, v, scale, WAYS[way])
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


_chosen: dict[str, str] = {}


def _key(q: Tensor, k: Tensor) -> str:
    """Lengths count roughly: what is fastest changes slowly with them."""
    lengths = " ".join(str(1 << (length - 1).bit_length()) for length in (q.shape[2], k.shape[2]))
    return f"attention {q.dtype} {lengths} {q.shape[3]}"


def _tries(q: Tensor, k: Tensor, v: Tensor) -> Mapping[str, Callable[[], Tensor]]:
    q, k, v = (each[:1, :2].contiguous() for each in (q, k, v))  # two heads, as there are at least two cores
    ways = [way for name, way in WAYS.items() if name != "onednn" or packing.able(q.dtype)]
    plain = partial(functional.scaled_dot_product_attention, q, k, v)
    return {"torch": plain} | {name: partial(tiled, q, k, v, None, way) for name, way in zip(WAYS, ways, strict=False)}


def tiled(q: Tensor, k: Tensor, v: Tensor, scale: float | None, product: Product) -> Tensor:
    """Attention over (B, heads, L, D), so many queries of one head at a time; `product` is x times a matrix turned."""
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    made = q.new_empty(*q.shape[:3], v.shape[3])
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            queries, keys, values = (each[row, head] for each in (q, k, v))
            keys, values = keys.contiguous(), values.t().contiguous()
            for begin in range(0, len(queries), TILE):
                scores = product(queries[begin : begin + TILE], keys).mul_(factor)
                weights = scores.float().softmax(-1).to(v.dtype) if v.dtype != torch.float32 else scores.softmax(-1)
                made[row, head, begin : begin + TILE] = product(weights, values)
    return made


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


WAYS: dict[str, Product] = {"products": functional.linear, "onednn": _onednn}
