"""Structs of Thrift's compact protocol, in which a parquet file describes itself.

A struct is a dict from the numbers of its fields to (type, value), a list (type of its elements, values).
Source: thrift-compact-protocol.md of Apache Thrift.
"""

from typing import Any

TRUE, FALSE, I32, I64, BINARY, LIST, STRUCT = 1, 2, 5, 6, 8, 9, 12
_BYTE, _I16, _DOUBLE = 3, 4, 7
Struct = dict[int, tuple[int, Any]]


def read_struct(data: bytes) -> Struct:
    """The struct that these bytes begin with.

    Raises:
        ValueError: it has a value of another type than those above.
    """
    return _Reader(data).struct()


class _Reader:
    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def _take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _int(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def struct(self) -> Struct:
        fields: Struct = {}
        number = 0
        while head := self._take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self._int()
            fields[number] = head & 15, self._value(head & 15)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind in (_I16, I32, I64):
            return self._int()
        if kind == BINARY:
            return self._take(self._varint())
        if kind == STRUCT:
            return self.struct()
        if kind == LIST:
            head = self._take(1)[0]
            count = self._varint() if head >> 4 == 15 else head >> 4
            return head & 15, [self._value(head & 15) for _ in range(count)]
        if kind in (_BYTE, _DOUBLE):
            return self._take(1 if kind == _BYTE else 8)
        raise ValueError(f"a Thrift value of type {kind}")


def struct_bytes(fields: Struct) -> bytes:
    """The bytes of a struct."""
    parts = []
    previous = 0
    for number, (kind, value) in sorted(fields.items()):
        step = number - previous
        parts.append(bytes((step << 4 | kind,)) if step < 16 else bytes((kind,)) + _int_bytes(number))
        parts.append(_value_bytes(kind, value))
        previous = number
    return b"".join(parts) + b"\0"


def _value_bytes(kind: int, value: Any) -> bytes:
    if kind in (TRUE, FALSE):
        return b""
    if kind in (_I16, I32, I64):
        return _int_bytes(value)
    if kind == BINARY:
        return varint_bytes(len(value)) + value
    if kind == STRUCT:
        return struct_bytes(value)
    if kind == LIST:
        of, values = value
        head = bytes((len(values) << 4 | of,)) if len(values) < 15 else bytes((0xF0 | of,)) + varint_bytes(len(values))
        return head + b"".join(_value_bytes(of, each) for each in values)
    return value


def varint_bytes(value: int) -> bytes:
    """A number from 0 in groups of seven bits."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _int_bytes(value: int) -> bytes:
    return varint_bytes(value << 1 ^ value >> 63)
