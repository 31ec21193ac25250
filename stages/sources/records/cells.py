"""What the cells of a record mean: texts, keys and images. What is none of these is refused, never written out."""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any
from uuid import UUID

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.I)
_WHITESPACE = re.compile(r"\s+")


class BadCell(Exception):
    """A row cannot be used: one of its cells does not hold what its column is for."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        """Enumerated reason of the drop."""
        self.detail = detail


class InvalidLine(dict[str, Any]):
    """The record of a line that cannot be parsed, or of an unreadable row: every access to a cell raises BadCell."""

    def __init__(self, detail: str, reason: str = "invalid_line"):
        super().__init__()
        self.detail = detail
        self.reason = reason


def splits(path: str) -> Iterator[tuple[str, str]]:
    """The ways to read a path: a name and the path below it, the longest name first, as names may have dots."""
    yield path, ""
    end = path.rfind(".")
    while end > 0:
        yield path[:end], path[end + 1 :]
        end = path.rfind(".", 0, end)


def top_level(column: str, present: Mapping[str, Any]) -> str | None:
    """The column that a path such as `sentences.raw` begins with; None if there is none."""
    return next((name for name, _ in splits(column) if name in present), None)


def top_levels(wanted: Iterable[str], present: Sequence[str]) -> list[str]:
    """The columns that hold what is wanted, without those that do not exist."""
    found = (top_level(column, dict.fromkeys(present)) for column in wanted)
    return list(dict.fromkeys(name for name in found if name is not None))


def value_at(record: Mapping[str, Any], column: str | None) -> Any:
    """The cell of a column, or of a path into nested columns; a list on the way gives the list of what is in it.

    Raises:
        BadCell: the line could not be parsed, or the path leads into a cell without fields.
    """
    if isinstance(record, InvalidLine):
        raise BadCell(record.reason, record.detail)
    return None if column is None else _descend(record, column, column)


def captions_of(record: Mapping[str, Any], column: str | None) -> list[str]:
    """The captions in a record: the column may hold a text, a list of texts, or nothing (NULL, NaN).

    Raises:
        BadCell: it holds something else.
    """
    return list(_texts(value_at(record, column), column))


def caption_cell(record: Mapping[str, Any], column: str) -> list[str] | None:
    """The captions in a record, or None where there is something else."""
    try:
        return captions_of(record, column)
    except BadCell:
        return None


def text_of(record: Mapping[str, Any], column: str | None) -> str | None:
    """The text of a cell; bytes are read as UTF-8. None for NULL and NaN.

    Raises:
        BadCell: it holds something else.
    """
    return as_text(value_at(record, column), column)


def key_of(record: Mapping[str, Any], column: str | None) -> str | None:
    """The key in a cell: a text, a number or a UUID. None for NULL and NaN.

    Raises:
        BadCell: it holds something else.
    """
    value = value_at(record, column)
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if (is_number or isinstance(value, UUID)) and not is_nothing(value):
        return str(value)
    return as_text(value, column)


def image_of(record: Mapping[str, Any], column: str) -> tuple[bytes | None, str | None]:
    """The encoded image of a cell, or the path of its file; neither for NULL.

    The cell is bytes, text in base64, a list of the values of the bytes, or a struct with `bytes`, `path` or both, as
    `datasets` writes it.

    Raises:
        BadCell: it holds something else, or no valid base64.
    """
    value, path = value_at(record, column), None
    if isinstance(value, Mapping):
        value, path = value.get("bytes"), as_text(value.get("path"), f"{column}.path") or None
    if value is None or isinstance(value, bytes):
        return value, path if value is None else None
    if isinstance(value, str):
        return from_base64(value), None
    if isinstance(value, list):
        try:
            return bytes(value), None
        except (TypeError, ValueError) as error:
            raise BadCell("unsupported_type", f"{column!r} holds a list that is not of bytes: {error}") from error
    raise _unsupported(value, column, "an image")


def from_base64(text: str | bytes) -> bytes:
    """The bytes of base64; line ends and the beginning of a `data:` URL are left out.

    Raises:
        BadCell: it is not base64.
    """
    try:
        if isinstance(text, str):
            text = _WHITESPACE.sub("", _DATA_URL.sub("", text, count=1)).encode("ascii")
        return base64.b64decode(text, validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise BadCell("bad_base64", str(error)) from error


def as_text(value: Any, column: str | None) -> str | None:
    """A value as text; see `text_of`."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if is_nothing(value):
        return None
    raise _unsupported(value, column, "text")


def is_nothing(value: Any) -> bool:
    """True for NULL, NaN and the like."""
    return value is None or (isinstance(value, float | Decimal) and value != value)


def _texts(value: Any, column: str | None) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _texts(item, column)
    elif (text := as_text(value, column)) is not None:
        yield text


def _descend(value: Any, path: str, column: str) -> Any:
    if not path or value is None:
        return value
    if isinstance(value, list):
        return [_descend(item, path, column) for item in value]
    if not isinstance(value, Mapping):
        raise _unsupported(value, column, f"a field {path!r}")
    for name, below in splits(path):
        if name in value:
            return _descend(value[name], below, column)
    return None


def _unsupported(value: Any, column: str | None, wanted: str) -> BadCell:
    kinds = {Mapping: "a struct", list: "a list", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    found = next((name for kind, name in kinds.items() if isinstance(value, kind)), f"a {type(value).__name__}")
    return BadCell("unsupported_type", f"{column!r} holds {found}, not {wanted}")
