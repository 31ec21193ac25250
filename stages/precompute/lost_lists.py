"""Writes a list of drops again that is gone from `quarantine/`: the rows and reasons are in what was committed."""

from collections.abc import Mapping, Sequence

from imagen_core.store import SamplesFile
from pipeline.stage import Drop, Shard
from pipeline.storage.record import Record
from pipeline.storage.run_folder import RunFolder
from stages.precompute.fetch import SAMPLES
from stages.sources.base import Source


def lost_drops(run: RunFolder, shard: Shard, record: Record, source: Source) -> list[Drop]:
    """The dropped rows of a committed (group, shard), by row; only their details are lost.

    `samples` files name the dropped input rows by reason; other groups name rows of `samples` in their
    record.
    """
    keys = [source.identifiers(row)[0] for row in shard.rows]
    rows: Mapping[str, Sequence[int]] = record.info.get("excluded_rows") or record.info.get("rows_without", {})
    if record.group == SAMPLES:
        copy = run.proven_copy(record.file)
        try:
            rows = SamplesFile(str(copy), record.file.path).dropped
        finally:
            run.storage.release(copy)
    elif rows:
        file = run.committed_file(SAMPLES, shard.name)
        copy = run.proven_copy(file)
        try:
            samples = SamplesFile(str(copy), file.path)
            keys = [samples.key(row) for row in range(samples.num_rows)]
        finally:
            run.storage.release(copy)
    found = [(row, reason) for reason, listed in rows.items() for row in listed]
    return [Drop(row, keys[row], reason) for row, reason in sorted(found)]
