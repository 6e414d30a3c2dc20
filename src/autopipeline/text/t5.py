"""T5's tokenizer."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from autopipeline import sentencepiece
from autopipeline.errors import CheckpointError
from autopipeline.text.base import FILES, TextTokenizer, added_of_json, read_json, token_text


class _Unigram(NamedTuple):
    """What a folder says about a unigram model."""

    scores: list[tuple[str, float]]  # pieces by id
    characters: bytes | None  # table of characters to replace
    added: list[AddedToken]  # further tokens, by id


class T5Tokenizer(TextTokenizer):
    """Texts to token ids: the text, end, then padding."""

    files = ("spiece.model", "added_tokens.json", *FILES[2:])

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> T5Tokenizer:
        """Read tokenizer.json or spiece.model from a folder; CheckpointError where both are missing."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        config = read_json(path / "tokenizer_config.json")
        special = config | read_json(path / "special_tokens_map.json")
        unigram = _unigram(path, config)
        known = [piece for piece, _ in unigram.scores] + [token.content for token in unigram.added]
        usual = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        pad, end, unknown = (token_text(special.get(name) or token) for name, token in usual.items())
        for token in (pad, end, unknown):
            if token not in known:
                raise CheckpointError(f"The tokenizer in {path} does not know its own token {token!r}.")
        core = Tokenizer(models.Unigram(unigram.scores, known.index(unknown), False))
        if unigram.characters:
            core.normalizer = normalizers.Precompiled(unigram.characters)
        mark = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), mark])
        core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
        core.add_tokens(unigram.added)
        length = config.get("model_max_length", 512)
        return cls(core, length=length if 0 < length < 10**6 else 512, pad=pad, end=end, source=path)

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids (B, `length` or else model_max_length); what does not fit is cut, the end token stays."""
        return self._rows(texts, [], length or self.model_max_length)

    def cut(self, text: str, length: int | None = None) -> str:
        """The part of a text that does not fit; "" if all of it does."""
        tokens = self._lost(text, (length or self.model_max_length) - 1)
        return self._core.decoder.decode(tokens).strip() if tokens else ""


def _unigram(folder: Path, config: dict[str, Any]) -> _Unigram:
    whole, pieces = folder / "tokenizer.json", folder / "spiece.model"
    try:
        if whole.is_file():
            return _unigram_of_json(whole, read_json(whole))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{whole} holds no unigram model.") from error
    if not pieces.is_file():
        raise CheckpointError(f"{folder} has neither tokenizer.json nor spiece.model.")
    read = sentencepiece.read(pieces)
    if read.algorithm != sentencepiece.UNIGRAM:
        raise CheckpointError(f"{pieces} is no unigram model.")
    marked = (sentencepiece.UNKNOWN, sentencepiece.CONTROL, sentencepiece.USER_DEFINED)
    added = [AddedToken(piece.text, normalized=False, special=True) for piece in read.pieces if piece.kind in marked]
    added += [AddedToken(token_text(token), normalized=False, special=True) for token in _added(config)]
    return _Unigram([(piece.text, piece.score) for piece in read.pieces], read.characters, added)


def _unigram_of_json(file: Path, content: dict[str, Any]) -> _Unigram:
    model = content["model"]
    if not isinstance(model["vocab"], list):
        raise CheckpointError(f"{file} holds no unigram model.")
    added = added_of_json(content)
    normalizer = content.get("normalizer") or {}
    tables = [part.get("precompiled_charsmap") for part in normalizer.get("normalizers", [normalizer])]
    table = next((base64.b64decode(each) for each in tables if each), None)
    return _Unigram([(piece, score) for piece, score in model["vocab"]], table, added)


def _added(config: dict[str, Any]) -> list[Any]:
    """Tokens after the pieces: those that the configuration lists, or T5's marks for what is left out."""
    listed = {int(k): token for k, token in config.get("added_tokens_decoder", {}).items()}
    if listed:
        return [listed[k] for k in sorted(listed)]
    marks = config.get("additional_special_tokens") or config.get("extra_special_tokens")
    return marks or [f"<extra_id_{k}>" for k in reversed(range(config.get("extra_ids", 100)))]
