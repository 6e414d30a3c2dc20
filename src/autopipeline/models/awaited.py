"""Weights that stay in their file, in the precision that is stored there, until someone looks at them.

Casting writes all weights anew, and most are written anew at the first call as well, in the order that the processor
wants: so they are cast then, one after another, and those of a network that is never called not at all. Nobody sees
the stored ones but through `parameters` below: each way to a module's parameters casts them first.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autopipeline.models import casting

LEAST = 1 << 16
"""Numbers below which a tensor is cast at once."""
_LOCK = threading.RLock()


def _settled(name: str) -> Callable[..., Any]:
    """What a plain dictionary of the settled parameters has by that name."""

    def method(self: Awaited, *args: Any) -> Any:
        return getattr(self.settle(), name)(*args)

    return method


class Awaited(dict[str, Any]):
    """A module's parameters; the plain dictionary of them takes its place as soon as one is looked at."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module._parameters)  # type: ignore[reportPrivateUsage]
        self.waiting: dict[str, torch.dtype] = {}
        self._module = weakref.ref(module)

    def settle(self) -> dict[str, Any]:
        """Cast those that wait, and have the module hold plain parameters."""
        with _LOCK:
            for name, dtype in [*self.waiting.items()]:
                stored: Tensor = super().__getitem__(name)
                cast = casting.cast(stored.detach(), dtype, mapped=True)
                self[name] = nn.Parameter(cast, requires_grad=stored.requires_grad)  # which waits no more
            module = self._module()
            if module is not None and module.__dict__["_parameters"] is self:
                module.__dict__["_parameters"] = dict(super().items())
        return dict(super().items())

    __getitem__ = _settled("__getitem__")
    get = _settled("get")
    items = _settled("items")
    values = _settled("values")
    copy = _settled("copy")

    def __setitem__(self, name: str, parameter: Any) -> None:
        self.waiting.pop(name, None)
        super().__setitem__(name, parameter)

    def __delitem__(self, name: str) -> None:
        self.waiting.pop(name, None)
        super().__delitem__(name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (self.settle(),)


def put(module: nn.Module, name: str, stored: Tensor, dtype: torch.dtype) -> None:
    """Have a parameter wait, whose numbers lie in a mapped file."""
    own = module._parameters  # type: ignore[reportPrivateUsage]
    if not isinstance(own, Awaited):
        own = module.__dict__["_parameters"] = Awaited(module)
    own[name] = nn.Parameter(stored)
    own.waiting[name] = dtype


def parameters(network: nn.Module) -> Iterator[Tensor]:
    """All that a network has, for their sizes and places: those that wait are in the precision that is stored."""
    for module in network.modules():
        yield from (each for each in dict.values(module._parameters) if each is not None)  # type: ignore[reportPrivateUsage]


def settle(network: nn.Module) -> None:
    """Cast all that wait, for those who look at parameters in ways of their own."""
    for module in network.modules():
        if isinstance(own := module._parameters, Awaited):  # type: ignore[reportPrivateUsage]
            own.settle()
