"""Z-Image's networks, its texts of any length and its ControlNets, beside what the common tests try."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import language
import tiny

Checkpoint = Callable[[str], Path]
SMALL = dict(height=32, width=32, num_inference_steps=2, output_type="np", seed=3)
CONTROL = dict(control_image=tiny.photo(40, 32, seed=4))
FILL = CONTROL | dict(image=tiny.photo(32, 48), mask_image=tiny.mask(32, 48))
REFINED = [{}, dict(add_control_noise_refiner="control_layers"), dict(add_control_noise_refiner=None)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def texts(lengths: tuple[int, ...], width: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Texts of these lengths, one by one and filled up to one tensor."""
    each = [drawn(length, width, seed=length) for length in lengths]
    together = torch.zeros(len(each), -(-max(lengths) // 32) * 32, width)
    for row, text in zip(together, each, strict=True):
        row[: len(text)] = text
    return each, together


@pytest.mark.parametrize("changes", [{}, dict(qk_norm=False, n_refiner_layers=1, rope_theta=10.0, t_scale=10.0)])
@pytest.mark.parametrize("lengths", [(7, 20), (32, 3, 40)])
@torch.no_grad()
def test_network(changes: dict[str, Any], lengths: tuple[int, ...]) -> None:
    peer = tiny.redraw(diffusers.ZImageTransformer2DModel(**language.Z_IMAGE | changes), 1)
    ours = ap.ZImageTransformer2DModel(**language.Z_IMAGE | changes)
    ours.load_state_dict(peer.state_dict())
    each, together = texts(lengths, 24)
    x, t, tokens = drawn(len(lengths), 4, 10, 18), torch.linspace(0.1, 0.9, len(lengths)), torch.tensor(lengths)
    table = ours.rotary(tokens, together.shape[1], 10, 18)
    made = ours(x, t, encoder_hidden_states=together, tokens=tokens, rotary=table)
    expected = torch.stack(peer(list(x[:, :, None]), t, each).sample)[:, :, 0]
    assert torch.allclose(made, expected, atol=1e-4)


def test_published_sizes_have_the_peers_keys_and_shapes() -> None:
    control = dict(control_layers_places=[0, 5], control_in_dim=33, control_refiner_layers_places=[0, 1])
    for changes in (dict(add_control_noise_refiner="control_noise_refiner"), {}):
        with torch.device("meta"):
            made = [
                (lib.ZImageTransformer2DModel(n_layers=3), lib.ZImageControlNetModel(**control | changes))
                for lib in (diffusers, ap)
            ]
        for peer, ours in zip(*made, strict=True):
            shapes = [{key: tensor.shape for key, tensor in each.state_dict().items()} for each in (peer, ours)]
            assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(axes_dims=[2, 2, 2]), "channels of a head"),
        (dict(all_patch_size=[4]), "2 x 2 latents"),
    ],
)
def test_other_networks_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ap.ZImageTransformer2DModel(**language.Z_IMAGE | changes)


@pytest.fixture(scope="module")
def pipe(checkpoint: Checkpoint) -> Any:
    made = ap.ZImagePipeline.from_pretrained(checkpoint("z-image"))
    made.set_progress_bar_config(disable=True)
    return made


def test_embeddings_of_any_lengths_and_as_one(pipe: Any) -> None:
    each, _ = texts((5, 40), 24)
    both = pipe(prompt_embeds=each, negative_prompt="cat", **SMALL).images
    alone = [
        pipe(prompt_embeds=one[None], negative_prompt="cat", **SMALL | dict(seed=3 + k)) for k, one in enumerate(each)
    ]
    assert np.allclose(both, np.concatenate([one.images for one in alone]), atol=1e-4)
    listed = pipe(prompt_embeds=each, negative_prompt="cat", **SMALL | dict(num_inference_steps=[2, 2]))
    assert np.allclose(both, listed.images, atol=1e-4)


