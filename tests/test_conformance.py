"""What holds for every (family, task, add-ons): repeatable, batchable, switchable, savable, thread-safe.

A new row of names.py needs an entry in `MADE`, and one in `CALLS` where its calls are not quick by themselves.
"""

from __future__ import annotations

import inspect
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import autopipeline as ap
import language
import qwenimage
import tiny
from autopipeline import binding, families, names
from autopipeline.models.autoencoder_kl import Posterior

Checkpoint = Callable[[str], Path]


class Made(NamedTuple):
    """How to make a row's pipelines: a checkpoint of conftest.py, and control networks of tiny.py."""

    folder: str
    controlnet: str | None = None
    inpaint: str | None = None  # the control network for inpainting, where it is another one


CONTROLNETS: dict[str, Callable[[], Any]] = tiny.CONTROLNETS | {
    "qwenimage": qwenimage.controlnet,
    "z-image": language.z_controlnet,
}
MADE: dict[str, Made] = {
    "stable-diffusion": Made("sd"),
    "stable-diffusion-controlnet": Made("sd", "sd"),
    "stable-diffusion-xl": Made("xl"),
    "stable-diffusion-xl-controlnet": Made("xl", "xl"),
    "stable-diffusion-xl-controlnet-union": Made("xl", "xl-union"),
    "lcm": Made("lcm"),
    "stable-diffusion-3": Made("sd3"),
    "stable-diffusion-3-controlnet": Made("sd3", "sd3", inpaint="sd3-inpaint"),
    "flux": Made("flux"),
    "flux-control": Made("flux-control"),
    "flux-controlnet": Made("flux", "flux"),
    "flux-kontext": Made("kontext"),
    "chroma": Made("chroma"),
    "auraflow": Made("auraflow"),
    "hunyuan": Made("hunyuan"),
    "pixart-alpha": Made("pixart-alpha"),
    "pixart-sigma": Made("pixart-sigma"),
    "sana": Made("sana"),
    "flux2": Made("flux2"),
    "flux2-klein": Made("klein"),
    "ideogram4": Made("ideogram4"),
    "ovis": Made("ovis"),
    "krea2": Made("krea2"),
    "nucleusmoe-image": Made("nucleus"),
    "prx": Made("prx"),
    "cogview3": Made("cogview3"),
    "cogview4": Made("cogview4"),
    "cogview4-control": Made("cogview4-control"),
    "qwenimage": Made("qwenimage"),
    "qwenimage-controlnet": Made("qwenimage", "qwenimage"),
    "qwenimage-edit": Made("qwenimage-edit"),
    "qwenimage-edit-plus": Made("qwenimage-edit-plus"),
    "qwenimage-layered": Made("qwenimage-layered"),
    "qwenimage21": Made("qwenimage21"),
    "z-image": Made("z-image"),
    "z-image-omni": Made("omni"),
    "z-image-controlnet": Made("z-image", "z-image"),
    "z-image-controlnet-inpaint": Made("z-image", "z-image"),
    "lumina": Made("lumina"),
    "lumina2": Made("lumina2"),
    "glm_image": Made("glm"),
    "if": Made("if"),
    "kandinsky": Made("kandinsky"),
    "kandinsky22": Made("kandinsky22"),
    "kandinsky3": Made("kandinsky3"),
    "wuerstchen": Made("wuerstchen"),
    "cascade": Made("cascade"),
    "kolors": Made("kolors"),
}
"""By the key of a row; rows with PAG are made as those without it."""

