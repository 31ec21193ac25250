"""Files and folders that a user names by a path or a URL, for code that reads local files: URLs are copied first."""

from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePosixPath

from pipeline.errors import ConfigError
from pipeline.storage import LocalStorage, Storage
from pipeline.storage.open import open_storage


def split_place(place: str) -> tuple[Storage, str]:
    """The storage of the folder that a file is in, and the file's name.

    Raises:
        ConfigError: the URL holds a password, or its protocol is unknown or needs a package.
    """
    folder, _, name = place.rstrip("/").rpartition("/")
    return open_storage(folder or ("/" if place.startswith("/") else ".")), name


def local_file(place: str) -> Path:
    """A local path of a file; one behind a URL is copied once, and kept until this process ends.

    Raises:
        FileNotFoundError: there is no such file behind the URL. A local path is not looked at.
        MachineError: the URL cannot be reached.
    """
    if "://" not in place:
        return Path(place)
    storage, name = split_place(place)
    return storage.root / name if isinstance(storage, LocalStorage) else _copied(place)


@cache
def _copied(place: str) -> Path:
    storage, name = split_place(place)
    copy = storage.copy(name)
    folder = storage.new_folder()  # so that the copy has the file's own name, which labels use
    return copy.replace(folder / name)


def read_place(place: str | Path) -> bytes:
    """The bytes of a small file; as `local_file`, but nothing is kept.

    Raises:
        OSError: it cannot be read.
        MachineError: the URL cannot be reached.
    """
    if "://" not in str(place):
        return Path(place).read_bytes()
    storage, name = split_place(str(place))
    return storage.read(name)


def local_folder(place: str, field: str, wanted: Callable[[str], bool]) -> Path:
    """A local path of a folder; of one behind a URL the wanted files are copied, and kept until this process ends.

    Args:
        field: names the folder in messages.
        wanted: whether to copy a file, by its name relative to the folder.
    Raises:
        ConfigError: there is no such folder, or it may not be read.
        MachineError: the URL cannot be reached.
    """
    storage = open_storage(place)
    if isinstance(storage, LocalStorage):
        if not storage.root.is_dir():
            what = "is a file" if storage.root.exists() else "does not exist"
            raise ConfigError(f"{field}: {place} {what}; give a folder")
        try:
            next(storage.root.iterdir(), None)
        except OSError as error:
            raise ConfigError(f"{field}: {place} cannot be read ({error.strerror}); let this user read it") from error
        return storage.root
    folder = storage.new_folder()

    def fetch(name: str) -> None:
        local = folder / PurePosixPath(name)
        local.parent.mkdir(parents=True, exist_ok=True)
        storage.copy(name).replace(local)

    try:
        for _ in storage.map(fetch, (name for name in storage.walk() if wanted(name) and ".." not in name.split("/"))):
            pass
    except FileNotFoundError as error:
        raise ConfigError(f"{field}: {place} does not exist; check the address") from error
    return folder
