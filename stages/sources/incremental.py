"""Which parts of the input were found by which run, so that an input that grows adds shards and moves none.

RUN/input/00001.jsonl lists the parts (files, rows of a table, images) that the first run found, 00002.jsonl those
that a later run found in addition, and so on; each is written before the first shard of its batch is made, and stays.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from pipeline.errors import StaleOutputError
from pipeline.plan import InputCounts
from pipeline.stage import Shard
from pipeline.storage.files import damaged
from pipeline.storage.run_folder import RunFolder
from pipeline.storage.scratch import temporary_file
from stages.sources.base import InputPart, Source
from stages.sources.files import named_parts
from stages.sources.tabular.known_shards import KnownShards
from stages.sources.tabular.table_rows import TableSource
from stages.sources.tarfiles.counted import can_count, count_rows_of_files, read_counts, shards_of_files
from stages.sources.tree import encoded

_FOLDER = "input"
_LISTED = 3
_RESTORE = "restore it from a copy: it has the input of this run's shards"


class InputBatches:
    """The `Input` of a plan. Lists the source once, so that parts which appear later are left to the next run."""

    def __init__(self, source: Source, run: RunFolder, shard_size: int, row_group: str):
        self.source = source
        self.run = run
        self.shard_size = shard_size
        self.row_group = row_group
        self._files = _batch_files(run)
        self._new: Path | None = None
        self._lost: list[str] = []
        self._begun = self._reads_all = False
        self._taken: Sequence[range] | None = None

    def shards(self) -> Iterator[Shard]:
        self._new_parts()
        if self._lost:
            raise self._refusal()
        if self._taken is not None:
            return self._taken_shards(self._taken)
        note = self._begun
        unseen = not note and next(self.run.recorded_shards(self.row_group), None) is None
        return self._all_shards(note=note, count=unseen and not self._reads_all)

    def _all_shards(self, *, note: bool, count: bool) -> Iterator[Shard]:
        if isinstance(self.source, TableSource):
            known = KnownShards(
                self.run, self.source, self.shard_size, use=not self._reads_all, note=note, count=count
            )
            return known.shards(list(self._parts()))
        return self.source.shards(self.shard_size, self._parts())

    def _taken_shards(self, taken: Sequence[range]) -> Iterator[Shard]:
        if self.source.rows_stand_alone:
            parts = list(self._parts())
            counts = read_counts(self.run, parts) if can_count(self.source, parts) else None
            if counts is not None:
                return shards_of_files(self.source, parts, counts, self.shard_size, taken)
        return _within(taken, self._all_shards(note=False, count=True))

    def count(self) -> InputCounts:
        if can_count(self.source, self._parts()):
            num_shards = count_rows_of_files(self.run, self.source, list(self._parts()), self.shard_size)
        else:
            num_shards = sum(1 for _ in self._all_shards(note=self._begun, count=True))
        return InputCounts(num_shards, len(self._files), self.source.passed_over)

    def take(self, ranges: Sequence[range], counts: InputCounts) -> None:
        self._taken = ranges
        self._files = _batch_files(self.run)[: counts.batches]
        self._new = None
        self.source.passed_over = counts.passed_over

    def begin_run(self) -> None:
        self._begun = True
        self.source.begin_run()

    def read_all(self) -> None:
        self._reads_all = True

    def has_new_input(self) -> bool:
        return self._new_parts().stat().st_size > 0

    def record(self, *, restart: bool) -> None:
        self._new_parts()
        if self._lost:
            if not restart:
                raise self._refusal()
            self._record_remaining()
        for file in sorted(set(_batch_files(self.run)) - set(self._files), reverse=True):  # no shard has them
            self.run.storage.delete(file)
        if self.has_new_input():
            file = f"{_FOLDER}/{len(self._files) + 1:05d}.jsonl"
            self._write(file, map(self._with_row_count, _read(self._new_parts())))
            self._files.append(file)
            self._new_parts().write_bytes(b"")

    def _new_parts(self) -> Path:
        """The list of new parts; the first call compares the source with the recorded parts."""
        if self._new is None:
            self._new = temporary_file(self, "pipeline-input-")
            self._compare(self._new)
            if self._lost and not set(self.run.recorded_shards(self.row_group)):
                self._files = []
                self._compare(self._new)
        return self._new

    def _compare(self, new: Path) -> None:
        with self.source.reaching(), closing(_KnownParts(self.source, self._recorded())) as known:
            found = (left for part in self.source.parts() if (left := known.new_part(part)) is not None)
            if known.names:
                found = named_parts({part.path: part.bytes for part in found}, known.names)
            _dump(new, found)
            self._lost = known.lost()

    def _record_remaining(self) -> None:
        """Takes parts that are gone out of their batch, and records changed ones as they are now."""
        with closing(_KnownParts(self.source, self.source.parts())) as present:
            for file in self._files:
                parts = self._batch(file)
                self._write(file, (left for part in parts if (left := present.part_of(part)) is not None))
        assert self._new is not None
        self._compare(self._new)

    def _with_row_count(self, part: InputPart) -> InputPart:
        if not self.source.grows or part.rows is not None:
            return part
        with self.source.reaching():
            return replace(part, rows=self.source.count_rows(part.path))

    def _recorded(self) -> Iterator[InputPart]:
        for number, file in enumerate(self._files, start=1):
            yield from self._batch(file, number)

    def _batch(self, file: str, batch: int = 0) -> Iterator[InputPart]:
        """The parts that a list has.

        Raises:
            ConfigError: the list is damaged.
        """
        for number, entry in enumerate(self.run.storage.read_json_lines(file, _RESTORE), start=1):
            try:
                yield InputPart(**entry, batch=batch)
            except TypeError as error:
                raise damaged(f"{self.run.url}/{file} entry {number}", error, _RESTORE) from error

    def _parts(self) -> Iterator[InputPart]:
        yield from self._recorded()
        if self._taken is None:
            yield from _read(self._new_parts(), len(self._files) + 1)

    def _write(self, file: str, parts: Iterable[InputPart]) -> None:
        self.run.storage.write_json_lines(file, map(_entry, parts))

    def _refusal(self) -> StaleOutputError:
        return StaleOutputError(
            f"{self.run.url}: the source no longer has what this run was made from:\n  "
            + "\n  ".join(self._lost)
            + "\nRestore it, choose another --out, or rebuild what changed with --restart."
        )


def _within(ranges: Sequence[range], shards: Iterator[Shard]) -> Iterator[Shard]:
    """The shards with these indices; the others after the last of them are not looked at."""
    end = max((those.stop for those in ranges if those), default=0)
    for shard in shards if end else ():
        if any(shard.index in those for those in ranges):
            yield shard
        if shard.index + 1 >= end:
            return


def first_part(run: RunFolder) -> InputPart | None:
    """The first part that a run's first start recorded; None if there is none."""
    files = _batch_files(run)
    entries = run.storage.read_json_lines(files[0], _RESTORE) if files else iter(())
    entry = next(iter(entries), None)
    return None if entry is None else InputPart(entry["path"], name=entry.get("name", ""))


