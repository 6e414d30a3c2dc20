"""torch.compile for a pipeline's networks, block by block where a network is a row of blocks that are alike.

Blocks of one class share what was compiled for the first of them: the wait for a transformer of fifty blocks is that
for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from autopipeline.models import awaited
from autopipeline.speed import chunks, fusing, openvino, packing, swapped

ENGINES = ("torch", "openvino")
PREPARED = (packing.Packed, packing.PackedGate, chunks.Chunked, fusing.Fused)


def compiled(network: nn.Module) -> bool:
    """Whether anything of it is, or goes by another engine."""
    return any(
        module._compiled_call_impl is not None or isinstance(module, openvino.Translated)  # type: ignore[reportPrivateUsage]
        for module in network.modules()
    )


def regions(network: nn.Module) -> Iterator[nn.Module]:
    """The parts that are compiled each by itself: the outermost lists of blocks of one class, else the whole."""
    found = [*_rows(network)]
    yield from found or [network]


def _rows(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        alike = isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(each) for each in child}) == 1
        if alike and not isinstance(child[0], nn.ModuleList | nn.Linear | nn.Conv2d | nn.Identity):  # type: ignore[index]
            yield from child  # type: ignore[misc]
        else:
            yield from _rows(child)


def compile_networks(networks: Sequence[nn.Module], engine: str = "torch", **options: Any) -> None:
    """Have them compiled at their next call; `options` are torch.compile's. A size that changes is compiled for once.

    The first time that a size differs, torch compiles for sizes in general, so that further ones cost nothing.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} has to be one of {', '.join(ENGINES)}.")
    if engine == "openvino":
        if options:
            raise TypeError(f"{next(iter(options))} is an option of torch.compile; OpenVINO has none.")
        plain_networks(networks)
    for network in networks:
        swapped.restore(network, PREPARED)
        awaited.settle(network)
    if engine == "openvino":
        for network in networks:
            openvino.translate(network)
        return
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)  # type: ignore[reportPrivateUsage]
    for network in networks:
        for part in regions(network):
            part.compile(**options)


def plain_networks(networks: Iterable[nn.Module]) -> None:
    """The networks as they were."""
    for network in networks:
        swapped.restore(network, (openvino.Translated,))
        for module in network.modules():
            module._compiled_call_impl = None  # type: ignore[reportPrivateUsage]
