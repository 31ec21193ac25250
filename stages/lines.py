"""Lines of text files: they end at line feeds only, as editors and other tools count them."""

from collections.abc import Iterator
from io import TextIOWrapper
from typing import IO

_UTF16 = ("\udcff\udcfe", "\udcfe\udcff")
"""Its byte order marks, read as UTF-8."""


def split_lines(data: bytes, errors: str = "surrogateescape") -> list[str]:
    r"""The lines of a UTF-8 text, without their ends (`\n` or `\r\n`).

    U+2028, U+0085, vertical tab, form feed and a lone carriage return are characters of a line. A byte order mark is
    left out.

    Args:
        errors: what bytes that are not UTF-8 become, as in `bytes.decode`.
    """
    lines = data.decode("utf-8-sig", errors).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def stream_lines(file: IO[bytes]) -> Iterator[str]:
    """The lines of a file with their ends, as `split_lines` splits them, without holding the file.

    Raises:
        ValueError: the file is UTF-16.
    """
    reader = TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    for number, line in enumerate(reader):
        if number == 0 and line.startswith(_UTF16):
            raise ValueError("its text is UTF-16, not UTF-8")
        yield line
