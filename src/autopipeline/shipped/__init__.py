"""The models that come with the package, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DEFAULT = "scenes-128"


def names() -> list[str]:
    """The names of the shipped models."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/model_index.json"))


def path(name: str) -> Path:
    """The folder of a shipped model."""
    folder = Path(__file__).parent / name
    if name not in names():
        raise KeyError(name)
    return folder


def recommended(name: str) -> dict[str, Any]:
    """What the command line asks of a shipped model unless told otherwise, such as its number of steps."""
    file = Path(__file__).parent / name / "recommended.json"
    return json.loads(file.read_text("utf-8")) if name in names() and file.is_file() else {}
