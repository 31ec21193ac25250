"""Captions from elsewhere: a table that has them by the samples' keys."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field

from imagen_core.far import StorageError
from pipeline.errors import ConfigError, MachineError, storage_error
from pipeline.fingerprint import digest
from pipeline.stage import note_progress
from pipeline.storage.files import file_digest
from stages.captioners.base import CaptionerConfig
from stages.captions import clean_captions
from stages.digests import remembered_digest
from stages.sources.files import expand
from stages.sources.records.cells import BadCell, InvalidLine, captions_of, key_of
from stages.sources.records.far import open_file
from stages.sources.records.types import check_column
from stages.sources.tables import TYPED, columns, json_columns, read_rows, table_format

_FORMATS = ("jsonl", "csv", "tsv", "parquet")
_ROWS_AT_ONCE = 10_000


class TableCaptionerConfig(CaptionerConfig):
    """Captions that are there already, in a table."""

    machine_fields = CaptionerConfig.machine_fields | {"path"}

    kind: Literal["table"] = "table"
    path: str = Field(min_length=1)
    """A jsonl, csv, tsv or parquet file, plain or compressed, a folder of them, or a glob; local or any fsspec URL."""
    key_column: str = "key"
    """Column of the sample's key, text or a number; each key once."""
    caption_column: str = "caption"
    """Column of the caption, or of a list of captions; or a path into nested columns."""
    model: str | None = None
    """The model that wrote the captions, as far as you know; recorded, never loaded."""

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors about a source, as ones about this table."""
        try:
            yield
        except (ConfigError, MachineError) as error:
            raise type(error)(str(error).replace("source.", f"captioners.{self.name}.", 1)) from error
        except StorageError as error:
            raise type(storage_error(error))(f"captioners.{self.name}.path: {error}") from error
        except OSError as error:
            raise ConfigError(f"captioners.{self.name}.path: {self.path} cannot be read: {error}") from error

    def files(self) -> list[str]:
        """The files of the table, in order.

        Raises:
            ConfigError: there is none.
        """
        with self.named():
            found = expand(self.path, "source.path", _FORMATS)
            for file in found:
                if table_format(file) not in _FORMATS:
                    raise ConfigError(f"source.path: {file} is no table; use {', '.join(_FORMATS)}")
            return found

    def check(self) -> None:
        """Refuses a table without the columns.

        Raises:
            ConfigError: a column is missing or of another type, or a file cannot be read.
        """
        wanted = (self.key_column, self.caption_column)
        files = self.files()
        with self.named():
            heads = [(file, columns(file)) for file in files if table_format(file) in TYPED]
            if objects := [file for file in files if table_format(file) == "jsonl"]:
                heads.append((objects[0], json_columns(objects, wanted)))
            for file, present in heads:
                check_column("key_column", self.key_column, "key", present, file)
                check_column("caption_column", self.caption_column, "texts", present, file)

    def made_by(self) -> dict[str, Any]:
        with self.named():
            digests = [_sha256(file) for file in self.files()]
        return {**super().made_by(), "sha256": digests[0] if len(digests) == 1 else digest(sorted(digests))}

    def pinned(self) -> Self:
        """The same table for any worker: a local one by its absolute path."""
        return self if "://" in self.path else self.model_copy(update={"path": str(Path(self.path).absolute())})


class CaptionTable:
    """The captions of a table by key, on this machine's disk (SQLite in a temporary file)."""

    def __init__(self, config: TableCaptionerConfig):
        """Reads the table.

        Raises:
            ConfigError: a line cannot be read, or a key is missing or there twice.
        """
        self.config = config
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._database.execute("CREATE TABLE captions (key BLOB, cell TEXT)")
        self._database.execute("BEGIN")
        self.num_rows = 0
        for file in config.files():
            with config.named():
                self._database.executemany("INSERT INTO captions VALUES (?, ?)", self._rows(file))
        try:
            self._database.execute("CREATE UNIQUE INDEX by_key ON captions (key)")
        except sqlite3.IntegrityError as error:
            raise ConfigError(
                f"captioners.{config.name}.path: {config.path}: {self._repeated()}; leave all but one out, or put "
                "several captions of a sample into a list"
            ) from error

    def _rows(self, file: str) -> Iterator[tuple[bytes, str]]:
        for number, record in enumerate(read_rows(file, [self.config.key_column, self.config.caption_column]), 1):
            if isinstance(record, InvalidLine):
                raise ConfigError(f"source.path: {file}: {record.detail}; mend the table")
            try:
                key = key_of(record, self.config.key_column)
            except BadCell as bad:
                raise ConfigError(f"source.key_column: {file}: row {number}: {bad.detail}; mend the table") from bad
            if not key:
                raise ConfigError(f"source.key_column: {file}: row {number} has no key; mend the table")
            try:
                cell: object = captions_of(record, self.config.caption_column)
            except BadCell as bad:
                cell = {"reason": bad.reason, "detail": bad.detail}
            self.num_rows += 1
            if number % _ROWS_AT_ONCE == 0:
                note_progress()
            yield _key(key), json.dumps(cell)

    def _repeated(self) -> str:
        key, times = self._database.execute(
            "SELECT key, count(*) FROM captions GROUP BY key HAVING count(*) > 1 ORDER BY min(rowid) LIMIT 1"
        ).fetchone()
        return f"the key {key.decode('utf-8', 'surrogateescape')!r} is there {times} times"

    def captions(self, keys: Sequence[str]) -> list[tuple[tuple[str, ...], tuple[str, str] | None]]:
        """The cleaned captions of each key; where there are none, also reason and detail."""
        query = "SELECT cell FROM captions WHERE key = ?"
        cells = [self._database.execute(query, (_key(key),)).fetchone() for key in keys]
        return [_read(None if cell is None else json.loads(cell[0])) for cell in cells]


def _read(cell: Any) -> tuple[tuple[str, ...], tuple[str, str] | None]:
    if cell is None:
        return (), ("missing_key", "")
    if isinstance(cell, dict):
        return (), (cell["reason"], cell["detail"])
    captions, reason = clean_captions(cell)
    return captions, None if reason is None else (reason, "")


def _key(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")


def _sha256(file: str) -> str:
    if "://" not in file:
        path = Path(file).absolute()
        return remembered_digest([path], lambda: file_digest(path))
    with open_file(file) as opened:
        return hashlib.file_digest(cast(Any, opened), "sha256").hexdigest()
