"""OpenVINO in place of torch for networks on the CPU: an optional extra, `pip install autopipeline[openvino]`.

A network is translated at its first call and once more for each further size or kind of input, which takes about as
long as a few steps of denoising each time. OpenVINO keeps weights of its own, in the order that it computes in.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from autopipeline.speed.swapped import Swapped, become, mixed

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
MOST = 4
"""Translations of a network that are kept; the oldest goes first."""
_LOCK = threading.Lock()

Translation = Callable[[Sequence[Tensor]], Any]


class Translated(Swapped):
    """A network that OpenVINO computes; plain again where its weights are wanted."""

    translations: dict[Hashable, Translation]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain network."""
        leaves, spec = trees.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(each.device.type != "cpu" for each in tensors):
            self.restore()
            return self.forward(*args, **kwargs)
        key = (str(spec), *(_kind(leaf) for leaf in leaves))
        with _LOCK:  # one at a time, as each takes all cores
            if key not in self.translations:
                while len(self.translations) >= MOST:
                    del self.translations[next(iter(self.translations))]
                self.translations[key] = translated(self, leaves, spec)
            return self.translations[key](tensors)

    def restore(self) -> None:
        """The plain network, without its translations."""
        super().restore()
        del self.translations


def translate(network: nn.Module) -> nn.Module:
    """Have a network computed by OpenVINO from the next call on; of an autoencoder, its decoder."""
    _library()
    part = getattr(network, "decoder", None)
    target = part if isinstance(part, nn.Module) else network
    if not isinstance(target, Translated):
        target.translations = {}  # type: ignore[assignment]
        become(target, mixed(Translated, type(target)))
    return target


def translated(network: Translated, leaves: Sequence[Any], spec: Any) -> Translation:
    """What OpenVINO makes of a network for inputs of these kinds and sizes."""
    library = _library()
    call = _Call(network, leaves, spec)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes may stay as they are in one translation
        model = library.convert_model(call, example_input=tensors)
    model.reshape({k: list(each.shape) for k, each in enumerate(tensors)})
    dtype = next((each.dtype for each in network.parameters()), torch.float32)
    options = {"INFERENCE_PRECISION_HINT": PRECISIONS.get(dtype, "f32")}
    request = library.compile_model(model, "CPU", options).create_infer_request()

    def run(given: Sequence[Tensor]) -> Any:
        request.infer([_sent(each) for each in given])
        made = [_received(request.get_output_tensor(k), kind) for k, kind in enumerate(call.kinds)]
        return trees.tree_unflatten(made, call.made)

    return run


class _Call(nn.Module):
    """A network's call with tensors alone as arguments."""

    made: Any
    kinds: list[torch.dtype]

    def __init__(self, network: Translated, leaves: Sequence[Any], spec: Any) -> None:
        super().__init__()
        self.network, self.spec = network, spec
        self.leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        args, kwargs = trees.tree_unflatten([next(given) if one is None else one[0] for one in self.leaves], self.spec)
        made, self.made = trees.tree_flatten(self.network.plain.forward(self.network, *args, **kwargs))
        self.kinds = [each.dtype for each in made]
        return tuple(made)


def _kind(leaf: Any) -> Hashable:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), str(leaf))


def _sent(x: Tensor) -> Any:
    library, x = _library(), x.detach().contiguous()
    if x.dtype == torch.bfloat16:  # which numpy doesn't know
        return library.Tensor(x.view(torch.int16).numpy(), library.Shape(list(x.shape)), library.Type.bf16)
    return library.Tensor(x.numpy())


def _received(tensor: Any, kind: torch.dtype) -> Tensor:
    data = tensor.data
    if kind == torch.bfloat16 and data.dtype.itemsize == 2:
        return torch.from_numpy(data.view("int16")).view(kind).clone()
    return torch.from_numpy(data).to(kind, copy=True)


def _library() -> Any:
    try:
        import openvino
    except ImportError:
        raise ImportError("engine='openvino' needs OpenVINO: pip install 'autopipeline[openvino]'.") from None
    return openvino
