"""manifest.json: what the store holds, and the proof of it.

The file is JSON, written in one pass so that 100,000 shards never sit in memory:

    {
    "groups":{...},                 the header, sorted, one key per line
    "input_rows":...,               rows of the source, as counted when it was read
    "removals":[...],               removals whose rows are excluded below: path, bytes, sha256
    "schema_version":2,
    "writer":"...",
    "shards":[
    {"excluded":{},"files":{...},"index":0,"rows":64},
    ...                             one line per shard, by increasing index
    ],
    "num_bytes":..., "num_rows":..., "num_samples":..., "num_shards":...,
    "sha256":"..."                  of every byte above this line
    }

The bytes after the last total are fixed except for the digest: one changed byte anywhere, also white space, is found.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from imagen_core.files import fsync_path
from imagen_core.store.errors import ADVICE, ManifestError, StoreError
from imagen_core.store.file_columns import FileColumns
from imagen_core.store.folder import StoreFolder
from imagen_core.store.layout import (
    LAYERS_SCHEMA_VERSION,
    MANIFEST_NAME,
    OLDEST_READABLE,
    SAMPLES_GROUP,
    ColumnType,
    shard_path,
)
from imagen_core.store.records import (
    ArrayGroup,
    CaptionsGroup,
    FileEntry,
    Group,
    ImageEmbedGroup,
    ImagesGroup,
    SamplesGroup,
    SetTextGroup,
    ShardEntry,
    TextGroup,
    caption_weights,
    groups_by,
    null_files,
    parse_group,
    parse_shard,
    schema_version,
)
from imagen_core.store.removal_log import Removal, check_listed, load_removals, removal_path

_SHARDS = b'\n"shards":[\n'
_END_OF_SHARDS = b"\n],\n"
_TOTALS = ("num_bytes", "num_rows", "num_samples", "num_shards")
_TAIL = b'"sha256":"%s"\n}\n'
_TAIL_BYTES = len(_TAIL) - 2 + 64


class Manifest:
    """A checked manifest. Shards are kept as columns: about 60 bytes per file.

    Attributes:
        header: the header as written: schema_version, writer, groups and any other keys.
        input_rows, filtered: rows of the source that the store accounts for (None: unknown), that were left out.
        failed_shards: indices of shards of the source that the store lacks, because a stage failed on them.
        groups: the header's groups, typed, by name.
        num_shards, num_rows, num_samples, num_bytes: totals; samples are rows that are not excluded,
            bytes are those of all files but the manifest.
        num_removals: removals from the store; their rows are excluded.
        version: of the file when it was read, see `StoreFolder.version`.
        sha256: the manifest's own digest; equal digests and num_removals mean equal stores.
        index: int64 (num_shards,), the number in each shard's file names, increasing.
        rows: int64 (num_shards,), rows of each shard, excluded ones included.
        excluded: the excluded rows of each shard that has some, by position in `rows`: row -> reason, by row.
        retries: the retry shards, by position in `rows`: int64 (n, 2), the (shard index, input row) at which each
            input row was tried before.
    """

    def __init__(self, header: dict[str, Any], shards: Iterable[dict[str, Any]]) -> None:
        self.header = header
        _check_header(header)
        self.groups = _parse_groups(header)
        self.input_rows: int | None = header.get("input_rows")
        self.filtered = int(header.get("filtered", 0))
        self.failed_shards: tuple[int, ...] = tuple(header.get("failed_shards", ()))
        self.sha256 = ""
        self.version: str | None = None
        self.excluded: dict[int, dict[int, str]] = {}
        self.retries: dict[int, np.ndarray] = {}
        indices: list[int] = []
        rows: list[int] = []
        columns: dict[str, FileColumns] = {name: FileColumns() for name in self.groups}
        for raw in shards:
            shard = _next_shard(raw, self.groups, indices[-1] if indices else -1)
            if shard.excluded:
                self.excluded[len(rows)] = shard.excluded
            if shard.retry_of:
                self.retries[len(rows)] = np.array(shard.retry_of, dtype=np.int64)
            indices.append(shard.index)
            rows.append(shard.rows)
            for name, column in columns.items():
                column.append(shard.files.get(name))
        self.index = np.array(indices, dtype=np.int64)
        self.rows = np.array(rows, dtype=np.int64)
        self._files = {name: column.freeze() for name, column in columns.items()}
        self.num_shards = len(rows)
        self.num_rows = int(self.rows.sum())
        self.num_removals = len(self.listed_removals)
        self.num_bytes = sum(int(sizes[sizes > 0].sum()) for sizes, *_ in self._files.values())
        self.num_bytes += sum(null.bytes for null in null_files(self.groups))

    @property
    def schema_version(self) -> int:
        """Version of the store's format; 1 has neither input rows nor digests."""
        return self.header["schema_version"]

    @property
    def listed_removals(self) -> list[dict[str, Any]]:
        """Path, bytes and sha256 of the removals the manifest was written with."""
        return self.header.get("removals", [])

    @property
    def num_samples(self) -> int:
        """Rows that are not excluded."""
        return self.num_rows - sum(len(rows) for rows in self.excluded.values())

    def remove(self, removal: Removal) -> None:
        """Excludes the rows of a removal that was logged after the manifest was written."""
        for index, removed in removal.rows.items():
            position = int(np.searchsorted(self.index, index))
            if position < self.num_shards and self.index[position] == index:
                before = self.excluded.get(position, {})
                rows = {row.row: row.excluded for row in removed if row.row < self.rows[position]} | before
                self.excluded[position] = dict(sorted(rows.items()))
        self.num_removals += 1

    @property
    def columns(self) -> dict[str, ColumnType]:
        """Types of the columns that were kept of the source, by name."""
        samples = self.groups[SAMPLES_GROUP]
        return samples.columns if isinstance(samples, SamplesGroup) else {}

    @cached_property
    def images(self) -> dict[int, ImagesGroup]:
        """Image groups by size in pixels, increasing."""
        return groups_by(self.groups, ImagesGroup, "size_px")

    @cached_property
    def texts(self) -> dict[str, TextGroup]:
        """Text groups by encoder name, sorted."""
        return groups_by(self.groups, TextGroup, "encoder")

    @cached_property
    def captions(self) -> dict[str, CaptionsGroup]:
        """Groups of further sets of captions by the set's name, sorted."""
        return groups_by(self.groups, CaptionsGroup, "caption_set")

    @cached_property
    def set_texts(self) -> dict[tuple[str, str], SetTextGroup]:
        """Groups of their embeddings by encoder and set."""
        return {(g.encoder, g.caption_set): g for g in self.groups.values() if isinstance(g, SetTextGroup)}

    @cached_property
    def image_embeds(self) -> dict[str, ImageEmbedGroup]:
        """Groups of image embeddings by encoder name, sorted."""
        return groups_by(self.groups, ImageEmbedGroup, "encoder")

    @cached_property
    def arrays(self) -> dict[str, ArrayGroup]:
        """Groups of arrays by name, sorted."""
        return groups_by(self.groups, ArrayGroup, "array")

    def shard(self, position: int) -> ShardEntry:
        """The shard at a position in [0, num_shards)."""
        files = {name: entry for name in self.groups if (entry := self.file(name, position)) is not None}
        rows, excluded = int(self.rows[position]), self.excluded.get(position, {})
        retry_of = tuple((of, row) for of, row in self.retries.get(position, np.zeros((0, 2), int)).tolist())
        return ShardEntry(int(self.index[position]), rows, files, excluded, retry_of)

    def shards(self) -> Iterator[ShardEntry]:
        """All shards by increasing index."""
        return (self.shard(position) for position in range(self.num_shards))

    def file(self, group: str, position: int) -> FileEntry | None:
        """The file of a group in the shard at a position; None in a shard without rows."""
        sizes, rows, digests, revisions = self._files[group]
        if sizes[position] < 0:
            return None
        path = shard_path(group, int(self.index[position]), self.groups[group].format, revisions.get(position, 0))
        return FileEntry(path, int(sizes[position]), digests[position].tobytes().hex(), int(rows[position]))


