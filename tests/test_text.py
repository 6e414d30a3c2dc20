"""Our tokenizer gives the ids that transformers' gives, whatever the text."""

from __future__ import annotations

import json
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from autopipeline import CheckpointError, prompts
from autopipeline.text import CLIPTokenizer, clip

transformers = pytest.importorskip("transformers")

CORPUS = (
    "a photograph of an astronaut riding a horse on the moon in the style of a painting by an old master , a red cat "
    "the cats cat 's café naïve über straße москва 東京 1 2 3 !!! ... --- ??? i 'm you 're we 've they 'll he 'd isn 't"
)
END, START = "<|endoftext|>", "<|startoftext|>"
TEXTS = {
    "plain": "a red cat on the moon",
    "empty": "",
    "spaces": "   \t\n  ",
    "whitespace": "a\tred\n\ncat\r\n on \u00a0 the\u2003moon\u200bx\x0b\x0cy\x85z\u2028w  ",
    "upper": "A RED Cat ON THE MOON, İstanbul ẞ ΑΣ ǅ",
    "contractions": "I'm you're we've they'll he'd isn't it's 's ' 't cats' IT'S DON'T o'clock 'sup",
    "typographic": "it’s “quoted” — an ellipsis… ‹x›",
    "numbers": "1234567890 3.14 1,000,000 2nd x2y 1e-5 ½ ² Ⅳ ٣ ๓",
    "punctuation": '!!! ??? ... --- ,,, (((red))) [cat:1.2] {moon|sun} a.b,c;d:e/f\\g_h@i#j$k%l^m&n*o+p=q~r`s"t<u>v',
    "entities": "&lt;b&gt; &amp;amp; &quot;red&quot; &#39;cat&#39; &nbsp; <b>bold</b>",
    "emoji": "🙂 😀😃 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️ ☃",
    "cjk": "東京の赤い猫 红色的猫 빨간 고양이 ｆｕｌｌ　ｗｉｄｔｈ",
    "scripts": "красная кошка γάτα قطة حمراء חתול लाल बिल्ली แมวสีแดง",
    "combining": "cafe\u0301 café A\u030a Å ﬁ ﬀ e\u0301\u0302\u0323",
    "controls": "a\x00b\x01c\x7fd\ufeffe\ufffdf",
    "private": "\ue000 \U0010ffff \U000e0041 𝔯𝔢𝔡 𝕔𝕒𝕥",
    "specials": f"red {END} cat{START}moon <|ENDOFTEXT|> <|endof text|> <|endoftext",
    "bang": "red! cat !moon a!b !",
    "underscores": "snake_case __init__ a_b",
    "long word": "photograph" * 30,
    "long": "a red cat, " * 40,
    "exactly": "red " * 75,
    "one more": "red " * 76,
    "long emoji": "🙂" * 60,
    "newlines": "red\n\n\ncat\nmoon",
}
SPECIAL = dict(bos_token=START, eos_token=END, unk_token=END)


