"""Linear layers and convolutions in eight bits: lossy, and only where a caller asks for it.

On the CPU, weights are rounded for each output channel and inputs for each call, and oneDNN multiplies the whole
numbers and scales what comes out in one pass, with the processor's own instructions where it has them (VNNI). The plain
weights stay beside them, so that all of it can be taken back. On a GPU torchao does the same, or with eight-bit floats,
in place of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autopipeline.models import awaited
from autopipeline.speed import compiling, swapped
from autopipeline.speed.chunks import in_parts
from autopipeline.speed.swapped import Swapped, become

KINDS = ("int8", "float8")
LEAST = 64
"""Channels on either side below which a layer stays as it is: the first and the last ones of a network, mostly."""
ROWS = 1 << 21
"""Numbers of an input that are rounded together by a linear layer: they stay in the processor's cache."""


class _Quantized(Swapped):
    """What both have in common: weights (out, ...) as whole numbers in oneDNN's order, and their steps."""

    whole: Tensor
    steps: Tensor
    zeros: Tensor  # the whole numbers that stand for nought

    def restore(self) -> None:
        """Be plain again, with the weights as they were."""
        super().restore()
        del self.whole, self.steps, self.zeros

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        made = super()._apply(fn, recurse)
        _quantized(self)
        return made

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        _quantized(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        made = super().__deepcopy__(memo)
        for each in (self, made):
            _quantized(each)
        return made


class QuantizedLinear(_Quantized, nn.Linear):
    """A linear layer."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return in_parts(self._rows, input, max(ROWS // self.in_features, 1), self.out_features)

    def _rows(self, x: Tensor) -> Tensor:
        weights = self.whole, self.steps, self.zeros, self.bias
        return torch.ops.onednn.qlinear_pointwise(*rounded(x), *weights, 1.0, 0, self.weight.dtype, "none", [], "")


class QuantizedConv2d(_Quantized, nn.Conv2d):
    """A convolution."""

    plain = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out, h, w), channels last in memory."""
        x = rounded(input.contiguous(memory_format=torch.channels_last))
        weights = self.whole, self.steps, self.zeros, self.bias
        form = (list(self.stride), list(self.padding), list(self.dilation), self.groups)  # type: ignore[arg-type]
        return torch.ops.onednn.qconv2d_pointwise(*x, *weights, *form, 1.0, 0, self.weight.dtype, "none", [], "")


def rounded(x: Tensor) -> tuple[Tensor, float, int]:
    """x as whole numbers of 0 to 255, what one of them stands for, and the one that stands for nought."""
    low, high = (float(each) for each in torch.aminmax(x))
    step = max(max(high, 0.0) - min(low, 0.0), 1e-12) / 255
    nought = round(-min(low, 0.0) / step)
    return (x.float() * (1 / step)).add_(nought + 0.5).clamp_(0, 255).to(torch.uint8), step, nought


def quantize(networks: Iterable[nn.Module], kind: str) -> int:
    """Have the large layers of networks compute in eight bits from now on; gives how many."""
    if kind not in KINDS:
        raise ValueError(f"quantize takes {' or '.join(KINDS)}, not {kind!r}.")
    count = 0
    for network in networks:
        if compiling.compiled(network):
            raise ValueError("Networks are quantized before they are compiled; compile(disable=True) takes that back.")
        swapped.restore(network)
        places = {each.device.type for each in network.parameters()}
        if places != {"cpu"}:
            count += _by_torchao(network, kind)
        elif kind != "int8":
            raise ValueError(f"{kind} is for GPUs, and the networks are on the CPU; int8 works here.")
        else:
            count += sum(_quantized(module) for module in list(network.modules()))
    return count


def plain_networks(networks: Iterable[nn.Module]) -> None:
    """The networks as they were; ValueError where torchao has put others in place of their weights."""
    for network in networks:
        if any(type(each).__module__.partition(".")[0] == "torchao" for each in awaited.parameters(network)):
            raise ValueError("torchao has replaced the weights; load the checkpoint again for the plain ones.")
        swapped.restore(network, (_Quantized,))


def quantized(network: nn.Module) -> bool:
    """Whether layers of it are, on the CPU."""
    return any(isinstance(module, _Quantized) for module in network.modules())


def _fits(module: nn.Module) -> bool:
    if type(module) not in (nn.Conv2d, nn.Linear):
        return False
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros"
        if not plain or isinstance(module.padding, str):
            return False
    assert isinstance(module, nn.Conv2d | nn.Linear)
    fits = module.weight.device.type == "cpu" and module.weight.dtype in (torch.float32, torch.bfloat16)
    return fits and min(module.weight.shape[:2]) >= LEAST


def _quantized(module: nn.Module) -> bool:
    if not _fits(module):
        return False
    weight: Tensor = module.weight.detach().float()  # type: ignore[union-attr]
    steps = weight.flatten(1).abs().amax(1).clamp_min(1e-12) / 127
    whole = (weight / steps.view(-1, *[1] * (weight.ndim - 1))).round_().to(torch.int8)
    if isinstance(module, nn.Conv2d):
        form = (list(module.stride), list(module.padding), list(module.dilation), module.groups)  # type: ignore[arg-type]
        module.whole = torch.ops.onednn.qconv_prepack(whole, steps, 1.0, 0, *form)  # type: ignore[assignment]
        kind: type[nn.Module] = QuantizedConv2d
    else:
        module.whole = torch.ops.onednn.qlinear_prepack(whole, None)  # type: ignore[assignment]
        kind = QuantizedLinear
    module.steps, module.zeros = steps, torch.zeros_like(steps, dtype=torch.int64)  # type: ignore[assignment]
    become(module, kind)
    return True


def _by_torchao(network: nn.Module, kind: str) -> int:
    try:
        from torchao import quantization  # type: ignore[import-not-found]
    except ImportError:
        raise ImportError("quantize on a GPU needs torchao: pip install 'autopipeline[torchao]'.") from None
    configs: dict[str, Any] = {
        "int8": quantization.Int8DynamicActivationInt8WeightConfig,
        "float8": quantization.Float8DynamicActivationFloat8WeightConfig,
    }
    chosen = [each for each in network.modules() if type(each) is nn.Linear and min(each.weight.shape) >= LEAST]
    ids = {id(each) for each in chosen}

    def wanted(module: nn.Module, name: str) -> bool:
        return id(module) in ids

    quantization.quantize_(network, configs[kind](), filter_fn=wanted)
    return len(chosen)
