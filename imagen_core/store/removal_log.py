"""The log of removals: which samples were removed from a store, and which must never be stored again.

    STORE/removed/00001.json         one removal, never changed afterwards
      removed/00002.json ...
      removed/log.json               how many there are at least, and the sha256 of the last of them

A file is a tombstone: once it exists, readers that open the store leave its rows out. When the manifest is next
written, it includes the rows and lists the files with their sha256, so a reader only looks for later files. The rows
keep their places, so that nothing else moves. `blocked` has digests of all requested values, found or not: later runs
do not store such samples again. Keys, URLs and sha256 are in these files only as digests.

The log is a chain: each file names the sha256 of the one before (`previous`; files of earlier versions do not), and
the manifest and `log.json` say how long it is. A file that was changed, or is missing, is an error: without it,
removed samples would come back.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

from imagen_core.store.errors import ManifestError
from imagen_core.store.files.samples import SamplesFile
from imagen_core.store.folder import StoreFolder
from imagen_core.store.layout import MANIFEST_NAME, REMOVED, shard_name
from imagen_core.store.records import FileEntry

IDENTIFIERS = ("key", "url", "sha256")
"""The fields by which a removal can name a sample."""

_FOLDER = "removed"
REMOVAL_HEAD = f"{_FOLDER}/log.json"
_NUMBERED = re.compile(r"(\d{5,})\.json")
_RESTORE = "restore it from a copy of the store: without it, removed samples would come back"


@dataclass(frozen=True, slots=True)
class RemovedRow:
    """One removed row; key, url and sha256 are digests.

    `excluded` is `removed`, or the reason for which readers left the row out already.
    """

    row: int
    key: str
    url: str | None
    sha256: str
    excluded: str = REMOVED


@dataclass(frozen=True, slots=True)
class Removal:
    """One removal.

    Attributes:
        time: UTC, ISO 8601.
        reason: free text by the person who removed the samples.
        blocked: digests of the requested values, by identifier, sorted.
        rows: the removed rows by shard index.
        previous: sha256 of the previous file of the log, "" in the first; None in a file of an earlier version.
        at_work: logged while a run was at work, which may have stored a sample that `rows` lacks.
        file: the file that it was read from.
    """

    time: str
    reason: str
    blocked: Mapping[str, tuple[str, ...]]
    rows: Mapping[int, tuple[RemovedRow, ...]] = field(default_factory=dict)
    previous: str | None = None
    at_work: bool = False
    file: FileEntry | None = field(default=None, compare=False)

    @property
    def num_rows(self) -> int:
        """Number of removed rows in all shards."""
        return sum(len(rows) for rows in self.rows.values())

    def dump(self) -> bytes:
        """The removal as JSON; the same removal gives the same bytes."""
        rows = {shard_name(shard): [asdict(row) for row in self.rows[shard]] for shard in sorted(self.rows)}
        value: dict[str, Any] = {"time": self.time, "reason": self.reason, "blocked": dict(self.blocked), "rows": rows}
        if self.previous is not None:
            value["previous"] = self.previous
        if self.at_work:
            value["at_work"] = True
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def parse_removal(data: bytes, file: str, entry: FileEntry | None = None) -> Removal:
    """The removal in a file of the log; `file` names it in errors.

    Raises:
        ManifestError: the data is not a removal.
    """
    try:
        raw = json.loads(data)
        rows = {int(shard): tuple(RemovedRow(**row) for row in listed) for shard, listed in raw["rows"].items()}
        blocked = {str(name): tuple(raw["blocked"].get(name, ())) for name in IDENTIFIERS}
        chain = raw.get("previous"), bool(raw.get("at_work", False))
        return Removal(str(raw["time"]), str(raw["reason"]), blocked, rows, *chain, file=entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        name = MANIFEST_NAME if entry is None else entry.path
        raise ManifestError(f"{file}: not a list of removed samples ({error}); {_RESTORE}", name) from error


def removal_path(number: int) -> str:
    """Path of a removal by its number, from 1, relative to the store."""
    return f"{_FOLDER}/{number:05d}.json"


def removal_entries(removals: Iterable[Removal]) -> list[dict[str, Any]]:
    """The value of "removals" in the manifest's header, of removals that `load_removals` read."""
    files = (removal.file for removal in removals if removal.file is not None)
    return [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in files]


def load_removals(folder: StoreFolder, after: int = 0, listed: Sequence[Mapping[str, Any]] = ()) -> list[Removal]:
    """The removals of a store, by number, without the first `after`.

    Args:
        listed: the removals that a manifest lists; the log is not shorter.
    Raises:
        ManifestError: a file of the log is damaged or missing.
    """
    at_least, last_digest = _read_head(folder)
    least = max(at_least, len(listed), _highest_number(folder) if folder.is_local else 0)
    digests = {0: "", **({at_least: last_digest} if at_least else {})}
    digests.update((number, str(entry["sha256"])) for number, entry in enumerate(listed, start=1))
    result: list[Removal] = []
    previous = digests.get(after)
    for number in count(after + 1):
        witness = MANIFEST_NAME if number <= len(listed) else REMOVAL_HEAD if number <= at_least else "a later file"
        try:
            data, entry = _read(folder, number, digests.get(number), witness)
        except FileNotFoundError:
            if number > least:
                return result
            raise _missing(folder, number, witness) from None
        removal = parse_removal(data, folder.path(entry.path), entry)
        if None not in (removal.previous, previous) and removal.previous != previous:
            raise ManifestError(
                f"{folder.path(entry.path)}: follows a file of sha256 {removal.previous or 'none'}, but that of "
                f"{removal_path(number - 1)} is {previous or 'none'}, so one of the two was changed; {_RESTORE}",
                entry.path,
            )
        previous = entry.sha256
        result.append(removal)
    raise AssertionError("the count never ends")


