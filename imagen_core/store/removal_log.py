"""The log of removals: which samples were removed from a store, and which must never be stored again.

    STORE/removed/00001.json         one removal, never changed afterwards
      removed/00002.json ...

A file is a tombstone: once it exists, readers that open the store leave its rows out. When the manifest is next
written, it includes the rows and lists the files with their sha256, so a reader only looks for later files. The rows
keep their places, so that nothing else moves. `blocked` has digests of all requested values, found or not: later runs
do not store such samples again. Keys, URLs and sha256 are in these files only as digests.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from imagen_core.store.errors import ADVICE, ManifestError
from imagen_core.store.files.parquet import SamplesFile
from imagen_core.store.folder import StoreFolder
from imagen_core.store.layout import REMOVED, shard_name

IDENTIFIERS = ("key", "url", "sha256")
"""The fields by which a removal can name a sample."""


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
    """

    time: str
    reason: str
    blocked: Mapping[str, tuple[str, ...]]
    rows: Mapping[int, tuple[RemovedRow, ...]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Number of removed rows in all shards."""
        return sum(len(rows) for rows in self.rows.values())

    def dump(self) -> bytes:
        """The removal as JSON; the same removal gives the same bytes."""
        rows = {shard_name(shard): [asdict(row) for row in self.rows[shard]] for shard in sorted(self.rows)}
        value = {"time": self.time, "reason": self.reason, "blocked": dict(self.blocked), "rows": rows}
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def parse_removal(data: bytes, file: str) -> Removal:
    """The removal in a file of the log; `file` names it in errors.

    Raises:
        ManifestError: the data is not a removal.
    """
    try:
        raw = json.loads(data)
        rows = {int(shard): tuple(RemovedRow(**row) for row in listed) for shard, listed in raw["rows"].items()}
        blocked = {str(name): tuple(raw["blocked"].get(name, ())) for name in IDENTIFIERS}
        return Removal(str(raw["time"]), str(raw["reason"]), blocked, rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{file}: not a list of removed samples ({error}); {ADVICE}") from error


def removal_path(number: int) -> str:
    """Path of a removal by its number, from 1, relative to the store."""
    return f"removed/{number:05d}.json"


def load_removals(folder: StoreFolder, after: int = 0) -> list[Removal]:
    """The removals of a store, by number, without the first `after`.

    Raises:
        ManifestError: a file of the log is damaged.
    """
    result: list[Removal] = []
    while True:
        path = removal_path(after + len(result) + 1)
        try:
            data = folder.read_bytes(path)
        except (FileNotFoundError, NotADirectoryError):
            return result
        result.append(parse_removal(data, folder.path(path)))


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
