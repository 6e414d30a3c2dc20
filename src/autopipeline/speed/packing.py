"""Convolutions and linear layers with their weights in the order that oneDNN computes in.

torch brings a weight into that order at every call. A packed module has it so once and for all, and its pictures with
the channels last. It goes back to what it was by itself where its weights are wanted: to be moved, cast, replaced or
trained; `state_dict` gives them as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.speed import machine
from autopipeline.speed.swapped import Swapped, become

ROWS = 1024
"""Of the input that a linear layer is packed for; others are as right, and hardly slower."""


class Packed(Swapped):
    """What both have in common."""

    def restore(self) -> None:
        """Be a plain module again, with the very same weights."""
        super().restore()
        weight: nn.Parameter = self.weight  # type: ignore[assignment]
        self.weight = nn.Parameter(_dense(weight), requires_grad=weight.requires_grad)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = _dense(self.weight)  # type: ignore[arg-type]


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution; the order of its weights is that for pictures of the size that it saw last."""

    plain = nn.Conv2d
    size: tuple[int, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, h, w), channels last in memory."""
        if torch.is_grad_enabled():
            self.restore()
            return self.forward(input)
        x = input.contiguous(memory_format=torch.channels_last)
        weight, form = self.weight, (self.padding, self.stride, self.dilation, self.groups)
        if self.size != x.shape[2:] or not weight.is_mkldnn:
            packed = torch.ops.mkldnn._reorder_convolution_weight(_dense(weight), *form, x.shape)
            weight = nn.Parameter(packed, requires_grad=weight.requires_grad)
            self.weight, self.size = weight, tuple(x.shape[2:])
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *form, "none", [], "")


def _dense(weight: Tensor) -> Tensor:
    return (weight.to_dense() if weight.is_mkldnn else weight).detach()


class PackedLinear(Packed, nn.Linear):
    """A linear layer."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if torch.is_grad_enabled():
            self.restore()
            return self.forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def able(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this precision here."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(network: nn.Module, always: bool = False) -> int:
    """Pack those layers of a network on the CPU for which it pays, or all; gives how many.

    Only layers of exactly torch's own classes: a subclass may use its weight otherwise.
    """
    count = 0
    for module in list(network.modules()):
        weight = getattr(module, "weight", None)
        if type(module) not in (nn.Conv2d, nn.Linear) or not _fits(weight):
            continue
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and isinstance(module.padding, tuple):
            _pack_convolution(module)
            count += 1
        elif type(module) is nn.Linear and (always or _linear_pays(module.weight.dtype)):
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), ROWS)
            _become(module, PackedLinear, packed)
            count += 1
    return count


def _fits(weight: Any) -> bool:
    whole = isinstance(weight, nn.Parameter) and weight.layout == torch.strided and weight.device.type == "cpu"
    return whole and able(weight.dtype) and len(weight) >= 16 and weight.shape[1] > 1 and type(weight) is nn.Parameter


def _pack_convolution(module: nn.Conv2d) -> None:
    """Its weights come into order when it first sees an input."""
    module.__class__ = PackedConv2d
    module.size = ()  # type: ignore[assignment]


def _become(module: nn.Module, kind: type[nn.Module], packed: Tensor) -> None:
    module.weight = nn.Parameter(packed, requires_grad=module.weight.requires_grad)  # type: ignore[union-attr]
    become(module, kind)


def _linear_pays(dtype: torch.dtype) -> bool:
    """Whether oneDNN is faster than what torch takes for linear layers, at a size that is common in networks."""
    x, weight = (torch.randn(ROWS, 640).to(dtype), torch.randn(640, 640).to(dtype))
    bias = torch.randn(640).to(dtype)

    def packed() -> Callable[[], Tensor]:
        made = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        return lambda: torch.ops.mkldnn._linear_pointwise(x, made, bias, "none", [], "")

    ways = {"plain": lambda: functional.linear(x, weight, bias), "packed": packed()}
    return machine.fastest(f"linear {dtype}", ways) == "packed"
