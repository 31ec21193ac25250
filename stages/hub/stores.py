"""A store, as it is pushed: the files that its manifest and its log of removals name, and nothing else."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from imagen_core.store import (
    MANIFEST_NAME,
    SAMPLES_GROUP,
    FileEntry,
    Manifest,
    Removal,
    SamplesFile,
    StoreError,
    StoreFolder,
    TextGroup,
    blank_key,
    load_manifest,
    load_removals,
    removed_rows,
)
from imagen_core.store.removal_log import REMOVAL_HEAD
from imagen_core.store.verification.coverage import Coverage
from pipeline.errors import ConfigError, LockedError
from pipeline.storage.lock import describe_holder, is_running
from pipeline.storage.run_folder import RunFolder
from stages.hub.cards import StoreFacts, store_card
from stages.hub.package import STORE, Item, Package
from stages.hub.source import describe_run
from stages.stores import open_place

_OWNED = re.compile(
    r"(samples|hashes|(images|text|captions|image-embed|array)-[^/]+)/(\d{5,}(\.r\d+)?\.(parquet|h5)|null\.safetensors"
    r"|probe\.json)|removed/(\d{5,}|log)\.json"
)


def store_package(place: str) -> Package:
    """A store, or that of the run around it; a path or a URL.

    Raises:
        ConfigError: it is damaged, or removed samples are still in its files.
        LockedError: a run, a removal or a compaction is at work on it.
    """
    folder, run = open_place(place)
    storage = (run or RunFolder(folder.url)).storage
    if is_running(storage):
        holder = describe_holder(storage)
        raise LockedError(f"{place}: is being changed by {holder}; push it when that has ended")
    try:
        manifest = load_manifest(folder)
        removals = load_removals(folder, listed=manifest.listed_removals)
        dropped, hidden = _scan(folder, manifest, removals)
    except StoreError as error:
        raise ConfigError(str(error)) from error
    if hidden:
        remedy = f"pipeline remove {place} --compact" if folder.is_local else "compact a local copy, and push that"
        raise ConfigError(
            f"{place}: {hidden} removed samples are still in its files, hidden from readers of the store but not from "
            f"readers of the files; erase them first: {remedy}"
        )
    entries = {entry.path: entry for entry in _entries(folder, manifest, removals)}
    items = [Item(entry.path, entry.bytes, entry.sha256) for entry in entries.values()]
    facts = StoreFacts(manifest, len(removals), dropped, sum(item.bytes for item in items), *describe_run(run))

    @contextmanager
    def open_item(item: Item) -> Iterator[Path]:
        with _as_config_error(), folder.checked(entries[item.name], every_byte=True) as source:
            assert isinstance(source, str)
            yield Path(source)

    def confirm() -> None:
        with _as_config_error():
            now = load_manifest(folder)
        if (now.sha256, now.num_removals) != (manifest.sha256, manifest.num_removals):
            raise ConfigError(f"{place}: was changed while it was pushed; push it again")

    return Package(STORE, items, open_item, lambda repo, license: store_card(facts, repo, license), confirm, _OWNED)


@contextmanager
def _as_config_error() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise ConfigError(str(error)) from error


def _scan(folder: StoreFolder, manifest: Manifest, removals: Sequence[Removal]) -> tuple[Counter[str] | None, int]:
    """How many input rows were dropped, by reason (None: of schema 1, which does not say), and how many removed
    samples are in the files."""
    coverage, hidden = Coverage(manifest), 0
    for shard in manifest.shards():
        if SAMPLES_GROUP not in shard.files:
            continue
        entry = shard.files[SAMPLES_GROUP]
        with folder.checked(entry, every_byte=True) as source:
            samples = SamplesFile(source, folder.path(entry.path))
        coverage.add(shard, samples)
        removed = removed_rows(removals, shard.index, samples)
        hidden += sum(samples.key(row) != blank_key(shard.index, row) for row in removed)
    return None if manifest.schema_version < 2 else +coverage.dropped, hidden


def _entries(folder: StoreFolder, manifest: Manifest, removals: Sequence[Removal]) -> Iterator[FileEntry]:
    for shard in manifest.shards():
        yield from shard.files.values()
    for group in manifest.groups.values():
        if isinstance(group, TextGroup):
            yield from (entry for entry in (group.null, group.probe) if entry is not None)
    yield from (removal.file for removal in removals if removal.file is not None)
    for name in (REMOVAL_HEAD, MANIFEST_NAME):
        if folder.exists(name):
            data = folder.read_bytes(name)
            yield FileEntry(name, len(data), hashlib.sha256(data).hexdigest(), 0)
