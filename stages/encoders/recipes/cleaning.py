"""Named rules that change a caption before it is put into a template."""

import html
import re
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pipeline.errors import MachineError

CleaningName = Literal["lower", "strip", "whitespace", "ftfy", "html", "deepfloyd", "prx"]

_EXTRA = "pip install ftfy beautifulsoup4"
_NEEDS: dict[str, tuple[str, ...]] = {"ftfy": ("ftfy",), "deepfloyd": ("ftfy", "beautifulsoup4"), "prx": ("ftfy",)}
_MODULES = {"beautifulsoup4": "bs4"}
_MARKS = re.compile(r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+")
_CJK = re.compile("[\u31c0-\u31ff\u3200-\u4dff\u4e00-\u9fff]+")
_DASHES = re.compile(
    "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
    "\ufe63\uff0d]+"
)
_SITE = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_ADDRESSES = [
    (r"<person>", "person"),
    (rf"\b((?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITE}))", ""),
    (rf"\b((?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITE}))", ""),
]
_PRX_ADDRESSES = [
    (r"<person>", "person"),
    (rf"\b((?:https?|www):(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITE})", ""),
]
_BEFORE_QUOTES = [
    (r"@[\w\d]+\b", ""),
    (_CJK, ""),
    (_DASHES, "-"),
]
_QUOTES = [(r"[`´«»“”¨]", '"'), (r"[‘’]", "'")]
_PRX_QUOTES = [(r"[`´«»¨]", '"')]
_BEFORE_REPAIR = [
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILE_TYPES})", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (_MARKS, " "),
    (r"\s+\.\s+", " "),
]
_AFTER_REPAIR = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
]


def check_cleaning(names: Sequence[str], where: str) -> None:
    """Refuses rules whose packages are not installed.

    Raises:
        MachineError: names the package and how to install it.
    """
    for name in names:
        for package in _NEEDS.get(name, ()):
            _module(_MODULES.get(package, package), f"{where}: {name}")


def packages(names: Sequence[str]) -> list[str]:
    """The packages that decide what these rules do."""
    return sorted({package for name in names for package in _NEEDS.get(name, ())})


def clean(caption: str, names: Sequence[str]) -> str:
    """The caption after the rules, in their order."""
    for name in names:
        caption = _RULES[name](caption)
    return caption


def _repaired(caption: str) -> str:
    """Mojibake and other damage of encodings repaired by ftfy."""
    return _module("ftfy", "cleaning").fix_text(caption)


def _unescaped(caption: str) -> str:
    """HTML entities as their characters, also those that were escaped twice; ends stripped."""
    return html.unescape(html.unescape(caption)).strip()


def _deepfloyd(caption: str) -> str:
    """The cleaning that DeepFloyd IF was trained with, which its pipelines apply twice.

    Removes addresses, tags, ideographs, file names, long numbers, words of letters and digits, and words of shops.
    """
    for _ in range(2):
        caption = _replaced(urllib.parse.unquote_plus(caption).strip().lower(), _ADDRESSES)
        caption = _module("bs4", "cleaning").BeautifulSoup(caption, features="html.parser").text
        caption = _without_noise(caption, _QUOTES, str)
    return caption


def _prx(caption: str) -> str:
    """The cleaning of PRX: much as DeepFloyd's, applied once, with tags left in."""
    caption = _replaced(urllib.parse.unquote_plus(caption).strip().lower(), _PRX_ADDRESSES)
    return _without_noise(caption, _PRX_QUOTES, str.strip)


def _without_noise(caption: str, quotes: Sequence[tuple[str, str]], ends: Callable[[str], str]) -> str:
    caption = _replaced(caption, [*_BEFORE_QUOTES, *quotes, *_BEFORE_REPAIR])
    if len(re.findall(r"[-_]", caption)) > 3:
        caption = re.sub(r"[-_]", " ", caption)
    caption = html.unescape(html.unescape(_repaired(caption)))
    return _replaced(ends(caption), _AFTER_REPAIR).strip()


def _replaced(caption: str, rules: Sequence[tuple[Any, str]]) -> str:
    for pattern, replacement in rules:
        caption = re.sub(pattern, replacement, caption)
    return caption


def _module(name: str, where: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        package = next((package for package, module in _MODULES.items() if module == name), name)
        raise MachineError(f"{where} needs the package {package}, which is not installed; {_EXTRA}") from error


_RULES: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "strip": str.strip,
    "whitespace": lambda caption: re.sub(r"\s+", " ", caption).strip(),
    "ftfy": _repaired,
    "html": _unescaped,
    "deepfloyd": _deepfloyd,
    "prx": _prx,
}
