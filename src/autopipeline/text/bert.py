"""BERT's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from autopipeline.errors import CheckpointError
from autopipeline.text.base import FILES, TextTokenizer, read_json, token_text


class BertTokenizer(TextTokenizer):
    """Texts to token ids: start, the text's words or their parts, end, then padding."""

    files = ("vocab.txt", *FILES[2:])

    def __init__(self, core: Tokenizer, *, length: int, pad: str, end: str, source: Path, start: str) -> None:
        super().__init__(core, length=length, pad=pad, end=end, source=source)
        self.start = self._id(start)

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> BertTokenizer:
        """Read tokenizer.json or vocab.txt from a folder; CheckpointError where both are missing."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        config = read_json(path / "tokenizer_config.json")
        special = config | read_json(path / "special_tokens_map.json")
        usual = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        unknown, start, end, pad = (token_text(special.get(name) or token) for name, token in usual.items())
        vocabulary = _words(path)
        for token in (unknown, start, end, pad):
            if token not in vocabulary:
                raise CheckpointError(f"The tokenizer in {path} does not know its own token {token!r}.")
        core = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
        core.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
            strip_accents=config.get("strip_accents"),
            lowercase=config.get("do_lower_case", True),
        )
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece(prefix="##")
        marks = [unknown, end, pad, start, token_text(special.get("mask_token") or "[MASK]")]
        core.add_special_tokens([AddedToken(token, normalized=False) for token in marks if token in vocabulary])
        length = config.get("model_max_length", 512)
        length = length if 0 < length < 10**6 else 512
        return cls(core, length=length, pad=pad, end=end, source=path, start=start)

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids (B, `length` or else model_max_length); what does not fit is cut, the end token stays."""
        return self._rows(texts, [self.start], length or self.model_max_length)

    def cut(self, text: str, length: int | None = None) -> str:
        """The part of a text that does not fit; "" if all of it does."""
        tokens = self._lost(text, (length or self.model_max_length) - 2)
        return self._core.decoder.decode(tokens).strip() if tokens else ""


def _words(folder: Path) -> dict[str, int]:
    """BERT's vocabulary."""
    whole, lines = folder / "tokenizer.json", folder / "vocab.txt"
    if whole.is_file():
        vocabulary = read_json(whole).get("model", {}).get("vocab")
        if not isinstance(vocabulary, dict):
            raise CheckpointError(f"{whole} holds no vocabulary of words.")
        return vocabulary
    if not lines.is_file():
        raise CheckpointError(f"{folder} has neither tokenizer.json nor vocab.txt.")
    return {token: k for k, token in enumerate(lines.read_text("utf-8").removesuffix("\n").split("\n"))}
