"""Check every byte of a store against its manifest, and every rule of the format."""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagen_core.store.errors import ManifestError, StoreError
from imagen_core.store.files.arrays import array_problem, open_arrays
from imagen_core.store.files.captions import CaptionsFile, caption_ids_problem, distinct_captions
from imagen_core.store.files.digest import (
    array_digest,
    caption_digest,
    captions_digest,
    fingerprint_digest,
    image_digest,
)
from imagen_core.store.files.hashes import HashesFile
from imagen_core.store.files.images import open_images
from imagen_core.store.files.null import parse_null
from imagen_core.store.files.ragged import all_finite
from imagen_core.store.files.samples import SamplesFile
from imagen_core.store.files.shard import open_embeddings, read_digests
from imagen_core.store.folder import StoreFolder
from imagen_core.store.layout import HUB_FILES, LOCK_FILES, MANIFEST_NAME, REMOVED, SAMPLES_GROUP, SCHEMA_VERSION
from imagen_core.store.manifest import Manifest, apply_removals, read_manifest
from imagen_core.store.probe import parse_probe
from imagen_core.store.records import (
    ArrayGroup,
    CaptionsGroup,
    EmbeddingGroup,
    FileEntry,
    HashesGroup,
    ImageEmbedGroup,
    ImagesGroup,
    OtherGroup,
    SetTextGroup,
    ShardEntry,
    TextGroup,
)
from imagen_core.store.removal_log import REMOVAL_HEAD, removal_path
from imagen_core.store.verification.coverage import Coverage
from imagen_core.store.verification.files import FileChecks
from imagen_core.store.verification.report import Problem, VerifyReport
from imagen_core.store.verification.shard_rows import ShardRows
from imagen_core.store.verification.unique_keys import UniqueKeys


def verify_store(
    path: str | os.PathLike[str],
    *,
    storage_options: dict[str, Any] | None = None,
    on_file: Callable[[str, int], None] | None = None,
    scratch: Path | None = None,
) -> VerifyReport:
    """Read the complete store, one file at a time, and list the problems of each file.

    Checked: the manifest's own digest; each file's existence, size and sha256; row counts; that encoded images decode,
    and that images have the shape of their aspect-ratio bucket; caption ids; dim and dtype of embeddings, and that
    they are finite; unique keys; the log of removals; files the manifest does not know; that every input row is one
    sample or one drop; that row by row images belong to their samples, and embeddings to their captions and to the
    encoder that the manifest names. The content of removed samples is not compared, as readers never see it.
    A damaged manifest is reported as the only problem, as nothing else can be checked without it.
    Memory: one file's rows, and 8 bytes per sample for the keys. Of a remote store one shard's files are on this
    machine's disk at a time, below TMPDIR; each is fetched once.

    Args:
        on_file: called with the name and size in bytes of each file after it was read.
        scratch: folder for temporary copies; default TMPDIR.
    Raises:
        StoreError: the folder is not a store, or its run has not finished.
        StorageError: a remote store cannot be reached, or refuses.
    """
    folder = StoreFolder(path, storage_options)
    report = VerifyReport()
    try:
        manifest = read_manifest(folder)
    except StoreError as error:
        if not folder.exists(MANIFEST_NAME):
            raise
        report.problems.append(Problem(MANIFEST_NAME, str(error)))
        return report
    try:
        apply_removals(folder, manifest)
    except ManifestError as error:
        report.problems.append(Problem(error.file, str(error)))
    report.num_samples = manifest.num_samples
    with tempfile.TemporaryDirectory(dir=scratch) as copies:
        check = _Check(folder, manifest, report, on_file, Path(copies))
        check.count(MANIFEST_NAME, folder.size_bytes(MANIFEST_NAME) or 0)
        for shard in manifest.shards():
            check.shard(shard)
        for group in manifest.texts.values():
            check.null(group)
            check.probe(group)
        check.other_groups()
        check.keys()
        check.coverage()
        check.removals()
        check.strays()
    report.ok = not report.problems
    return report


