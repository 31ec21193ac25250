"""The index.json of an MDS dataset: its shards, and what they hold."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import xxhash

from pipeline.errors import ConfigError
from stages.sources.tree import Tree

INDEX = "index.json"
_COMPRESSIONS = ("zstd", "gz", "bz2")


@dataclass(frozen=True, slots=True)
class MdsShard:
    """One shard file."""

    path: str
    """Relative to the folder of the source."""
    samples: int
    encodings: Mapping[str, str]
    """How each column is encoded, in the order of a sample."""
    sizes: tuple[int | None, ...]
    """Bytes of each column, None where they differ from sample to sample."""
    digest: str
    """Of its entry in the index, which has the file's size and, if the writer made them, hashes."""


def read_indices(tree: Tree) -> list[MdsShard]:
    """The shards of the index in a folder, or of those in the folders directly in it, in order.

    Raises:
        ConfigError: there is no index, or it is of another format.
    """
    folders = [""] if tree.size(INDEX) is not None else [f"{name}/" for name in tree.folders()]
    names = [f"{folder}{INDEX}" for folder in folders if tree.size(f"{folder}{INDEX}") is not None]
    if not names:
        raise ConfigError(
            f"source.path: {tree.url} has no {INDEX}, nor has a folder in it; give a folder of MDS files"
        )
    shards: list[MdsShard] = []
    for name, data in zip(names, tree.read([name] for name in names), strict=True):
        if isinstance(data, OSError):
            raise ConfigError(f"source.path: {tree.url}/{name} cannot be read: {data.strerror or data}") from data
        try:
            entries = json.loads(data)["shards"]
            shards += [_shard(entry, name.removesuffix(INDEX), tree) for entry in entries]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"source.path: {tree.url}/{name} is no index of MDS files ({type(error).__name__}: {error}); write it "
                "again with mosaicml-streaming"
            ) from error
    return shards


def _shard(entry: Mapping[str, Any], folder: str, tree: Tree) -> MdsShard:
    if (entry["format"], entry["version"]) != ("mds", 2):
        raise ValueError(f"format {entry['format']!r}, version {entry['version']!r}; mds 2 is read")
    compression = entry["compression"]
    if compression is not None and compression.partition(":")[0] not in _COMPRESSIONS:
        raise ValueError(f"compression {compression!r}; {', '.join(_COMPRESSIONS)} are read")
    raw, zipped = entry["raw_data"]["basename"], (entry["zip_data"] or {}).get("basename")
    for name in (raw, zipped or raw):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the shard {name!r} is outside of the folder")
    is_raw = zipped is None or tree.size(f"{folder}{raw}") is not None
    names, sizes = entry["column_names"], tuple(entry["column_sizes"])
    columns = dict(zip(names, entry["column_encodings"], strict=True))
    if len(sizes) != len(columns):
        raise ValueError(f"{len(sizes)} sizes of {len(columns)} columns")
    digest = xxhash.xxh3_64_hexdigest(json.dumps(entry, sort_keys=True).encode())
    return MdsShard(f"{folder}{raw if is_raw else zipped}", int(entry["samples"]), columns, sizes, digest)
