"""Weights in another precision: each written once, and what has been read of a file let go of.

So what stands in memory is the weights as wanted, and hardly more. Nearly all of the time is the system's, for handing
out memory.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 18
"""Numbers that are cast at a time where the way leads through float32."""


def cast(source: Tensor, dtype: torch.dtype, *, mapped: bool = False) -> Tensor:
    """The numbers of a tensor on the CPU as `dtype`; `mapped`: it lies in a file, whose pages are let go of.

    From one half precision to another torch casts number by number; through float32 it takes half the time.
    """
    made = torch.empty(source.shape, dtype=dtype)
    if source.dtype.itemsize == 2 and dtype.itemsize == 2:
        between = torch.empty(min(PIECE, source.numel()))
        for piece, out in zip(source.reshape(-1).split(PIECE), made.view(-1).split(PIECE), strict=True):
            out.copy_(between[: piece.numel()].copy_(piece))
    else:
        made.copy_(source)
    if mapped and sys.platform.startswith("linux"):
        _let_go(source)
    return made


def _let_go(tensor: Tensor) -> None:
    """Tell the system that these pages of a file aren't needed now; whoever reads them again gets them again."""
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes - begin) // page * page
    if length > 0:
        _madvise()(begin, length, mmap.MADV_DONTNEED)


@cache
def _madvise() -> Any:
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
