"""Ovis-Image's network, and what its calls refuse."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import autopipeline as ap
import language
import tiny


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, dict(num_single_layers=0), dict(in_channels=6, out_channels=None)])
@torch.no_grad()
def test_network(changes: dict[str, Any]) -> None:
    peer = tiny.redraw(diffusers.OvisImageTransformer2DModel(**language.OVIS | changes), 1)
    ours = ap.OvisImageTransformer2DModel(**language.OVIS | changes)
    ours.load_state_dict(peer.state_dict())
    x, text, t = drawn(2, 12, ours.config.in_channels), drawn(2, 5, 24, seed=1), torch.tensor([0.3, 0.71])
    places = torch.arange(17)[:, None] * torch.tensor([0, 1, 2])
    expected = peer(x, text, t, img_ids=places[5:], txt_ids=places[:5]).sample
    assert torch.allclose(ours(x, t, text, ours.rotary(places).expand(2, -1, -1, -1)), expected, atol=1e-5)


def test_published_sizes_have_the_peers_keys_and_shapes() -> None:
    with torch.device("meta"):
        peer, ours = (lib.OvisImageTransformer2DModel() for lib in (diffusers, ap))
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in (peer, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(max_sequence_length=300), "256 at most"),
        (dict(negative_prompt="sun", negative_prompt_embeds=drawn(1, 9, 24)), "either negative_prompt"),
        (dict(prompt=None), "prompt is needed"),
        (dict(height=3), "8 pixels at least"),
        (dict(scheduler="DDIM"), "flow"),
    ],
)
def test_refusals(checkpoint: Any, changes: dict[str, Any], says: str) -> None:
    pipe = ap.OvisImagePipeline.from_pretrained(checkpoint("ovis"))
    with pytest.raises(ValueError, match=says):
        pipe(**dict(prompt="cat", height=32, width=32, num_inference_steps=1) | changes)


def test_what_is_cut_is_said(checkpoint: Any) -> None:
    pipe = ap.OvisImagePipeline.from_pretrained(checkpoint("ovis"))
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="this part is cut: 'cat<"):
        pipe("a red cat", height=32, width=32, num_inference_steps=1, max_sequence_length=4, guidance_scale=1.0)
