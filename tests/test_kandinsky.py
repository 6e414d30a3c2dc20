"""Kandinsky 2.1 and 2.2: stages alone and together, what leads from one to the other, their networks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import tiny

Checkpoint = Callable[[str], Path]
SIZE = dict(height=64, width=64, num_inference_steps=4, output_type="np")
CALL = SIZE | dict(prompt="a red cat", prior_num_inference_steps=3)


def loaded(name: str, folder: Path) -> list[Any]:
    pipes = [getattr(lib, name).from_pretrained(folder) for lib in (diffusers, ap)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(count: int = 1) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(count, 24, generator=seeded(k))
        for k, name in enumerate(("image_embeds", "negative_image_embeds"))
    }


@pytest.fixture
def linked(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A decoder whose card names its prior."""
    folder = tmp_path / "decoder"
    shutil.copytree(checkpoint("kandinsky22-decoder"), folder)
    (folder / "README.md").write_text(
        f"---\nlicense: mit\nprior:\n- {checkpoint('kandinsky22-prior')}\n---\n# decoder\n"
    )
    return folder


# --- stages alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(prompt=["a", "red sun"], negative_prompt=["cat", ""], num_images_per_prompt=2),
        dict(guidance_scale=1.0, output_type="np"),
        dict(negative_prompt="cat", latents=torch.randn(2, 24, generator=seeded(9))),
        dict(prompt="cat " * 75),
    ],
)
def test_the_prior_imagines_the_same(checkpoint: Checkpoint, changes: dict[str, Any]) -> None:
    call = dict(prompt="a red cat", num_inference_steps=3) | changes
    peer, ours = (
        pipe(**call, generator=seeded())
        for pipe in loaded("KandinskyV22PriorPipeline", checkpoint("kandinsky22-prior"))
    )
    assert list(ours) == ["image_embeds", "negative_image_embeds"]
    assert isinstance(ours[0], np.ndarray) is (call.get("output_type") == "np")
    for name in ours:
        assert np.allclose(np.asarray(peer[name]), np.asarray(ours[name]), atol=1e-4)


@pytest.mark.parametrize(("cls", "own"), [("", {}), ("Img2Img", dict(image=tiny.photo(), strength=0.6))])
@pytest.mark.parametrize("version", ["22", "21"])
def test_the_decoder_makes_the_same_of_it(checkpoint: Checkpoint, version: str, cls: str, own: dict[str, Any]) -> None:
    key, stem = {"21": ("kandinsky", "Kandinsky"), "22": ("kandinsky22", "KandinskyV22")}[version]
    call = SIZE | embeddings() | own | dict(num_images_per_prompt=2)
    call |= dict(prompt="a red cat", negative_prompt="sun") if version == "21" else {}
    pipes = loaded(f"{stem}{cls}Pipeline", checkpoint(f"{key}-decoder"))
    peer, ours = (pipe(**call, generator=seeded()).images for pipe in pipes)
    assert np.allclose(peer, ours, atol=2e-3)


def test_the_stages_by_hand_are_the_stages_together(checkpoint: Checkpoint) -> None:
    prior, decoder = (
        ap.DiffusionPipeline.from_pretrained(checkpoint(f"kandinsky22-{part}")) for part in ("prior", "decoder")
    )
    both = ap.DiffusionPipeline.from_pretrained(checkpoint("kandinsky22"))
    random = seeded()
    imagined = prior("a red cat", num_inference_steps=3, generator=random)
    by_hand = decoder(**imagined, **SIZE, generator=random).images
    assert np.array_equal(by_hand, both(**CALL, generator=seeded()).images)


def test_embeddings_may_be_a_list_and_pictures_their_own(checkpoint: Checkpoint) -> None:
    pipe = ap.KandinskyV22Img2ImgPipeline.from_pretrained(checkpoint("kandinsky22-decoder"))
    many, own = embeddings(2), SIZE | dict(strength=0.6)
    listed = {name: list(rows.split(1)) for name, rows in many.items()}
    pictures = [tiny.photo(), tiny.photo(seed=5)]
    both = pipe(**listed, **own, image=pictures, seed=[7, 9], num_images_per_prompt=1).images
    alone = [
        pipe(**{name: rows[k : k + 1] for name, rows in many.items()}, **own, image=pictures[k], seed=7 + 2 * k).images
        for k in range(2)
    ]
    assert np.allclose(both, np.concatenate(alone), atol=2e-4)


