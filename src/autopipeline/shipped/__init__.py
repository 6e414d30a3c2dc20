"""The models that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

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
