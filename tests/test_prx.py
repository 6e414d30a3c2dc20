"""PRX: its networks, how prompts are cleaned, its sizes, and what its calls refuse."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.prx import pipeline_prx

import autopipeline as ap
import language
import tiny
from autopipeline.families import bins, prx

CALL = dict(prompt="cat", height=32, width=32, num_inference_steps=2, use_resolution_binning=False, output_type="np")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [{}, dict(patch_size=1, theta=50), dict(bottleneck_size=7, resolution_embeds=True, time_max_period=100)],
)
@torch.no_grad()
def test_network(changes: dict[str, Any]) -> None:
    peer = tiny.redraw(diffusers.PRXTransformer2DModel(**language.PRX | changes), 1)
    ours = ap.PRXTransformer2DModel(**language.PRX | changes)
    ours.load_state_dict(peer.state_dict())
    x, text, t = drawn(2, 4, 6, 10), drawn(2, 5, 24, seed=1), torch.tensor([0.3, 0.71])
    table = ours.rotary(6, 10).expand(2, -1, -1, -1)
    for mask in (None, torch.arange(5)[None] < torch.tensor([[2], [4]])):
        expected = peer(x, t, text, attention_mask=mask).sample
        assert torch.allclose(ours(x, t, text, table, attention_mask=mask), expected, atol=1e-4)


@torch.no_grad()
def test_text_encoder(tmp_path: Any) -> None:
    peer = language.t5gemma(3)
    peer.save_pretrained(tmp_path)
    peer.config = peer.config.encoder  # what it computes by
    ids = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12)[None] < torch.tensor([[5], [12]])).long()
    expected = peer(input_ids=ids, attention_mask=mask).last_hidden_state[mask > 0]
    ours = ap.T5GemmaEncoder.from_pretrained(tmp_path)
    assert torch.allclose(ours(ids, mask)[mask > 0], expected, atol=1e-5)
    flat = ap.T5GemmaEncoder(**language.GEMMA | dict(rope_theta=10000.0))
    flat.load_state_dict(ours.state_dict())
    assert torch.equal(flat(ids, mask), ours(ids, mask))
    with pytest.raises(ap.CheckpointError, match="activation"):
        ap.T5GemmaEncoder(**language.GEMMA | dict(hidden_activation="silu"))


def test_published_sizes_have_the_peers_keys_and_shapes() -> None:
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaConfig, T5GemmaEncoder

    with torch.device("meta"):
        pairs = [
            (diffusers.PRXTransformer2DModel(), ap.PRXTransformer2DModel()),
            (T5GemmaEncoder(T5GemmaConfig().encoder), ap.T5GemmaEncoder()),
        ]
    for pair in pairs:
        shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in pair]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_sizes(side: int) -> None:
    table = pipeline_prx.ASPECT_RATIO_BINS[side]
    for height, width in [(h, w) for h in range(100, 1500, 37) for w in (100, 333, 512, 1000)]:
        expected = diffusers.image_processor.PixArtImageProcessor.classify_height_width_bin(height, width, table)
        assert bins.closest(prx.SIZES[side], height, width) == expected


@pytest.mark.parametrize("plainly", [False, True])
def test_cleaning(plainly: bool) -> None:
    pytest.importorskip("ftfy")
    peer = pipeline_prx.TextPreprocessor()
    texts = ["A <Person> Cat, at https://a.com/b & 12x34 (free shipping)", "x_y-z_a-b 'q' jc6640 @me", " &amp;lt; sÃ© "]
    expected = [(peer.basic_clean if plainly else peer.clean_text)(text) for text in texts]
    assert prx.written(texts, plainly) == expected


def test_several_guided_pictures_are_those_alone(checkpoint: Any) -> None:
    pipe = ap.PRXPipeline.from_pretrained(checkpoint("prx"))
    pipe.set_progress_bar_config(disable=True)
    texts = ["a red cat", "sun"]
    together = pipe(**CALL | dict(prompt=texts, num_images_per_prompt=2, seed=[0, 1, 2, 3])).images
    alone = [pipe(**CALL | dict(prompt=texts[k // 2], seed=k)).images[0] for k in range(4)]
    assert np.abs(together - np.stack(alone)).max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(height=36), "height=36 is not a positive multiple of 8"),
        (dict(prompt_attention_mask=drawn(1, 9)), "beside prompt_embeds"),
        (
            dict(prompt=None, prompt_embeds=drawn(1, 9, 24), prompt_attention_mask=drawn(1, 9))
            | dict(negative_prompt_embeds=drawn(1, 9, 24)),
            "both embeddings",
        ),
        (dict(negative_prompt_embeds=drawn(1, 9, 24), negative_prompt_attention_mask=drawn(1, 9)), "9 and 40 tokens"),
        (dict(scheduler="DDIM"), "flow"),
        (dict(tokenizer_max_length=0), "tokenizer_max_length"),
    ],
)
def test_refusals(checkpoint: Any, changes: dict[str, Any], says: str) -> None:
    pipe = ap.PRXPipeline.from_pretrained(checkpoint("prx"))
    with pytest.raises(ValueError, match=says):
        pipe(**CALL | changes)


def test_without_an_autoencoder_there_are_latents(checkpoint: Any, tmp_path: Any) -> None:
    whole = ap.PRXPipeline.from_pretrained(checkpoint("prx"))
    pipe = ap.PRXPipeline(**{**whole.components, "vae": None}, default_sample_size=48)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(**CALL | dict(output_type="latent", height=None, width=None)).images
    assert latents.shape == (1, 4, 6, 6)
    with pytest.raises(ValueError, match="no vae"):
        pipe(**CALL)
    with pytest.raises(ValueError, match="no list of sizes for networks of 48"):
        pipe(**CALL | dict(output_type="latent", use_resolution_binning=True))
