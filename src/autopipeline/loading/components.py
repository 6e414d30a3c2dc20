"""From folders to components: which class reads which folder, in which precision, on which device."""

from __future__ import annotations

import difflib
import importlib
import re
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autopipeline.errors import CheckpointError
from autopipeline.loading import foreign
from autopipeline.loading.index import ModelIndex, component_path
from autopipeline.models.network import Network
from autopipeline.stage import Slot

HOMES = {
    "UNet2DConditionModel": "autopipeline.models.unet",
    "ControlNetModel": "autopipeline.models.controlnet",
    "ControlNetUnionModel": "autopipeline.models.controlnet_union",
    "MultiControlNetModel": "autopipeline.models.controlnet",
    "MultiControlNetUnionModel": "autopipeline.models.controlnet_union",
    "AuraFlowTransformer2DModel": "autopipeline.models.auraflow",
    "PriorTransformer": "autopipeline.models.prior_transformer",
    "MultilingualCLIP": "autopipeline.models.multilingual_clip",
    "VQModel": "autopipeline.models.vq_model",
    "BertModel": "autopipeline.models.bert",
    "ChatGLMModel": "autopipeline.models.chatglm",
    "HunyuanDiT2DModel": "autopipeline.models.hunyuan",
    "CogView3PlusTransformer2DModel": "autopipeline.models.cogview",
    "CogView4Transformer2DModel": "autopipeline.models.cogview",
    "ChromaTransformer2DModel": "autopipeline.models.chroma",
    "FluxTransformer2DModel": "autopipeline.models.flux",
    "Flux2Transformer2DModel": "autopipeline.models.flux2",
    "FluxControlNetModel": "autopipeline.models.flux_controlnet",
    "FluxMultiControlNetModel": "autopipeline.models.flux_controlnet",
    "AutoencoderKL": "autopipeline.models.autoencoder_kl",
    "AutoencoderKLFlux2": "autopipeline.models.autoencoder_kl_flux2",
    "AutoencoderKLQwenImage": "autopipeline.models.autoencoder_kl_qwenimage",
    "QwenImageControlNetModel": "autopipeline.models.qwenimage",
    "QwenImageMultiControlNetModel": "autopipeline.models.qwenimage",
    "QwenImageTransformer2DModel": "autopipeline.models.qwenimage",
    "AutoencoderKLQwenImage21": "autopipeline.models.autoencoder_kl_qwenimage21",
    "QwenImage21Transformer2DModel": "autopipeline.models.qwenimage21",
    "AutoencoderTiny": "autopipeline.models.autoencoder_tiny",
    "AutoencoderDC": "autopipeline.models.autoencoder_dc",
    "CLIPTextModel": "autopipeline.models.clip",
    "CLIPTextModelWithProjection": "autopipeline.models.clip",
    "CLIPVisionModelWithProjection": "autopipeline.models.clip",
    "OvisImageTransformer2DModel": "autopipeline.models.ovis",
    "Ideogram4PromptEnhancerHead": "autopipeline.models.ideogram4",
    "Ideogram4Transformer2DModel": "autopipeline.models.ideogram4",
    "Kandinsky3UNet": "autopipeline.models.kandinsky3",
    "Krea2Transformer2DModel": "autopipeline.models.krea2",
    "NucleusMoEImageTransformer2DModel": "autopipeline.models.nucleus_moe",
    "PRXTransformer2DModel": "autopipeline.models.prx",
    "PaellaVQModel": "autopipeline.models.paella_vq",
    "StableCascadeUNet": "autopipeline.models.stable_cascade",
    "WuerstchenDiffNeXt": "autopipeline.models.wuerstchen",
    "WuerstchenPrior": "autopipeline.models.wuerstchen",
    "T5GemmaEncoder": "autopipeline.models.t5gemma",
    "PixArtTransformer2DModel": "autopipeline.models.pixart",
    "SD3Transformer2DModel": "autopipeline.models.sd3",
    "SD3ControlNetModel": "autopipeline.models.sd3",
    "SD3MultiControlNetModel": "autopipeline.models.sd3",
    "Gemma2Model": "autopipeline.models.gemma2",
    "GemmaModel": "autopipeline.models.gemma2",
    "LuminaNextDiT2DModel": "autopipeline.models.lumina",
    "Lumina2Transformer2DModel": "autopipeline.models.lumina2",
    "SanaTransformer2DModel": "autopipeline.models.sana",
    "T5EncoderModel": "autopipeline.models.t5",
    "ZImageTransformer2DModel": "autopipeline.models.z_image",
    "ZImageControlNetModel": "autopipeline.models.z_image_controlnet",
    "UMT5EncoderModel": "autopipeline.models.t5",
    "StableDiffusionSafetyChecker": "autopipeline.models.safety_checker",
    "IFSafetyChecker": "autopipeline.models.safety_checker",
    "IFWatermarker": "autopipeline.models.watermark",
    "CLIPTokenizer": "autopipeline.text",
    "BertTokenizer": "autopipeline.text",
    "ChatGLMTokenizer": "autopipeline.text",
    "LlamaTokenizer": "autopipeline.text",
    "T5Tokenizer": "autopipeline.text",
    "XLMRobertaTokenizer": "autopipeline.text",
    "GemmaTokenizer": "autopipeline.text",
    "CLIPImageProcessor": "autopipeline.images",
    "GlmImageProcessor": "autopipeline.loading.processors",
    "GlmImageTransformer2DModel": "autopipeline.models.glm_image",
    "Qwen2VLProcessor": "autopipeline.loading.processors",
    "Qwen3VLProcessor": "autopipeline.loading.processors",
}
"""Class name in model_index.json -> the module of ours that has it."""

