"""Opens stores and run folders for the commands that read them."""

import time
from typing import Any

from imagen_core.store import (
    MANIFEST_NAME,
    ManifestError,
    Removal,
    Store,
    StoreError,
    StoreFolder,
    load_removals,
    read_header,
)
from pipeline.errors import ConfigError, MachineError
from pipeline.storage import LocalStorage
from pipeline.storage.open import open_storage
from pipeline.storage.run_folder import PLAN, STORE, RunFolder
from pipeline.storage.scratch import scratch


def store_folder(path: str) -> str:
    """The store itself, given a store or the run folder around it; each a local path or a URL."""
    storage = open_storage(path)
    if storage.size(MANIFEST_NAME) is None and any(
        storage.size(n) is not None for n in (PLAN, f"{STORE}/{MANIFEST_NAME}")
    ):
        return RunFolder(storage).store_url
    return storage.url


def open_store(path: str) -> Store:
    """Opens a store or the one inside a run folder.

    Raises:
        ConfigError: it cannot be opened; says why.
        StorageError: far storage cannot be reached, or refuses.
    """
    try:
        return Store.open(store_folder(path))
    except StoreError as error:
        raise ConfigError(str(error)) from error


def group_bytes(store: Store) -> dict[str, int]:
    """Bytes on disk of each group."""
    totals = dict.fromkeys(store.manifest.groups, 0)
    for shard in store.manifest.shards():
        for group, file in shard.files.items():
            totals[group] += file.bytes
    return totals


def open_place(place: str) -> tuple[StoreFolder, RunFolder | None]:
    """A store, and the run around it if there is one; given either."""
    store = store_folder(place)
    outer, _, name = store.rpartition("/")
    run = RunFolder(outer) if outer and name == STORE else None
    return StoreFolder(store, scratch=scratch()), run if run is not None and run.started_groups() else None


def previous_header(run: RunFolder) -> dict[str, Any]:
    """The header of the manifest of a run's store; {} if there is none, or if it is damaged: a run makes it again.

    Raises:
        StorageError, MachineError: an object store cannot be reached, or refuses.
    """
    if run.storage.size(f"{STORE}/{MANIFEST_NAME}") is None:
        return {}
    try:
        return read_header(StoreFolder(run.store_url))
    except StoreError:
        return {}


def run_removals(run: RunFolder, header: dict[str, Any] | None = None) -> list[Removal]:
    """The removals from a run's store.

    Args:
        header: of the manifest, so that a log that is shorter than it says is found too.
    Raises:
        MachineError: the log of removals is damaged; without it, removed samples would come back.
    """
    try:
        return load_removals(StoreFolder(run.store_url), listed=(header or {}).get("removals", ()))
    except ManifestError as error:
        raise MachineError(str(error)) from error


_REMOVALS_HOLD_S = 30.0
_read_removals: dict[str, tuple[str, float, list[Removal]]] = {}
"""URL of a run -> owner of its lease, when the log was read (monotonic clock), and what was in it."""


def known_removals(run: RunFolder) -> list[Removal]:
    """The removals for a worker, on an object store as they were at most 30 s ago.

    A record says with how many removals its rows were compared, and the end of the run compares them with those since.
    """
    if isinstance(run.storage, LocalStorage) or run.lease is None:
        return run_removals(run)
    owner, read, removals = _read_removals.get(run.url, ("", 0.0, []))
    now = time.monotonic()
    if owner != run.lease.owner or now - read >= _REMOVALS_HOLD_S:
        removals = run_removals(run)
        _read_removals[run.url] = run.lease.owner, now, removals
    return removals
