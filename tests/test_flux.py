"""Flux, its control pictures and Chroma: networks, add-ons and refusals, beside what the common tests try."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import tiny
from autopipeline.models.flux import spread
from autopipeline.models.rotary import grid_places

Checkpoint = Callable[[str], Path]
NET = tiny.FLUX | dict(pooled_projection_dim=24)
SMALL = dict(approximator_num_channels=16, approximator_hidden_dim=20, approximator_layers=2)
CONTROL, OTHER = tiny.photo(32, 32, seed=4), tiny.photo(32, 32, seed=7)
TASKS = {"text2image": "", "image2image": "Img2Img", "inpaint": "Inpaint"}
# Configurations of published networks: dev, schnell, dev with control pictures, Chroma, ControlNets of three makers.
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("FluxTransformer2DModel", dict(guidance_embeds=True)),
    ("FluxTransformer2DModel", {}),
    ("FluxTransformer2DModel", dict(guidance_embeds=True, in_channels=128, out_channels=64)),
    ("ChromaTransformer2DModel", {}),
    ("FluxControlNetModel", dict(num_layers=5, num_single_layers=0, guidance_embeds=True)),
    ("FluxControlNetModel", dict(num_layers=5, num_single_layers=10, guidance_embeds=True, num_mode=10)),
    (
        "FluxControlNetModel",
        dict(num_layers=2, num_single_layers=0, guidance_embeds=True, patch_size=2, conditioning_embedding_channels=16),
    ),
]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def twin(name: str, **config: Any) -> tuple[Any, Any]:
    """The peer's network and ours, with the same random weights."""
    peer = tiny.redraw(getattr(diffusers, name)(**config), 1)
    ours = getattr(ap, name)(**config).eval()
    ours.load_state_dict(peer.state_dict())
    return peer, ours


X, T, TEXT, POOLED = drawn(2, 12, 16), torch.tensor([0.3, 0.7125]), drawn(2, 7, 24, seed=1), drawn(2, 24, seed=2)
SCALES = torch.tensor([3.5, 2.0])
GRID, NOWHERE = grid_places(3, 4), torch.zeros(7, 3, dtype=torch.long)
PLACES = dict(img_ids=GRID.float(), txt_ids=NOWHERE.float())


def table(network: Any) -> torch.Tensor:
    return network.rotary(torch.cat([NOWHERE, GRID])).expand(2, -1, -1, -1)


@pytest.mark.parametrize("guidance", [SCALES, None], ids=["dev", "schnell"])
@pytest.mark.parametrize("changes", [{}, dict(num_attention_heads=3, num_single_layers=0, out_channels=8)], ids=str)
@torch.no_grad()
def test_transformer(changes: dict[str, Any], guidance: torch.Tensor | None) -> None:
    peer, ours = twin("FluxTransformer2DModel", **NET | changes, guidance_embeds=guidance is not None)
    said = dict(encoder_hidden_states=TEXT, pooled_projections=POOLED, guidance=guidance)
    assert torch.allclose(
        ours(X, T, rotary=table(ours), **said), peer(X, timestep=T, **said, **PLACES).sample, atol=2e-5
    )


@pytest.mark.parametrize("repeat", [False, True])
@torch.no_grad()
def test_residuals_are_spread_over_the_blocks(repeat: bool) -> None:
    peer, ours = twin("FluxTransformer2DModel", **NET | dict(num_layers=4))
    doubles, singles = [drawn(2, 12, 24, seed=k) for k in range(3)], [drawn(2, 12, 24, seed=9)]
    said = dict(encoder_hidden_states=TEXT, pooled_projections=POOLED)
    residuals = dict(controlnet_block_samples=doubles, controlnet_single_block_samples=singles)
    expected = peer(X, timestep=T, **said, **PLACES, **residuals, controlnet_blocks_repeat=repeat).sample
    each = spread(doubles, 4, repeat), spread(singles, 3, False)
    assert torch.allclose(ours(X, T, rotary=table(ours), **said, residuals=each), expected, atol=2e-5)


