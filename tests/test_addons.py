"""ControlNet and perturbed-attention guidance: the peer's pictures, switching both ways, nothing left on networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import tiny
from autopipeline import names

CONTROL = tiny.photo(seed=4)
AUTO = {
    "text2image": "AutoPipelineForText2Image",
    "image2image": "AutoPipelineForImage2Image",
    "inpaint": "AutoPipelineForInpainting",
}
ADAPTED = {"ip_adapter_image", "ip_adapter_image_embeds"}
ONLY_OTHERS = {"self", "kwargs"} | ADAPTED | {f"negative_{name}" for name in ADAPTED}
ADDED = [name for name, here in names.built().items() if here.row.addons and hasattr(diffusers, name)]
ONLY_OURS = {"PixArtSigmaPAGPipeline": ("callback_on_step_end", "callback_on_step_end_tensor_inputs")}
GUESS = dict(guess_mode=True, guidance_scale=3.0)
WINDOW = dict(control_guidance_start=0.3, control_guidance_end=0.8, controlnet_conditioning_scale=0.6)
LISTS = dict(controlnet_conditioning_scale=[0.4, 0.9], control_guidance_start=[0.0, 0.3], control_guidance_end=[0.6, 1])
CROP = dict(padding_mask_crop=4, output_type="pil", image=tiny.photo(120, 90), mask_image=tiny.mask(120, 90))
LAYERS = dict(pag_applied_layers=["down_blocks", "mid"])

CASES: list[tuple[str, int, dict[str, Any], str, dict[str, Any]]] = [
    # checkpoint, number of ControlNets, options of loading, task, call
    ("sd", 1, {}, "text2image", dict(negative_prompt="sun", num_images_per_prompt=2)),
    ("sd", 1, {}, "text2image", GUESS | dict(width=96, height=56)),
    ("sd", 1, {}, "image2image", WINDOW),
    ("sd", 1, {}, "inpaint", GUESS),
    ("sd-9", 1, {}, "inpaint", {}),
    ("sd", 1, {}, "inpaint", CROP),
    ("sd", 2, {}, "text2image", LISTS),
    ("sd", 2, {}, "inpaint", dict(guidance_scale=1.0)),
    ("sd", 0, {}, "text2image", dict(pag_adaptive_scale=0.002, guidance_rescale=0.7)),
    ("sd", 0, LAYERS, "image2image", dict(guidance_scale=1.0)),
    ("sd-9", 0, {}, "inpaint", {}),
    ("sd", 1, {}, "text2image-pag", WINDOW),
    ("sd", 2, LAYERS, "inpaint-pag", {}),
    ("xl", 1, {}, "text2image", GUESS),
    ("xl", 1, {}, "image2image", dict(original_size=(32, 48), target_size=(64, 72))),
    ("xl", 2, {}, "inpaint", WINDOW),
    ("xl", 0, {}, "text2image", dict(negative_prompt="cat", denoising_end=0.7)),
    ("xl", 0, {}, "inpaint", dict(guidance_rescale=0.5)),
    ("xl", 1, {}, "image2image-pag", dict(negative_prompt="cat")),
]


@pytest.fixture(scope="module")
def load(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("controlnets")

    @cache
    def nets(key: str, count: int) -> list[Path]:
        """ControlNets for a tiny checkpoint, whose residuals are not zero."""
        unet = diffusers.UNet2DConditionModel(**tiny.XL_UNET if key == "xl" else tiny.UNET)
        widths = (4, 8, 8) if key == "xl" else (4, 8, 8, 8)
        for k in range(count):
            net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
            tiny.redraw(net, 20 + k).save_pretrained(folder / f"{key}-{k}")
        return [folder / f"{key}-{k}" for k in range(count)]

    def get(lib: Any, name: str, count: int, task: str, **options: Any) -> Any:
        loaded = [lib.ControlNetModel.from_pretrained(path) for path in nets(name[:2], count)]
        options = options | ({"controlnet": loaded if count > 1 else loaded[0]} if count else {})
        if not count or task.endswith("-pag"):
            options |= {"enable_pag": True}
        pipe = getattr(lib, AUTO[task.removesuffix("-pag")]).from_pretrained(checkpoint(name), **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get


def picture(pipe: Any, task: str, count: int, **changes: Any) -> np.ndarray:
    task = task.removesuffix("-pag")
    call = dict(prompt="a red cat, sun", num_inference_steps=5, output_type="np") | tiny.inputs(task)
    if count:
        control = CONTROL if count == 1 else [CONTROL, tiny.photo(seed=7)]
        call |= {"image" if task == "text2image" else "control_image": control}
    if task != "text2image":
        call["strength"] = 0.8
    out = pipe(**call | changes, generator=torch.Generator().manual_seed(3)).images
    return out if isinstance(out, np.ndarray) else np.stack([np.asarray(p, np.float32) / 255 for p in out])


@pytest.mark.parametrize(("name", "count", "options", "task", "changes"), CASES)
def test_same_picture_as_the_peer(
    load: Any, name: str, count: int, options: dict[str, Any], task: str, changes: dict[str, Any]
) -> None:
    peer, ours = (load(lib, name, count, task, **options) for lib in (diffusers, ap))
    assert type(ours).__name__ == type(peer).__name__
    expected, actual = (picture(pipe, task, count, **changes) for pipe in (peer, ours))
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 2e-3 + ("output_type" in changes) / 255
    without = dict(controlnet_conditioning_scale=0.0) if count else dict(pag_scale=0.0)
    assert np.abs(picture(ours, task, count, **changes | without) - actual).max() > 0.005


@pytest.mark.parametrize("name", ADDED)
def test_signatures_are_those_of_the_peer(name: str) -> None:
    def shown(lib: Any) -> list[tuple[str, Any]]:
        found = inspect.signature(getattr(lib, name).__call__).parameters.items()
        less = (*ONLY_OTHERS, *ONLY_OURS.get(name, ()))
        own = [(key, p.default) for key, p in found if key not in less and p.kind is not p.KEYWORD_ONLY]
        return [(key, tuple(default) if isinstance(default, list) else default) for key, default in own]

    assert shown(ap) == shown(diffusers)


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_switching_add_ons_shares_everything(load: Any, checkpoint: Callable[[str], Path], name: str) -> None:
    auto = ap.AutoPipelineForText2Image
    plain = auto.from_pretrained(checkpoint(name))
    plain.set_progress_bar_config(disable=True)
    before = picture(plain, "text2image", 0)
    net = load(ap, name, 1, "text2image").controlnet
    controlled = auto.from_pipe(plain, controlnet=net)
    both = auto.from_pipe(controlled, enable_pag=True)
    assert type(both).__name__.endswith("ControlNetPAGPipeline")
    assert both.controlnet is net
    assert type(auto.from_pipe(both, controlnet=None)).__name__.endswith(
        "XLPAGPipeline" if name == "xl" else "nPAGPipeline"
    )
    swapped = auto.from_pipe(auto.from_pipe(plain, enable_pag=True), enable_pag=False, controlnet=net)
    assert type(swapped) is type(controlled)
    picture(both, "text2image", 1)
    back = auto.from_pipe(both, controlnet=None, enable_pag=False)
    assert type(back) is type(plain)
    assert all(back.components[key] is part for key, part in plain.components.items())
    assert dict(back.config) == dict(plain.config)
    assert np.array_equal(picture(back, "text2image", 0), before)


def test_save_and_load_with_two_controlnets_and_layers(load: Any, tmp_path: Path) -> None:
    pipe = load(ap, "sd", 2, "text2image-pag", **LAYERS)
    pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "controlnet_1" / "config.json").is_file()
    again = ap.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe)
    assert again.config["pag_applied_layers"] == LAYERS["pag_applied_layers"]
    assert np.array_equal(picture(pipe, "text2image", 2), picture(again, "text2image", 2))


def test_pipelines_that_share_a_network_may_run_at_once(load: Any) -> None:
    perturbed = load(ap, "sd", 1, "text2image-pag")
    plain = ap.AutoPipelineForText2Image.from_pipe(perturbed, controlnet=None, enable_pag=False)
    jobs = [(perturbed, 1), (plain, 0)] * 3
    alone = [picture(pipe, "text2image", count) for pipe, count in jobs[:2]] * 3
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: picture(job[0], "text2image", job[1]), jobs))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_controlnet_pipeline_follows_its_inputs(load: Any) -> None:
    pipe = load(ap, "sd", 1, "text2image")
    there = ap.AutoPipelineForImage2Image.from_pipe(pipe)
    given = dict(image=tiny.photo(), control_image=CONTROL)
    call = dict(prompt="red cat", num_inference_steps=4, output_type="np", seed=7)
    assert np.array_equal(pipe(**call, **given).images, there(**call, **given).images)
    both = pipe(**call | dict(prompt=["red cat", "sun"], num_inference_steps=[3, 5], seed=[7, 9]), image=CONTROL).images
    second = pipe(**call | dict(prompt="sun", num_inference_steps=5, seed=9), image=CONTROL).images
    assert np.allclose(both[1:], second, atol=2e-4)


def test_what_cannot_work_is_said(load: Any) -> None:
    pipe = load(ap, "sd", 2, "text2image")
    with pytest.raises(ValueError, match="needs image"):
        pipe("red cat")
    with pytest.raises(ValueError, match="list of 2"):
        pipe("red cat", image=CONTROL)
    with pytest.raises(ValueError, match="1 entries for 2 ControlNets"):
        pipe("red cat", image=[CONTROL] * 2, controlnet_conditioning_scale=[1.0])
    with pytest.raises(ValueError, match="control_guidance_start"):
        pipe("red cat", image=[CONTROL] * 2, control_guidance_start=0.5, control_guidance_end=0.2)
    with pytest.raises(ValueError, match="'nowhere'"):
        load(ap, "sd", 0, "text2image", pag_applied_layers="nowhere")("red cat")