def test_the_numbers_of_the_guidance_may_be_lists(pipe: Any) -> None:
    lists = dict(cfg_normalization=[0.3, False], cfg_truncation=[1.0, 0.1], num_inference_steps=[3, 3])
    both = pipe(["cat", "sun"], **SMALL | lists).images
    alone: list[np.ndarray] = []
    for k, text in enumerate(("cat", "sun")):
        own = {name: values[k] for name, values in lists.items()}
        alone.append(pipe(text, **SMALL | own | dict(seed=3 + k)).images)
    assert np.allclose(both, np.concatenate(alone), atol=1e-4)


def test_what_does_not_fit_is_cut_with_a_warning(pipe: Any) -> None:
    with pytest.warns(UserWarning, match=r"sea<\|im_end\|>"):
        pipe("sun on the sea", max_sequence_length=6, guidance_scale=0.0, **SMALL)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_callback_can_end_the_guidance_and_change_the_text(pipe: Any, scale: float) -> None:
    seen: list[tuple[int, ...]] = []

    def end(view: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tuple(tensors["prompt_embeds"].shape))
        view._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"] * 0}

    options = dict(callback_on_step_end=end, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    changed = pipe("red cat", guidance_scale=scale, **SMALL | options).images
    assert seen == [(1, 32, 24)] * 2
    assert np.abs(changed - pipe("red cat", guidance_scale=scale, cfg_truncation=0.0, **SMALL).images).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(height=36), "height=36 is not a positive multiple of 8"),
        (dict(prompt=None, prompt_embeds=[]), "a tensor for each prompt"),
        (dict(prompt=None, prompt_embeds=[drawn(4, 24), drawn(24)]), "a tensor for each prompt"),
        (dict(prompt=None, prompt_embeds=[drawn(4, 12)]), "12 channels, not 24"),
        (dict(cfg_normalization=True, guidance_scale=0.0), "no effect without guidance"),
        (
            dict(image=tiny.photo(), mask_image=tiny.mask(), masked_image_latents=drawn(1, 4, 8, 8)),
            "has an effect only",
        ),
        (dict(image=tiny.photo(), strength=0.0), "none of the 1 steps"),
        (dict(latents=drawn(1, 4, 8, 6)), "latents have the shape"),
        (dict(scheduler="DDIM"), "flow"),
    ],
)
def test_refusals(pipe: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pipe(**dict(prompt="cat", height=32, width=32, num_inference_steps=1) | changes)


@pytest.fixture(scope="module")
def controlled(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any]]:
    """The peer's pipeline and ours, of a class that takes a ControlNet with these changes."""

    def load(cls: str, **changes: Any) -> tuple[Any, Any]:
        folder = tmp_path_factory.mktemp("controlnet")
        language.z_controlnet(**changes).save_pretrained(folder)
        made = []
        for lib in (diffusers, ap):
            net = lib.ZImageControlNetModel.from_pretrained(folder)
            made.append(getattr(lib, cls).from_pretrained(checkpoint("z-image"), controlnet=net))
            made[-1].set_progress_bar_config(disable=True)
        return made[0], made[1]

    return load


