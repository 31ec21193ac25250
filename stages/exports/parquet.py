"""Parquet files that `datasets` streams and the viewer of the Hugging Face hub shows, one per shard of the store.

Images are structs of `bytes` and `path`, as the feature `Image` has them. An embedding is a list (tokens) of lists of
fixed width, or of one such list for each layer. The features are in the schema's metadata, under `huggingface`.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imagen_core.store import ArraySpec, ColumnType, EmbeddingGroup
from stages.exports.samples import ExportSample
from stages.exports.selection import Selection
from stages.exports.webdataset import SUFFIXES

_ROW_GROUP_BYTES = 32 << 20
_MOST_ROWS = 1000
_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
_COLUMN_TYPES: dict[ColumnType, pa.DataType] = {
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "text": pa.string(),
}


class ParquetColumns:
    """The columns of an export: their schema, and their values for some samples."""

    def __init__(self, selection: Selection):
        self._selection = selection
        images = {selection.image_name(size, "image"): _IMAGE for size in selection.images}
        types: dict[str, pa.DataType] = {
            **images,
            "text": pa.string(),
            "captions": pa.list_(pa.string()),
            **{f"captions_{name}": pa.list_(pa.string()) for name in selection.caption_sets},
            "key": pa.string(),
            "url": pa.string(),
            "sha256": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "transcription": pa.string(),
            "safebox": pa.list_(pa.int32()),
            "label": pa.int32(),
        }
        texts = {**selection.texts, **{"_".join(of): group for of, group in selection.set_texts.items()}}
        for name, group in texts.items():
            types[f"embedding_{name}"] = pa.list_(_array_type((None, *group.token_shape), _float(group, selection)))
        for name, group in selection.image_embeds.items():
            types[f"image_embedding_{name}"] = pa.list_(_float(group, selection), group.dim)
        types |= {
            f"array_{name}": _array_type(group.spec.shape, _type_of(group.spec))
            for name, group in selection.arrays.items()
        }
        self._kept = {_free(name, {*types, *selection.columns}, types): name for name in selection.columns}
        kept = {column: _COLUMN_TYPES[selection.columns[name]] for column, name in self._kept.items()}
        features = {
            name: {"_type": "Image"} if kind == _IMAGE else _feature(kind) for name, kind in (types | kept).items()
        }
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        self.schema = pa.schema(list((types | kept).items()), metadata=metadata)
        self.large = [*images, *(name for name in types if "embedding_" in name or name.startswith("array_"))]
        """Columns that do not become smaller by a dictionary or by compression."""

    def table(self, samples: Sequence[ExportSample]) -> pa.Table:
        """The samples as rows."""
        rows = [sample.row for sample in samples]
        columns: dict[str, Any] = {name: [getattr(row, name, None) for row in rows] for name in self.schema.names}
        columns["text"] = [row.captions[0] for row in rows]
        columns |= {column: [row.columns.get(name) for row in rows] for column, name in self._kept.items()}
        for size, group in self._selection.images.items():
            suffix = SUFFIXES.get(codec := self._selection.image_codec(group), codec)
            paths = ["{:05d}-{:06d}.{}".format(*sample.place, suffix) for sample in samples]
            data = [sample.images[size] for sample in samples]
            name = self._selection.image_name(size, "image")
            columns[name] = pa.StructArray.from_arrays(
                [pa.array(data, pa.binary()), pa.array(paths)], fields=list(_IMAGE)
            )
        for name in self._selection.caption_sets:
            columns[f"captions_{name}"] = [sample.caption_sets[name] for sample in samples]
        texts = {f"embedding_{name}": [sample.text[name] for sample in samples] for name in self._selection.texts}
        for of in self._selection.set_texts:
            texts[f"embedding_{'_'.join(of)}"] = [sample.set_text[of] for sample in samples]
        for column, rows_of in texts.items():
            counts = [len(found) for found in rows_of]
            each = list(chain.from_iterable(rows_of))
            columns[column] = _lists(_nested(each, self.schema.field(column).type.value_type), counts)
        for name in self._selection.image_embeds:
            column = f"image_embedding_{name}"
            values = np.concatenate([sample.image_embeds[name] for sample in samples])
            columns[column] = pa.FixedSizeListArray.from_arrays(pa.array(values), type=self.schema.field(column).type)
        for name in self._selection.arrays:
            column = f"array_{name}"
            columns[column] = _nested([sample.arrays[name] for sample in samples], self.schema.field(column).type)
        return pa.table(
            [pa.array(v, f.type) if isinstance(v := columns[f.name], list) else v for f in self.schema], self.schema
        )


def write_parquet(path: Path, samples: Iterable[ExportSample], selection: Selection) -> int:
    """Writes the file, at most `_ROW_GROUP_BYTES` of which are in memory; returns the number of samples."""
    columns = ParquetColumns(selection)
    count = 0
    leaves = [(name in columns.large, leaf) for name, leaves in _leaves(columns.schema).items() for leaf in leaves]
    small = [leaf for is_large, leaf in leaves if not is_large]
    options: dict[str, Any] = {
        "compression": {leaf: "NONE" if is_large else "ZSTD" for is_large, leaf in leaves},
        "use_dictionary": small,
        "write_statistics": small,
    }
    with pq.ParquetWriter(path, columns.schema, **options) as writer:
        for rows in _row_groups(samples):
            writer.write_table(columns.table(rows), row_group_size=len(rows))
            count += len(rows)
    return count


def _row_groups(samples: Iterable[ExportSample]) -> Iterator[list[ExportSample]]:
    rows: list[ExportSample] = []
    num_bytes = 0
    for sample in samples:
        rows.append(sample)
        num_bytes += sample.num_bytes
        if num_bytes >= _ROW_GROUP_BYTES or len(rows) == _MOST_ROWS:
            yield rows
            rows, num_bytes = [], 0
    if rows:
        yield rows


def _leaves(schema: pa.Schema) -> dict[str, list[str]]:
    """The parquet columns of each field."""

    def below(path: str, kind: pa.DataType) -> Iterator[str]:
        if pa.types.is_struct(kind):
            for field in kind:
                yield from below(f"{path}.{field.name}", field.type)
        elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            yield from below(f"{path}.list.element", kind.value_type)
        else:
            yield path

    return {field.name: list(below(field.name, field.type)) for field in schema}


def _free(name: str, others: Collection[str], taken: Collection[str]) -> str:
    """The column of a kept column: its name, or where that is taken `column_NAME`."""
    column = name
    while column in (taken if column == name else others):
        column = f"column_{column}"
    return column


def _float(group: EmbeddingGroup, selection: Selection) -> pa.DataType:
    return pa.float16() if selection.float_dtype(group) == "float16" else pa.float32()


def _type_of(spec: ArraySpec) -> pa.DataType:
    return pa.from_numpy_dtype(np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype))


def _array_type(shape: Sequence[int | None], kind: pa.DataType) -> pa.DataType:
    """Arrays of this shape and type of elements; None is any length."""
    for length in reversed(shape):
        kind = pa.list_(kind) if length is None else pa.list_(kind, length)
    return kind


def _nested(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    """Arrays of `ndim` axes as rows of `ndim` lists within each other."""
    values = pa.array(np.concatenate([array.ravel() for array in arrays]) if arrays else [], _innermost(kind))
    shapes = np.array([array.shape for array in arrays], np.int64).reshape(len(arrays), -1)
    kinds = []
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        kinds.append(kind)
        kind = kind.value_type
    for axis in reversed(range(len(kinds))):
        if pa.types.is_fixed_size_list(kinds[axis]):
            values = pa.FixedSizeListArray.from_arrays(values, type=kinds[axis])
        else:
            values = _lists(values, np.repeat(shapes[:, axis], shapes[:, :axis].prod(axis=1)))
    return values


def _innermost(kind: pa.DataType) -> pa.DataType:
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def _lists(values: pa.Array, counts: Sequence[int] | np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), values)


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """The feature of `datasets` that has this type."""
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_fixed_size_list(kind):
        return {"feature": _feature(kind.value_type), "length": kind.list_size, "_type": "List"}
    names = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}
    return {"dtype": names.get(kind, str(kind)), "_type": "Value"}
