"""Language models that transformers has and we don't: its own classes, imported only where a checkpoint names them."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

import torch

from autopipeline.errors import CheckpointError

CLASSES = frozenset(
    {
        "ByT5Tokenizer",
        "GlmForCausalLM",
        "GlmImageForConditionalGeneration",
        "GlmModel",
        "Mistral3ForConditionalGeneration",
        "PixtralProcessor",
        "PreTrainedTokenizerFast",
        "Qwen2Tokenizer",
        "Qwen2TokenizerFast",
        "Qwen2VLImageProcessor",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3Model",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLModel",
        "Siglip2ImageProcessor",
        "Siglip2ImageProcessorFast",
        "Siglip2ImageProcessorPil",
        "Siglip2VisionModel",
        "TokenizersBackend",
    }
)
"""Class names in model_index.json that are taken from transformers as they are."""
_ONE_AT_A_TIME = threading.Lock()
"""Held while a model is loaded: transformers switches off the making and tying of weights for the whole process, and
where two load at once, they may stay switched off."""
_ENCODING = threading.RLock()
"""Held while a tokenizer encodes: it writes padding and truncation into itself before it does."""


def find(component: str, class_name: str) -> type[Any]:
    """The class of transformers; CheckpointError where that package is missing or too old for it."""
    try:
        home: Any = importlib.import_module("transformers")
        return getattr(home, class_name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        why = "which needs the package transformers: pip install 'autopipeline[language]'"
    except (AttributeError, ImportError) as error:
        why = f"which the installed transformers does not give: {error}"
    raise CheckpointError(f"The {component} is a {class_name}, {why}.") from None


def module(component: str, name: str) -> Any:
    """A module of transformers; CheckpointError where that package is missing or too old for it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            f"The {component} needs {name}, which the installed transformers does not give."
        ) from error


def is_foreign(cls: type[Any]) -> bool:
    """Whether a class is one of transformers' own."""
    return cls.__module__.partition(".")[0] == "transformers"


def read(
    cls: type[Any],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    variant: str | None = None,
    use_safetensors: bool = True,
) -> Any:
    """A model, tokenizer or processor from its folder: nothing is fetched, no code of the checkpoint is run."""
    local: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    load: Any = cls.from_pretrained  # type: ignore[attr-defined]
    try:
        if not issubclass(cls, torch.nn.Module):
            return _safe(load(folder, **local))
        files = dict(variant=variant, use_safetensors=use_safetensors or None)
        with _ONE_AT_A_TIME:
            model = load(folder, dtype="auto" if dtype is None else dtype, **files, **local)
    except (ImportError, LookupError, OSError, TypeError, ValueError) as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise CheckpointError(f"{folder} does not hold a {cls.__name__}: {why}.") from error
    return model.to(device).eval() if device is not None else model.eval()


class _OneAtATime:
    """Encoding under a lock, so that threads with other lengths don't cut and pad each other's texts."""

    def _encode_plus(self, *args: Any, **options: Any) -> Any:
        with _ENCODING:
            return super()._encode_plus(*args, **options)  # type: ignore[misc]


def _safe(one: Any) -> Any:
    """A tokenizer, or a processor with its tokenizer, that threads may share."""
    tokenizer = getattr(one, "tokenizer", one)
    if hasattr(tokenizer, "_encode_plus"):
        cls = type(tokenizer)
        tokenizer.__class__ = type(cls.__name__, (_OneAtATime, cls), {"__module__": cls.__module__})
    return one
