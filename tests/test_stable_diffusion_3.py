"""Stable Diffusion 3: its networks, its add-ons and what it refuses, beside what the common tests try."""

from __future__ import annotations

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
from autopipeline.models import sd3

Checkpoint = Callable[[str], Path]
NET = tiny.SD3 | dict(in_channels=4, out_channels=4)
SD35 = dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))
CONTROL = tiny.photo(seed=4)
TASKS = {"text2image": "", "image2image": "Img2Img", "inpaint": "Inpainting"}
# Configurations of published networks: Stable Diffusion 3 medium, 3.5 medium and large, and ControlNets for them.
MEDIUM = dict(sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
MEDIUM_35 = MEDIUM | SD35 | dict(pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))
LARGE_35 = dict(sample_size=128, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm")
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("SD3Transformer2DModel", MEDIUM | dict(pos_embed_max_size=192)),
    ("SD3Transformer2DModel", MEDIUM_35),
    ("SD3Transformer2DModel", LARGE_35 | dict(pos_embed_max_size=192)),
    ("SD3ControlNetModel", MEDIUM | dict(num_layers=6, pos_embed_max_size=192)),
    ("SD3ControlNetModel", MEDIUM | dict(num_layers=23, pos_embed_max_size=192, extra_conditioning_channels=1)),
    (
        "SD3ControlNetModel",
        LARGE_35
        | dict(num_layers=19, joint_attention_dim=None, pos_embed_type=None, use_pos_embed=False, qk_norm=None)
        | dict(force_zeros_for_pooled_projection=False),
    ),
]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def twin(name: str, **config: Any) -> tuple[Any, Any]:
    """The peer's network and ours, with the same random weights."""
    peer = tiny.redraw(getattr(diffusers, name)(**config), 1)
    ours = getattr(sd3, name)(**config).eval()
    ours.load_state_dict(peer.state_dict())
    return peer, ours


X, T, TEXT, POOLED = drawn(2, 4, 6, 10), torch.tensor([300.0, 712.5]), drawn(2, 7, 60, seed=1), drawn(2, 36, seed=2)


@pytest.mark.parametrize("changes", [{}, SD35, dict(qk_norm="layer_norm", num_layers=2, patch_size=1)], ids=str)
@torch.no_grad()
def test_transformer(changes: dict[str, Any]) -> None:
    peer, ours = twin("SD3Transformer2DModel", **NET | changes)
    said = dict(encoder_hidden_states=TEXT, pooled_projections=POOLED)
    assert torch.allclose(ours(X, T, **said), peer(X, timestep=T, **said).sample, atol=2e-5)
    residuals = [drawn(2, 60 if changes.get("patch_size") == 1 else 15, 24, seed=k) for k in range(2)]
    expected = peer(X, timestep=T, **said, block_controlnet_hidden_states=residuals, skip_layers=[0]).sample
    skipped = torch.zeros(2, ours.config.num_layers, dtype=torch.bool)
    skipped[:, 0] = True
    assert torch.allclose(ours(X, T, **said, residuals=residuals, skipped=skipped), expected, atol=2e-5)
    skipped[1] = False
    mixed = ours(X, T, **said, skipped=skipped)
    assert torch.allclose(mixed[1], ours(X, T, **said)[1], atol=2e-5)
    assert (mixed[0] - ours(X, T, **said)[0]).abs().max() > 0.01


@torch.no_grad()
def test_fresh_networks_know_places() -> None:
    for size in (16, 12):
        config = NET | dict(sample_size=size)
        fresh = sd3.SD3Transformer2DModel(**config).pos_embed.pos_embed
        assert torch.allclose(fresh, diffusers.SD3Transformer2DModel(**config).pos_embed.pos_embed, atol=1e-6)
    with pytest.raises(ValueError, match="24 x 24 patches"):
        twin("SD3Transformer2DModel", **NET)[1](
            drawn(1, 4, 50, 8), T[:1], encoder_hidden_states=TEXT[:1], pooled_projections=POOLED[:1]
        )


@pytest.mark.parametrize(
    "changes", [{}, SD35, dict(joint_attention_dim=None), dict(extra_conditioning_channels=1)], ids=str
)
@torch.no_grad()
def test_controlnet(changes: dict[str, Any]) -> None:
    peer, ours = twin("SD3ControlNetModel", **NET | changes)
    control = drawn(2, 4 + changes.get("extra_conditioning_channels", 0), 6, 10, seed=5)
    text = None if "joint_attention_dim" in changes else TEXT
    expected = peer(X, control, 1.0, text, POOLED, T).controlnet_block_samples
    made = ours(X, T, control=control, pooled_projections=POOLED, encoder_hidden_states=TEXT, patches=None)
    assert len(made) == len(expected)
    assert all(torch.allclose(own, theirs, atol=2e-5) for own, theirs in zip(made, expected, strict=True))


