"""Write and open one shard's file of images, in either format.

Parquet: column "pixels" (binary; of fixed size in a square group) of raw images, "num_bytes" and "picture" of encoded
ones; "digest". HDF5: dataset "pixels" (n, S, S, 3) of raw images of a square group, "pixels" (bytes of all,) with
"offsets" (n + 1,) of those of other groups, "pictures" (bytes of all,) with "offsets" of encoded ones; "digests" (n,).
Where images have the shapes of aspect-ratio buckets, both also have "sizes": int32 height and width of each image.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imagen_core.store.buckets import Shape, choose_buckets
from imagen_core.store.codec import Codec, check_codec, decode, encode
from imagen_core.store.errors import ADVICE, StoreError, reading, unreadable
from imagen_core.store.files.digest import DIGEST_DTYPE, image_digest
from imagen_core.store.files.hdf5 import (
    HDF5_ERRORS,
    RaggedRows,
    fill,
    map_dataset,
    new_dataset,
    new_hdf5,
    new_ragged,
    open_hdf5,
)
from imagen_core.store.files.parquet import DIGEST_FIELD, PARQUET_ERRORS, RowGroups, new_parquet, read_counts
from imagen_core.store.files.parquet_column import BlobColumn
from imagen_core.store.layout import StoreFormat, check_format
from imagen_core.store.records import ImagesGroup

_SIZES_DTYPE = np.dtype("<i4")
_SIZES_BYTES = 2 * _SIZES_DTYPE.itemsize


class ImageWriter:
    """Appends images to one file; made by `open_image_writer`."""

    def __init__(
        self, path: Path, size_px: int, store_format: StoreFormat, codec: Codec, shapes: tuple[Shape, ...]
    ) -> None:
        self._shapes = shapes or ((size_px, size_px),)
        self._codec: Codec = codec
        self._writer = (_ParquetWriter if store_format == "parquet" else _Hdf5Writer)(path, size_px, codec, shapes)
        self.num_rows = 0

    def append(self, pixels: np.ndarray, key: str, sha256: str) -> None:
        """Add uint8 RGB (height, width, 3) as the next row: the image of the sample with this key and sha256.

        Raises:
            ValueError: another dtype, or a shape that is none of the file's.
        """
        if (
            pixels.dtype != np.uint8
            or pixels.ndim != 3
            or pixels.shape[2] != 3
            or pixels.shape[:2] not in self._shapes
        ):
            shapes = " or ".join(str((*shape, 3)) for shape in self._shapes)
            raise ValueError(f"row {self.num_rows}: {pixels.dtype} {pixels.shape}, not uint8 {shapes}")
        stored = np.frombuffer(encode(pixels, self._codec), np.uint8)
        self.append_stored(stored, pixels.shape[:2], key, sha256)

    def append_stored(self, stored: np.ndarray, shape: Shape, key: str, sha256: str) -> None:
        """Add an image as stored in another file of the same size and codec; see `ImageFile.stored`.

        Args:
            shape: its height and width in pixels; see `ImageFile.shape`.
        """
        self._writer.append(stored.tobytes(), shape, image_digest(key, sha256, stored))
        self.num_rows += 1

    def finish(self) -> None:
        """Complete the file."""
        self._writer.finish()

    def abort(self) -> None:
        """Close the file, which stays incomplete."""
        self._writer.abort()


@contextmanager
def open_image_writer(
    path: str | os.PathLike[str],
    size_px: int,
    store_format: StoreFormat,
    codec: Codec = "raw",
    shapes: Sequence[Shape] = (),
) -> Iterator[ImageWriter]:
    """Open a file for a shard's images, of any number of rows.

    Memory stays at one row group (512 KiB, or one image). If the `with` block raises, the file is removed.

    Args:
        shapes: height and width that images may have, see `ImagesGroup.shapes`; none means squares of `size_px`.
    Raises:
        ValueError: an unknown format or codec, or a size below 1.
    """
    check_format(store_format)
    check_codec(codec)
    if size_px < 1:
        raise ValueError(f"size_px must be 1 or more (got {size_px})")
    path = Path(path)
    writer = ImageWriter(path, size_px, store_format, codec, tuple((height, width) for height, width in shapes))
    try:
        yield writer
        writer.finish()
    except BaseException:
        try:
            writer.abort()
        finally:
            path.unlink(missing_ok=True)
        raise


class _ParquetWriter:
    def __init__(self, path: Path, size_px: int, codec: Codec, shapes: tuple[Shape, ...]) -> None:
        self._is_raw, self._is_square = codec == "raw", not shapes
        if not self._is_raw:
            columns = {"num_bytes": pa.int32(), "picture": pa.binary()}
        else:
            columns = {"pixels": pa.binary(size_px * size_px * 3) if self._is_square else pa.binary()}
        sizes = {} if self._is_square else {"sizes": pa.binary(_SIZES_BYTES)}
        first, last = (
            [pa.field(name, kind, nullable=False) for name, kind in fields.items()] for fields in (columns, sizes)
        )
        schema = pa.schema([*first, DIGEST_FIELD, *last])
        self._new = new_parquet(path, schema, {"size_px": str(size_px)})
        self._rows = RowGroups(self._new.__enter__(), schema)

    def append(self, stored: bytes, shape: Shape, digest: int) -> None:
        row = (stored, digest) if self._is_raw else (len(stored), stored, digest)
        sizes = () if self._is_square else (np.array(shape, _SIZES_DTYPE).tobytes(),)
        self._rows.append((*row, *sizes), len(stored))

    def finish(self) -> None:
        self._rows.flush()
        self.abort()

    def abort(self) -> None:
        self._new.__exit__(None, None, None)


class _Hdf5Writer:
    """Spools stored images next to the file, and writes them as one dataset at the end."""

    def __init__(self, path: Path, size_px: int, codec: Codec, shapes: tuple[Shape, ...]) -> None:
        self._path, self._size_px, self._is_raw, self._is_square = path, size_px, codec == "raw", not shapes
        self._lengths: list[int] = []
        self._sizes: list[Shape] = []
        self._digests: list[int] = []
        self._spool_path = path.with_name(f"{path.name}.spool")
        self._spool = open(self._spool_path, "w+b")  # noqa: SIM115 - closed by finish and abort

    def append(self, stored: bytes, shape: Shape, digest: int) -> None:
        self._spool.write(stored)
        self._lengths.append(len(stored))
        self._sizes.append(shape)
        self._digests.append(digest)

    def finish(self) -> None:
        with new_hdf5(self._path) as file:
            file.attrs["size_px"] = np.int32(self._size_px)
            digests = new_dataset(file, "digests", (len(self._digests),), DIGEST_DTYPE)
            if self._is_raw and self._is_square:
                shape = (len(self._lengths), self._size_px, self._size_px, 3)
                fill(new_dataset(file, "pixels", shape, np.dtype("u1")), self._spool)
            else:
                sizes = np.array(self._sizes, _SIZES_DTYPE).reshape(-1, 2)
                sizes_set = None if self._is_square else new_dataset(file, "sizes", sizes.shape, _SIZES_DTYPE)
                name = "pixels" if self._is_raw else "pictures"
                images, write_offsets = new_ragged(file, name, self._lengths, (), np.dtype("u1"))
                fill(images, self._spool)
                write_offsets()
                if sizes_set is not None:
                    sizes_set[...] = sizes
            digests[...] = np.array(self._digests, DIGEST_DTYPE)
        self.abort()

    def abort(self) -> None:
        self._spool.close()
        self._spool_path.unlink(missing_ok=True)


class _Values(Protocol):
    def __getitem__(self, row: int) -> np.ndarray: ...


class ImageFile:
    """An open image file of a shard.

    Attributes:
        num_rows: number of images.
    """

    num_rows: int

    def __init__(self, source: str | BinaryIO, name: str, group: ImagesGroup, *, mapped: bool = True) -> None:
        """See `open_images`."""
        self._name, self._group = name, group
        self._square = (group.size_px, group.size_px)
        self._errors = PARQUET_ERRORS if group.format == "parquet" else HDF5_ERRORS
        self._sizes: list[Shape] | None = None
        with reading(name, group.format, self._errors):
            if group.format == "parquet":
                self._values: _Values = self._open_parquet(source, mapped)
            else:
                self._values = self._open_hdf5(source)

    def _open_parquet(self, source: str | BinaryIO, mapped: bool) -> _Values:
        group, file = self._group, pq.ParquetFile(source, memory_map=isinstance(source, str))
        found_px = int((file.metadata.metadata or {})[b"size_px"])
        if found_px != group.size_px:
            raise StoreError(f"{self._name}: pixels are {found_px} px wide, not {group.size_px}; {ADVICE}")
        self.num_rows = file.metadata.num_rows
        if group.shapes:
            column = file.read(columns=["sizes"], use_threads=False).column(0).to_pylist()
            self._take_sizes(np.frombuffer(b"".join(column), _SIZES_DTYPE).reshape(self.num_rows, 2))
        if group.codec != "raw":
            lengths = read_counts(file, "num_bytes")
            return BlobColumn(file, source, "picture", lengths, prefix_bytes=4, mapped=mapped)
        prefix_bytes = 4 if group.shapes else 0
        return BlobColumn(file, source, "pixels", self._raw_lengths(), prefix_bytes=prefix_bytes, mapped=mapped)

    def _open_hdf5(self, source: str | BinaryIO) -> _Values:
        group, file = self._group, open_hdf5(source)
        what = "pixels" if group.codec == "raw" else "pictures"
        is_ragged = group.codec != "raw" or bool(group.shapes)
        row_shape = () if is_ragged else (*self._square, 3)
        dataset, found_px = file[what], int(file.attrs["size_px"])
        if dataset.shape[1:] != row_shape or dataset.dtype != np.uint8 or found_px != group.size_px:
            raise StoreError(
                f"{self._name}: {what} are {dataset.dtype} {dataset.shape} of {found_px} px, not uint8 {row_shape} "
                f"each of {group.size_px} px; {ADVICE}"
            )
        self._file = file  # keeps it open as long as a dataset of it is read
        if not is_ragged:
            self.num_rows = dataset.shape[0]
            return map_dataset(dataset, source)
        sizes = file["sizes"][()] if group.shapes else None
        rows = RaggedRows(file, dataset, source, self._name)
        self.num_rows = len(rows.lengths)
        if sizes is not None:
            self._take_sizes(sizes)
            if group.codec == "raw" and not np.array_equal(self._raw_lengths(), rows.lengths):
                raise StoreError(f"{self._name}: sizes do not fit offsets; {ADVICE}")
        return rows

    def _take_sizes(self, sizes: np.ndarray) -> None:
        """Keeps the height and width of each image, int32 (n, 2)."""
        self._sizes = [(height, width) for height, width in sizes.tolist()]
        if len(self._sizes) != self.num_rows:
            raise StoreError(f"{self._name}: {len(self._sizes)} sizes of {self.num_rows} images; {ADVICE}")
        if strange := sorted(set(self._sizes) - set(self._group.shapes)):
            raise StoreError(f"{self._name}: {strange[0]} is no shape of group {self._group.name!r}; {ADVICE}")

    def _raw_lengths(self) -> np.ndarray:
        """Bytes of each raw image, int64 (n,)."""
        if self._sizes is None:
            return np.full(self.num_rows, math.prod(self._square) * 3, np.int64)
        return np.array(self._sizes, np.int64).reshape(-1, 2).prod(axis=1) * 3

    def shape(self, row: int) -> Shape:
        """Height and width of one image in pixels; nothing of the image is read."""
        return self._square if self._sizes is None else self._sizes[row]

    def misshapen(self, widths: np.ndarray, heights: np.ndarray) -> list[int]:
        """The rows whose image has not the shape of the bucket of its original.

        Args:
            widths, heights: of the originals, as in `samples`.
        """
        if self._sizes is None:
            return []
        shapes = self._group.shapes
        buckets = choose_buckets(widths, heights, shapes).tolist()
        return [row for row, bucket in enumerate(buckets) if self._sizes[row] != shapes[bucket]]

    def stored(self, row: int) -> np.ndarray:
        """The image as it is in the file: uint8 (height, width, 3) of a raw image, (bytes,) of an encoded one.

        Possibly a read-only view of the file.

        Raises:
            StoreError: the file cannot be read.
        """
        try:
            values = self._values[row]
            return values.reshape(*self.shape(row), 3) if self._group.codec == "raw" else values
        except self._errors as error:
            raise unreadable(self._name, self._group.format, error) from error

    def pixels(self, row: int) -> np.ndarray:
        """uint8 RGB (height, width, 3); possibly a read-only view of the file, so that reading a part costs only that
        part. The height and width are `shape(row)`.

        Raises:
            StoreError: the file cannot be read, or the image cannot be decoded.
        """
        stored = self.stored(row)
        if self._group.codec == "raw":
            return stored
        try:
            return decode(stored, self._group.codec, self.shape(row))
        except ValueError as error:
            raise unreadable(f"{self._name}, row {row}", self._group.codec, error) from error


def open_images(source: str | BinaryIO, name: str, group: ImagesGroup, *, mapped: bool = True) -> ImageFile:
    """Open an image file: a local path, or an open file of a remote store.

    Raises:
        StoreError: it is not such a file, or has images of another size, shape or codec.
    """
    return ImageFile(source, name, group, mapped=mapped)
