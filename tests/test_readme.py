"""The README's and CONTRIBUTING's examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def examples() -> list[tuple[str, str]]:
    """Every block of Python, with the place where it stands."""
    found: list[tuple[str, str]] = []
    for name in ("README.md", "CONTRIBUTING.md", "docs/schedulers.md"):
        for match in re.finditer(r"^```python\n(.*?)^```", (ROOT / name).read_text("utf-8"), re.S | re.M):
            line = (ROOT / name).read_text("utf-8")[: match.start()].count("\n") + 1
            found.append((f"{name}:{line}", match[1]))
    return found


@pytest.mark.parametrize(("place", "code"), examples(), ids=[place for place, _ in examples()])
def test_example(place: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, place, "exec"), {"__name__": "example"})


def test_links_and_pictures_are_there() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "docs/differences.md", "docs/schedulers.md", "training/README.md"):
        page = ROOT / name
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{name} links to {target}"
