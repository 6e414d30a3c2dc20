"""Writes `__init__.pyi`, so that editors and type checkers know the lazy names: `python -m autopipeline.stub`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from autopipeline import _HOMES, families, names  # type: ignore[attr-defined]  # the stub does not show private names

HEADER = '''"""autopipeline: any diffusion checkpoint, any task, the right pipeline. Written by autopipeline.stub."""

from typing import Any

'''


def text() -> str:
    """The whole stub."""
    lines = [
        f"from {home} import {name} as {name}" for home, listed in sorted(_HOMES.items()) for name in sorted(listed)
    ]
    classes = [_class(name) for name in sorted(names.built())]
    return HEADER + "\n".join(lines) + "\n\n__version__: str\n\n" + "\n".join(classes)


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
