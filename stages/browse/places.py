"""The folders to browse: what kind each is, and how many samples, images or steps it has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from imagen_core.store import MANIFEST_NAME
from pipeline.errors import ConfigError
from pipeline.storage import LocalStorage, Storage
from pipeline.storage.open import open_storage
from pipeline.storage.run_folder import METRICS, PLAN, STORE

Kind = Literal["run", "store", "training", "sampling", "evaluation"]

_WORKFLOWS: dict[str, Kind] = {
    "train": "training",
    "sample": "sampling",
    "evaluate": "evaluation",
    "likelihood": "evaluation",
}
_FILES: tuple[tuple[str, Kind], ...] = (
    (MANIFEST_NAME, "store"),
    (METRICS, "training"),
    ("results.json", "evaluation"),
    ("images.json", "sampling"),
    (f"{STORE}/{MANIFEST_NAME}", "run"),
)
"""What says the kind of a folder that no run of this version has written; the first that is there."""
_MOST_FOUND = 200
_DEFAULT = "runs"


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that the application shows.

    Attributes:
        number: its place in the address of its pages, `/p/NUMBER/`; from 1.
        url: the folder as an absolute path, or its URL.
        name: what it is called on the pages: the end of its path, as much of it as no other place has.
        run: of the store of a run: the number of the run's place.
    """

    number: int
    kind: Kind
    url: str
    name: str
    run: int | None = None

    @property
    def href(self) -> str:
        """The address of its first page."""
        return f"/p/{self.number}/"


def find_places(paths: Sequence[str]) -> list[Place]:
    """The places of the paths, in their order, each once. The store of a run is a place of its own, after the run.

    Args:
        paths: local folders or URLs; a folder of no kind stands for the folders in it that are of one. None at all
            means the folders in `runs`.
    Raises:
        ConfigError: a path is none of these, or has too many.
        MachineError: a URL cannot be reached.
    """
    kinds: dict[str, Kind] = {}
    for path in paths or [_DEFAULT]:
        for storage, kind in _found(path, "PATH" if paths else "PATH is not given, and the default"):
            kinds.setdefault(storage.url, kind)
    names, places = _names(list(kinds)), list[Place]()
    for url, kind in kinds.items():
        if kind == "store" and kinds.get(url.removesuffix(f"/{STORE}")) == "run":
            continue  # comes with its run
        place = Place(len(places) + 1, kind, url, names[url])
        places.append(place)
        if kind == "run":
            name = f"{names[url]}/{STORE}"
            places.append(Place(len(places) + 1, "store", f"{url}/{STORE}", name, run=place.number))
    return places


def _names(urls: Sequence[str]) -> dict[str, str]:
    """The name of each: the last part of its path, or more of them where others end alike."""
    parts = {url: [part for part in url.split("/") if part] for url in urls}
    length = dict.fromkeys(urls, 1)
    while True:
        names = {url: "/".join(parts[url][-length[url] :]) or url for url in urls}
        alike = [url for url in urls if list(names.values()).count(names[url]) > 1 and length[url] < len(parts[url])]
        if not alike:
            return names
        for url in alike:
            length[url] += 1


def kind_of(storage: Storage) -> Kind | None:
    """What a folder is; None if it is nothing that can be shown."""
    plan = storage.read_json_if_whole(PLAN)
    if isinstance(plan, dict) and "workflow" in plan:
        return _WORKFLOWS.get(str(plan["workflow"]), "run")
    for name, kind in _FILES:
        if storage.size(name) is not None:
            return kind
    return None


def _found(path: str, field: str) -> Iterator[tuple[Storage, Kind]]:
    storage = open_storage(path)
    kind = kind_of(storage)
    if kind is not None:
        yield storage, kind
        return
    if isinstance(storage, LocalStorage) and not storage.root.is_dir():
        raise ConfigError(f"{field} {path} does not exist; give run folders, stores, trainings or samplings")
    names = sorted(name for name, is_folder in storage.entries() if is_folder)
    inside = [open_storage(f"{storage.url}/{name}") for name in names[: _MOST_FOUND + 1]]
    kinds: list[tuple[Storage, Kind]] = [
        (each, kind) for each in inside for kind in (kind_of(each),) if kind is not None
    ]
    if not kinds:
        raise ConfigError(
            f"{field} {path} is no run folder, store, training, sampling or evaluation, and has none in it; give one"
        )
    if len(names) > _MOST_FOUND:
        raise ConfigError(f"{field} {path} has more than {_MOST_FOUND} folders in it; give those to show")
    yield from kinds
