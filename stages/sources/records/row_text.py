"""Rows as canonical JSON, made of Arrow columns at once: the same bytes as `canonical_json` gives row by row."""

from collections.abc import Iterable, Sequence

# pyarrow makes its functions when it is imported.
# pyright: reportAttributeAccessIssue=false
import numpy as np
import pyarrow as pa
import pyarrow.compute as arrow

from pipeline.fingerprint import canonical_json

_IS_ESCAPED = bytes(byte < 32 or byte in b'"\\' for byte in range(256))
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
"""Text that is one, without white space around it."""
_LARGE = pa.large_string()
# pa.array and pa.scalar import pandas where it is installed (0.6 s), which lists do not need: buffers do not.


def whole_numbers(values: np.ndarray) -> pa.Array:
    """An array of int64."""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values.astype(np.int64))])


def text_array(texts: Sequence[str]) -> pa.Array:
    """An array of large strings, without what `pa.array` imports; surrogates are three bytes each."""
    data = [text.encode("utf-8", "surrogatepass") for text in texts]
    offsets = np.concatenate(([0], np.cumsum([len(each) for each in data]))).astype(np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(data))]
    return pa.Array.from_buffers(_LARGE, len(data), buffers)


def text_scalar(text: str) -> pa.Scalar:
    """A large string."""
    return text_array([text])[0]


def _mask(values: np.ndarray) -> pa.Array:
    """An array of booleans."""
    bits = np.packbits(values.astype(np.bool_), bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])


_EMPTY, _SEPARATOR = text_scalar(""), text_scalar(",")


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
        quoted = pa.LargeListArray.from_arrays(whole_numbers(offsets), join('"', escape(items), '"'))
        return ["[", arrow.binary_join(quoted, _SEPARATOR), "]"]
    column = texts(column)
    if not column.null_count:
        return ['["', escape(column), '"]']
    return [arrow.fill_null(join('["', escape(column), '"]'), text_scalar("[]"))]


def kept_json(columns: Sequence[tuple[str, str, pa.Array]]) -> pa.Array:
    """A JSON object of each row of some columns; see `kept_values`, which reads them one by one.

    Args:
        columns: name, type (`bool`, `int`, `float` or `text`) and cells of each.
    Raises:
        NotColumnar: a column is of another type, or has cells that can only be judged one by one.
    """
    parts: list[pa.Array | str] = []
    for name, kind, cells in sorted(columns, key=lambda column: column[0]):
        parts += ["," if parts else "{", f"{canonical_json(name)}:", _cells_json(kind, cells)]
    return join(*parts, "}")


def _cells_json(kind: str, cells: pa.Array) -> pa.Array:
    if kind == "text":
        found = join('"', escape(texts(cells)), '"')
    elif kind == "float":
        return _floats_json(cells)
    elif kind == "int" and pa.types.is_signed_integer(cells.type):
        found = cells.cast(_LARGE)
    elif kind == "bool" and pa.types.is_boolean(cells.type):
        found = arrow.if_else(cells, text_scalar("true"), text_scalar("false"))
    else:
        raise NotColumnar
    return arrow.fill_null(found, text_scalar("null"))


def _floats_json(cells: pa.Array) -> pa.Array:
    if _is_string(cells.type):
        trimmed = arrow.utf8_trim_whitespace(cells)
        trimmed = arrow.if_else(arrow.equal(trimmed, _EMPTY.cast(trimmed.type)), pa.nulls(1, trimmed.type)[0], trimmed)
        is_number = arrow.match_substring_regex(trimmed, NUMBER)
        if arrow.all(is_number).as_py() is False:
            raise NotColumnar
        cells = trimmed
    elif not (pa.types.is_floating(cells.type) or pa.types.is_signed_integer(cells.type)):
        raise NotColumnar
    try:
        numbers = cells.cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise NotColumnar from error
    if arrow.any(arrow.is_inf(numbers)).as_py():
        raise NotColumnar
    return text_array(["null" if value is None or value != value else repr(value) for value in numbers.to_pylist()])


def _lengths(column: pa.Array) -> np.ndarray:
    return arrow.fill_null(arrow.list_value_length(column), 0).to_numpy(zero_copy_only=False)


def escape(column: pa.Array) -> pa.Array:
    """Each text as it is within a string of JSON, with the escapes that Python's `json` chooses."""
    offsets = _offsets(column)
    data = bytes(memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    places = np.flatnonzero(np.frombuffer(data.translate(_IS_ESCAPED), bool))
    if not len(places):
        return column
    found = np.flatnonzero(np.bincount(np.frombuffer(data, np.uint8)[places])).tolist()
    begins = offsets - offsets[0]
    if set(found) <= set(b'"\\') and not column.null_count:  # each of them grows by one byte
        data = data.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
        moved = begins + np.searchsorted(places, begins)
        return pa.Array.from_buffers(_LARGE, len(column), [None, pa.py_buffer(moved), pa.py_buffer(data)])
    rows = np.unique(np.searchsorted(begins, places, side="right") - 1)
    if len(rows) * 8 < len(column):
        mask = np.zeros(len(column), bool)
        mask[rows] = True
        changed = [canonical_json(text)[1:-1] for text in decoded(column.take(whole_numbers(rows)))]
        return arrow.replace_with_mask(column, _mask(mask), text_array(changed))
    for byte in sorted(found, key=lambda byte: byte != ord("\\")):  # what it escapes may hold one
        column = arrow.replace_substring(column, chr(byte), canonical_json(chr(byte))[1:-1])
    return column


def numbers(values: np.ndarray, digits: int) -> pa.Array:
    """Whole numbers with at least so many digits."""
    counted = whole_numbers(values).cast(_LARGE)
    return arrow.utf8_lpad(counted, digits, "0")


def booleans(values: Sequence[bool]) -> "pa.Array | str":
    """JSON of booleans; one text if all are false."""
    if not any(values):
        return "false"
    return arrow.if_else(_mask(np.array(values)), text_scalar("true"), text_scalar("false"))


def join(*parts: "pa.Array | str") -> pa.Array:
    """Texts of each row one behind the other; NULL where a part is."""
    scalars = [text_scalar(part) if isinstance(part, str) else part for part in parts]
    return arrow.binary_join_element_wise(*scalars, _EMPTY)


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
        return cls(text_array([f"{canonical_json(row)}," for row in rows]))

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
