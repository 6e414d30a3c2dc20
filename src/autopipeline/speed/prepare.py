"""Getting a pipeline's networks ready for where they are, at its calls; undone where weights are wanted plain."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from autopipeline.models import awaited
from autopipeline.speed import attention, chunks, compiling, fusing, heap, packing, swapped

OFF = "AUTOPIPELINE_PLAIN"
"""Set to 1 in the environment, networks stay as they are."""
LARGE = 1 << 22
"""Numbers of weights below which a network is quick anyway, and preparing it takes longer than a picture."""
_LOCK = threading.Lock()


@contextmanager
def ready(parts: Iterable[Any]) -> Generator[None]:
    """Have the networks on the CPU among these parts compute faster; the same, but for rounding."""
    networks = _large(parts)
    with heap.kept() if any(_on(each, "cpu") for each in networks) else nullcontext():
        _prepare(networks)
        yield


def prepare(parts: Iterable[Any]) -> int:
    """Change large networks for the better; gives how many on the CPU are so by now."""
    return _prepare(_large(parts))


def _prepare(networks: Iterable[torch.nn.Module]) -> int:
    count = 0
    with _LOCK:
        for network in networks:
            if _on(network, "cpu"):
                attention.install()
                packing.pack(network)
                chunks.chunk(network)
                count += 1
            elif _on(network, "cuda"):
                channels_last(network)
                fusing.fuse(network)
    return count


def _large(parts: Iterable[Any]) -> list[torch.nn.Module]:
    """The networks among parts that preparing is for; what they compute with is not looked at, as it may wait."""
    if os.environ.get(OFF, "0") not in ("", "0"):
        return []
    networks = [each for each in parts if isinstance(each, torch.nn.Module) and not compiling.compiled(each)]
    return [each for each in networks if sum(one.numel() for one in awaited.parameters(each)) >= max(LARGE, 1)]


def _on(network: torch.nn.Module, device: str) -> bool:
    return next(awaited.parameters(network)).device.type == device


def channels_last(network: torch.nn.Module) -> int:
    """Have convolutions in half precision take pictures with the channels last, as tensor cores want; gives how many.

    What a convolution gives is in the order of its weights, so that all pictures of the network come to be so.
    """
    count = 0
    for module in network.modules():
        if type(module) is torch.nn.Conv2d and module.weight.dtype in (torch.float16, torch.bfloat16):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
            count += 1
    return count


def restore(parts: Iterable[Any]) -> None:
    """The networks as they were; the next call prepares them again."""
    with _LOCK:
        for network in parts:
            if isinstance(network, torch.nn.Module):
                swapped.restore(network, compiling.PREPARED)
