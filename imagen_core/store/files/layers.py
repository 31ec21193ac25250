"""What the files of embeddings of both formats do alike: which layers of a row are read, and how they become one."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from imagen_core.store.errors import ADVICE, StoreError
from imagen_core.store.files.ragged import StoredEmbedding, stacked
from imagen_core.store.layout import layer_suffixes
from imagen_core.store.records import EmbeddingGroup

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class OnFirstUse(dict[_Key, _Value]):
    """A dict that makes a value when its key is first requested."""

    def __init__(self, make: Callable[[_Key], _Value]) -> None:
        self._make = make

    def __missing__(self, key: _Key) -> _Value:
        value = self[key] = self._make(key)
        return value


def check_held(name: str, group: EmbeddingGroup, found: tuple[str, int], held: tuple[tuple[int, ...], int]) -> None:
    """Compares what a file says it holds with what the manifest says.

    Args:
        found: dtype and dim.
        held: layers, and scales per token.
    Raises:
        StoreError: they differ.
    """
    wanted = (group.dtype, group.dim)
    if found != wanted:
        raise StoreError(f"{name}: holds (dtype, dim) {found}, not {wanted}; {ADVICE}")
    if held != (group.layers, group.num_scales):
        raise StoreError(
            f"{name}: holds (layers, scales per token) {held}, not {(group.layers, group.num_scales)}; {ADVICE}"
        )


def stored_row(
    group: EmbeddingGroup, layers: Sequence[int] | None, read: Callable[[str], StoredEmbedding]
) -> StoredEmbedding:
    """A row as stored: (n_tokens, dim), or (n_tokens, layers, dim) of the chosen layers, None for all.

    Args:
        read: reads (n_tokens, dim) by the suffix of a column or dataset.
    Raises:
        ValueError: a layer that the group lacks.
    """
    if not group.layers:
        if layers is not None:
            group.layer_places(layers)
        return read("")
    chosen = group.layers if layers is None else layers
    group.layer_places(chosen)
    return stacked([read(suffix) for suffix in layer_suffixes(chosen)])
