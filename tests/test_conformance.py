"""What holds for every (family, task): repeatable, batchable, switchable, savable, thread-safe, nothing ignored."""

from __future__ import annotations

import inspect
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autopipeline as ap
import tiny
from autopipeline import families, names

Checkpoint = Callable[[str], Path]

FOLDERS = {
    "stable-diffusion": "sd",
    "stable-diffusion-xl": "xl",
    "lcm": "lcm",
    "stable-diffusion-3": "sd3",
    "flux": "flux",
    "flux-kontext": "kontext",
    "chroma": "chroma",
    "auraflow": "auraflow",
    "ovis": "ovis",
    "prx": "prx",
    "hunyuan": "hunyuan",
    "pixart-alpha": "pixart-alpha",
    "pixart-sigma": "pixart-sigma",
    "sana": "sana",
}
SMALL = dict(height=32, width=32, max_sequence_length=16)
PIXART = dict(max_sequence_length=16, clean_caption=False, use_resolution_binning=False)
CALLS: dict[str, dict[str, Any]] = {
    "flux": SMALL,
    "flux-kontext": SMALL | dict(max_area=32 * 32, _auto_resize=False),
    "chroma": SMALL,
    "auraflow": SMALL,
    "prx": dict(height=32, width=32, use_resolution_binning=False),
    "ovis": SMALL | dict(max_sequence_length=40),
    "hunyuan": dict(use_resolution_binning=False),
    "pixart-alpha": PIXART,
    "pixart-sigma": PIXART,
    "sana": SMALL | dict(use_resolution_binning=False, complex_human_instruction=None),
}
"""What the calls of a family need to be quick, where its size does not follow from the network."""
CASES = [(row.key, task) for row in names.rows() if row.built and not row.addons for task in row.classes]
AUTO = {
    "text2image": "AutoPipelineForText2Image",
    "image2image": "AutoPipelineForImage2Image",
    "inpaint": "AutoPipelineForInpainting",
}
CALL = dict(prompt="red cat", num_inference_steps=4, output_type="np")


def test_every_built_family_is_tried() -> None:
    assert {key for key, _ in CASES} == set(FOLDERS) == set(families.BUILT)


@pytest.fixture(scope="module")
def load(checkpoint: Checkpoint) -> Callable[[str, str], Any]:
    pipes: dict[tuple[str, str], Any] = {}

    def get(key: str, task: str) -> Any:
        if (key, task) not in pipes:
            pipes[key, task] = getattr(ap, AUTO[task]).from_pretrained(checkpoint(FOLDERS[key]))
            pipes[key, task].set_progress_bar_config(disable=True)
        return pipes[key, task]

    return get


def arguments(pipe: Any, task: str) -> dict[str, Any]:
    """What a call of this task has beside its prompt."""
    params = pipe.family.tasks[task].params
    own = {name: value for name, value in CALLS.get(pipe.family.key, {}).items() if name in params}
    strength = {"strength": 0.75} if "strength" in params else {}
    return CALL | tiny.inputs(task) | strength | own | dict(seed=7)


def call(pipe: Any, task: str, **changes: Any) -> np.ndarray:
    return pipe(**arguments(pipe, task) | changes).images


@pytest.mark.parametrize(("key", "task"), CASES)
def test_same_seed_same_picture(load: Any, key: str, task: str) -> None:
    pipe = load(key, task)
    first, again, other = call(pipe, task), call(pipe, task), call(pipe, task, seed=8)
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


@pytest.mark.parametrize(("key", "task"), CASES)
def test_a_batch_is_its_singles(load: Any, key: str, task: str) -> None:
    pipe = load(key, task)
    both = call(pipe, task, prompt=["red cat", "sun"], seed=[7, 9])
    alone = [call(pipe, task, prompt="red cat", seed=7), call(pipe, task, prompt="sun", seed=9)]
    assert np.allclose(both, np.concatenate(alone), atol=2e-4)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_one_seed_counts_up_over_the_pictures(load: Any, key: str, task: str) -> None:
    pipe = load(key, task)
    three = call(pipe, task, num_images_per_prompt=3)
    assert np.allclose(three[2:], call(pipe, task, seed=9), atol=2e-4)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_numbers_may_be_lists(load: Any, key: str, task: str) -> None:
    pipe = load(key, task)
    lists = dict(num_inference_steps=[3, 5], guidance_scale=[4.0, 1.5])
    both = call(pipe, task, prompt=["red cat", "sun"], seed=[7, 9], **lists)
    first = call(pipe, task, num_inference_steps=3, guidance_scale=4.0)
    second = call(pipe, task, prompt="sun", seed=9, num_inference_steps=5, guidance_scale=1.5)
    assert np.allclose(both, np.concatenate([first, second]), atol=2e-4)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_save_and_load(load: Any, key: str, task: str, tmp_path: Path) -> None:
    pipe = load(key, task)
    pipe.save_pretrained(tmp_path / "saved")
    again = ap.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe)
    assert np.array_equal(call(pipe, task), call(again, task))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


@pytest.mark.parametrize(("key", "task"), CASES)
def test_switching_there_and_back(load: Any, key: str, task: str) -> None:
    pipe = load(key, task)
    for other in families.load(key).tasks:
        there = getattr(ap, AUTO[other]).from_pipe(pipe)
        back = getattr(ap, AUTO[task]).from_pipe(there)
        assert type(back) is type(pipe)
        assert all(back.components[name] is part for name, part in pipe.components.items())
        assert dict(back.config.items()) == dict(pipe.config)
        assert np.array_equal(call(pipe, task), call(back, task))


