"""A network from a folder and to a folder: safetensors, mapped into memory, taken without a copy where they fit."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autopipeline.errors import CheckpointError
from autopipeline.models import awaited, casting

if TYPE_CHECKING:
    from autopipeline.models.network import Network

N = TypeVar("N", bound="Network")
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor, torch.arange, torch.linspace, torch.eye)
RANDOM = (torch.rand, torch.randn)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}
"""Of those that safetensors stores, the ones that checkpoints have."""


class _Blank(TorchFunctionMode):
    """Everything on the meta device, and without initial values.

    There is nothing to fill, and on the meta device `normal_` or `randn` alone imports torch's compiler, which takes
    longer than loading a network; `torch.device("meta")` beside this would look at every call a second time.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        if func in FACTORIES or func in RANDOM:
            kwargs = {"device": "meta"} | {name: each for name, each in (kwargs or {}).items() if each is not None}
            return (torch.empty if func in RANDOM else func)(*args, **kwargs)
        return func(*args, **(kwargs or {}))


def built(cls: type[N], config: dict[str, Any], folder: Path) -> N:
    """The network that config.json describes, on the meta device."""
    try:
        with _Blank():
            return cls.from_config(config)
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise CheckpointError(f"{folder / 'config.json'} does not describe a {cls.__name__}: {why}.") from error


def weight_files(folder: Path, stem: str, variant: str | None, use_safetensors: bool) -> list[Path]:
    """The files that hold the weights: one, or the shards that an index names.

    With a variant that this folder lacks, the plain files; pickled weights only where the caller has opted in.
    """
    endings = ["safetensors"] if use_safetensors else ["safetensors", "bin"]
    stems = [stem, "pytorch_model"] if stem == "model" else [stem]
    for infix in [f".{variant}", ""] if variant else [""]:
        for ending in endings:
            for name in stems:
                one = folder / f"{name}{infix}.{ending}"
                if one.is_file():
                    return [one]
                for index in (
                    folder / f"{name}.{ending}.index{infix}.json",
                    folder / f"{name}{infix}.{ending}.index.json",
                ):
                    if index.is_file():
                        return _shards(index)
    raise CheckpointError(_nothing(folder, stem))


def _shards(index: Path) -> list[Path]:
    try:
        named = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} is not a valid index of shards.") from None
    if not named or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{index} is not a valid index of shards.")
    for name in named:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name}, which is outside its folder.")
        if Path(name).suffix == ".bin" and ".bin." not in index.name:  # nobody has opted in to pickled weights
            raise CheckpointError(f"{index} names {name}, which is not safetensors.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} lacks {name}, a shard that its index names.")
    return [index.parent / name for name in named]