SMALL = dict(height=32, width=32, max_sequence_length=16)
PIXART = dict(max_sequence_length=16, clean_caption=False, use_resolution_binning=False)
STAGES = dict(height=64, width=64, prior_num_inference_steps=2)
QWEN = dict(height=32, width=32, true_cfg_scale=3.0, negative_prompt="sun")
CALLS: dict[str, dict[str, Any]] = {
    "stable-diffusion-3": dict(max_sequence_length=16),
    "flux": SMALL,
    "flux-kontext": SMALL | dict(max_area=32 * 32, _auto_resize=False),
    "chroma": SMALL,
    "auraflow": SMALL,
    "krea2": SMALL | dict(max_sequence_length=30),
    "nucleusmoe-image": dict(height=32, width=32, return_index=-2),
    "prx": dict(height=32, width=32, use_resolution_binning=False),
    "ovis": SMALL | dict(max_sequence_length=40),
    "hunyuan": dict(use_resolution_binning=False),
    "pixart-alpha": PIXART,
    "pixart-sigma": PIXART,
    "flux2": SMALL | dict(max_sequence_length=64, text_encoder_out_layers=(1, 3)),
    "flux2-klein": SMALL | dict(max_sequence_length=32, text_encoder_out_layers=(1, 3)),
    "ideogram4": SMALL | dict(guidance_scale=4.0, guidance_schedule=None),
    "qwenimage": QWEN,
    "qwenimage-edit": QWEN,
    "qwenimage-edit-plus": QWEN,
    "qwenimage21": dict(height=64, width=64, true_cfg_scale=3.0, negative_prompt="sun"),
    "qwenimage-layered": dict(true_cfg_scale=3.0, negative_prompt="sun", layers=2),
    "cogview3": SMALL,
    "cogview4": SMALL,
    "z-image": SMALL,
    "z-image-omni": SMALL,
    "glm_image": dict(height=64, width=32),
    "if": dict(height=32, width=32, clean_caption=False),
    "kandinsky": STAGES,
    "kandinsky22": STAGES,
    "wuerstchen": STAGES | dict(height=128, width=128),
    "cascade": STAGES | dict(height=128, width=128),
    "kandinsky3": dict(height=64, width=64, guidance_scale=1.0, pag_scale=0.5),
    "lumina": dict(max_sequence_length=16, clean_caption=False),
    "lumina2": dict(max_sequence_length=24, system_prompt="sun"),
    "sana": SMALL | dict(use_resolution_binning=False, complex_human_instruction=None),
}
"""What the calls of a family (its key) need to be quick, where its size does not follow from the network."""
UNDRAWN: dict[str, dict[str, Any]] = {
    "hunyuan": dict(scheduler="DDIM"),
    "lcm": dict(num_inference_steps=1),
    "kandinsky3": dict(scheduler="DDIM"),
    "if": dict(scheduler="DDIM"),
}
"""What keeps a row's steps, with PAG or without, from drawing noise of their own."""
OTHERWISE_DRAWN = ("flux-control",)
"""Rows whose inpainting draws its noise at another place than image-to-image does, as users of a seed know it."""

ROWS = {row.key: row for row in names.rows() if row.built}
CASES = [(key, task) for key, row in ROWS.items() for task in row.classes]
KEEPING = [key for key, row in ROWS.items() if {"image2image", "inpaint"} <= set(row.classes)]
AUTO = names.AUTO
CALL = dict(prompt="red cat", num_inference_steps=3, output_type="np")
PICTURES = tiny.inputs("inpaint") | dict(control_image=tiny.photo(seed=4), control_mask=tiny.mask())


def made(key: str) -> Made | None:
    """How to make a row, by that without PAG."""
    family, addons = ROWS[key].family, ROWS[key].addons - {"PAG"}
    plain = [other for other, row in ROWS.items() if row.family == family and row.addons == addons]
    return MADE.get(key) or next((MADE[other] for other in plain if other in MADE), None)


def test_every_built_row_is_tried() -> None:
    assert [key for key in ROWS if made(key) is None] == []
    assert set(MADE) <= set(ROWS)
    assert {row.family for row in ROWS.values()} == set(families.BUILT) - {row.key for row in names.PARTS}


pytestmark = [
    pytest.mark.usefixtures("small_edits"),
    pytest.mark.filterwarnings("ignore:.*has no effect on inpainting:UserWarning"),  # a size that follows the picture
    pytest.mark.filterwarnings("ignore:.*is no multiple of 128 pixels:UserWarning"),  # the nearest is made
]