def check_listed(folder: StoreFolder, listed: Sequence[Mapping[str, Any]]) -> None:
    """Compares the files of the log that a manifest lists with their sha256.

    Raises:
        ManifestError: one was changed, or is missing.
    """
    for number, entry in enumerate(listed, start=1):
        try:
            _read(folder, number, str(entry["sha256"]), MANIFEST_NAME)
        except FileNotFoundError:
            raise _missing(folder, number, MANIFEST_NAME) from None


def _read(folder: StoreFolder, number: int, digest: str | None, witness: str) -> tuple[bytes, FileEntry]:
    """A file of the log, which has the sha256 that `witness` says, if it says one."""
    path = removal_path(number)
    try:
        data = folder.read_bytes(path)
    except NotADirectoryError as error:
        raise FileNotFoundError(path) from error
    entry = FileEntry(path, len(data), hashlib.sha256(data).hexdigest(), 0)
    if digest not in (None, entry.sha256):
        raise ManifestError(
            f"{folder.path(path)}: sha256 {entry.sha256}, but {witness} says {digest}, so one of the two was changed; "
            f"{_RESTORE}",
            path,
        )
    return data, entry


def _missing(folder: StoreFolder, number: int, witness: str) -> ManifestError:
    path = removal_path(number)
    return ManifestError(f"{folder.path(path)}: missing, but {witness} says that there is one; {_RESTORE}", path)


def write_head(folder: StoreFolder, number: int, sha256: str) -> None:
    """Records that the log has at least `number` removals, the last of them with this sha256."""
    if _read_head(folder) == (number, sha256):
        return
    head = {"removals": number, "sha256": sha256}
    folder.write(REMOVAL_HEAD, json.dumps(head, sort_keys=True, separators=(",", ":")).encode() + b"\n")


def _read_head(folder: StoreFolder) -> tuple[int, str]:
    """How many removals the log has at least, and the sha256 of the last of these; logs of earlier versions: 0, ""."""
    try:
        head = json.loads(folder.read_bytes(REMOVAL_HEAD))
        number, digest = head["removals"], head["sha256"]
        if type(number) is not int or type(digest) is not str:
            raise ValueError(f"removals {number!r}, sha256 {digest!r}")
        return number, digest
    except (FileNotFoundError, NotADirectoryError):
        return 0, ""
    except (ValueError, KeyError, TypeError) as error:
        path = folder.path(REMOVAL_HEAD)
        raise ManifestError(f"{path}: not the end of a log of removals ({error}); {_RESTORE}", REMOVAL_HEAD) from error


def _highest_number(folder: StoreFolder) -> int:
    try:
        names = os.listdir(folder.path(_FOLDER))
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return max((int(found[1]) for name in names if (found := _NUMBERED.fullmatch(name))), default=0)


def value_digest(identifier: str, value: str) -> str:
    """The digest of a key, URL or sha256 in the log: 64 hex digits."""
    return hashlib.sha256(f"{identifier}\0{value}".encode("utf-8", "surrogatepass")).hexdigest()


def row_digests(key: str, url: str | None, sha256: str) -> dict[str, str | None]:
    """The digest of each field by which a removal can name a sample; None for a sample without URL."""
    values = zip(IDENTIFIERS, (key, url, sha256), strict=True)
    return {name: None if value is None else value_digest(name, value) for name, value in values}


class Blocklist:
    """The requested values of all removals of a store: samples that must not be stored again."""

    def __init__(self, removals: Iterable[Removal]) -> None:
        self._blocked: dict[str, set[str]] = {name: set() for name in IDENTIFIERS}
        for removal in removals:
            for name, digests in removal.blocked.items():
                self._blocked[name].update(digests)

    def has(self, identifier: str, value: str | None) -> bool:
        """Whether the removal of this value was requested."""
        blocked = self._blocked[identifier]
        return bool(blocked) and value is not None and value_digest(identifier, value) in blocked

    def blocks(self, key: str, url: str | None, data: bytes | None) -> bool:
        """Whether the removal of a sample with this key, URL or original file was requested."""
        sha256 = hashlib.sha256(data).hexdigest() if data is not None and self._blocked["sha256"] else None
        return self.has("key", key) or self.has("url", url) or self.has("sha256", sha256)


def blank_key(shard: int, row: int) -> str:
    """The key of a row whose content was erased."""
    return f"{REMOVED}/{shard_name(shard)}/{row}"


def removed_rows(removals: Iterable[Removal], shard: int, samples: SamplesFile) -> dict[int, RemovedRow]:
    """The removed rows of a shard by increasing row.

    Rows of a `samples` file that was made again since then do not count, as other samples may be in their places.
    """
    found: dict[int, RemovedRow] = {}
    for removal in removals:
        for removed in removal.rows.get(shard, ()):
            if removed.row < samples.num_rows:
                key = samples.key(removed.row)
                if key == blank_key(shard, removed.row) or value_digest("key", key) == removed.key:
                    found.setdefault(removed.row, removed)
    return dict(sorted(found.items()))
