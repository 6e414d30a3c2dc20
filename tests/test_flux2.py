"""Flux 2's networks, its pictures beside the new one, and what its calls refuse."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import patched
import tiny

SMALL = dict(prompt="a red cat", num_inference_steps=2, max_sequence_length=32, text_encoder_out_layers=(1, 3))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load(checkpoint: Any, name: str) -> Any:
    pipe = ap.DiffusionPipeline.from_pretrained(checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "changes",
    [{}, dict(num_single_layers=0, guidance_embeds=False), dict(in_channels=6, out_channels=10, mlp_ratio=2.3)],
)
@torch.no_grad()
def test_network(changes: dict[str, Any]) -> None:
    peer = tiny.redraw(diffusers.Flux2Transformer2DModel(**patched.FLUX2 | changes), 1)
    ours = ap.Flux2Transformer2DModel(**patched.FLUX2 | changes)
    ours.load_state_dict(peer.state_dict())
    x, text, t = drawn(2, 12, ours.config.in_channels), drawn(2, 5, 48, seed=1), torch.tensor([0.3, 0.71])
    places, guidance = torch.arange(17)[:, None] * torch.tensor([7, 1, 2, 3]), torch.tensor([1.5, 4.0])
    expected = peer(x, text, t, img_ids=places[5:], txt_ids=places[:5], guidance=guidance).sample
    actual = ours(x, t, text, ours.rotary(places).expand(2, -1, -1, -1), guidance=guidance)
    assert torch.allclose(actual, expected, atol=1e-5)


@torch.no_grad()
def test_autoencoder_with_a_smaller_decoder() -> None:
    changes = dict(decoder_block_out_channels=(4, 8, 8), use_quant_conv=False)
    peer = tiny.redraw(diffusers.AutoencoderKLFlux2(**patched.VAE | changes), 1).eval()
    ours = ap.AutoencoderKLFlux2(**patched.VAE | changes).eval()
    ours.load_state_dict(peer.state_dict())
    x, z = drawn(2, 3, 16, 24), drawn(2, 4, 4, 6)
    assert torch.allclose(ours.encode(x).mode(), peer.encode(x).latent_dist.mode(), atol=1e-5)
    assert torch.allclose(ours.decode(z), peer.decode(z).sample, atol=1e-5)


@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "AutoencoderKLFlux2"])
def test_published_sizes_have_the_peers_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        peer, ours = (getattr(lib, name)() for lib in (diffusers, ap))
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in (peer, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(caption_upsample_temperature=0.1), "caption_upsample_temperature is not supported"),
        (dict(text_encoder_out_layers=(1, 4)), "layers from 0 to 3"),
        (dict(text_encoder_out_layers=(1,)), "24 wide, but the transformer takes 48"),
        (dict(prompt=None, prompt_embeds=drawn(1, 9, 24), text_encoder_out_layers=(10, 20, 30)), "24 wide"),
        (dict(prompt=None, prompt_embeds=drawn(1, 9, 48)), "text_encoder_out_layers has no effect"),
        (dict(image=tiny.photo(60, 64)), "64 at most|64 at least"),
        (dict(image=[tiny.photo(), tiny.photo(64, 520)]), "8 times the other"),
        (dict(image=[]), "list of pictures is empty"),
        (dict(latents=drawn(1, 16, 4, 4), height=64, width=64), "this call needs"),
        (dict(scheduler="DDIM"), "flow"),
    ],
)
def test_refusals(checkpoint: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load(checkpoint, "flux2")(**SMALL | changes)


def test_what_has_no_effect_on_klein(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="negative_prompt_embeds has no effect"):
        load(checkpoint, "klein")(
            **SMALL, height=32, width=32, guidance_scale=1.0, negative_prompt_embeds=drawn(1, 5, 48)
        )
    with pytest.warns(UserWarning, match=r"guidance_scale=3.0 has no effect"):
        load(checkpoint, "klein-distilled")(**SMALL, height=32, width=32, guidance_scale=3.0)


def test_sizes_follow_latents_and_pictures(checkpoint: Any) -> None:
    pipe = load(checkpoint, "klein")
    assert pipe(**SMALL, latents=drawn(1, 16, 4, 6)).images[0].size == (48, 32)
    assert pipe(**SMALL, image=[tiny.photo(77, 91), tiny.photo(64, 64)]).images[0].size == (72, 88)
    assert pipe(**SMALL, image=tiny.photo(77, 91), width=32).images[0].size == (32, 88)


def test_every_prompt_sees_all_pictures(checkpoint: Any) -> None:
    pipe = load(checkpoint, "klein")
    call = SMALL | dict(height=32, width=32, output_type="np")
    image = [tiny.photo(), tiny.photo(80, 72, 1)]
    both = pipe(**call | dict(prompt=["cat", "sun"], guidance_scale=[2.0, 4.0]), image=image, seed=[1, 2]).images
    alone = pipe(**call | dict(prompt="sun"), image=image, seed=2).images
    assert np.allclose(both[1:], alone, atol=1e-4)
    one = pipe(**call | dict(prompt="sun"), image=image[:1], seed=2).images
    assert np.abs(one - alone).max() > 0.01
    array = np.stack([np.asarray(image[0]), np.asarray(tiny.photo(64, 64, 1))])
    listed = [tiny.photo(), tiny.photo(64, 64, 1)]
    assert np.allclose(pipe(**call, image=array, seed=2).images, pipe(**call, image=listed, seed=2).images, atol=1e-4)


def test_what_is_cut_is_said(checkpoint: Any) -> None:
    with pytest.warns(UserWarning, match=r"this part is cut: '.*red cat"):
        load(checkpoint, "flux2")(**SMALL | dict(max_sequence_length=8), height=32, width=32)


def test_threads_share_a_tokenizer(checkpoint: Any) -> None:
    """transformers' tokenizers write a call's padding and truncation into themselves."""
    tokenizer = load(checkpoint, "flux2").components["tokenizer"]

    def widths(length: int | None) -> set[int]:
        fixed = {} if length is None else dict(padding="max_length", truncation=True, max_length=length)
        return {len(tokenizer("a red cat " * 9, **fixed).input_ids) for _ in range(300)}

    lengths = [None, 5, None, 70, 9, None]
    serial = [widths(length) for length in lengths]
    with ThreadPoolExecutor(len(lengths)) as pool:
        assert list(pool.map(widths, lengths)) == serial
