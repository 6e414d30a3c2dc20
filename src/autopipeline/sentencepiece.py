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
    """A model: its algorithm (UNIGRAM or BPE), its pieces by id, and its table of characters to replace, if any."""

    algorithm: int
    pieces: list[Piece]
    characters: bytes | None


def read(file: Path) -> Pieces:
    """Read a .model file; CheckpointError where it is none."""
    pieces: list[Piece] = []
    algorithm, characters = UNIGRAM, None
    try:
        for field, value in _fields(file.read_bytes()):
            inner = dict(_fields(value)) if field in (1, 2, 3) else {}
            if field == 1:
                score = struct.unpack("<f", inner.get(2, bytes(4)))[0]
                pieces.append(Piece(inner[1].decode("utf-8"), score, inner.get(3, NORMAL)))
            elif field == 2:
                algorithm = inner.get(3, UNIGRAM)
            elif field == 3:
                characters = inner.get(2) or None
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{file} is truncated or no SentencePiece model.") from error
    if not pieces:
        raise CheckpointError(f"{file} holds no pieces.")
    return Pieces(algorithm, pieces, characters)


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
