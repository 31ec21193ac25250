"""`pipeline remove --compact`: erases removed samples from every file of a store and of the run around it.

New files are written next to the old ones, under names with a revision; the manifest then names all of them at once,
and last, after a time of grace, the old ones are deleted. Killed at any moment, the store is the old one or the new
one, and the same command again does the rest.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from imagen_core.store import (
    LOOK_EVERY_S,
    MANIFEST_NAME,
    REMOVED,
    SAMPLES_GROUP,
    SCHEMA_VERSION,
    Blocklist,
    CaptionsFile,
    CaptionsGroup,
    ErasedShard,
    FileEntry,
    Group,
    ImagesGroup,
    OtherGroup,
    Removal,
    SamplesFile,
    StoreFolder,
    load_manifest,
    load_removals,
    parse_group,
    read_header,
    removed_rows,
    revision_of,
    rewrite_manifest,
    shard_path,
)
from pipeline.engine.retries import has_retries, redact_retries, retry_origins
from pipeline.errors import ConfigError
from pipeline.storage.disk import file_system_type
from pipeline.storage.files import commit_file, file_digest, remove_temporaries, temporary_name
from pipeline.storage.record import CommittedFile, Record, shard_name
from pipeline.storage.run_folder import STORE, RunFolder
from stages.captioners.answers import delete_all_answers
from stages.precompute.fetch import ORIGINALS
from stages.precompute.manifest import run_group
from stages.precompute.originals import OriginalsReader, OriginalsWriter
from stages.sources.base import Original
from stages.sources.registry import source_of_run

_NETWORK_FILE_SYSTEMS = frozenset(
    (
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "lustre",
        "ceph",
        "glusterfs",
        "fuse.glusterfs",
        "beegfs",
        "gpfs",
        "afs",
        "fuse.sshfs",
    )
)


@dataclass(slots=True)
class Compacted:
    """What was done: files written again, and bytes that the store became smaller."""

    files: int = 0
    bytes_freed: int = 0
    removed_inputs: dict[int, set[int]] = field(default_factory=dict)
    """Input rows of the removed samples, earlier tries included, by shard index."""


def compact(
    store: Path, run: RunFolder | None, grace_s: float | None = None, check: Callable[[], None] = lambda: None
) -> Compacted:
    """Erases all removed samples; the caller holds the lock of the run, or of the store.

    Args:
        check: called before each shard, before the switch to the new files, and before old ones are deleted; raises
            LockedError if the lock was lost.
        grace_s: seconds between the switch to the new files and the deletion of the old ones. Readers look for new
            files once a minute. None: 120 on a network file system, where a file that is deleted ends those who read
            it; 0 elsewhere, where it can be read until it is closed.
    Raises:
        ConfigError: a store of schema 1 or with a group of a later version, or a run whose source is not known.
        StoreError, MachineError: a file was changed since it was written, or cannot be read.
    """
    source = source_of_run(run) if run is not None and has_retries(run) else None
    remove_temporaries(store)  # of a compaction that was killed
    folder = StoreFolder(store)
    header = read_header(folder) if folder.exists(MANIFEST_NAME) else {}
    removals = load_removals(folder, listed=header.get("removals", ()))
    blocklist = Blocklist(removals)
    files: _StoreFiles = _StoreFiles(folder) if run is None else _RunFiles(run)
    for group in files.groups.values():
        if isinstance(group, OtherGroup):
            raise ConfigError(
                f"{folder.url}: group {group.name!r} is of kind {group.kind!r}, of a later version of "
                "imagen-precompute, so removed samples cannot be erased from it; upgrade"
            )
    result, new_files = Compacted(), {}
    for shard, revision in sorted(_last_removals(removals).items()):
        check()
        for name, entry in _erase_shard(folder, files, shard, revision, removals, result).items():
            new_files[shard, name] = entry
    check()
    if run is not None:
        _add_earlier_tries(run, result.removed_inputs)
        delete_all_answers(run)
        _compact_originals(run, blocklist, len(removals), result)
        if source is not None:
            is_removed = lambda row: blocklist.blocks(*source.identifiers(row), None)  # noqa: E731
            redact_retries(run, result.removed_inputs, is_removed, source.redact)
        run.storage.delete_folder("report")  # shows images and captions
    if (store / MANIFEST_NAME).exists():
        rewrite_manifest(folder, new_files)
    replaced = [other for (shard, _), entry in new_files.items() for other in _others(store / entry.path, shard)]
    if replaced:
        time.sleep(_default_grace_s(store) if grace_s is None else grace_s)
    check()
    for other in replaced:
        _delete(other)
    return result


def _default_grace_s(store: Path) -> float:
    return 2 * LOOK_EVERY_S if file_system_type(store) in _NETWORK_FILE_SYSTEMS else 0.0


def _last_removals(removals: Sequence[Removal]) -> dict[int, int]:
    """Shard index -> number of the last removal with rows of it."""
    return {shard: number for number, removal in enumerate(removals, start=1) for shard in removal.rows}


class _StoreFiles:
    """The files of a store without its run; only the manifest has to name the new files."""

    def __init__(self, folder: StoreFolder):
        manifest = load_manifest(folder)
        if manifest.schema_version < SCHEMA_VERSION:
            raise ConfigError(
                f"{folder.url}: a store of schema {manifest.schema_version} cannot be compacted; its removed samples "
                "are hidden from readers, or make it again with `pipeline run precompute --restart`"
            )
        self.groups: dict[str, Group] = manifest.groups
        self._manifest = manifest

    def entries(self, shard: int) -> Mapping[str, FileEntry]:
        """The shard's file in each group."""
        (positions,) = np.nonzero(self._manifest.index == shard)
        return self._manifest.shard(int(positions[0])).files if len(positions) else {}

    def replace(self, shard: int, new: Mapping[str, FileEntry]) -> None:
        """Records the new files of a shard."""