@torch.no_grad()
def test_chroma() -> None:
    peer, ours = twin("ChromaTransformer2DModel", **tiny.FLUX | SMALL)
    mask = (torch.arange(19) < torch.tensor([[4], [6]])) | (torch.arange(19) > 6)
    said = dict(encoder_hidden_states=TEXT, attention_mask=mask.float())
    assert torch.allclose(
        ours(X, T, rotary=table(ours), **said), peer(X, timestep=T, **said, **PLACES).sample, atol=2e-5
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_mode=4, guidance_embeds=True),
        dict(num_single_layers=0, patch_size=2, conditioning_embedding_channels=4),
    ],
    ids=str,
)
@torch.no_grad()
def test_controlnet(changes: dict[str, Any]) -> None:
    peer, ours = twin("FluxControlNetModel", **NET | changes)
    seen = drawn(2, 3, 48, 64) if ours.sees_pixels else drawn(2, 12, 16, seed=4)
    said = dict(encoder_hidden_states=TEXT, pooled_projections=POOLED, controlnet_cond=seen)
    said |= dict(guidance=SCALES) if "guidance_embeds" in changes else {}
    modes = torch.tensor([2, 0])
    expected = peer(X, timestep=T, **said, **PLACES, controlnet_mode=modes[:, None])
    made = ours(X, T, rotary=table(ours), **said, mode=modes)
    theirs = [expected.controlnet_block_samples or [], expected.controlnet_single_block_samples or []]
    assert [len(kind) for kind in made] == [len(kind) for kind in theirs]
    for kind, other in zip(made, theirs, strict=True):
        assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(kind, other, strict=True))


