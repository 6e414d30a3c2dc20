"""Lumina-Next and Lumina-Image 2.0: networks, Gemma, texts and refusals, beside what the common tests try."""

from __future__ import annotations

import warnings
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

pytest.importorskip("transformers")

NEXT, IMAGE2 = "LuminaNextDiT2DModel", "Lumina2Transformer2DModel"
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    (NEXT, dict(num_kv_heads=8)),
    (NEXT, dict(hidden_size=768, qk_norm=False, learn_sigma=False, ffn_dim_multiplier=1.3)),
    (IMAGE2, {}),
    (IMAGE2, dict(cap_feat_dim=2304, hidden_size=768, num_attention_heads=12, axes_dim_rope=(16, 24, 24))),
]
CHANGES: list[tuple[str, dict[str, Any]]] = [
    (NEXT, {}),
    (NEXT, dict(qk_norm=False, num_kv_heads=None, patch_size=4, ffn_dim_multiplier=1.3, learn_sigma=False)),
    (IMAGE2, {}),
    (IMAGE2, dict(out_channels=6, num_kv_heads=2, num_refiner_layers=2, ffn_dim_multiplier=0.7, norm_eps=1e-3)),
    (IMAGE2, dict(patch_size=4, num_attention_heads=1, axes_dim_rope=(8, 12, 12))),
]
CALL = dict(prompt="a red cat", num_inference_steps=3, output_type="latent", guidance_scale=4.0)
OWN = {"lumina": dict(clean_caption=False), "lumina2": dict(system_prompt="sun", max_sequence_length=24)}
EMBEDS = dict(prompt=None, prompt_embeds=torch.ones(1, 4, 24))


@pytest.mark.parametrize(("name", "config"), NETWORKS)
def test_keys_and_shapes_of_networks(name: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        peer, ours = (getattr(lib, name)(**config).state_dict() for lib in (diffusers, ap))
    assert {key: each.shape for key, each in ours.items()} == {key: each.shape for key, each in peer.items()}


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes"), CHANGES)
def test_networks(name: str, changes: dict[str, Any]) -> None:
    config = (tiny.LUMINA if name == NEXT else tiny.LUMINA2) | changes
    peer = tiny.redraw(getattr(diffusers, name)(**config), 1)
    ours = getattr(ap, name)(**config)
    ours.load_state_dict(peer.state_dict())
    random = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 4, 8, 12, generator=random), torch.randn(2, 7, 24, generator=random)
    t, mask, patch = torch.tensor([0.2, 0.7]), torch.arange(7) < torch.tensor([[4], [6]]), config.get("patch_size", 2)
    for each in (mask, mask[1:].repeat(2, 1)):
        if name == NEXT:
            size = config["hidden_size"] // config["num_attention_heads"]
            table = diffusers.models.embeddings.get_2d_rotary_pos_embed_lumina(size, 12, 12, 1.3, 1.7)
            options = dict(image_rotary_emb=table, cross_attention_kwargs=dict(base_sequence_length=16))
            expected = peer(x, t, text, each, **options).sample
            sharp = torch.full((2, 1), np.sqrt(np.log(96 / patch**2) / np.log(16)), dtype=torch.float32)
            turns = ours.turns(8 // patch, 12 // patch, linear=1.3, ntk=1.7).expand(2, -1, -1, -1)
            actual = ours(x, t, encoder_hidden_states=text, encoder_mask=each, turns=turns, sharpness=sharp)
        else:
            expected = peer(x, t, text, each).sample
            turns = ours.turns(each, 8 // patch, 12 // patch)
            actual = ours(x, t, encoder_hidden_states=text, encoder_attention_mask=each, turns=turns)
        assert torch.allclose(actual, expected, atol=2e-5 * max(1, float(expected.abs().max())))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(hidden_act="gelu", attention_bias=True, num_key_value_heads=2)], ids=str)
