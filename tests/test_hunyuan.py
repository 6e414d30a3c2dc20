"""Hunyuan-DiT's network, BERT, its tokenizer and perturbed attention, beside what the common tests try."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import map_to_standard_shapes

import autopipeline as ap
import tiny
from autopipeline.families.hunyuan import nearest_bin
from test_text import TEXTS

Checkpoint = Callable[[str], Path]
# Version 1.1, and 1.2, which knows neither sizes nor style.
BIG = dict(in_channels=4, patch_size=2, hidden_size=1408, num_layers=40, mlp_ratio=4.3637, sample_size=128)
PUBLISHED = [BIG, BIG | dict(use_style_cond_and_image_meta_size=False)]
CALL = dict(prompt="red cat", num_inference_steps=3, height=64, width=64, use_resolution_binning=False)


@pytest.mark.parametrize("config", [*PUBLISHED, tiny.HUNYUAN | dict(learn_sigma=False, activation_fn="gelu")])
def test_keys_and_shapes_are_the_peers(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        peer, ours = (lib.HunyuanDiT2DModel(**config) for lib in (diffusers, ap))
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in (peer, ours)]
    assert shapes[0] == shapes[1]


def test_sizes_of_training() -> None:
    for width in range(256, 2049, 112):
        for height in range(256, 2049, 112):
            assert nearest_bin(width, height) == tuple(map_to_standard_shapes(width, height)), (width, height)


def test_a_size_that_training_had_not_is_said(checkpoint: Checkpoint) -> None:
    pipe = ap.HunyuanDiTPipeline.from_pretrained(checkpoint("hunyuan"))
    with pytest.warns(UserWarning, match="32 x 48 pixels are made, not of 40 x 60"):
        made = pipe(**CALL | dict(height=60, width=40, output_type="np")).images
    assert made.shape == (1, 48, 32, 3)


@torch.no_grad()
def test_bert(tmp_path: Path) -> None:
    peer = tiny.bert(5)
    peer.save_pretrained(tmp_path)
    ours = ap.BertModel.from_pretrained(tmp_path)
    ids = torch.randint(0, 80, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    for masks in ((), (mask,)):
        assert torch.allclose(ours(ids, *masks), peer(ids, *masks).last_hidden_state, atol=2e-5)
    assert ours.state_dict().keys() == peer.state_dict().keys()
    with pytest.raises(ValueError, match="80 places"):
        ours(torch.zeros(1, 81, dtype=torch.long))
    with pytest.raises(ap.CheckpointError, match="relative_key"):
        ap.BertModel(position_embedding_type="relative_key")


@pytest.mark.parametrize("length", [None, 9])
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_tokenizer(file: str, length: int | None, tmp_path: Path) -> None:
    theirs = tiny.bert_tokenizer()
    theirs.save_pretrained(tmp_path)
    if file == "vocab.txt":
        (tmp_path / "tokenizer.json").unlink()
        words = sorted(theirs.get_vocab().items(), key=lambda item: item[1])
        (tmp_path / file).write_text("".join(f"{word}\n" for word, _ in words), "utf-8")
    ours = ap.BertTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS.values(), "Red cats [MASK] 猫 cat[SEP]sun", "a" * 120]
    expected = theirs(texts, padding="max_length", max_length=length or 77, truncation=True, return_tensors="pt")
    ids = ours(texts, length)
    for text, row, other in zip(texts, ids, expected.input_ids, strict=True):
        assert row.tolist() == other.tolist(), text
    assert torch.equal(ours.mask(ids), expected.attention_mask)
    assert ours.cut("a red cat on sun", 5) == "on sun"
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(ap.BertTokenizer.from_pretrained(tmp_path / "again")(texts, length), ids)
    with pytest.raises(ap.CheckpointError, match=r"neither tokenizer\.json nor vocab\.txt"):
        ap.BertTokenizer.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("layers", "changes"),
    [("blocks.1", dict(guidance_rescale=0.5)), (["blocks.0", "blocks.3"], dict(pag_adaptive_scale=0.002, width=80))],
)
def test_perturbed_attention(checkpoint: Checkpoint, layers: Any, changes: dict[str, Any]) -> None:
    made = []
    for lib in (diffusers, ap):
        options = dict(enable_pag=True, pag_applied_layers=layers)
        pipe = lib.AutoPipelineForText2Image.from_pretrained(checkpoint("hunyuan"), **options)
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe).__name__ == "HunyuanDiTPAGPipeline"
        made.append(pipe(**CALL | changes, output_type="np", generator=torch.Generator().manual_seed(3)).images)
    assert np.abs(made[0] - made[1]).max() < 2e-3
    again = pipe(**CALL | changes | dict(pag_scale=0.0, output_type="np"), seed=3).images
    assert np.abs(again - made[1]).max() > 1e-3


EMBEDS = dict(prompt_embeds=torch.zeros(1, 9, 24), prompt_embeds_2=torch.zeros(1, 256, 24), prompt=None)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("hunyuan", dict(height=12), "16 pixels at least"),
        ("hunyuan", EMBEDS, "need each other"),
        ("hunyuan", EMBEDS | dict(prompt_attention_mask=torch.ones(1, 9)), "has 9 tokens; this transformer takes 77"),
        ("hunyuan", dict(prompt=None, prompt_embeds=torch.zeros(1, 77, 24)), "needs prompt_embeds_2"),
        ("hunyuan-plain", dict(target_size=(64, 64)), "no effect"),
    ],
)
def test_refusals(checkpoint: Checkpoint, name: str, changes: dict[str, Any], says: str) -> None:
    pipe = ap.HunyuanDiTPipeline.from_pretrained(checkpoint(name))
    with pytest.raises(ValueError, match=says):
        pipe(**CALL | changes)