@pytest.mark.parametrize(("name", "config"), PUBLISHED)
def test_published_sizes_have_the_peers_keys_and_shapes(name: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        peer, ours = getattr(diffusers, name)(**config), getattr(ap, name)(**config)
    expected = {key: tensor.shape for key, tensor in peer.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == expected


@pytest.mark.parametrize("name", ["Flux", "FluxImg2Img", "FluxInpaint", "FluxKontext", "Chroma"])
def test_signatures_are_those_of_the_peer(name: str) -> None:
    def shown(lib: Any) -> list[tuple[str, Any]]:
        found = inspect.signature(getattr(lib, f"{name}Pipeline").__call__).parameters.items()
        own = [(key, p.default) for key, p in found if "ip_adapter" not in key and p.kind is not p.KEYWORD_ONLY]
        return [(key, tuple(default) if isinstance(default, list) else default) for key, default in own]

    assert shown(ap) == shown(diffusers)


# --- control pictures ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("flux-controlnets")
    kinds = {"plain": {}, "union": dict(num_mode=3), "schnell": dict(guidance_embeds=False)}

    @cache
    def net(k: int, kind: str) -> Path:
        config = NET | dict(num_layers=1, num_single_layers=2, guidance_embeds=True) | kinds[kind]
        tiny.redraw(diffusers.FluxControlNetModel(**config), 20 + k).save_pretrained(folder / f"{kind}-{k}")
        return folder / f"{kind}-{k}"

    def get(lib: Any, name: str, task: str, nets: tuple[str, ...], several: bool = False) -> Any:
        loaded = [lib.FluxControlNetModel.from_pretrained(net(k, kind)) for k, kind in enumerate(nets)]
        options: dict[str, Any] = {}
        if loaded:
            one = len(loaded) == 1 and not several
            options["controlnet"] = loaded[0] if one else lib.FluxMultiControlNetModel(loaded)
        middle = "ControlNet" if loaded else "Control"
        pipe = getattr(lib, f"Flux{middle}{TASKS[task]}Pipeline").from_pretrained(checkpoint(name), **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get


def picture(pipe: Any, task: str, changes: dict[str, Any], seeds: list[int] | None = None) -> np.ndarray:
    call = dict(prompt="a red cat, sun", num_inference_steps=4, output_type="np", max_sequence_length=16)
    call |= dict(height=32, width=32, control_image=CONTROL) | tiny.inputs(task)
    call |= {} if task == "text2image" else {"strength": 0.8}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or [3]]
    out = pipe(**call | changes, generator=generators if seeds else generators[0]).images
    return out if isinstance(out, np.ndarray) else np.stack([np.asarray(each, np.float32) / 255 for each in out])


EMBEDS = dict(prompt=None, prompt_embeds=drawn(1, 9, 24), pooled_prompt_embeds=drawn(1, 24))
TRUE = dict(negative_prompt="sun", true_cfg_scale=2.5)
WINDOW = dict(control_guidance_start=0.3, control_guidance_end=0.8, controlnet_conditioning_scale=0.6)
PAIR = dict(control_image=[CONTROL, OTHER], controlnet_conditioning_scale=[0.4, 0.9])
LISTS = PAIR | dict(control_guidance_start=[0.0, 0.4], control_guidance_end=[1.0, 1.0])
CROP = dict(padding_mask_crop=4, output_type="pil", image=tiny.photo(120, 90), mask_image=tiny.mask(120, 90))
ADDED: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = [
    ("flux-control", "text2image", (), dict(num_images_per_prompt=2)),
    ("flux-control", "text2image", (), dict(control_image=drawn(1, 3, 32, 40), width=40)),
    ("flux-control", "text2image", (), dict(control_image=drawn(1, 16, 16))),
    ("flux-control", "image2image", (), dict(width=48)),
    ("flux-control", "inpaint", (), dict(num_images_per_prompt=2)),
    ("flux", "text2image", ("plain",), TRUE | dict(num_images_per_prompt=2)),
    ("flux", "text2image", ("plain",), WINDOW | dict(control_image=drawn(1, 3, 48, 32), height=48)),
    ("flux", "text2image", ("union",), dict(control_mode=2, num_images_per_prompt=2)),
    ("flux", "text2image", ("schnell",), dict(guidance_scale=2.0)),
    ("schnell", "text2image", ("plain",), dict(guidance_scale=2.0)),
    ("flux", "text2image", ("plain", "union"), LISTS | dict(control_mode=[None, 1])),
    ("flux", "image2image", ("plain",), WINDOW | dict(num_images_per_prompt=2)),
    ("flux", "image2image", ("plain", "plain"), PAIR | dict(control_mode=[None, None])),
    ("flux", "inpaint", ("plain",), dict(width=48)),
    ("flux", "inpaint", ("plain",), CROP),
]


@pytest.mark.parametrize(("name", "task", "nets", "changes"), ADDED)
def test_control_pictures_give_the_peers_pictures(
    load: Any, name: str, task: str, nets: tuple[str, ...], changes: dict[str, Any]
) -> None:
    expected, actual = (picture(load(lib, name, task, nets), task, changes) for lib in (diffusers, ap))
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 2e-3 + (changes.get("output_type") == "pil") / 255
    assert expected.std() > 0.01


@pytest.mark.parametrize("task", list(TASKS))
def test_prompts_with_generators_of_their_own(load: Any, task: str) -> None:
    for name, nets in (("flux-control", ()), ("flux", ("plain",))):
        call = dict(prompt=["red cat", "sun"], control_image=[CONTROL, OTHER])
        expected, actual = (picture(load(lib, name, task, nets), task, call, [5, 6]) for lib in (diffusers, ap))
        assert np.abs(actual - expected).max() <= 2e-3


def test_one_union_looks_at_two_pictures(load: Any) -> None:
    call = LISTS | dict(control_mode=[2, 1])
    expected, actual = (
        picture(load(lib, "flux", "text2image", ("union",), several=True), "text2image", call)
        for lib in (diffusers, ap)
    )
    assert np.abs(actual - expected).max() <= 2e-3


def test_controlnets_switch_and_save(load: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = ap.AutoPipelineForImage2Image.from_pretrained(checkpoint("flux"))
    added = ap.AutoPipelineForText2Image.from_pipe(
        base, controlnet=load(ap, "flux", "text2image", ("plain",)).controlnet
    )
    assert type(added).__name__ == "FluxControlNetPipeline"
    added.set_progress_bar_config(disable=True)
    added.save_pretrained(tmp_path / "saved")
    for again in (ap.DiffusionPipeline, diffusers.DiffusionPipeline):
        pipe = again.from_pretrained(tmp_path / "saved")
        pipe.set_progress_bar_config(disable=True)
        assert np.allclose(picture(pipe, "text2image", {}), picture(added, "text2image", {}), atol=2e-3)
    assert type(ap.AutoPipelineForImage2Image.from_pipe(added, controlnet=None)) is type(base)


def test_runs_with_and_without_guidance_go_side_by_side(load: Any) -> None:
    pipe = load(ap, "flux", "text2image", ("plain",))
    numbers = dict(true_cfg_scale=[2.0, 3.0], num_inference_steps=[3, 4], guidance_scale=[1.5, 4.0])
    call = dict(prompt=["red cat", "sun"], negative_prompt=["sea", "sun"], control_image=[CONTROL, OTHER])
    both = picture(pipe, "text2image", call | numbers, [5, 6])
    for k in range(2):
        alone = {name: values[k] for name, values in (call | numbers).items()}
        assert np.allclose(both[k], picture(pipe, "text2image", alone, [5 + k])[0], atol=2e-4)


# --- what is refused ---------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("flux", dict(max_sequence_length=513), "has to be 512 at most"),
    ("flux", dict(negative_prompt="sun"), "negative_prompt has no effect with true_cfg_scale=1.0"),
    ("flux", dict(true_cfg_scale=2.0), "no effect without negative_prompt"),
    ("flux", dict(true_cfg_scale=2.0, negative_prompt_2="sun"), "no effect without negative_prompt"),
    ("flux", dict(height=4), "height=4 has to be 8 pixels at least"),
    ("flux", EMBEDS | dict(pooled_prompt_embeds=None), "needs pooled_prompt_embeds"),
    ("flux", dict(latents=drawn(1, 9, 16)), r"this call needs \(1, 16, 16\)"),
    ("flux", dict(joint_attention_kwargs={"scale": 0.5}), "none is loaded"),
    ("flux", dict(sigmas=[0.2, 0.6]), "descending order"),
    ("flux-control", dict(), "This network needs control_image"),
    ("flux-control", dict(control_image=drawn(1, 3, 40, 40)), "control_image has latents of"),
    ("kontext", dict(max_area=9), "max_area=9 is too small"),
    ("kontext", dict(image="nowhere.png", max_area=1024), "nowhere.png"),
    ("chroma", EMBEDS | dict(pooled_prompt_embeds=None), "need each other"),
    ("chroma", dict(true_cfg_scale=2.0), "true_cfg_scale has no effect on text-to-image"),
]


@pytest.mark.parametrize(("name", "changes", "says"), REFUSED, ids=[f"{name}: {says}" for name, _, says in REFUSED])
def test_refused_in_a_sentence(checkpoint: Checkpoint, name: str, changes: dict[str, Any], says: str) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(name))
    call = dict(prompt="a cat", height=32, width=32, num_inference_steps=2, max_sequence_length=16) | changes
    call = {key: value for key, value in call.items() if value is not None}
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=says):
        pipe(**call)


