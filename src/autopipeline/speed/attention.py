"""Attention on the CPU by the fastest way for its shape: torch's, or tile by tile with matrix products of oneDNN.

torch's own is written for the vector instructions of every processor; where a processor multiplies matrices faster than
that (bfloat16 with AVX-512, say), products of whole tiles win by a factor. Which way it is, is tried out once. In
bfloat16 the scores of a tile are rounded to it, as torch's are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from autopipeline.models import attention
from autopipeline.speed import machine, packing

Way = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (n, D), keys (K, D) and values turned (E, K) to (n, E)."""

TILE = 1 << 21
"""Scores that are computed together: they stay in the processor's cache."""
LEAST = 1 << 16
"""Scores of a head below which it is not worth the trouble."""


def install() -> None:
    """From now on, attention on the CPU goes the fastest way. Results differ by the order of summation alone."""
    attention.use(attend)


def remove() -> None:
    """Attention by torch alone, as before."""
    attention.use(None)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """As `models.attention.attend`; what can't be told apart or is not on the CPU goes torch's way."""
    traced = torch._C._get_tracing_state() is not None  # type: ignore[reportPrivateUsage]
    plain = not causal and q.device.type == "cpu" and not torch.is_grad_enabled() and not traced
    if plain and _of_keys(mask) and q.shape[2] * k.shape[2] >= LEAST and q.dtype in (torch.float32, torch.bfloat16):
        key = _key(q, k)
        way = _chosen.get(key) or machine.fastest(key, _tries(q, k, v))
        _chosen[key] = way
        if way != "torch":
            return tiled(q, k, v, mask, scale, WAYS[way])
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def _of_keys(mask: Tensor | None) -> bool:
    """Whether it says for each row which keys are seen, some of them at least: the others may as well be left out."""
    if mask is None:
        return True
    return mask.dtype == torch.bool and mask.shape[1:3] == (1, 1) and bool(mask.any(-1).all())


_chosen: dict[str, str] = {}


def _key(q: Tensor, k: Tensor) -> str:
    """Lengths count roughly: what is fastest changes slowly with them."""
    lengths = " ".join(str(1 << (length - 1).bit_length()) for length in (q.shape[2], k.shape[2]))
    return f"attention {q.dtype} {lengths} {q.shape[3]}"


def _tries(q: Tensor, k: Tensor, v: Tensor) -> Mapping[str, Callable[[], Tensor]]:
    q, k, v = (each[:1, :2].contiguous() for each in (q, k, v))  # two heads, as there are at least two cores
    ways = WAYS if packing.able(q.dtype) else {"products": _products}
    plain = partial(functional.scaled_dot_product_attention, q, k, v)
    return {"torch": plain} | {name: partial(tiled, q, k, v, None, None, way) for name, way in ways.items()}


def tiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, way: Way) -> Tensor:
    """Attention over (B, heads, L, D), some queries of one head at a time; `mask` (B, 1, 1, K) tells keys."""
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    made = q.new_empty(*q.shape[:3], v.shape[3])
    for row in range(q.shape[0]):
        seen = slice(None) if mask is None else mask[row if len(mask) > 1 else 0, 0, 0]
        for head in range(q.shape[1]):
            queries, keys, values = q[row, head], k[row, head, seen].contiguous(), v[row, head, seen].t().contiguous()
            tile = max(TILE // len(keys), 1)
            for begin in range(0, len(queries), tile):
                made[row, head, begin : begin + tile] = way(queries[begin : begin + tile], keys, values)
    return made


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = functional.linear(q, k)
    return functional.linear(torch.softmax(scores, -1, out=scores), v)


def _onednn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _linear(q, k, None, "none", [], "")
    return _linear(torch.softmax(scores, -1, out=scores), v, None, "none", [], "")


def _opaque(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With tensors of oneDNN's own, for which the softmax is oneDNN's as well."""
    scores = torch.ops.aten.mkldnn_linear(q.to_mkldnn(), k, None)
    return torch.ops.aten.mkldnn_linear(scores.softmax(-1), v, None).to_dense()


_linear: Callable[..., Tensor] = getattr(torch.ops.mkldnn, "_linear_pointwise", functional.linear)
WAYS: dict[str, Way] = {"products": _products, "onednn": _onednn, "opaque": _opaque}
