"""The run folder: where a run keeps its configuration, state, events and store.

RUN/  config.yaml  plan.json  events.jsonl  summary.json  state/<group>/<shard>.json  quarantine/
      store/  staging/  report/
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, LostFileError, MachineError
from pipeline.storage import LocalStorage, Storage
from pipeline.storage.files import damaged, file_digest
from pipeline.storage.lock import LEASE, PARTS, Lease, RunLock, lease_of_part
from pipeline.storage.open import open_storage
from pipeline.storage.record import CommittedFile, Record, shard_name, shard_of
from pipeline.storage.record_index import RecordIndex

CONFIG = "config.yaml"
PLAN = "plan.json"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
ESTIMATE = "estimate.json"
DIVISION = f"{PARTS}/plan.json"
"""How the work is divided among several drivers, if it is."""
STORE = "store"
QUARANTINE = "quarantine"


class RunFolder:
    """Names and small files of one run, in a local folder or below a URL. Picklable: workers get a copy."""

    def __init__(self, place: str | os.PathLike[str] | Storage, transient_groups: frozenset[str] = frozenset()):
        self.storage = place if isinstance(place, Storage) else open_storage(place)
        self.transient_groups = transient_groups
        self.folders: Mapping[str, str] = {}
        """Where the files of some groups lie, in place of the store; see `Plan.folders`."""
        self.lease: Lease | None = None
        """The right to write, once the run has it."""
        self.index: RecordIndex | None = None
        """What is known of a folder on an object store, in the process that alone changes it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "index": None}

    @property
    def url(self) -> str:
        return self.storage.url

    @property
    def store_url(self) -> str:
        return f"{self.url}/{STORE}"

    @property
    def root(self) -> Path:
        """The local folder.

        Raises:
            ConfigError: the run is on an object store.
        """
        if not isinstance(self.storage, LocalStorage):
            raise ConfigError(f"--out {self.url}: this workflow needs a local folder; give one")
        return self.storage.root

    @property
    def failures(self) -> str:
        """Folder with the tracebacks of the shards that failed in the last run."""
        return f"{QUARANTINE}/failed"

    def group_folder(self, group: str) -> str:
        """Where the group's files lie: in the store, or in staging for intermediate files."""
        if group in self.folders:
            return self.folders[group]
        return f"staging/{group}" if group in self.transient_groups else f"{STORE}/{group}"

    def record_name(self, group: str, shard: str) -> str:
        return f"state/{group}/{shard}.json"

    def drops_name(self, group: str, shard: str) -> str:
        """The list of dropped samples."""
        return f"{QUARANTINE}/{group}/{shard}.jsonl"

    def read_record(self, group: str, shard: str) -> Record | None:
        """The completion record, or None if this (group, shard) is not finished; a damaged one is unfinished work."""
        if self.index is not None:
            return self.index.read(group, int(shard))
        return Record.found(self.storage.read_json_if_whole(self.record_name(group, shard)), group, int(shard))

    def read_engine_file(self, name: str) -> dict[str, Any] | None:
        """What every run writes anew: its plan or its summary; None if there is none.

        Raises:
            ConfigError: it is damaged.
        """
        remedy = "the same `pipeline run` again writes it anew"
        value = self.storage.read_json(name, remedy)
        if value is not None and not isinstance(value, dict):
            raise damaged(f"{self.url}/{name}", "no mapping", remedy)
        return value

    def write_record(self, record: Record) -> None:
        """Declares a (group, shard) finished."""
        self.storage.write_json(self.record_name(record.group, shard_name(record.shard)), record.to_json())
        self.note(record)

    def note(self, record: Record) -> None:
        """Tells the process that alone changes the folder what its workers have committed."""
        if self.index is not None:
            self.index.note(record)
            if record.drops:
                self.index.note_file(self.drops_name(record.group, shard_name(record.shard)), 0)

    def records(self, group: str) -> Iterator[Record]:
        """All completion records of a group in shard order, a few at a time; without damaged ones."""
        names = map(shard_name, sorted(self.recorded_shards(group)))
        for record in self.storage.map(lambda name: self.read_record(group, name), names):
            if record is not None:
                yield record

    def recorded_shards(self, group: str) -> Iterator[int]:
        """Indices of the shards with a completion record, in no order."""
        if self.index is not None:
            yield from self.index.shards(group)
            return
        found = map(shard_of, self.storage.names(f"state/{group}"))
        yield from (index for index in found if index is not None)

    def names(self, folder: str) -> Iterator[str]:
        """Names of the files directly in a folder, without the folder, in no order."""
        yield from self.storage.names(folder) if self.index is None else list(self.index.sizes(folder))

    def size(self, path: str) -> int | None:
        """Bytes of a file, None if there is none."""
        return self.storage.size(path) if self.index is None else self.index.size(path)

    def started_groups(self) -> list[str]:
        """Groups that any run of the folder has started, sorted."""
        return sorted(name.removesuffix(".json") for name in self.storage.names("state") if name.endswith(".json"))

    def part_folder(self, part: int) -> str:
        """Where the driver of a part writes what is its own: events, and what it knows of the records."""
        return f"{PARTS}/{part:05d}"

    @contextmanager
    def indexed(self, part: int | None = None) -> Iterator[None]:
        """Within it, a folder on an object store is listed once: nobody else changes it, or that does not matter.

        Args:
            part: nobody else changes what is of the shards of this part.
        """
        before, self.index = self.index, self.index
        if before is None and not isinstance(self.storage, LocalStorage):
            self.index = RecordIndex(self.storage, "" if part is None else self.part_folder(part))
        try:
            yield
        finally:
            self.index = before

    def proven_copy(self, file: CommittedFile) -> Path:
        """A local path of a committed file with the bytes of its record, to be released with `storage.release`.

        Whatever is made from committed files reads them through this, so that nothing is made of a damaged one.

        Raises:
            LostFileError: it is gone.
            MachineError: it was changed since it was committed.
        """
        remedy = "the same `pipeline run` again makes only this file, and what was made from it, again"
        try:
            copy = self.storage.copy(file.path)
        except FileNotFoundError as error:
            raise LostFileError(
                f"{self.url}/{file.path}: is missing, but was committed; restore it from a copy; or {remedy}"
            ) from error
        size_bytes, digest = copy.stat().st_size, file_digest(copy)
        if (size_bytes, digest) != (file.bytes, file.sha256):
            self.storage.release(copy)
            raise MachineError(
                f"{self.url}/{file.path}: {size_bytes} bytes with sha256 {digest}, but {file.bytes} bytes with "
                f"{file.sha256} were committed, so it was changed since; move it away: {remedy}"
            )
        return copy

    def committed_file(self, group: str, shard: str) -> CommittedFile:
        """The only file of a committed (group, shard)."""
        record = self.read_record(group, shard)
        if record is None:
            raise FileNotFoundError(f"{group}/{shard} is not committed in {self.url}")
        return record.file

    def delete_shard(self, group: str, shard: str) -> None:
        """Deletes a (group, shard): the record first, so that after a kill no record names a missing file."""
        if self.index is not None:
            names = self._names_of(self.index, group, shard)
            self.storage.delete_all(names[:1])
            self.storage.delete_all(names[1:])
            self.index.forget(group, int(shard), names)
            return
        record = self.read_record(group, shard)
        self.storage.delete(self.record_name(group, shard))
        self.storage.delete(self.drops_name(group, shard))
        for file in record.files if record else ():
            self.storage.delete(file.path)

    def delete_shards(self, group: str, shards: Sequence[str]) -> None:
        """Deletes shards of a group, on an object store many with a request; a record may go after its files, which
        makes it unfinished work too."""
        if self.index is None:
            for shard in shards:
                self.delete_shard(group, shard)
            return
        names = {shard: self._names_of(self.index, group, shard) for shard in shards}
        self.storage.delete_all([name for found in names.values() for name in found])
        for shard, found in names.items():
            self.index.forget(group, int(shard), found)

    def _names_of(self, index: RecordIndex, group: str, shard: str) -> list[str]:
        """The files that a shard of a group is known to have, its record first."""
        if not index.has(group, int(shard)):
            record, names = None, []
        else:
            record, names = index.read(group, int(shard)), [self.record_name(group, shard)]
        drops = self.drops_name(group, shard)
        names += [drops] if index.size(drops) is not None else []
        return names + [file.path for file in record.files] if record else names

    def delete_group(self, group: str) -> None:
        """Deletes all of a group, records first."""
        folders = (f"state/{group}", f"{QUARANTINE}/{group}", self.group_folder(group))
        for folder in folders:
            self.storage.delete_folder(folder)
        if self.index is not None:
            self.index.forget_group(group, folders)

    def check(self) -> None:
        """To be called before what must not be written by a run that lost the folder; nothing without a lease.

        Raises:
            LockedError: another run has taken the folder over.
        """
        if self.lease is not None:
            self.lease.check()

    def check_step(self) -> None:
        """The same at the end of each step, at next to no cost; see `Lease.check_step`."""
        if self.lease is not None:
            self.lease.check_step()

    @contextmanager
    def lock(self, *, take_over: bool = False, part: int | None = None) -> Iterator[Lease]:
        """Holds the folder, or a part of it, for this process while the block runs, without what killed ones left
        half-written; see `RunLock`."""
        name = LEASE if part is None else lease_of_part(part)
        with RunLock(self.storage, take_over=take_over, name=name) as lease:
            self.storage.owner = "" if part is None else f"part{part:05d}-"
            self.lease, allowed = lease, self.storage.before_change
            try:
                self.storage.clean()
                self.storage.before_change = lease.check_change
                with self.indexed(part):
                    yield lease
            finally:
                self.lease, self.storage.before_change, self.storage.owner = None, allowed, ""
