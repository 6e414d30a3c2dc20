"""The command line: pictures with their recipes, the same picture again, one sentence for every failure."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import tiny
from autopipeline import cli, recipe

Checkpoint = Callable[[str], Path]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: exit code, stdout, stderr."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def generate(command: Command, checkpoint: Checkpoint) -> Command:
    def call(*arguments: Any) -> tuple[int, str, str]:
        return command("generate", "red cat", "-m", checkpoint("sd"), "--steps", 3, "-q", "--device", "cpu", *arguments)

    return call


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_a_picture_with_its_recipe(generate: Command, tmp_path: Path) -> None:
    code, out, _ = generate("-o", tmp_path / "a.png", "-s", 7, "--cfg-scale", 4.5, "--negative-prompt", "sun")
    assert (code, out.strip()) == (0, str(tmp_path / "a.png"))
    facts = recipe.load(tmp_path / "a.png")
    assert facts["class"] == "StableDiffusionPipeline"
    assert facts["seed"] == 7
    assert facts["call"]["guidance_scale"] == 4.5
    assert facts["call"]["eta"] == 0.0  # what was left at its default is there too
    assert facts["scheduler"]["_class_name"] == "PNDMScheduler"
    with Image.open(tmp_path / "a.png") as picture:
        text = picture.info["parameters"]
    first, negative, rest = text.splitlines()
    assert (first, negative) == ("red cat", "Negative prompt: sun")
    known = dict(part.split(": ", 1) for part in rest.split(", "))
    assert known["Steps"] == "3"
    assert known["Sampler"] == "PLMS"
    assert known["CFG scale"] == "4.5"
    assert known["Seed"] == "7"
    assert known["Size"] == "64x64"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_same_seed_and_another(generate: Command, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert generate("-o", tmp_path / f"{name}.png", "-s", seed)[0] == 0
    a, b, c = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_rerun_is_identical(generate: Command, command: Command, tmp_path: Path) -> None:
    assert generate("-o", tmp_path / "many.png", "-s", 3, "-n", 2)[0] == 0
    for name in ("many-1.png", "many-2.png"):
        code, out, _ = command("rerun", tmp_path / name, "-q")
        assert (code, out.strip()) == (0, "identical")
    assert command("rerun", tmp_path / "many-2.png", "-q", "-o", tmp_path / "again.png")[0] == 0
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "many-2.png"))


@pytest.mark.parametrize("options", [("--reuse", 0.5), ("--engine", "openvino")])
def test_what_makes_it_faster_is_in_the_recipe(
    generate: Command, command: Command, tmp_path: Path, options: tuple[Any, ...]
) -> None:
    if options[1] == "openvino":
        pytest.importorskip("openvino")
    assert generate("-o", tmp_path / "plain.png", "-s", 7, "--steps", 8)[0] == 0
    assert generate("-o", tmp_path / "a.png", "-s", 7, "--steps", 8, *options)[0] == 0
    facts = recipe.load(tmp_path / "a.png")
    assert options[1] in (facts["engine"], facts["call"].get("reuse"))
    differs = np.abs(pixels(tmp_path / "a.png").astype(int) - pixels(tmp_path / "plain.png")).max()
    assert differs > 0 if options[0] == "--reuse" else differs <= 1
    assert command("rerun", tmp_path / "a.png", "-q")[0] == 0


def test_rerun_says_what_differs(generate: Command, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert generate("-o", path, "-s", 3)[0] == 0
    facts = recipe.load(path)
    with Image.open(path) as picture:
        changed = picture.convert("RGB")
    changed.putpixel((0, 0), tuple(255 - value for value in changed.getpixel((0, 0))))
    facts["versions"]["torch"] = "0.0"
    recipe.save(changed, path, facts)
    code, out, _ = command("rerun", path, "-q")
    assert code == 1
    assert out.startswith("different by at most ")
    assert "torch 0.0 then" in out


def test_rerun_with_inputs(generate: Command, command: Command, tmp_path: Path) -> None:
    start, mask, made = tmp_path / "start.png", tmp_path / "mask.png", tmp_path / "made.png"
    tiny.photo().save(start)
    tiny.mask().save(mask)
    assert generate("-i", start, "--mask", mask, "-s", 1, "-o", made, "--strength", 0.9)[0] == 0
    assert recipe.load(made)["class"] == "StableDiffusionInpaintPipeline"
    assert command("rerun", made, "-q")[1].strip() == "identical"
    tiny.photo(1).save(start)
    code, _, err = command("rerun", made, "-q")
    assert code == 2
    assert "has changed" in err
    start.unlink()
    assert "does not exist" in command("rerun", made, "-q")[2]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("-o", "picture.jpg"), 2, "has to end in .png"),
        (("-o", "nowhere/picture.png"), 2, "nowhere does not exist"),
        (("--strength", 0.5), 2, "strength"),
        (("-W", 0), 2, "width=0 has to be a whole number of at least 1"),
        (("-s", 2**64), 2, "not in the range"),
        (("--cfg-scale", "nan"), 2, "no finite number"),
        (("--scheduler", ""), 2, "--scheduler is empty"),
        (("-m", ""), 2, "--model is empty"),
        (("--device", "meta"), 2, "'meta' is no device"),
        (("--device", "xpu"), 2, "can't use one here"),
        (("--dtype", "int8"), 2, "can't hold weights"),
        (("--variant", "fp16"), 3, "no variant 'fp16'; there are no variants at all"),
        (("--task", "text2image", "-i", __file__), 2, "--image has no effect on --task text2image"),
        (("--task", "image2image", "-i", __file__, "--mask", __file__), 2, "--mask has no effect"),
        (("--mask", __file__), 2, "--mask needs --image"),
        (("-W", 65), 2, "width=65 is not a positive multiple of 8"),
        (("--scheduler", "eula"), 2, "There is no scheduler 'eula'"),
        (("--task", "image2image"), 2, "Image-to-image needs image"),
        (("--dtype", "float17"), 2, "is no dtype"),
        (("--steps", 0), 2, "num_inference_steps=0"),
        (("-m", "no-such-folder"), 3, "no-such-folder"),
        (("-n", 0), 2, "not in the range"),
        (("--stepps", 3), 2, "No such option"),
        (("-i", "missing.png"), 2, "does not exist"),
    ],
)
def test_failures_are_a_sentence_and_a_code(
    generate: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[Any, ...],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    got, out, err = generate(*arguments)
    assert got == code
    assert sentence in err
    assert "Traceback" not in err
    assert not out
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a.png").write_bytes(b"before")
    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = generate("-o", tmp_path / "a.png")
    assert code == 4
    assert "No space left" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"before"


def test_an_unwritable_folder(generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))  # root may write anywhere

    monkeypatch.setattr(tempfile, "mkstemp", refused)
    code, _, err = generate("-o", tmp_path / "a.png")
    assert code == 2
    assert "a.png can't be written: Permission denied." in err
    monkeypatch.undo()
    code, _, err = generate("-o", tmp_path / f"{'a' * 300}.png")
    assert code == 2  # before anything is computed
    assert "can't be written: File name too long." in err


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_rerun_of_what_is_no_picture(command: Command, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    code, _, err = command("rerun", tmp_path / "a.png")
    assert code == 2
    assert "can't be read as a picture" in err


def test_rerun_without_a_recipe(command: Command, tmp_path: Path) -> None:
    tiny.photo().save(tmp_path / "a.png")
    assert "holds no recipe" in command("rerun", tmp_path / "a.png")[2]
    assert "does not exist" in command("rerun", tmp_path / "b.png")[2]


def test_rerun_where_everything_has_moved(
    generate: Command, command: Command, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    monkeypatch.chdir(before)
    tiny.photo().save("start.png")
    assert generate("-i", "start.png", "-s", 1, "-o", "made.png")[0] == 0
    before.rename(after)
    monkeypatch.chdir(tmp_path)
    assert command("rerun", after / "made.png", "-q")[1].strip() == "identical"  # beside the picture
    (after / "start.png").rename(tmp_path / "elsewhere.png")
    code, _, err = command("rerun", after / "made.png", "-q")
    assert code == 2
    assert "pass --image with its place" in err
    shutil.copytree(checkpoint("sd"), tmp_path / "model")
    moved = ("-i", tmp_path / "elsewhere.png", "-m", tmp_path / "model", "--device", "cpu")
    assert command("rerun", after / "made.png", "-q", *moved)[1].strip() == "identical"
    assert "recipe has no such picture" in command("rerun", after / "made.png", "-q", *moved, "--mask", "x.png")[2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda facts: [],
        lambda facts: {},
        lambda facts: facts | {"call": "x"},
        lambda facts: facts | {"batch": {"seed": 1, "count": 1, "index": 4}},
        lambda facts: facts | {"batch": {"seed": None, "count": 1, "index": 0}},
    ],
)
def test_rerun_of_a_damaged_recipe(
    generate: Command, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    assert generate("-o", tmp_path / "a.png", "-s", 3)[0] == 0
    facts = recipe.load(tmp_path / "a.png")
    info = PngInfo()
    info.add_itxt(recipe.KEY, json.dumps(damage(facts)))
    tiny.photo().save(tmp_path / "b.png", pnginfo=info)
    code, _, err = command("rerun", tmp_path / "b.png")
    assert code == 2
    assert "The recipe in" in err
    assert "is damaged." in err


def test_a_recipe_cannot_open_pickled_weights(generate: Command, tmp_path: Path) -> None:
    assert generate("-o", tmp_path / "a.png", "-s", 3)[0] == 0
    facts = recipe.load(tmp_path / "a.png")
    facts["load"] |= {"use_safetensors": False, "token": "x"}
    recipe.save(tiny.photo(), tmp_path / "b.png", facts)
    assert set(recipe.load(tmp_path / "b.png")["load"]) == {"variant", "revision", "dtype"}


def test_a_picture_of_enormous_size(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.photo().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    code, _, err = command("rerun", tmp_path / "a.png")
    assert code == 2
    assert "can't be read as a picture" in err


def test_names_are_not_taken_twice(tmp_path: Path) -> None:
    first = recipe.targets(str(tmp_path), "Red  cat!", 5, 1)[0]
    assert first.name == "red-cat-5.png"
    first.touch()
    assert recipe.targets(str(tmp_path), "Red  cat!", 5, 1)[0].name == "red-cat-5_2.png"
    assert [p.name for p in recipe.targets(str(tmp_path / "x.png"), "", 0, 2)] == ["x-1.png", "x-2.png"]


def test_inspect(command: Command, checkpoint: Checkpoint) -> None:
    code, out, _ = command("inspect", checkpoint("xl"), "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["class"] == "StableDiffusionXLPipeline"
    assert facts["tasks"] == ["text2image", "image2image", "inpaint"]
    weights = sum(path.stat().st_size for path in checkpoint("xl").rglob("*.safetensors"))
    assert 0.8 * weights < facts["bytes"] < weights
    assert facts["components"]["unet"]["class"] == "UNet2DConditionModel"
    code, out, _ = command("inspect", checkpoint("xl"))
    assert "StableDiffusionXLPipeline" in out
    assert "inpainting" in out or "inpaint" in out


def test_inspect_of_nothing(command: Command, tmp_path: Path) -> None:
    code, _, err = command("inspect", tmp_path)
    assert code == 3
    assert "model_index.json" in err


@pytest.mark.parametrize(
    "header",
    [b"[]", b'{"a": "b"}', b'{"a": {"dtype": "F32"}}', b"[" * 100_000, b'{"a":{"shape":[4],"data_offsets":[0,16]}}'],
)
def test_inspect_of_damaged_weights(command: Command, checkpoint: Checkpoint, tmp_path: Path, header: bytes) -> None:
    folder = Path(shutil.copytree(checkpoint("sd"), tmp_path / "copy"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    code, _, err = command("inspect", folder)
    assert code == 3
    assert "diffusion_pytorch_model.safetensors is truncated or damaged." in err


def test_models(command: Command) -> None:
    _, out, _ = command("models", "--json")
    rows = {row["key"]: row for row in json.loads(out)}
    assert rows["stable-diffusion-xl"]["built"]
    assert rows["stable-diffusion-xl"]["inpaint"] == "StableDiffusionXLInpaintPipeline"
    unbuilt = [key for key, row in rows.items() if not row["built"]]
    _, out, _ = command("models")
    assert "* lcm" in out
    assert all(f"  {key} " in out for key in unbuilt)


@pytest.mark.parametrize("arguments", [("--help",), ("models",), ("inspect", "scenes-128"), ("generate", "--help")])
def test_what_needs_no_network_imports_no_torch(arguments: tuple[str, ...]) -> None:
    code = f"import sys; from autopipeline import cli; cli.run({list(arguments)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_as_a_program(tmp_path: Path) -> None:
    """The shipped model, as a newcomer calls it."""
    call = [sys.executable, "-m", "autopipeline", "generate", "a large red circle on a white background"]
    done = subprocess.run([*call, "-o", str(tmp_path / "a.png"), "-s", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(seed 1)" in done.stdout
    picture = pixels(tmp_path / "a.png")
    assert picture.shape == (128, 128, 3)
    assert (picture[:4] > 200).all()  # a white background
    red = (picture[..., 0] > 150) & (picture[..., 1] < 110) & (picture[..., 2] < 110)
    assert 0.03 < red.mean() < 0.4
