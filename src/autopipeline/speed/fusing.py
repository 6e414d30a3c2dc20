"""Queries, keys and values of the U-Nets' self-attentions as one product, for GPUs; on CPUs it is no gain.

The three layers stay, with parts of one tensor for weights, so that nothing is stored twice and what happens to them in
place holds for the product as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopipeline.models.attention import Attention
from autopipeline.speed.swapped import Swapped, become


class Fused(Swapped, Attention):
    """An attention whose three weights lie one after another in `whole` (3 C, C)."""

    plain = Attention
    whole: Tensor

    def projected(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the plain one; by itself where the layers are no longer those that were fused."""
        layers = (self.to_q, self.to_k, self.to_v)
        places = [part.data_ptr() for part in self.whole.chunk(3)]
        same = source is x and all(type(each) is nn.Linear for each in layers)
        if not same or [each.weight.data_ptr() for each in layers] != places:
            return super().projected(x, source)
        q, k, v = functional.linear(x, self.whole).chunk(3, -1)
        return q, k, v

    def restore(self) -> None:
        """Three layers again, with weights of their own."""
        super().restore()
        del self.whole
        for layer in (self.to_q, self.to_k, self.to_v):
            layer.weight.data = layer.weight.data.clone()


def fuse(network: nn.Module) -> int:
    """Have self-attentions in half precision compute so; gives how many."""
    count = 0
    for module in network.modules():
        if type(module) is Attention and _fits(module):
            layers = (module.to_q, module.to_k, module.to_v)
            whole = torch.cat([each.weight.detach() for each in layers])
            for layer, part in zip(layers, whole.chunk(3), strict=True):
                layer.weight.data = part
            module.whole = whole  # type: ignore[assignment]
            become(module, Fused)
            count += 1
    return count


def _fits(module: Attention) -> bool:
    layers = (module.to_q, module.to_k, module.to_v)
    alike = all(type(each) is nn.Linear and each.in_features == module.to_q.in_features for each in layers)
    half = module.to_q.weight.dtype in (torch.float16, torch.bfloat16)
    plain = all(each.bias is None and type(each.weight) is nn.Parameter for each in layers)  # type: ignore[reportUnnecessaryComparison]
    return alike and half and plain  # weights of torchao's are of classes of their own
