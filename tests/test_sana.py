"""Sana: its networks and tokenizer, PAG, sizes and refusals, beside what the common tests try."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import autopipeline as ap
import tiny
from autopipeline import CheckpointError
from autopipeline.families import bins
from autopipeline.text import GemmaTokenizer

transformers = pytest.importorskip("transformers")

# Configurations of published networks: 1.0, 1.5, the 0.6 billion one; the autoencoder of all.
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("SanaTransformer2DModel", {}),
    ("SanaTransformer2DModel", dict(num_layers=60, qk_norm="rms_norm_across_heads", timestep_scale=0.001)),
    (
        "SanaTransformer2DModel",
        dict(num_attention_heads=36, num_layers=28, num_cross_attention_heads=16, cross_attention_head_dim=72)
        | dict(cross_attention_dim=1152, interpolation_scale=1.0),
    ),
    (
        "AutoencoderDC",
        dict(encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, downsample_block_type="Conv")
        | dict(decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, upsample_block_type="interpolate"),
    ),
]
TRANSFORMERS: list[dict[str, Any]] = [
    {},
    dict(qk_norm="rms_norm_across_heads", attention_bias=True),
    dict(qk_norm="layer_norm_across_heads", interpolation_scale=1),
    dict(patch_size=2, out_channels=8, interpolation_scale=1.5, norm_elementwise_affine=True, mlp_ratio=3.0),
]
AUTOENCODERS: list[dict[str, Any]] = [
    {},
    dict(encoder_layers_per_block=(0, 1, 2), decoder_layers_per_block=(0, 2, 1)),
    dict(downsample_block_type="Conv", upsample_block_type="interpolate", encoder_qkv_multiscales=((), (), (3, 5))),
    dict(
        decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"),
        decoder_act_fns=("relu", "gelu", "silu"),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
    ),
]
CALL = dict(prompt="a red cat", height=32, width=32, max_sequence_length=16, num_inference_steps=4, output_type="np")
PLAIN = CALL | dict(use_resolution_binning=False, complex_human_instruction=None)


def twin(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    """The peer's network with random weights, and ours with the same."""
    peer = tiny.redraw(getattr(diffusers, name)(**config), 1)
    ours = getattr(ap, name)(**config)
    ours.load_state_dict(peer.state_dict())
    return peer, ours.eval()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(("name", "config"), PUBLISHED)
