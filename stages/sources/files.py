"""The files behind `source.path`, local or behind any fsspec URL."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import PurePosixPath
from typing import Any, cast

import fsspec

from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.sources.base import InputPart
from stages.sources.tables import table_format

_WILDCARDS = re.compile(r"[*?\[{]")


class Damaged(Exception):
    """The bytes of a file or member are not what they should be."""


def find_files(path: str, field: str, suffixes: Sequence[str], *, braces: bool = False) -> dict[str, int | None]:
    """The files behind a path, relative to `base_folder(path)`, and their bytes where known.

    Args:
        path: a file, a folder, or a glob; files come sorted.
        braces: expands ranges such as `{00..99}`, each sorted on its own.

    Raises:
        ConfigError: nothing is there, or the URL's protocol is unknown.
    """
    from braceexpand import braceexpand

    filesystem, _ = open_filesystem(path, field)
    filesystem.invalidate_cache()  # others write there while this process lives
    found: dict[str, int | None] = {}
    for pattern in braceexpand(path) if braces else [path]:
        found.update(_find(filesystem, filesystem._strip_protocol(pattern), pattern, field, suffixes))
    base = filesystem._strip_protocol(base_folder(path)).rstrip("/")
    return {plain[len(base) :].lstrip("/"): size for plain, size in found.items()}


def _find(filesystem: Any, plain: str, path: str, field: str, suffixes: Sequence[str]) -> dict[str, int | None]:
    infos: Mapping[str, Mapping[str, Any]] = {}
    if filesystem.isdir(plain):
        infos = {p: i for p, i in filesystem.find(plain, detail=True).items() if table_format(p) in suffixes}
        if not infos:
            raise ConfigError(f"{field}: {path} holds no {', '.join(suffixes)} file; check the folder")
    elif filesystem.exists(plain):
        infos = {plain: filesystem.info(plain)}
    elif any(c in plain for c in "*?["):
        matching = cast(dict[str, dict[str, Any]], filesystem.glob(plain, detail=True))
        infos = {p: i for p, i in matching.items() if i["type"] == "file" or not filesystem.isdir(p)}
    if not infos:
        raise ConfigError(f"{field}: {path} does not exist; check the path")
    return {p: infos[p].get("size") for p in sorted(infos)}


def expand(path: str, field: str, suffixes: Sequence[str]) -> list[str]:
    """The files behind a path, to be opened; see `find_files`."""
    found = find_files(path, field, suffixes)
    folder = base_folder(path)
    return [f"{folder}/{name}" for name in found]


def base_folder(path: str) -> str:
    """The folder that names of files are relative to: the path, or what is before the file or first wildcard."""
    filesystem, plain = open_filesystem(path, "source.path")
    if not filesystem.isdir(plain):
        plain = _WILDCARDS.split(plain)[0].rpartition("/")[0]
    return filesystem.unstrip_protocol(plain) if "://" in path else plain


def open_filesystem(path: str, field: str) -> tuple[Any, str]:
    """The file system behind a path or URL, and the path there.

    Raises:
        ConfigError: the URL's protocol is unknown, or needs a package.
    """
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{field}: {path} cannot be opened: {error}") from error


def named_parts(files: Mapping[str, int | None], taken: Set[str] = frozenset()) -> list[InputPart]:
    """Parts whose rows name their file: by its stem, or where stems repeat by its path without suffix.

    Args:
        taken: names of files of earlier batches.
    """
    stems = Counter(PurePosixPath(path).stem for path in files)
    root = os.path.commonpath(list(files)) if len(files) > 1 and not taken else ""
    parts: dict[str, InputPart] = {}
    for path, size in files.items():
        pure = PurePosixPath(path)
        below = pure.relative_to(root)
        choices = ([pure.stem] if stems[pure.stem] == 1 else []) + [str(below.with_suffix("")), str(below)]
        name = next(choice for choice in choices if choice not in parts and choice not in taken)
        parts[name] = InputPart(path, size, name)
    return list(parts.values())


def path_of(shard: Shard, name: str, folder: str, parts: Callable[[], Iterable[InputPart]]) -> str:
    """Path or URL of the file that a shard's rows call `name`.

    Args:
        folder: the paths of parts are relative to it.
        parts: used if the shard does not know the file: in a retry round of an earlier version.
    """
    file = shard.files.get(name) or next((part.path for part in parts() if part.name == name), None)
    if file is None:
        raise FileNotFoundError(f"source.path: {name} was there when the run began, and is gone")
    return f"{folder}/{file}"
