"""Qwen-Image 2.1: networks, the peer's pictures with and without pictures to look at, and what its calls refuse."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import autopipeline as ap
import qwenimage
import tiny

CALL: dict[str, Any] = dict(prompt="a red cat", height=64, width=96, num_inference_steps=3, output_type="np")
GUIDED = dict(negative_prompt="the sun on the sea", true_cfg_scale=3.0)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clear(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with transparency."""
    picture = tiny.photo(width, height, seed)
    picture.putalpha(tiny.photo(width, height, seed + 1).convert("L"))
    return picture


@pytest.fixture(scope="module")
def load(checkpoint: Any) -> Any:
    made: dict[str, tuple[Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any]:
        if name not in made:
            folder, processor = checkpoint(name), qwenimage.peers_processor21()
            peer = diffusers.QwenImage21Pipeline.from_pretrained(folder, processor=processor)
            made[name] = peer, ap.AutoPipelineForText2Image.from_pretrained(folder)
            for pipe in made[name]:
                pipe.set_progress_bar_config(disable=True)
        return made[name]

    return get


@pytest.mark.parametrize("name", ["qwenimage21", "qwenimage21-unkept"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        GUIDED | dict(num_images_per_prompt=2),
        GUIDED | dict(prompt=["a red cat on the sea, a sun", "sun"], negative_prompt=["a", "the red sea"]),
        dict(prompt="", sigmas=[1.0, 0.6, 0.2]),
        dict(prompt=None, prompt_embeds=(1, 7, 24), output_type="latent", latents=(1, 24, 6)),
        GUIDED | dict(image=[clear(64, 64)], use_kv_cache=False),
        GUIDED | dict(image=[clear(100, 60), tiny.photo(64, 64, 4)], height=None, width=None, output_resolution=64),
        dict(image=clear(60, 100), prompt=["a red cat", "a cat on the sea"], num_images_per_prompt=2),
    ],
)
def test_same_picture_as_the_peer(load: Any, name: str, changes: dict[str, Any]) -> None:
    made: list[Any] = []
    for pipe in load(name):
        call = CALL | dict(output_resolution=64) | changes
        call |= {key: drawn(*value) for key, value in call.items() if isinstance(value, tuple)}
        made.append(np.asarray(pipe(**call, generator=torch.Generator().manual_seed(1)).images))
    assert made[0].shape == made[1].shape
    assert np.abs(made[0] - made[1]).max() <= 2e-3 * max(1, np.abs(made[0]).max())
    assert made[0].std() > 0.01


def test_seeds_of_several_prompts(load: Any) -> None:
    ours, texts = load("qwenimage21")[1], ["a red cat on the sea, a sun", "sun"]
    call = CALL | GUIDED | dict(image=clear(64, 64), output_resolution=64)
    both = ours(**call | dict(prompt=texts), seed=[1, 2]).images
    for k, text in enumerate(texts):
        assert np.abs(both[k] - ours(**call | dict(prompt=text), seed=k + 1).images[0]).max() < 1e-4


def test_sigmas_of_the_checkpoint(load: Any, tmp_path: Any) -> None:
    ours = load("qwenimage21")[1]
    own = ap.QwenImage21Pipeline.from_pipe(ours, sample_sigmas=[1.0, 0.5])
    own.save_pretrained(tmp_path)
    again = ap.DiffusionPipeline.from_pretrained(tmp_path)
    assert np.array_equal(again(**CALL, seed=1).images, ours(**CALL, sigmas=[1.0, 0.5], seed=1).images)
    assert ours(**CALL | dict(output_type="pil"), seed=1).images[0].mode == "RGBA"


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(temperal_downsample=[True, False, False, True], decoder_base_dim=None)])
def test_autoencoder(changes: dict[str, Any]) -> None:
    peer = tiny.redraw(diffusers.AutoencoderKLQwenImage21(**qwenimage.VAE21 | changes), 1)
    ours = ap.AutoencoderKLQwenImage21(**qwenimage.VAE21 | changes)
    ours.load_state_dict(peer.state_dict())
    x, z = drawn(2, 4, 32, 64), drawn(2, 6, 2, 3)
    assert torch.allclose(ours.encode(x).mean, peer.encode(x[:, :, None]).latent_dist.mode()[:, :, 0], atol=1e-4)
    assert torch.allclose(ours.decode(z), peer.decode(z[:, :, None]).sample[:, :, 0], atol=1e-4)


@pytest.mark.parametrize("name", ["QwenImage21Transformer2DModel", "AutoencoderKLQwenImage21"])
def test_published_sizes_have_the_peers_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        pair = [getattr(lib, name)() for lib in (diffusers, ap)]
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in pair]
    assert shapes[0] == shapes[1]
    assert list(pair[0].config["latents_std"] if "Auto" in name else ()) == list(pair[1].config.get("latents_std", ()))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(height=16), "32 pixels at least"),
        (dict(image=[]), "empty"),
        (dict(output_resolution=0), "number of pixels"),
        (dict(image=clear(64, 64), prompt=None, prompt_embeds=drawn(1, 5, 24)), "Embeddings don't say"),
        (dict(scheduler="DDIM"), "flow"),
    ],
)
def test_refusals(load: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load("qwenimage21")[1](**CALL | changes)


def test_what_has_no_effect_is_said(load: Any) -> None:
    ours = load("qwenimage21")[1]
    with pytest.warns(UserWarning, match=r"true_cfg_scale=3\.0 has no effect without"):
        ours(**CALL, true_cfg_scale=3.0)
    with pytest.warns(UserWarning, match="negative prompt has no effect"):
        ours(**CALL, negative_prompt="sun")
