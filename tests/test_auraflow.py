"""AuraFlow's network and the tokenizer of Llama that it comes with, beside what the common tests try."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import autopipeline as ap
import tiny
from test_text import TEXTS

PUBLISHED = dict(attention_head_dim=256, pos_embed_max_size=9216)
MARKS = [{}, dict(add_bos_token=True), dict(add_eos_token=True), dict(padding_side="left"), dict(pad_token="<unk>")]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes", [{}, dict(num_single_dit_layers=0), dict(num_mmdit_layers=0), dict(in_channels=6, out_channels=6)]
)
@torch.no_grad()
def test_network(changes: dict[str, Any]) -> None:
    peer = tiny.redraw(diffusers.AuraFlowTransformer2DModel(**tiny.AURAFLOW | changes), 1)
    ours = ap.AuraFlowTransformer2DModel(**tiny.AURAFLOW | changes)
    ours.load_state_dict(peer.state_dict())
    for height, width in ((8, 10), (26, 6)):
        x = drawn(2, changes.get("in_channels", 4), height, width)
        said = dict(encoder_hidden_states=drawn(2, 7, 24, seed=1))
        t = torch.tensor([0.3, 0.71])
        assert torch.allclose(ours(x, t, **said), peer(x, timestep=t, **said).sample, atol=1e-4)
    with pytest.raises(ValueError, match="13 x 13 patches"):
        ours(drawn(1, changes.get("in_channels", 4), 28, 6), t[:1], encoder_hidden_states=drawn(1, 7, 24))


def test_published_sizes_have_the_peers_keys_and_shapes() -> None:
    with torch.device("meta"):
        peer, ours = (lib.AuraFlowTransformer2DModel(**PUBLISHED) for lib in (diffusers, ap))
    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in (peer, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("changes", MARKS, ids=str)
@pytest.mark.parametrize("length", [None, 9])
def test_tokenizer(changes: dict[str, Any], length: int | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny.llama_tokenizer(**changes).save_pretrained(tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    ours = ap.LlamaTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS.values(), "red<s> cat </s>sun", " a red cat"]
    expected = theirs(texts, padding="max_length", max_length=length or 64, truncation=True, return_tensors="pt")
    ids = ours(texts, length)
    for text, row, other in zip(texts, ids, expected.input_ids, strict=True):
        assert row.tolist() == other.tolist(), text
    whole = [k for k, text in enumerate(texts) if "</s>" not in text and "<unk>" not in text]
    assert torch.equal(ours.mask(ids)[whole], expected.attention_mask[whole])
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(ap.LlamaTokenizer.from_pretrained(tmp_path / "again")(texts, length), ids)


def test_what_is_cut_and_what_is_damaged(tmp_path: Path) -> None:
    tiny.llama_tokenizer().save_pretrained(tmp_path)
    assert ap.LlamaTokenizer.from_pretrained(tmp_path).cut("a red cat sun", 4) == "sun"
    assert ap.LlamaTokenizer.from_pretrained(tmp_path).cut("a red cat sun") == ""
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | dict(model={})), "utf-8")
    with pytest.raises(ap.CheckpointError, match="no vocabulary"):
        ap.LlamaTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ap.CheckpointError, match=r"no tokenizer\.json"):
        ap.LlamaTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(height=36), "height=36 is not a positive multiple of 8"),
        (dict(prompt=None, prompt_embeds=drawn(1, 9, 24)), "need each other"),
        (dict(negative_prompt_embeds=drawn(1, 9, 24), negative_prompt_attention_mask=drawn(1, 9)), "9 tokens"),
        (dict(scheduler="DDIM"), "flow"),
        (dict(attention_kwargs={"scale": 0.5}), "none is loaded"),
    ],
)
def test_refusals(checkpoint: Any, changes: dict[str, Any], says: str) -> None:
    pipe = ap.AuraFlowPipeline.from_pretrained(checkpoint("auraflow"))
    with pytest.raises(ValueError, match=says):
        pipe(**dict(prompt="cat", height=32, width=32, num_inference_steps=1) | changes)