ALIASES: dict[str, str] = {
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "CLIPImageProcessorFast": "CLIPImageProcessor",
    "CLIPImageProcessorPil": "CLIPImageProcessor",
    "CLIPTokenizerFast": "CLIPTokenizer",
    "BertTokenizerFast": "BertTokenizer",
    "LlamaTokenizerFast": "LlamaTokenizer",
    "T5TokenizerFast": "T5Tokenizer",
    "XLMRobertaTokenizerFast": "XLMRobertaTokenizer",
    "GemmaTokenizerFast": "GemmaTokenizer",
    "Qwen2_5_VLProcessor": "Qwen2VLProcessor",
    "Transformer2DModel": "PixArtTransformer2DModel",  # in older checkpoints
}

# A file of weights with a variant.
MARKED = re.compile(r"[\w-]+\.([a-zA-Z]\w*)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)")


def find_class(component: str, class_name: str) -> type[Any]:
    """Our class of that name, or that of transformers; CheckpointError where there is none."""
    class_name = ALIASES.get(class_name, class_name)
    if class_name in HOMES:
        return getattr(importlib.import_module(HOMES[class_name]), class_name)
    schedulers = importlib.import_module("autopipeline.schedulers")
    if class_name.endswith("Scheduler") and class_name in schedulers.__all__:
        return getattr(schedulers, class_name)
    if class_name in foreign.CLASSES:
        return foreign.find(component, class_name)
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

    `dtype`: a torch.dtype or its name, "stored", "auto" (what this machine computes well), None (float32), or a dict by
    component with "default".
    `device_map`: a device, "balanced", or a dict by component with "default".
    """
    names = [name for name in slots if name not in given and index.components.get(name) is not None]
    classes = {name: find_class(name, index.components[name][1]) for name in names}  # type: ignore[index]
    paths = {name: component_path(folder, name) for name in names}
    _refuse_foreign(slots, index)
    _refuse_unknown_keys("dtype", dtype, slots)
    _refuse_unknown_keys("device_map", device_map, slots)
    if variant:
        networks = {name: path for name, path in paths.items() if issubclass(classes[name], Network)}
        _check_variant(networks, variant, use_safetensors)
    devices = place(device_map, {name: _bytes(path) for name, path in paths.items()})
    dtype = _decided(dtype, paths, devices)

    def load(name: str) -> Any:
        cls = classes[name]
        read = partial(foreign.read, cls) if foreign.is_foreign(cls) else cls.from_pretrained
        if not issubclass(cls, torch.nn.Module):
            return read(paths[name])
        return read(  # which puts networks into eval mode
            paths[name],
            dtype=precision(dtype, name),
            device=devices.get(name),
            variant=variant,
            use_safetensors=use_safetensors,
        )

    # Building networks is Python's work, which threads would only hinder each other at; tokenizers are read beside it.
    networks = [name for name in names if issubclass(classes[name], torch.nn.Module)]
    with ThreadPoolExecutor(4) as pool:
        beside = {name: pool.submit(load, name) for name in names if name not in networks}
        loaded = {name: load(name) for name in networks} | {name: each.result() for name, each in beside.items()}
    missing = [name for name, slot in slots.items() if name not in loaded and name not in given and not slot.optional]
    if missing:
        raise CheckpointError(f"The checkpoint in {folder} has no {' and no '.join(missing)}.")
    return {name: given[name] if name in given else loaded.get(name) for name in slots}


def _decided(dtype: Any, paths: Mapping[str, Path], devices: Mapping[str, torch.device]) -> Any:
    """With the choice in place of "auto": one for all components, by the device that most of them are on."""
    wants = dtype.values() if isinstance(dtype, Mapping) else (dtype,)
    if not any(isinstance(each, str) and each == "auto" for each in wants):
        return dtype
    from autopipeline.speed import precision as speed

    device = max(devices.values(), key=list(devices.values()).count, default=torch.device("cpu"))
    choice = speed.chosen(speed.stored(paths.values()), device)
    if isinstance(dtype, Mapping):
        return {name: choice if each == "auto" else each for name, each in dtype.items()}
    return choice


def check_fit(slots: Mapping[str, Slot], parts: Mapping[str, Any]) -> None:
    """TypeError for a component of a class that its slot does not take; subclasses are taken."""
    several = [(name, each) for name, part in parts.items() for each in (part if isinstance(part, list) else [part])]
    for name, part in several:
        slot = slots.get(name)
        if slot is None or part is None:
            continue
        bases = type(part).__mro__
        if not {cls.__name__ for cls in bases} & set(slot.classes):
            raise TypeError(f"{name} has to be {' or '.join(slot.classes)}, not {_titled(part)}.")
        ours = HOMES.get(type(part).__name__)
        if ours is not None and not any(cls.__module__.startswith("autopipeline.") for cls in bases):
            raise TypeError(
                f"{name} is the {type(part).__name__} of {type(part).__module__.partition('.')[0]}; "
                f"load it with autopipeline.{type(part).__name__}.from_pretrained."
            )


def _titled(part: Any) -> str:
    home = type(part).__module__.partition(".")[0]
    name = type(part).__name__
    return name if home in ("autopipeline", "builtins") else f"{name} of {home}"


def _refuse_unknown_keys(argument: str, given: Any, slots: Mapping[str, Slot]) -> None:
    """A dict by component names components, "default" for the rest; nothing else, which would be passed over."""
    if isinstance(given, Mapping):
        unknown = [key for key in given if key not in slots and key != "default"]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), [*slots, "default"], 1, 0.5)
            nearest = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{argument} names {unknown[0]!r}, which is no component{nearest}")


def _check_variant(paths: Mapping[str, Path], variant: str, use_safetensors: bool) -> None:
    """Say which components lack the variant; CheckpointError where all do."""
    endings = (".safetensors",) if use_safetensors else (".safetensors", ".bin")
    there = {name: [file.name for file in path.iterdir()] for name, path in paths.items()}
    there = {name: [file for file in files if file.endswith(endings)] for name, files in there.items()}
    mark = re.compile(rf"\.{re.escape(str(variant))}[.-]")
    lacking = [name for name, files in there.items() if not any(map(mark.search, files))]
    if lacking and len(lacking) == len(there):
        found = sorted({part[1] for files in there.values() for part in map(MARKED.fullmatch, files) if part})
        others = f"there are {', '.join(found)}" if found else "there are no variants at all"
        raise CheckpointError(f"The checkpoint has no variant {variant!r}; {others}.")
    if lacking:
        warnings.warn(f"{', '.join(lacking)} have no variant {variant!r}; the plain weights are taken.", stacklevel=5)


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
    if dtype in ("stored", "auto"):
        return None
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(
                f"{dtype!r} is no dtype; use for example 'float32', 'bfloat16', 'float16', 'auto' or 'stored'."
            )
        dtype = found
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise ValueError(f"{dtype} can't hold weights; use a floating-point dtype such as 'float32' or 'bfloat16'.")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"dtype has to be a torch.dtype, its name, 'auto', 'stored' or a dict by component, not {dtype!r}."
        )
    return dtype


def same_precision(one: Any, other: Any) -> bool:
    """Whether two ways to name a dtype, such as torch.float16 and "float16", mean the same."""
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        return one == other
    return precision(one, "") == precision(other, "")


def place(device_map: Any, sizes: Mapping[str, int]) -> dict[str, torch.device]:
    """A device for each component; "balanced" spreads them over the GPUs, largest first."""
    if device_map is None:
        return {}
    if isinstance(device_map, Mapping):
        named = {name: device_map.get(name, device_map.get("default")) for name in sizes}
        return {name: find_device(value) for name, value in named.items() if value is not None}
    if device_map not in ("balanced", "auto"):
        return dict.fromkeys(sizes, find_device(device_map))
    if not torch.cuda.is_available():
        warnings.warn(f"device_map={device_map!r} found no GPU; everything goes on the CPU.", stacklevel=4)
    devices = [torch.device("cuda", k) for k in range(torch.cuda.device_count())] or [torch.device("cpu")]
    load = dict.fromkeys(devices, 0)
    placed: dict[str, torch.device] = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        placed[name] = min(devices, key=lambda device: load[device])
        load[placed[name]] += sizes[name]
    return placed


def find_device(name: Any) -> torch.device:
    """A device that this machine has, from its name, its number among the GPUs, or a torch.device."""
    known = isinstance(name, str | torch.device) or (isinstance(name, int) and name >= 0)
    try:
        device = torch.device(f"cuda:{name}" if isinstance(name, int) else name) if known else None
    except RuntimeError:
        device = None
    if device is None or device.type == "meta":
        raise ValueError(f"{name!r} is no device; use for example 'cpu', 'cuda', 'cuda:1' or 'balanced'.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"The device {str(device)!r} is asked for, but this machine has no GPU that torch can use.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"The device {str(device)!r} is asked for, but there are {torch.cuda.device_count()} GPUs.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"The device {str(device)!r} is asked for, but torch can't use one here.") from None
    return device


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
