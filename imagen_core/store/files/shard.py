"""Write and open one shard's files, in either format.

Writers write to the exact path they are given: temporary names, fsync and renames are up to the caller.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from imagen_core.store.codec import Codec, check_codec, decode, encode
from imagen_core.store.errors import unreadable
from imagen_core.store.files.digest import caption_digest, fingerprint_digest, image_digest
from imagen_core.store.files.hdf5 import (
    Hdf5Embeddings,
    Hdf5Images,
    Hdf5ImageWriter,
    hdf5_digests,
    write_embeddings_hdf5,
)
from imagen_core.store.files.parquet import (
    ParquetEmbeddings,
    ParquetImages,
    ParquetImageWriter,
    parquet_digests,
    write_embeddings_parquet,
)
from imagen_core.store.files.ragged import DISK_DTYPES, SCALE_DTYPE, StoredEmbedding, cast_embedding
from imagen_core.store.layout import ROW_GROUP_BYTES, StoreDtype, StoreFormat, check_dtype, check_format
from imagen_core.store.records import EmbeddingGroup, ImagesGroup


class StoredImages(Protocol):
    """Images in a file of either format: uint8 (S, S, 3) of a raw image, (bytes,) of an encoded one."""

    num_rows: int

    def stored(self, row: int) -> np.ndarray:
        """One image, as in the file."""
        ...


class ImageFile:
    """An open image file of a shard."""

    def __init__(self, images: StoredImages, name: str, group: ImagesGroup) -> None:
        self._images, self._name = images, name
        self._codec: Codec = group.codec
        self._size_px = group.size_px
        self.num_rows = images.num_rows

    def stored(self, row: int) -> np.ndarray:
        """The image as it is in the file: uint8 (S, S, 3) of a raw image, (bytes,) of an encoded one."""
        return self._images.stored(row)

    def pixels(self, row: int) -> np.ndarray:
        """uint8 (S, S, 3); possibly a read-only view of the file, so that reading a part costs only that part.

        Raises:
            StoreError: the file cannot be read, or the image cannot be decoded.
        """
        stored = self.stored(row)
        if self._codec == "raw":
            return stored
        try:
            return decode(stored, self._codec, self._size_px)
        except ValueError as error:
            raise unreadable(f"{self._name}, row {row}", self._codec, error) from error


class EmbeddingFile(Protocol):
    """An open file of embeddings, of a shard's captions or images.

    `num_tokens` is int64 (num_rows,); `fingerprint` is the `fingerprint_digest` of the encoder, "" in schema 1.
    """

    num_tokens: np.ndarray
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Number of embeddings."""
        ...

    def stored(self, row: int) -> StoredEmbedding:
        """The embedding of one row, as in the file; possibly a read-only view of it."""
        ...


class ImageWriter:
    """Appends images to one file; made by `open_image_writer`."""

    def __init__(self, path: Path, size_px: int, store_format: StoreFormat, codec: Codec) -> None:
        writer = ParquetImageWriter if store_format == "parquet" else Hdf5ImageWriter
        self._shape = (size_px, size_px, 3)
        self._codec: Codec = codec
        self._writer = writer(path, size_px, codec)
        self.num_rows = 0

    def append(self, pixels: np.ndarray, key: str, sha256: str) -> None:
        """Add uint8 RGB (size_px, size_px, 3) as the next row: the image of the sample with this key and sha256.

        Raises:
            ValueError: another shape or dtype.
        """
        if pixels.dtype != np.uint8 or pixels.shape != self._shape:
            raise ValueError(f"row {self.num_rows}: {pixels.dtype} {pixels.shape}, not uint8 {self._shape}")
        self.append_stored(np.frombuffer(encode(pixels, self._codec), np.uint8), key, sha256)

    def append_stored(self, stored: np.ndarray, key: str, sha256: str) -> None:
        """Add an image as stored in another file of the same size and codec; see `ImageFile.stored`."""
        self._writer.append(stored.tobytes(), image_digest(key, sha256, stored))
        self.num_rows += 1

    def finish(self) -> None:
        """Complete the file."""
        self._writer.finish()

    def abort(self) -> None:
        """Close the file, which stays incomplete."""
        self._writer.abort()


