"""The hashes of a shard's images: by them equal images and near duplicates are found without their pixels."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imagen_core.store.errors import ADVICE, StoreError, reading
from imagen_core.store.files.arrow_column import arrow_column
from imagen_core.store.files.digest import image_digest
from imagen_core.store.files.parquet import PARQUET_ERRORS, new_parquet
from imagen_core.store.records import HashesGroup

_SHA256_BYTES = 32


@dataclass(frozen=True, slots=True)
class ImageHashes:
    """What one image is recognised by.

    Attributes:
        pixels: SHA-256 of the decoded original, 32 bytes; zeros for an image that is not there.
        perceptual: uint64 (num_perceptual,), hashes of which few bits change when the image is compressed or resized.
        thumbnail: uint8 RGB (thumbnail_px, thumbnail_px, 3).
    """

    pixels: bytes
    perceptual: np.ndarray
    thumbnail: np.ndarray

    @classmethod
    def blank(cls, group: HashesGroup) -> "ImageHashes":
        """The hashes of an image that is not there."""
        side = group.thumbnail_px
        return cls(
            bytes(_SHA256_BYTES), np.zeros(group.num_perceptual, np.uint64), np.zeros((side, side, 3), np.uint8)
        )

    def stored(self) -> np.ndarray:
        """All of it as uint8 (bytes,)."""
        return np.frombuffer(self.pixels + self.perceptual.tobytes() + self.thumbnail.tobytes(), np.uint8)


def write_hashes(
    path: str | os.PathLike[str], group: HashesGroup, rows: Sequence[ImageHashes], samples: Sequence[tuple[str, str]]
) -> None:
    """Write a shard's hashes, row i of the sample i; a failure leaves nothing behind.

    Args:
        samples: key and sha256 of each sample, to which the rows are bound.
    """
    schema = pa.schema(
        [
            pa.field("pixels", pa.binary(_SHA256_BYTES), nullable=False),
            pa.field("perceptual", pa.binary(group.num_perceptual * 8), nullable=False),
            pa.field("thumbnail", pa.binary(group.thumbnail_px**2 * 3), nullable=False),
            pa.field("digest", pa.uint64(), nullable=False),
        ]
    )
    columns = [
        arrow_column([row.pixels for row in rows], schema.field(0).type),
        arrow_column([row.perceptual.tobytes() for row in rows], schema.field(1).type),
        arrow_column([row.thumbnail.tobytes() for row in rows], schema.field(2).type),
        arrow_column([image_digest(*of, row.stored()) for row, of in zip(rows, samples, strict=True)], pa.uint64()),
    ]
    try:
        with new_parquet(path, schema, {}) as writer:
            if rows:
                writer.write_table(pa.table(columns, schema=schema), row_group_size=len(rows))
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise


class HashesFile:
    """The hashes of a shard; `num_rows` is their number."""

    def __init__(self, source: str | BinaryIO, name: str, group: HashesGroup) -> None:
        """
        Raises:
            StoreError: it is missing, not such a file, or has hashes of another size.
        """
        self._name, self._group = name, group
        with reading(name, "parquet", PARQUET_ERRORS):
            self._file = pq.ParquetFile(source)
            self.num_rows: int = self._file.metadata.num_rows
            types = {field.name: field.type for field in self._file.schema_arrow}
            wanted = (_SHA256_BYTES, group.num_perceptual * 8, group.thumbnail_px**2 * 3)
            found = tuple(types[column].byte_width for column in ("pixels", "perceptual", "thumbnail"))
        if found != wanted:
            raise StoreError(f"{name}: holds hashes of {found} bytes, not of {wanted}; {ADVICE}")

    @cached_property
    def pixels(self) -> np.ndarray:
        """SHA-256 of the decoded originals, uint8 (num_rows, 32)."""
        return self._column("pixels").reshape(-1, _SHA256_BYTES)

    @cached_property
    def perceptual(self) -> np.ndarray:
        """uint64 (num_rows, num_perceptual)."""
        return self._column("perceptual").view("<u8").reshape(-1, self._group.num_perceptual)

    @cached_property
    def thumbnails(self) -> np.ndarray:
        """uint8 (num_rows, thumbnail_px, thumbnail_px, 3)."""
        side = self._group.thumbnail_px
        return self._column("thumbnail").reshape(-1, side, side, 3)

    def row(self, row: int) -> ImageHashes:
        """The hashes of one image."""
        return ImageHashes(self.pixels[row].tobytes(), self.perceptual[row], self.thumbnails[row])

    def _column(self, name: str) -> np.ndarray:
        with reading(self._name, "parquet", PARQUET_ERRORS):
            column = self._file.read(columns=[name], use_threads=False).column(0).combine_chunks()
            width = column.type.byte_width
            data = column.buffers()[1]
            if data is None:
                return np.zeros(0, np.uint8)
            return np.frombuffer(data, np.uint8, len(column) * width, column.offset * width)