@pytest.fixture(scope="module")
def load(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    pipes: dict[tuple[str, str, str | None], Any] = {}
    nets: dict[str, Any] = {}

    def net(name: str) -> Any:
        if name not in nets:
            peer, folder = CONTROLNETS[name](), tmp_path_factory.mktemp(name)
            peer.save_pretrained(folder)
            nets[name] = getattr(ap, type(peer).__name__).from_pretrained(folder)
        return nets[name]

    def get(key: str, task: str, called: str = "") -> Any:
        """The pipeline of a row's class for `task`, with what a call for another task needs."""
        folder, usual, inpaint = made(key)  # type: ignore[misc]
        name = inpaint if inpaint and (called or task) == "inpaint" else usual
        if (key, task, name) not in pipes:
            row = ROWS[key]
            options = {"controlnet": net(name)} if name else {}
            if "Inpaint" in row.addons:  # only its name tells it from the row without
                pipe = getattr(ap, row.classes[task]).from_pretrained(checkpoint(folder), **options)
            else:
                options |= {"enable_pag": True} if "PAG" in row.addons else {}
                pipe = getattr(ap, AUTO[task]).from_pretrained(checkpoint(folder), **options)
            assert type(pipe).__name__ == row.classes[task]
            pipe.set_progress_bar_config(disable=True)
            pipes[key, task, name] = pipe
        return pipes[key, task, name]

    return get


def arguments(pipe: Any, task: str, **changes: Any) -> dict[str, Any]:
    """What a call of this task has beside its prompt."""
    params = pipe.family.tasks[task].params
    own = {name: value for name, value in CALLS.get(pipe.family.key, {}).items() if name in params}
    own |= {"control_mode": 3} if "Union" in type(pipe).__name__ else {}
    begins = task != "text2image" or "controlnet" in pipe.family.slots or "control_image" in params
    pictures = {name: picture for name, picture in PICTURES.items() if name in params and begins}
    strength = {"strength": 0.75} if "strength" in params else {}
    return CALL | pictures | strength | own | dict(seed=7) | changes


def scale_of(pipe: Any) -> str:
    """The number that says how strong guidance is."""
    params = next(iter(pipe.family.tasks.values())).params
    if "decoder_guidance_scale" in params:
        return "decoder_guidance_scale"
    true = params.get("true_cfg_scale") and not params.get("guidance_scale")
    return "true_cfg_scale" if true else "guidance_scale"


def call(pipe: Any, task: str, **changes: Any) -> Any:
    made = pipe(**arguments(pipe, task, **changes)).images
    return np.stack(made) if isinstance(made, list) and isinstance(made[0], np.ndarray) else made  # layers


@pytest.fixture(scope="module")
def seen(load: Any) -> Callable[..., np.ndarray]:
    """The picture of a row's task, made once."""
    pictures: dict[Any, np.ndarray] = {}

    def get(key: str, task: str, **changes: Any) -> np.ndarray:
        which = (key, task, *sorted(changes.items()))
        if which not in pictures:
            pictures[which] = call(load(key, task), task, **changes)
        return pictures[which]

    return get


@pytest.mark.parametrize(("key", "task"), CASES)
def test_same_seed_same_picture(load: Any, seen: Any, key: str, task: str) -> None:
    first, again, other = seen(key, task), call(load(key, task), task), seen(key, task, seed=8)
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


@pytest.mark.parametrize(("key", "task"), CASES)
def test_a_batch_is_its_singles(load: Any, seen: Any, key: str, task: str) -> None:
    both = call(load(key, task), task, prompt=["red cat", "sun"], seed=[7, 9])
    alone = [seen(key, task), call(load(key, task), task, prompt="sun", seed=9)]
    assert np.allclose(both, np.concatenate(alone), atol=2e-4)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_one_seed_counts_up_over_the_pictures(load: Any, seen: Any, key: str, task: str) -> None:
    both = call(load(key, task), task, num_images_per_prompt=2)
    assert np.allclose(both, np.concatenate([seen(key, task), seen(key, task, seed=8)]), atol=2e-4)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_numbers_may_be_lists(load: Any, key: str, task: str) -> None:
    pipe = load(key, task)
    scale = scale_of(pipe)
    lists = {"num_inference_steps": [2, 4], scale: [4.0, 1.5]}
    both = call(pipe, task, prompt=["red cat", "sun"], seed=[7, 9], **lists)
    first = call(pipe, task, **{"num_inference_steps": 2, scale: 4.0})
    second = call(pipe, task, prompt="sun", seed=9, **{"num_inference_steps": 4, scale: 1.5})
    assert np.allclose(both, np.concatenate([first, second]), atol=2e-4)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_save_and_load(load: Any, seen: Any, key: str, task: str, tmp_path: Path) -> None:
    pipe = load(key, task)
    pipe.save_pretrained(tmp_path / "saved")
    again = ap.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe)
    assert np.array_equal(seen(key, task), call(again, task))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


@pytest.mark.parametrize(("key", "task"), CASES)
def test_switching_there_and_back(load: Any, seen: Any, key: str, task: str) -> None:
    pipe = load(key, task)
    for other in ROWS[key].classes:
        there = getattr(ap, AUTO[other]).from_pipe(pipe)
        back = getattr(ap, AUTO[task]).from_pipe(there)
        assert type(back) is type(pipe)
        assert all(back.components[name] is part for name, part in pipe.components.items())
        assert dict(back.config.items()) == dict(pipe.config)
    assert np.array_equal(seen(key, task), call(back, task))


