"""CLIP's, T5's, Gemma's, BERT's and Llama's tokenizers, on the `tokenizers` library."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from autopipeline import sentencepiece
from autopipeline.errors import CheckpointError

PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
START, END = "<|startoftext|>", "<|endoftext|>"


class _Tokenizer:
    """What tokenizers share: where they came from, and a length that texts are cut and padded to."""

    files: tuple[str, ...]  # that a folder may have

    def __init__(self, core: Tokenizer, *, length: int, pad: str, end: str, source: Path) -> None:
        self._core, self.model_max_length, self._source = core, length, source
        vocabulary = core.get_vocab()
        self.end, self.pad = vocabulary[end], vocabulary[pad]

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
        for encoding in self._core.encode_batch([_encodable(text) for text in texts], add_special_tokens=False):
            row = [*start, *encoding.ids[:room], self.end]
            rows.append(row + [self.pad] * (length - len(row)))
        return torch.tensor(rows, dtype=torch.long)

    def mask(self, ids: Tensor) -> Tensor:
        """1 for the text and its end, 0 for other tokens after it, which are padding: (B, L)."""
        return ((ids == self.end).flip(1).cumsum(1).flip(1) > 0).long()

    def _lost(self, text: str, room: int) -> list[str]:
        """The tokens of a text that don't fit."""
        ids = self._core.encode(_encodable(text), add_special_tokens=False).ids
        return [self._core.id_to_token(k) or "" for k in ids[room:]]

    def __len__(self) -> int:
        return self._core.get_vocab_size()


class CLIPTokenizer(_Tokenizer):
    """Texts to token ids: start, the text, end, then padding up to `model_max_length`."""

    files = FILES

    def __init__(self, core: Tokenizer, *, length: int, pad: str, source: Path) -> None:
        super().__init__(core, length=length, pad=pad, end=END, source=source)
        self.start = core.get_vocab()[START]

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> CLIPTokenizer:
        """Read vocab.json and merges.txt (or tokenizer.json) from a folder; CheckpointError where they are missing."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        vocabulary, merges = _vocabulary(path)
        config = _json(path / "tokenizer_config.json")
        special = _json(path / "special_tokens_map.json")
        length = config.get("model_max_length", 77)
        pad = _text(special.get("pad_token") or config.get("pad_token") or END)
        for token in (START, END, pad):
            if token not in vocabulary:
                raise CheckpointError(f"The tokenizer in {path} does not know its own token {token!r}.")
        core = Tokenizer(_model(vocabulary, merges, path))
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

    def cut(self, text: str) -> str:
        """The part of a text that does not fit; "" if all of it does."""
        tokens = self._lost(text, self.model_max_length - 2)
        return self._core.decoder.decode(tokens).replace("</w>", " ").strip() if tokens else ""


class _Unigram(NamedTuple):
    """What a folder says about a unigram model."""

    scores: list[tuple[str, float]]  # pieces by id
    characters: bytes | None  # table of characters to replace
    added: list[AddedToken]  # further tokens, by id


class T5Tokenizer(_Tokenizer):
    """Texts to token ids: the text, end, then padding."""

    files = ("spiece.model", "added_tokens.json", *FILES[2:])

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> T5Tokenizer:
        """Read tokenizer.json or spiece.model from a folder; CheckpointError where both are missing."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        config = _json(path / "tokenizer_config.json")
        special = config | _json(path / "special_tokens_map.json")
        unigram = _unigram(path, config)
        known = [piece for piece, _ in unigram.scores] + [token.content for token in unigram.added]
        usual = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        pad, end, unknown = (_text(special.get(name) or token) for name, token in usual.items())
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


class GemmaTokenizer(_Tokenizer):
    """Texts to token ids: start, the text, then padding."""

    start: list[int]  # what all texts begin with
    files = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> GemmaTokenizer:
        """Read tokenizer.json from a folder; CheckpointError where it is missing or damaged."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        config = _json(path / "tokenizer_config.json")
        if not (path / "tokenizer.json").is_file():
            raise CheckpointError(f"{path} has no tokenizer.json.")
        try:
            core = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # whatever the library raises
            raise CheckpointError(f"The tokenizer in {path} is damaged: {error}.") from None
        core.no_truncation()
        core.no_padding()
        usual = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
        pad, end, start = (_text(config.get(name) or token) for name, token in usual.items())
        for token in (pad, end, start):
            if core.token_to_id(token) is None:
                raise CheckpointError(f"The tokenizer in {path} does not know its own token {token!r}.")
        length = config.get("model_max_length", 8192)
        made = cls(core, length=length if 0 < length < 10**6 else 8192, pad=pad, end=end, source=path)
        first = [core.get_vocab()[start]]
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
        return [*self.start, *self._core.encode(_encodable(text), add_special_tokens=False).ids]


class BertTokenizer(_Tokenizer):
    """Texts to token ids: start, the text's words or their parts, end, then padding."""

    files = ("vocab.txt", *FILES[2:])

    def __init__(self, core: Tokenizer, *, length: int, pad: str, end: str, source: Path, start: str) -> None:
        super().__init__(core, length=length, pad=pad, end=end, source=source)
        self.start = core.get_vocab()[start]

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None) -> BertTokenizer:
        """Read tokenizer.json or vocab.txt from a folder; CheckpointError where both are missing."""
        path = Path(folder, subfolder) if subfolder else Path(folder)
        config = _json(path / "tokenizer_config.json")
        special = config | _json(path / "special_tokens_map.json")
        usual = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        unknown, start, end, pad = (_text(special.get(name) or token) for name, token in usual.items())
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
        marks = [unknown, end, pad, start, _text(special.get("mask_token") or "[MASK]")]
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
        vocabulary = _json(whole).get("model", {}).get("vocab")
        if not isinstance(vocabulary, dict):
            raise CheckpointError(f"{whole} holds no vocabulary of words.")
        return vocabulary
    if not lines.is_file():
        raise CheckpointError(f"{folder} has neither tokenizer.json nor vocab.txt.")
    return {token: k for k, token in enumerate(lines.read_text("utf-8").removesuffix("\n").split("\n"))}


