"""The files behind `source.path`, local or behind any fsspec URL."""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import PurePosixPath
from typing import Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from imagen_core.far import is_far
from imagen_core.far import open_filesystem as open_far
from imagen_core.far.listing import PatientFileSystem
from pipeline.errors import ConfigError, MachineError
from pipeline.stage import Shard
from stages.sources.base import InputPart
from stages.sources.ignored import ignored_by_name, suffix_rule
from stages.sources.tables import table_format

READABLE = "let this user read it, or move it out of the source"
_COMPRESSED_TARS = ("tgz", "tbz", "tbz2", "txz", "tzst")
_WILDCARDS = re.compile(r"[*?\[{]")


class Damaged(Exception):
    """The bytes of a file or member are not what they should be."""


def find_files(
    path: str,
    field: str,
    suffixes: Sequence[str],
    *,
    braces: bool = False,
    ignored: Counter[str] | None = None,
) -> dict[str, int | None]:
    """The files behind a path, relative to `base_folder(path)`, and their bytes where known.

    Args:
        path: a file, a folder, or a glob; files come sorted.
        braces: expands ranges such as `{00..99}`, each sorted on its own.
        ignored: counts the files of a folder that are left out, by rule.

    Raises:
        ConfigError: nothing is there, a folder cannot be read, or the URL's protocol is unknown.
    """
    filesystem, _ = open_filesystem(path, field)
    filesystem.invalidate_cache()  # others write there while this process lives
    found: dict[str, int | None] = {}
    plain = filesystem._strip_protocol(path)
    for each, name in _expand_braces(filesystem, plain, path, field) if braces else [(plain, path)]:
        found.update(_find(filesystem, each, name, field, suffixes, Counter() if ignored is None else ignored))
    base = filesystem._strip_protocol(base_folder(path)).rstrip("/")
    return {plain[len(base) :].lstrip("/"): size for plain, size in found.items()}


def _expand_braces(filesystem: Any, plain: str, path: str, field: str) -> Iterable[tuple[str, str]]:
    """The paths that braces stand for, and what to call each; a file or folder that exists is no pattern."""
    from braceexpand import braceexpand

    folder = plain if filesystem.exists(plain) else _existing_folder(filesystem, plain)
    pattern = plain[len(folder) :]
    if "{" not in pattern:
        return [(plain, path)]
    try:
        before = len(plain) - len(path) if plain.endswith(path) else 0  # what makes a relative path absolute
        return [(each, each[before:]) for each in (folder + one for one in braceexpand(pattern))]
    except ValueError as error:
        raise ConfigError(f"{field}: {path} does not exist, and is no range: {error}; check the path") from error


def _find(
    filesystem: Any, plain: str, path: str, field: str, suffixes: Sequence[str], ignored: Counter[str]
) -> dict[str, int | None]:
    infos: dict[str, Mapping[str, Any]] = {}
    if filesystem.isdir(plain):
        for name, info in _listed(filesystem, plain, path, field).items():
            rule = ignored_by_name(name[len(plain) :]) or (
                None if _format(name) in suffixes else suffix_rule(name, ignored)
            )
            if rule is None:
                infos[name] = info
            else:
                ignored[rule] += 1
        if not infos:
            raise ConfigError(f"{field}: {path} holds no {', '.join(suffixes)} file; check the folder")
    elif filesystem.exists(plain):
        infos = {plain: filesystem.info(plain)}
    elif any(c in plain for c in "*?["):
        folder = _existing_folder(filesystem, plain)
        pattern = glob.escape(folder) + plain[len(folder) :]
        matching = cast(dict[str, dict[str, Any]], filesystem.glob(pattern, detail=True))
        infos = {p: i for p, i in matching.items() if i["type"] == "file" or not filesystem.isdir(p)}
    if not infos:
        raise ConfigError(f"{field}: {path} does not exist; check the path")
    return {p: infos[p].get("size") for p in sorted(infos)}


def _format(name: str) -> str:
    found = table_format(name)
    return "tar" if found in _COMPRESSED_TARS else found


def _listed(filesystem: Any, plain: str, path: str, field: str) -> Any:
    """Everything below a folder.

    Raises:
        ConfigError: a folder there cannot be read; fsspec would leave it out.
    """

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{field}: {error.filename or path} cannot be read: {error.strerror}; {READABLE}") from error

    if isinstance(filesystem, LocalFileSystem):
        for _ in os.walk(plain, onerror=refuse):
            pass
    return filesystem.find(plain, detail=True)


def _existing_folder(filesystem: Any, plain: str) -> str:
    """The part of a pattern that is a folder, whatever characters its name has; empty if none is."""
    folder = plain.rpartition("/")[0]
    while folder and not filesystem.isdir(folder):
        folder = folder.rpartition("/")[0]
    return folder


def expand(path: str, field: str, suffixes: Sequence[str]) -> list[str]:
    """The files behind a path, to be opened; see `find_files`."""
    found = find_files(path, field, suffixes)
    folder = base_folder(path)
    return [f"{folder}/{name}" for name in found]


def base_folder(path: str) -> str:
    """The folder that names of files are relative to: the path, or what is before the file or first wildcard."""
    filesystem, plain = open_filesystem(path, "source.path")
    if not filesystem.isdir(plain):
        before = plain if filesystem.exists(plain) else _WILDCARDS.split(plain)[0]
        plain = before.rpartition("/")[0]
    return filesystem.unstrip_protocol(plain) if "://" in path else plain


def open_filesystem(path: str, field: str) -> tuple[Any, str]:
    """The file system behind a path or URL, and the path there; a far one is patient, see `PatientFileSystem`.

    Raises:
        ConfigError: the URL's protocol is unknown.
        MachineError: it needs a package.
    """
    try:
        filesystem, plain = open_far(path) if is_far(path) else fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise MachineError(f"{field}: {path} cannot be opened: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{field}: {path} cannot be opened: {error}") from error
    return (PatientFileSystem(filesystem) if is_far(path) else filesystem), plain


def named_parts(files: Mapping[str, int | None], taken: Set[str] = frozenset()) -> list[InputPart]:
    """Parts whose rows name their file: by its stem, or where stems repeat by its path without suffix.

    Args:
        taken: names of files of earlier batches.
    """
    stems = Counter(_stem(path) for path in files)
    root = os.path.commonpath(list(files)) if len(files) > 1 and not taken else ""
    parts: dict[str, InputPart] = {}
    for path, size in files.items():
        pure = PurePosixPath(path)
        below = pure.relative_to(root)
        choices = ([_stem(path)] if stems[_stem(path)] == 1 else []) + [str(below.with_suffix("")), str(below)]
        name = next(choice for choice in choices if choice not in parts and choice not in taken)
        parts[name] = InputPart(path, size, name)
    return list(parts.values())


def _stem(path: str) -> str:
    stem = PurePosixPath(path).stem
    return stem.removesuffix(".tar") or stem  # of a compressed tar


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
