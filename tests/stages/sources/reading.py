"""Reads a source as the fetch stage does, without a run; writes tars member by member."""

import io
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stages.precompute.fetch import fetch_originals
from stages.sources.base import Original, Source


def read_originals(source: Source, shard_size: int = 100) -> list[Original]:
    """Every row, with its captions, or with the reason of its drop; in order."""
    found: list[Original] = []
    for shard in source.shards(shard_size):
        originals: list[Original] = []
        with tempfile.TemporaryDirectory() as scratch:
            fetch_originals(source, shard, None, Path(scratch), originals.append)
        found += sorted(originals, key=lambda original: original.row)
    return found


def outcomes(source: Source, shard_size: int = 100) -> dict[str, object]:
    """Captions of each key, or the reason of its drop."""
    found = read_originals(source, shard_size)
    assert len({original.key for original in found}) == len(found)
    return {original.key: original.reason or list(original.captions or ()) for original in found}


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    """A tar of these members, with its end-of-archive blocks."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
