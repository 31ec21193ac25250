"""Remove samples from a store: find them, log the removal, and rewrite the manifest."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from imagen_core.store.errors import StoreError
from imagen_core.store.files.samples import SamplesFile
from imagen_core.store.folder import StoreFolder
from imagen_core.store.layout import MANIFEST_NAME, REMOVED
from imagen_core.store.manifest import Manifest, load_manifest, write_manifest
from imagen_core.store.records import FileEntry, ShardEntry
from imagen_core.store.removal_log import (
    IDENTIFIERS,
    Blocklist,
    Removal,
    RemovedRow,
    load_removals,
    removal_entries,
    removal_path,
    row_digests,
    value_digest,
    write_head,
)


class RemovalRaceError(StoreError):
    """Another removal took the place in the log."""


Values = Mapping[str, Collection[str]]
"""Requested keys, URLs and sha256, by identifier."""


@dataclass(slots=True)
class RemovalMatches:
    """The rows of a store that have one of the requested values.

    Attributes:
        rows: rows that are not removed yet, by shard index.
        matched: values that some row has, removed or not, by identifier.
    """

    rows: dict[int, list[RemovedRow]] = field(default_factory=dict)
    matched: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in IDENTIFIERS})


def matching_rows(samples: SamplesFile, values: Values) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Rows that have one of the values, each with the (identifier, value) pairs it has."""
    wanted = {name: set(values.get(name, ())) for name in IDENTIFIERS if values.get(name)}
    columns = {name: samples.texts(name) for name in wanted}
    for row in range(samples.num_rows):
        hits = [(name, value) for name, column in columns.items() if (value := column[row]) in wanted[name]]
        if hits:
            yield row, hits


def find_rows(
    shards: Iterable[tuple[int, SamplesFile, Mapping[int, str]]], removals: Collection[Removal], values: Values
) -> RemovalMatches:
    """Look for the values in all shards, given as (index, samples, excluded rows with the reason of each)."""
    found = RemovalMatches()
    removed = {(shard, row.row) for removal in removals for shard, rows in removal.rows.items() for row in rows}
    for shard, samples, excluded in shards:
        for row, hits in matching_rows(samples, values):
            for name, value in hits:
                found.matched[name].add(value)
            if (shard, row) not in removed:
                sample = samples.row(row)
                digests: dict[str, Any] = row_digests(sample.key, sample.url, sample.sha256)
                removed_row = RemovedRow(row, **digests, excluded=excluded.get(row, REMOVED))
                found.rows.setdefault(shard, []).append(removed_row)
    return found


def find_blocked(
    shards: Iterable[tuple[int, SamplesFile, Mapping[int, str]]], removals: Collection[Removal]
) -> RemovalMatches:
    """Rows of shards, given as for `find_rows`, whose removal was requested, and that none of the removals has."""
    found = RemovalMatches()
    blocklist = Blocklist(removals)
    removed = {(shard, row.row) for removal in removals for shard, rows in removal.rows.items() for row in rows}
    for shard, samples, excluded in shards:
        for row, sample in enumerate(map(samples.row, range(samples.num_rows))):
            identifiers = zip(IDENTIFIERS, (sample.key, sample.url, sample.sha256), strict=True)
            if (shard, row) not in removed and any(blocklist.has(*pair) for pair in identifiers):
                digests: dict[str, Any] = row_digests(sample.key, sample.url, sample.sha256)
                removed_row = RemovedRow(row, **digests, excluded=excluded.get(row, REMOVED))
                found.rows.setdefault(shard, []).append(removed_row)
    return found


def add_removal(
    folder: StoreFolder,
    removals: list[Removal],
    found: RemovalMatches,
    values: Values,
    time: str,
    reason: str,
    *,
    at_work: bool = False,
) -> Removal | None:
    """Log a removal: from then on readers leave its rows out. None if the log has all of it already.

    Args:
        at_work: a run is at work, which may store a sample that was not found.
    Raises:
        RemovalRaceError: another removal was logged in the meantime.
    """
    known, last = Blocklist(removals), removals[-1].file if removals else None
    if not found.rows and all(known.has(name, value) for name, listed in values.items() for value in listed):
        if last is not None:
            write_head(folder, len(removals), last.sha256)  # a kill may have come before it
        return None
    blocked = {name: tuple(sorted({value_digest(name, v) for v in values.get(name, ())})) for name in IDENTIFIERS}
    rows = {shard: tuple(rows) for shard, rows in found.rows.items()}
    removal = Removal(time, reason, blocked, rows, last.sha256 if last else "", at_work)
    number, data = len(removals) + 1, removal.dump()
    path = removal_path(number)
    if not folder.create(path, data):
        raise RemovalRaceError(f"{folder.path(path)}: was written meanwhile by another removal; run the command again")
    write_head(folder, number, hashlib.sha256(data).hexdigest())
    return removal


def rewrite_manifest(folder: StoreFolder, new_files: Mapping[tuple[int, str], FileEntry] | None = None) -> Manifest:
    """Rewrite the manifest with all removals that are logged.

    Args:
        new_files: files that replace the previous ones, by shard index and group.
    Returns:
        The new manifest.
    """
    manifest = load_manifest(folder)
    removals = load_removals(folder, listed=manifest.listed_removals)
    header = {**manifest.header, **({"removals": removal_entries(removals)} if removals else {})}
    with folder.replacing(MANIFEST_NAME) as path:
        write_manifest(path, header, (_raw_shard(shard, new_files or {}) for shard in manifest.shards()))
    return load_manifest(folder)


def _raw_shard(shard: ShardEntry, new_files: Mapping[tuple[int, str], FileEntry]) -> dict[str, Any]:
    """The shard in the form that `write_manifest` takes."""
    files = {name: new_files.get((shard.index, name), entry) for name, entry in shard.files.items()}
    by_reason: dict[str, list[int]] = {}
    for row, reason in shard.excluded.items():
        by_reason.setdefault(reason, []).append(row)
    raw: dict[str, Any] = {
        "index": shard.index,
        "rows": shard.rows,
        "excluded": by_reason,
        "files": {
            name: {"path": file.path, "bytes": file.bytes, "sha256": file.sha256, "rows": file.rows}
            for name, file in files.items()
        },
    }
    return {**raw, **({"retry_of": [list(place) for place in shard.retry_of]} if shard.retry_of else {})}
