"""Wuerstchen and Stable Cascade: stages alone and together, their networks, what their calls refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated import wuerstchen as peers

import autopipeline as ap
import tiny

Checkpoint = Callable[[str], Path]
CALL: dict[str, Any] = dict(prompt="a red cat", height=128, width=128, prior_num_inference_steps=3)
CALL |= dict(num_inference_steps=2, output_type="np")
BOTH = [("wuerstchen", "Wuerstchen"), ("cascade", "StableCascade")]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loaded(name: str, folder: Path) -> list[Any]:
    pipes = [getattr(lib, name).from_pretrained(folder) for lib in (diffusers, ap)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeds(pooled: bool, count: int = 1) -> dict[str, Any]:
    made: dict[str, Any] = dict(prompt=None, prompt_embeds=drawn(count, 77, 24))
    made |= dict(negative_prompt_embeds=drawn(count, 77, 24, seed=1))
    if pooled:
        made |= dict(prompt_embeds_pooled=drawn(count, 1, 24, seed=2))
        made |= dict(negative_prompt_embeds_pooled=drawn(count, 1, 24, seed=3))
    return made


@pytest.mark.parametrize(("key", "stem"), BOTH)
@pytest.mark.parametrize(
    "changes",
    [
        dict(negative_prompt="sun", decoder_guidance_scale=2.0),
        dict(prior_guidance_scale=1.0, num_images_per_prompt=2, width=256),
        dict(latents=(1, 16, 3, 3), output_type="pt"),
        dict(output_type="latent", prior_guidance_scale=2.0),
        dict(embeds=True),
    ],
)
def test_both_stages_make_the_peers_picture(
    checkpoint: Checkpoint, key: str, stem: str, changes: dict[str, Any]
) -> None:
    changes = dict(changes)
    if changes.pop("embeds", False):
        changes |= embeds(key == "cascade")
    if "latents" in changes:
        changes["latents"] = drawn(*changes["latents"])
    pipes = loaded(f"{stem}CombinedPipeline", checkpoint(key))
    expected, actual = (np.asarray(pipe(**CALL | changes, generator=seeded()).images) for pipe in pipes)
    assert np.abs(expected - actual).max() <= 1e-3 * max(1, np.abs(expected).max())
    assert expected.std() > 0.01


def test_pictures_lead_cascade(checkpoint: Checkpoint) -> None:
    peer, ours = loaded("StableCascadeCombinedPipeline", checkpoint("cascade"))
    for shown in ([tiny.photo()], [tiny.photo(40, 64), tiny.photo(seed=9)]):
        made = [pipe(**CALL, images=list(shown), generator=seeded()).images for pipe in (peer, ours)]
        assert np.abs(made[0] - made[1]).max() < 1e-3
    one = ours(**CALL, images=tiny.photo(), generator=seeded()).images
    assert np.array_equal(one, ours(**CALL, images=[tiny.photo()], generator=seeded()).images)
    assert np.abs(one - ours(**CALL, generator=seeded()).images).max() > 1e-4


@pytest.mark.parametrize(("key", "stem"), BOTH)
@pytest.mark.parametrize(
    "changes",
    [
        dict(negative_prompt="sun", num_images_per_prompt=2),
        dict(prompt=["sun", "a red cat"], guidance_scale=1.0, output_type="np"),
    ],
)
def test_the_prior_imagines_the_same(checkpoint: Checkpoint, key: str, stem: str, changes: dict[str, Any]) -> None:
    call = dict(prompt="a red cat", height=130, width=256, num_inference_steps=3) | changes
    peer, ours = (
        pipe(
            **{name: list(value) if isinstance(value, list) else value for name, value in call.items()},
            generator=seeded(),
        )
        for pipe in loaded(f"{stem}PriorPipeline", checkpoint(f"{key}-prior"))
    )
    assert set(ours) >= set(peer.keys())
    assert ours.image_embeddings.shape == (2, 16, 4, 6)
    for name in ours:
        assert (ours[name] is None) == (getattr(peer, name) is None)
        if ours[name] is not None:
            assert isinstance(ours[name], np.ndarray) is ("output_type" in changes)
            assert np.allclose(np.asarray(peer[name]), np.asarray(ours[name]), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(("key", "stem"), BOTH)
def test_the_decoder_makes_the_same_of_it(checkpoint: Checkpoint, key: str, stem: str) -> None:
    rows = drawn(2, 16, 3, 6)
    call = dict(image_embeddings=rows, prompt="a red cat", num_inference_steps=3, output_type="np")
    peer, ours = loaded(f"{stem}DecoderPipeline", checkpoint(f"{key}-decoder"))
    for changes in ({}, dict(guidance_scale=2.5, negative_prompt="sun")):
        made = [pipe(**call | changes, generator=seeded()).images for pipe in (peer, ours)]
        assert made[0].shape == (2, 128, 256, 3)
        assert np.abs(made[0] - made[1]).max() < 1e-3
    listed = ours(**call | dict(image_embeddings=list(rows.split(1))), generator=seeded()).images
    assert np.array_equal(listed, ours(**call | dict(image_embeddings=rows.numpy()), generator=seeded()).images)
    each = [dict(call, image_embeddings=rows[k : k + 1], prompt=text) for k, text in enumerate(("sun", "cat"))]
    both = ours(**call | dict(prompt=["sun", "cat"]), seed=[1, 2]).images
    assert np.allclose(both, np.concatenate([ours(**one, seed=k + 1).images for k, one in enumerate(each)]), atol=1e-4)


@pytest.mark.parametrize(("key", "stem"), BOTH)
def test_the_stages_by_hand_are_the_stages_together(checkpoint: Checkpoint, key: str, stem: str) -> None:
    whole = ap.DiffusionPipeline.from_pretrained(checkpoint(key))
    own = {name: part for name, part in whole.components.items() if not name.startswith("prior_")}
    prior = getattr(ap, f"{stem}PriorPipeline")(
        **{name.removeprefix("prior_"): part for name, part in whole.components.items() if name not in own}
    )
    decoder, random = getattr(ap, f"{stem}DecoderPipeline")(**own), seeded()
    imagined = prior("a red cat", height=128, width=128, num_inference_steps=3, guidance_scale=4.0, generator=random)
    told = dict(prompt="a red cat")
    if key == "cascade":
        told = {name: rows for name, rows in imagined.items() if name != "image_embeddings"}
    by_hand = decoder(imagined.image_embeddings, **told, num_inference_steps=2, output_type="np", generator=random)
    assert np.array_equal(by_hand.images, whole(**CALL, generator=seeded()).images)


def test_odd_sizes_work_aloud(checkpoint: Checkpoint) -> None:
    for key, _ in BOTH:
        pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(key))
        with pytest.warns(UserWarning, match="height=200 is no multiple of 128 pixels; 208 are made"):
            assert pipe(**CALL | dict(height=200)).images.shape == (1, 208, 128, 3)


@torch.no_grad()
def test_networks() -> None:
    x, t, text, rows = (
        drawn(2, 4, 16, 24),
        torch.tensor([0.3, 0.9]),
        drawn(2, 7, 24, seed=1),
        drawn(2, 16, 3, 5, seed=2),
    )
    deep = tiny.WUERSTCHEN | dict(
        c_hidden=[16, 32, 32],
        nhead=[-1, 4, 2],
        blocks=[1, 2, 1],
        level_config=["CT", "CTA", "CTA"],
        inject_effnet=[False, True, True],
        kernel_size=5,
    )
    peer, ours = pair(peers.WuerstchenDiffNeXt(**deep), ap.WuerstchenDiffNeXt(**deep))
    assert close(peer(x, t, rows, text), ours(x, t, *ours.hear(rows, text, 16, 24)))
    shape = dict(c_in=5, c=24, c_cond=24, c_r=9, depth=2, nhead=3)
    peer, ours = pair(peers.WuerstchenPrior(**shape), ap.WuerstchenPrior(**shape))
    sample = drawn(2, 5, 3, 4)
    assert close(peer(sample, t, text), ours(sample, t, text))
    shape = dict(bottleneck_blocks=2, embed_dim=12, num_vq_embeddings=9, latent_channels=3)
    peer, ours = pair(peers.PaellaVQModel(**shape), ap.PaellaVQModel(**shape))
    assert close(peer.decode(drawn(2, 3, 6, 4)).sample, ours.decode(drawn(2, 3, 6, 4)))
    assert close(peer.encode(drawn(2, 3, 16, 24)).latents, ours.encode(drawn(2, 3, 16, 24)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(switch_level=(True,), self_attn=(False, True), timestep_conditioning_type=("sca",), kernel_size=5),
        dict(down_blocks_repeat_mappers=(2, 1), up_blocks_repeat_mappers=(1, 3), pixel_mapper_in_channels=3),
    ],
)
@torch.no_grad()
def test_network_of_cascade(changes: dict[str, Any]) -> None:
    t, pooled, text, image = torch.tensor([0.3, 0.9]), drawn(2, 1, 24), drawn(2, 7, 24, seed=1), drawn(2, 2, 24, seed=2)
    shape = tiny.CASCADE_PRIOR | changes
    peer, ours = pair(diffusers.StableCascadeUNet(**shape), ap.StableCascadeUNet(**shape))
    x = drawn(2, 16, 4, 6)
    assert close(peer(x, t, pooled, text, image).sample, ours(x, t, ours.hear(pooled, text, image)))
    shape = tiny.CASCADE_DECODER | {name: value for name, value in changes.items() if name != "self_attn"}
    peer, ours = pair(diffusers.StableCascadeUNet(**shape), ap.StableCascadeUNet(**shape))
    x, rows = drawn(2, 4, 20, 12), drawn(2, 16, 3, 5)
    assert close(peer(x, t, pooled, effnet=rows).sample, ours(x, t, ours.hear(pooled), rows))


def pair(peer: Any, ours: Any) -> tuple[Any, Any]:
    ours.load_state_dict(tiny.redraw(peer, 1).state_dict())
    return peer.eval(), ours.eval()


def close(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    return torch.allclose(expected, actual, rtol=1e-3, atol=1e-4)


def test_published_sizes_have_the_peers_keys_and_shapes() -> None:
    with torch.device("meta"):
        pairs = [
            (peers.WuerstchenDiffNeXt(), ap.WuerstchenDiffNeXt()),
            (peers.WuerstchenPrior(), ap.WuerstchenPrior()),
            (peers.PaellaVQModel(), ap.PaellaVQModel()),
            (diffusers.StableCascadeUNet(), ap.StableCascadeUNet()),
        ]
    for both in pairs:
        shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in both]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("cascade", dict(prompt=None, prompt_embeds=drawn(1, 77, 24)), "need each other"),
        ("cascade", dict(prompt=None) | embeds(True) | dict(prompt_embeds_pooled=drawn(1, 24)), r"\(1, 1, width\)"),
        ("wuerstchen", dict(latents=drawn(1, 16, 4, 4)), "latents have the shape"),
        ("wuerstchen", dict(prior_callback_on_step_end_tensor_inputs=["nothing"]), "may name latents"),
        ("wuerstchen", dict(prior_timesteps=[0.2, 0.6]), "descending"),
        ("cascade-decoder", dict(image_embeddings=drawn(1, 4, 3, 3)), r"\(N, 16, h, w\)"),
        ("wuerstchen-decoder", dict(image_embeddings=drawn(1, 16, 3, 3), prompt=None), "prompt is needed beside"),
        ("wuerstchen-decoder", dict(image_embeddings=drawn(3, 16, 3, 3), prompt=["a", "b"]), "2 entries for 3"),
        ("wuerstchen-prior", dict(output_type="pil"), "a prior makes no pictures"),
        ("cascade-prior", dict(image_embeds=drawn(2, 24)), r"\(1, pictures, width\)"),
        ("cascade-prior", dict(images=[tiny.photo()], image_embeds=drawn(1, 1, 24)), "either images or image_embeds"),
    ],
)
def test_refusals(checkpoint: Checkpoint, name: str, changes: dict[str, Any], says: str) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(name))
    params = next(iter(pipe.family.tasks.values())).params
    call = {key: value for key, value in CALL.items() if key in params and key != "output_type"} | changes
    with pytest.raises(ValueError, match=says):
        pipe(**call)


def test_pictures_need_an_encoder(checkpoint: Checkpoint) -> None:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint("cascade"), prior_image_encoder=None)
    with pytest.raises(ValueError, match="no prior_image_encoder to see images with"):
        pipe(**CALL, images=[tiny.photo()])
