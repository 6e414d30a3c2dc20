"""Z-Image-Omni: the peer's pictures with and without pictures in sight, and what its calls refuse."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import language
import tiny

CALL: dict[str, Any] = dict(prompt="a red cat", num_inference_steps=3, output_type="np", max_sequence_length=64)
SIZE = dict(height=32, width=48)
PICTURES = [tiny.photo(72, 64), tiny.photo(100, 70, seed=3)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(checkpoint: Any) -> Any:
    """The peer, which encodes pictures in bfloat16 whatever its autoencoder is, and ours."""
    folder = checkpoint("omni")
    loaded = [getattr(lib, "AutoPipelineForText2Image").from_pretrained(folder) for lib in (diffusers, ap)]  # noqa: B009
    for pipe in loaded:
        pipe.set_progress_bar_config(disable=True)
    prepare = loaded[0].image_processor.preprocess
    loaded[0].image_processor.preprocess = lambda *args, **options: prepare(*args, **options).as_subclass(Exact)
    return loaded


class Exact(torch.Tensor):
    """Numbers that are not rounded."""

    def bfloat16(self) -> torch.Tensor:  # type: ignore[override]
        return self


@pytest.mark.parametrize(
    "changes",
    [
        SIZE,
        SIZE | dict(negative_prompt="sun", num_images_per_prompt=2),
        SIZE | dict(prompt=["a red cat", "sun"], guidance_scale=0.0),
        SIZE | dict(image=PICTURES[:1]),
        dict(image=PICTURES, negative_prompt="the sun and the sea", num_images_per_prompt=2),
        dict(image=PICTURES, guidance_scale=0.0, width=40),
        SIZE | dict(image=PICTURES[1], prompt=["a red cat on the sea", "sun"], cfg_truncation=0.5),
        SIZE | dict(image=PICTURES[:1], cfg_normalization=0.9, output_type="latent", latents=(1, 4, 8, 12)),
        SIZE | dict(prompt=None, prompt_embeds=3, negative_prompt_embeds=3, image=PICTURES[:1]),
        SIZE | dict(prompt=None, prompt_embeds=1, negative_prompt_embeds=1),
    ],
)
def test_same_picture_as_the_peer(pair: Any, changes: dict[str, Any]) -> None:
    made: list[Any] = []
    for pipe in pair:
        call = CALL | changes
        call["prompt"] = list(call["prompt"]) if isinstance(call["prompt"], list) else call["prompt"]
        for k, name in enumerate(("prompt_embeds", "negative_prompt_embeds")):
            if name in call:  # so many pieces
                call[name] = [[drawn(7 + 30 * j, 24, seed=j + 5 * k) for j in range(call[name])]]
        if "latents" in call:
            call["latents"] = drawn(*call["latents"])
        made.append(np.asarray(pipe(**call, generator=torch.Generator().manual_seed(1)).images))
    assert made[0].shape == made[1].shape
    assert np.abs(made[0] - made[1]).max() <= 2e-3 * max(1, np.abs(made[0]).max())
    assert made[0].std() > 0.01


def test_large_pictures_are_scaled(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from autopipeline.families import flux2, z_image_omni

    monkeypatch.setattr(flux2, "LARGEST", 80 * 80)
    assert z_image_omni.shown(tiny.photo(120, 90), None).size == (92, 69)
    assert z_image_omni.shown(tiny.photo(120, 90), 200 * 100).size == (163, 122)
    assert z_image_omni.shown(tiny.photo(70, 65), 200 * 100).size == (70, 65)
    array = np.asarray(tiny.photo(70, 65))
    assert np.array_equal(np.asarray(z_image_omni.shown(array, None)), array)


def test_seeds_of_several_prompts(pair: Any) -> None:
    ours, texts = pair[1], ["a red cat on the sea", "sun"]
    both = ours(**CALL | SIZE | dict(prompt=texts, image=PICTURES[:1]), seed=[1, 2]).images
    for k, text in enumerate(texts):
        alone = ours(**CALL | SIZE | dict(prompt=text, image=PICTURES[:1]), seed=k + 1).images
        assert np.abs(both[k] - alone[0]).max() < 1e-4


def test_published_sizes_have_the_peers_keys_and_shapes() -> None:
    with torch.device("meta"):
        pair = (
            diffusers.ZImageTransformer2DModel(siglip_feat_dim=1152),
            ap.ZImageTransformer2DModel(siglip_feat_dim=1152),
        )
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in pair]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(image=tiny.photo(32, 32)), "both sides have to be 64 at least"),
        (dict(image=PICTURES[:1], prompt=None, prompt_embeds=[[drawn(3, 24)]]), "in 3 pieces"),
        (dict(prompt=None, prompt_embeds=[[drawn(3, 24)] * 3]), "in 1 pieces"),
        (dict(image=PICTURES[:1], prompt=None, prompt_embeds=[drawn(3, 24)]), "in 3 pieces"),
        (dict(image=[]), "empty"),
        (dict(height=36), "multiple of 8"),
        (dict(callback_on_step_end_tensor_inputs=["prompt_embeds"]), "may name latents, not 'prompt_embeds'"),
    ],
)
def test_refusals(pair: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pair[1](**CALL | SIZE | changes)


def test_what_pictures_need(pair: Any, checkpoint: Any) -> None:
    blind = ap.ZImageOmniPipeline.from_pipe(pair[1], siglip=None)
    with pytest.raises(ValueError, match="no siglip with a siglip_processor"):
        blind(**CALL | SIZE, image=PICTURES)
    assert blind(**CALL | SIZE).images.shape == (1, 32, 48, 3)
    network = ap.ZImageTransformer2DModel(**language.Z_IMAGE)
    with pytest.raises(ValueError, match="looks at no pictures"):
        ap.ZImageOmniPipeline.from_pipe(pair[1], transformer=network)(**CALL | SIZE, image=PICTURES)


def test_models_of_transformers_load_one_at_a_time(checkpoint: Any) -> None:
    """Two at once would leave the tying of weights switched off for whoever makes a model afterwards."""
    for _ in range(5):
        ap.ZImageOmniPipeline.from_pretrained(checkpoint("omni"))
        encoder = tiny.t5_encoder(1)
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
