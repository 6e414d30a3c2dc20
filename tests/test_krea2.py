"""Krea 2: its network, and what its calls refuse."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import autopipeline as ap
import language
import tiny

CALL = dict(prompt="cat", height=32, width=32, num_inference_steps=2, max_sequence_length=30, output_type="np")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_key_value_heads=4, num_attention_heads=4, norm_eps=1e-3, rope_theta=50.0, timestep_embed_dim=14),
        dict(num_text_layers=3, num_layerwise_text_blocks=0, text_num_key_value_heads=1, axes_dims_rope=(4, 2, 2)),
    ],
)
@torch.no_grad()
def test_network(changes: dict[str, Any]) -> None:
    config = language.KREA2 | changes
    peer = tiny.redraw(diffusers.Krea2Transformer2DModel(**config), 1)
    ours = ap.Krea2Transformer2DModel(**config)
    ours.load_state_dict(peer.state_dict())
    x, states, t = drawn(2, 6, 16), drawn(2, 5, config["num_text_layers"], 24, seed=1), torch.tensor([0.3, 0.71])
    mask = torch.arange(5)[None] < torch.tensor([[2], [5]])
    places = torch.cat([torch.zeros(5, 3), torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0))])
    expected = peer(x, states, t, places, encoder_attention_mask=mask).sample
    table = ours.rotary(places).expand(2, -1, -1, -1)
    assert torch.allclose(ours(x, t, ours.fuse(states, mask), table, mask), expected, atol=1e-4)


def test_published_sizes_have_the_peers_keys_and_shapes() -> None:
    with torch.device("meta"):
        pair = diffusers.Krea2Transformer2DModel(), ap.Krea2Transformer2DModel()
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in pair]
    assert shapes[0] == shapes[1]


def test_heads_that_do_not_fit_the_places_are_refused() -> None:
    with pytest.raises(ValueError, match="add up"):
        ap.Krea2Transformer2DModel(**language.KREA2 | dict(axes_dims_rope=(2, 2, 2)))


def test_sizes_are_rounded_up_aloud(checkpoint: Any) -> None:
    pipe = ap.Krea2Pipeline.from_pretrained(checkpoint("krea2"))
    with pytest.warns(UserWarning, match="height=33 is no multiple of 8 pixels; 40 are made"):
        assert pipe(**CALL | dict(height=33)).images.shape == (1, 40, 32, 3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(prompt=None, prompt_embeds=drawn(1, 9, 2, 24)), "need each other"),
        (dict(prompt=None, prompt_embeds=drawn(1, 9, 24), prompt_embeds_mask=drawn(1, 9)), "tokens, layers, width"),
        (dict(negative_prompt_embeds=drawn(1, 9, 2, 24), negative_prompt_embeds_mask=drawn(1, 8)), r"\(1, 9\)"),
        (dict(max_sequence_length=5), "more than 5"),
        (dict(scheduler="DDIM"), "flow"),
        (dict(latents=drawn(1, 4, 8)), "latents"),
    ],
)
def test_refusals(checkpoint: Any, changes: dict[str, Any], says: str) -> None:
    pipe = ap.Krea2Pipeline.from_pretrained(checkpoint("krea2"))
    with pytest.raises(ValueError, match=says):
        pipe(**CALL | changes)


def test_an_autoencoder_that_does_not_fit_is_named(checkpoint: Any) -> None:
    pipe = ap.Krea2Pipeline.from_pretrained(checkpoint("krea2"))
    other = ap.Krea2Pipeline(**pipe.components, text_encoder_select_layers=(0, 2), patch_size=1)
    with pytest.raises(ValueError, match="takes 16 channels"):
        other(**CALL)
