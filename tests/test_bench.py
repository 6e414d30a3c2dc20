"""`autopipeline bench`: what is measured, and how it is shown."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import autopipeline as ap
from autopipeline import bench, cli
from autopipeline.bench import layout, report, roofline, runs, worker
from autopipeline.speed import packing, prepare

QUICK = dict(steps=(2, 3), runs=1, dtype="float32", stored="float32", size=32)


@pytest.fixture
def bare(checkpoint: Any, tmp_path: Path) -> Path:
    """A checkpoint without its weights."""
    shutil.copytree(checkpoint("sd"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "bare"


def test_weights_are_drawn_for_a_layout(bare: Path, tmp_path: Path) -> None:
    size = layout.fill(bare, tmp_path / "made", torch.float16)
    pipe = ap.AutoPipelineForText2Image.from_pretrained(tmp_path / "made", dtype="stored")
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert size == sum(each.nbytes for part in parts for each in part.state_dict().values())
    assert pipe.unet.dtype == torch.float16
    weight = pipe.unet.conv_in.weight.detach().float()
    assert 0.5 < float(weight.std()) * weight[0].numel() ** 0.5 < 2
    assert not any(bare.rglob("*.safetensors"))


def test_transformers_may_be_shallow(checkpoint: Any, tmp_path: Path) -> None:
    bare, made = tmp_path / "bare", tmp_path / "made"
    shutil.copytree(checkpoint("sd3"), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    (bare / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    assert layout.fill(bare, made, torch.float32, depth=1) < layout.fill(bare, tmp_path / "whole", torch.float32)
    pipe = ap.AutoPipelineForText2Image.from_pretrained(made)
    assert len(pipe.transformer.transformer_blocks) == pipe.transformer.config.num_layers == 1
    assert not any(made.rglob("*.index.json"))


def test_what_is_found(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measured", lambda *_: {"matrix GFLOP/s": 100.0, "convolution GFLOP/s": 50.0})
    before = dict(os.environ)
    found = bench.bench(str(bare), random=True, without=("openvino",), parts=("load", "run"), batches=(2,), **QUICK)  # type: ignore[arg-type]
    names = [
        "load in float32",
        "load in float32, each weight looked at",
        "peak in float32, of the weights",
        "load in bfloat16",
    ]
    names += ["before the steps", "step", "decode", "whole picture", "picture in a batch of 2"]
    assert set(names) <= set(found["figures"])
    for name in set(names) - {"before the steps", "step", "decode"}:  # which are differences of what is hardly anything
        assert set(found["figures"][name]) == {"autopipeline", "diffusers"}
        assert all(value > 0 for value in found["figures"][name].values())
    assert set(found["shares"]) == {"step", "decode"}
    assert 0 <= max(found["difference"]["diffusers"]) < 2e-3
    assert dict(os.environ) == before
    report.plot(found, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as opened:
        colours = {colour for _, colour in opened.getcolors(10**6) or []}
    assert {(0x2A, 0x7F, 0x62), (0xB5, 0x44, 0x2E)} & colours


def test_operations_are_those_of_the_network(checkpoint: Any) -> None:
    pipe = ap.AutoPipelineForText2Image.from_pretrained(checkpoint("sd"))
    pipe.set_progress_bar_config(disable=True)
    packing.pack(pipe.unet)
    order = lambda **given: worker.answer(pipe, given)  # noqa: E731
    counted = runs.operations(order, (2, 4), {})
    again = runs.operations(order, (3, 6), {})
    assert counted["step"] == pytest.approx(again["step"])
    assert counted["step"] > 0
    assert counted["decode"] > 0
    assert prepare.OFF not in os.environ


def test_the_table_says_how_many_times_faster() -> None:
    found = {
        "machine": "a machine",
        "model": "a model",
        "dtype": "float32",
        "roofline": {"copy GB/s": 9.6},
        "figures": {
            "step": {"autopipeline": 2.0, "diffusers": 5.0},
            "load": {"autopipeline": 1.0},
            "decode": {"autopipeline": -0.01, "diffusers": 0.01},
            "peak in float32, of the weights": {"autopipeline": 1.01, "diffusers": 1.5},
        },
        "shares": {"step": 0.25},
        "difference": {"diffusers": (1e-6, 2e-7)},
    }
    lines = report.table(found).splitlines()
    assert lines[1] == "a model, float32; at best: copy GB/s 10"
    assert lines[3] == "|  | autopipeline | diffusers | times as fast as diffusers | of the machine |"
    assert lines[5:9] == [
        "| step | 2 s | 5 s | 2.50 | 25% |",
        "| load | 1 s | - | - | - |",
        "| decode | -0.01 s | 0.01 s | - | - |",
        "| peak in float32, of the weights | 1.01 x | 1.5 x | - | - |",
    ]
    assert lines[-1] == "Pictures differ from those of diffusers by 1.0e-06 of 1 at most, 2.0e-07 RMS."


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "imports", lambda libraries, count: {"import": dict.fromkeys(libraries, 0.5)})
    files = [str(tmp_path / name) for name in ("found.json", "plot.png")]
    assert cli.run(["bench", "--only", "import", "--without", "diffusers", "--json", files[0], "--plot", files[1]]) == 0
    assert "| import | 0.5 s | - |" in capsys.readouterr().out
    assert json.loads(Path(files[0]).read_text())["figures"] == {"import": {"autopipeline": 0.5}}
    with Image.open(files[1]) as opened:
        assert opened.size[0] > 100
    for given, said in (
        (["--depth", "1"], "--depth has no effect without --random"),
        (["--stored", "float32"], "--stored has no effect without --random"),
        *(
            (["--only", "import", *more], f"{more[0]} has no effect unless")
            for more in (["--batch", "2"], ["--steps", "2", "3"], ["--size", "64"], ["--compiled"])
        ),
    ):
        assert cli.run(["bench", *given]) == 2
        assert said in capsys.readouterr().err
    assert cli.run(["bench", "--steps", "3", "3"]) == 2
    assert "the first has to be the smaller one" in capsys.readouterr().err


def test_the_roofline_is_measured() -> None:
    found = roofline.measured(torch.float32, torch.device("cpu"))
    assert all(value > 0 for value in found.values())
    assert "torch" in roofline.line()


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with (
        runs.workers(["autopipeline"], tmp_path / "none", "float32", "cpu") as made,
        pytest.raises(ap.CheckpointError, match="process of autopipeline failed.*none"),
    ):
        made["autopipeline"](steps=1, output="np")


def test_a_worker_that_is_killed_says_so(checkpoint: Any) -> None:
    with runs.workers(["autopipeline"], checkpoint("sd"), "float32", "cpu") as made:
        assert made["autopipeline"](steps=2, output="np") > 0
        made["autopipeline"]._process.kill()
        with pytest.raises(ap.CheckpointError, match=r"autopipeline failed: it was killed.*memory"):
            made["autopipeline"](steps=2, output="np")


def test_openvino_is_measured_beside(checkpoint: Any) -> None:
    pytest.importorskip("openvino")
    with runs.workers([worker.OURS, worker.OPENVINO], checkpoint("sd"), "default", "cpu") as made:
        found = runs.parts(made, (2, 3), 1, {})
        apart = runs.difference(made, 2, {})
    assert set(found["whole picture"]) == {worker.OURS, worker.OPENVINO}
    assert 0 < apart[worker.OPENVINO][1] <= apart[worker.OPENVINO][0] < 2e-3
