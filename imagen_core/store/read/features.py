"""Patch features of an image encoder in a store: arrays of each image, and of the image mirrored.

NAME                  float16 or int8 (rows, columns, dim), a vector of each patch, from the top left
NAME-scale            float32 (rows, columns), only with int8: value = q * scale
NAME-mirrored(-scale) the same of the image mirrored left to right; not in every store
"""

import numpy as np

from imagen_core.store.array_spec import ArrayDtype, ArraySpec
from imagen_core.store.files.ragged import StoredEmbedding, restore
from imagen_core.store.read.reader import OpenShard, StoreReader

MIRRORED = "-mirrored"
_SCALE = "-scale"
_DTYPES = ("float16", "int8")


def feature_specs(
    name: str, dtype: ArrayDtype, grid: tuple[int | None, int | None], dim: int, *, mirrored: bool
) -> dict[str, ArraySpec]:
    """The arrays of patch features by name.

    Args:
        grid: rows and columns; None where they differ from image to image.
    """
    specs: dict[str, ArraySpec] = {}
    for each in (name, f"{name}{MIRRORED}") if mirrored else (name,):
        specs[each] = ArraySpec(dtype, (*grid, dim))
        if dtype == "int8":
            specs[f"{each}{_SCALE}"] = ArraySpec("float32", grid)
    return specs


def stored_features(name: str, stored: StoredEmbedding, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """Arrays of an image's features, (rows * columns, dim) as `cast_embedding` stores them."""
    arrays: dict[str, np.ndarray] = {name: stored.values.reshape(*grid, -1)}
    if stored.scales is not None:
        arrays[f"{name}{_SCALE}"] = stored.scales.reshape(grid)
    return arrays


class FeatureReader:
    """Reads the features of a store's images, float16 (rows, columns, dim).

    Attributes:
        dim: width of a vector.
        has_mirrored: whether the store has those of the mirrored images.
    """

    def __init__(self, store: StoreReader, name: str) -> None:
        """Raises ValueError if the store has no such features."""
        spec = store.array_group(name).spec
        if spec.dtype not in _DTYPES or len(spec.shape) != 3 or spec.shape[2] is None:
            raise ValueError(f"array {name!r} is {spec}, and no patch features: int8 or float16 (rows, columns, dim)")
        self._name, self._is_int8, self.dim = name, spec.dtype == "int8", spec.shape[2]
        self.has_mirrored = f"{name}{MIRRORED}" in store.arrays
        for each in (name, f"{name}{MIRRORED}")[: 1 + self.has_mirrored] if self._is_int8 else ():
            store.array_group(f"{each}{_SCALE}")

    def read(self, files: OpenShard, row: int, *, mirrored: bool) -> np.ndarray:
        """Features of one image, as it is or mirrored.

        Raises:
            ValueError: the store has none of mirrored images.
            StoreError: the file cannot be read.
        """
        if mirrored and not self.has_mirrored:
            raise ValueError(f"the store has no array {self._name}{MIRRORED}, the features of mirrored images")
        name = f"{self._name}{MIRRORED}" if mirrored else self._name
        values = files.arrays[name].stored(row)
        if not self._is_int8:
            return values
        scales = files.arrays[f"{name}{_SCALE}"].stored(row)
        flat = StoredEmbedding(values.reshape(-1, self.dim), scales.reshape(-1))
        return restore(flat, "int8").astype(np.float16).reshape(values.shape)