class _KnownParts:
    """Parts by path, on disk: there may be millions."""

    def __init__(self, source: Source, parts: Iterable[InputPart]):
        self.source = source
        self.names: set[str] = set()
        self._changed: list[str] = []
        self._database = sqlite3.connect("")
        self._database.execute("CREATE TABLE parts (path BLOB PRIMARY KEY, bytes INTEGER, rows INTEGER) WITHOUT ROWID")
        self._database.executemany("INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", map(self._entry, parts))

    def _entry(self, part: InputPart) -> tuple[bytes, int | None, int]:
        if part.name:
            self.names.add(part.name)
        return encoded(part.path), part.bytes, part.first + (part.rows or 0)

    def new_part(self, part: InputPart) -> InputPart | None:
        """The unknown part of a part: all of it, rows that were appended to a table, or nothing (None)."""
        query = "DELETE FROM parts WHERE path = ? RETURNING bytes, rows"
        found = self._database.execute(query, (encoded(part.path),)).fetchall()
        if not found:
            return part
        ((size, rows),) = found
        if size == part.bytes and (size is not None or not self.source.grows):
            return None
        now = self.source.count_rows(part.path) if self.source.grows else None
        if now is not None and now >= rows:
            return replace(part, first=rows, rows=now - rows) if now > rows else None
        was, is_now = (f"{size:,} bytes", f"{part.bytes:,}") if now is None else (f"{rows:,} rows", f"{now:,}")
        self._changed.append(f"{_shown(part.path)}: {was} then, {is_now} now")
        return None

    def part_of(self, part: InputPart) -> InputPart | None:
        """The part as the known part of the same path is; None if there is none."""
        query = "SELECT bytes FROM parts WHERE path = ?"
        found = self._database.execute(query, (encoded(part.path),)).fetchone()
        if found is None:
            return None
        if part.rows is None:
            return replace(part, bytes=found[0])
        left = self.source.count_rows(part.path) - part.first
        if left >= part.rows:
            return part  # as it was, so that rows appended since are found
        return replace(part, bytes=found[0], rows=left) if left > 0 else None

    def lost(self) -> list[str]:
        """Messages about parts that changed, and known parts that `new_part` was not called with: the first few."""
        ((gone,),) = self._database.execute("SELECT COUNT(*) FROM parts").fetchall()
        first = self._database.execute("SELECT path FROM parts ORDER BY path LIMIT ?", (_LISTED,)).fetchall()
        lines = [*self._changed, *(f"{_shown(path.decode('utf-8', 'surrogatepass'))}: gone" for (path,) in first)]
        more = len(self._changed) + gone - _LISTED
        return [*lines[:_LISTED], *([f"and {more:,} more"] if more > 0 else [])]

    def close(self) -> None:
        self._database.close()


def _shown(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()


def _batch_files(run: RunFolder) -> list[str]:
    return sorted(f"{_FOLDER}/{name}" for name in run.storage.names(_FOLDER) if name[0].isdigit())


def _read(file: Path, batch: int = 0) -> Iterator[InputPart]:
    with file.open(encoding="utf-8") as lines:
        yield from _parse(lines, batch)


def _parse(lines: Iterable[str], batch: int = 0) -> Iterator[InputPart]:
    return (InputPart(**json.loads(line), batch=batch) for line in lines)


def _dump(file: Path, parts: Iterable[InputPart]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(_entry(part)) + "\n" for part in parts)


def _entry(part: InputPart) -> dict[str, object]:
    entry: dict[str, object] = {"path": part.path, "bytes": part.bytes}
    if part.name:
        entry["name"] = part.name
    if part.rows is not None:
        entry.update(first=part.first, rows=part.rows)
    return entry