class LlamaTokenizer(_Tokenizer):
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
        whole, config = _json(path / "tokenizer.json"), _json(path / "tokenizer_config.json")
        special = config | _json(path / "special_tokens_map.json")
        if not whole:
            raise CheckpointError(f"{path} has no tokenizer.json.")
        try:
            pairs: Any = [
                tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in whole["model"]["merges"]
            ]
            core = Tokenizer(models.BPE(whole["model"]["vocab"], pairs, fuse_unk=True, byte_fallback=True))
            added = _added_of_json(whole)
        except Exception as error:  # whatever the library raises
            raise CheckpointError(f"{path / 'tokenizer.json'} holds no vocabulary with merges.") from error
        scheme = "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        core.add_tokens(added)
        pad, end = (_text(special.get(name) or token) for name, token in (("pad_token", "</s>"), ("eos_token", "</s>")))
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
        for encoding in self._core.encode_batch([_encodable(text) for text in texts], add_special_tokens=False):
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


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"The text {text!r} holds half a character (a lone surrogate).") from None
    return text


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    whole = folder / "tokenizer.json"
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        return _json(folder / "vocab.json"), pairs
    if whole.is_file():
        model = _json(whole).get("model")
        if not isinstance(model, dict) or not {"vocab", "merges"} <= model.keys():
            raise CheckpointError(f"{whole} holds no vocabulary with merges.")
        return model["vocab"], [
            tuple(pair.split()) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]
        ]
    raise CheckpointError(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json.")


def _model(vocabulary: dict[str, int], merges: list[tuple[str, ...]], folder: Path) -> models.BPE:
    odd = [pair for pair in merges if len(pair) != 2 or "".join(pair) not in vocabulary]
    if odd:
        raise CheckpointError(
            f"The vocabulary in {folder} (vocab.json) lacks the merge {' '.join(odd[0])!r} (merges.txt)."
        )
    try:
        pairs: Any = merges
        return models.BPE(vocabulary, pairs, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END)
    except Exception as error:  # whatever the library raises
        raise CheckpointError(f"The tokenizer in {folder} is damaged: {error}.") from None


def _unigram(folder: Path, config: dict[str, Any]) -> _Unigram:
    whole, pieces = folder / "tokenizer.json", folder / "spiece.model"
    try:
        if whole.is_file():
            return _unigram_of_json(whole, _json(whole))
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
    added += [AddedToken(_text(token), normalized=False, special=True) for token in _added(config)]
    return _Unigram([(piece.text, piece.score) for piece in read.pieces], read.characters, added)


def _added(config: dict[str, Any]) -> list[Any]:
    """Tokens after the pieces: those that the configuration lists, or T5's marks for what is left out."""
    listed = {int(k): token for k, token in config.get("added_tokens_decoder", {}).items()}
    if listed:
        return [listed[k] for k in sorted(listed)]
    marks = config.get("additional_special_tokens") or config.get("extra_special_tokens")
    return marks or [f"<extra_id_{k}>" for k in reversed(range(config.get("extra_ids", 100)))]


def _unigram_of_json(file: Path, content: dict[str, Any]) -> _Unigram:
    model = content["model"]
    if not isinstance(model["vocab"], list):
        raise CheckpointError(f"{file} holds no unigram model.")
    added = _added_of_json(content)
    normalizer = content.get("normalizer") or {}
    tables = [part.get("precompiled_charsmap") for part in normalizer.get("normalizers", [normalizer])]
    table = next((base64.b64decode(each) for each in tables if each), None)
    return _Unigram([(piece, score) for piece, score in model["vocab"]], table, added)


def _added_of_json(content: dict[str, Any]) -> list[AddedToken]:
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = sorted(content["added_tokens"], key=lambda token: token["id"])
    return [AddedToken(**{flag: token[flag] for flag in flags}) for token in tokens]


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError:
        raise CheckpointError(f"{file} is not valid JSON.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold an object.")
    return content


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token
