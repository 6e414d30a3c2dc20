"""The families. This file is the registry; it imports no family, so that names can be listed without torch."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autopipeline.stage import Family

BUILT = {
    "stable-diffusion": "autopipeline.families.stable_diffusion",
    "stable-diffusion-xl": "autopipeline.families.stable_diffusion_xl",
    "lcm": "autopipeline.families.lcm",
}
"""Family key -> the module whose FAMILY it is."""


@cache
def external() -> dict[str, str]:
    """Families from other packages: entry points of the group `autopipeline.families`, key = module."""
    return {point.name: point.value for point in entry_points(group="autopipeline.families")}


@cache
def load(key: str) -> Family:
    """The family of that key."""
    module = BUILT.get(key) or external().get(key)
    if module is None:
        raise KeyError(key)
    return importlib.import_module(module).FAMILY