def test_gemma(changes: dict[str, Any], tmp_path: Path) -> None:
    peer = tiny.gemma(3, **changes)
    peer.save_pretrained(tmp_path)
    ours = ap.GemmaModel.from_pretrained(tmp_path)
    ids, mask = torch.arange(30).reshape(2, 15) + 1, torch.ones(2, 15, dtype=torch.long)
    mask[0, 9:] = 0
    states = peer(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert torch.allclose(ours(ids, mask), states[-1], atol=2e-5)
    assert torch.allclose(ours(ids, mask, skip=1), states[-2], atol=2e-5)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (NEXT, dict(hidden_size=30, num_attention_heads=5), "Heads of 6 channels"),
        (IMAGE2, dict(axes_dim_rope=(4, 6, 8)), "axes_dim_rope"),
        ("GemmaModel", dict(hidden_act="relu"), "hidden_act='relu'"),
        ("GemmaModel", dict(rope_parameters=dict(rope_type="yarn")), "rope_type='yarn'"),
        ("GemmaModel", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
    ],
)
def test_networks_that_are_not_supported(name: str, config: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(CheckpointError, match=message):
        getattr(ap, name)(**config)


@pytest.fixture(scope="module")
def load(checkpoint: Callable[[str], Path]) -> Callable[[Any, str], Any]:
    pipes: dict[tuple[str, str], Any] = {}

    def get(lib: Any, key: str) -> Any:
        if (lib.__name__, key) not in pipes:
            pipe = pipes[lib.__name__, key] = lib.DiffusionPipeline.from_pretrained(checkpoint(key))
            pipe.set_progress_bar_config(disable=True)
        return pipes[lib.__name__, key]

    return get


def latents(pipe: Any, key: str, **changes: Any) -> torch.Tensor:
    call = CALL | OWN[key] | changes
    return pipe(**call if "seed" in call else call | dict(generator=torch.Generator().manual_seed(5))).images


def test_a_long_negative_prompt_is_cut_where_the_prompt_ends(load: Any) -> None:
    """As the peer does it; with seeds, each one where its own prompt ends."""
    long = dict(negative_prompt="Sun and a cat and the sea", num_inference_steps=2)
    with pytest.warns(UserWarning, match="this part is cut: 'a cat and the sea'"):
        ours = latents(load(ap, "lumina"), "lumina", **long)
    assert torch.allclose(ours, latents(load(diffusers, "lumina"), "lumina", **long), atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompts = ["a red cat", "a red cat behind a yellow sun"]
        both = latents(load(ap, "lumina"), "lumina", **long | dict(prompt=prompts, seed=[1, 2]))
        for k in range(2):
            alone = latents(load(ap, "lumina"), "lumina", **long | dict(prompt=prompts[k], seed=k + 1))
            assert torch.allclose(both[k : k + 1], alone, atol=1e-4)


def test_callbacks_may_change_the_embeddings(load: Any) -> None:
    """Lumina shows them with those of the negative prompt behind, Lumina 2 without."""

    def turn(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        embeds = tensors["prompt_embeds"].clone()
        embeds[0] *= -1
        return {"prompt_embeds": embeds}

    options = dict(callback_on_step_end=turn, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    for key in OWN:
        plain = latents(load(ap, key), key)
        peer, ours = (latents(load(lib, key), key, **options) for lib in (diffusers, ap))
        assert torch.allclose(ours, peer, atol=1e-4)
        assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", ["FlowMatchHeunDiscrete", "DPMSolverMultistep"])
def test_other_schedulers_of_flows(load: Any, scheduler: str) -> None:
    options = {} if scheduler.startswith("Flow") else dict(prediction_type="flow_prediction", use_flow_sigmas=True)
    results = []
    for lib in (diffusers, ap):
        pipe = load(lib, "lumina")
        before, pipe.scheduler = pipe.scheduler, getattr(lib, f"{scheduler}Scheduler")(**options)
        results.append(latents(pipe, "lumina"))
        pipe.scheduler = before
    assert torch.allclose(*results, atol=1e-3)


@pytest.mark.parametrize(
    ("key", "changes", "error"),
    [
        ("lumina", dict(height=60), "height=60 is not a positive multiple of 16"),
        ("lumina", EMBEDS, "need each other"),
        ("lumina", dict(scaling_watershed=None), "scaling_watershed has to be a number"),
        (
            "lumina",
            dict(negative_prompt_embeds=torch.ones(1, 4, 24), negative_prompt_attention_mask=torch.ones(1, 4)),
            "go with prompt_embeds",
        ),
        ("lumina", dict(strength=0.5), "strength has no effect on text-to-image"),
        ("lumina2", dict(max_sequence_length=600), "more than the 512"),
        ("lumina2", dict(system_prompt=["a"]), "system_prompt has to be a string"),
        ("lumina2", EMBEDS | dict(prompt_attention_mask=torch.ones(1, 4)), "system_prompt has no effect"),
        (
            "lumina2",
            EMBEDS | dict(prompt_attention_mask=torch.tensor([[0, 1, 1, 1]]), system_prompt=None),
            "have to come first",
        ),
    ],
)
def test_what_is_refused(load: Any, key: str, changes: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        latents(load(ap, key), key, **changes)
