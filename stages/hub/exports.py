"""An export of a store, as it is pushed: `data/` of the export's folder."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imagen_core.store import StoreError
from pipeline.errors import ConfigError, LockedError, MachineError
from pipeline.storage import Storage
from pipeline.storage.files import file_digest
from pipeline.storage.lock import describe_holder, is_running
from pipeline.storage.open import open_storage
from pipeline.storage.run_folder import RunFolder
from stages.exports.finish import DESCRIPTION
from stages.exports.stage import DATA, GROUP
from stages.hub.cards import export_card
from stages.hub.package import EXPORT, Item, Package
from stages.hub.source import describe_run, read_config
from stages.stores import open_place, open_store

_OWNED = re.compile(rf"{DATA}/.+")
_UNSEEN = (
    "note: the store that this was exported from cannot be read here, so nobody checked whether samples were removed "
    "from it since"
)


def export_folder(place: str) -> Storage | None:
    """The folder around the `data/` of a finished export, given either; None if there is none."""
    storage = open_storage(place)
    if storage.size(DESCRIPTION) is not None:
        return storage
    outer, _, name = storage.url.rstrip("/").rpartition("/")
    if name == DATA and outer and storage.size(DESCRIPTION.removeprefix(f"{DATA}/")) is not None:
        return open_storage(outer)
    return None


def export_package(place: str, storage: Storage) -> Package:
    """A finished export.

    Raises:
        ConfigError: its `store.json` is damaged, or samples were removed from its store since.
        LockedError: an export is at work there.
    """
    if is_running(storage):
        raise LockedError(f"{place}: is being changed by {describe_holder(storage)}; push it afterwards")
    run = RunFolder(storage)
    description = storage.read_json(DESCRIPTION, "export the store again with --restart")
    if not isinstance(description, dict) or not isinstance(description.get("store"), dict):
        raise ConfigError(f"{place}: {DESCRIPTION} does not describe an export; export the store again")
    store = read_config(run).get("store")
    notes = _check_removals(place, description["store"], store)
    source, recipes = describe_run(_run_of(store))
    known = {file.path: file.sha256 for record in run.records(GROUP) for file in record.files}
    names = sorted((name for name in storage.walk() if _OWNED.fullmatch(name)), key=lambda name: name == DESCRIPTION)
    items = [_item(storage, name, known.get(name)) for name in names]
    num_bytes = sum(item.bytes for item in items)

    @contextmanager
    def open_item(item: Item) -> Iterator[Path]:
        copy = storage.copy(item.name)
        try:
            if (digest := file_digest(copy)) != item.sha256:
                raise ConfigError(
                    f"{storage.url}/{item.name}: has sha256 {digest}, but {item.sha256} was written, so it was "
                    "changed since; delete it and export again"
                )
            yield copy
        finally:
            storage.release(copy)

    def confirm() -> None:
        last = items[-1]
        if hashlib.sha256(storage.read(DESCRIPTION)).hexdigest() != last.sha256:
            raise ConfigError(f"{place}: was changed while it was pushed; push it again")

    def card(repo: str, license: str) -> str:
        return export_card(description, num_bytes, source, recipes, repo, license)

    return Package(EXPORT, items, open_item, card, confirm, _OWNED, notes)


def _item(storage: Storage, name: str, sha256: str | None) -> Item:
    if sha256 is None:
        copy = storage.copy(name)
        try:
            return Item(name, copy.stat().st_size, file_digest(copy))
        finally:
            storage.release(copy)
    return Item(name, storage.size(name) or 0, sha256)


def _check_removals(place: str, exported: dict[str, Any], store: object) -> tuple[str, ...]:
    """Compares the removals that the export knew of with those of the store today; returns notes."""
    if not isinstance(store, str):
        return (_UNSEEN,)
    try:
        now = open_store(store).manifest
    except (ConfigError, MachineError):
        return (_UNSEEN,)
    if now.num_removals > exported.get("num_removals", 0):
        raise ConfigError(
            f"{place}: samples were removed from {store} since it was exported, and are in its files; export again "
            "with --restart, and push that"
        )
    return ()


def _run_of(store: object) -> RunFolder | None:
    try:
        return open_place(store)[1] if isinstance(store, str) else None
    except (ConfigError, MachineError, StoreError):
        return None