@pytest.mark.parametrize(("key", "task"), CASES)
def test_the_model_only_pipeline_follows_its_inputs(load: Any, checkpoint: Checkpoint, key: str, task: str) -> None:
    base = ap.DiffusionPipeline.from_pretrained(checkpoint(FOLDERS[key]))
    base.set_progress_bar_config(disable=True)
    assert type(base).__name__ == families.load(key).stem + "Pipeline"
    assert np.array_equal(call(base, task), call(load(key, task), task))


@pytest.mark.parametrize(("key", "task"), CASES)
def test_unknown_keywords_are_named(load: Any, key: str, task: str) -> None:
    with pytest.raises(TypeError, match="did you mean 'num_inference_steps'"):
        call(load(key, task), task, num_inference_step=3)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_signature_is_true_and_class_pickles(load: Any, key: str, task: str) -> None:
    pipe = load(key, task)
    parameters = inspect.signature(type(pipe).__call__).parameters
    row = families.load(key).tasks[task]
    assert list(parameters)[1 : 1 + len(row.params)] == list(row.params)
    assert all(parameters[name].default == default for name, default in row.params.items())
    assert pickle.loads(pickle.dumps(type(pipe))) is type(pipe)
    assert type(pipe).__name__ in dir(ap)
    assert isinstance(pipe, ap.DiffusionPipeline)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_cancel_at_a_step(load: Any, key: str, task: str) -> None:
    cancel, seen = threading.Event(), []

    def stop(pipe: Any, step: int, t: Any, tensors: Any) -> dict[str, Any]:
        seen.append(step)
        if step == 1:
            cancel.set()
        return {}

    with pytest.raises(ap.Cancelled):
        call(load(key, task), task, callback_on_step_end=stop, cancel=cancel, num_inference_steps=8)
    assert seen == [0, 1]


def test_tensors_and_arrays_are_dealt_out_item_by_item(load: Any) -> None:
    pipe = load("stable-diffusion", "image2image")
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    calls = dict(prompt=["red cat", "sun"], seed=[7, 9], strength=[0.9, 0.7])
    first = call(pipe, "image2image", image=pictures[:1], strength=0.9)
    second = call(pipe, "image2image", prompt="sun", seed=9, image=pictures[1:], strength=0.7)
    for given in (pictures, pictures.permute(0, 2, 3, 1).numpy(), list(pictures)):
        both = call(pipe, "image2image", image=given, **calls)
        assert np.allclose(both, np.concatenate([first, second]), atol=2e-4)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_stream_ends_with_the_result(load: Any, key: str, task: str) -> None:
    pipe = load(key, task)
    steps = list(pipe.stream(**arguments(pipe, task)))
    assert [step.index for step in steps] == list(range(steps[0].total))
    assert all(step.result is None for step in steps[:-1])
    assert np.array_equal(steps[-1].result.images, call(pipe, task))
    preview = steps[0].preview()[0]
    assert 0 < max(preview.size) <= 128
    assert steps[0].latents.shape == steps[-1].latents.shape


@pytest.mark.parametrize("key", list(FOLDERS))
def test_eight_threads_on_one_pipeline(load: Any, key: str) -> None:
    pipe = load(key, "text2image")
    sizes = [(64, 64), (64, 96), (80, 64), (64, 64)] * 2
    jobs: list[dict[str, Any]] = [
        dict(prompt=f"red cat {k}", seed=k, num_inference_steps=2 + k % 4, height=h, width=w, guidance_scale=1.0 + k)
        for k, (h, w) in enumerate(sizes)
    ]
    tasks = list(families.load(key).tasks) * 8

    def work(k: int) -> np.ndarray:
        task, job = tasks[k], dict(jobs[k])
        if task == "image2image":
            del job["height"], job["width"]
            job["num_inference_steps"] += 2
        elif "max_area" in pipe.family.tasks[task].params:
            job["max_area"] = job["height"] * job["width"]
        return call(getattr(ap, AUTO[task]).from_pipe(pipe), task, **job)

    serial = [work(k) for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(8)))
    for alone, among in zip(serial, together, strict=True):
        assert np.allclose(alone, among, atol=1e-5)


@pytest.mark.parametrize("key", ["stable-diffusion", "stable-diffusion-xl"])
def test_a_full_mask_is_image_to_image_and_an_empty_one_the_original(load: Any, key: str) -> None:
    pipe = load(key, "inpaint")
    white, black = tiny.mask().point(lambda _: 255), tiny.mask().point(lambda _: 0)
    latents = dict(output_type="latent", generator=torch.Generator().manual_seed(7), seed=None)
    size = dict(height=64, width=64)
    painted = call(pipe, "inpaint", mask_image=white, **size, **latents)
    latents["generator"] = torch.Generator().manual_seed(7)
    whole = call(load(key, "image2image"), "image2image", guidance_scale=7.5, **latents)
    assert torch.allclose(painted, whole, atol=1e-4)
    latents["generator"] = torch.Generator().manual_seed(7)
    kept = call(pipe, "inpaint", mask_image=black, **size, **latents)
    latents["generator"] = torch.Generator().manual_seed(7)
    scaled = pipe.family.stages(pipe.components, _run())[0].space
    from autopipeline import images
    from autopipeline.stage import Random

    with torch.no_grad():
        original = scaled.encode(images.pixels(tiny.photo(), multiple=8), Random(latents["generator"], 1))
    assert torch.allclose(kept, original, atol=1e-5)


def _run() -> Any:
    from autopipeline.stage import Random, Run

    return Run({}, {}, 1, 1, Random(None, 1))