class _RunFiles(_StoreFiles):
    """The files of a run as its records name them, including unfinished groups."""

    def __init__(self, run: RunFolder):
        self._run = run
        names = [name for name in run.started_groups() if name != ORIGINALS]
        self.groups = {name: parse_group(name, run_group(run, name)) for name in names}

    def entries(self, shard: int) -> Mapping[str, FileEntry]:
        records = {name: self._run.read_record(name, shard_name(shard)) for name in self.groups}
        return {name: self._entry(record) for name, record in records.items() if record is not None}

    def _entry(self, record: Record) -> FileEntry:
        file, rows = record.file, record.info.get("captions", record.rows)
        return FileEntry(file.path.removeprefix(f"{STORE}/"), file.bytes, file.sha256, rows)

    def replace(self, shard: int, new: Mapping[str, FileEntry]) -> None:
        for name, entry in new.items():
            _replace_file(self._run, name, shard, f"{STORE}/{entry.path}", entry)


def _erase_shard(
    folder: StoreFolder, files: _StoreFiles, shard: int, revision: int, removals: Sequence[Removal], result: Compacted
) -> dict[str, FileEntry]:
    """Writes the files that are not erased yet; returns all files of the shard as they are now, by group.

    Only bytes that are still those of the manifest or the records are copied, so that the new digests hide no damage.
    """
    store = Path(folder.path(""))
    entries = files.entries(shard)
    if SAMPLES_GROUP not in entries:
        return {}
    folder.check_bytes(entries[SAMPLES_GROUP])
    path = folder.path(entries[SAMPLES_GROUP].path)
    samples = SamplesFile(path, path)
    removed = removed_rows(removals, shard, samples)
    if not removed:
        return {}
    result.removed_inputs[shard] = {samples.row(row).input_row for row in removed}
    shapes = next((group.shapes for group in files.groups.values() if isinstance(group, ImagesGroup)), ())
    sets: dict[str, CaptionsFile] = {}
    for name, group in files.groups.items():
        if isinstance(group, CaptionsGroup) and name in entries:
            folder.check_bytes(entries[name])
            path = folder.path(entries[name].path)
            sets[group.caption_set] = CaptionsFile(path, path)
    erased = ErasedShard.of(shard, samples, removed, shapes, sets)
    for entry in entries.values():
        if revision_of(entry.path) < revision:
            folder.check_bytes(entry)
    new: dict[str, FileEntry] = {}
    for name, entry in entries.items():
        if revision_of(entry.path) < revision:
            group = files.groups[name]
            relative = shard_path(name, shard, group.format, revision)
            temporary = temporary_name(store / relative)
            try:
                rows = erased.write(group, str(store / entry.path), temporary)
                new[name] = FileEntry(relative, temporary.stat().st_size, file_digest(temporary), rows)
                commit_file(temporary, store / relative)
            finally:
                temporary.unlink(missing_ok=True)
            result.files += 1
            result.bytes_freed += entry.bytes - new[name].bytes
    files.replace(shard, new)
    return {**entries, **new}


