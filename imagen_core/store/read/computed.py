"""What a condition may name beside the columns of `samples`: lengths of captions, and arrays of numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from imagen_core.store.array_spec import ArraySpec
from imagen_core.store.files.arrays import ArrayFile
from imagen_core.store.files.arrow_column import as_numpy, numbers_column
from imagen_core.store.files.samples import list_offsets
from imagen_core.store.files.shard import EmbeddingFile
from imagen_core.store.manifest import Manifest

CAPTION_TOKENS = "caption_tokens"
_VECTORS = ("pooled", "projected")
"""Outputs of encoders that make one vector of a caption, whose number of tokens is not stored."""


class _Shard(Protocol):
    @property
    def text(self) -> Mapping[str, EmbeddingFile]: ...
    @property
    def set_texts(self) -> Mapping[tuple[str, str], EmbeddingFile]: ...
    @property
    def arrays(self) -> Mapping[str, ArrayFile]: ...
    def columns(self, names: Sequence[str], /) -> pa.Table: ...
    def caption_columns(self, caption_set: str, /) -> pa.Table: ...


class Computed(NamedTuple):
    """A column that is made from the files of a shard."""

    kind: pa.DataType
    read: Callable[[_Shard], pa.Array]
    """One value per row, excluded ones included; NULL where a sample has none."""


def computed_columns(manifest: Manifest, caption_sets: Sequence[str]) -> dict[str, Computed]:
    """The columns by name: `caption_tokens.SET.ENCODER`, the tokens of the longest caption that a sample has of a set;
    `caption_tokens.SET` where one encoder has encoded the set; and arrays that are numbers. Encoders that make one
    vector of a caption do not count.

    Args:
        caption_sets: of the store, that of `samples` first.
    """
    found: dict[str, Computed] = {}
    first = caption_sets[0]
    with_tokens = [name for name, group in manifest.texts.items() if group.fingerprint.get("output") not in _VECTORS]
    for name in caption_sets:
        encoders = [each for each in with_tokens if name == first or (each, name) in manifest.set_texts]
        for encoder in encoders:
            lengths = Computed(pa.int64(), _tokens(encoder, None if name == first else name))
            found[f"{CAPTION_TOKENS}.{name}.{encoder}"] = lengths
            if len(encoders) == 1:
                found[f"{CAPTION_TOKENS}.{name}"] = lengths
    for name, group in manifest.arrays.items():
        if are_numbers(group.spec):
            is_bool = (group.spec.dtype, group.spec.shape) == ("bool", ())
            found[name] = Computed(pa.bool_() if is_bool else pa.float64(), _array(name, is_bool=is_bool))
    return found


def are_numbers(spec: ArraySpec) -> bool:
    """Whether an array is one number for each sample, or a list of them, which stands for its mean."""
    return spec.shape in ((), (None,))


def array_numbers(file: ArrayFile) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of arrays for which `are_numbers`: float64 (n,), and whether there is one, bool (n,): an empty list
    has none."""
    found = [np.asarray(file.value(row), np.float64) for row in range(file.num_rows)]
    valid = np.array([array.size > 0 for array in found], np.bool_)
    return np.array([array.mean() if array.size else 0.0 for array in found], np.float64), valid


def longest_captions(num_tokens: np.ndarray, caption_ids: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the longest of some captions, row by row: int64 (n,), and whether the row has any, bool (n,).

    Args:
        num_tokens: by caption id.
    """
    ids, bounds = as_numpy(caption_ids.flatten()), np.asarray(list_offsets(caption_ids))
    has_some = bounds[1:] > bounds[:-1]
    found = np.zeros(len(has_some), np.int64)
    if has_some.any():
        found[has_some] = np.maximum.reduceat(np.asarray(num_tokens)[ids], bounds[:-1][has_some])
    return found, has_some


def _tokens(encoder: str, further: str | None) -> Callable[[_Shard], pa.Array]:
    def read(shard: _Shard) -> pa.Array:
        if further is None:
            ids, file = shard.columns(["caption_ids"])["caption_ids"], shard.text[encoder]
        else:
            ids, file = shard.caption_columns(further)["caption_ids"], shard.set_texts[encoder, further]
        return numbers_column(*longest_captions(file.num_tokens, ids.combine_chunks()))

    return read


def _array(name: str, *, is_bool: bool) -> Callable[[_Shard], pa.Array]:
    def read(shard: _Shard) -> pa.Array:
        column = numbers_column(*array_numbers(shard.arrays[name]))
        return column.cast(pa.bool_()) if is_bool else column

    return read
