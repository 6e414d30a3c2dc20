"""model_index.json: what a checkpoint says it is. Imports no torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopipeline.errors import CheckpointError

FILE = "model_index.json"
Entry = tuple[str, str]


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """The class of a checkpoint, its components as (library, class), None for those left out, and its settings."""

    class_name: str
    components: dict[str, Entry | None]
    settings: dict[str, Any]


def read_index(folder: Path) -> ModelIndex:
    """Read model_index.json of a folder; CheckpointError says in a sentence what is wrong with it."""
    file = folder / FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.")
    if not file.is_file():
        raise CheckpointError(_missing(folder))
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not valid JSON.") from None
    return parse(content, str(file))


def parse(content: Any, name: str) -> ModelIndex:
    """An index from the content of its file."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} does not hold a JSON object.")
    class_name = content.get("_class_name")
    if isinstance(class_name, list) and class_name:
        class_name = class_name[-1]  # [module, class] of a checkpoint with code of its own
    if not isinstance(class_name, str) or not class_name:
        raise CheckpointError(f"{name} has no _class_name, so it does not say which pipeline it is.")
    components: dict[str, Entry | None] = {}
    settings: dict[str, Any] = {}
    for key, value in content.items():
        if key.startswith("_"):
            continue
        if isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value):
            _refuse_path(key, name)
            components[key] = None if None in value else (value[0], value[1])
        else:
            settings[key] = value
    return ModelIndex(class_name, components, settings)


def _refuse_path(key: str, name: str) -> None:
    if not re.fullmatch(r"[\w.-]+", key) or key in (".", ".."):
        raise CheckpointError(f"{name} names the component {key!r}, which is outside the checkpoint's folder.")


def _missing(folder: Path) -> str:
    there = sorted(path.name for path in folder.iterdir())
    if not there:
        return f"{folder} is empty; a checkpoint has a {FILE}."
    if "config.json" in there or "adapter_config.json" in there:
        return f"{folder} has no {FILE}; it looks like a single network or an adapter, not a whole checkpoint."
    single = [name for name in there if name.endswith((".safetensors", ".ckpt"))]
    if single:
        return f"{folder} has no {FILE}; single-file checkpoints such as {single[0]} can't be loaded by this version."
    return f"{folder} has no {FILE}; there are {', '.join(there[:5])}."


def component_path(folder: Path, name: str) -> Path:
    """The folder of a component; CheckpointError if it is missing or leads outside the checkpoint."""
    path = folder / name
    if not path.is_dir():
        raise CheckpointError(f"{folder} has no folder {name}, which its {FILE} names.")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"The folder {name} of {folder} leads outside the checkpoint.")
    return path
