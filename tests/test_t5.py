"""T5's encoder and tokenizer give what transformers' give."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from autopipeline import CheckpointError
from autopipeline.models import t5
from autopipeline.text import T5Tokenizer
from test_text import TEXTS

transformers = pytest.importorskip("transformers")

MORE = ["a red cat on the sea", "<extra_id_0> a<pad>b </s> c<unk>d", " under\u00a0the  blue\nsun ", "a cat" * 60]


def encoded(cls: str, folder: Path, **changes: Any) -> tuple[Any, Any]:
    peer = tiny.t5_encoder(5, cls, **changes)
    peer.save_pretrained(folder)
    return peer, getattr(t5, f"{cls}EncoderModel").from_pretrained(folder)


@pytest.mark.parametrize("cls", ["T5", "UMT5"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(feed_forward_proj="relu"),
        dict(feed_forward_proj="gated-silu", d_kv=10),
        dict(relative_attention_num_buckets=12, relative_attention_max_distance=40),
    ],
    ids=str,
)
def test_encoder(cls: str, changes: dict[str, Any], tmp_path: Path) -> None:
    peer, ours = encoded(cls, tmp_path, **changes)
    ids = torch.randint(0, 112, (2, 150), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with torch.no_grad():
        for masks in ((), (mask,)):
            expected = peer(ids, *masks).last_hidden_state
            assert torch.allclose(ours(ids, *masks), expected, atol=2e-5), masks


def test_other_perceptrons_are_refused(tmp_path: Path) -> None:
    tiny.t5_encoder(5, feed_forward_proj="gated-tanh").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="feed_forward_proj='gated-tanh'"):
        t5.T5EncoderModel.from_pretrained(tmp_path)


def test_float16_keeps_what_would_run_over_in_float32(tmp_path: Path) -> None:
    tiny.t5_encoder(5).save_pretrained(tmp_path)
    ours = t5.T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16)
    last = ours.encoder.block[0].layer[1].DenseReluDense.wo
    assert (ours.dtype, last.weight.dtype) == (torch.float16, torch.float32)
    assert torch.isfinite(ours(torch.tensor([[5, 6, 1, 0]]))).all()


def _message(*fields: tuple[int, bytes | float | int]) -> bytes:
    """Protocol buffers by hand; all numbers here are below 128."""
    out = b""
    for number, value in fields:
        if isinstance(value, bytes):
            size = len(value)
            out += bytes([number << 3 | 2, *([size] if size < 128 else [size & 127 | 128, size >> 7])]) + value
        elif isinstance(value, float):
            out += bytes([number << 3 | 5]) + struct.pack("<f", value)
        else:
            out += bytes([number << 3, value])
    return out


def model_file(algorithm: int = 1) -> bytes:
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    pieces = [
        (1, _message((1, piece.encode()), (2, score), *([(3, kinds[piece])] if piece in kinds else [])))
        for piece, score in tiny.PIECES
    ]
    return _message(*pieces, (2, _message((3, algorithm))), (3, _message((1, b"identity"))))


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("t5")
    tiny.t5_tokenizer().save_pretrained(folder)
    return transformers.T5TokenizerFast.from_pretrained(folder), folder


@pytest.mark.parametrize("length", [None, 8, 120])
@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model"])
def test_tokenizer(peer: tuple[Any, Path], file: str, length: int | None, tmp_path: Path) -> None:
    theirs, folder = peer
    for path in folder.iterdir():
        if path.name != "tokenizer.json" or file == path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    if file == "spiece.model":
        (tmp_path / file).write_bytes(model_file())
    ours = T5Tokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS.values(), *MORE]
    expected = theirs(texts, padding="max_length", max_length=length or 77, truncation=True, return_tensors="pt")
    ids = ours(texts, length)
    for text, row, other in zip(texts, ids, expected.input_ids, strict=True):
        assert row.tolist() == other.tolist(), text
    assert torch.equal(ours.mask(ids), expected.attention_mask)
    assert len(ours) == len(theirs)
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(T5Tokenizer.from_pretrained(tmp_path / "again")(texts, length), ids)


def test_marks_that_a_model_file_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(model_file())
    ours = T5Tokenizer.from_pretrained(tmp_path)
    assert len(ours) == len(tiny.PIECES) + 100
    assert ours(["<extra_id_99><extra_id_0>"], 3).tolist() == [[len(tiny.PIECES), len(tiny.PIECES) + 99, 1]]


def test_what_is_cut(peer: tuple[Any, Path]) -> None:
    ours = T5Tokenizer.from_pretrained(peer[1])
    assert ours.cut("a red cat on the sea", 5) == "the sea"
    assert ours.cut("a red cat on the sea") == ""


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("spiece.model", b"\x0a\xff", "truncated"),
        ("spiece.model", b"", "no pieces"),
        ("spiece.model", model_file(2), "no unigram"),
        ("tokenizer.json", b"{}", "no unigram"),
        ("tokenizer.json", b"[", "not valid JSON"),
        ("nothing", b"", "neither tokenizer.json nor spiece.model"),
    ],
)
def test_damaged_tokenizers_are_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        T5Tokenizer.from_pretrained(tmp_path)
