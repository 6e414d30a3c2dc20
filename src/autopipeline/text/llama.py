"""Llama's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from autopipeline.errors import CheckpointError
from autopipeline.text.base import FILES, TextTokenizer, added_of_json, encodable, read_json, token_text


class LlamaTokenizer(TextTokenizer):
    """Texts to token ids: merged pieces, or bytes where there are none; marks around them and padding as configured."""

    files = ("tokenizer.model", "added_tokens.json", *FILES)

    def __init__(
        self, core: Tokenizer, *, length: int, pad: str, end: str, source: Path, around: list[list[int]], left: bool
    ) -> None:
        super().__init__(core, length=length, pad=pad, end=end, source=source)
        self.around, self.left = around, left  # ids before and after a text; padding stands before all

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> LlamaTokenizer:
        """Read tokenizer.json from a folder; CheckpointError where it is missing."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        whole, config = read_json(path / "tokenizer.json"), read_json(path / "tokenizer_config.json")
        special = config | read_json(path / "special_tokens_map.json")
        if not whole:
            raise CheckpointError(f"{path} has no tokenizer.json.")
        try:
            pairs: Any = [
                tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in whole["model"]["merges"]
            ]
            core = Tokenizer(models.BPE(whole["model"]["vocab"], pairs, fuse_unk=True, byte_fallback=True))
            added = added_of_json(whole)
        except Exception as error:  # whatever the library raises
            raise CheckpointError(f"{path / 'tokenizer.json'} holds no vocabulary with merges.") from error
        scheme = "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        core.add_tokens(added)
        pad, end = (
            token_text(special.get(name) or token) for name, token in (("pad_token", "</s>"), ("eos_token", "</s>"))
        )
        around = _marks(whole)
        for token in (pad, end, *around[0], *around[1]):
            if core.token_to_id(token) is None:
                raise CheckpointError(f"The tokenizer in {path} does not know its own token {token!r}.")
        length = config.get("model_max_length", 512)
        return cls(
            core,
            length=length if 0 < length < 10**6 else 512,
            pad=pad,
            end=end,
            source=path,
            around=[[core.token_to_id(token) or 0 for token in tokens] for tokens in around],
            left=config.get("padding_side", "left") == "left",
        )

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Ids (B, `length` or else model_max_length); what does not fit is cut."""
        length = length or self.model_max_length
        start, end = self.around
        rows: list[list[int]] = []
        for encoding in self._core.encode_batch([encodable(text) for text in texts], add_special_tokens=False):
            row = [*start, *encoding.ids[: length - len(start) - len(end)], *end]
            padding = [self.pad] * (length - len(row))
            rows.append(padding + row if self.left else row + padding)
        return torch.tensor(rows, dtype=torch.long)

    def mask(self, ids: Tensor) -> Tensor:
        """0 for the padding at the side, 1 for the rest: (B, L)."""
        padding = (ids == self.pad).long()
        if self.left:
            return 1 - padding.cumprod(1)
        run = padding.flip(1).cumprod(1).flip(1)
        marked = self.pad in self.around[1]  # a text's own end looks like padding: the first of the run
        return 1 - (run * torch.nn.functional.pad(run, (1, -1)) if marked else run)

    def cut(self, text: str, length: int | None = None) -> str:
        """The part of a text that does not fit; "" if all of it does."""
        tokens = self._lost(text, (length or self.model_max_length) - sum(map(len, self.around)))
        return self._core.decoder.decode(tokens).strip() if tokens else ""


def _marks(whole: dict[str, Any]) -> list[list[str]]:
    """The tokens before and after every text, by the file's template; it counts more than what configurations say."""
    around: list[list[str]] = [[], []]
    side = 0
    for part in (whole.get("post_processor") or {}).get("single", []):
        if "SpecialToken" in part:
            around[side].append(part["SpecialToken"]["id"])
        else:
            side = 1  # past the text
    return around
