"""Kolors: ChatGLM and its tokenizer against the peer's, PAG, what only we have, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.kolors import ChatGLMModel as PeerModel
from diffusers.pipelines.kolors import ChatGLMTokenizer as PeerTokenizer

import autopipeline as ap
import tiny
from autopipeline.errors import CheckpointError

Checkpoint = Callable[[str], Path]
CALL = dict(prompt="a red cat", num_inference_steps=3, output_type="np")
TEXTS = [
    *("", " ", "a red cat", "  the  sea   ", "▁", "a ▁", "x" * 30, "-" * 9, "☃ 🦖\n\tx", "一只红色的 cat", "\0a"),
    *("<unk> a", "</s>", "a<s>b", "[gMASK] sop", "<|user|>", "<0x41>", "<pad>", "ﬁ ½", "e\u0301"),
]


def image(pipe: Any, **changes: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**CALL | dict(generator=torch.Generator().manual_seed(2)) | changes).images


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("bpe", {}),
        ("bpe", dict(byte_fallback=False, remove_extra_whitespaces=True)),
        ("bpe", dict(user_defined_symbols=["cat", "ed s"], add_dummy_prefix=False)),
        ("unigram", dict(vocab_size=300)),
        ("unigram", dict(vocab_size=40, byte_fallback=False, remove_extra_whitespaces=True)),
    ],
)
@pytest.mark.parametrize("length", [256, 5])
def test_tokenizer(algorithm: str, options: dict[str, Any], length: int, tmp_path: Path) -> None:
    theirs = PeerTokenizer(str(tiny.chatglm_pieces(tmp_path / "tokenizer.model", algorithm, **options)))
    ours = ap.ChatGLMTokenizer.from_pretrained(tmp_path)
    # A run of letters without pieces is looked up as it stands by the peer, which may thus find a mark.
    texts = [text for text in TEXTS if options.get("byte_fallback", True) or "gMASK" not in text]
    if algorithm == "unigram":
        texts.remove("<0x41>")  # the name of a byte, which `tokenizers` finds in texts; no checkpoint is of this kind
    want = theirs(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids = ours(texts, length)
    for text, row, other in zip(texts, ids.tolist(), want.input_ids.tolist(), strict=True):
        assert row == other, text
    assert torch.equal(ours.mask(ids), want.attention_mask)
    assert len(ours) == theirs.vocab_size


def test_tokenizer_saved_cut_and_told_to_read_roles(tmp_path: Path) -> None:
    file = tiny.chatglm_pieces(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(encode_special_tokens=True)))
    theirs, ours = PeerTokenizer(str(file), encode_special_tokens=True), ap.ChatGLMTokenizer.from_pretrained(tmp_path)
    text = "<|user|> a cat<|assistant|>[MASK] sun"
    assert ours([text], 40)[0].tolist() == theirs(text, padding="max_length", max_length=40).input_ids
    assert ours.cut("a red cat <|user|> on the sea", 7).endswith("on the sea")
    assert ours.cut("a red cat") == ""
    ours.save_pretrained(tmp_path / "again")
    file.rename(tmp_path / "vocab.txt")  # as the first checkpoint has it
    for folder in (tmp_path, tmp_path / "again"):
        assert torch.equal(ap.ChatGLMTokenizer.from_pretrained(folder)([text]), ours([text]))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.model", b"\x0a\xff", "truncated"),
        ("tokenizer.model", b"\x0a\x03\x0a\x01a", "no piece for what is unknown"),
        ("spiece.model", b"", "neither tokenizer.model nor vocab.txt"),
    ],
)
def test_damaged_tokenizers_are_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        ap.ChatGLMTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(multi_query_attention=False, add_qkv_bias=False),
        dict(add_bias_linear=True, rmsnorm=False, multi_query_group_num=1),
        dict(apply_residual_connection_post_layernorm=True, post_layer_norm=False, num_layers=1, kv_channels=12),
    ],
)
def test_encoder(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = tiny.chatglm(1, **changes)
    theirs.save_pretrained(tmp_path)
    ours = ap.ChatGLMModel.from_pretrained(tmp_path)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ids, mask = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(1)), torch.ones(3, 20).long()
    mask[0, :7] = mask[1, :18] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=mask, position_ids=places, output_hidden_states=True).hidden_states
        made = ours(ids, mask)
    torch.testing.assert_close(made.tokens, want[-2].transpose(0, 1), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(made.last, want[-1][-1], atol=2e-5, rtol=1e-4)
    ours.save_pretrained(tmp_path / "again")
    for name, weight in PeerModel.from_pretrained(tmp_path / "again").state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name


def test_keys_with_the_name_of_the_whole_language_model() -> None:
    assert ap.ChatGLMModel.renamed("transformer.output_layer.weight") == "output_layer.weight"
    with pytest.raises(CheckpointError, match="pre_seq_len=4"):
        ap.ChatGLMModel(pre_seq_len=4)


def test_saved_for_the_peer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ours = ap.DiffusionPipeline.from_pretrained(checkpoint("kolors"))
    ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["text_encoder"], index["tokenizer"]) == (["kolors", "ChatGLMModel"], ["kolors", "ChatGLMTokenizer"])
    theirs = diffusers.KolorsPipeline.from_pretrained(tmp_path)
    assert np.abs(image(theirs) - image(ours)).max() < 2e-3


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_images_per_prompt=2, negative_prompt="sun"),
        dict(pag_scale=1.5, pag_adaptive_scale=0.002, guidance_scale=1.0),
        dict(pag_scale=0.0, original_size=(32, 48)),
    ],
)
def test_perturbed_attention(checkpoint: Checkpoint, changes: dict[str, Any]) -> None:
    options = dict(enable_pag=True, pag_applied_layers=["mid", "up"])
    load = (lib.AutoPipelineForText2Image.from_pretrained(checkpoint("kolors"), **options) for lib in (diffusers, ap))
    theirs, ours = load
    assert type(ours).__name__ == type(theirs).__name__ == "KolorsPAGPipeline"
    assert np.abs(image(theirs, **changes) - image(ours, **changes)).max() < 2e-3


def test_perturbed_attention_from_pictures(checkpoint: Checkpoint) -> None:
    pipe = ap.AutoPipelineForInpainting.from_pretrained(checkpoint("kolors"), enable_pag=True)
    assert type(pipe).__name__ == "KolorsPAGInpaintPipeline"
    inputs = tiny.inputs("inpaint")
    strong, none = image(pipe, **inputs), image(pipe, **inputs, pag_scale=0.0)
    assert np.abs(strong - none).max() > 0.01
    begun = image(ap.AutoPipelineForImage2Image.from_pipe(pipe, enable_pag=True), image=tiny.photo(), strength=0.7)
    assert begun.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("task", ["text2image", "inpaint"])
def test_negative_sizes_of_several_pictures(checkpoint: Checkpoint, task: str) -> None:
    pipe = ap.KolorsPipeline.from_pretrained(checkpoint("kolors"))
    pipe = ap.AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True) if task == "text2image" else pipe
    sizes = dict(negative_original_size=(24, 32), negative_target_size=(72, 56), generator=None) | tiny.inputs(task)
    both = image(pipe, **sizes, prompt=["a cat", "sun"], seed=[7, 9])
    alone = [image(pipe, **sizes, prompt=text, seed=seed) for text, seed in (("a cat", 7), ("sun", 9))]
    assert np.abs(both - np.concatenate(alone)).max() < 1e-3


def test_networks_made_for_inpainting(checkpoint: Checkpoint) -> None:
    pipe = ap.AutoPipelineForInpainting.from_pretrained(checkpoint("kolors-9"))
    made = image(pipe, **tiny.inputs("inpaint"))
    other = image(pipe, **tiny.inputs("inpaint") | dict(image=tiny.photo(seed=3)))
    assert np.abs(made - other).max() > 0.01
    with pytest.raises(ValueError, match="inpainting"):
        ap.AutoPipelineForText2Image.from_pretrained(checkpoint("kolors-9"))


def test_what_the_peer_fails_at(checkpoint: Checkpoint) -> None:
    """Zeros for the empty negative prompt, given embeddings for image-to-image, one negative prompt for several."""
    pipe = ap.KolorsPipeline.from_pretrained(checkpoint("kolors"), force_zeros_for_empty_prompt=True)
    rows = dict(prompt_embeds=torch.randn(1, 256, 24), pooled_prompt_embeds=torch.randn(1, 24))
    zeros = {f"negative_{name}": torch.zeros_like(each) for name, each in rows.items()}
    assert np.array_equal(image(pipe, prompt=None, **rows), image(pipe, prompt=None, **rows, **zeros))
    begin = ap.AutoPipelineForImage2Image.from_pipe(pipe)
    given = dict(prompt=None, image=tiny.photo(), strength=0.7)
    assert np.array_equal(image(begin, **given, **rows), image(begin, **given, **rows, **zeros))
    assert len(image(pipe, prompt=["a cat", "sun"], negative_prompt="sea")) == 2


def test_the_limit_of_tokens_cuts(checkpoint: Checkpoint) -> None:
    pipe = ap.KolorsPipeline.from_pretrained(checkpoint("kolors"))
    with pytest.warns(UserWarning, match="6 tokens that the text encoder reads; this part is cut"):
        short = image(pipe, prompt="a red cat on the sea", max_sequence_length=6)
    assert not np.allclose(short, image(pipe, prompt="a red cat on the sea"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(max_sequence_length=300), "from 2 to 256"),
        (dict(negative_original_size=(64, 64)), "no effect without both"),
        (dict(negative_crops_coords_top_left=(4, 0)), "no effect without both"),
        (dict(height=60), "multiple of 8"),
        (dict(negative_prompt_embeds=torch.zeros(1, 256, 24)), "negative_pooled_prompt_embeds beside it"),
        (
            dict(negative_prompt_embeds=torch.zeros(1, 9, 24), negative_pooled_prompt_embeds=torch.zeros(1, 24)),
            "9 tokens and the prompt 256",
        ),
        (
            dict(prompt=None, prompt_embeds=torch.zeros(1, 9, 20), pooled_prompt_embeds=torch.zeros(1, 24)),
            "prompt_embeds is 20 numbers wide",
        ),
        (dict(pooled_prompt_embeds=torch.zeros(1, 20), guidance_scale=1.0), "pooled_prompt_embeds is 20 numbers wide"),
        (dict(callback_on_step_end_tensor_inputs=["negative_add_time_ids"]), "may name latents, prompt_embeds"),
    ],
)
def test_refused(checkpoint: Checkpoint, changes: dict[str, Any], says: str) -> None:
    pipe = ap.KolorsPipeline.from_pretrained(checkpoint("kolors"))
    with pytest.raises(ValueError, match=says):
        image(pipe, **changes)


def test_without_an_encoder(checkpoint: Checkpoint) -> None:
    pipe = ap.KolorsPipeline.from_pretrained(checkpoint("kolors"), text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="pass prompt_embeds and pooled_prompt_embeds"):
        image(pipe)
    rows = dict(prompt_embeds=torch.randn(1, 9, 24), pooled_prompt_embeds=torch.randn(1, 24))
    assert image(pipe, prompt=None, **rows, guidance_scale=1.0).shape == (1, 64, 64, 3)


def test_controlnets_that_would_project_are_refused() -> None:
    with pytest.raises(CheckpointError, match="controlnet with encoder_hid_dim_type='text_proj'"):
        ap.ControlNetModel(encoder_hid_dim=24, encoder_hid_dim_type="text_proj")