def _nothing(folder: Path, stem: str) -> str:
    there = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".safetensors", ".ckpt", ".pt"))
    if any(name.endswith((".bin", ".ckpt", ".pt")) for name in there) and not any("safetensors" in n for n in there):
        return (
            f"{folder} has only pickled weights ({there[0]}), which can hide code; convert them to safetensors, "
            "or pass use_safetensors=False to read them with weights_only=True."
        )
    variants = f"; there are {', '.join(there)}" if there else ""
    return f"{folder} has no {stem}.safetensors{variants}."


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, mapped into memory rather than read."""
    if file.suffix == ".bin":
        yield from _pickled(file).items()
        return
    try:
        with safe_open(str(file), framework="pt") as opened:  # which makes sure that all in the header fits
            header, begin = _header(file)
            storage = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                dtype, span = DTYPES.get(header[name]["dtype"]), header[name]["data_offsets"]
                if dtype is None or (begin + span[0]) % dtype.itemsize or span[0] == span[1]:
                    yield name, opened.get_tensor(name)
                else:  # the same, in half the time; each has a storage of its own, so that copies of one copy no more
                    part, made = storage[begin + span[0] : begin + span[1]], torch.empty(0, dtype=dtype)
                    yield name, made.set_(part, 0, header[name]["shape"])  # type: ignore[arg-type]
    except (SafetensorError, LookupError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or damaged: {error}.") from None


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What a file of safetensors has, and where its numbers begin."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length)), 8 + length


def _pickled(file: Path) -> dict[str, Tensor]:
    """Tensors of a file that was pickled, read by an unpickler that runs no code."""
    try:
        mapped = zipfile.is_zipfile(file)  # files of torch before 1.6 can't be mapped
        state = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # a hostile file can make the unpickler stumble in any way
        raise CheckpointError(f"{file} can't be read without running code from it, or is damaged.") from error
    if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
        raise CheckpointError(f"{file} holds something else than tensors by name.")
    return state


def fill(
    network: N,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    variant: str | None,
    use_safetensors: bool,
) -> N:
    """Give a network on the meta device its weights, tensor by tensor, so that no second copy ever stands in memory."""
    modules = [*_named(network)]
    wanted = _places(modules)
    unknown: list[str] = []
    for file in weight_files(folder, STEMS[network.library], variant, use_safetensors):
        for key, tensor in _tensors(file):
            name = network.renamed(key)
            if name is not None and name in wanted:
                place = wanted.pop(name)
                _put(place, _fitted(tensor, place.now, key, file), dtype, device, file)
            elif name is not None:
                unknown.append(key)
    if wanted:
        raise CheckpointError(f"{folder} lacks {_some(list(wanted))}, which its config.json asks for.")
    if unknown:
        raise CheckpointError(f"{folder} has {_some(unknown)}, which a {type(network).__name__} has no use for.")
    _materialize((module for _, module in modules), device)
    return network


class _Place(NamedTuple):
    """Where a tensor of a network belongs, and which is there."""

    module: torch.nn.Module
    leaf: str
    now: Tensor

    def put(self, tensor: Tensor) -> None:
        """Have another there."""
        own: dict[str, Any] = self.module._parameters  # type: ignore[reportPrivateUsage]
        if self.leaf in own:  # which `setattr` would look for among the buffers and modules as well
            own[self.leaf] = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        else:
            setattr(self.module, self.leaf, tensor)


def _named(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """As `named_modules(remove_duplicate=False)`, which goes through a generator for each level above a module."""
    waiting = [(prefix, module)]
    while waiting:
        name, each = waiting.pop()
        yield name, each
        children = [*each._modules.items()]  # type: ignore[reportPrivateUsage]
        start = f"{name}." if name else ""
        waiting += [(start + leaf, child) for leaf, child in reversed(children) if child is not None]


def _places(modules: Iterable[tuple[str, torch.nn.Module]]) -> dict[str, _Place]:
    """What `state_dict` has, by the same names."""
    found: dict[str, _Place] = {}
    for prefix, module in modules:
        start, passing = f"{prefix}." if prefix else "", module._non_persistent_buffers_set  # type: ignore[reportPrivateUsage]
        for tensors in (module._parameters, module._buffers):  # type: ignore[reportPrivateUsage]
            for leaf, now in tensors.items():
                if now is not None and leaf not in passing:
                    found[start + leaf] = _Place(module, leaf, now)
    return found


def _put(
    place: _Place, tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None, file: Path
) -> None:
    """As the caller wants it; on the way to a GPU it is the GPU that casts, and on the CPU large ones may wait."""
    mapped = file.suffix == ".safetensors"
    if dtype is None or dtype == tensor.dtype or not tensor.is_floating_point():
        place.put(tensor.to(device))
    elif device is not None and torch.device(device).type != "cpu":
        place.put(tensor.to(device).to(dtype))
    elif mapped and tensor.numel() >= awaited.LEAST and place.leaf in place.module._parameters:  # type: ignore[reportPrivateUsage]
        awaited.put(place.module, place.leaf, tensor, dtype)
    else:
        place.put(casting.cast(tensor, dtype, mapped=mapped))


def _fitted(tensor: Tensor, like: Tensor, key: str, file: Path) -> Tensor:
    shape = like.shape
    if tensor.is_floating_point() != like.is_floating_point():
        raise CheckpointError(f"{key} in {file} is {tensor.dtype}, but {like.dtype} is expected.")
    if tensor.shape == shape:
        return tensor
    if tensor.numel() == shape.numel() and tensor.squeeze().shape == torch.Size(s for s in shape if s != 1):
        return tensor.reshape(shape)  # old autoencoders keep linear layers as 1x1 convolutions
    raise CheckpointError(
        f"{key} in {file} has the shape {tuple(tensor.shape)}, but the config asks for {tuple(shape)}."
    )


def _materialize(modules: Iterable[torch.nn.Module], device: torch.device | str | None) -> None:
    """Buffers that are not in the checkpoint are computed by their modules, not loaded."""
    for module in modules:
        for name, buffer in module._buffers.items():  # type: ignore[reportPrivateUsage]
            if buffer is not None and buffer.is_meta:
                setattr(module, name, module.recompute(name).to(device))  # type: ignore[operator]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more tensors" if len(names) > 3 else shown


def write(network: Network, folder: Path, variant: str | None, max_shard_size: int | str) -> None:
    """config.json and weights, each under a temporary name first, so that nothing half-written is left."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    shards = _split(state, _bytes(max_shard_size))
    stem = STEMS[network.library] + (f".{variant}" if variant else "")
    if len(shards) == 1:
        _save(shards[0], folder / f"{stem}.safetensors")
    else:
        names = [f"{stem}-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            _save(shard, folder / name)
        total = sum(tensor.nbytes for tensor in state.values())
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        infix = f".{variant}" if variant else ""
        _text(folder / f"{STEMS[network.library]}.safetensors.index{infix}.json", index)
    _text(folder / "config.json", {"_class_name": type(network).__name__} | dict(network.config))


def _split(state: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    for ending, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size.upper().endswith(ending):
            return int(float(size[: -len(ending)]) * factor)
    raise ValueError(f"max_shard_size={size!r} is no size; use for example '5GB' or a number of bytes.")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    part = file.with_name(file.name + ".part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _text(file: Path, content: dict[str, Any]) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    os.replace(part, file)
