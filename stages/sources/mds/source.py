"""MDS datasets, as mosaicml-streaming writes them; with text latents as PRX and mosaicml/diffusion have them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from imagen_core.store import ColumnType
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.sources.annotations import AnnotationsConfig
from stages.sources.arrays.folders import no_array
from stages.sources.base import Emit, InputPart, Original, PrecomputedEmbedding, Source, SourceRow, require_path
from stages.sources.caches.base import Unusable, cut_to_text
from stages.sources.files import named_parts, path_of
from stages.sources.mds.index import MdsShard, read_indices
from stages.sources.mds.samples import IMAGES, BadSample, array_of, cell_of, read_sample
from stages.sources.records.cells import BadCell, captions_of, text_of
from stages.sources.records.compressed import open_random
from stages.sources.records.far import open_ranged
from stages.sources.records.kept import Kept, types_of_records
from stages.sources.tables import HEAD_ROWS
from stages.sources.tree import Tree

_BYTES = "bytes"


class MdsArrayConfig(Config):
    """A column of embeddings of the captions."""

    column: str
    """Name of the column, such as `latent_caption_t5gemma2b-256-bf16`: arrays of (tokens, dim) or (dim,); or bytes, if
    `dtype` and `dim` are given, such as `T5_LATENTS`."""
    mask_column: str | None = None
    """Column of the attention mask; only the tokens that it marks are stored. Of bytes it has one byte per token.
    null: all rows are text."""
    pads: Literal["cut", "keep"] = "cut"
    """keep: also the rows that the mask leaves out, for networks that read them."""
    dtype: Literal["float16", "float32"] | None = None
    """Type of the numbers in a column of bytes."""
    dim: int | None = Field(default=None, ge=1)
    """Numbers per token in a column of bytes."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.dtype is None) != (self.dim is None):
            raise ValueError("dtype and dim go together: both for a column of bytes, none for one of arrays")
        return self