class _Check(FileChecks):
    def __init__(
        self,
        folder: StoreFolder,
        manifest: Manifest,
        report: VerifyReport,
        on_file: Callable[[str, int], None] | None,
        scratch: Path,
    ) -> None:
        super().__init__(folder, report, on_file, scratch)
        self._manifest = manifest
        self._keys = UniqueKeys()
        self._coverage = Coverage(manifest)
        self._fingerprints = {
            name: fingerprint_digest(group.fingerprint)
            for name, group in manifest.groups.items()
            if isinstance(group, EmbeddingGroup | ArrayGroup)
        }
        self._has_digests = manifest.schema_version >= SCHEMA_VERSION
        self._saw_all_samples = True

    def shard(self, shard: ShardEntry) -> None:
        """Check a shard's files: bytes first, and contents only where the bytes are right."""
        intact = {name: self._bytes(entry) for name, entry in shard.files.items()}
        rows = self._samples(shard, shard.files[SAMPLES_GROUP]) if intact.get(SAMPLES_GROUP) else None
        sets = {
            group.caption_set: self._captions(shard.files[group.name], group, rows)
            for group in self._manifest.captions.values()
            if intact.get(group.name)
        }
        self._saw_all_samples &= rows is not None or SAMPLES_GROUP not in shard.files
        for name, entry in shard.files.items():
            if not intact[name]:
                continue
            group = self._manifest.groups[name]
            try:
                if isinstance(group, ImagesGroup):
                    self._images(entry, group, rows)
                elif isinstance(group, HashesGroup):
                    self._hashes(entry, group, rows)
                elif isinstance(group, TextGroup):
                    names, ignored = (rows.captions, rows.removed_ids) if rows else (None, ())
                    self._embeddings(entry, group, names, "distinct captions", ignored)
                elif isinstance(group, SetTextGroup):
                    names, ignored = sets.get(group.caption_set) or (None, ())
                    self._embeddings(entry, group, names, "distinct captions of the set", ignored)
                elif isinstance(group, ImageEmbedGroup):
                    names, ignored = (rows.keys, rows.removed) if rows else (None, ())
                    self._embeddings(entry, group, names, "rows", ignored)
                elif isinstance(group, ArrayGroup):
                    self._arrays(entry, group, rows)
            except StoreError as error:
                self._bad(entry.path, str(error))
        self._drop_copies()

    def _samples(self, shard: ShardEntry, entry: FileEntry) -> ShardRows | None:
        """Check a samples file, record its keys and count its input rows; None if it cannot be read."""
        try:
            samples = self._samples_of(entry)
        except StoreError as error:
            self._bad(entry.path, str(error))
            return None
        self._count_rows(entry, samples.num_rows)
        if samples.column_types != self._manifest.columns:
            told = f"{samples.column_types or 'none'}, the manifest says {self._manifest.columns or 'none'}"
            self._bad(entry.path, f"kept columns are {told}")
        if self._has_digests:
            for message in self._coverage.add(shard, samples):
                self._bad(entry.path, message)
        caption_of: dict[int, str] = {}
        for row in map(samples.row, range(samples.num_rows)):
            if len(row.captions) != len(row.caption_ids) or not row.captions:
                self._bad(entry.path, f"{row.key!r}: {len(row.captions)} captions, ids {row.caption_ids}")
            for caption_id, caption in zip(row.caption_ids, row.captions, strict=False):
                if caption_of.setdefault(caption_id, caption) != caption:
                    self._bad(entry.path, f"{row.key!r}: caption id {caption_id} is of another caption too")
        if set(caption_of) != set(range(len(caption_of))):
            self._bad(entry.path, f"caption ids are not 0 to {len(caption_of) - 1}")
        keys = samples.column("key")
        self._keys.add(entry, keys)
        captions = [caption_of.get(i, "") for i in range(max(caption_of, default=-1) + 1)]
        removed = frozenset(row for row, reason in shard.excluded.items() if reason == REMOVED)
        ids = enumerate(samples.column("caption_ids"))
        removed_ids = set(caption_of) - {i for row, listed in ids if row not in removed for i in listed}
        sizes = np.array([samples.size(row) for row in range(samples.num_rows)], int).reshape(-1, 2).T
        return ShardRows(keys, samples.column("sha256"), sizes, captions, removed, frozenset(removed_ids))

    def _images(self, entry: FileEntry, group: ImagesGroup, rows: ShardRows | None) -> None:
        images = open_images(self._source(entry), entry.path, group)
        for row in range(images.num_rows if group.codec != "raw" else 0):
            images.pixels(row)
        self._count_rows(entry, images.num_rows)
        if rows is not None and (wrong := rows.wrong_shapes(images)):
            self._bad(entry.path, wrong)
        self._compare_rows(entry, group, images.num_rows, images.stored, "images", rows)

    def _captions(
        self, entry: FileEntry, group: CaptionsGroup, rows: ShardRows | None
    ) -> tuple[list[str], frozenset[int]] | None:
        """Check the captions of a further set: the distinct ones, and the ids that only removed samples have; None if
        these are not known."""
        try:
            found = CaptionsFile(self._source(entry), entry.path).rows()
        except StoreError as error:
            self._bad(entry.path, str(error))
            return None
        if not self._count_rows(entry, len(found)) or rows is None:
            return None
        if wrong := caption_ids_problem(found):
            self._bad(entry.path, wrong)
            return None
        digests = (captions_digest(key, row.captions) for key, row in zip(rows.keys, found, strict=False))
        self._compare_digests(entry, group, digests, rows.keys, "rows do not belong to their samples", rows.removed)
        alive = {i for place, row in enumerate(found) if place not in rows.removed for i in row.ids}
        captions = distinct_captions(found)
        return captions, frozenset(range(len(captions))) - alive

    def _hashes(self, entry: FileEntry, group: HashesGroup, rows: ShardRows | None) -> None:
        hashes = HashesFile(self._source(entry), entry.path, group)
        self._count_rows(entry, hashes.num_rows)
        self._compare_rows(entry, group, hashes.num_rows, lambda row: hashes.row(row).stored(), "hashes", rows)

    def _compare_rows(
        self,
        entry: FileEntry,
        group: ImagesGroup | HashesGroup,
        num_rows: int,
        stored: Callable[[int], np.ndarray],
        what: str,
        rows: ShardRows | None,
    ) -> None:
        """Compares what is stored of each image with the digest that binds it to its sample."""
        if num_rows != entry.rows or rows is None or len(rows.keys) != num_rows:
            return
        names = enumerate(zip(rows.keys, rows.sha256, strict=True))
        found = (image_digest(key, sha256, stored(row)) for row, (key, sha256) in names)
        self._compare_digests(entry, group, found, rows.keys, f"{what} do not belong to their samples", rows.removed)

    def _embeddings(
        self, entry: FileEntry, group: EmbeddingGroup, names: Sequence[str] | None, of: str, ignored: Collection[int]
    ) -> None:
        """Check the embeddings of captions or keys `names`, which is None if the samples cannot be read."""
        # Not mapped: the parquet decoder checks the offsets that the mapped reader computes.
        text = open_embeddings(self._source(entry), entry.path, group, mapped=False)
        self._count_rows(entry, text.num_rows)
        bad = [row for row in range(text.num_rows) if not all_finite(text.stored(row), group.dtype)]
        if bad:
            self._bad(entry.path, f"{len(bad)} embeddings are not finite, the first in row {bad[0]}")
        if names is None:
            return
        encoder = self._fingerprints[group.name]
        if text.num_rows != len(names):
            self._bad(entry.path, f"{text.num_rows} rows, the samples have {len(names)} {of}")
        elif self._has_digests and text.fingerprint != encoder:
            self._bad(
                entry.path,
                f"encoded by another encoder: fingerprint {text.fingerprint[:16] or '(none)'}, "
                f"the manifest's is {encoder[:16]}",
            )
        else:
            found = (caption_digest(encoder, name, text.stored(i)) for i, name in enumerate(names))
            whose = "samples" if isinstance(group, ImageEmbedGroup) else "captions"
            self._compare_digests(entry, group, found, names, f"embeddings do not belong to their {whose}", ignored)

    def _arrays(self, entry: FileEntry, group: ArrayGroup, rows: ShardRows | None) -> None:
        arrays = open_arrays(self._source(entry), entry.path, group, mapped=False)
        is_counted = self._count_rows(entry, arrays.num_rows)
        bad = [
            (row, what) for row in range(arrays.num_rows) if (what := array_problem(group.spec, arrays.stored(row)))
        ]
        if bad:
            row, what = bad[0]
            self._bad(entry.path, f"{len(bad)} arrays are wrong, the first in row {row}, which {what}")
        made_by = self._fingerprints[group.name]
        if arrays.fingerprint != made_by:
            by = f"fingerprint {arrays.fingerprint[:16]}, the manifest's is {made_by[:16]}"
            self._bad(entry.path, f"made by another stage: {by}")
        elif is_counted and rows is not None and len(rows.keys) == arrays.num_rows:
            digests = (array_digest(made_by, key, arrays.stored(row)) for row, key in enumerate(rows.keys))
            wrong = "arrays do not belong to their samples"
            self._compare_digests(entry, group, digests, rows.keys, wrong, rows.removed)

    def _compare_digests(
        self,
        entry: FileEntry,
        group: ImagesGroup | EmbeddingGroup | ArrayGroup | HashesGroup | CaptionsGroup,
        found: Iterator[int],
        names: Sequence[str],
        wrong: str,
        ignored: Collection[int],
    ) -> None:
        if not self._has_digests:
            return
        stored = read_digests(self._source(entry), entry.path, group.format)
        if stored is None or len(stored) != len(names):
            self._bad(entry.path, f"{0 if stored is None else len(stored)} digests for {len(names)} rows")
            return
        pairs = enumerate(zip(found, stored.tolist(), strict=True))
        rows = [row for row, (a, b) in pairs if a != b and row not in ignored]
        if rows:
            self._bad(entry.path, f"{len(rows)} {wrong}, the first in row {rows[0]} ({names[rows[0]]!r})")

    def null(self, group: TextGroup) -> None:
        if group.null is None or not self._bytes(group.null):
            return
        try:
            embedding, dtype = parse_null(self._content(group.null), group.null.path)
        except StoreError as error:
            self._bad(group.null.path, str(error))
            return
        expected = "float16" if group.dtype == "int8" else group.dtype
        if embedding.shape[1:] != group.token_shape or dtype != expected:
            wanted = ", ".join(map(str, ("n_tokens", *group.token_shape)))
            self._bad(group.null.path, f"holds {dtype} {embedding.shape}, the encoder {expected} ({wanted})")
        elif not np.isfinite(embedding).all():
            self._bad(group.null.path, "not finite")

    def probe(self, group: TextGroup) -> None:
        if group.probe is None or not self._bytes(group.probe):
            return
        try:
            parse_probe(self._content(group.probe), group.probe.path)
        except StoreError as error:
            self._bad(group.probe.path, str(error))

    def other_groups(self) -> None:
        """Warn of groups of which only the bytes could be compared."""
        for name, group in self._manifest.groups.items():
            if isinstance(group, OtherGroup):
                message = f"kind {group.kind!r} is of a later version; only size and sha256 were compared: upgrade"
                self._report.warnings.append(Problem(name, message))

    def keys(self) -> None:
        """Report keys that occur twice."""
        for name, message in self._keys.repeated(self._samples_of):
            self._bad(name, message)

    def _samples_of(self, entry: FileEntry) -> SamplesFile:
        return SamplesFile(self._source(entry), entry.path)

    def coverage(self) -> None:
        """Sum up all input rows. Rows that damaged files hide are reported for these files only."""
        excluded = Counter(reason for rows in self._manifest.excluded.values() for reason in rows.values())
        self._report.excluded = dict(sorted(excluded.items()))
        if not self._has_digests:
            message = f"schema {self._manifest.schema_version} proves neither input rows nor the order of rows"
            self._report.warnings.append(Problem(MANIFEST_NAME, f"{message}; --restart makes one that does"))
            return
        self._report.input_rows, self._report.filtered = self._coverage.input_rows, self._manifest.filtered
        self._report.unaccounted = self._coverage.unaccounted
        self._report.dropped = dict(sorted((+self._coverage.dropped).items()))
        for message in self._coverage.finish() if self._saw_all_samples else ():
            self._bad(MANIFEST_NAME, message)

    def removals(self) -> None:
        """Check the log of removals that the manifest was written with; rows of later ones are excluded already."""
        reported = {problem.file for problem in self._report.problems}
        for entry in self._manifest.listed_removals:
            if entry["path"] not in reported:
                self._bytes(FileEntry(**entry, rows=0))

    def strays(self) -> None:
        """Warn of files that the manifest does not know: leftovers, or a group that is not finished for all shards."""
        known = {MANIFEST_NAME, REMOVAL_HEAD, *HUB_FILES, *LOCK_FILES}
        known.update(removal_path(i + 1) for i in range(self._manifest.num_removals))
        shared = (file for group in self._manifest.texts.values() for file in (group.null, group.probe))
        known.update(file.path for file in shared if file is not None)
        known.update(entry.path for shard in self._manifest.shards() for entry in shard.files.values())
        for name in self._folder.walk():
            if name not in known:
                message = "not in the manifest: a leftover, or of a group that is not finished for every shard"
                self._report.warnings.append(Problem(name, message))
