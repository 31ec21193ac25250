"""Write and open one shard's files of embeddings, in either format.

Writers write to the exact path they are given: temporary names, fsync and renames are up to the caller.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from imagen_core.store.files.digest import caption_digest, fingerprint_digest
from imagen_core.store.files.hdf5 import (
    Hdf5Embeddings,
    hdf5_digests,
    write_embeddings_hdf5,
)
from imagen_core.store.files.parquet import (
    ParquetEmbeddings,
    parquet_digests,
    write_embeddings_parquet,
)
from imagen_core.store.files.ragged import DISK_DTYPES, SCALE_DTYPE, StoredEmbedding, cast_embedding
from imagen_core.store.layout import ROW_GROUP_BYTES, StoreDtype, StoreFormat, check_dtype, check_format
from imagen_core.store.records import EmbeddingGroup


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