def test_callbacks_of_both_stages(checkpoint: Checkpoint) -> None:
    results: list[Any] = []
    traces: list[list[Any]] = []
    for pipe in loaded("KandinskyV22CombinedPipeline", checkpoint("kandinsky22")):
        trace: list[Any] = []

        def fade(pipe: Any, step: int, t: Any, tensors: Any, trace: list[Any] = trace) -> dict[str, Any]:
            trace.append((int(step), int(t), {name: tuple(rows.shape) for name, rows in tensors.items()}))
            return {"latents": tensors["latents"] * 0.9}

        own = dict(prior_callback_on_step_end_tensor_inputs=["latents", "text_mask", "prompt_embeds"])
        results.append(
            pipe(**CALL, **own, callback_on_step_end=fade, prior_callback_on_step_end=fade, generator=seeded())
        )
        traces.append(trace)
    assert traces[0] == traces[1]
    assert len(traces[0]) == 7
    assert np.allclose(results[0].images, results[1].images, atol=2e-3)


def test_a_callback_does_not_touch_what_a_mask_keeps(checkpoint: Checkpoint) -> None:
    fade = dict(callback_on_step_end=lambda pipe, step, t, tensors: {"latents": tensors["latents"] * 0.5})
    call = CALL | fade | tiny.inputs("inpaint")
    pipes = loaded("KandinskyV22InpaintCombinedPipeline", checkpoint("kandinsky22-9"))
    peer, ours = (pipe(**call, generator=seeded()).images for pipe in pipes)
    assert np.allclose(peer, ours, atol=2e-3)


def test_sizes(checkpoint: Checkpoint) -> None:
    """Pictures that are not square come out as they are asked for, rounded up from noise and down from a picture."""
    for key in ("kandinsky", "kandinsky22"):
        pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(key))
        assert pipe(**CALL | dict(height=50, width=20)).images.shape == (1, 64, 32, 3)
        assert pipe(**CALL, image=tiny.photo(), strength=0.6).images.shape == (1, 64, 64, 3)
        wide = pipe(**CALL | dict(height=42, width=80), image=tiny.photo(), strength=0.6)
        assert wide.images.shape == (1, 40, 80, 3)


# --- from decoder to prior ---------------------------------------------------------------------------------------


def test_the_card_leads_to_the_prior(checkpoint: Checkpoint, linked: Path) -> None:
    pipe = ap.AutoPipelineForImage2Image.from_pretrained(linked)
    assert type(pipe) is ap.KandinskyV22Img2ImgCombinedPipeline
    whole = ap.AutoPipelineForImage2Image.from_pretrained(checkpoint("kandinsky22"))
    call = CALL | tiny.inputs("image2image") | dict(strength=0.6, seed=7)
    assert np.array_equal(pipe(**call).images, whole(**call).images)
    assert type(ap.DiffusionPipeline.from_pretrained(linked)) is ap.KandinskyV22Pipeline


def test_the_prior_by_keyword(checkpoint: Checkpoint) -> None:
    folder = checkpoint("kandinsky22-decoder")
    given = ap.DiffusionPipeline.from_pretrained(checkpoint("kandinsky22-prior"))
    there = ap.AutoPipelineForText2Image.from_pretrained(folder, prior=checkpoint("kandinsky22-prior"))
    pipe = ap.AutoPipelineForText2Image.from_pretrained(folder, prior=given)
    assert pipe.prior_prior is given.prior
    assert np.array_equal(there(**CALL, seed=7).images, pipe(**CALL, seed=7).images)


