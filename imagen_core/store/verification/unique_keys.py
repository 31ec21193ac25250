"""Finds keys that occur twice in a store, in 8 bytes of memory per sample."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from imagen_core.store.files.samples import SamplesFile
from imagen_core.store.records import FileEntry

_MAX_NAMED = 10


class UniqueKeys:
    """Hashes of all keys. Where two are equal, the keys themselves are compared."""

    def __init__(self) -> None:
        self._hashes: list[tuple[FileEntry, np.ndarray]] = []

    def add(self, entry: FileEntry, keys: Sequence[str]) -> None:
        """Adds the keys of a `samples` file."""
        self._hashes.append((entry, np.array([_hash(key) for key in keys], dtype=np.uint64)))

    def repeated(self, read: Callable[[FileEntry], SamplesFile]) -> Iterator[tuple[str, str]]:
        """File and message of each key that came before, of the first few.

        Args:
            read: opens a `samples` file again.
        """
        if not self._hashes:
            return
        hashes = np.sort(np.concatenate([hashes for _, hashes in self._hashes]))
        repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])[:_MAX_NAMED]
        first_file: dict[str, str] = {}
        for name, key in self._keys_with(repeated, read):
            if key in first_file:
                also = "" if first_file[key] == name else f" and in {first_file[key]}"
                yield name, f"key {key!r} occurs twice{also or ' here'}"
            first_file.setdefault(key, name)

    def _keys_with(self, wanted: np.ndarray, read: Callable[[FileEntry], SamplesFile]) -> Iterator[tuple[str, str]]:
        for entry, own in self._hashes:
            rows = np.flatnonzero(np.isin(own, wanted))
            if rows.size:
                samples = read(entry)
                yield from ((entry.path, samples.key(int(row))) for row in rows)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
