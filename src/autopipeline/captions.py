"""Cleaning of prompts for networks whose training captions were cleaned so: those of DeepFloyd and of PixArt."""

from __future__ import annotations

import html
import importlib.util
import re
import warnings
from urllib.parse import unquote_plus

_DOMAIN = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FORMATS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

_ADDRESSES = tuple(rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})" for scheme in ("https?", "www"))
_SIGNS = (
    (r"@\w+\b", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # ideographs, and the signs in front of them
    (
        "[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
        "\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?|&amp", ""),
    (r"(?:\d{1,3}\.){3}\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FORMATS})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    ("[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\\[\\]{}|\\\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_PHRASES = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # numbers of articles
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FORMATS})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # so many by so many
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"""^["']([\w\W]+)["']$""", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def prepared(texts: list[str], clean: bool) -> list[str]:
    """Texts in lower case without space around them or, with `clean`, rid of what is no description of a picture.

    Cleaning needs beautifulsoup4 and ftfy: without them a warning says so, and the texts are not cleaned.
    """
    missing = [name for name in ("bs4", "ftfy") if importlib.util.find_spec(name) is None] if clean else []
    if missing:
        packages = " and ".join("beautifulsoup4" if name == "bs4" else name for name in missing)
        warnings.warn(
            f"clean_caption needs {packages} (the extra `captions`), so the prompts are not cleaned.", stacklevel=2
        )
    if missing or not clean:
        return [text.lower().strip() for text in texts]
    return [cleaned(cleaned(text)) for text in texts]


def mended(text: str) -> str:
    """A text whose characters were read in a wrong encoding, or escaped as in HTML, as it was meant."""
    import ftfy  # type: ignore[import-not-found]

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def cleaned(text: str, markup: bool = True) -> str:
    """A caption without addresses, markup, numbers of articles and the like; as DeepFloyd's data were cleaned.

    Without `markup`, angle brackets are left alone; as Photoroom's data were cleaned.
    """
    text = unquote_plus(text).strip().lower().replace("<person>", "person")
    for address in _ADDRESSES:
        text = re.sub(address, "", text)
    if markup:
        import bs4  # type: ignore[import-not-found]

        text = bs4.BeautifulSoup(text, "html.parser").text
    text = _replaced(text, _SIGNS)
    if len(re.findall("[-_]", text)) > 3:
        text = re.sub("[-_]", " ", text)
    text = mended(text)
    return _replaced(text if markup else text.strip(), _PHRASES).strip()


def _replaced(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, by in rules:
        text = re.sub(pattern, by, text)
    return text