def test_what_is_said_without_a_prior(checkpoint: Checkpoint, linked: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(ap.CheckpointError, match=words):
            ap.AutoPipelineForText2Image.from_pretrained(linked)

    (linked / "README.md").write_text("# nothing\n")
    refused("names no prior, which this decoder needs; pass prior=")
    (linked / "README.md").write_text("---\nprior: [\n---\n")
    refused("can't be read; pass prior=")
    (linked / "README.md").unlink()
    refused("a decoder alone and has no README.md that names its prior; pass prior=")


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call", "words"),
    [
        ("kandinsky22-decoder", {}, "image_embeds are needed"),
        ("kandinsky22-decoder", dict(image_embeds=torch.zeros(1, 24)), "Guidance needs negative_image_embeds"),
        ("kandinsky22-decoder", embeddings() | dict(image_embeds=torch.zeros(2, 24)), r"has to be \(2, width\)"),
        ("kandinsky22-decoder", dict(image_embeds=torch.zeros(1, 9), guidance_scale=1.0), "this unet takes 24"),
        ("kandinsky22-decoder", dict(image_embeds=torch.full((1, 24), torch.nan)), "NaN"),
        ("kandinsky22-decoder", embeddings() | dict(prompt="cat"), "no parameter 'prompt'"),
        ("kandinsky22-prior", dict(prompt="cat", output_type="pil"), "a prior makes no pictures"),
        ("kandinsky-decoder", embeddings(), "prompt is needed"),
        ("kandinsky-decoder", embeddings(2) | dict(prompt="cat"), r"has to be \(1, width\)"),
        ("kandinsky22", CALL | dict(prior_guidance_scale="much"), "prior_guidance_scale"),
        ("kandinsky22", CALL | dict(latents=torch.zeros(2, 24)), "latents have the shape"),
        ("kandinsky22", CALL | dict(prior_callback_on_step_end_tensor_inputs=["image_embeds"]), "may name latents"),
        ("kandinsky22", CALL | dict(prior_callback_on_step_end=3), "has to be a function"),
    ],
)
def test_refused(checkpoint: Checkpoint, name: str, call: dict[str, Any], words: str) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(name))
    with pytest.raises((TypeError, ValueError), match=words):
        pipe(**call)


# --- networks ----------------------------------------------------------------------------------------------------


def test_networks_of_other_shapes() -> None:
    """Keys and shapes are the peer's, and the same comes out."""
    movq = tiny.MOVQ | dict(norm_type="group", vq_embed_dim=6, layers_per_block=2, mid_block_add_attention=False)
    prior = dict(num_attention_heads=2, attention_head_dim=12, num_layers=1, embedding_dim=16, time_embed_dim=20)
    told = dict(norm_in_type="layer", embedding_proj_norm_type="layer", embedding_proj_dim=10)
    theirs: list[Any] = [diffusers.VQModel(**movq), diffusers.PriorTransformer(**prior | told)]
    ours: list[Any] = [ap.VQModel(**movq), ap.PriorTransformer(**prior | told)]
    for peer, own in zip(theirs, ours, strict=True):
        own.load_state_dict(tiny.redraw(peer, 3).state_dict(), strict=True)
    pictures = torch.randn(1, 3, 24, 32, generator=seeded())
    rows = dict(
        proj_embedding=torch.randn(2, 10, generator=seeded()),
        encoder_hidden_states=torch.randn(2, 77, 16, generator=seeded()),
        attention_mask=torch.arange(77)[None] < torch.tensor([[5], [40]]),
    )
    noisy, t = torch.randn(2, 16, generator=seeded()), torch.tensor([700, 700])
    with torch.no_grad():
        z = theirs[0].encode(pictures).latents
        assert torch.allclose(z, ours[0].encode(pictures), atol=1e-4)
        assert torch.allclose(theirs[0].decode(z, force_not_quantize=True).sample, ours[0].decode(z), atol=1e-4)
        assert torch.allclose(
            theirs[1](noisy, t, **rows).predicted_image_embedding, ours[1](noisy, t, **rows), atol=1e-5
        )


@pytest.mark.parametrize(
    "changes",
    [
        dict(encoder_hid_dim=24, addition_embed_type="text", addition_embed_type_num_heads=2, act_fn="gelu"),
        dict(only_cross_attention=True, resnet_skip_time_act=True, resnet_out_scale_factor=1.4),
        dict(time_embedding_act_fn="gelu", layers_per_block=2, resnet_time_scale_shift="default"),
    ],
)
def test_simple_blocks(changes: dict[str, Any]) -> None:
    config = tiny.KANDINSKY_UNET | changes
    peer, own = diffusers.UNet2DConditionModel(**config), ap.UNet2DConditionModel(**config)
    own.load_state_dict(tiny.redraw(peer, 5).state_dict(), strict=True)
    x, text, t = (
        torch.randn(2, 4, 8, 8, generator=seeded()),
        torch.randn(2, 5, 24, generator=seeded()),
        torch.tensor([9, 9]),
    )
    with torch.no_grad():
        assert torch.allclose(peer(x, t, text).sample, own(x, t, text), atol=1e-4)


def test_saved_as_the_peer_reads_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for key in ("kandinsky", "kandinsky22"):
        ap.DiffusionPipeline.from_pretrained(checkpoint(key)).save_pretrained(tmp_path / key)
        peer, ours = loaded(ap.DiffusionPipeline.from_pretrained(tmp_path / key).__class__.__name__, tmp_path / key)
        assert np.allclose(*(pipe(**CALL, generator=seeded()).images for pipe in (peer, ours)), atol=2e-3)