def write_manifest(path: str | os.PathLike[str], header: dict[str, Any], shards: Iterable[dict[str, Any]]) -> None:
    """Write manifest.json: to a temporary name next to it, fsync, then an atomic rename.

    Shards are read one at a time and not kept in memory. The totals and the digest are added here. The same
    input gives the same bytes.

    Args:
        header: "groups", "writer", "input_rows" if it is known, "removals" if there are any, and anything else that
            is JSON; "schema_version" is added unless it is there.
        shards: entries by increasing index; see ShardEntry for the fields.
    Raises:
        ValueError: a header or shard that `load_manifest` would refuse; a previous file stays.
    """
    groups = _parse_groups(header)
    header = {"schema_version": schema_version(groups), **header}
    _check_header(header)
    num_bytes = sum(null.bytes for null in null_files(groups))
    num_rows = num_samples = num_shards = 0
    last = -1
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            out = _HashingWriter(file)
            lines = (_dump(key) + b":" + _dump(header[key]) for key in sorted(header))
            out.write(b"{\n" + b",\n".join(lines) + b"," + _SHARDS[:-1])
            for raw in shards:
                shard = _next_shard(raw, groups, last)
                last = shard.index
                out.write((b",\n" if num_shards else b"\n") + _dump(raw))
                num_shards += 1
                num_rows += shard.rows
                num_samples += shard.rows - len(shard.excluded)
                num_bytes += sum(entry.bytes for entry in shard.files.values())
            totals = (num_bytes, num_rows, num_samples, num_shards)
            lines = (b'"%s":%d,\n' % (name.encode(), n) for name, n in zip(_TOTALS, totals, strict=True))
            out.write(_END_OF_SHARDS + b"".join(lines))
            file.write(_TAIL % out.digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def load_manifest(source: str | os.PathLike[str] | StoreFolder) -> Manifest:
    """Read and check the manifest of a store (a folder or a fsspec URL), with the removals since it was written.

    Raises:
        ManifestError: a byte was changed, it is not a manifest, or the log of removals is damaged.
        StoreError: not a store, an unfinished one, or one of a newer schema version.
    """
    folder = source if isinstance(source, StoreFolder) else StoreFolder(source)
    manifest = read_manifest(folder)
    apply_removals(folder, manifest)
    return manifest


def read_manifest(folder: StoreFolder) -> Manifest:
    """The manifest alone, without later removals; raises like `load_manifest`."""
    version = folder.version(MANIFEST_NAME)  # of the bytes below, or earlier
    data, digest = _intact_bytes(folder)
    try:
        manifest = _parse(data, len(data) - _TAIL_BYTES)
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{folder.path(MANIFEST_NAME)}: not a manifest ({error}); {ADVICE}") from error
    manifest.sha256, manifest.version = digest, version
    return manifest


def read_header(folder: StoreFolder) -> dict[str, Any]:
    """The header of an intact manifest, without the shards; raises like `load_manifest`."""
    return json.loads(_head(_intact_bytes(folder)[0])[:-1] + b"}")


def apply_removals(folder: StoreFolder, manifest: Manifest) -> None:
    """Exclude the rows of removals that were logged after the manifest was written.

    Files that the manifest lists are compared only in a local store, as it has their rows. Raises ManifestError if the
    log is damaged, or shorter than the manifest says.
    """
    listed = manifest.listed_removals
    if folder.is_local:
        check_listed(folder, listed)
    for removal in load_removals(folder, after=len(listed), listed=listed):
        manifest.remove(removal)


def _intact_bytes(folder: StoreFolder) -> tuple[bytes, str]:
    """The bytes of a manifest that its digest fits, and this digest."""
    try:
        data = folder.read_bytes(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _no_manifest(folder) from error
    digest = hashlib.sha256(memoryview(data)[:-_TAIL_BYTES]).hexdigest()
    intact, path = data[-_TAIL_BYTES:] == _TAIL % digest.encode(), folder.path(MANIFEST_NAME)
    version = _schema_version(data, intact)
    if version is not None and version > LAYERS_SCHEMA_VERSION:
        raise StoreError(
            f"{path}: schema_version is {version}, this library reads up to {LAYERS_SCHEMA_VERSION}; upgrade "
            "imagen-precompute"
        )
    if not intact:
        raise ManifestError(
            f"{path}: {len(data)} bytes that do not match their own sha256, so it was changed or truncated; {ADVICE}"
        )
    return data, digest


def _parse(data: bytes, stop: int) -> Manifest:
    """Parses the bytes before `stop`, without copies: a manifest of 400,000 shards has 250 MB."""
    head = _head(data)
    start = len(head) + len(_SHARDS)
    end = start if data.startswith(_END_OF_SHARDS[1:], start) else data.rindex(_END_OF_SHARDS, 0, stop)
    foot = data[end:stop].lstrip(b"\n").removeprefix(_END_OF_SHARDS[1:])
    manifest = Manifest(json.loads(head[:-1] + b"}"), _shard_lines(data, start, end))
    totals = json.loads(b"{" + foot.rstrip(b",\n") + b"}")
    for name in _TOTALS:
        if totals.pop(name) != getattr(manifest, name):
            raise ValueError(f"{name} does not match the shards ({getattr(manifest, name)})")
    return manifest


def _head(data: bytes) -> bytes:
    """The bytes before the shards; all of them if there are none."""
    end = data.find(_SHARDS)
    return data if end < 0 else data[:end]


def _shard_lines(body: bytes, start: int, end: int) -> Iterator[dict[str, Any]]:
    while start < end:
        stop = body.find(b"\n", start, end)
        stop = end if stop < 0 else stop
        yield json.loads(body[start:stop].rstrip(b","))
        start = stop + 1


def _check_header(header: dict[str, Any]) -> None:
    version = header.get("schema_version")
    if type(version) is not int or not OLDEST_READABLE <= version <= LAYERS_SCHEMA_VERSION:
        raise ValueError(f"schema_version must be {OLDEST_READABLE} to {LAYERS_SCHEMA_VERSION} (got {version!r})")
    for number, entry in enumerate(header.get("removals", []), start=1):
        if set(entry) != {"path", "bytes", "sha256"} or entry["path"] != removal_path(number):
            raise ValueError(f"removals: {entry} should be path, bytes and sha256 of {removal_path(number)}")
    for name in ("input_rows", "filtered"):
        if type(header.get(name, 0)) is not int:
            raise ValueError(f"{name} must be an integer (got {header[name]!r})")
    if type(failed := header.get("failed_shards", [])) is not list or any(type(index) is not int for index in failed):
        raise ValueError(f"failed_shards must be a list of integers (got {failed!r})")
    caption_weights(header.get("captions", ()), further=())  # refuses what is not valid
    if reserved := {"shards", "sha256", *_TOTALS} & set(header):
        raise ValueError(f"header keys {sorted(reserved)} are added by write_manifest; leave them out")


def _parse_groups(header: dict[str, Any]) -> dict[str, Group]:
    groups = {name: parse_group(name, raw) for name, raw in sorted(header["groups"].items())}
    if not isinstance(groups.get(SAMPLES_GROUP), SamplesGroup):
        raise ValueError(f"groups {sorted(groups)} lack {SAMPLES_GROUP!r}")
    return groups


def _next_shard(raw: Any, groups: dict[str, Group], last: int) -> ShardEntry:
    shard = parse_shard(raw, groups)
    if shard.index <= last:
        raise ValueError(f"shard {shard.index} after shard {last}: give them by increasing index")
    return shard


def _schema_version(data: bytes, intact: bool) -> int | None:
    """The version a manifest claims; a newer one may be laid out differently, but is JSON."""
    try:
        head = _head(data)[:-1] + b"}" if intact else data
        version = json.loads(head).get("schema_version")
    except (ValueError, AttributeError, RecursionError):
        return None
    return version if type(version) is int else None


def _no_manifest(folder: StoreFolder) -> StoreError:
    root = folder.path("")
    if folder.exists(SAMPLES_GROUP):
        return StoreError(
            f"{folder.path(MANIFEST_NAME)} is missing, but {SAMPLES_GROUP}/ is there: the run that writes it has not "
            "finished; run the same pipeline command again"
        )
    if folder.exists(f"store/{MANIFEST_NAME}"):
        return StoreError(f"{root}: not a store but the run around it; open {folder.path('store')}")
    return StoreError(f"{root}: not a store (no {MANIFEST_NAME}); give the folder `pipeline run` wrote")


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


class _HashingWriter:
    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
