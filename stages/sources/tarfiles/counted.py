"""Shards of some files alone, where it is known how many rows each file has.

The driver that divides a run counts the rows of each file, and notes them in RUN/input/counted.jsonl, so that the
drivers of parts open only the files that their shards are of.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import PurePosixPath

from pipeline.errors import ConfigError, StaleOutputError
from pipeline.stage import Shard
from pipeline.storage.run_folder import RunFolder
from stages.sources.base import InputPart, Source, SourceRow, mark_duplicates, split_into_shards

COUNTED = "input/counted.jsonl"


def can_count(source: Source, parts: Iterable[InputPart]) -> bool:
    """Whether the rows of each file are the same whatever other files there are; no name may begin another one, as
    keys begin with names."""
    if not source.rows_stand_alone:
        return False
    names = {part.name for part in parts}
    return not any(str(above) in names for name in names for above in PurePosixPath(name).parents)


def count_rows_of_files(run: RunFolder, source: Source, parts: Sequence[InputPart], shard_size: int) -> int:
    """Counts the rows of all files and notes them; returns the number of shards."""
    counts = dict.fromkeys((part.path for part in parts), 0)
    source.filtered = 0
    with source.reaching():
        for part, _ in source.rows(parts):
            counts[part.path] += 1
    run.storage.write_json_lines(COUNTED, ([part.path, counts[part.path]] for part in parts))
    batches = groupby(parts, key=lambda part: part.batch)
    return sum(-(-sum(counts[part.path] for part in batch) // shard_size) for _, batch in batches)


def read_counts(run: RunFolder, parts: Sequence[InputPart]) -> list[int] | None:
    """The number of rows of each of these files; None if it was not noted for exactly these."""
    if run.storage.size(COUNTED) is None:
        return None
    try:
        lines = list(run.storage.read_json_lines(COUNTED))
        return [int(rows) for _, rows in lines] if [path for path, _ in lines] == [p.path for p in parts] else None
    except (ConfigError, TypeError, ValueError):
        return None


def shards_of_files(
    source: Source, parts: Sequence[InputPart], counts: Sequence[int], shard_size: int, wanted: Sequence[range]
) -> Iterator[Shard]:
    """The shards with these indices, rising, of the rows of all files.

    Raises:
        StaleOutputError: a file has another number of rows.
    """
    index = place = 0
    for _, group in groupby(parts, key=lambda part: part.batch):
        batch = list(group)
        rows = counts[place : place + len(batch)]
        place += len(batch)
        num_shards = -(-sum(rows) // shard_size)
        for those in wanted:
            first, end = max(those.start, index), min(those.stop, index + num_shards)
            if first < end:
                begin = (first - index) * shard_size
                found = _rows_between(source, batch, rows, begin, (end - index) * shard_size)
                yield from split_into_shards(found, shard_size, source.layout, first)
        index += num_shards


def _rows_between(
    source: Source, parts: Sequence[InputPart], counts: Sequence[int], first: int, end: int
) -> Iterator[tuple[InputPart, SourceRow]]:
    """Some rows of all rows of these files, whose other files are not opened."""
    chosen: list[InputPart] = []
    expected: dict[str, int] = {}
    start = number = 0
    for part, count in zip(parts, counts, strict=True):
        if start + count > first and start < end:
            number = start if not chosen else number
            chosen.append(part)
            expected[part.path] = count
        start += count
    with source.reaching():
        found = mark_duplicates(source.rows(chosen)) if source.keys_may_repeat else source.rows(chosen)
        for path, rows in groupby(found, key=lambda each: each[0].path):
            count = 0
            for row in rows:
                if first <= number < end:
                    yield row
                number, count = number + 1, count + 1
                if number >= end:
                    return
            if count != expected[path]:
                raise StaleOutputError(
                    f"source.path: {path} has {count:,} samples, and had {expected[path]:,} when the input was "
                    "counted for all parts; restore it"
                )
