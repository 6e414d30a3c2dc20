"""SentencePiece's model files (Kudo & Richardson 2018): what of them tokenizers need, read without a library."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from autopipeline.errors import CheckpointError

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    """A token, its score and its kind."""

    text: str
    score: float
    kind: int


class Pieces(NamedTuple):
    """A model: its algorithm (UNIGRAM or BPE), its pieces by id, and how texts are prepared."""

    algorithm: int
    pieces: list[Piece]
    characters: bytes | None  # table of characters to replace
    bytes: bool = False  # what has no piece becomes bytes
    prefixed: bool = True  # by a space
    tight: bool = True  # spaces at the ends and doubled ones are left out


def read(file: Path) -> Pieces:
    """Read a .model file; CheckpointError where it is none."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _fields(file.read_bytes()):
            inner = dict(_fields(value)) if field in (1, 2, 3) else {}
            if field == 1:
                score = struct.unpack("<f", inner.get(2, bytes(4)))[0]
                pieces.append(Piece(inner[1].decode("utf-8"), score, inner.get(3, NORMAL)))
            elif field == 2:
                trainer = inner
            elif field == 3:
                normalizer = inner
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{file} is truncated or no SentencePiece model.") from error
    if not pieces:
        raise CheckpointError(f"{file} holds no pieces.")
    return Pieces(
        trainer.get(3, UNIGRAM),
        pieces,
        normalizer.get(2) or None,
        bytes=bool(trainer.get(35, 0)),
        prefixed=bool(normalizer.get(3, 1)),
        tight=bool(normalizer.get(4, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol-buffers message: whole numbers, or bytes for all else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError("a field goes past the end")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number in groups of seven bits, lowest first, and where the next thing begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
