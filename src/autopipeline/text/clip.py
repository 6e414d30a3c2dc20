"""CLIP's tokenizer."""

from __future__ import annotations

import hashlib
import re
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from autopipeline.errors import CheckpointError
from autopipeline.text.base import FILES, TextTokenizer, encodable, read_json, token_text

PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
START, END = "<|startoftext|>", "<|endoftext|>"


class CLIPTokenizer(TextTokenizer):
    """Texts to token ids: start, the text, end, then padding up to `model_max_length`."""

    files = FILES

    def __init__(self, core: Tokenizer, *, length: int, pad: str, source: Path) -> None:
        super().__init__(core, length=length, pad=pad, end=END, source=source)
        self.start = self._id(START)

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> CLIPTokenizer:
        """Read vocab.json and merges.txt (or tokenizer.json) from a folder; CheckpointError where they are missing."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        with _LOCK:  # reading a vocabulary lets no other thread work anyway
            words = _words(path)
            other = _IN_USE.get(words)
            made = _IN_USE[words] = cls._over(_model(path) if other is None else other._core.model, path)
        return made

    @classmethod
    def _over(cls, model: Any, path: Path) -> CLIPTokenizer:
        config = read_json(path / "tokenizer_config.json")
        special = read_json(path / "special_tokens_map.json")
        length = config.get("model_max_length", 77)
        pad = token_text(special.get("pad_token") or config.get("pad_token") or END)
        for token in (START, END, pad):
            if model.token_to_id(token) is None:
                raise CheckpointError(f"The tokenizer in {path} does not know its own token {token!r}.")
        core = Tokenizer(model)
        core.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        split = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
        core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken(token, normalized=False) for token in dict.fromkeys((START, END, pad))])
        return cls(core, length=length if 0 < length < 10**6 else 77, pad=pad, source=path)

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids (B, `length` or else model_max_length); what does not fit is cut, the end token stays."""
        return self._rows(texts, [self.start], length or self.model_max_length)

    def counted(self, texts: Sequence[str]) -> Tensor:
        """1 for the start, what fits of the text and the end, 0 for padding: (B, model_max_length)."""
        room = self.model_max_length
        rows = self._core.encode_batch([encodable(text) for text in texts], add_special_tokens=False)
        lengths = torch.tensor([min(len(row.ids) + 2, room) for row in rows])
        return (torch.arange(room) < lengths[:, None]).long()

    def cut(self, text: str) -> str:
        """The part of a text that does not fit; "" if all of it does."""
        tokens = self._lost(text, self.model_max_length - 2)
        return self._core.decoder.decode(tokens).replace("</w>", " ").strip() if tokens else ""


_IN_USE: weakref.WeakValueDictionary[bytes, CLIPTokenizer] = weakref.WeakValueDictionary()
"""Tokenizers by what their vocabularies were read from: those of one pipeline often have the same."""
_LOCK = threading.Lock()


def _files(folder: Path) -> list[Path]:
    """Those that the vocabulary is read from: two, or the newer one alone."""
    apart = [folder / "vocab.json", folder / "merges.txt"]
    return apart if all(file.is_file() for file in apart) else [folder / "tokenizer.json"]


def _words(folder: Path) -> bytes:
    """Tells vocabularies apart by the files that they are in."""
    told = hashlib.blake2b()
    for file in _files(folder):
        content = b""
        with suppress(OSError):  # who needs the file says what is wrong with it
            content = file.read_bytes()
        told.update(f"{file.name} {len(content)} ".encode() + content)
    return told.digest()


def _model(folder: Path) -> models.BPE:
    """The vocabulary with its merges; CheckpointError where files are missing or don't go together."""
    options: dict[str, Any] = dict(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END)
    files = _files(folder)
    apart = len(files) == 2
    vocabulary, merges = ({}, []) if apart else _whole(folder)
    try:
        return models.BPE.from_file(*map(str, files), **options) if apart else models.BPE(vocabulary, merges, **options)
    except Exception as error:  # whatever the library raises
        raise CheckpointError(f"The tokenizer in {folder} is damaged: {_why(folder, vocabulary, error)}.") from None


def _whole(folder: Path) -> tuple[dict[str, int], Any]:
    whole = folder / "tokenizer.json"
    if not whole.is_file():
        raise CheckpointError(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json.")
    model = read_json(whole).get("model")
    if not isinstance(model, dict) or not {"vocab", "merges"} <= model.keys():
        raise CheckpointError(f"{whole} holds no vocabulary with merges.")
    pairs = [tuple(pair.split()) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return model["vocab"], pairs


def _why(folder: Path, vocabulary: dict[str, int], error: Exception) -> str:
    """What is wrong, in a sentence; CheckpointError for a file that is no JSON."""
    vocabulary = vocabulary or read_json(folder / "vocab.json")
    lacking = [token for token in (START, END) if token not in vocabulary]
    if lacking:
        return f"it does not know its own token {lacking[0]!r}"
    found = re.search(r"`(.*)` out of vocabulary", str(error))
    return f"its vocabulary lacks {found[1]!r}, which merges.txt has" if found else f"{error} (merges.txt)"
