"""Getting a pipeline's networks ready for the CPU: at its calls; undone by itself where weights are wanted plain."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from autopipeline.speed import attention, chunks, compiling, heap, packing, swapped

OFF = "AUTOPIPELINE_PLAIN"
"""Set to 1 in the environment, networks stay as they are."""
LARGE = 1 << 24
"""Numbers of weights below which a network is quick anyway."""
_LOCK = threading.Lock()


@contextmanager
def ready(parts: Iterable[Any]) -> Generator[None]:
    """Have the networks on the CPU among these parts compute faster; the same, but for the order of summation."""
    with heap.kept() if prepare(parts) else nullcontext():
        yield


def prepare(parts: Iterable[Any]) -> int:
    """Change large networks on the CPU for the better; gives how many are so by now."""
    if os.environ.get(OFF, "0") not in ("", "0"):
        return 0
    count = 0
    with _LOCK:
        for network in parts:
            weights = list(network.parameters()) if isinstance(network, torch.nn.Module) else []
            large = sum(each.numel() for each in weights) >= LARGE
            if weights and large and weights[0].device.type == "cpu" and not compiling.compiled(network):
                attention.install()
                packing.pack(network)
                chunks.chunk(network)
                count += 1
    return count


def restore(parts: Iterable[Any]) -> None:
    """The networks as they were; the next call prepares them again."""
    with _LOCK:
        for network in parts:
            if isinstance(network, torch.nn.Module):
                swapped.restore(network)
