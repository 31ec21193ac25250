"""The stage of an export: the files of one shard of a store -> those of the target."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from imagen_core.store import FileEntry, StoreFolder
from pipeline.stage import Group, GroupResult, Shard, Stage, Task
from pipeline.storage.run_folder import RunFolder
from pipeline.storage.scratch import scratch
from stages.exports.mds import write_mds
from stages.exports.mds_files import INDEX
from stages.exports.parquet import write_parquet
from stages.exports.samples import ExportSample, ShardSamples, open_shard
from stages.exports.selection import Selection
from stages.exports.webdataset import check_names, write_tar

GROUP = "export"
DATA = "data"
_SUFFIXES = {"webdataset": ".tar", "parquet": ".parquet"}


class ExportStage(Stage):
    """Reads the store's files, and writes `data/00000.tar`, `data/00000.parquet` or `data/00000/shard.00000.mds`."""

    name = "export"

    def __init__(self, store: str, selection: Selection):
        """
        Args:
            store: URL of the store. It is no part of the fingerprint, so that a store may be moved.
        """
        self._store, self._selection = store, selection
        self.groups = (Group(GROUP, selection.describe()),)
        if selection.to == "webdataset":
            check_names(selection)

    def setup(self, run: RunFolder) -> None:
        self._folder = StoreFolder(self._store, scratch=scratch())

    def process(self, task: Task) -> None:
        found: dict[str, Any] = task.shard.rows
        entries = {name: FileEntry(**entry) for name, entry in found["files"].items()}
        with open_shard(self._folder, self._selection, task.shard.index, entries, found["excluded"]) as samples:
            rows = iter(samples)
            first = next(rows, None)
            count = 0 if first is None else self._write(task, samples, itertools.chain([first], rows))
            task.done(GROUP, GroupResult(count, samples.drops))

    def _write(self, task: Task, samples: ShardSamples, rows: Iterator[ExportSample]) -> int:
        if self._selection.to == "mds":
            return self._write_mds(task, samples, rows)
        write = write_tar if self._selection.to == "webdataset" else write_parquet
        return write(task.output(GROUP, _SUFFIXES[self._selection.to]), rows, self._selection)

    def _write_mds(self, task: Task, samples: ShardSamples, rows: Iterator[ExportSample]) -> int:
        folder = task.run.storage.new_folder()
        try:
            count = write_mds(folder, rows, self._selection, samples.max_captions)
            for path in sorted(folder.iterdir()):
                path.replace(task.output(GROUP, f"/{path.name}"))
        finally:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        return count


def index_name(shard: str) -> str:
    """Name of the index of a shard's MDS files."""
    return f"{DATA}/{shard}/{INDEX}"


def shards_of(entries: Iterable[Any], selection: Selection) -> Iterator[Shard]:
    """The shards of a store that have samples, as input of the stage.

    Args:
        entries: of the manifest, see `Manifest.shards`.
    """
    for entry in entries:
        if entry.rows == len(entry.excluded):
            continue
        files = {
            name: {"path": file.path, "bytes": file.bytes, "sha256": file.sha256, "rows": file.rows}
            for name in selection.groups
            for file in [entry.files[name]]
        }
        rows = {"files": files, "excluded": sorted(entry.excluded)}
        yield Shard(entry.index, rows, entry.rows - len(entry.excluded))
