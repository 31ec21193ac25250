"""A filter that keeps a random part of the rows, the same one every time."""

import hashlib
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from imagen_core.store import ColumnType
from pipeline.errors import ConfigError
from stages.filters.base import Filter, FilterRow, Rejection


class KeepRate(Filter):
    """Keeps each row with a probability, and drops the others (`thinned_out`).

    Which rows are kept follows from the seed and their keys, not from their order or number: a row that is kept at a
    rate is also kept at every higher one.
    """

    kind: Literal["keep_rate"] = "keep_rate"
    rate: float = Field(default=1.0, ge=0, le=1)
    """Probability of keeping a row; with `column`, a factor of the one in it."""
    column: str | None = None
    """Column with a probability for each row, one of `source.keep_columns`. NULL counts as 1."""
    seed: int = Field(default=0, ge=0)
    """Another seed keeps other rows."""

    def check(self, columns: Mapping[str, ColumnType]) -> None:
        if self.column is None:
            return
        if self.column not in columns:
            raise ConfigError(
                f"filters: keep_rate reads the column {self.column!r}, which is not kept of the source (kept: "
                f"{sorted(columns)}); name it in source.keep_columns"
            )
        if columns[self.column] == "text":
            raise ConfigError(
                f"filters: keep_rate reads the column {self.column!r}, which holds text; name one of numbers, or give "
                f"its type as source.keep_columns={{{self.column}: float}}"
            )

    def reject(self, row: FilterRow) -> Rejection | None:
        rate = self.rate * self._of_row(row)
        digest = hashlib.sha256(f"{self.seed}:{row.key}".encode()).digest()
        if int.from_bytes(digest[:8], "big") < rate * 2**64:
            return None
        return Rejection("thinned_out", f"kept at a rate of {rate:g}")

    def _of_row(self, row: FilterRow) -> float:
        value = None if self.column is None else row.annotations.get("columns", {}).get(self.column)
        return 1.0 if value is None else float(value)
