"""Which class a checkpoint and a task lead to, and why: from model_index.json and configs alone. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopipeline import names, shipped
from autopipeline.errors import CheckpointError
from autopipeline.loading.index import FILE, ModelIndex, component_path, read_index
from autopipeline.names import AUTO, NOUNS, TASKS


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which class is chosen for a checkpoint and a task, and why, or why none is."""

    checkpoint: str
    task: str
    class_name: str | None
    tasks: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return self.why


def locate(name: str | Path, *, only: Callable[[ModelIndex], Collection[str]] | None = None, **fetch: Any) -> Path:
    """The folder of a checkpoint: a folder as it is, a shipped model, or one fetched from the Hub."""
    if not isinstance(name, str | Path):
        raise TypeError(f"A checkpoint is named by a path or a repository, not by {type(name).__name__}.")
    if not str(name):
        raise CheckpointError("The name of the checkpoint is empty.")
    if os.path.isdir(name):
        return Path(name)
    if os.path.isfile(name):
        raise CheckpointError(f"{name} is a file; a checkpoint is a folder with a {FILE}.")
    if str(name) in shipped.names():
        return shipped.path(str(name))
    from autopipeline.loading import hub

    return hub.resolve(name, only=only, **fetch)


def configs(folder: Path, index: ModelIndex) -> dict[str, dict[str, Any]]:
    """The config.json of each component that has one here; a damaged one is an error."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in index.components.items():
        if entry is None or not (folder / name).is_dir():
            continue
        file = component_path(folder, name) / "config.json"
        if file.is_file():
            try:
                found[name] = json.loads(file.read_text("utf-8"))
            except (ValueError, RecursionError):
                raise CheckpointError(f"{file} is not valid JSON.") from None
            if not isinstance(found[name], dict):
                raise CheckpointError(f"{file} does not hold an object.")
    return found


def possible(configs: Mapping[str, Mapping[str, Any]], task: str) -> str | None:
    """None if the networks can do the task, else the reason in a sentence.

    A network made for inpainting takes the mask and the masked picture beside x: 2 c + 1 channels in place of c.
    Transformers may take their latents in patches of 2 x 2, and another picture beside them. Without an autoencoder,
    3 channels are pixels, and 6 those of two pictures.
    """
    denoiser = configs.get("unet") or configs.get("transformer") or {}
    autoencoder = configs.get("vae") or configs.get("movq") or {}
    channels, latent = denoiser.get("in_channels"), autoencoder.get("latent_channels", autoencoder.get("z_dim", 4))
    if channels is None or channels == latent or (channels in (3, 6) and not autoencoder):
        return None
    if not isinstance(channels, int) or not isinstance(latent, int):
        return f"Its configs give {channels!r} and {latent!r} as numbers of channels."
    if channels in (2 * latent, 4 * latent, 8 * latent) and "transformer" in configs:
        return None
    if channels == 2 * latent + 1:
        made = f"Its denoising network takes {channels} channels: it was made for inpainting"
        return None if task == "inpaint" else f"{made} and can't do {NOUNS[task]}; use {AUTO['inpaint']}."
    return f"Its denoising network takes {channels} channels, but its autoencoder gives {latent}."


def explain(checkpoint: str | Path, task: str | None = None, **fetch: Any) -> Explanation:
    """Say which class is chosen for `task` ("text2image", "image2image", "inpaint"; None: its own), and why.

    Reads model_index.json and configs, no weights. Raises CheckpointError if there is no readable model_index.json.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task={task!r} has to be one of {', '.join(TASKS)}.")
    folder = locate(checkpoint, only=lambda index: (), **fetch)
    index = read_index(folder)
    known = configs(folder, index)
    here = names.whole(names.find(index.class_name))
    able = tuple(t for t in TASKS if _able(index, t) and possible(known, t) is None)
    own = task or (here.task if here else "text2image")

    def because(why: str, class_name: str | None = None) -> Explanation:
        return Explanation(str(checkpoint), own, class_name, able, why)

    try:
        chosen = names.select(index.class_name, own)
    except ValueError as error:
        return because(str(error))
    name = chosen.row.classes[own]
    row = f"model_index.json says {index.class_name}, which is a {chosen.row.key} checkpoint"
    if not chosen.row.built:
        return because(f"{row}; {NOUNS[own]} would be {name}, but {chosen.row.key} is not built in this version.")
    reason = possible(known, own)
    if reason:
        return because(f"{row}, and {NOUNS[own]} would be {name}. {reason}")
    return because(f"{row}; {NOUNS[own]} with it is {name}.", name)


def _able(index: ModelIndex, task: str) -> bool:
    try:
        return names.select(index.class_name, task).row.built
    except ValueError:
        return False