def picture(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    own = {name: list(value) if isinstance(value, list) else value for name, value in call.items()}
    shape = dict(height=32, width=48, num_inference_steps=3, output_type="np")
    return pipe(**shape | own, generator=torch.Generator().manual_seed(3)).images


@pytest.mark.parametrize("changes", [*REFINED, dict(add_control_noise_refiner=None, control_in_dim=4)], ids=str)
def test_controlnet_makes_the_peers_picture(controlled: Any, changes: dict[str, Any]) -> None:
    peer, ours = controlled("ZImageControlNetPipeline", **changes)
    call = CONTROL | dict(prompt=["cat", "sun on the red sea " * 9], controlnet_conditioning_scale=1.2)
    expected = picture(peer, call)
    assert np.abs(expected - picture(ours, call)).max() < 1e-3
    assert np.abs(expected - picture(ours, call | dict(controlnet_conditioning_scale=0.0))).max() > 0.01
    call |= dict(control_image=drawn(1, 3, 24, 40), height=None, width=None, guidance_scale=0.0)
    assert np.abs(picture(peer, call) - picture(ours, call)).max() < 1e-3


@pytest.mark.parametrize("changes", REFINED, ids=str)
def test_controlnet_that_inpaints(controlled: Any, changes: dict[str, Any]) -> None:
    peer, ours = controlled("ZImageControlNetInpaintPipeline", **changes)
    call = FILL | dict(prompt="red cat", controlnet_conditioning_scale=1.2)
    expected = picture(peer, call)
    assert np.abs(expected - picture(ours, call)).max() < 1e-3
    dark = call | dict(mask_image=tiny.mask(32, 48).point(lambda _: 0))
    assert np.abs(expected - picture(ours, dark)).max() > 0.01
    as_tensor = call | dict(image=drawn(1, 3, 32, 48), mask_image=tiny.mask(48, 32))
    assert np.abs(picture(peer, as_tensor) - picture(ours, as_tensor)).max() < 1e-3
    two = ours(prompt=["red cat", "sun"], **FILL, **SMALL).images
    alone = [ours(prompt=text, **FILL, **SMALL | dict(seed=3 + k)).images for k, text in enumerate(("red cat", "sun"))]
    assert np.allclose(two, np.concatenate(alone), atol=1e-4)  # the peer fails on more than one


def test_controlnet_pipelines_are_saved_and_switched(controlled: Any, tmp_path: Path) -> None:
    peer, ours = controlled("ZImageControlNetInpaintPipeline")
    peer.save_pretrained(tmp_path / "theirs")  # with a second copy of what the networks share
    ours.save_pretrained(tmp_path / "ours")
    call = partial(picture, call=FILL | dict(prompt="red cat"))
    expected = call(ours)
    assert np.abs(expected - call(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours"))).max() < 1e-3
    again = ap.AutoPipelineForText2Image.from_pretrained(tmp_path / "theirs")
    assert type(again) is type(ours)
    assert np.array_equal(expected, call(again))
    plain = ap.AutoPipelineForText2Image.from_pipe(again, controlnet=None)
    assert type(plain) is ap.ZImagePipeline
    led = ap.AutoPipelineForText2Image.from_pipe(plain, controlnet=again.controlnet)
    assert type(led) is ap.ZImageControlNetPipeline
    assert led.transformer is again.transformer


@pytest.mark.parametrize(
    ("cls", "changes", "call", "says"),
    [
        ("ZImageControlNetPipeline", {}, {}, "needs control_image"),
        ("ZImageControlNetPipeline", dict(control_in_dim=3), CONTROL, "looks at 3 channels, but latents have 4"),
        ("ZImageControlNetPipeline", dict(dim=60), CONTROL, "3 heads in 60 channels"),
        ("ZImageControlNetPipeline", {}, CONTROL | dict(controlnet_conditioning_scale=[0.5]), "has to be a number"),
        ("ZImageControlNetPipeline", {}, dict(control_image=drawn(1, 3, 24, 32)), "height=32 is not 24"),
        ("ZImageControlNetInpaintPipeline", dict(control_in_dim=8), FILL, "inpainting needs 9"),
        ("ZImageControlNetInpaintPipeline", {}, CONTROL, "needs image and mask_image"),
    ],
)
def test_controlnet_refusals(
    checkpoint: Checkpoint, cls: str, changes: dict[str, Any], call: dict[str, Any], says: str
) -> None:
    net = ap.ZImageControlNetModel(**language.Z_CONTROL | changes)
    pipe = getattr(ap, cls).from_pretrained(checkpoint("z-image"), controlnet=net)
    with pytest.raises(ValueError, match=says):
        pipe(prompt="cat", **SMALL | call)
