"""Embeddings that come with the samples of tars: members of the tar, or rows of .npy files next to it."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.errors import ConfigError
from stages.sources.arrays.folders import ArrayFolder, number_of
from stages.sources.arrays.npy import parse
from stages.sources.arrays.plain_pickle import read_pickle
from stages.sources.base import PrecomputedEmbedding
from stages.sources.files import Damaged
from stages.sources.tarfiles.choice import PICKLES
from stages.sources.tarfiles.opening import OpenTars, Span, read_span

_WITH_ENTRIES = (*PICKLES, "npz")


class ArrayConfig(Config):
    """Where each sample of a tar has its array: as a member of the tar, or in a folder of .npy files."""

    member: str | None = None
    """Suffix of the member: `npy` for KEY.npy next to KEY.jpg. `.pickle`, `.pkl` and `.npz` are read as plain data
    only."""
    pickle_key: str | None = None
    """Of a pickle or .npz: the entry that is the array, as NeMo's precaching writes it, or that has `encodings` and
    perhaps a `mask`, as NeMo's training reads it (`precached_key`)."""
    folder: str | None = None
    """A folder of .npy files, as img_emb_0007.npy for 00007.tar, local or any fsspec URL."""
    index_width: int | None = Field(default=None, ge=1)
    """Of a folder: the number of digits at the end of a sample's key that are its row in the .npy; the digits before
    them are the number of the tar. null: row i is sample i of the tar."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.member is None) == (self.folder is None):
            raise ValueError("give either member or folder")
        if self.index_width is not None and self.folder is None:
            raise ValueError("index_width goes with folder")
        has_entries = self.member is not None and self.member.lower().rpartition(".")[2] in _WITH_ENTRIES
        if has_entries != (self.pickle_key is not None):
            raise ValueError(f"pickle_key goes with a member of {' or '.join(_WITH_ENTRIES)} (member {self.member!r})")
        return self


def row_of_key(folder: ArrayFolder, tar: str, key: str, index_width: int, num_rows: int) -> int:
    """The row in the .npy of a tar that the last digits of a sample's key name.

    Raises:
        ConfigError: the key has no such digits, is of another tar, or names a row that does not exist.
    """
    digits = key.rpartition("/")[2]
    number, index = digits[:-index_width], digits[-index_width:]
    if not (number.isdecimal() and index.isdecimal()) or int(number) != number_of(tar):
        raise ConfigError(
            f"{folder.field}: {tar} has the key {key!r}, which is not the number of the tar and then {index_width} "
            "digits; give the index_width that the keys have, or null if the .npy has the order of the tar"
        )
    if int(index) >= num_rows:
        raise ConfigError(
            f"{folder.field}: {folder.file_of(tar)} has {num_rows:,} rows, but {tar} has the key {key!r}, which is "
            f"row {int(index):,}; make the one again from the other"
        )
    return int(index)


def read_member(
    tars: OpenTars, tar: str, key: str, members: Mapping[str, Span], array: ArrayConfig
) -> PrecomputedEmbedding:
    """The array in a member of a sample.

    Raises:
        ConfigError: it is not one of numbers, or a pickle of anything but plain data.
    """
    assert array.member is not None
    span = members.get(array.member.lower())
    where = f"{tar}.tar: {key.removeprefix(f'{tar}/')}.{array.member}"
    if span is None:
        return PrecomputedEmbedding(where, reason="missing_embedding", detail=f"no member .{array.member}")
    data = read_span(tars.open(tar), span)
    try:
        if len(data) < span[1]:
            raise Damaged("the tar ends inside it")
        if array.pickle_key is None:
            return PrecomputedEmbedding(where, parse(data, where))
        is_npz = array.member.lower().endswith("npz")
        return _precached(
            _read_npz(data, array.pickle_key, where) if is_npz else read_pickle(data, where), array.pickle_key, where
        )
    except Damaged as error:
        return PrecomputedEmbedding(where, reason="unreadable_embedding", detail=str(error))


def _read_npz(data: bytes, key: str, where: str) -> dict[str, np.ndarray | None]:
    """The arrays of an .npz by name, of which only `key` is read.

    Raises:
        ConfigError: it does not hold numbers.
        Damaged: it is not a complete .npz.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = {name.removesuffix(".npy"): name for name in archive.namelist()}
            return {name: parse(archive.read(full), where) if name == key else None for name, full in names.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise Damaged(f"not an .npz: {error}") from error


def _precached(content: Any, key: str, where: str) -> PrecomputedEmbedding:
    """The array in what NeMo pickles of a sample: {key: (tokens, dim)} or {key: {"encodings": (tokens, dim), "mask":
    (tokens,)}}."""
    found = content.get(key) if isinstance(content, dict) else None
    if isinstance(found, np.ndarray):
        return PrecomputedEmbedding(where, found)
    entry: dict[str, Any] = found if isinstance(found, dict) else {}
    encodings = entry.get("encodings")
    if not isinstance(encodings, np.ndarray):
        has = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        return PrecomputedEmbedding(
            where, reason="missing_embedding", detail=f"no {key} or {key}.encodings; it has: {has}"[:200]
        )
    mask = entry.get("mask")
    if mask is not None:
        kept = np.asarray(mask).reshape(-1).astype(bool)
        if len(kept) != len(encodings):
            raise ConfigError(
                f"{where}: {len(encodings)} encodings with a mask of {len(kept)}; they must be of the same tokens"
            )
        encodings = encodings[kept]
    return PrecomputedEmbedding(where, encodings)
