"""The precision that this machine computes well, for what a checkpoint stores: what `dtype="auto"` stands for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from autopipeline.speed import machine, packing

SMALL = 1 << 24
"""Numbers of weights up to which networks stay exact."""
SIZE = 1024
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
LOG = logging.getLogger("autopipeline")


def stored(folders: Iterable[Path]) -> Counter[torch.dtype]:
    """How many numbers are stored in which precision, by the headers of the safetensors files in these folders."""
    found: Counter[torch.dtype] = Counter()
    for file in (file for folder in folders for file in sorted(folder.glob("*.safetensors"))):
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    part = opened.get_slice(name)
                    if part.get_dtype() in STORED:
                        found[STORED[part.get_dtype()]] += torch.Size(part.get_shape()).numel()
        except (SafetensorError, OSError, ValueError):
            continue  # loading says what is wrong with it
    return found


def chosen(numbers: Counter[torch.dtype], device: torch.device) -> torch.dtype:
    """The precision to load in.

    On the CPU bfloat16 where that is faster than float32 by a third, as measured; never float16, which CPUs convert
    number by number. On a GPU as most numbers are stored, and bfloat16, where it computes that, for float32.
    """
    most = max(numbers, key=numbers.__getitem__, default=torch.float32)
    if device.type == "cpu":
        made = torch.bfloat16 if numbers.total() > SMALL and halves_pay() else torch.float32
    elif device.type == "cuda" and most == torch.float32 and numbers.total() > SMALL:
        made = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    else:
        made = most
    LOG.info("Loading in %s on %s; most weights are stored in %s.", made, device, most)
    return made


def halves_pay() -> bool:
    """Whether matrices are multiplied faster in bfloat16 than in float32 here, by a third at least."""
    if not packing.able(torch.bfloat16):
        return False
    ways = {
        name: partial(torch.mm, *(torch.randn(SIZE, SIZE).to(getattr(torch, name)) for _ in range(2)))
        for name in ("float32", "bfloat16")
    }
    return machine.fastest("precision", ways, margin=4 / 3) == "bfloat16"
