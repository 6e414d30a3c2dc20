"""Kandinsky 3: its network, sizes, texts in company, and what its calls refuse."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import tiny

CALL: dict[str, Any] = dict(prompt="cat", height=64, width=64, num_inference_steps=2, output_type="np")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, dict(layers_per_block=3, attention_head_dim=4), dict(groups=2, in_channels=6)])
@torch.no_grad()
def test_network(changes: dict[str, Any]) -> None:
    config = tiny.KANDINSKY3 | changes
    peer = tiny.redraw(diffusers.Kandinsky3UNet(**config), 1)
    ours = ap.Kandinsky3UNet(**config)
    ours.load_state_dict(peer.state_dict())
    x, states, mask = drawn(2, peer.config.in_channels, 16, 8), drawn(2, 5, 24, seed=1), torch.ones(2, 5).long()
    mask[0, 2:] = 0
    expected = peer(x, torch.tensor(310), states, encoder_attention_mask=mask).sample
    heard = ours.hear(states, mask.float(), torch.full((2,), 5))
    assert torch.allclose(ours(x, torch.full((2,), 310), *heard), expected, atol=1e-5)


def test_published_sizes_have_the_peers_keys_and_shapes() -> None:
    with torch.device("meta"):
        pair = diffusers.Kandinsky3UNet(), ap.Kandinsky3UNet()
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in pair]
    assert shapes[0] == shapes[1]


def test_sides_are_rounded_up(checkpoint: Any) -> None:
    pipe = ap.Kandinsky3Pipeline.from_pretrained(checkpoint("kandinsky3"))
    factor = 2 ** (len(pipe.movq.config.block_out_channels) - 1)
    made = pipe(**CALL | dict(height=65, output_type="latent")).images
    assert made.shape == (1, 4, 16, 8)
    assert pipe(**CALL | dict(height=65)).images.shape == (1, 16 * factor, 8 * factor, 3)


def test_padding_of_others_does_not_count_with_seeds(checkpoint: Any) -> None:
    pipe = ap.Kandinsky3Pipeline.from_pretrained(checkpoint("kandinsky3"))
    texts = ["sun", "a red cat on the sea, a sun, a red cat"]
    both = pipe(**CALL | dict(prompt=texts, negative_prompt=["a red cat on the sea", "cat"], seed=[1, 2])).images
    for k, against in enumerate(["a red cat on the sea", "cat"]):
        alone = pipe(**CALL | dict(prompt=texts[k], negative_prompt=against, seed=k + 1)).images
        assert np.abs(both[k] - alone[0]).max() < 5e-4
    drawn = [torch.Generator().manual_seed(k) for k in (1, 2)]
    as_known = pipe(
        **CALL | dict(prompt=texts, negative_prompt=["a red cat on the sea", "cat"], generator=drawn)
    ).images
    assert np.abs(as_known[0] - both[0]).max() > 2e-3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(prompt=None, prompt_embeds=drawn(1, 9, 24)), "need each other"),
        (dict(negative_attention_mask=drawn(1, 9)), "negative_prompt_embeds and negative_attention_mask need"),
        (
            dict(prompt=None, prompt_embeds=drawn(1, 9, 24), attention_mask=drawn(1, 8)),
            r"attention_mask has to be a torch.Tensor of the shape \(1, 9\)",
        ),
        (dict(negative_prompt_embeds=drawn(1, 60, 24), negative_attention_mask=drawn(1, 60)), "60 tokens"),
        (dict(latents=drawn(1, 4, 8, 9)), "latents"),
    ],
)
def test_refusals(checkpoint: Any, changes: dict[str, Any], says: str) -> None:
    pipe = ap.Kandinsky3Pipeline.from_pretrained(checkpoint("kandinsky3"))
    with pytest.raises(ValueError, match=says):
        pipe(**CALL | changes)
