"""Opens stores and run folders for the commands that read them."""

from imagen_core.store import MANIFEST_NAME, Store, StoreError, StoreFolder
from pipeline.errors import ConfigError
from pipeline.storage.open import open_storage
from pipeline.storage.run_folder import PLAN, STORE, RunFolder


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
    return StoreFolder(store), run if run is not None and run.started_groups() else None
