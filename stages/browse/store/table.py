"""The samples of a store as a table of DuckDB: filled once, shard by shard, and asked with parameters."""

import atexit
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from imagen_core.store import Store
from imagen_core.store.files.arrow_column import arrow_column
from stages.browse.store.fields import Field, fields_of, text_columns
from stages.browse.store.query import Query
from stages.browse.store.shard_columns import ShardReader
from stages.browse.web import error_line

_SETTINGS = {
    "memory_limit": "128MB",
    "threads": 2,
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}
_ROWS_AT_ONCE = 20_000
_SHOWN_CHARACTERS = 300
_MOST_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Row:
    """A sample in the grid.

    Attributes:
        shard: the number in the names of its files.
        text: its captions of one set, cut.
        sets: of several sets of captions, those in which the search found it.
    """

    shard: int
    row: int
    key: str
    text: str
    is_cut: bool
    sets: tuple[str, ...] = ()


class SamplesTable:
    """What the grid and its charts ask for. It is filled by a thread, and answers with what is there.

    Attributes:
        fields: what can be asked for.
        caption_sets: the sets of captions, the first one that of `samples`.
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
        self._texts = text_columns(store)
        self.caption_sets = tuple(self._texts)
        self.problems: list[str] = []
        self.total = len(store)
        self._store, self._duplicates = store, duplicates
        self._folder = tempfile.TemporaryDirectory(prefix="pipeline-browse-")
        self._connection = duckdb.connect(f"{self._folder.name}/samples.duckdb", config=_SETTINGS)
        self._connection.execute("SET enable_external_access = false")
        self._connection.execute(f"CREATE TABLE samples ({', '.join(map(' '.join, self._columns()))})")
        self._filled, self._closed = threading.Event(), False
        self._spans: dict[tuple[str, bool], tuple[float, float] | None] = {}
        self._mutex, self._users = threading.Lock(), 1  # the thread
        self._thread = threading.Thread(target=self._fill, name="samples", daemon=True)
        self._thread.start()
        _TABLES.add(self)

    def wait(self, seconds: float) -> bool:
        """Waits until all shards are read; returns whether they are."""
        return self._filled.wait(seconds)

    @property
    def is_filled(self) -> bool:
        return self._filled.is_set()

    @contextmanager
    def used(self) -> Iterator["SamplesTable"]:
        """Keeps it until the end of the block, even if it is closed meanwhile."""
        with self._mutex:
            self._users += 1
        try:
            yield self
        finally:
            self._release()

    def close(self) -> None:
        """Frees its memory and its file once nobody uses it; the thread that fills it ends."""
        with self._mutex:
            if self._closed:
                return
            self._closed, self._users = True, self._users + 1
        self._release()

    def _release(self) -> None:
        with self._mutex:
            self._users -= 1
            is_free = self._closed and not self._users
        if is_free:
            self._connection.close()
            self._folder.cleanup()

    def end(self) -> None:
        """Closes it, and waits for its thread."""
        self.close()
        self._thread.join(_MOST_END_S)

    @contextmanager
    def _cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._mutex:  # a connection refuses two calls at a time
            cursor = self._connection.cursor()
        with cursor:
            yield cursor

    @contextmanager
    def asking(self, query: Query) -> Iterator["Answers"]:
        """Answers about the samples that fit a query; captions are searched once."""
        with self._cursor() as cursor:
            if query.search:
                wanted = {query.caption_set: self._texts[query.caption_set]} if query.caption_set else self._texts
                bits = [
                    f"if(contains(lower({column}), lower($1)), {1 << self.caption_sets.index(name)}, 0)"
                    for name, column in wanted.items()
                ]
                search = f"SELECT * FROM (SELECT id, {' + '.join(bits)} AS sets FROM samples) WHERE sets > 0"
                cursor.execute(f"CREATE TEMP TABLE found AS {search}", [query.search])
            yield Answers(cursor, self.fields, query, self._texts)

    def span(self, field: Field) -> tuple[float, float] | None:
        """Between which values 99 % of all samples are; None if no sample has a value."""
        known = field.key, self.is_filled
        if known not in self._spans:
            column = field.column
            sql = f"SELECT quantile_disc({column}, [0.005, 0.995]) FROM samples WHERE {column} IS NOT NULL"
            with self._cursor() as cursor:
                rows = cursor.execute(sql).fetchall()
            self._spans[known] = None if rows[0][0] is None else tuple(rows[0][0])
        return self._spans[known]

    def _columns(self) -> list[tuple[str, str]]:
        own = [("id", "BIGINT"), ("shard", "INTEGER"), ("row", "INTEGER"), ("key", "VARCHAR"), ("sha256", "VARCHAR")]
        texts = ((column, "VARCHAR") for column in self._texts.values())
        return [*own, *texts, *((field.column, field.sql_type) for field in self.fields)]

    def _fill(self) -> None:
        try:
            self._read_all()
        except Exception as error:  # noqa: BLE001 - shown on the page
            if not self._closed:
                self.problems.append(error_line(error))
        finally:
            self._filled.set()
            self._release()

    def _read_all(self) -> None:
        with self._cursor() as connection:
            self._read_into(connection)

    def _read_into(self, connection: duckdb.DuckDBPyConnection) -> None:
        reader = ShardReader(self._store, self.fields, self.problems)
        waiting: list[pa.Table] = []
        for position in np.flatnonzero(self._store.manifest.rows).tolist():
            if self._closed:
                return
            if (table := reader.read(position)) is not None:
                waiting.append(table)
            if sum(table.num_rows for table in waiting) >= _ROWS_AT_ONCE or (position == 0 and waiting):
                _insert(connection, waiting, self._texts.values())
                waiting = []
        if waiting:
            _insert(connection, waiting, self._texts.values())
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


_TABLES: "weakref.WeakSet[SamplesTable]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread in the engine's code would abort the process when it ends."""
    for table in list(_TABLES):
        table.end()