def test_keys_and_shapes_of_published_networks(name: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        peer, ours = (getattr(lib, name)(**config).state_dict() for lib in (diffusers, ap))
    assert {key: each.shape for key, each in ours.items()} == {key: each.shape for key, each in peer.items()}


@torch.no_grad()
@pytest.mark.parametrize("changes", TRANSFORMERS, ids=str)
def test_transformer(changes: dict[str, Any]) -> None:
    peer, ours = twin("SanaTransformer2DModel", tiny.SANA | changes)
    x, t, text = normal(2, 4, 12, 18), torch.tensor([700.0, 20.0]), normal(2, 7, 24)
    mask = torch.tensor([[1] * 4 + [0] * 3, [1] * 7])
    expected = peer(x, text, t, encoder_attention_mask=mask).sample
    actual = ours(x, t, encoder_hidden_states=text, encoder_attention_mask=mask)
    assert torch.allclose(actual, expected, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", AUTOENCODERS, ids=str)
def test_autoencoder(changes: dict[str, Any]) -> None:
    peer, ours = twin("AutoencoderDC", tiny.DC_VAE | changes)
    x, z = normal(2, 3, 24, 16), normal(2, 4, 6, 1)
    assert torch.allclose(ours.encode(x).mode(), peer.encode(x).latent, atol=2e-5)
    assert ours.encode(x).std is None
    assert torch.allclose(ours.decode(z), peer.decode(z).sample, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(attn_logit_softcapping=None, attention_bias=True)], ids=str)
def test_gemma(changes: dict[str, Any], tmp_path: Path) -> None:
    peer = tiny.gemma2(3, **changes)
    peer.save_pretrained(tmp_path)
    ours = ap.Gemma2Model.from_pretrained(tmp_path)
    ids, mask = torch.arange(30).reshape(2, 15) + 1, torch.ones(2, 15, dtype=torch.long)
    mask[0, 9:] = 0
    assert torch.allclose(ours(ids, mask), peer(ids, attention_mask=mask).last_hidden_state, atol=2e-5)


def test_gemma_with_a_head(tmp_path: Path) -> None:
    peer = tiny.gemma2(3)
    head = transformers.Gemma2ForCausalLM(peer.config)
    head.model.load_state_dict(peer.state_dict())
    head.save_pretrained(tmp_path)
    ours = ap.Gemma2Model.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(each, ours[key]) for key, each in peer.state_dict().items())


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        ("SanaTransformer2DModel", dict(guidance_embeds=True), "guidance_embeds"),
        ("SanaTransformer2DModel", dict(qk_norm="l2"), "qk_norm='l2'"),
        ("AutoencoderDC", dict(decoder_norm_types="group_norm"), "'group_norm'"),
        ("AutoencoderDC", dict(encoder_block_types="Wide"), "'Wide'"),
        ("Gemma2Model", dict(hidden_activation="relu"), "hidden_activation='relu'"),
        ("Gemma2Model", dict(rope_parameters=dict(rope_type="yarn")), "rope_type='yarn'"),
    ],
)
def test_other_networks_are_refused(cls: str, config: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(CheckpointError, match=message):
        getattr(ap, cls)(**config)


@pytest.mark.parametrize("begins", [True, False])
def test_tokenizer(begins: bool, tmp_path: Path) -> None:
    peer = tiny.gemma_tokenizer(add_bos_token=begins)
    peer.save_pretrained(tmp_path)
    peer.padding_side = "right"  # as the pipeline has it
    ours = GemmaTokenizer.from_pretrained(tmp_path)
    for text in ("", "a red cat", " two  spaces\n", "é ü 日本 <bos> <pad> x", "x" * 30):
        for length in (5, 40):
            ids = ours([text], length)
            kept = peer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            assert torch.equal(ids, kept.input_ids), text
            assert torch.equal(ours.mask(ids), kept.attention_mask), text
        assert ours.count(text) == len(peer.encode(text))
    assert ours.cut("a red cat", 2 + begins) == "cat"
    assert ours.cut("a red cat", 40) == ""


def test_tokenizers_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer.json"):
        GemmaTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match="is damaged"):
        GemmaTokenizer.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def load(checkpoint: Callable[[str], Path]) -> Any:
    def get(lib: Any, name: str = "sana", **options: Any) -> Any:
        pipe = lib.AutoPipelineForText2Image.from_pretrained(checkpoint(name), **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return get


@pytest.mark.parametrize(
    ("name", "layers", "changes"),
    [
        ("sana", None, dict(negative_prompt="sun", num_images_per_prompt=2)),
        ("sana", ["blocks.(0|2)"], dict(guidance_scale=1.0, pag_adaptive_scale=0.002)),
        ("sana-1.5", None, {}),  # without the network's timestep_scale, and without norms where it perturbs
    ],
)
def test_pag_gives_the_pictures_of_the_peer(load: Any, name: str, layers: Any, changes: dict[str, Any]) -> None:
    options = dict(enable_pag=True) | ({"pag_applied_layers": layers} if layers else {})
    peer, ours = (load(lib, name, **options) for lib in (diffusers, ap))
    assert type(ours).__name__ == type(peer).__name__ == "SanaPAGPipeline"
    expected, actual = (
        pipe(**PLAIN | changes, generator=torch.Generator().manual_seed(3)).images for pipe in (peer, ours)
    )
    assert np.abs(actual - expected).max() <= 2e-3
    weaker = ours(**PLAIN | changes | dict(pag_scale=0.0), generator=torch.Generator().manual_seed(3)).images
    assert np.abs(actual - weaker).max() > 0.005


def test_several_pictures_of_several_prompts_by_seed_are_those_alone(load: Any) -> None:
    pipe = load(ap)
    call = PLAIN | dict(num_images_per_prompt=2)
    both = pipe(**call | dict(prompt=["cat", "a red cat, sun"]), seed=7).images
    alone = pipe(**call | dict(prompt="a red cat, sun"), seed=9).images
    assert np.allclose(both[2:], alone, atol=2e-4)


def test_sizes_of_the_largest_networks() -> None:
    from diffusers.image_processor import PixArtImageProcessor
    from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

    for height, width in ((4096, 4096), (900, 3000), (5000, 1300), (2000, 2010), (8000, 2048), (1234, 4321)):
        expected = PixArtImageProcessor.classify_height_width_bin(height, width, ASPECT_RATIO_4096_BIN)
        assert bins.nearest(4096, height, width) == expected


EMBEDS = dict(prompt=None, prompt_embeds=normal(1, 9, 24), prompt_attention_mask=torch.ones(1, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_resolution_binning=False, width=33), "width=33 is not a positive multiple of 4"),
        (dict(complex_human_instruction="Paint: "), "has to be a list of strings, not str"),
        (EMBEDS | dict(prompt_attention_mask=None), "need each other"),
        (EMBEDS | dict(negative_prompt_embeds=normal(1, 8, 24)), "differ in shape|need each other"),
        (dict(strength=0.5), "strength"),
        (dict(attention_kwargs=dict(scale=0.5)), "none is loaded"),
        (dict(timesteps=[900, 500]), "contradict"),
        (dict(scheduler="Euler a"), "does not fit"),
        (dict(guidance=2.0), "did you mean 'guidance_scale'"),
    ],
)
def test_what_cannot_work_is_said(load: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        load(ap)(**PLAIN | changes)


def test_without_a_text_encoder_embeddings_will_do(load: Any) -> None:
    pipe = load(ap, text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="no text_encoder"):
        pipe(**PLAIN)
    beside = dict(negative_prompt_embeds=normal(1, 9, 24) / 2, negative_prompt_attention_mask=torch.ones(1, 9))
    assert np.isfinite(pipe(**PLAIN | EMBEDS | beside).images).all()
