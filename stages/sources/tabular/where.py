"""`source.where`: which rows of a table are read, as a condition of SQL on its columns."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from imagen_core.conditions import Condition, ConditionError
from pipeline.errors import ConfigError, MachineError
from pipeline.fingerprint import canonical_json
from stages.captions import is_valid_text
from stages.sources.records.cells import InvalidLine, is_nothing
from stages.sources.records.parquet import to_records
from stages.sources.records.regular import Chunk

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_FIELD = "source.where"


class RowFilter:
    """A parsed condition. A line that cannot be parsed is kept: it is a drop.

    Raises:
        ConfigError: the condition does not parse, or has what is not supported.
        MachineError: sqlglot is not installed.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            self._condition = Condition(text, _FIELD)
        except ConditionError as error:
            raise ConfigError(str(error)) from error
        except ImportError as error:
            raise MachineError(f"{_FIELD}: {error}") from error

    def __reduce__(self) -> tuple[type["RowFilter"], tuple[str]]:
        return RowFilter, (self.text,)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names."""
        return self._condition.columns

    def check(self, present: Mapping[str, pa.DataType | None], where: str) -> None:
        """Checks that the columns exist in the table `where`, and can be compared as they are.

        Raises:
            ConfigError: one does not, or cannot.
        """
        try:
            self._condition.check(present, where)
        except ConditionError as error:
            raise ConfigError(str(error)) from error

    def places(self, chunk: Chunk) -> np.ndarray:
        """Positions of the rows that are kept, increasing."""
        try:
            found = self._condition.places([self._column(chunk, name) for name in self.columns], len(chunk))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # of JSON, whose columns no schema tells
            chunk = to_records(chunk)
            found = self._condition.places([self._column(chunk, name) for name in self.columns], len(chunk))
        if isinstance(chunk, list):
            invalid = [place for place, record in enumerate(chunk) if isinstance(record, InvalidLine)]
            found = np.concatenate((found, np.array(invalid, np.int64)))
        return np.unique(found)

    def may_match(self, table: "pq.ParquetFile", groups: Sequence[int]) -> set[int]:
        """The row groups of a file which, by their statistics, may have rows that are kept."""
        metadata = table.metadata
        places = {metadata.schema.column(place).path: place for place in range(metadata.num_columns)}
        bounds = [(places[name], excludes) for name, excludes in self._condition.bounds if name in places]

        def is_excluded(group: int) -> bool:
            for place, excludes in bounds:
                found = metadata.row_group(group).column(place).statistics
                if found is None or not found.has_min_max or not isinstance(found.min, int | float):
                    continue
                if excludes(found.min, found.max):
                    return True
            return False

        return {group for group in groups if not is_excluded(group)}

    def _column(self, chunk: Chunk, name: str) -> pa.Array:
        kind = self._condition.compared_as(name) or pa.string()
        if isinstance(chunk, list):
            cells = [dict.get(record, name) for record in chunk]
            read = _any if self._condition.compared_as(name) is None else _cell
            return pa.array([read(cell, kind) for cell in cells], kind)
        if name not in chunk.schema.names:
            return pa.nulls(len(chunk), kind)
        return chunk.column(name)


def _cell(value: Any, kind: pa.DataType) -> Any:
    """A cell of JSON as a value of this type; None where it is none."""
    if is_nothing(value):
        return None
    if pa.types.is_boolean(kind):
        return value if isinstance(value, bool) else None
    if not pa.types.is_floating(kind):
        return value if isinstance(value, str) and is_valid_text(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _any(value: Any, kind: pa.DataType) -> str | None:
    """A cell of JSON that is compared with other cells at most, as text: equal numbers have an equal one."""
    del kind
    if is_nothing(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    whole = isinstance(value, float) and value.is_integer()
    return canonical_json(int(value) if whole else value).encode("utf-8", "backslashreplace").decode()
