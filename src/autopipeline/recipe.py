"""The recipe of a picture: all that made it, kept in the PNG, so that it can be made again. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from autopipeline import samplers

KEY = "autopipeline"
A1111 = "parameters"
FORM = dict.fromkeys(("model", "task", "pixels", "model_digest"), str) | dict.fromkeys(
    ("call", "load", "images", "inputs", "batch", "versions"), dict
)
"""The parts of a recipe that are needed to make the picture again."""


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def pixels_digest(picture: Image.Image) -> str:
    """SHA-256 of a picture's mode, size and pixels, whatever the file around them."""
    head = f"{picture.mode} {picture.width}x{picture.height} ".encode()
    return hashlib.sha256(head + picture.tobytes()).hexdigest()


def model_digest(folder: Path) -> str:
    """SHA-256 over the names, sizes and headers of a checkpoint's weights: tells checkpoints apart in an instant."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb") as opened:
            total.update(f"{file.relative_to(folder)} {file.stat().st_size}".encode() + opened.read(65536))
    return total.hexdigest()


def parameters(recipe: Mapping[str, Any]) -> str:
    """The recipe in the form that A1111 and its relatives read."""
    call = recipe["call"]
    lines = [str(call["prompt"])]
    if call.get("negative_prompt"):
        lines.append(f"Negative prompt: {call['negative_prompt']}")
    facts = {
        "Steps": call.get("num_inference_steps"),
        "Sampler": samplers.label(recipe["scheduler"]["_class_name"], recipe["scheduler"]),
        "CFG scale": call.get("guidance_scale"),
        "Seed": recipe["seed"],
        "Size": "x".join(map(str, recipe["size"])),
        "Model hash": recipe["model_digest"][:10],
        "Model": recipe["model"],
        "Denoising strength": call.get("strength"),
        "Version": f"autopipeline {recipe['versions']['autopipeline']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    return "\n".join(lines)


def save(picture: Image.Image, path: Path, recipe: Mapping[str, Any]) -> None:
    """Write a PNG with its recipe, under another name first: a full disk leaves nothing half-written."""
    info = PngInfo()
    whole = dict(recipe) | {"pixels": pixels_digest(picture), "size": list(picture.size)}
    info.add_itxt(KEY, json.dumps(whole, sort_keys=True, ensure_ascii=False))
    info.add_itxt(A1111, parameters(whole))
    handle, part = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as opened:
            picture.save(opened, "PNG", pnginfo=info)
        os.chmod(part, 0o644)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """The recipe in a PNG; ValueError in a sentence where there is none."""
    try:
        with Image.open(path) as picture:
            picture.load()
            text = picture.info.get(KEY)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} can't be read as a picture: {str(error).rstrip('.')}.") from None
    if not isinstance(text, str):
        raise ValueError(f"{path} holds no recipe of autopipeline.")
    try:
        facts = json.loads(text)
        whole = all(isinstance(facts[name], kind) for name, kind in FORM.items())
        if not whole or not 0 <= facts["batch"]["index"] < facts["batch"]["count"]:
            raise ValueError
        int(facts["batch"]["seed"])
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError(f"The recipe in {path} is damaged.") from None
    facts["load"] = {name: facts["load"].get(name) for name in ("variant", "revision", "dtype")}  # nothing unsafe
    return facts


def name_for(prompt: str, seed: int) -> str:
    """A file name from a prompt and a seed."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower())[:8]) or "picture"
    return f"{words[:60]}-{seed}.png"


def targets(output: str | None, prompt: str, seed: int, count: int) -> list[Path]:
    """Where pictures go; ValueError if they can't, before anything is computed.

    A named file is replaced (with several pictures: name-1.png, name-2.png ...); without a name, one from the prompt
    and the seed is found that nobody has.
    """
    base = Path(output) if output else _free(Path(name_for(prompt, seed)), count)
    if os.path.isdir(base) or (output and output.endswith(("/", os.sep))):
        base = _free(base / name_for(prompt, seed), count)
    if base.suffix.lower() != ".png":
        raise ValueError(f"{base} has to end in .png, which can hold the recipe.")
    if not base.parent.is_dir():
        raise ValueError(f"The folder {base.parent} does not exist.")
    paths = numbered(base, count)
    for path in paths:
        if os.path.isdir(path):
            raise ValueError(f"{path} is a folder.")
    try:
        handle, probe = tempfile.mkstemp(prefix=f".{paths[-1].name}-", suffix=".part", dir=base.parent)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise ValueError(f"{paths[-1]} can't be written: {error.strerror}.") from None
    return paths


def numbered(base: Path, count: int) -> list[Path]:
    """One path for each picture."""
    return [base] if count == 1 else [base.with_stem(f"{base.stem}-{k + 1}") for k in range(count)]


def _free(base: Path, count: int) -> Path:
    found, k = base, 1
    while any(path.exists() for path in numbered(found, count)):
        k += 1
        found = base.with_stem(f"{base.stem}_{k}")
    return found