class MdsConfig(AnnotationsConfig):
    """An MDS dataset. Columns are those of its samples."""

    kind: Literal["mds"] = "mds"
    path: str | None = None
    """A folder with an index.json, or of such folders; local or any fsspec URL. Shards may be compressed (zstd, gz,
    bz2)."""
    image_column: str | None = "image"
    """Column of the image: bytes, jpeg or png. null: there are no images."""
    caption_column: str | None = "caption"
    """Column of the caption. null: every caption is empty."""
    url_column: str | None = None
    """Column of the image's URL, kept for lineage."""
    arrays: dict[str, MdsArrayConfig] = Field(default_factory=dict)
    """Embeddings that come with the samples, by a name that encoders of kind `given` request."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.where is not None:
            raise ValueError(
                "where: is not for source.kind=mds, whose columns lie apart from each other; leave it out"
            )
        return self

    @property
    def content_columns(self) -> list[str]:
        """What is read of a sample, but arrays."""
        named = (self.image_column, self.caption_column, self.url_column, *self.annotation_names)
        return list(dict.fromkeys(name for name in named if name is not None))

    def build(self) -> "MdsSource":
        return MdsSource(self)


class MdsSource(Source):
    """The payload of a row is its number in the shard file, and the digest of the file's entry in the index.

    The driver reads indices only.
    """

    layout = ("key", "name", "payload")

    def __init__(self, config: MdsConfig):
        self.config = config
        self.path = require_path(config.path, "mds")
        self.has_images_at_hand = config.image_column is not None
        self._shard_files: dict[str, MdsShard] | None = None

    @cached_property
    def tree(self) -> Tree:
        return Tree(self.path)

    @property
    def shard_files(self) -> dict[str, MdsShard]:
        """The shard files by path, as the indices were read last."""
        if self._shard_files is None:
            self._shard_files = {shard.path: shard for shard in read_indices(self.tree)}
        return self._shard_files

    def check(self) -> None:
        if not self.tree.is_folder():
            raise ConfigError(f"source.path: {self.tree.url} is not a folder; check the path")
        if not any(shard.samples for shard in self.shard_files.values()):
            raise ConfigError(f"source.path: {self.tree.url} holds no samples; give a folder with at least one")
        for shard in self.shard_files.values():
            self._check_columns(shard)
        self.config = self.config.with_types(self._types)

    def _check_columns(self, shard: MdsShard) -> None:
        where, has = f"{self.tree.url}/{shard.path}", ", ".join(shard.encodings)
        if self.tree.size(shard.path) is None:
            raise ConfigError(f"source.path: {where} is in the index and does not exist; restore the file")
        named = {name: getattr(self.config, name) for name in ("image_column", "caption_column", "url_column")}
        named |= {f"{name}_column": column for name, column in self.config.annotation_columns.items()}
        named |= {f"keep_columns.{column}": column for column in self.config.keep_columns}
        for name, array in self.config.arrays.items():
            named |= {f"arrays.{name}.column": array.column, f"arrays.{name}.mask_column": array.mask_column}
            if (shard.encodings.get(array.column) == _BYTES) != (array.dtype is not None):
                needs = "is of bytes, so give their dtype and dim" if array.dtype is None else "is not of bytes"
                if array.column in shard.encodings:
                    raise ConfigError(f"source.arrays.{name}: {array.column!r} of {where} {needs}")
        for field, column in named.items():
            if column is not None and column not in shard.encodings:
                raise ConfigError(f"source.{field}: {where} has no column {column!r}; it has: {has}")
        image = self.config.image_column
        if image is not None and shard.encodings[image] not in IMAGES:
            raise ConfigError(
                f"source.image_column: {image!r} of {where} is encoded as {shard.encodings[image]}, which is no image "
                f"file; of {', '.join(IMAGES)} it can be read"
            )

    def _types(self, keep: Kept) -> dict[str, ColumnType]:
        """The types of columns to keep, from the first samples of the first shard."""
        shard = next(shard for shard in self.shard_files.values() if shard.samples)
        records: list[dict[str, Any]] = []
        with closing(self._open(f"{self.tree.url}/{shard.path}")) as file, suppress(BadSample, BadCell):
            for number in range(min(HEAD_ROWS, shard.samples)):
                records.append(self._record(file, shard, number, list(keep)))
        return types_of_records(keep, records)

    def parts(self) -> Iterator[InputPart]:
        self._shard_files = None  # there may be more by now
        return iter(named_parts({path: self.tree.size(path) for path in self.shard_files}))

    def estimate_rows(self) -> int | None:
        return sum(shard.samples for shard in self.shard_files.values())

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        for part in parts:
            shard = self.shard_files[part.path]
            for number in range(shard.samples):
                payload = (number, shard.digest)
                yield part, SourceRow(f"{part.name}/{number:07d}", part.name, payload=payload)

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        del scratch
        for row, file, entry in self._opened(shard, rows):
            emit(self._original(row, file, entry))

    def _opened(self, shard: Shard, rows: Iterable[SourceRow]) -> Iterator[tuple[SourceRow, BinaryIO, MdsShard]]:
        """Each row with its shard file, open, and the entry of that."""
        for name, of_file in groupby(rows, key=lambda row: row.name):
            path = path_of(shard, name, self.tree.url, self.parts)
            entry = self.shard_files[path.removeprefix(f"{self.tree.url}/")]
            with closing(self._open(path)) as file:
                for row in of_file:
                    yield row, file, entry

    def _open(self, path: str) -> BinaryIO:
        return open_random(path, open_ranged)

    def _record(self, file: BinaryIO, entry: MdsShard, number: int, columns: Sequence[str]) -> dict[str, Any]:
        data = read_sample(file, entry, number, columns)
        return {column: cell_of(data[column], entry.encodings[column], column) for column in columns}

    def _original(self, row: SourceRow, file: BinaryIO, entry: MdsShard) -> Original:
        config = self.config
        try:
            record = self._record(file, entry, row.payload[0], config.content_columns)
            url = text_of(record, config.url_column) or None
            captions = None if config.caption_column is None else tuple(captions_of(record, config.caption_column))
            annotations = config.annotations(record)
        except BadSample as bad:
            return Original.dropped(row, "unreadable_row", str(bad))
        except BadCell as bad:
            return Original.dropped(row, bad.reason, bad.detail)
        image = None if config.image_column is None else record[config.image_column]
        return Original(row.position, row.key, url, captions, image, annotations=annotations)

    def describe_array(self, name: str) -> dict[str, object]:
        if name not in self.config.arrays:
            raise no_array(name, self.config.arrays)
        return self.config.arrays[name].model_dump(mode="json", exclude_defaults=True)

    def precomputed(self, shard: Shard, name: str, positions: Sequence[int]) -> Iterator[PrecomputedEmbedding]:
        array, rows = self.config.arrays[name], self.rows_of(shard)
        for row, file, entry in self._opened(shard, (rows[position] for position in positions)):
            where = f"{self.tree.url}/{entry.path} sample {row.payload[0]}: {array.column}"
            try:
                found = self._embedding(file, entry, row.payload[0], array)
                yield PrecomputedEmbedding(where, found, has_own_file=True)
            except Unusable as bad:
                yield PrecomputedEmbedding(where, reason=bad.reason, detail=bad.detail)
            except (BadSample, ValueError, IndexError) as bad:
                yield PrecomputedEmbedding(where, reason="unreadable_embedding", detail=str(bad)[:200])

    def _embedding(self, file: BinaryIO, entry: MdsShard, number: int, array: MdsArrayConfig) -> np.ndarray:
        columns = [array.column, *([] if array.mask_column is None else [array.mask_column])]
        data = read_sample(file, entry, number, columns)
        values = data[array.column]
        if array.dtype is not None and array.dim is not None:
            states = np.frombuffer(values, np.dtype(array.dtype).newbyteorder("<"))
            states = states if len(states) == array.dim else states.reshape(-1, array.dim)
        else:
            states = array_of(values, entry.encodings[array.column])
        if array.mask_column is None:
            return cut_to_text(states, None, keep_pads=True)
        encoding, mask = entry.encodings[array.mask_column], data[array.mask_column]
        marked = np.frombuffer(mask, np.uint8) if encoding == _BYTES else array_of(mask, encoding)
        return cut_to_text(states, marked, keep_pads=array.pads == "keep")

    def fingerprint(self) -> dict[str, object]:
        config = self.config
        named = {name: getattr(config, name) for name in ("image_column", "caption_column")}
        return {**named, **config.annotation_settings}