@pytest.mark.parametrize(
    ("nets", "changes", "says"),
    [
        (("plain",), EMBEDS | TRUE, "have to be of as many tokens"),
        (("plain",), dict(control_image=None), "A ControlNet needs control_image"),
        (("plain",), dict(control_mode=1), "control_mode=1 has no effect on this ControlNet"),
        (("union",), dict(control_mode=3), "whole number from 0 to 2"),
        (("union",), {}, "control_mode=None has to be"),
        (("plain", "plain"), {}, "a list of 2, a picture for each ControlNet"),
        (("plain", "plain"), PAIR | dict(control_mode=[None]), "1 entries for 2 control pictures"),
        (("plain",), dict(control_image=drawn(1, 3, 40, 40)), "height=32 is not 40"),
        (("plain",), dict(control_guidance_start=0.9, control_guidance_end=0.2), "in this order"),
    ],
)
def test_controlnets_refuse_in_a_sentence(load: Any, nets: tuple[str, ...], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        picture(load(ap, "flux", "text2image", nets), "text2image", changes)


def test_networks_and_tasks_have_to_fit(load: Any, checkpoint: Checkpoint) -> None:
    other = ap.FluxControlNetModel(**NET | dict(num_layers=1, num_attention_heads=3))
    with pytest.raises(ValueError, match="controlnet has 3 heads of 12 channels, the transformer 2 heads of 12"):
        picture(ap.FluxControlNetPipeline.from_pretrained(checkpoint("flux"), controlnet=other), "text2image", {})
    wide = load(ap, "flux-control", "text2image", ())
    with pytest.raises(ValueError, match="takes 32 channels, but latents with nothing beside them have 16"):
        ap.FluxPipeline.from_pipe(wide)("a cat", height=32, width=32)


def test_schedulers_have_to_know_flows(checkpoint: Checkpoint) -> None:
    pipe = ap.FluxPipeline.from_pretrained(checkpoint("flux"))
    pipe.scheduler = ap.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler knows no flow"):
        pipe("a cat", height=32, width=32)


def test_sizes_are_rounded_with_a_word(checkpoint: Checkpoint) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint("kontext"))
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=1, max_sequence_length=8, output_type="np")
    with pytest.warns(UserWarning, match="makes pictures of 32 x 32 pixels"):
        assert pipe(prompt="a cat", height=64, width=64, max_area=1024, **call).images.shape == (1, 32, 32, 3)
    plain = ap.FluxPipeline.from_pretrained(checkpoint("flux"))
    plain.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="width=39 is no multiple of 8 pixels; 32 are made"):
        assert plain("a cat", height=32, width=39, **call).images.shape == (1, 32, 32, 3)
