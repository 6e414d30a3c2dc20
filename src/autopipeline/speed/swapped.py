"""A module that changed its class for a faster one of the same result, and goes back by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class Swapped(nn.Module):
    """Plain again where its weights are to be moved, cast, loaded, copied or trained."""

    plain: type[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `forward` gives; where gradients are wanted, the plain one's, as only that has them."""
        if torch.is_grad_enabled():
            self.restore()
            return self(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def restore(self) -> None:
        """Be of the plain class again."""
        self.__class__ = self.plain  # type: ignore[assignment]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.restore()
        return self._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.restore()
        self._load_from_state_dict(*args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        self.restore()
        return copy.deepcopy(self, memo)


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Be of another class, with the same attributes."""
    module.__class__ = kind


@cache
def mixed(kind: type[Swapped], plain: type[nn.Module]) -> type[nn.Module]:
    """`plain`, by its own name, with what `kind` does otherwise."""
    return type(plain.__name__, (kind, plain), {"plain": plain, "__module__": plain.__module__})


def restore(network: nn.Module, kinds: tuple[type[Swapped], ...] = (Swapped,)) -> None:
    """Have those modules of a network be plain again that are of these kinds."""
    for module in network.modules():
        if isinstance(module, kinds):
            module.restore()  # type: ignore[operator]
