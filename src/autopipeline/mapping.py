"""The mapping as people read it: `docs/families.md`, written from the rows. Imports no torch."""

from __future__ import annotations

from autopipeline import names
from autopipeline.names import NOUNS, TASKS, Row

HEAD = """# Families

Every family, the class for each of its tasks, and its add-ons. Written by `autopipeline models --markdown`.

**Bold** is a class that only autopipeline has; the others have the names, call parameters and pictures of diffusers.
A family in (parentheses) is known by name, but not built in this version.
"""
LETTERS = {"text2image": "t", "image2image": "i", "inpaint": "p"}


def markdown() -> str:
    """The whole page."""
    heads = [row for row in names.rows() if not row.addons]
    combinations = list(dict.fromkeys(" + ".join(sorted(row.addons)) for row in names.rows() if row.addons))
    parts = [(row.key, row) for row in names.PARTS]
    return "\n".join(
        [
            HEAD,
            *_table(["family", *map(_capital, TASKS)], [[_key(row), *_classes(row)] for row in heads]),
            "\n## Add-ons\n",
            "`controlnet=` and `enable_pag=True` lead to these, as does a checkpoint that names one. "
            "t: text-to-image, i: image-to-image, p: inpainting.\n",
            *_table(["family", *combinations], [line for row in heads if (line := _addons(row, combinations))]),
            "\n## Stages alone\n",
            "AutoPipeline goes from a decoder to the whole family; `DiffusionPipeline` and the classes themselves load "
            "a stage as it is.\n",
            *_table(
                ["stage", *map(_capital, TASKS), "AutoPipeline goes to"],
                [[_key(row), *_classes(row), row.whole or "-"] for _, row in parts],
            ),
            "",
        ]
    )


def _capital(task: str) -> str:
    return NOUNS[task].capitalize()


def _key(row: Row) -> str:
    return row.key if row.built else f"({row.key})"


def _classes(row: Row) -> list[str]:
    def cell(task: str) -> str:
        name = row.classes.get(task)
        return "-" if name is None else f"**{name}**" if task in row.ours else name

    return [cell(task) for task in TASKS]


def _addons(head: Row, combinations: list[str]) -> list[str] | None:
    """The tasks of a family with each combination of add-ons; None for a family without any."""
    cells: dict[str, str] = {}
    for row in names.rows():
        if row.family == head.family and row.addons:
            tasks = [f"**{LETTERS[task]}**" if task in row.ours else LETTERS[task] for task in row.classes]
            shown = " ".join(tasks) if row.built else f"({' '.join(tasks)})"
            name = " + ".join(sorted(row.addons))
            cells[name] = f"{cells[name]}; {shown}" if name in cells else shown
    return [head.key, *(cells.get(name, "-") for name in combinations)] if cells else None


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
