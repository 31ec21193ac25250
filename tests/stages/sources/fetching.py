"""Fetches all rows of a source, as the fetch stage does."""

from pathlib import Path

from stages.precompute.fetch import fetch_originals
from stages.sources.base import Original, Source


def fetched(source: Source, scratch: Path, shard_size: int = 100) -> list[tuple[int, list[Original]]]:
    """Index and rows of each shard, after the source was checked."""
    source.check()
    result = []
    for shard in source.shards(shard_size):
        originals: list[Original] = []
        (scratch / str(shard.index)).mkdir(parents=True)
        fetch_originals(source, shard, None, scratch / str(shard.index), originals.append)
        result.append((shard.index, sorted(originals, key=lambda original: original.row)))
    return result


def all_fetched(source: Source, scratch: Path, shard_size: int = 100) -> list[Original]:
    """The rows of all shards."""
    return [original for _, originals in fetched(source, scratch, shard_size) for original in originals]
