"""Which types of Arrow a configured column may have."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pipeline.errors import ConfigError
from stages.sources.records.cells import splits, top_level

if TYPE_CHECKING:
    import pyarrow as pa

Columns = Mapping[str, "pa.DataType | None"]
"""The columns of a table, by name; None where the format has no types."""

Content = Literal["texts", "text", "key", "image", "label", "box", "kept"]
_WANTED: dict[Content, str] = {
    "texts": "text or a list of texts",
    "text": "text",
    "key": "text or numbers",
    "image": "bytes, base64 or a struct with `bytes` or `path`",
    "label": "numbers or text",
    "box": "a list of numbers or text",
    "kept": "numbers, booleans or text",
}


def check_column(
    field: str, column: str, content: Content, present: Columns, where: str, *, or_else: str = ""
) -> None:
    """Checks that a column, or path into nested columns, exists and can have this content.

    Args:
        or_else: ends the message where there is no such column.

    Raises:
        ConfigError: it does not exist in the table `where`, or has another type.
    """
    name = top_level(column, present)
    if name is None:
        raise ConfigError(f"source.{field}: {where} has no column {column!r}; it has: {', '.join(present)}{or_else}")
    kind = present[name]
    if kind is None:
        return
    found = _below(kind, column.removeprefix(name).removeprefix("."))
    if found is None:
        fields = ", ".join(_fields(kind)) or "no fields"
        raise ConfigError(f"source.{field}: {where} has no column {column!r}; {name!r} has: {fields}{or_else}")
    if not _fits(found, content):
        fields = _fields(found)
        remedy = f"name a field of it, such as {column}.{fields[0]}" if fields else "name another column"
        raise ConfigError(
            f"source.{field}: {where}: column {column!r} is of type {found}, not {_WANTED[content]}; {remedy}"
        )


def column_type(column: str, present: Columns) -> "pa.DataType | None":
    """The type of a column, or path into nested columns, behind dictionaries and the like; None if none is known."""
    name = top_level(column, present)
    kind = None if name is None else present[name]
    found = None if name is None or kind is None else _below(kind, column.removeprefix(name).removeprefix("."))
    return None if found is None else _plain(found)


def _below(kind: "pa.DataType", path: str) -> "pa.DataType | None":
    """The type at a path into a nested type; a list of structs gives lists. None: there is no such field."""
    import pyarrow as pa

    if not path:
        return kind
    kind = _plain(kind)
    item = _item(kind)
    if item is not None:
        found = _below(item, path)
        return None if found is None else pa.list_(found)
    if pa.types.is_struct(kind):
        for name, below in splits(path):
            if (index := kind.get_field_index(name)) >= 0:
                return _below(kind.field(index).type, below)
    return None


def _fields(kind: "pa.DataType") -> list[str]:
    import pyarrow as pa

    kind = _plain(kind)
    while (item := _item(kind)) is not None:
        kind = _plain(item)
    return [kind.field(index).name for index in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def _fits(kind: "pa.DataType", content: Content) -> bool:
    import pyarrow as pa

    types, kind = pa.types, _plain(kind)
    item = _item(kind)
    is_text = _is_text(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    match content:
        case "texts":
            return is_text or (item is not None and _fits(item, "texts"))
        case "text":
            return is_text
        case "key" | "label":
            return is_text or is_number
        case "kept":
            return is_text or is_number or types.is_boolean(kind)
        case "box":
            return is_text or (item is not None and _fits(item, "label"))
        case "image":
            is_bytes = is_text or (item is not None and types.is_integer(_plain(item)))
            return is_bytes or bool({"bytes", "path"} & set(_fields(kind) if item is None else ()))


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    checks = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_fixed_size_binary,
        types.is_null,
    )
    return any(check(kind) for check in checks)


def _item(kind: "pa.DataType") -> "pa.DataType | None":
    """The type of the items of a list; None for other types."""
    import pyarrow.types as types

    checks = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return kind.value_type if any(check(kind) for check in checks) else None


def _plain(kind: "pa.DataType") -> "pa.DataType":
    """The type of the values behind a dictionary, runs or an extension."""
    import pyarrow as pa

    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            return kind
