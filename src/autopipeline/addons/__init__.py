"""One file an add-on. This file is the registry; it imports none of them, so that names can be listed without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from autopipeline.stage import Family, TaskRow

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
    family = replace(family, tasks=_tasks(family, wanted))
    for name, module in BUILT.items():
        if name in wanted:
            family = (family.addons.get(name) or importlib.import_module(module).attach)(family)
    return family


def _tasks(family: Family, wanted: frozenset[str]) -> Mapping[str, TaskRow]:
    """The family's table for these add-ons; with PAG, where it has none of its own, that without, and two numbers."""
    if wanted in family.variants:
        return family.variants[wanted]
    plain = wanted - {"PAG"}
    if plain == wanted:
        raise KeyError(f"{family.key} has no tasks with {', '.join(sorted(wanted))}")
    from autopipeline.addons import pag

    return {name: pag.row(row) for name, row in (_tasks(family, plain) if plain else family.tasks).items()}