def learned() -> list[tuple[str, str]]:
    """Merges as byte-pair encoding learns them from CORPUS (Sennrich et al. 2016)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    words = [tuple(letters[b] for b in word.encode()) for word in CORPUS.lower().split()]
    words = [(*word[:-1], word[-1] + "</w>") for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < 250:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = [joined(word, best) for word in words]
    return merges


def joined(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    parts = list(word)
    k = 0
    while k < len(parts) - 1:
        if (parts[k], parts[k + 1]) == pair:
            parts[k : k + 2] = ["".join(pair)]
        k += 1
    return tuple(parts)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a tokenizer whose padding is `pad`, said in either file or both."""
    merges = learned()

    def make(config_pad: Any = END, special_pad: Any = END, **config: Any) -> Path:
        folder = tiny.tokenizer_files(tmp_path_factory.mktemp("tokenizer"))
        letters = [token for token in json.loads((folder / "vocab.json").read_text()) if len(token) in (1, 5)]
        tokens = [token for token in letters if len(token) == 1 or token.endswith("</w>")]
        tokens += [*dict.fromkeys("".join(pair) for pair in merges), START, END]
        (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}), "utf-8")
        lines = ["#version: 0.2", *map(" ".join, merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
        for name, pad, more in (
            ("tokenizer_config", config_pad, dict(tokenizer_class="CLIPTokenizer", model_max_length=77) | config),
            ("special_tokens_map", special_pad, {}),
        ):
            content = SPECIAL | ({} if pad is None else {"pad_token": pad}) | more
            (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
        return folder

    return make


@pytest.fixture(scope="module")
def both(files: Callable[..., Path]) -> tuple[Any, CLIPTokenizer]:
    folder = files()
    return transformers.CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)


def peers_ids(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    return tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids


def test_the_vocabulary_is_a_real_one() -> None:
    merges = learned()
    assert len(merges) == 250 or len(set(merges)) == len(merges) > 100
    assert {"photograph</w>", "moon</w>", "cat</w>"} <= {"".join(pair) for pair in merges}


@pytest.mark.parametrize("name", TEXTS)
def test_same_ids(both: tuple[Any, CLIPTokenizer], name: str) -> None:
    peer, ours = both
    ids = ours([TEXTS[name]])
    assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (1, 77))
    assert ids.tolist() == peers_ids(peer, [TEXTS[name]]).tolist()


def test_a_batch_is_its_singles(both: tuple[Any, CLIPTokenizer]) -> None:
    peer, ours = both
    texts = list(TEXTS.values())
    assert torch.equal(ours(texts), torch.cat([ours([text]) for text in texts]))
    assert torch.equal(ours(texts), peers_ids(peer, texts))
    assert len(ours) == len(peer)


@pytest.mark.parametrize("seed", range(4))
def test_random_texts(both: tuple[Any, CLIPTokenizer], seed: int) -> None:
    """Any code points in any order, those that stand alone as half of a pair excepted."""
    peer, ours = both
    random = torch.Generator().manual_seed(seed)
    limits = (0x80, 0x250, 0x3000, 0x110000)
    texts: list[str] = []
    for _ in range(100):
        points = torch.randint(0, limits[seed], (20,), generator=random).tolist()
        texts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    assert torch.equal(ours(texts), peers_ids(peer, texts))


BANG = {"content": "!", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
PADS: list[tuple[Any, Any]] = [("!", "!"), (END, "!"), ("!", None), (None, "!"), (None, None), (BANG, BANG)]


@pytest.mark.parametrize(("config_pad", "special_pad"), PADS, ids=str)
def test_padding(files: Callable[..., Path], config_pad: Any, special_pad: Any) -> None:
    """Stable Diffusion 2 and XL pad with an exclamation mark, which then is a token of its own in texts too."""
    folder = files(config_pad, special_pad)
    peer, ours = transformers.CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    assert ours.pad == peer.pad_token_id
    texts = list(TEXTS.values())
    theirs = peers_ids(peer, texts)
    for text, row, expected in zip(texts, ours(texts), theirs, strict=True):
        assert row.tolist() == expected.tolist(), text


def test_a_vocabulary_in_use_is_read_once(files: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    whole = clip._model
    monkeypatch.setattr(clip, "_model", lambda folder: (read.append(folder), whole(folder))[1])
    monkeypatch.setattr(clip, "_IN_USE", weakref.WeakValueDictionary())
    first, second, other = files(), files("!", "!"), files()
    words = json.loads((other / "vocab.json").read_text("utf-8"))
    swapped = words | {"a</w>": words["b</w>"], "b</w>": words["a</w>"]}
    (other / "vocab.json").write_text(json.dumps(swapped), "utf-8")
    texts = ["a !", "b"]
    one = CLIPTokenizer.from_pretrained(first)
    ids = one(texts)
    two, three = CLIPTokenizer.from_pretrained(second), CLIPTokenizer.from_pretrained(other)
    assert read == [first, other]
    assert torch.equal(one(texts), ids)
    assert two(texts)[0, -1] == words["!"]
    assert three(texts)[0, 1] == words["b</w>"]
    del one, two
    CLIPTokenizer.from_pretrained(first)
    assert read == [first, other, first]


@pytest.mark.parametrize("length", [8, 77, 120])
def test_other_lengths(files: Callable[..., Path], length: int) -> None:
    folder = files(model_max_length=length)
    peer, ours = transformers.CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    texts = list(TEXTS.values())
    assert torch.equal(ours(texts), peers_ids(peer, texts))


def test_an_endless_length_is_the_encoders(files: Callable[..., Path]) -> None:
    """Some configurations have the largest integer there."""
    assert CLIPTokenizer.from_pretrained(files(model_max_length=int(1e30))).model_max_length == 77


def test_the_newer_file_alone(files: Callable[..., Path], tmp_path: Path) -> None:
    """tokenizer.json, as transformers saves it, without vocab.json and merges.txt."""
    folder = files("!", "!")
    peer = transformers.CLIPTokenizer.from_pretrained(folder)
    peer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    ours = CLIPTokenizer.from_pretrained(tmp_path)
    texts = list(TEXTS.values())
    assert torch.equal(ours(texts), peers_ids(peer, texts))


def test_saving(files: Callable[..., Path], both: tuple[Any, CLIPTokenizer], tmp_path: Path) -> None:
    both[1].save_pretrained(tmp_path / "saved")
    again = CLIPTokenizer.from_pretrained(tmp_path / "saved")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "saved")
    texts = list(TEXTS.values())
    assert torch.equal(again(texts), both[1](texts))
    assert torch.equal(peers_ids(theirs, texts), both[1](texts))
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(CLIPTokenizer.from_pretrained(tmp_path / "saved")(texts), both[1](texts))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("vocab.json", None, "vocab.json"),
        ("merges.txt", None, "merges.txt"),
        ("vocab.json", "{", "vocab.json"),
        ("vocab.json", "[]", "vocab.json"),
        ("vocab.json", '{"a": 0}', "startoftext"),
        ("merges.txt", "a b c\n", "merges.txt"),
        ("merges.txt", "zz qq\n", "merges.txt"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
    ],
)
def test_damaged_files_are_named(files: Callable[..., Path], name: str, content: str | None, says: str) -> None:
    folder = files()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=says) as raised:
        CLIPTokenizer.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_an_unknown_pad_is_named(files: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="<pad>"):
        CLIPTokenizer.from_pretrained(files("<pad>", "<pad>"))


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_cut(both: tuple[Any, CLIPTokenizer], name: str) -> None:
    """Nothing where the text fits; else the text of the tokens that don't."""
    peer, ours = both
    text = TEXTS[name]
    ids = peer(text, add_special_tokens=False, verbose=False).input_ids
    lost = ours.cut(text)
    assert bool(lost) == (len(ids) > 75)
    if lost and "emoji" not in name:
        assert text.lower().replace(" ", "").endswith(lost.replace(" ", ""))
        assert lost == peer.decode(ids[75:]).strip()


def test_cutting_warns_once_for_each_text_and_shows_it(both: tuple[Any, CLIPTokenizer]) -> None:
    ours = both[1]
    texts = ["red " * 74 + "cat moon horse", "a red cat", "red " * 75 + "astronaut"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = prompts.tokens(ours, texts)
    said = [str(one.message) for one in caught]
    assert len(said) == 2
    assert said[0].endswith("this part is cut: 'moon horse'")
    assert said[1].endswith("this part is cut: 'astronaut'")
    assert all("77 tokens" in text for text in said)
    assert torch.equal(ids, ours(texts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts.tokens(ours, ["red " * 75, ""])


def test_texts_with_half_a_character_are_refused(both: tuple[Any, CLIPTokenizer]) -> None:
    """Lone surrogates, as broken JSON gives them, have no encoding."""
    for read in (both[1].cut, lambda text: both[1](["red", text])):
        with pytest.raises(ValueError, match="half a character"):
            read("red \ud83d cat")
