"""Columns of a source that the store keeps: their types, and what a cell of them may hold."""

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from imagen_core.store import OWN_COLUMNS, ColumnType, ColumnValue
from pipeline.errors import ConfigError
from stages.captions import is_valid_text
from stages.sources.records.cells import BadCell, InvalidLine, is_nothing, value_at
from stages.sources.records.types import Columns, column_type

_FIELD = "source.keep_columns"
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_BOOLEANS = {"true": True, "false": False}
_WANTED: dict[ColumnType, str] = {
    "bool": "true or false",
    "int": "a whole number of 64 bits",
    "float": "a number",
    "text": "text in UTF-8",
}

Kept = Mapping[str, ColumnType | None]
"""The columns to keep; None where the type is yet to be found."""


def as_kept(columns: object) -> object:
    """A list of columns as a mapping without types; others as they are."""
    if isinstance(columns, list | tuple):
        twice = next((name for name in columns if columns.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is named twice")
        return dict.fromkeys(columns)
    return columns


def check_names(columns: Iterable[str]) -> None:
    """Refuses names that the store cannot have.

    Raises:
        ValueError: one is empty, or that of a column which the store has by itself.
    """
    for name in columns:
        if not name.strip():
            raise ValueError("a name is empty; name a column")
        if name.lower() in OWN_COLUMNS:
            raise ValueError(f"{name!r} is a column that the store has by itself, with its own values; leave it out")


def kept_values(record: Mapping[str, Any], columns: Kept) -> dict[str, ColumnValue]:
    """The values of a record.

    Raises:
        BadCell: one is not of its column's type, or the line could not be parsed.
    """
    return {name: _value(value_at(record, name), kind or "text", name) for name, kind in columns.items()}


def _value(value: Any, kind: ColumnType, name: str) -> ColumnValue:
    if is_nothing(value) or (kind != "text" and isinstance(value, str) and not value.strip()):
        return None
    found = _READ[kind](value)
    if found is None:
        raise BadCell("unsupported_type", f"{name!r} holds {str(value)[:80]!r}, not {_WANTED[kind]}")
    return found


def _bool(value: Any) -> bool | None:
    return _BOOLEANS.get(value.strip().lower()) if isinstance(value, str) else value if _is_bool(value) else None


def _int(value: Any) -> int | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    if _is_bool(value) or not isinstance(value, int | float | Decimal) or value != value // 1:
        return None
    return int(value) if -(2**63) <= value < 2**63 else None


def _float(value: Any) -> float | None:
    if isinstance(value, str):
        value = float(value) if _NUMBER.fullmatch(value) else None
    if _is_bool(value) or not isinstance(value, int | float | Decimal):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) != float("inf") else None


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) and is_valid_text(value) else None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_READ = {"bool": _bool, "int": _int, "float": _float, "text": _text}


def types_of_tables(columns: Kept, tables: Iterable[tuple[str, Columns]]) -> dict[str, ColumnType]:
    """The types that columns have in tables with a schema, in all of them; empty without such a table.

    Args:
        tables: the name of each, and its columns.
    Raises:
        ConfigError: a column is of types in two tables that do not go together, or not of the type that is given.
    """
    found: dict[str, tuple[str, ColumnType]] = {}
    for where, present in tables:
        for name, given in columns.items():
            kind = _of_arrow(column_type(name, present))
            if kind is None:
                continue
            first, before = found.setdefault(name, (where, kind))
            both = {before, kind}
            if len(both) > 1 and both != {"int", "float"}:
                raise ConfigError(
                    f"{_FIELD}: {name!r} is {_told(before)} in {first} and {_told(kind)} in {where}; write the column "
                    "as one type in all files, or leave it out"
                )
            if given is not None and {given, kind} not in ({given}, {"int", "float"}):
                raise ConfigError(f"{_FIELD}: {name!r} is {_told(kind)} in {where}, not {_told(given)}; give {kind}")
            if len(both) > 1:
                found[name] = (first, "float")
    return {name: kind for name, (_, kind) in found.items()}


def types_of_records(columns: Iterable[str], records: Iterable[Mapping[str, Any]]) -> dict[str, ColumnType]:
    """The types of columns without a schema, from some records: bool or float if all values that are there are such,
    else text; none of a column without a value."""
    values: dict[str, list[Any]] = {name: [] for name in columns}
    for record in records:
        if isinstance(record, InvalidLine):
            continue
        for name, cells in values.items():
            try:
                cells.append(value_at(record, name))
            except BadCell:
                continue
    return {name: kind for name, cells in values.items() if (kind := _of_values(cells)) is not None}


def _of_values(cells: Sequence[Any]) -> ColumnType | None:
    some = [cell for cell in cells if not (is_nothing(cell) or (isinstance(cell, str) and not cell.strip()))]
    if not some:
        return None
    if all(map(_is_bool, some)):
        return "bool"
    return "float" if all(_float(cell) is not None for cell in some) else "text"


def _of_arrow(kind: Any) -> ColumnType | None:
    import pyarrow.types as types

    if kind is None or types.is_null(kind):
        return None
    if types.is_boolean(kind):
        return "bool"
    if types.is_integer(kind):
        return "int"
    return "float" if types.is_floating(kind) or types.is_decimal(kind) else "text"


def _told(kind: ColumnType) -> str:
    return {"bool": "boolean", "int": "whole numbers", "float": "numbers", "text": "text"}[kind]
