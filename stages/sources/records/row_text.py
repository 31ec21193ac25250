"""Rows as canonical JSON, made of Arrow columns at once: the same bytes as `canonical_json` gives row by row."""

from collections.abc import Iterable, Sequence

# pyarrow makes its functions when it is imported.
# pyright: reportAttributeAccessIssue=false
import numpy as np
import pyarrow as pa
import pyarrow.compute as arrow

from pipeline.fingerprint import canonical_json

_IS_ESCAPED = bytes(byte < 32 or byte in b'"\\' for byte in range(256))
_LARGE = pa.large_string()


class NotColumnar(Exception):
    """A column cannot be judged as a whole: its cells are to be read one by one."""


def texts(column: pa.Array) -> pa.Array:
    """The cells of a column of text or UTF-8 bytes as large strings, NULL as it is.

    Raises:
        NotColumnar: it is of another type, or not UTF-8.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return texts(column.cast(kind.value_type))
    if pa.types.is_null(kind):
        return pa.nulls(len(column), _LARGE)
    if not (_is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise NotColumnar
    try:
        column.validate(full=True)
        return column.cast(_LARGE)
    except pa.ArrowInvalid as error:
        raise NotColumnar from error


def keys(column: pa.Array) -> pa.Array:
    """The cells of a column of keys: text or integers; NULL as it is.

    Raises:
        NotColumnar: it is of another type, or not UTF-8.
    """
    return column.cast(_LARGE) if pa.types.is_integer(column.type) else texts(column)


def encoded(texts: Iterable[str | None]) -> pa.Array:
    """Texts as large strings, NULL as it is; surrogates, which stand for what is not UTF-8, as three bytes each."""
    data = [None if text is None else text.encode("utf-8", "surrogatepass") for text in texts]
    return pa.array(data, pa.large_binary()).view(_LARGE)


def decoded(column: pa.Array) -> list[str]:
    """The texts of a column without NULL that `encoded` may have made."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        cells = column.view(pa.large_binary()).to_pylist()
        return [cell.decode("utf-8", "surrogatepass") for cell in cells]


def captions_json(column: pa.Array) -> "list[pa.Array | str]":
    """A list of captions in JSON for each cell of a column of text, or of lists of text, in parts to be joined.

    Raises:
        NotColumnar: it is of another type, not UTF-8, or a list holds NULL.
    """
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        items = texts(column.flatten())
        if items.null_count:
            raise NotColumnar
        offsets = np.concatenate(([0], np.cumsum(_lengths(column)))).astype(np.int64)
        quoted = pa.LargeListArray.from_arrays(pa.array(offsets), join('"', escape(items), '"'))
        return ["[", arrow.binary_join(quoted, pa.scalar(",", _LARGE)), "]"]
    column = texts(column)
    if not column.null_count:
        return ['["', escape(column), '"]']
    return [arrow.fill_null(join('["', escape(column), '"]'), pa.scalar("[]", _LARGE))]


def _lengths(column: pa.Array) -> np.ndarray:
    return arrow.fill_null(arrow.list_value_length(column), 0).to_numpy(zero_copy_only=False)


def escape(column: pa.Array) -> pa.Array:
    """Each text as it is within a string of JSON, with the escapes that Python's `json` chooses."""
    offsets = _offsets(column)
    data = bytes(memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    places = np.flatnonzero(np.frombuffer(data.translate(_IS_ESCAPED), bool))
    if not len(places):
        return column
    rows = np.unique(np.searchsorted(offsets - offsets[0], places, side="right") - 1)
    if len(rows) * 8 < len(column):
        mask = np.zeros(len(column), bool)
        mask[rows] = True
        changed = [canonical_json(text)[1:-1] for text in decoded(column.take(pa.array(rows)))]
        return arrow.replace_with_mask(column, pa.array(mask), pa.array(changed, _LARGE))
    found = {data[place] for place in places}
    for byte in sorted(found, key=lambda byte: byte != ord("\\")):  # what it escapes may hold one
        column = arrow.replace_substring(column, chr(byte), canonical_json(chr(byte))[1:-1])
    return column


def numbers(values: np.ndarray, digits: int) -> pa.Array:
    """Whole numbers with at least so many digits."""
    counted = pa.array(values, pa.int64()).cast(_LARGE)
    return arrow.utf8_lpad(counted, digits, "0")


def booleans(values: Sequence[bool]) -> "pa.Array | str":
    """JSON of booleans; one text if all are false."""
    if not any(values):
        return "false"
    return arrow.if_else(pa.array(values, pa.bool_()), pa.scalar("true", _LARGE), pa.scalar("false", _LARGE))


def join(*parts: "pa.Array | str") -> pa.Array:
    """Texts of each row one behind the other; NULL where a part is."""
    scalars = [pa.scalar(part, _LARGE) if isinstance(part, str) else part for part in parts]
    return arrow.binary_join_element_wise(*scalars, pa.scalar("", _LARGE))


class RowTexts:
    """The canonical JSON of rows, each followed by a comma, in one buffer."""

    def __init__(self, column: pa.Array):
        """
        Args:
            column: large strings or large binary, none of them NULL.
        """
        buffers = column.buffers()
        self._offsets = _offsets(column)
        self._data = memoryview(buffers[2] or b"")
        self.num_rows = len(column)

    @classmethod
    def of(cls, rows: Iterable[object]) -> "RowTexts":
        """Of JSON values."""
        encoded = [f"{canonical_json(row)},".encode("utf-8", "surrogatepass") for row in rows]
        return cls(pa.array(encoded, pa.large_binary()))

    def between(self, first: int, end: int) -> memoryview:
        """The text of some rows, with a comma behind the last."""
        return self._data[self._offsets[first] : self._offsets[end]]


def list_text(pieces: Iterable[memoryview]) -> bytes:
    """The canonical JSON of a list whose rows are in these pieces."""
    text = b"".join((b"[", *pieces))
    return (text[:-1] if len(text) > 1 else text) + b"]"


def _offsets(column: pa.Array) -> np.ndarray:
    """Where each text of a column of large ones begins in its buffer, and the end of the last."""
    buffer = column.buffers()[1]
    if buffer is None or not buffer.size:
        return np.zeros(1, np.int64)
    return np.frombuffer(buffer, np.int64)[column.offset : column.offset + len(column) + 1]


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
