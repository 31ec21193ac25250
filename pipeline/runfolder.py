"""The run folder: where a run keeps its configuration, state, events and store.

RUN/  config.yaml  plan.json  events.jsonl  summary.json  state/<group>/<shard>.json  quarantine/
      store/  staging/  report/
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from pipeline.errors import ConfigError
from pipeline.files import remove_temporaries, temporary_name

Record = dict[str, object]

_LOCK_TIMEOUT_S = 1.0  # `pipeline status` holds the lock for a moment


class RunFolder:
    """Paths and small files of one run. Picklable: workers get a copy."""

    def __init__(self, root: Path, transient_groups: frozenset[str] = frozenset()):
        self.root = root.absolute()
        self.transient_groups = transient_groups

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def config_file(self) -> Path:
        return self.root / "config.yaml"

    @property
    def plan_file(self) -> Path:
        return self.root / "plan.json"

    @property
    def events_file(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.root / "summary.json"

    @property
    def estimate_file(self) -> Path:
        return self.root / "estimate.json"

    @property
    def report_folder(self) -> Path:
        return self.root / "report"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    def group_folder(self, group: str) -> Path:
        """Where the group's files lie: in the store, or in staging for intermediate files."""
        return (self.staging if group in self.transient_groups else self.store) / group

    def record_file(self, group: str, shard: str) -> Path:
        return self.root / "state" / group / f"{shard}.json"

    def temporary(self, final: Path) -> Path:
        return temporary_name(final)

    def read_record(self, group: str, shard: str) -> Record | None:
        """The completion record, or None if this (group, shard) is not finished."""
        try:
            return json.loads(self.record_file(group, shard).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def records(self, group: str) -> Iterator[Record]:
        """All completion records of a group in shard order, read one at a time."""
        for index in sorted(self.recorded_shards(group)):
            record = self.read_record(group, f"{index:05d}")
            if record is not None:
                yield record

    def recorded_shards(self, group: str) -> Iterator[int]:
        """Indices of the shards with a completion record, in no order."""
        folder = self.root / "state" / group
        if folder.is_dir():
            with os.scandir(folder) as entries:
                yield from (int(e.name.removesuffix(".json")) for e in entries if e.name[0].isdigit())

    def committed_file(self, group: str, shard: str) -> Path:
        """The one file of a committed (group, shard)."""
        record = self.read_record(group, shard)
        if record is None:
            raise FileNotFoundError(f"{group}/{shard} is not committed in {self.root}")
        files = record["files"]
        assert isinstance(files, list)
        assert len(files) == 1
        return self.root / files[0]["path"]

    def forget(self, group: str, shard: str) -> None:
        """Removes a (group, shard): the record first, so that a kill in between loses no truth."""
        record = self.read_record(group, shard)
        self.record_file(group, shard).unlink(missing_ok=True)
        (self.quarantine / group / f"{shard}.jsonl").unlink(missing_ok=True)
        files = record["files"] if record else []
        assert isinstance(files, list)
        for file in files:
            (self.root / file["path"]).unlink(missing_ok=True)

    def forget_group(self, group: str) -> None:
        """Removes a whole group, records first."""
        shutil.rmtree(self.root / "state" / group, ignore_errors=True)
        shutil.rmtree(self.quarantine / group, ignore_errors=True)
        shutil.rmtree(self.group_folder(group), ignore_errors=True)

    def clean(self) -> int:
        """Removes what a killed run left half-written."""
        return sum(remove_temporaries(self.root / part) for part in ("store", "staging", "state", "quarantine"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; the lock goes with the process, however it ends.

        Raises:
            ConfigError: another run holds it, or the folder cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--out {self.root}: cannot be made ({error.strerror}); choose a folder that you can write to"
            ) from error
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S)
        except Timeout as error:
            raise ConfigError(
                f"--out {self.root}: another run is working in this folder; wait for it, or choose another folder"
            ) from error
        try:
            yield
        finally:
            lock.release()


class EventLog:
    """Appends one JSON line an event to events.jsonl."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("a", encoding="utf-8", errors="backslashreplace")

    def write(self, event: str, **fields: object) -> None:
        line = {"time": round(time.time(), 3), "event": event, **fields}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
