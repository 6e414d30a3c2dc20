"""XLM-RoBERTa's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from autopipeline.errors import CheckpointError
from autopipeline.text.base import FILES
from autopipeline.text.t5 import T5Tokenizer

START = "<s>"


class XLMRobertaTokenizer(T5Tokenizer):
    """Texts to token ids: start, the text, end, then padding."""

    files = ("sentencepiece.bpe.model", *FILES[2:])

    def __init__(self, core: Tokenizer, *, length: int, pad: str, end: str, source: Path) -> None:
        super().__init__(core, length=length, pad=pad, end=end, source=source)
        if core.token_to_id(START) is None:
            raise CheckpointError(f"The tokenizer in {source} does not know its own token {START!r}.")
        self.start = self._id(START)

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids (B, `length` or else model_max_length); what does not fit is cut, the end token stays."""
        return self._rows(texts, [self.start], length or self.model_max_length)

    def cut(self, text: str, length: int | None = None) -> str:
        """The part of a text that does not fit; "" if all of it does."""
        return super().cut(text, (length or self.model_max_length) - 1)
