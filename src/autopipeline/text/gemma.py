"""Gemma's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from autopipeline.errors import CheckpointError
from autopipeline.text.base import TextTokenizer, encodable, read_json, token_text


class GemmaTokenizer(TextTokenizer):
    """Texts to token ids: start, the text, then padding."""

    start: list[int]  # what all texts begin with
    files = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> GemmaTokenizer:
        """Read tokenizer.json from a folder; CheckpointError where it is missing or damaged."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        config = read_json(path / "tokenizer_config.json")
        if not (path / "tokenizer.json").is_file():
            raise CheckpointError(f"{path} has no tokenizer.json.")
        try:
            core = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # whatever the library raises
            raise CheckpointError(f"The tokenizer in {path} is damaged: {error}.") from None
        core.no_truncation()
        core.no_padding()
        usual = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
        pad, end, start = (token_text(config.get(name) or token) for name, token in usual.items())
        for token in (pad, end, start):
            if core.token_to_id(token) is None:
                raise CheckpointError(f"The tokenizer in {path} does not know its own token {token!r}.")
        length = config.get("model_max_length", 8192)
        made = cls(core, length=length if 0 < length < 10**6 else 8192, pad=pad, end=end, source=path)
        first = [made._id(start)]
        made.start = first if config.get("add_bos_token") else core.encode("").ids
        if made.start not in ([], first):
            raise CheckpointError(f"The tokenizer in {path} adds more to texts than {start} before them.")
        return made

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids (B, `length` or else model_max_length); what does not fit is cut."""
        length = length or self.model_max_length
        rows = [self._ids(text)[:length] for text in texts]
        return torch.tensor([row + [self.pad] * (length - len(row)) for row in rows], dtype=torch.long)

    def count(self, text: str) -> int:
        """How many tokens a text is, with the start."""
        return len(self._ids(text))

    def mask(self, ids: Tensor) -> Tensor:
        """1 for the start and the text, 0 for the padding after it: (B, L)."""
        return ((ids != self.pad).flip(1).cumsum(1).flip(1) > 0).long()

    def cut(self, text: str, length: int | None = None) -> str:
        """The part of a text that does not fit; "" if all of it does."""
        ids = self._ids(text)[length or self.model_max_length :]
        return self._core.decode(ids).strip() if ids else ""

    def _ids(self, text: str) -> list[int]:
        return [*self.start, *self._core.encode(encodable(text), add_special_tokens=False).ids]