@pytest.mark.parametrize(("key", "task"), [case for case in CASES if ROWS[case[0]].addons])
def test_taking_add_ons_off_and_putting_them_back(load: Any, seen: Any, key: str, task: str) -> None:
    pipe, row = load(key, task), ROWS[key]
    plain = [one for one in ROWS.values() if one.family == row.family and not one.addons and task in one.classes]
    if {"Control", "Inpaint"} & row.addons or not plain:
        pytest.skip("is a checkpoint of its own")
    off: dict[str, Any] = {"enable_pag": False} if "PAG" in row.addons else {}
    on: dict[str, Any] = {"enable_pag": True} if "PAG" in row.addons else {}
    if {"ControlNet", "ControlNetUnion"} & row.addons:
        off, on = off | {"controlnet": None}, on | {"controlnet": pipe.controlnet}
    without = getattr(ap, AUTO[task]).from_pipe(pipe, **off)
    assert type(without).__name__ == plain[0].classes[task]
    back = getattr(ap, AUTO[task]).from_pipe(without, **on)
    assert type(back) is type(pipe)
    assert np.array_equal(seen(key, task), call(back, task))


@pytest.mark.parametrize(("key", "task"), [case for case in CASES if "PAG" in ROWS[case[0]].addons])
def test_perturbed_attention_pushes(load: Any, seen: Any, key: str, task: str) -> None:
    """Without strength it is the picture without PAG; with it, another one, and which attentions matters."""
    pipe = load(key, task)
    plain = call(pipe, task, pag_scale=0.0)
    pushed = [seen(key, task), seen(key, task, pag_scale=1.0), seen(key, task, pag_adaptive_scale=0.003)]
    networks = [part for part in pipe.components.values() if hasattr(part, "self_attentions")]
    if all(len(list(part.self_attentions())) > 1 for part in networks):
        pushed.append(call(type(pipe).from_pipe(pipe, pag_applied_layers=[".*"]), task))
    for k, picture in enumerate(pushed):
        assert np.isfinite(picture).all()
        assert min(np.abs(picture - other).max() for other in [plain, *pushed[:k]]) > 4e-6, k
    if "Control" in ROWS[key].addons or "Inpaint" in ROWS[key].addons:
        return  # is a checkpoint of its own
    without = getattr(ap, AUTO[task]).from_pipe(pipe, enable_pag=False)
    assert np.array_equal(call(without, task), plain)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_the_first_class_follows_its_inputs(load: Any, seen: Any, checkpoint: Checkpoint, key: str, task: str) -> None:
    first = next(iter(ROWS[key].classes))
    base = load(key, first, task)
    if not ROWS[key].addons:
        base = ap.DiffusionPipeline.from_pretrained(checkpoint(MADE[key].folder))
        base.set_progress_bar_config(disable=True)
        assert type(base).__name__ == ROWS[key].classes[first]
    assert np.array_equal(call(base, task), seen(key, task))


@pytest.mark.parametrize(("key", "task"), CASES)
def test_unknown_keywords_are_named(load: Any, key: str, task: str) -> None:
    with pytest.raises(TypeError, match="did you mean 'num_inference_steps'"):
        call(load(key, task), task, num_inference_step=3)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_signature_is_true_and_class_pickles(load: Any, key: str, task: str) -> None:
    pipe = load(key, task)
    parameters = inspect.signature(type(pipe).__call__).parameters
    row = families.load(ROWS[key].family, ROWS[key].addons).tasks[task]
    assert list(parameters)[1 : 1 + len(row.params)] == list(row.params)
    assert all(parameters[name].default == default for name, default in row.params.items())
    assert pickle.loads(pickle.dumps(type(pipe))) is type(pipe)
    assert type(pipe).__name__ in dir(ap)
    assert isinstance(pipe, ap.DiffusionPipeline)


@pytest.mark.parametrize(("key", "task"), CASES)
def test_cancel_at_a_step(load: Any, key: str, task: str) -> None:
    cancel, steps = threading.Event(), []

    def stop(pipe: Any, step: int, t: Any, tensors: Any) -> dict[str, Any]:
        steps.append(step)
        if step == 1:
            cancel.set()
        return {}

    with pytest.raises(ap.Cancelled):
        call(load(key, task), task, callback_on_step_end=stop, cancel=cancel, num_inference_steps=8)
    assert steps == [0, 1]


@pytest.mark.parametrize(("key", "task"), CASES)
def test_stream_ends_with_the_result(load: Any, seen: Any, key: str, task: str) -> None:
    pipe = load(key, task)
    every = list(pipe.stream(**arguments(pipe, task)))
    steps = every[-every[-1].total :]  # of the last stage
    assert [step.index for step in steps] == list(range(steps[0].total))
    assert all(step.result is None for step in every[:-1])
    assert np.array_equal(steps[-1].result.images, seen(key, task))
    preview = steps[0].preview()[0]
    assert 0 < max(preview.size) <= 128
    assert steps[0].latents.shape == steps[-1].latents.shape


