"""Chooses samples by a condition on the columns of `samples`, lengths of captions and arrays of numbers."""

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


def store_condition(
    text: str, columns: Mapping[str, ColumnType], computed: Mapping[str, pa.DataType], store: str
) -> Condition:
    """A condition on the samples of a store.

    Args:
        columns: those that were kept of the source.
        computed: types of the `computed_columns`; of equal names those of `samples` count.
        store: its name in messages.
    Raises:
        ConditionError: it does not parse, or does not fit the columns.
        ImportError: sqlglot is not installed.
    """
    condition = Condition(text, dotted=True)
    if not condition.columns:
        raise ConditionError(f"where: {text!r} names no column; compare a column with something")
    kept = {name: _KEPT_TYPES[kind] for name, kind in columns.items()}
    further = {name: kind for name, kind in computed.items() if name not in (*OWN_TYPES, *kept)}
    condition.check({**OWN_TYPES, **kept, **further}, store)
    return condition


def chosen_rows(condition: Condition, columns: Mapping[str, pa.Array | pa.ChunkedArray], num_rows: int) -> np.ndarray:
    """Which rows of a shard the condition chooses, bool; its columns are NULL-typed where the shard has none."""
    cells = [(name, columns[name]) for name in condition.columns]
    typed = [c.cast(OWN_TYPES.get(name, pa.float64())) if pa.types.is_null(c.type) else c for name, c in cells]
    chosen = np.zeros(num_rows, np.bool_)
    chosen[condition.places(typed, num_rows)] = True
    return chosen