def _replace_file(run: RunFolder, group: str, shard: int, name: str, entry: FileEntry) -> None:
    """Changes the record of a finished (group, shard) to another file."""
    record = run.read_record(group, shard_name(shard))
    assert record is not None
    run.write_record(replace(record, files=(CommittedFile(name, entry.bytes, entry.sha256),)))


def _others(path: Path, shard: int) -> list[Path]:
    """The files of a shard that `path` has replaced."""
    return [other for other in path.parent.glob(f"{shard_name(shard)}.*") if other != path]


def _delete(path: Path) -> None:
    path.unlink()


def _compact_originals(run: RunFolder, blocklist: Blocklist, revision: int, result: Compacted) -> None:
    """Erases images, captions and URLs from the fetched originals that the run keeps."""
    for record in run.records(ORIGINALS):
        shard = record.shard
        path = run.proven_copy(record.file)
        removed = result.removed_inputs.get(shard, set())
        with OriginalsReader(path) as old:
            rows = set(_blocked_originals(old, blocklist, removed))
            if rows:
                final = path.with_name(f"{shard_name(shard)}.r{revision}{path.suffix}")
                temporary = temporary_name(final)
                try:
                    _copy_originals(old, temporary, rows)
                    entry = FileEntry(final.name, temporary.stat().st_size, file_digest(temporary), 0)
                    commit_file(temporary, final)
                finally:
                    temporary.unlink(missing_ok=True)
                _replace_file(run, ORIGINALS, shard, final.relative_to(run.root).as_posix(), entry)
                path = final
                result.files += 1
        for other in _others(path, shard):
            _delete(other)


def _blocked_originals(originals: OriginalsReader, blocklist: Blocklist, removed: Collection[int]) -> Iterator[int]:
    for entry in originals.entries:
        if entry.reason != REMOVED:
            data = originals.data(entry) if entry.size else None
            if entry.row in removed or blocklist.blocks(entry.key, entry.url, data):
                yield entry.row


def _copy_originals(old: OriginalsReader, path: Path, erased: Collection[int]) -> None:
    with OriginalsWriter(path) as new:
        for entry in old.entries:
            if entry.row in erased:
                new.write(Original(entry.row, entry.key, None, (), reason=REMOVED))
            else:
                new.write(replace(entry, data=old.data(entry) if entry.size else None))


def _add_earlier_tries(run: RunFolder, removed_inputs: dict[int, set[int]]) -> None:
    """Adds the rows that the removed rows of retry shards were in their earlier tries."""
    origins = retry_origins(run)
    unseen = [(shard, row) for shard, rows in removed_inputs.items() for row in rows]
    while unseen:
        shard, row = unseen.pop()
        if shard in origins:
            earlier_shard, earlier_row = origins[shard][row]
            removed_inputs.setdefault(earlier_shard, set()).add(earlier_row)
            unseen.append((earlier_shard, earlier_row))
