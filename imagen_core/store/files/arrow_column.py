"""Columns of Python values as Arrow arrays, and numbers of Arrow as NumPy, without pandas.

`pa.array` and `to_numpy` import pandas, where it is installed, though none of its objects is there: 0.15 to 0.2 s of
processor time in each worker process, with the first file that it reads or writes.
"""

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

_NUMBERS = {pa.int32(): "i", pa.int64(): "q", pa.uint64(): "Q", pa.float64(): "d"}
"""Their codes in the standard library's `array`, which refuses what does not fit."""
_MOST_BYTES = 2**31 - 1
"""Of the values of an Arrow array of strings, whose offsets are int32."""


def arrow_column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """`pa.array(values, kind)`: text, bytes, numbers, booleans and lists of these, None as NULL.

    Raises:
        TypeError, OverflowError: a number is of another type, or too large.
        ValueError: bytes of a fixed number are not so many.
        UnicodeEncodeError: a text has surrogates.
        AttributeError: a text is none.
    """
    missing = [value is None for value in values]
    validity = _bits([not lacks for lacks in missing]) if any(missing) else None
    if kind in _NUMBERS:
        numbers = [0 if value is None else value for value in values] if validity else values
        return pa.Array.from_buffers(kind, len(values), [validity, pa.py_buffer(array(_NUMBERS[kind], numbers))])
    if pa.types.is_boolean(kind):
        return pa.Array.from_buffers(kind, len(values), [validity, _bits([bool(value) for value in values])])
    if pa.types.is_list(kind):
        filled = [() if value is None else value for value in values]
        children = [arrow_column([item for value in filled for item in value], kind.value_type)]
        return pa.Array.from_buffers(kind, len(values), [validity, _offsets(map(len, filled))], children=children)
    if pa.types.is_string(kind):
        data = [b"" if value is None else value.encode() for value in values]
    elif pa.types.is_fixed_size_binary(kind):
        data = [bytes(kind.byte_width) if value is None else value for value in values]
        if any(len(value) != kind.byte_width for value in data):
            raise ValueError(f"each value must have {kind.byte_width} bytes")
        return pa.Array.from_buffers(kind, len(values), [validity, pa.py_buffer(b"".join(data))])
    elif pa.types.is_binary(kind):
        data = [b"" if value is None else value for value in values]
    else:
        return pa.array(values, kind)
    if sum(map(len, data)) > _MOST_BYTES:
        return pa.array(values, kind)
    return pa.Array.from_buffers(kind, len(values), [validity, _offsets(map(len, data)), pa.py_buffer(b"".join(data))])


def numbers_column(values: np.ndarray, valid: np.ndarray | None = None) -> pa.Array:
    """`pa.array` of numbers (n,), as int64 or float64; NULL where `valid`, bool (n,), is false."""
    is_float = values.dtype.kind == "f"
    values = np.ascontiguousarray(values, np.float64 if is_float else np.int64)
    validity = None if valid is None else _bits(valid)
    kind = pa.float64() if is_float else pa.int64()
    return pa.Array.from_buffers(kind, len(values), [validity, pa.py_buffer(values)])


def as_numpy(numbers: pa.Array) -> np.ndarray:
    """Integers without NULL, as a read-only view."""
    kind = np.dtype(str(numbers.type))
    data = numbers.buffers()[1]
    if data is None:
        return np.empty(0, kind)
    return np.frombuffer(data, kind, len(numbers), numbers.offset * kind.itemsize)


def _offsets(lengths: Any) -> pa.Buffer:
    return pa.py_buffer(array("i", accumulate(lengths, initial=0)))


def _bits(values: Sequence[bool] | np.ndarray) -> pa.Buffer:
    return pa.py_buffer(np.packbits(np.array(values, np.bool_), bitorder="little"))
