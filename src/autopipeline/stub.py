"""Writes `__init__.pyi`, so that editors and type checkers know the lazy names: `python -m autopipeline.stub`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autopipeline import (  # the stub does not show private names
    _HOMES,  # type: ignore[attr-defined]
    families,
    names,
    schedulers,
)

HEADER = '''"""autopipeline: any diffusion checkpoint, any task, the right pipeline. Written by autopipeline.stub."""

from typing import Any

'''


def text() -> str:
    """The whole stub."""
    classes = [_class(name) for name in sorted(names.built())]
    return HEADER + _imports(_HOMES) + "\n\n__version__: str\n\n" + "\n".join(classes)


def schedulers_text() -> str:
    """The stub of `autopipeline.schedulers`."""
    homes: dict[str, list[str]] = {}
    for name, home in schedulers.PUBLIC.items():
        homes.setdefault(home, []).append(name)
    tables = "HOMES: dict[str, list[str]]\nPUBLIC: dict[str, str]\n__all__: list[str]\n"
    return '"""Written by autopipeline.stub."""\n\n' + _imports(homes) + "\n\n" + tables


def _imports(homes: Mapping[str, Sequence[str]]) -> str:
    return "\n".join(
        f"from {home} import {name} as {name}" for home, listed in sorted(homes.items()) for name in sorted(listed)
    )


def _class(name: str) -> str:
    from autopipeline.binding import signature

    coordinates = names.built()[name]
    parameters = signature(
        families.load(coordinates.row.family, coordinates.row.addons), coordinates.task
    ).parameters.values()
    shown, star = [], False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            shown.append("*")
            star = True
        default = "" if parameter.default is inspect.Parameter.empty else f": Any = {_value(parameter.default)}"
        shown.append(parameter.name + default)
    body = "".join(f"        {line},\n" for line in shown)
    return f"class {name}(DiffusionPipeline):\n    def __call__(\n{body}    ) -> Any: ...\n"


def _value(default: Any) -> str:
    """A default; whole texts are left out."""
    return repr(default) if len(repr(default)) < 80 else "..."


if __name__ == "__main__":
    Path(__file__).with_name("__init__.pyi").write_text(text(), "utf-8")
    Path(schedulers.__file__).with_name("__init__.pyi").write_text(schedulers_text(), "utf-8")
