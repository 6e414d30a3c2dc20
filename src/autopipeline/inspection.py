"""What a checkpoint consists of, from its index, its configs and the headers of its weights. Imports no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from autopipeline.errors import CheckpointError
from autopipeline.loading.index import read_index
from autopipeline.names import NOUNS
from autopipeline.selection import explain, locate

HEADER_LIMIT = 100_000_000


def inspect_model(name: str, *, revision: str | None = None, variant: str | None = None) -> dict[str, Any]:
    """Facts about a checkpoint: class, tasks, components with parameters and bytes, memory, download."""
    fetch: dict[str, Any] = {"revision": revision} if revision else {}
    folder = locate(name, only=lambda index: (), **fetch)
    index = read_index(folder)
    local = Path(name).is_dir() or not _is_repository(name, folder)
    components: dict[str, dict[str, Any]] = {
        part: {"class": entry[1]} | _weights(folder / part, variant)
        for part, entry in index.components.items()
        if entry
    }
    explanation = explain(name, **fetch)
    facts: dict[str, Any] = {
        "model": name,
        "class": index.class_name,
        "tasks": list(explanation.tasks),
        "why": explanation.why,
        "components": components,
        "bytes": sum(part["bytes"] for part in components.values()),
        "parameters": sum(part["parameters"] for part in components.values()),
        "download": None,
    }
    if not local:
        from autopipeline.loading import hub

        planned = hub.plan(name, variant=variant, **fetch)
        facts["download"] = [{"file": p.file, "bytes": p.bytes, "cached": p.cached} for p in planned]
    return facts


def _is_repository(name: str, folder: Path) -> bool:
    return "/" in name and folder.parent.name == "snapshots"


def _weights(folder: Path, variant: str | None) -> dict[str, Any]:
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    marked = [file for file in files if variant and f".{variant}" in file.name]
    plain = [file for file in files if file.name.count(".") == 1]
    sizes = [header_sizes(file) for file in marked or plain or files]
    pickled = not files and folder.is_dir() and any(folder.glob("*.bin"))
    total = {"parameters": sum(count for count, _ in sizes), "bytes": sum(size for _, size in sizes)}
    return total | ({"pickled": True} if pickled else {})


def header_sizes(file: Path) -> tuple[int, int]:
    """Numbers and bytes in a safetensors file, by its header alone."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(HEADER_LIMIT, file.stat().st_size):
                raise ValueError
            header = json.loads(opened.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        count = sum(math.prod(entry["shape"]) for entry in tensors)
        ends = [0, *(entry["data_offsets"][1] for entry in tensors)]
        size = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors)
        if length + 8 + max(ends) > file.stat().st_size:
            raise ValueError
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, IsADirectoryError):
        raise CheckpointError(f"{file} is truncated or damaged.") from None
    return count, size


def shown(facts: dict[str, Any]) -> str:
    """The facts as text."""
    tasks = ", ".join(NOUNS[task] for task in facts["tasks"]) or "none in this version"
    lines = [f"model      {facts['model']}", f"class      {facts['class']}", f"tasks      {tasks}"]
    if not facts["tasks"]:
        lines.append(f"why        {facts['why'].splitlines()[0]}")
    lines.append("components")
    for name, part in facts["components"].items():
        size = f"{count(part['parameters'])} parameters, {size_of(part['bytes'])}" if part["bytes"] else ""
        size = "only pickled weights, which are taken with use_safetensors=False" if "pickled" in part else size
        lines.append(f"  {name.ljust(18)} {part['class'].ljust(30)} {size}".rstrip())
    if facts["parameters"]:
        whole, half = size_of(4 * facts["parameters"]), size_of(2 * facts["parameters"])
        lines.append(f"memory     {size_of(facts['bytes'])} as stored, {whole} in float32, {half} in half precision")
    if facts["download"] is not None:
        left = [file for file in facts["download"] if not file["cached"]]
        lines.append(f"download   {size_of(sum(f['bytes'] for f in left))} in {len(left)} files")
        lines += [f"  {file['file']}  {size_of(file['bytes'])}" for file in left]
    return "\n".join(lines)


def count(number: int) -> str:
    """A count in thousands, millions, billions."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def size_of(number: int) -> str:
    """A size in bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
