"""Chooses samples by a condition on the columns of `samples`."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from imagen_core.conditions import Condition, ConditionError
from imagen_core.store.layout import ColumnType

OWN_TYPES: Mapping[str, pa.DataType] = {
    "key": pa.string(),
    "url": pa.string(),
    "sha256": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "label": pa.int32(),
    "transcription": pa.string(),
}
"""Columns that every store has and a condition may name; `label` and `transcription` are NULL where not known."""
_KEPT_TYPES: Mapping[ColumnType, pa.DataType] = {
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "text": pa.string(),
}


def store_condition(text: str, columns: Mapping[str, ColumnType], store: str) -> Condition:
    """A condition on the samples of a store.

    Args:
        columns: those that were kept of the source.
        store: its name in messages.
    Raises:
        ConditionError: it does not parse, or does not fit the columns.
        ImportError: sqlglot is not installed.
    """
    condition = Condition(text)
    if not condition.columns:
        raise ConditionError(f"where: {text!r} names no column; compare a column with something")
    condition.check({**OWN_TYPES, **{name: _KEPT_TYPES[kind] for name, kind in columns.items()}}, store)
    return condition


def chosen_rows(condition: Condition, table: pa.Table) -> np.ndarray:
    """Which rows of a shard the condition chooses, bool; `table` has its columns, NULL-typed where it has none."""
    kinds = {name: table.schema.field(name).type for name in condition.columns}
    cells = [
        table[name].cast(OWN_TYPES.get(name, pa.float64())) if pa.types.is_null(kind) else table[name]
        for name, kind in kinds.items()
    ]
    chosen = np.zeros(table.num_rows, np.bool_)
    chosen[condition.places(cells, table.num_rows)] = True
    return chosen
