"""The hashes of all images of a run, in the order by which it is decided which of equal images is kept."""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from imagen_core.store import HASHES_GROUP, SAMPLES_GROUP, HashesFile, ImageHashes, SamplesFile
from pipeline.plan import Show
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import RunFolder
from stages.duplicates.excluded import ExcludedImage, ExcludedSets
from stages.duplicates.hashing import HASHES
from stages.duplicates.match import Matches

DUPLICATE, NEAR, EXCLUDED = "duplicate_image", "near_duplicate", "excluded_image"
"""Why an image is no sample, where duplicates are dropped."""
_SIDE = HASHES.thumbnail_px


class Images:
    """First the images of `duplicates.exclude`, then those of the shards, by shard and row. Their hashes are in files
    of the scratch folder, mapped into memory.

    Attributes:
        pixels, perceptual: see `match`.
        excluded: the images at the beginning: of `duplicates.exclude`, and those of shards that it names by a hash.
        compared: how many images of the shards there are.
        not_compared: how many rows readers do not see, or have no image.
    """

    def __init__(
        self,
        run: RunFolder,
        shards: Sequence[int],
        gone: Mapping[int, Collection[int]],
        sets: ExcludedSets,
        scratch: Path,
        show: Show,
    ):
        """Reads all hashes; see `find_duplicates` for the arguments."""
        self._run, self._scratch, self._show = run, scratch, show
        self._digests, self._shards = sets.digests(), list(shards)
        self.excluded: list[ExcludedImage] = []
        self.not_compared = 0
        for image, hashes in sets.images():
            self._add_excluded(image, hashes)
            show(f"{len(self.excluded):,} images of duplicates.exclude hashed")
        rows = [self._read_shard(shard, gone.get(shard, ())) for shard in self._shown(shards, "hashes")]
        self._rows = np.concatenate([np.zeros(0, np.int32), *rows])
        self._starts = np.cumsum([len(self.excluded), *map(len, rows)])
        self.compared = len(self._rows)
        self.pixels = self._all("pixels", np.uint8, 32)
        self.perceptual = self._all("perceptual", np.uint64, HASHES.num_perceptual)

    def _shown(self, shards: Sequence[int], what: str) -> Iterator[int]:
        """The shards, or their positions; shows how many of them are read."""
        for number, shard in enumerate(shards, start=1):
            yield shard
            self._show(f"{what} of {number:,}/{len(shards):,} shards")

    def _add_excluded(self, image: ExcludedImage, hashes: ImageHashes) -> None:
        self.excluded.append(image)
        self._append("pixels", hashes.pixels)
        self._append("perceptual", hashes.perceptual.tobytes())
        self._append("thumbnails", hashes.thumbnail.tobytes())

    def _read_shard(self, shard: int, gone: Collection[int]) -> np.ndarray:
        """The rows of a shard that are compared."""
        with self._opened(HASHES_GROUP, shard) as (path, name):
            hashes = HashesFile(path, name, HASHES)
            seen = np.asarray(hashes.pixels.any(axis=1))
            seen[list(gone)] = False
            rows = np.flatnonzero(seen).astype(np.int32)
            self.not_compared += len(seen) - len(rows)
            self._append("pixels-of-shards", hashes.pixels[rows].tobytes())
            self._append("perceptual-of-shards", hashes.perceptual[rows].tobytes())
            if self._digests:
                self._find_named(shard, rows, hashes)
        return rows

    def _find_named(self, shard: int, rows: np.ndarray, hashes: HashesFile) -> None:
        """Adds the images of a shard that a SHA-256 names to those to exclude, so that what is like them is found."""
        with self._opened(SAMPLES_GROUP, shard) as (path, name):
            files = SamplesFile(path, name).texts("sha256")
        for row in rows.tolist():
            named = self._digests.get(files[row]) or self._digests.get(hashes.pixels[row].tobytes().hex())
            if named is not None:
                self._add_excluded(named, hashes.row(row))

    def _append(self, name: str, data: bytes) -> None:
        with (self._scratch / name).open("ab") as file:
            file.write(data)

    def _all(self, name: str, dtype: Any, width: int) -> np.ndarray:
        """One kind of hash of all images, mapped into memory."""
        self._append(name, b"")
        path, others = self._scratch / name, self._scratch / f"{name}-of-shards"
        if others.exists():
            with others.open("rb") as source, path.open("ab") as target:
                shutil.copyfileobj(source, target)
            others.unlink()
        return self._mapped(name, dtype).reshape(-1, width)

    def _mapped(self, name: str, dtype: Any) -> np.ndarray:
        path = self._scratch / name
        if not path.exists() or not path.stat().st_size:  # nothing can be mapped
            return np.zeros(0, dtype)
        return np.memmap(path, dtype, mode="r").view(np.ndarray)

    @contextmanager
    def _opened(self, group: str, shard: int) -> Iterator[tuple[str, str]]:
        """A local path of a committed file, and its name, while the block runs."""
        file = self._run.committed_file(group, shard_name(shard))
        copy = self._run.proven_copy(file)
        try:
            yield str(copy), file.path
        finally:
            self._run.storage.release(copy)

    def thumbnails(self, numbers: np.ndarray) -> np.ndarray:
        """See `match`; they are read from the shards that have one of these images."""
        shape = (len(numbers), _SIDE, _SIDE, 3)
        found = np.memmap(self._scratch / "compared", np.uint8, mode="w+", shape=shape).view(np.ndarray)
        positions = np.searchsorted(self._starts, numbers, side="right") - 1  # rising; -1: to exclude
        first = int(np.searchsorted(positions, 0))
        found[:first] = self._mapped("thumbnails", np.uint8).reshape(-1, *shape[1:])[numbers[:first]]
        for position in self._shown(np.unique(positions[first:]).tolist(), "thumbnails"):
            low, high = np.searchsorted(positions, [position, position + 1])
            rows = self._rows[numbers[low:high] - len(self.excluded)]
            with self._opened(HASHES_GROUP, self._shards[position]) as (path, name):
                found[low:high] = HashesFile(path, name, HASHES).thumbnails[rows]
        return found

    def entries(self, found: Matches, *, dropped: bool) -> Iterator[dict[str, Any]]:
        """The entries of the list; see `read_duplicates`."""
        first = len(self.excluded)
        numbers = np.flatnonzero(found.kept != np.arange(len(found.kept))).tolist()
        kept = {number: int(found.kept[number]) for number in numbers}
        keys = self._keys({*numbers, *(number for number in kept.values() if number >= first)})
        for number in numbers:
            of, equal = kept[number], bool(found.equal[number])
            same_as = asdict(self.excluded[of]) if of < first else keys[of]
            yield {
                **keys[number],
                "reason": EXCLUDED if of < first else DUPLICATE if equal else NEAR,
                "match": "equal" if equal else "near",
                "bits": int(found.bits[number]),
                "mirrored": bool(found.mirrored[number]),
                "same_as": same_as,
                "dropped": dropped,
            }

    def _keys(self, numbers: Collection[int]) -> dict[int, dict[str, Any]]:
        """Key, shard and row of images of the shards."""
        found: dict[int, dict[str, Any]] = {}
        ordered = np.array(sorted(numbers), np.int64)
        positions = np.searchsorted(self._starts, ordered, side="right") - 1
        for position in self._shown(np.unique(positions).tolist(), "keys"):
            shard = self._shards[position]
            with self._opened(SAMPLES_GROUP, shard) as (path, name):
                samples = SamplesFile(path, name)
            for number in ordered[positions == position].tolist():
                row = int(self._rows[number - len(self.excluded)])
                found[number] = {"key": samples.key(row), "shard": shard, "row": row}
        return found
