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

    def stored(self, row: int, layers: Sequence[int] | None = None) -> StoredEmbedding:
        """The embedding of one row, as in the file; without layers possibly a read-only view of it.

        Args:
            layers: the numbers of the layers to read, of a group that has layers; None means all.
        Raises:
            ValueError: a layer that the group lacks.
        """
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
    layers: Sequence[int] = (),
    num_scales: int = 1,
) -> None:
    """Write the embeddings of a shard's distinct captions, row j = caption id j; or of its images, one per sample.

    Args:
        embeddings: (n_tokens, dim) each, unpadded, as `cast_embedding` casts them to `dtype`; (n_tokens, layers, dim)
            with layers. Streamed; if one raises, nothing is left behind.
        num_tokens: of each embedding; may be 0.
        captions: the encoded caption of each row; for embeddings of images the samples' keys.
        fingerprint: of the encoder, as in the manifest.
        layers, num_scales: as in the manifest, see `EmbeddingGroup`.
    """
    check_dtype(dtype)
    check_format(store_format)
    encoder = fingerprint_digest(fingerprint)
    rows = ((x, caption_digest(encoder, caption, x)) for x, caption in zip(embeddings, captions, strict=True))
    try:
        if store_format == "parquet":
            write_embeddings_parquet(path, rows, dim, dtype, encoder, layers, num_scales)
        else:
            write_embeddings_hdf5(path, rows, num_tokens, dim, dtype, encoder, layers, num_scales)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise


def cast_embeddings(
    embeddings: Iterable[np.ndarray],
    dim: int,
    dtype: StoreDtype,
    *,
    num_layers: int | None = None,
    num_scales: int = 1,
) -> Iterator[StoredEmbedding]:
    """Cast float (n_tokens, dim) embeddings for `write_embedding_shard`; (n_tokens, num_layers, dim) with layers.

    Raises:
        ValueError: a wrong shape, or an embedding that is not finite after the cast; its row is named.
    """
    token = (dim,) if num_layers is None else (num_layers, dim)
    for row, embedding in enumerate(embeddings):
        if not embedding.ndim or embedding.shape[1:] != token:
            wanted = ", ".join(map(str, ("n_tokens", *token)))
            raise ValueError(f"row {row}: embedding {embedding.shape} is not ({wanted})")
        try:
            yield cast_embedding(embedding, dtype, num_scales)
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error


def embedding_shard_bytes(
    num_tokens: Sequence[int], dim: int, dtype: StoreDtype, *, num_layers: int = 1, num_scales: int = 1
) -> int:
    """Bytes of the file that `write_embedding_shard` would write; within 1 %, either format.

    Args:
        num_layers: stored apart, of `dim` values per token each.
    """
    scale_bytes, columns = (SCALE_DTYPE.itemsize * num_scales, 2) if dtype == "int8" else (0, 1)
    payload = sum(num_tokens) * num_layers * (dim * DISK_DTYPES[check_dtype(dtype)].itemsize + scale_bytes)
    caption_bytes = 12 + 4 * columns * num_layers
    row_groups = min(len(num_tokens), -(-payload // ROW_GROUP_BYTES))
    more = columns * (num_layers - 1)  # columns or datasets
    return payload + caption_bytes * len(num_tokens) + (230 + 90 * more) * row_groups + 550 + 200 * more


def open_embeddings(source: str | BinaryIO, name: str, group: EmbeddingGroup, *, mapped: bool = True) -> EmbeddingFile:
    """Open a file of embeddings: a local path, or an open file of a remote store.

    Raises:
        StoreError: it is not such a file, or has another dim or dtype.
    """
    if group.format == "parquet":
        return ParquetEmbeddings(source, name, group, mapped=mapped)
    return Hdf5Embeddings(source, name, group)


def read_digests(source: str | BinaryIO, name: str, store_format: StoreFormat) -> np.ndarray | None:
    """The digest of each row of a file of images or embeddings, uint64 (n,); None in a store of schema 1.

    Raises:
        StoreError: it is not such a file.
    """
    return (parquet_digests if store_format == "parquet" else hdf5_digests)(source, name)