class Answers:
    """What the grid and its charts ask about the samples that fit a query."""

    def __init__(
        self,
        cursor: duckdb.DuckDBPyConnection,
        fields: Sequence[Field],
        query: Query,
        texts: Mapping[str, str],
    ):
        """
        Args:
            cursor: sees the table `samples`, and `found` with the ids that the query's search finds and a bit for each
                set of captions in which it does.
            texts: the column of each set of captions.
        """
        self._cursor, self._fields, self._query, self._texts = cursor, fields, query, texts

    def count(self) -> int:
        """How many samples fit."""
        condition, values = self._query.where(self._fields)
        return self._ask(f"SELECT count(*) FROM samples WHERE {condition}", values)[0][0]

    def rows(self, first: int, count: int) -> list[Row]:
        """Samples that fit, in the query's order, from number `first` on."""
        condition, values = self._query.where(self._fields)
        order, source = self._query.order(self._fields), "samples JOIN found USING (id)"
        if not self._query.search:
            source = "(SELECT *, 0 AS sets FROM samples)"
        page = f"SELECT id FROM samples WHERE {condition} {order} LIMIT ? OFFSET ?"
        found = self._ask(
            f"SELECT shard, row, key, left(shown, {_SHOWN_CHARACTERS}), length(shown) > {_SHOWN_CHARACTERS}, sets "
            f"FROM (SELECT *, {self._shown()} AS shown FROM {source} WHERE id IN ({page})) {order}",
            [*values, count, first],
        )
        return [Row(shard, row, key, text, is_cut, self._sets(bits)) for shard, row, key, text, is_cut, bits in found]

    def _sets(self, bits: int) -> tuple[str, ...]:
        """Of several sets of captions, those of some bits."""
        return tuple(name for i, name in enumerate(self._texts) if bits >> i & 1) if len(self._texts) > 1 else ()

    def _shown(self) -> str:
        """The captions that the grid shows of a sample: of the chosen set, else of the first one that fits."""
        if self._query.caption_set:
            return f"coalesce({self._texts[self._query.caption_set]}, '')"
        cases = (f"WHEN sets & {1 << i} > 0 THEN {column}" for i, column in enumerate(self._texts.values()))
        return f"CASE {' '.join(cases)} ELSE text END"

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


def _insert(connection: duckdb.DuckDBPyConnection, tables: Sequence[pa.Table], texts: Iterable[str]) -> None:
    """Adds samples.

    Args:
        texts: columns with lists of captions; their samples get the captions as lines, and their characters.
    """
    incoming = pa.concat_tables(tables, promote_options="permissive")
    given = [column for column in texts if column in incoming.column_names]
    lines = [(column, f"array_to_string({column}, chr(10))") for column in given]
    joined = ", ".join(f"{text} AS {column}" for column, text in lines)
    counted = ", ".join(f"length({text}) AS {column.replace('text', 'characters')}" for column, text in lines)
    connection.register("incoming", incoming)
    connection.execute(
        f"INSERT INTO samples BY NAME SELECT * EXCLUDE (url) REPLACE ({joined}), {counted}, 1 AS copies, "
        "nullif(regexp_extract(url, '^[a-zA-Z][a-zA-Z0-9+.-]*://([^/?#@]*@)?([^/?#:]+)', 2), '') AS host FROM incoming"
    )
    connection.unregister("incoming")
