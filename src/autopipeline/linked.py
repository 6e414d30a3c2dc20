"""Checkpoints in two places: a decoder whose card (README.md) names the prior that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopipeline.errors import CheckpointError
from autopipeline.loading.components import load_components
from autopipeline.loading.index import ModelIndex, read_index
from autopipeline.selection import locate
from autopipeline.stage import Family, Slot


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint's folder, and how it came here."""

    folder: Path
    index: ModelIndex
    fetched: bool  # from the Hub, or shipped: its card is a stranger's, and may name no folder of this machine
    fetch: Mapping[str, Any]  # `revision`, `token`, `variant`, `use_safetensors` ...

    @property
    def how(self) -> dict[str, Any]:
        """Which weights to take."""
        return {name: self.fetch[name] for name in ("variant", "use_safetensors")}


def load_all(
    source: Source, family: Family, given: Mapping[str, Any], *, dtype: Any = None, device_map: Any = None
) -> dict[str, Any]:
    """Every component: the caller's, the checkpoint's, and those "prior_*" from the linked checkpoint.

    `given["prior"]` names another prior: a folder, a repository, or a loaded pipeline.
    """
    prefix = f"{family.linked}_" if family.linked else None
    linked = {name: slot for name, slot in family.slots.items() if prefix and name.startswith(prefix)}
    other = given.get(family.linked or "")
    here = {name for name in linked if source.index.components.get(name) is not None}
    parts = {name: part for name, part in given.items() if name != family.linked}
    lacking = {name for name, slot in linked.items() if name not in parts and not slot.optional} - here
    if other is None and not lacking:
        return load_components(
            source.folder, source.index, family.slots, parts, dtype=dtype, device_map=device_map, **source.how
        )
    assert prefix
    own = {name: slot for name, slot in family.slots.items() if name not in linked}
    loaded = load_components(
        source.folder,
        source.index,
        own,
        {name: part for name, part in parts.items() if name in own},
        dtype=_within(dtype, own, ""),
        device_map=_within(device_map, own, ""),
        **source.how,
    )
    slots = {name.removeprefix(prefix): slot for name, slot in linked.items()}
    brought = {name.removeprefix(prefix): part for name, part in parts.items() if name in linked}
    if other is not None and not isinstance(other, str | Path):
        found = {name: getattr(other, name, None) for name in slots} | brought
    else:
        folder = _follow(source, str(family.linked), other)
        index = read_index(folder)
        inner = _within(dtype, slots, prefix), _within(device_map, slots, prefix)
        found = load_components(folder, index, slots, brought, dtype=inner[0], device_map=inner[1], **source.how)
    return {name: loaded[name] if name in own else found[name.removeprefix(prefix)] for name in family.slots}


def _within(by_name: Any, slots: Mapping[str, Slot], prefix: str) -> Any:
    """What a dict by component says of these, by their own names there; anything else means all of them."""
    if not isinstance(by_name, Mapping):
        return by_name
    own = {name.removeprefix(prefix): value for name, value in by_name.items() if name.startswith(prefix)}
    return {name: value for name, value in (own | dict(by_name)).items() if name in slots or name == "default"}


def _follow(source: Source, link: str, other: str | Path | None) -> Path:
    """The folder of the linked checkpoint: the caller's, or the one that the card names."""
    fetch = {name: value for name, value in source.fetch.items() if name != "revision"}
    if other is not None:
        return locate(other, **fetch)
    named = _card(source.folder, link)
    if not source.fetched:
        return locate(named, **fetch)
    from autopipeline.loading import hub

    return hub.resolve(named, **fetch)


def _card(folder: Path, link: str) -> str:
    """What the head of the card names."""
    hint = f"pass {link}= with the folder or repository of its {link}"
    file = folder / "README.md"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds a decoder alone and has no README.md that names its {link}; {hint}.")
    from huggingface_hub import ModelCard

    try:
        named = ModelCard(file.read_text("utf-8")).data.to_dict().get(link)
    except Exception as error:  # whatever the parser of its head raises
        raise CheckpointError(f"The head of {file} can't be read; {hint}.") from error
    first = named[0] if isinstance(named, list) and named else named
    if not isinstance(first, str) or not first:
        raise CheckpointError(f"{file} names no {link}, which this decoder needs; {hint}.")
    return first
