"""CogView's networks and what is particular about their calls, beside what the common tests try."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import tiny

NAMES = ["CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"]
CALL = dict(prompt="a red cat", height=32, width=32, num_inference_steps=2, max_sequence_length=16, output_type="np")
LONG = "a red " + "cat " * 12  # needs 32 tokens where a short text needs 16


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, dict(patch_size=1, in_channels=6, out_channels=5, attention_head_dim=16)])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_network(name: str, changes: dict[str, Any]) -> None:
    axes = dict(rope_axes_dim=(40, 24)) if "4" in name else {}
    peer = tiny.redraw(getattr(diffusers, name)(**tiny.COGVIEW | axes | changes), 1)
    ours = getattr(ap, name)(**tiny.COGVIEW | axes | changes)
    ours.load_state_dict(peer.state_dict())
    text, t = drawn(2, 7, 24, seed=1), torch.tensor([300.0, 712.0])
    numbers = torch.tensor([[40.0, 60, 3, 1, 32, 48]]).expand(2, -1)
    told = {key: numbers[:, at : at + 2] for key, at in (("original_size", 0), ("crop_coords", 2), ("target_size", 4))}
    for height, width in ((8, 10), (12, 6)):
        x = drawn(2, changes.get("in_channels", 4), height, width)
        theirs = peer(x, encoder_hidden_states=text, timestep=t, **told).sample
        places = ours.places(height, width).expand(2, *[-1] * (3 - ("3" in name)))
        own = ours(x, t, encoder_hidden_states=text, sizes=ours.sizes(numbers), places=places)
        assert torch.allclose(own, theirs, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes_have_the_peers_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        networks = [getattr(lib, name)(num_layers=3, attention_head_dim=128) for lib in (diffusers, ap)]
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in networks]
    assert shapes[0] == shapes[1]


def test_places_have_an_end() -> None:
    network = ap.CogView3PlusTransformer2DModel(**tiny.COGVIEW)
    with pytest.raises(ValueError, match="13 x 13 patches; the picture has 14 x 2"):
        network.places(28, 4)


@pytest.fixture(scope="module")
def load(checkpoint: Any) -> Any:
    return lambda name, cls: getattr(ap, cls).from_pretrained(checkpoint(name))


def test_given_negative_embeddings_count(load: Any) -> None:
    """The peer puts zeros in their place."""
    pipe = load("cogview3", "CogView3PlusPipeline")
    given = CALL | dict(prompt=None, prompt_embeds=drawn(1, 16, 24), seed=1)
    zeros, other = (
        pipe(**given, negative_prompt_embeds=rows).images for rows in (torch.zeros(1, 16, 24), drawn(1, 16, 24, seed=2))
    )
    assert np.array_equal(zeros, pipe(**given).images)
    assert np.abs(zeros - other).max() > 0.01


def test_texts_of_several_lengths_with_seeds_are_padded_each_by_itself(load: Any) -> None:
    pipe, call = load("cogview4", "CogView4Pipeline"), CALL | dict(max_sequence_length=40)
    both = pipe(**call | dict(prompt=["sun", LONG], negative_prompt=["sea", "a"]), seed=[3, 4]).images
    alone = [
        pipe(**call | dict(prompt=text, negative_prompt=no), seed=seed).images
        for text, no, seed in (("sun", "sea", 3), (LONG, "a", 4))
    ]
    assert np.allclose(both, np.concatenate(alone), atol=2e-4)


def test_callbacks_see_and_change_each_branch(checkpoint: Any) -> None:
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    call = CALL | dict(negative_prompt="sea", num_inference_steps=3, callback_on_step_end_tensor_inputs=names)
    results: list[list[np.ndarray]] = []
    for library in (diffusers, ap):
        pipe = library.CogView4Pipeline.from_pretrained(checkpoint("cogview4"))
        pipe.set_progress_bar_config(disable=True)
        pictures: list[np.ndarray] = []
        for changed in names:

            def change(pipe: Any, step: int, t: Any, tensors: dict[str, Any], name: str = changed) -> dict[str, Any]:
                shapes = {key: tuple(value.shape) for key, value in tensors.items()}
                assert shapes == dict.fromkeys(names[1:], (1, 16, 24)) | dict(latents=(1, 4, 8, 8))
                return {name: tensors[name] * 1.5 + 0.3}

            random = torch.Generator().manual_seed(3)
            pictures.append(pipe(**call, generator=random, callback_on_step_end=change).images)
        results.append(pictures)
    assert np.allclose(*results, atol=1e-4)
    assert np.abs(results[0][1] - results[0][2]).max() > 5e-3


def test_control(checkpoint: Any) -> None:
    """The peer draws from the global random numbers, so it is given latents without doubt."""
    ours = ap.CogView4ControlPipeline.from_pretrained(checkpoint("cogview4-control"))
    peer = diffusers.CogView4ControlPipeline.from_pretrained(checkpoint("cogview4-control"))
    peer.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for network in (peer.vae, ours.vae):
            network.quant_conv.weight[4:] = 0
            network.quant_conv.bias[4:] = -30
    call = CALL | dict(control_image=tiny.photo(50, 40), num_images_per_prompt=2, negative_prompt="sea", width=48)
    theirs, own = (pipe(**call, generator=torch.Generator().manual_seed(3)).images for pipe in (peer, ours))
    assert np.allclose(own, theirs, atol=1e-4)
    with pytest.raises(ValueError, match="needs control_image"):
        ours(**CALL)
    plain = ap.CogView4Transformer2DModel(**tiny.COGVIEW)
    with pytest.raises(ValueError, match="takes 4 channels"):
        ap.CogView4ControlPipeline(**ours.components | dict(transformer=plain))(**call)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("3Plus", dict(height=36), "height=36 is not a positive multiple of 8"),
        ("3Plus", dict(negative_prompt_embeds=drawn(1, 9, 24)), "has 9 tokens and the prompt 16"),
        ("3Plus", dict(timesteps=[900, 20]), "takes no own timesteps"),
        ("3Plus", dict(eta=0.5), "eta=0.5 has no effect"),
        ("4", dict(width=36), "width=36 is not a positive multiple of 8"),
        ("4", dict(scheduler="DDIM"), "flow"),
        ("4", dict(scheduler="FlowMatchHeunDiscreteScheduler"), "takes no own sigmas"),
        ("4", dict(timesteps=[900, 20], sigmas=[0.5]), "equal lengths"),
        ("4", dict(attention_kwargs={"scale": 0.5}), "none is loaded"),
        ("4", dict(original_size=(1, 2, 3)), "a pair of numbers"),
    ],
)
def test_refusals(load: Any, name: str, changes: dict[str, Any], says: str) -> None:
    pipe = load(f"cogview{name[0]}", f"CogView{name}Pipeline")
    with pytest.raises(ValueError, match=says):
        pipe(**CALL | changes)


def test_what_is_cut_is_shown(load: Any) -> None:
    pipe = load("cogview4", "CogView4Pipeline")
    with pytest.warns(UserWarning, match="4 tokens.*'cat'"):
        pipe(**CALL | dict(max_sequence_length=4))
