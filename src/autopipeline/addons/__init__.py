"""One file an add-on. This file is the registry; it imports none of them, so that names can be listed without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autopipeline.stage import Family

BUILT = {
    "Control": "autopipeline.addons.control",
    "ControlNet": "autopipeline.addons.controlnet",
    "ControlNetUnion": "autopipeline.addons.controlnet_union",
    "PAG": "autopipeline.addons.pag",
}
"""Name in class names -> the module whose `attach` makes a family with it. The order is that of attaching.

A family whose networks need another way has it in its `addons`.
"""


def attach(family: Family, wanted: frozenset[str]) -> Family:
    """The family with these add-ons: its own table of tasks for them, then each add-on around its functions."""
    from dataclasses import replace

    if not wanted:
        return family
    family = replace(family, tasks=family.variants[wanted])
    for name, module in BUILT.items():
        if name in wanted:
            family = (family.addons.get(name) or importlib.import_module(module).attach)(family)
    return family