@contextmanager
def open_image_writer(
    path: str | os.PathLike[str], size_px: int, store_format: StoreFormat, codec: Codec = "raw"
) -> Iterator[ImageWriter]:
    """Open a file for a shard's images, of any number of rows.

    Memory stays at one row group (512 KiB, or one image). If the `with` block raises, the file is removed.

    Raises:
        ValueError: an unknown format or codec, or a size below 1.
    """
    check_format(store_format)
    check_codec(codec)
    if size_px < 1:
        raise ValueError(f"size_px must be 1 or more (got {size_px})")
    path = Path(path)
    writer = ImageWriter(path, size_px, store_format, codec)
    try:
        yield writer
        writer.finish()
    except BaseException:
        try:
            writer.abort()
        finally:
            path.unlink(missing_ok=True)
        raise


def write_embedding_shard(
    path: str | os.PathLike[str],
    embeddings: Iterable[StoredEmbedding],
    num_tokens: Sequence[int],
    dim: int,
    dtype: StoreDtype,
    store_format: StoreFormat,
    *,
    captions: Sequence[str],
    fingerprint: Mapping[str, Any],
) -> None:
    """Write the embeddings of a shard's distinct captions, row j = caption id j; or of its images, one per sample.

    Args:
        embeddings: (n_tokens, dim) each, unpadded, as `cast_embedding` casts them to `dtype`. Streamed; if one raises,
            nothing is left behind.
        num_tokens: of each embedding; may be 0.
        captions: the encoded caption of each row; for embeddings of images the samples' keys.
        fingerprint: of the encoder, as in the manifest.
    """
    check_dtype(dtype)
    check_format(store_format)
    encoder = fingerprint_digest(fingerprint)
    rows = ((x, caption_digest(encoder, caption, x)) for x, caption in zip(embeddings, captions, strict=True))
    try:
        if store_format == "parquet":
            write_embeddings_parquet(path, rows, dim, dtype, encoder)
        else:
            write_embeddings_hdf5(path, rows, num_tokens, dim, dtype, encoder)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise


def cast_embeddings(embeddings: Iterable[np.ndarray], dim: int, dtype: StoreDtype) -> Iterator[StoredEmbedding]:
    """Cast float (n_tokens, dim) embeddings for `write_embedding_shard`.

    Raises:
        ValueError: a wrong shape, or an embedding that is not finite after the cast; its row is named.
    """
    for row, embedding in enumerate(embeddings):
        if embedding.ndim != 2 or embedding.shape[1] != dim:
            raise ValueError(f"row {row}: embedding {embedding.shape} is not (n_tokens, {dim})")
        try:
            yield cast_embedding(embedding, dtype)
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error


def embedding_shard_bytes(num_tokens: Sequence[int], dim: int, dtype: StoreDtype) -> int:
    """Bytes of the file that `write_embedding_shard` would write; within 1 %, either format."""
    scale_bytes, caption_bytes = (SCALE_DTYPE.itemsize, 20) if dtype == "int8" else (0, 16)
    payload = sum(num_tokens) * (dim * DISK_DTYPES[check_dtype(dtype)].itemsize + scale_bytes)
    row_groups = -(-payload // ROW_GROUP_BYTES)
    return payload + caption_bytes * len(num_tokens) + 230 * row_groups + 550


def open_images(source: str | BinaryIO, name: str, group: ImagesGroup, *, mapped: bool = True) -> ImageFile:
    """Open an image file: a local path, or an open file of a remote store.

    Raises:
        StoreError: it is not such a file, or has images of another size or codec.
    """
    if group.format == "parquet":
        images: StoredImages = ParquetImages(source, name, group.size_px, group.codec, mapped=mapped)
    else:
        images = Hdf5Images(source, name, group.size_px, group.codec)
    return ImageFile(images, name, group)


def open_embeddings(source: str | BinaryIO, name: str, group: EmbeddingGroup, *, mapped: bool = True) -> EmbeddingFile:
    """Open a file of embeddings: a local path, or an open file of a remote store.

    Raises:
        StoreError: it is not such a file, or has another dim or dtype.
    """
    if group.format == "parquet":
        return ParquetEmbeddings(source, name, group.dim, group.dtype, mapped=mapped)
    return Hdf5Embeddings(source, name, group.dim, group.dtype)


def read_digests(source: str | BinaryIO, name: str, store_format: StoreFormat) -> np.ndarray | None:
    """The digest of each row of a file of images or embeddings, uint64 (n,); None in a store of schema 1.

    Raises:
        StoreError: it is not such a file.
    """
    return (parquet_digests if store_format == "parquet" else hdf5_digests)(source, name)
