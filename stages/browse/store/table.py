"""The samples of a store as a table of DuckDB: filled once, shard by shard, and asked with parameters."""

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imagen_core.store import Store, choose_buckets
from imagen_core.store.files.arrow_column import arrow_column, as_numpy
from imagen_core.store.files.samples import list_offsets
from imagen_core.store.read.reader import OpenShard
from stages.browse.store.fields import Field, fields_of
from stages.browse.store.query import Query
from stages.browse.web import error_line

_SETTINGS = {
    "memory_limit": "128MB",
    "threads": 2,
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}
_ROWS_AT_ONCE = 20_000
_SHOWN_CHARACTERS = 300
_READ = ("key", "captions", "caption_ids", "url", "sha256", "width", "height", "label")


@dataclass(frozen=True, slots=True)
class Row:
    """A sample in the grid. `text` are its captions, cut; `shard` is the number in the names of its files."""

    shard: int
    row: int
    key: str
    text: str
    is_cut: bool


class SamplesTable:
    """What the grid and its charts ask for. It is filled by a thread, and answers with what is there.

    Attributes:
        fields: what can be asked for.
        problems: one line per file that could not be read; its samples, or their values, are missing.
        total: samples that the store has.
    """

    def __init__(self, store: Store, duplicates: Callable[[], Mapping[tuple[int, int], str]]):
        """
        Args:
            store: read by the thread alone.
            duplicates: the reason by shard and row of each sample that a search for duplicates found.
        """
        self.fields = fields_of(store)
        self.problems: list[str] = []
        self.total = len(store)
        self._store, self._duplicates = store, duplicates
        self._folder = tempfile.TemporaryDirectory(prefix="pipeline-browse-")
        self._connection = duckdb.connect(f"{self._folder.name}/samples.duckdb", config=_SETTINGS)
        self._connection.execute("SET enable_external_access = false")
        self._connection.execute(f"CREATE TABLE samples ({', '.join(map(' '.join, self._columns()))})")
        self._filled, self._closed = threading.Event(), False
        self._spans: dict[tuple[str, bool], tuple[float, float] | None] = {}
        threading.Thread(target=self._fill, name="samples", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Waits until all shards are read; returns whether they are."""
        return self._filled.wait(seconds)

    @property
    def is_filled(self) -> bool:
        return self._filled.is_set()

    def close(self) -> None:
        """Frees its memory and its file; a thread that fills it ends."""
        self._closed = True
        self._connection.close()
        self._folder.cleanup()

    @contextmanager
    def asking(self, query: Query) -> Iterator["Answers"]:
        """Answers about the samples that fit a query; captions are searched once."""
        with self._connection.cursor() as cursor:
            if query.search:
                search = "SELECT id FROM samples WHERE contains(lower(text), lower(?))"
                cursor.execute(f"CREATE TEMP TABLE found AS {search}", [query.search])
            yield Answers(cursor, self.fields, query)

    def span(self, field: Field) -> tuple[float, float] | None:
        """Between which values 99 % of all samples are; None if no sample has a value."""
        known = field.key, self.is_filled
        if known not in self._spans:
            column = field.column
            sql = f"SELECT quantile_disc({column}, [0.005, 0.995]) FROM samples WHERE {column} IS NOT NULL"
            with self._connection.cursor() as cursor:
                rows = cursor.execute(sql).fetchall()
            self._spans[known] = None if rows[0][0] is None else tuple(rows[0][0])
        return self._spans[known]

    def _columns(self) -> list[tuple[str, str]]:
        own = [("id", "BIGINT"), ("shard", "INTEGER"), ("row", "INTEGER"), ("key", "VARCHAR"), ("text", "VARCHAR")]
        return [*own, ("sha256", "VARCHAR"), *((field.column, field.sql_type) for field in self.fields)]

    def _fill(self) -> None:
        try:
            self._read_all()
        except Exception as error:  # noqa: BLE001 - shown on the page
            if not self._closed:
                self.problems.append(error_line(error))
        finally:
            self._filled.set()

    def _read_all(self) -> None:
        reader, connection = _ShardReader(self._store, self.fields, self.problems), self._connection.cursor()
        waiting: list[pa.Table] = []
        for position in np.flatnonzero(self._store.manifest.rows).tolist():
            if (table := reader.read(position)) is not None:
                waiting.append(table)
            if sum(table.num_rows for table in waiting) >= _ROWS_AT_ONCE or (position == 0 and waiting):
                _insert(connection, waiting)
                waiting = []
        if waiting:
            _insert(connection, waiting)
        connection.execute(
            "UPDATE samples SET copies = found.number FROM (SELECT sha256, count(*) AS number FROM samples "
            "WHERE sha256 != '' GROUP BY sha256 HAVING number > 1) AS found WHERE samples.sha256 = found.sha256"
        )
        duplicates = self._duplicates()
        if duplicates:
            shards, rows = (arrow_column(values, pa.int64()) for values in zip(*duplicates, strict=True))
            reasons = arrow_column(list(duplicates.values()), pa.string())
            connection.register("found", pa.table({"shard": shards, "row": rows, "reason": reasons}))
            connection.execute(
                "UPDATE samples SET duplicate = found.reason FROM found "
                "WHERE samples.shard = found.shard AND samples.row = found.row"
            )
            connection.unregister("found")


class Answers:
    """What the grid and its charts ask about the samples that fit a query."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection, fields: Sequence[Field], query: Query):
        """
        Args:
            cursor: sees the table `samples`, and `found` with the ids that the query's search finds.
        """
        self._cursor, self._fields, self._query = cursor, fields, query

    def count(self) -> int:
        """How many samples fit."""
        condition, values = self._query.where(self._fields)
        return self._ask(f"SELECT count(*) FROM samples WHERE {condition}", values)[0][0]

    def rows(self, first: int, count: int) -> list[Row]:
        """Samples that fit, in the query's order, from number `first` on."""
        condition, values = self._query.where(self._fields)
        found = self._ask(
            f"SELECT shard, row, key, left(text, {_SHOWN_CHARACTERS}), length(text) > {_SHOWN_CHARACTERS} "
            f"FROM samples WHERE {condition} {self._query.order(self._fields)} LIMIT ? OFFSET ?",
            [*values, count, first],
        )
        return [Row(*each) for each in found]

    def choices(self, field: Field, most: int) -> list[tuple[str, int]]:
        """The most frequent values of a field, with their counts, among the samples that fit all other conditions."""
        condition, values = self._query.without(field.key).where(self._fields)
        return self._ask(
            f"SELECT {field.column}, count(*) FROM samples WHERE {field.column} IS NOT NULL AND {condition} "
            "GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?",
            [*values, most],
        )

    def bins(self, field: Field, low: float, step: float, number: int) -> list[int]:
        """How many samples that fit all other conditions are in each of `number` bins of width `step` from `low` on;
        the first and the last have also what lies beyond."""
        condition, values = self._query.without(field.key).where(self._fields)
        found = self._ask(
            f"SELECT least(greatest(floor(({field.column} - ?) / ?), 0), ?)::INTEGER, count(*) FROM samples "
            f"WHERE {field.column} IS NOT NULL AND {condition} GROUP BY 1",
            [low, step, number - 1, *values],
        )
        counts = dict(found)
        return [counts.get(each, 0) for each in range(number)]

    def _ask(self, sql: str, values: Sequence[Any]) -> list[Any]:
        return self._cursor.execute(sql, values).fetchall()


def _insert(connection: duckdb.DuckDBPyConnection, tables: Sequence[pa.Table]) -> None:
    connection.register("incoming", pa.concat_tables(tables, promote_options="permissive"))
    connection.execute(
        "INSERT INTO samples BY NAME SELECT * EXCLUDE (url) REPLACE (array_to_string(text, chr(10)) AS text), "
        "length(array_to_string(text, chr(10))) AS characters, 1 AS copies, "
        "nullif(regexp_extract(url, '^[a-zA-Z][a-zA-Z0-9+.-]*://([^/?#@]*@)?([^/?#:]+)', 2), '') AS host FROM incoming"
    )
    connection.unregister("incoming")


class _ShardReader:
    """Reads what the table holds of a shard's samples, without the excluded ones."""

    def __init__(self, store: Store, fields: Sequence[Field], problems: list[str]):
        self._store, self._problems = store, problems
        self._columns = {field.key: field.column for field in fields}
        self._firsts = np.concatenate([[0], np.cumsum(store.manifest.rows)])
        bucketed = [group for group in store.manifest.images.values() if group.shapes]
        self._shapes = bucketed[0].shapes if bucketed else ()

    def read(self, position: int) -> pa.Table | None:
        """None where `samples` cannot be read; what else cannot be read is null."""
        store, kept = self._store, list(self._store.columns)
        files = store.shard(position)
        found = self._try(lambda: files.columns([*_READ, *kept]))
        if found is None:
            return None
        rows = np.setdiff1d(np.arange(found.num_rows), list(store.manifest.excluded.get(position, ())))
        width, height = (as_numpy(found[name].combine_chunks()) for name in ("width", "height"))
        values: dict[str, Any] = {
            "id": _array(self._firsts[position] + np.arange(found.num_rows)),
            "shard": _array(np.full(found.num_rows, store.manifest.index[position])),
            "row": _array(np.arange(found.num_rows)),
            "text": found["captions"],
            **{name: found[name] for name in ("key", "url", "sha256", "width", "height")},
            "label": pc.cast(found["label"], pa.string()),
            "aspect": _array(width / np.maximum(height, 1)),
            **{self._columns[f"column.{name}"]: _plain(found[name]) for name in kept},
        }
        if self._shapes:
            names = np.array([f"{shape[1]} x {shape[0]}" for shape in self._shapes])
            values["bucket"] = arrow_column(names[choose_buckets(width, height, self._shapes)].tolist(), pa.string())
        values |= self._tokens(files, found["caption_ids"].combine_chunks())
        values |= self._scores(files, found.num_rows)
        return pa.table(values).take(_array(rows))

    def _tokens(self, files: OpenShard, caption_ids: pa.ListArray) -> dict[str, pa.Array]:
        """Tokens of the longest caption of each sample, by column."""
        ids, starts = as_numpy(caption_ids.flatten()), list_offsets(caption_ids)[:-1]
        counts = {name: self._try(lambda name=name: files.text[name].num_tokens) for name in self._store.encoders}
        return {
            self._columns[f"tokens.{name}"]: _array(np.maximum.reduceat(number[ids], starts))
            for name, number in counts.items()
            if number is not None and starts
        }

    def _scores(self, files: OpenShard, num_rows: int) -> dict[str, pa.Array]:
        names = [key.partition(".")[2] for key in self._columns if key.startswith("array.")]

        def read(name: str) -> np.ndarray:
            return np.array([float(files.arrays[name].value(row)) for row in range(num_rows)], np.float64)

        found = {name: self._try(lambda name=name: read(name)) for name in names}
        return {self._columns[f"array.{name}"]: _array(score) for name, score in found.items() if score is not None}

    def _try(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # noqa: BLE001 - shown on the page
            self._problems.append(error_line(error))
            return None


def _array(values: np.ndarray) -> pa.Array:
    """`pa.array`, which would import pandas, of numbers."""
    values = np.ascontiguousarray(values, np.float64 if values.dtype.kind == "f" else np.int64)
    return pa.Array.from_buffers(
        pa.float64() if values.dtype.kind == "f" else pa.int64(), len(values), [None, pa.py_buffer(values)]
    )


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A kept column in the type of its field; what is not finite is no value."""
    if pa.types.is_floating(column.type):
        is_finite, missing = pc.call_function("is_finite", [column]), pa.nulls(1, column.type)[0]
        return pc.call_function("if_else", [is_finite, column, missing])
    return pc.cast(column, pa.string()) if pa.types.is_boolean(column.type) else column
