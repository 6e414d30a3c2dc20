"""The training program and its model: the checker is right, runs resume exactly, the model does as told."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import autopipeline as ap
from autopipeline import shipped

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import adherence
import autoencoder
import codec
import denoiser
import export
import scenes
import tokenizer

SAMPLES = [scenes.sample(11, i, full=True) for i in range(120)]


def test_the_checker_finds_the_drawn_scene_right() -> None:
    wrong = [scene.caption for scene in SAMPLES if adherence.judge(scene.caption, scenes.draw(scene))]
    assert len(wrong) <= 0.02 * len(SAMPLES), wrong


@pytest.mark.parametrize("kind", ["shape", "colour", "size", "place", "background", "pattern", "count"])
def test_the_checker_finds_every_fault(kind: str) -> None:
    """A caption that says something else than the picture shows is found wrong in just that."""
    found = tried = 0
    for scene in SAMPLES:
        if (changed := altered(scene, kind)) is None:
            continue
        tried += 1
        found += kind in adherence.judge(changed, scenes.draw(scene))
    assert tried >= 15
    assert found >= 0.98 * tried


def altered(scene: scenes.Scene, kind: str) -> str | None:
    """The caption with one fact changed; None where it can't be."""
    thing, caption = scene.things[0], scene.caption
    if kind == "place":
        if scene.relation is None or len(scene.things) != 2:
            return None
        turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[scene.relation]
        for said in ("to the left of", "to the right of", "left of", "right of", "above", "over", "below", "under"):
            if f" {said} " in caption:
                return caption.replace(f" {said} ", f" {turned} ")
        return None
    if kind == "count":
        return caption.replace(" on a", " left of a small red star on a", 1) if len(scene.things) == 1 else None
    ground = f"{scene.background} background"
    old, new = {
        "shape": (thing.shape, "ring" if thing.shape != "ring" else "star"),
        "colour": (f" {thing.colour} {thing.shape}", f" {other(thing.colour)} {thing.shape}"),
        "size": (thing.size, "large" if thing.size == "small" else "small"),
        "background": (ground, f"{other(scene.background)} background"),
        "pattern": (scene.pattern, "striped" if scene.pattern != "striped" else "dotted"),
    }[kind]
    if kind == "size":
        old = old if f" {old} " in caption else {"small": "little", "large": "big"}[old]
    if kind == "pattern" and scene.pattern == "plain":
        return re.sub(rf" an? (plain )?{ground}", f" a striped {ground}", caption)
    return caption.replace(old, new, 1)


def other(colour: str) -> str:
    return "red" if colour not in ("red", "orange") else "blue"


def test_no_held_out_caption_is_ever_trained_on() -> None:
    stream = [scenes.sample(0, i) for i in range(500)]
    assert not any(scene.held_out for scene in stream)
    assert all(scenes.sample(1, i, held_out=True).held_out for i in range(20))
    assert scenes.sample(0, 3) == scenes.sample(0, 3)


def test_every_word_is_a_token(tmp_path: Path) -> None:
    tokenizer.write(tmp_path)
    own = ap.CLIPTokenizer.from_pretrained(tmp_path)
    spelled = denoiser.Speller()([scene.caption for scene in SAMPLES])
    assert torch.equal(own([scene.caption for scene in SAMPLES]), spelled)
    assert all(len(scene.caption.split()) <= tokenizer.LENGTH - 2 for scene in SAMPLES)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder trained for a moment."""
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    autoencoder.train(path, 0.01, 0, "cpu", 4, 1e-3)
    return path


def test_the_codec_keeps_what_pictures_show() -> None:
    x = codec.pictures(11, 0, 40)
    weight, mean = codec.basis()
    codes = codec.encode(x)
    assert codes.shape == (40, 16, 16, 16)
    assert 0.9 < codes.std() < 1.1
    cells = codes.flatten(2).mT @ torch.linalg.pinv(weight) + mean  # back to cells of 8x8 pixels
    back = torch.nn.functional.fold(cells.mT, (128, 128), 8, stride=8)
    assert (back - x).pow(2).sum() < 0.02 * (x - x.mean()).pow(2).sum()


def test_a_stopped_run_ends_in_the_same_weights(vae: Path, tmp_path: Path) -> None:
    def steps(run: denoiser.Run, count: int) -> None:
        for _ in range(count):
            run.advance(2, run.seen / 6)

    whole, first, second = (denoiser.Run(0, "cpu", 1e-3, 1e-3) for _ in range(3))
    steps(whole, 3)
    steps(first, 2)
    first.save(tmp_path / "run.pt")
    second.load(tmp_path / "run.pt")
    steps(second, 1)
    assert (whole.step, whole.seen) == (second.step, second.seen) == (3, 6)
    before = denoiser.Run(0, "cpu", 1e-3, 1e-3).model.state_dict()
    after = second.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in whole.model.state_dict().items())
    assert any(not torch.equal(value, after[key]) for key, value in before.items())

    export.export(vae, tmp_path / "run.pt", tmp_path / "model", "DDIMScheduler")
    pipe = ap.AutoPipelineForText2Image.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red star", num_inference_steps=1, seed=0).images[0].size == (128, 128)


def test_the_shipped_model_is_small_and_whole() -> None:
    folder = shipped.path(shipped.DEFAULT)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md"}
    assert (folder / "README.md").is_file()


def test_the_shipped_model_shows_what_the_prompt_says() -> None:
    pipe = ap.AutoPipelineForText2Image.from_pretrained(shipped.DEFAULT)
    pipe.set_progress_bar_config(disable=True)
    prompts = adherence.captions(8, 1)
    made = pipe(prompts, num_inference_steps=12, guidance_scale=3.0, seed=list(range(8))).images
    found = [adherence.judge(prompt, np.asarray(picture)) for prompt, picture in zip(prompts, made, strict=True)]
    assert sum(not wrong for wrong in found) >= 6, found
    assert not any({"background", "pattern"} & set(wrong) for wrong in found), found
    assert sum("colour" in wrong or "place" in wrong for wrong in found) <= 1, found
