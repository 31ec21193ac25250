"""Lists of the files to read: text of one name per line, or NeMo's wdinfo.pkl."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from pipeline.errors import ConfigError
from stages.lines import split_lines
from stages.sources.arrays.plain_pickle import read_pickle
from stages.sources.files import Damaged
from stages.sources.records.compressed import open_whole
from stages.sources.tree import Tree

_FIELD = "source.file_list"


def find_listed(folder: str, file_list: str) -> dict[str, int | None]:
    """The listed files, in the order of the list, by name relative to `folder`, and their bytes.

    Raises:
        ConfigError: the list cannot be read, or one of its files is missing or outside the folder.
    """
    tree, listed_in = Tree(folder), f"{_FIELD}: {file_list}"
    found: dict[str, int | None] = {}
    with tree.sizes() as size_of:
        for name in _read(file_list)[0]:
            plain = PurePosixPath(name)
            if plain.is_relative_to(tree.url):
                plain = plain.relative_to(tree.url)
            if plain.is_absolute() or ".." in plain.parts or "://" in name:
                raise ConfigError(f"{listed_in}: {name!r} is not below source.path={folder}; give the folder it is in")
            path = str(plain)
            if path in found:
                raise ConfigError(f"{listed_in}: {name!r} is listed twice; list each file once")
            found[path] = size_of(path)
            if found[path] is None:
                raise ConfigError(f"{listed_in}: {tree.url}/{path} does not exist; names are relative to source.path")
    if not found:
        raise ConfigError(f"{listed_in}: names no file; give a list with at least one")
    return found


def listed_rows(file_list: str) -> int | None:
    """The number of samples that wdinfo.pkl states; None for a list of text."""
    return _read(file_list)[1]


def _read(file_list: str) -> tuple[Sequence[str], int | None]:
    try:
        with open_whole(file_list) as file:
            data = file.read()
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{_FIELD}: {file_list} cannot be read: {error}; check the path") from error
    if not file_list.endswith(".pkl"):
        return [line.strip() for line in split_lines(data) if line.strip()], None
    try:
        content = read_pickle(data, f"{_FIELD}: {file_list}")
    except Damaged as error:
        raise ConfigError(f"{_FIELD}: {file_list}: {error}; write the file again") from error
    names = content.get("tar_files") if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{_FIELD}: {file_list} has no list `tar_files` of names; give a wdinfo.pkl of NeMo's")
    rows = content.get("total_key_count")
    return names, rows if isinstance(rows, int) else None
