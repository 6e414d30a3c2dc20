"""Ideogram 4's network, its two ways to guide, and what its calls refuse."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import patched
import tiny
from autopipeline.stage import Random, Run

SMALL = dict(prompt="a red cat", num_inference_steps=3, height=32, width=32, max_sequence_length=64)
CONSTANT = dict(guidance_scale=3.0, guidance_schedule=None)


@pytest.fixture(scope="module")
def pipe(checkpoint: Any) -> Any:
    made = ap.DiffusionPipeline.from_pretrained(checkpoint("ideogram4"))
    made.set_progress_bar_config(disable=True)
    return made


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, dict(num_layers=1, attention_head_dim=10, mrope_section=(3, 1, 1))])
@pytest.mark.parametrize("tokens", [0, 5])
@torch.no_grad()
def test_network(changes: dict[str, Any], tokens: int) -> None:
    peer = tiny.redraw(diffusers.Ideogram4Transformer2DModel(**patched.IDEOGRAM4 | changes), 1)
    ours = ap.Ideogram4Transformer2DModel(**patched.IDEOGRAM4 | changes)
    ours.load_state_dict(peer.state_dict())
    x, text, t = drawn(2, 12, 16), drawn(2, tokens, 104, seed=1), torch.tensor([0.3, 0.71])
    places = torch.arange(tokens + 12)[:, None] * torch.tensor([0, 2, 1]) + 65536
    role = torch.tensor([3] * tokens + [2] * 12).expand(2, -1)
    wide = torch.nn.functional.pad(text, (0, 0, 0, 12))
    expected = peer(
        torch.nn.functional.pad(x, (0, 0, tokens, 0)), t, wide, places.expand(2, -1, -1), torch.ones_like(role), role
    ).sample[:, tokens:]
    assert torch.allclose(ours(x, t, text, ours.rotary(places).expand(2, -1, -1, -1)), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["Ideogram4Transformer2DModel", "Ideogram4PromptEnhancerHead"])
def test_published_sizes_have_the_peers_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        peer, ours = (getattr(lib, name)() for lib in (diffusers, ap))
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in (peer, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(guidance_scale=3.0), "either guidance_scale"),
        (dict(guidance_schedule=None), "either guidance_scale"),
        ({}, "48 entries for 3 steps"),
        (CONSTANT | dict(prompt_upsampling=True), "prompt_upsampling is not supported"),
        (CONSTANT | dict(prompt_upsampling_temperature=0.5), "no effect without prompt_upsampling"),
        (CONSTANT | dict(height=30), "multiple of 8"),
        (CONSTANT | dict(max_sequence_length=5), "max_sequence_length=5"),
        (CONSTANT | dict(scheduler="DDIM"), "flow"),
        (CONSTANT | dict(prompt=None), "prompt is needed"),
    ],
)
def test_refusals(pipe: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pipe(**SMALL | changes)


def test_a_schedule_of_one_scale_is_that_scale(pipe: Any) -> None:
    call = SMALL | dict(output_type="np", seed=3)
    constant = pipe(**call, **CONSTANT).images
    assert np.array_equal(pipe(**call, guidance_schedule=[3.0] * 3).images, constant)
    assert np.abs(pipe(**call, guidance_schedule=[1.0, 3.0, 3.0]).images - constant).max() > 0.01
    begun = call | dict(image=tiny.photo(), strength=0.5, num_inference_steps=4)  # makes the last two steps
    assert np.array_equal(
        pipe(**begun, guidance_schedule=[9.0, 9.0, 3.0, 3.0]).images, pipe(**begun, **CONSTANT).images
    )


def test_sizes_follow_the_picture_and_a_black_mask_keeps_it(pipe: Any) -> None:
    call = dict(prompt="cat", num_inference_steps=2, image=tiny.photo(77, 45), **CONSTANT)
    assert pipe(**call).images[0].size == (72, 40)
    black = tiny.mask(77, 45).point(lambda _: 0)
    first, second = (torch.Generator().manual_seed(1) for _ in range(2))
    kept = pipe(**call, mask_image=black, output_type="latent", generator=first).images
    run = Run(dict(height=40, width=72), {}, 1, 1, Random(second, 1))
    space = pipe.family.stages(pipe.components, run)[0].space
    with torch.no_grad():
        original = space.encode(space.pixels(run, call["image"]), run.random)
    assert torch.allclose(kept, original, atol=1e-5)
