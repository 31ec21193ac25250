"""What the driver of a run on an object store knows of the finished work, so that it asks for nothing twice.

Each folder is listed once, a thousand names per request. The records of a group are kept together in one more object,
`state/<group>/records.jsonl.gz`, next to those of its shards, with the version (ETag) that each had in a listing. A
record of that version is not read again, each other one is read by itself. So that object may be missing, old or
damaged: the records of the shards alone say what is finished.
"""

import gzip
import hashlib
import json
import logging
import sqlite3
import threading
import zlib
from collections.abc import Collection, Iterator

from pipeline.storage.base import Storage
from pipeline.storage.files import json_text
from pipeline.storage.lock import PARTS
from pipeline.storage.open import open_storage
from pipeline.storage.record import Record, shard_name, shard_of

log = logging.getLogger(__name__)

TOGETHER = "records.jsonl.gz"
"""Name of the object with all records of a group."""

_SAVED_AT_LEAST = 1000
_DAMAGED = (OSError, EOFError, zlib.error, ValueError, TypeError)
_NEW = 0
"""In place of a version: written since the listing."""


class RecordIndex:
    """The records of one run folder and the sizes of its files, for one process that knows of every change there.

    What it holds is as of the first listing of each folder, with what `note` and `forget` told since. Record contents
    are on disk. Safe for threads; not picklable.
    """

    def __init__(self, storage: Storage, home: str = ""):
        """
        Args:
            home: folder of the objects with all records, where it is not `state/<group>`: another process has its own.
        """
        self._storage = storage
        self._home = home
        self._mutex = threading.RLock()
        self._sizes: dict[str, dict[str, int]] = {}
        """Folder -> name -> bytes."""
        self._versions: dict[str, dict[int, int]] = {}
        """Group -> shard index -> digest of the record's size and version."""
        self._homes: list[str] | None = None
        self._loaded: set[str] = set()
        """Groups whose object with all records was looked for."""
        self._unsaved: dict[str, int] = {}
        """Group -> number of changes that the object with all its records lacks."""
        self._records = sqlite3.connect("", check_same_thread=False)
        self._records.execute(
            "CREATE TABLE records (name TEXT, shard INTEGER, version INTEGER, bytes INTEGER, data BLOB, "
            "PRIMARY KEY (name, shard)) WITHOUT ROWID"
        )

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the files directly in a folder, by name; not to be changed."""
        with self._mutex:
            if folder not in self._sizes:
                self._sizes[folder] = {name: size for name, size, _ in self._storage.listing(folder)}
            return self._sizes[folder]

    def size(self, path: str) -> int | None:
        """Bytes of a file, None if there is none."""
        folder, _, name = path.rpartition("/")
        return self.sizes(folder).get(name)

    def shards(self, group: str) -> list[int]:
        """Indices of the shards that have a record, in no order."""
        with self._mutex:
            return list(self._listed(group))

    def has(self, group: str, shard: int) -> bool:
        """Whether a shard has a record, which may be damaged."""
        with self._mutex:
            return shard in self._listed(group)

    def read(self, group: str, shard: int) -> Record | None:
        """A record; None if there is none, or if it is damaged."""
        with self._mutex:
            version = self._listed(group).get(shard)
            if version is None:
                return None
            query = "SELECT data FROM records WHERE name = ? AND shard = ?"
            found = self._records.execute(query, (group, shard)).fetchone()
        if found is not None:
            return Record.found(json.loads(zlib.decompress(found[0])), group, shard)
        record = Record.found(
            self._storage.read_json_if_whole(f"{_folder(group)}/{shard_name(shard)}.json"), group, shard
        )
        if record is not None:
            with self._mutex:
                self._keep(record, version)
                self._count(group)
        return record

    def note(self, record: Record) -> None:
        """Tells that a record, and before it its files, were written."""
        with self._mutex:
            self._listed(record.group)[record.shard] = _NEW
            self._keep(record, _NEW)
            self._count(record.group)
            for file in record.files:
                self.note_file(file.path, file.bytes)

    def note_file(self, path: str, size: int) -> None:
        """Tells that a file of this size was written."""
        folder, _, name = path.rpartition("/")
        with self._mutex:
            if folder in self._sizes:
                self._sizes[folder][name] = size

    def forget(self, group: str, shard: int, paths: Collection[str] = ()) -> None:
        """Tells that a record and files were deleted."""
        with self._mutex:
            if self._listed(group).pop(shard, None) is not None:
                self._count(group)
            self._records.execute("DELETE FROM records WHERE name = ? AND shard = ?", (group, shard))
            for path in paths:
                folder, _, name = path.rpartition("/")
                self._sizes.get(folder, {}).pop(name, None)

    def forget_group(self, group: str, folders: Collection[str]) -> None:
        """Tells that all records of a group, and everything in some folders, were deleted."""
        with self._mutex:
            self._versions[group] = {}
            self._unsaved.pop(group, None)
            self._records.execute("DELETE FROM records WHERE name = ?", (group,))
            for folder in folders:
                self._sizes[folder] = {}

    def list_again(self) -> None:
        """Lists each folder anew where it is asked for: workers that died may have left files."""
        with self._mutex:
            self._sizes.clear()
            self._versions.clear()

    @property
    def is_changed(self) -> bool:
        """Whether anything was noted or forgotten."""
        return bool(self._unsaved)

    def save_if_due(self) -> None:
        """Saves the groups whose number of unsaved records has grown by half, so that all that is written together is
        three times the records."""
        for group, unsaved in list(self._unsaved.items()):
            if unsaved >= max(_SAVED_AT_LEAST, len(self._versions.get(group, ())) // 3):
                self._save(group)

    def save(self) -> None:
        """Writes the objects with all records of each group that have changed."""
        for group in [group for group, changes in sorted(self._unsaved.items()) if changes]:
            self._save(group)

    def _save(self, group: str) -> None:
        """Lists the group first, for the versions of new records; those with another size than was written are left
        out, to be read by themselves."""
        name = self._together(group)
        with self._mutex:
            if self._listed(group) and self._has_new(group):
                del self._versions[group]
            if self._listed(group):
                with (
                    self._storage.writing(name) as path,
                    path.open("wb") as file,
                    gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as lines,
                ):
                    for version, data in self._content(group):
                        lines.write(b"[%d, %s]\n" % (version, zlib.decompress(data)))
            elif self._home or TOGETHER in self._sizes.get(_folder(group), ()):
                self._storage.delete(name)
            self._unsaved[group] = 0

    def _has_new(self, group: str) -> bool:
        query = "SELECT 1 FROM records WHERE name = ? AND version = ? LIMIT 1"
        return self._records.execute(query, (group, _NEW)).fetchone() is not None

    def _content(self, group: str) -> Iterator[tuple[int, bytes]]:
        query = "SELECT version, data FROM records WHERE name = ? AND version != ? ORDER BY shard"
        yield from self._records.execute(query, (group, _NEW))

    def _listed(self, group: str) -> dict[int, int]:
        """Shard index -> version, by a listing unless there was one. Records of other versions are forgotten; those of
        the group's object are loaded once."""
        if group in self._versions:
            return self._versions[group]
        sizes: dict[int, int] = {}
        versions: dict[int, int] = {}
        others: dict[str, int] = {}
        for name, size, version in self._storage.listing(_folder(group)):
            index = shard_of(name)
            if index is None:
                others[name] = size
            else:
                sizes[index], versions[index] = size, _digest(size, version)
        self._versions[group], self._sizes[_folder(group)] = versions, others
        query = "SELECT shard, version, bytes FROM records WHERE name = ?"
        for shard, version, size in self._records.execute(query, (group,)).fetchall():
            fits = version == versions.get(shard) or (version == _NEW and size == sizes.get(shard))
            change = "UPDATE records SET version = ?1" if fits else "DELETE FROM records"
            self._records.execute(f"{change} WHERE name = ?2 AND shard = ?3", (versions.get(shard), group, shard))
        if group not in self._loaded:
            self._loaded.add(group)
            if TOGETHER in others:
                self._load(group, versions, f"{_folder(group)}/{TOGETHER}")
            for name in self._others(group):
                self._load(group, versions, name)
        return versions

    def _together(self, group: str) -> str:
        """The object with all records of a group."""
        return f"{self._home}/{group}-{TOGETHER}" if self._home else f"{_folder(group)}/{TOGETHER}"

    def _others(self, group: str) -> list[str]:
        """The objects with the records of parts of the group: this process's own, or those of all."""
        if self._homes is None:
            parts = open_storage(f"{self._storage.url}/{PARTS}").entries() if not self._home else ()
            self._homes = [f"{PARTS}/{name}" for name, is_folder in parts if is_folder] or [self._home]
        names = [f"{home}/{group}-{TOGETHER}" for home in sorted(self._homes) if home]
        return [name for name in names if self._storage.size(name) is not None]

    def _load(self, group: str, versions: dict[int, int], name: str) -> None:
        copy = self._storage.copy(name)
        try:
            with gzip.open(copy, "rb") as lines:
                for line in lines:
                    version, value = json.loads(line)
                    record = Record.found(value, group, None)
                    if record is not None and versions.get(record.shard) == version:
                        self._keep(record, version)
        except _DAMAGED as error:
            log.warning("%s/%s: is damaged (%s); each record is read by itself", self._storage.url, name, error)
            self._count(group)  # written again
        finally:
            self._storage.release(copy)

    def _keep(self, record: Record, version: int) -> None:
        value = record.to_json()
        data = zlib.compress(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(), 1)
        row = (record.group, record.shard, version, len(json_text(value).encode()), data)
        self._records.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)", row)

    def _count(self, group: str) -> None:
        self._unsaved[group] = self._unsaved.get(group, 0) + 1


def _folder(group: str) -> str:
    return f"state/{group}"


def _digest(size: int, version: str) -> int:
    """63 bits, never `_NEW`."""
    digest = hashlib.sha256(f"{size} {version}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 or 1