@pytest.mark.parametrize(("name", "config"), PUBLISHED)
def test_published_sizes_have_the_peers_keys_and_shapes(name: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        peer, ours = getattr(diffusers, name)(**config), getattr(sd3, name)(**config)
    expected = {key: tensor.shape for key, tensor in peer.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [(dict(qk_norm="l2"), "qk_norm='l2'"), (dict(caption_projection_dim=32), "width 24")],
)
def test_other_networks_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ap.CheckpointError, match=says):
        sd3.SD3Transformer2DModel(**NET | changes)


# --- add-ons -------------------------------------------------------------------------------------------------

CERTAIN = -30.0  # the peer encodes control pictures with draws from the global random numbers; here they are tiny


@pytest.fixture(scope="module")
def load(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sd3-controlnets")

    @cache
    def net(k: int, kind: str) -> Path:
        own = {
            "plain": dict(num_layers=3),
            "mask": dict(num_layers=2, extra_conditioning_channels=1),
            "pooled": dict(num_layers=2, force_zeros_for_pooled_projection=False),
            "image": dict(num_layers=2, joint_attention_dim=None, use_pos_embed=False, pos_embed_type=None),
        }[kind]
        config = tiny.SD3 | own
        tiny.redraw(diffusers.SD3ControlNetModel(**config), 20 + k).save_pretrained(folder / f"{kind}-{k}")
        return folder / f"{kind}-{k}"

    def get(lib: Any, name: str, task: str, kinds: tuple[str, ...], **options: Any) -> Any:
        nets = [lib.SD3ControlNetModel.from_pretrained(net(k, kind)) for k, kind in enumerate(kinds)]
        if nets:
            options["controlnet"] = nets[0] if len(nets) == 1 else nets
            cls = getattr(lib, f"StableDiffusion3ControlNet{TASKS[task]}Pipeline")
        else:
            cls = getattr(lib, f"StableDiffusion3PAG{TASKS[task]}Pipeline")
        pipe = cls.from_pretrained(checkpoint(name), **options)
        with torch.no_grad():
            last = pipe.vae.encoder.conv_out
            last.weight[16:], last.bias[16:] = 0, CERTAIN
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get


def picture(pipe: Any, task: str, changes: dict[str, Any]) -> np.ndarray:
    call = dict(prompt="a red cat, sun", num_inference_steps=5, output_type="np", max_sequence_length=20)
    if "ControlNet" in type(pipe).__name__:
        call["control_image"] = CONTROL
        call |= {"control_mask": tiny.mask()} if task == "inpaint" else {}
    else:
        call |= tiny.inputs(task)
    return pipe(**call | changes, generator=torch.Generator().manual_seed(3)).images


WINDOW = dict(control_guidance_start=0.3, control_guidance_end=0.8, controlnet_conditioning_scale=0.6)
PAIR = dict(control_image=[CONTROL, tiny.photo(seed=7)], controlnet_conditioning_scale=[0.4, 0.9])
LAYERS = dict(pag_applied_layers=["blocks.2", "blocks.3"])
ADDED: list[tuple[str, str, tuple[str, ...], dict[str, Any], dict[str, Any]]] = [
    ("sd3", "text2image", ("plain",), {}, dict(negative_prompt="sun", num_images_per_prompt=2)),
    ("sd3", "text2image", ("plain",), {}, WINDOW | dict(guidance_scale=1.0, width=96)),
    ("sd3", "text2image", ("pooled",), {}, dict(control_image=drawn(1, 3, 64, 48))),
    ("sd3", "text2image", ("image",), {}, {}),
    ("sd3", "text2image", ("plain", "plain"), {}, PAIR),
    ("sd3", "inpaint", ("mask",), {}, dict(negative_prompt="sun")),
    ("sd3", "inpaint", ("mask",), {}, WINDOW | dict(height=96, width=48)),
    ("sd3", "text2image", (), {}, dict(negative_prompt="sun")),
    ("sd3", "text2image", (), LAYERS, dict(guidance_scale=1.0, pag_adaptive_scale=0.002)),
    ("sd3", "image2image", (), LAYERS, dict(strength=0.9)),
    ("sd35", "text2image", (), LAYERS, {}),
]


@pytest.mark.parametrize(("name", "task", "kinds", "options", "changes"), ADDED)
def test_add_ons_give_the_peers_pictures(
    load: Any, name: str, task: str, kinds: tuple[str, ...], options: dict[str, Any], changes: dict[str, Any]
) -> None:
    peer, ours = (load(lib, name, task, kinds, **options) for lib in (diffusers, ap))
    if name == "sd35":  # the peer hands the add-on's classes no mu
        for pipe, lib in ((peer, diffusers), (ours, ap)):
            pipe.scheduler = lib.FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected, actual = picture(peer, task, changes), picture(ours, task, changes)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 2e-3
    without = dict(controlnet_conditioning_scale=0.0) if kinds else dict(pag_scale=0.0)
    assert np.abs(picture(ours, task, changes | without) - actual).max() > 0.005


def test_add_ons_switch_and_save(load: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = ap.AutoPipelineForText2Image.from_pretrained(checkpoint("sd3"))
    net = load(ap, "sd3", "text2image", ("plain",)).controlnet
    added = ap.AutoPipelineForText2Image.from_pipe(base, controlnet=net)
    assert type(added).__name__ == "StableDiffusion3ControlNetPipeline"
    added.set_progress_bar_config(disable=True)
    added.save_pretrained(tmp_path / "saved")
    again = ap.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(picture(again, "text2image", {}), picture(added, "text2image", {}))
    perturbed = ap.AutoPipelineForImage2Image.from_pipe(base, enable_pag=True)
    assert perturbed.config.pag_applied_layers == "blocks.1"
    assert type(ap.AutoPipelineForText2Image.from_pipe(perturbed, enable_pag=False)) is type(base)


# --- what is left out, and what is refused ---------------------------------------------------------------------


def test_t5_may_be_left_out(checkpoint: Checkpoint) -> None:
    pictures: list[np.ndarray] = []
    for lib in (diffusers, ap):
        pipe = lib.StableDiffusion3Pipeline.from_pretrained(checkpoint("sd3"), text_encoder_3=None, tokenizer_3=None)
        pipe.set_progress_bar_config(disable=True)
        pictures.append(picture(pipe, "text2image", {}))
    assert np.abs(pictures[0] - pictures[1]).max() <= 2e-3
    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    bare = ap.StableDiffusion3Pipeline.from_pretrained(checkpoint("sd3"), text_encoder_3=None, tokenizer_3=None, **none)
    with pytest.raises(ValueError, match="no text_encoder; pass prompt_embeds"):
        picture(bare, "text2image", {})
    embeds = dict(prompt=None, prompt_embeds=drawn(1, 30, 60), pooled_prompt_embeds=drawn(1, 36))
    assert picture(bare, "text2image", embeds | dict(guidance_scale=1.0)).shape == (1, 64, 64, 3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(max_sequence_length=513), "more than 512"),
    (dict(width=60), "multiple of 8 pixels"),
    (dict(mu=0.5), "mu=0.5 has no effect"),
    (dict(skip_layer_guidance_scale=2.0), "no effect without skip_guidance_layers"),
    (dict(skip_guidance_layers=[1], guidance_scale=1.0), "no effect without guidance"),
    (dict(skip_guidance_layers=[4]), "from 0 to 3"),
    (dict(skip_guidance_layers=1), "list of numbers"),
    (dict(clip_skip=3), "clip_skip=3 has to be between 0 and 2"),
    (dict(prompt_3=["a", "b"]), "prompt_3 has 2 entries for 1 prompts"),
    (dict(joint_attention_kwargs={"scale": 0.5}), "none is loaded"),
    (
        dict(prompt=None, prompt_embeds=drawn(1, 30, 60), pooled_prompt_embeds=drawn(1, 36)),
        "97 tokens and the prompt 30",
    ),
    (dict(prompt=None, prompt_embeds=drawn(1, 30, 60)), "needs pooled_prompt_embeds"),
]


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> Any:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint("sd3"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_refused_in_a_sentence(plain: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        picture(plain, "text2image", changes)


def test_a_callback_may_end_the_guidance_while_layers_are_skipped(plain: Any) -> None:
    seen: list[int] = []

    def end(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(tensors["prompt_embeds"]))
        pipe._guidance_scale = 1.0 if step == 2 else pipe._guidance_scale
        return {"prompt_embeds": tensors["prompt_embeds"][-1:]} if step == 2 else {}

    skip = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.5)
    call = dict(callback_on_step_end=end, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    ended = picture(plain, "text2image", skip | call)
    assert seen == [2, 2, 2, 1, 1]
    assert np.abs(ended - picture(plain, "text2image", skip)).max() > 0.005


def test_skipped_layers_in_a_batch_of_runs(plain: Any) -> None:
    lists = dict(prompt=["a red cat", "sun"], num_inference_steps=[4, 6], generator=None, seed=[7, 9])
    skip = dict(skip_guidance_layers=[1, 2], skip_layer_guidance_stop=0.9, output_type="np", max_sequence_length=20)
    both = plain(**lists | skip).images
    first = plain("a red cat", num_inference_steps=4, seed=7, **skip).images
    second = plain("sun", num_inference_steps=6, seed=9, **skip).images
    assert np.allclose(both, np.concatenate([first, second]), atol=2e-4)