@pytest.mark.parametrize("key", list(ROWS))
def test_threads_on_one_pipeline(load: Any, key: str) -> None:
    row, side = ROWS[key], CALLS.get(ROWS[key].family, {}).get("height", 64)
    more = side * 3 // 2 if ROWS[key].family in ("glm_image", "qwenimage21") else side * 5 // 4  # whole tokens
    sizes = [(side, side), (side, side * 3 // 2), (more, side), (side, side)] * 2
    tasks = [task for task in row.classes if not (made(key).inpaint and task == "inpaint")] * 8  # type: ignore[union-attr]
    pipes = {task: load(key, task) for task in row.classes}
    scale = scale_of(pipes[tasks[0]])
    jobs: list[dict[str, Any]] = [
        dict(prompt=f"red cat {k}", seed=k, num_inference_steps=2 + k % 3, height=h, width=w) | {scale: 1.5 + k}
        for k, (h, w) in enumerate(sizes)
    ]

    def work(k: int) -> np.ndarray:
        task, job = tasks[k], dict(jobs[k])
        params = pipes[task].family.tasks[task].params
        if "height" not in params:
            del job["height"], job["width"]
            job["num_inference_steps"] += 2
        elif "max_area" in params:
            job["max_area"] = job["height"] * job["width"]
        return call(getattr(ap, AUTO[task]).from_pipe(pipes[tasks[0]]), task, **job)

    count = 4 if row.addons else 8
    serial = [work(k) for k in range(count)]
    with ThreadPoolExecutor(count) as pool:
        together = list(pool.map(work, range(count)))
    for alone, among in zip(serial, together, strict=True):
        assert np.allclose(alone, among, atol=1e-5)


def test_tensors_and_arrays_are_dealt_out_item_by_item(load: Any) -> None:
    pipe = load("stable-diffusion", "image2image")
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    calls = dict(prompt=["red cat", "sun"], seed=[7, 9], strength=[0.9, 0.7])
    first = call(pipe, "image2image", image=pictures[:1], strength=0.9)
    second = call(pipe, "image2image", prompt="sun", seed=9, image=pictures[1:], strength=0.7)
    for given in (pictures, pictures.permute(0, 2, 3, 1).numpy(), list(pictures)):
        both = call(pipe, "image2image", image=given, **calls)
        assert np.allclose(both, np.concatenate([first, second]), atol=2e-4)


@pytest.mark.parametrize("key", KEEPING)
def test_a_full_mask_is_image_to_image_and_an_empty_one_the_original(
    load: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, other = load(key, "inpaint"), load(key, "image2image")
    params, whole_params = (p.family.tasks[t].params for p, t in ((pipe, "inpaint"), (other, "image2image")))
    if "mask_image" not in params:
        pytest.skip("the control network inpaints")
    monkeypatch.setattr(Posterior, "sample", lambda self, noise: (self.mode(), noise() if callable(noise) else 0)[0])
    white, black = tiny.mask().point(lambda _: 255), tiny.mask().point(lambda _: 0)
    sides = {side: 64 for side in ("height", "width") if side in params}
    common = dict(output_type="latent", num_inference_steps=5) | UNDRAWN.get(key.removesuffix("-pag"), {})
    painted = call(pipe, "inpaint", mask_image=white, **sides, **common)
    from_picture = "strength" in params.keys() & whole_params.keys()  # else it starts from noise
    if from_picture and key.removesuffix("-pag") not in OTHERWISE_DRAWN:
        said = arguments(pipe, "inpaint", **sides, **common)
        same = {name: value for name, value in (params | said).items() if name in whole_params}
        same = {name: value for name, value in same.items() if value != whole_params[name]}
        whole = other(**same | common | dict(seed=7)).images
        assert torch.allclose(painted, whole, atol=1e-4)
    kept = call(pipe, "inpaint", mask_image=black, **sides, **common)
    assert torch.equal(kept, original(pipe, mask_image=black, **sides, **common))
    assert (painted - kept).abs().max() > 0.01


@torch.no_grad()
def original(pipe: Any, **changes: Any) -> torch.Tensor:
    """The latents of the picture that an inpainting call begins with."""
    bound = pipe._bind((), arguments(pipe, "inpaint", **changes))
    (run,) = binding.runs(pipe.family, bound, pipe._settings)
    _, run, stages = pipe._prepare("inpaint", run)
    space = stages[-1].space
    return space.encode(space.masked_pixels(run)[0], run.random, plain=True)
