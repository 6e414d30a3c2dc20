"""torch.compile for a pipeline's networks, block by block where a network is a row of blocks that are alike.

Blocks of one class share what was compiled for the first of them: the wait for a transformer of fifty blocks is that
for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from autopipeline.speed import swapped


def compiled(network: nn.Module) -> bool:
    """Whether anything of it is."""
    return any(module._compiled_call_impl is not None for module in network.modules())  # type: ignore[reportPrivateUsage]


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


def compile_networks(networks: Iterable[nn.Module], **options: Any) -> None:
    """Have them compiled at their next call; `options` are torch.compile's. A size that changes is compiled for once.

    The first time that a size differs, torch compiles for sizes in general, so that further ones cost nothing.
    """
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)  # type: ignore[reportPrivateUsage]
    for network in networks:
        swapped.restore(network)
        for part in regions(network):
            part.compile(**options)


def plain_networks(networks: Iterable[nn.Module]) -> None:
    """The networks as they were."""
    for network in networks:
        for module in network.modules():
            module._compiled_call_impl = None  # type: ignore[reportPrivateUsage]
