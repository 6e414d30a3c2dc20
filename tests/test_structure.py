"""The direction of imports, what may be named where, and that nothing heavy is imported early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import autopipeline as ap

SOURCE = Path(ap.__file__).parent
ORDER = [
    {"config", "errors", "noise", "quadrature"},
    {"stepping"},
    {"models", "schedulers"},
    {"captions", "guidance", "images", "prompts", "sentencepiece", "spaces", "stage", "text"},
    {"denoise", "reuse", "speed"},
    {"addons", "tasks"},
    {"families", "shipped"},
    {"names", "loading", "kinds", "samplers"},
    {"mapping", "selection"},
    {"inspection", "linked"},
    {"binding"},
    {"pipeline"},
    {"auto"},
    {"recipe"},
    {"bench", "cli", "__init__", "__main__", "stub"},
]
RANK = {name: rank for rank, layer in enumerate(ORDER) for name in layer}


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports when it is imported (not those inside functions or for typing)."""
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "autopipeline":
            tail = node.module.split(".")[1:]
            parts = [tail[0]] if tail else [alias.name for alias in node.names]
            found |= {name if name in RANK else "__init__" for name in parts}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    own = part(path)
    assert own in RANK, f"{own} has no place in ORDER"
    for other in imported(path) - {own}:
        assert RANK[other] <= RANK[own], f"{own} imports {other}"
    if own in ("models", "schedulers", "stepping"):
        beside = set[str]() if own == "models" else {"noise", "quadrature", "stepping"}
        assert imported(path) <= {own, "config", "errors"} | beside
    if own in ("addons", "tasks"):
        assert not imported(path) & {"families", "addons", "tasks"} - {own}


def test_no_family_is_named_in_the_core() -> None:
    for name in ("denoise", "stage", "guidance", "spaces", "binding", "pipeline"):
        text = (SOURCE / f"{name}.py").read_text("utf-8")
        tree = ast.parse(text)
        docs = {
            ast.get_docstring(node, clean=False)
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docs:
                assert "diffusion-xl" not in node.value
                assert node.value not in ("lcm", "stable-diffusion")


def test_importing_the_package_imports_no_torch() -> None:
    assert not heavy(
        "import autopipeline, autopipeline.names, autopipeline.selection, autopipeline.cli, autopipeline.samplers"
    )


def test_pipelines_import_no_transformers() -> None:
    found = heavy("import autopipeline as ap; ap.StableDiffusionXLPipeline; ap.CLIPTextModel; ap.CLIPTokenizer")
    assert found == {"torch"}


def heavy(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has imported after this code."""
    code += "; import sys; print(*{'torch', 'torch._dynamo', 'transformers', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_making_a_picture_imports_no_compiler() -> None:
    """torch's compiler takes longer to import than a small picture to make."""
    code = "import autopipeline as ap; pipe = ap.DiffusionPipeline.from_pretrained('scenes-128')"
    code += "; pipe.set_progress_bar_config(disable=True); pipe('a red star', num_inference_steps=1)"
    assert heavy(code) == {"torch"}


def test_every_public_name_is_there() -> None:
    for name in dir(ap):
        assert getattr(ap, name) is not None
    with pytest.raises(AttributeError, match="NoSuchPipeline"):
        _ = ap.NoSuchPipeline


def test_the_type_stub_is_current() -> None:
    from autopipeline import stub

    for folder, text in ((SOURCE, stub.text()), (SOURCE / "schedulers", stub.schedulers_text())):
        assert (folder / "__init__.pyi").read_text("utf-8") == text, "run `python -m autopipeline.stub`"


def test_the_page_of_families_is_current() -> None:
    from autopipeline import mapping

    page = Path(__file__).parents[1] / "docs" / "families.md"
    assert page.read_text("utf-8") == mapping.markdown(), "run `autopipeline models --markdown > docs/families.md`"
