"""ChatGLM's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor

from autopipeline import sentencepiece
from autopipeline.errors import CheckpointError
from autopipeline.sentencepiece import BYTE, NORMAL, UNIGRAM, UNKNOWN, USER_DEFINED, Pieces
from autopipeline.text.base import FILES, TextTokenizer, encodable, read_json

MARKS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
"""Tokens after the pieces. No text is read as one of them, unless the configuration says so of the last four."""


class ChatGLMTokenizer(TextTokenizer):
    """Texts to token ids: padding, two marks, the text."""

    files = ("tokenizer.model", "vocab.txt", *FILES[3:])

    def __init__(self, core: Tokenizer, pieces: Pieces, *, roles: bool, pad: str, source: Path) -> None:
        super().__init__(core, length=256, pad=pad, end=pad, source=source)
        self._pieces = pieces
        first = len(pieces.pieces)
        self.start = [first + MARKS.index("[gMASK]"), first + MARKS.index("sop")]
        self._roles = {text: first + k for k, text in enumerate(MARKS) if text.startswith("<|")} if roles else {}
        self._table = normalizers.Precompiled(pieces.characters) if pieces.characters else None

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> ChatGLMTokenizer:
        """Read tokenizer.model, or vocab.txt of the same form; CheckpointError where both are missing or damaged."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        config = read_json(path / "tokenizer_config.json")
        file = next((path / name for name in cls.files[:2] if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{path} has neither tokenizer.model nor vocab.txt.")
        pieces = sentencepiece.read(file)
        pad = next((_name(piece.text, piece.kind) for piece in pieces.pieces if piece.kind == UNKNOWN), None)
        if pad is None:
            raise CheckpointError(f"{file} has no piece for what is unknown.")
        try:
            core = _core(pieces, pad)
        except Exception as error:  # whatever the library raises
            raise CheckpointError(f"{file} is damaged: {error}.") from None
        return cls(core, pieces, roles=bool(config.get("encode_special_tokens")), pad=pad, source=path)

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids (B, `length` or else model_max_length); what does not fit is cut."""
        length = length or self.model_max_length
        rows = [[*self.start, *self._ids(text)][:length] for text in texts]
        return torch.tensor([[self.pad] * (length - len(row)) + row for row in rows], dtype=torch.long)

    def mask(self, ids: Tensor) -> Tensor:
        """0 for the padding before a text, 1 for the rest: (B, L)."""
        return 1 - (ids == self.pad).long().cumprod(1)

    def cut(self, text: str, length: int | None = None) -> str:
        """The part of a text that does not fit; "" if all of it does."""
        ids = self._ids(text)[max((length or self.model_max_length) - len(self.start), 0) :]
        return self._core.decode([k for k in ids if k < len(self._pieces.pieces)]).strip() if ids else ""

    def __len__(self) -> int:
        return len(self._pieces.pieces) + len(MARKS)

    def _ids(self, text: str) -> list[int]:
        if not self._roles:
            return self._plain(text)
        parts = re.split("(" + "|".join(map(re.escape, self._roles)) + ")", text)
        return [k for part in parts for k in ([self._roles[part]] if part in self._roles else self._plain(part))]

    def _plain(self, text: str) -> list[int]:
        text = encodable(text)
        if self._table is not None:
            text = self._table.normalize_str(text)
        if self._pieces.tight:
            text = re.sub(" +", " ", text).strip(" ")
        mark = " " if text and self._pieces.prefixed else ""
        text = (mark + text).replace(" ", "▁")
        return self._core.encode(text.rstrip("▁") if self._pieces.tight else text, add_special_tokens=False).ids


def _name(text: str, kind: int) -> str:
    """What a piece is called inside: those that no text holds get a name that no text has."""
    return text if kind in (NORMAL, BYTE, USER_DEFINED) else f"\0{text}\0"


def _core(model: Pieces, unknown: str) -> Tokenizer:
    """Splits whole texts, spaces and all, as the model says."""
    names = [_name(piece.text, piece.kind) for piece in model.pieces]
    if model.algorithm == UNIGRAM:
        scores = [(name, piece.score) for name, piece in zip(names, model.pieces, strict=True)]
        core = Tokenizer(models.Unigram(scores, names.index(unknown), model.bytes))
    else:
        vocabulary: Any = {name: k for k, name in enumerate(names)}
        options: dict[str, Any] = dict(unk_token=unknown, fuse_unk=True, byte_fallback=model.bytes)
        core = Tokenizer(models.BPE(vocabulary, _merges(model), **options))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    own = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    core.add_tokens([AddedToken(text, normalized=False) for text in own])
    return core


def _merges(model: Pieces) -> list[tuple[str, str]]:
    """The pairs of pieces that make a third, the one with the best score first."""
    known = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    made = sorted((piece for piece in model.pieces if piece.kind == NORMAL), key=lambda piece: -piece.score)
    splits = ((piece.text[:k], piece.text[k:]) for piece in made for k in range(1, len(piece.text)))
    return [pair for pair in splits if pair[0] in known and pair[1] in known]
