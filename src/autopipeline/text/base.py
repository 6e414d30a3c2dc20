"""What tokenizers share, and how their files are read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from autopipeline.config import read_object

FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class TextTokenizer:
    """What tokenizers share: where they came from, and a length that texts are cut and padded to."""

    files: tuple[str, ...]  # that a folder may have

    def __init__(self, core: Tokenizer, *, length: int, pad: str, end: str, source: Path) -> None:
        self._core, self.model_max_length, self._source = core, length, source
        self.end, self.pad = self._id(end), self._id(pad)

    def _id(self, token: str) -> int:
        found = self._core.token_to_id(token)
        if found is None:
            raise KeyError(token)
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the files that it came from."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in self.files:
            if (self._source / name).is_file() and not self._source.samefile(folder):
                shutil.copyfile(self._source / name, Path(folder, name))

    def _rows(self, texts: Sequence[str], start: list[int], length: int) -> Tensor:
        """Ids (B, `length`): `start`, what fits of the text, the end, padding."""
        room = length - len(start) - 1
        rows: list[list[int]] = []
        for encoding in self._core.encode_batch([encodable(text) for text in texts], add_special_tokens=False):
            row = [*start, *encoding.ids[:room], self.end]
            rows.append(row + [self.pad] * (length - len(row)))
        return torch.tensor(rows, dtype=torch.long)

    def mask(self, ids: Tensor) -> Tensor:
        """1 for the text and its end, 0 for other tokens after it, which are padding: (B, L)."""
        return ((ids == self.end).flip(1).cumsum(1).flip(1) > 0).long()

    def _lost(self, text: str, room: int) -> list[str]:
        """The tokens of a text that don't fit."""
        ids = self._core.encode(encodable(text), add_special_tokens=False).ids
        return [self._core.id_to_token(k) or "" for k in ids[room:]]

    def __len__(self) -> int:
        return self._core.get_vocab_size()


def encodable(text: str) -> str:
    """The text itself; ValueError where it is no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The text {text!r} holds half a character (a lone surrogate).") from None
    return text


def added_of_json(content: dict[str, Any]) -> list[AddedToken]:
    """The tokens that tokenizer.json adds to the vocabulary, in order."""
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = sorted(content["added_tokens"], key=lambda token: token["id"])
    return [AddedToken(**{flag: token[flag] for flag in flags}) for token in tokens]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file, CheckpointError where it is damaged."""
    return read_object(file) if file.is_file() else {}


def token_text(token: Any) -> str:
    """A special token, which configurations give as a text or with its flags."""
    return token["content"] if isinstance(token, dict) else token
