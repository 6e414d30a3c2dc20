"""From folders to components: which class reads which folder, in which precision, on which device."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from autopipeline.errors import CheckpointError
from autopipeline.loading.index import ModelIndex, component_path
from autopipeline.stage import Slot

HOMES = {
    "UNet2DConditionModel": "autopipeline.models.unet",
    "ControlNetModel": "autopipeline.models.controlnet",
    "MultiControlNetModel": "autopipeline.models.controlnet",
    "AutoencoderKL": "autopipeline.models.autoencoder_kl",
    "AutoencoderTiny": "autopipeline.models.autoencoder_tiny",
    "CLIPTextModel": "autopipeline.models.clip",
    "CLIPTextModelWithProjection": "autopipeline.models.clip",
    "CLIPVisionModelWithProjection": "autopipeline.models.clip",
    "StableDiffusionSafetyChecker": "autopipeline.models.safety_checker",
    "CLIPTokenizer": "autopipeline.text",
    "CLIPImageProcessor": "autopipeline.images",
}
"""Class name in model_index.json -> the module of ours that has it."""

ALIASES: dict[str, str] = {
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "CLIPImageProcessorFast": "CLIPImageProcessor",
    "CLIPImageProcessorPil": "CLIPImageProcessor",
    "CLIPTokenizerFast": "CLIPTokenizer",
}


def find_class(component: str, class_name: str) -> type[Any]:
    """Our class of that name; CheckpointError where there is none."""
    class_name = ALIASES.get(class_name, class_name)
    if class_name in HOMES:
        return getattr(importlib.import_module(HOMES[class_name]), class_name)
    schedulers = importlib.import_module("autopipeline.schedulers")
    if class_name.endswith("Scheduler") and class_name in schedulers.__all__:
        return getattr(schedulers, class_name)
    raise CheckpointError(f"The {component} is a {class_name}, which this version does not have.")


def load_components(
    folder: Path,
    index: ModelIndex,
    slots: Mapping[str, Slot],
    given: Mapping[str, Any],
    *,
    dtype: Any = None,
    device_map: Any = None,
    variant: str | None = None,
    use_safetensors: bool = True,
) -> dict[str, Any]:
    """Every component of `slots`: the caller's, else the checkpoint's, else None where it may be missing.

    `dtype`: a torch.dtype or its name, "auto" (as stored), None (float32), or a dict by component with "default".
    `device_map`: a device, "balanced", or a dict by component.
    """
    names = [name for name in slots if name not in given and index.components.get(name) is not None]
    classes = {name: find_class(name, index.components[name][1]) for name in names}  # type: ignore[index]
    paths = {name: component_path(folder, name) for name in names}
    _refuse_foreign(slots, index)
    devices = place(device_map, {name: _bytes(path) for name, path in paths.items()})

    def load(name: str) -> Any:
        read = classes[name].from_pretrained
        if not issubclass(classes[name], torch.nn.Module):
            return read(paths[name])
        return read(
            paths[name],
            dtype=precision(dtype, name),
            device=devices.get(name),
            variant=variant,
            use_safetensors=use_safetensors,
        ).eval()

    with ThreadPoolExecutor(4) as pool:
        loaded = dict(zip(names, pool.map(load, names), strict=True))
    missing = [name for name, slot in slots.items() if name not in loaded and name not in given and not slot.optional]
    if missing:
        raise CheckpointError(f"The checkpoint in {folder} has no {' and no '.join(missing)}.")
    return {name: given[name] if name in given else loaded.get(name) for name in slots}


def _refuse_foreign(slots: Mapping[str, Slot], index: ModelIndex) -> None:
    for name, slot in slots.items():
        entry = index.components.get(name)
        if entry is not None and slot.classes != ("Scheduler",) and ALIASES.get(entry[1], entry[1]) not in slot.classes:
            raise CheckpointError(f"The {name} is a {entry[1]}; this family takes {' or '.join(slot.classes)}.")


def precision(dtype: Any, component: str) -> torch.dtype | None:
    """The dtype to load a component in; None for as stored."""
    if isinstance(dtype, Mapping):
        dtype = dtype.get(component, dtype.get("default"))
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return None
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{dtype!r} is no dtype; use for example 'float32', 'bfloat16', 'float16' or 'auto'.")
        return found
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype has to be a torch.dtype, its name, 'auto' or a dict by component, not {dtype!r}.")
    return dtype


def place(device_map: Any, sizes: Mapping[str, int]) -> dict[str, torch.device]:
    """A device for each component; "balanced" spreads them over the GPUs, largest first."""
    if device_map is None:
        return {}
    if isinstance(device_map, Mapping):
        return {name: _device(device_map[name]) for name in sizes if name in device_map}
    if device_map not in ("balanced", "auto"):
        device = _device(device_map)
        return dict.fromkeys(sizes, device)
    devices = [torch.device("cuda", k) for k in range(torch.cuda.device_count())] or [torch.device("cpu")]
    load = dict.fromkeys(devices, 0)
    placed: dict[str, torch.device] = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        placed[name] = min(devices, key=lambda device: load[device])
        load[placed[name]] += sizes[name]
    return placed


def _device(name: Any) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r} is no device; use for example 'cpu', 'cuda', 'cuda:1' or 'balanced'.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device_map asks for 'cuda', but this machine has no GPU that torch can use.")
    return device


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
