"""The bytes of dropped rows, where their originals are still in the run folder: kept, or of an unfinished shard."""

import tarfile
from collections.abc import Iterable, Iterator

from pipeline.errors import MachineError
from pipeline.storage import LocalStorage
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import RunFolder
from stages.precompute.fetch import ORIGINALS
from stages.precompute.originals import OriginalsReader, StoredOriginal


def staged_bytes(run: RunFolder, shard: int, rows: Iterable[int]) -> Iterator[tuple[StoredOriginal, bytes]]:
    """The originals of some rows of a shard's input that were fetched and are still there, one at a time in row order;
    none where the run is not in a local folder.

    Raises:
        MachineError: the file of originals is damaged.
    """
    record = run.read_record(ORIGINALS, shard_name(shard)) if isinstance(run.storage, LocalStorage) else None
    if record is None or run.storage.size(record.file.path) is None:
        return
    wanted = frozenset(rows)
    path = run.root / record.file.path
    try:
        with OriginalsReader(path) as reader:
            for entry in reader.entries:
                if entry.row in wanted and entry.size:
                    yield entry, reader.data(entry)
    except (tarfile.TarError, ValueError, KeyError) as error:
        remedy = "the same `pipeline run` again makes it anew"
        raise MachineError(f"{path}: cannot be read ({error}); {remedy}") from error
