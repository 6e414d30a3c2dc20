"""Convolutions and linear layers with their weights in the order that oneDNN computes in.

torch brings a weight into that order at every call. A packed module has it so once and for all, and its pictures with
the channels last. It goes back to what it was by itself where its weights are wanted: to be moved, cast, replaced or
trained; `state_dict` gives them as ever.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import GatedLinear
from autopipeline.speed import machine, winograd
from autopipeline.speed.swapped import Swapped, become
from autopipeline.speed.winograd import ROWS, ordered


class Packed(Swapped):
    """What both have in common."""

    def restore(self) -> None:
        """Be a plain module again, with the very same weights."""
        weight, trained = self.whole(), self.weight.requires_grad  # type: ignore[union-attr]
        super().restore()
        self.weight = nn.Parameter(weight, requires_grad=trained)

    def whole(self) -> Tensor:
        """The weights as they were."""
        return _dense(self.weight)  # type: ignore[arg-type]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.whole()


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution; its weights are ready for pictures of the size that it saw last."""

    plain = nn.Conv2d
    size: tuple[int, ...] = ()
    spread: winograd.Spread | None = None  # of the weights, where it goes tile by tile

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, h, w), channels last in memory."""
        x = input.contiguous(memory_format=torch.channels_last)
        weight, spread, form = self.weight, self.spread, (self.padding, self.stride, self.dilation, self.groups)
        if self.size != x.shape[2:] or not weight.is_mkldnn:
            plain = _dense(weight)
            spread = winograd.spread(plain) if winograd.fits(self, *x.shape[2:]) and winograd.pays() else None
            packed = torch.ops.mkldnn._reorder_convolution_weight(plain, *form, x.shape)
            weight = nn.Parameter(packed, requires_grad=weight.requires_grad)
            self.weight, self.spread, self.size = weight, spread, tuple(x.shape[2:])
        if spread is not None:
            return winograd.convolve(x.permute(0, 2, 3, 1), spread, self.bias).permute(0, 3, 1, 2)
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *form, "none", [], "")

    def restore(self) -> None:
        """Be a plain module again, with the very same weights."""
        super().restore()
        self.spread = None


def _dense(weight: Tensor) -> Tensor:
    return (weight.to_dense() if weight.is_mkldnn else weight).detach()


class PackedLinear(Packed, nn.Linear):
    """A linear layer."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


class PackedHalves(Packed, nn.Linear):
    """A linear layer of which one half of what it gives is the gate of the other."""

    plain = nn.Linear
    rest: nn.Parameter
    """The weights of the second half; `weight` has those of the first."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        self.restore()
        return self.forward(input)

    def gated(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out / 2): the first half times what GELU makes of the second, as they are computed."""
        first, second = [None] * 2 if self.bias is None else self.bias.chunk(2)  # type: ignore[reportUnnecessaryComparison]
        gate = torch.ops.mkldnn._linear_pointwise(x, self.rest, second, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gate, self.weight, first, "mul")

    def restore(self) -> None:
        """Be a plain module again, with the very same weights."""
        super().restore()
        del self.rest

    def whole(self) -> Tensor:
        """The weights as they were."""
        return torch.cat([_dense(self.weight), _dense(self.rest)])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "rest"]


class PackedGate(Swapped, GatedLinear):
    """A gated layer over such a one."""

    plain = GatedLinear

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., inner)."""
        if not isinstance(self.proj, PackedHalves):
            self.restore()
            return self.forward(x)
        return self.proj.gated(x)


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
        layer = module.proj if type(module) is GatedLinear else module
        if type(layer) not in (nn.Conv2d, nn.Linear) or not _fits(layer.weight):
            continue
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple):
            _pack_convolution(layer)
            count += 1
        elif type(layer) is nn.Linear and (always or _linear_pays(layer.weight.dtype)):
            if type(module) is GatedLinear:
                _pack_gate(module)
            else:
                _become(layer, PackedLinear, ordered(layer.weight.detach()))
            count += 1
    return count


def _fits(weight: Any) -> bool:
    whole = isinstance(weight, nn.Parameter) and weight.layout == torch.strided and weight.device.type == "cpu"
    return whole and able(weight.dtype) and len(weight) >= 16 and weight.shape[1] > 1 and type(weight) is nn.Parameter


def _pack_convolution(module: nn.Conv2d) -> None:
    """Its weights come into order when it first sees an input."""
    module.size = ()  # type: ignore[assignment]
    become(module, PackedConv2d)


def _pack_gate(module: GatedLinear) -> None:
    """Its one layer becomes two."""
    first, second = (ordered(half.contiguous()) for half in module.proj.weight.detach().chunk(2))
    module.proj.rest = nn.Parameter(second, requires_grad=module.proj.weight.requires_grad)
    _become(module.proj, PackedHalves, first)
    become(module, PackedGate)


def _become(module: nn.Module, kind: type[nn.Module], packed: Tensor) -> None:
    module.weight = nn.Parameter(packed, requires_grad=module.weight.requires_grad)  # type: ignore[union-attr]
    become(module, kind)


def _linear_pays(dtype: torch.dtype) -> bool:
    """Whether oneDNN is faster than what torch takes for linear layers, at a size that is common in networks."""
    sample = cache(lambda: _linear(dtype))  # made only if it is tried
    ways = {
        "plain": lambda: functional.linear(*sample()[:3]),
        "packed": lambda: torch.ops.mkldnn._linear_pointwise(sample()[0], sample()[3], sample()[2], "none", [], ""),
    }
    return machine.fastest(f"linear {dtype}", ways) == "packed"


def _linear(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((ROWS, 640), (640, 640), (640,)))
    return x, weight, bias, ordered(weight)
