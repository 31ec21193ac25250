"""webdataset tars: members of equal base name form a sample."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.images.exif_text import exif_settings, orientation_in
from stages.sources.annotations import AnnotationsConfig
from stages.sources.arrays.folders import ArrayFolder, no_array
from stages.sources.arrays.tars import ArrayConfig, read_member, row_of_key
from stages.sources.base import (
    Emit,
    InputPart,
    Original,
    PrecomputedEmbedding,
    Source,
    SourceRow,
    require_path,
)
from stages.sources.file_lists import find_listed, listed_rows
from stages.sources.files import base_folder, find_files, named_parts, path_of
from stages.sources.tables import captions_of
from stages.sources.tar_members import CONTENT, OpenTars, Span, index_tar, read_span


class WebdatasetConfig(AnnotationsConfig):
    """webdataset tars, as img2dataset and others write them. Columns are keys of KEY.json."""

    kind: Literal["webdataset"] = "webdataset"
    path: str | None = None
    """A tar, a folder of tars, a glob, or a brace range such as `data/{00000..00099}.tar`; with `file_list` the folder
    that its names are relative to."""
    file_list: str | None = None
    """A list of the tars to read: one name per line, or NeMo's wdinfo.pkl."""
    caption_column: str = "caption"
    """Key of the caption in KEY.json; used where there is no KEY.txt."""
    exif_column: str | None = "exif"
    """Key in KEY.json of the EXIF as img2dataset keeps it, JSON with `Image Orientation`: it turns images that have no
    orientation of their own. The key need not be there. null: it is not used."""
    arrays: dict[str, ArrayConfig] = Field(default_factory=dict)
    """Embeddings that come with the samples, by a name that encoders of kind `given` request."""

    def build(self) -> "WebdatasetSource":
        return WebdatasetSource(self)


class WebdatasetSource(Source):
    """The payload of a row has the members of its sample, {image, txt, json, ....npy -> span}.

    With folders of arrays, it also has each array's row there and the digest of the .npy. The driver reads only the
    headers of tars.
    """

    layout = ("key", "name", "payload", "is_duplicate")
    keys_may_repeat = True

    def __init__(self, config: WebdatasetConfig):
        self.config = config
        self.path = require_path(config.path, "webdataset")
        self.folders = {
            name: ArrayFolder(name, array.folder) for name, array in config.arrays.items() if array.folder is not None
        }

    @cached_property
    def folder(self) -> str:
        return base_folder(self.path)

    def check(self) -> None:
        for folder in self.folders.values():
            folder.check(part.path for part in self.parts())
        if next(self.shards(1), None) is None:
            raise ConfigError(f"source.path: {self.path} holds no samples; give tars with at least one member")

    def parts(self) -> Iterator[InputPart]:
        if self.config.file_list is not None:
            return iter(named_parts(find_listed(self.path, self.config.file_list)))
        return iter(named_parts(find_files(self.path, "source.path", ("tar",), braces=True)))

    def estimate_rows(self) -> int | None:
        return None if self.config.file_list is None else listed_rows(self.config.file_list)

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        for part in parts:
            samples = index_tar(f"{self.folder}/{part.path}")
            if not self.folders:
                for key, members in samples:
                    yield part, SourceRow(f"{part.name}/{key}", part.name, payload=(members,))
                continue
            indexed = list(samples)  # all of a tar must fit its arrays before any of it is used
            places = {name: self._places(name, part, [key for key, _ in indexed]) for name in self.folders}
            for index, (key, members) in enumerate(indexed):
                arrays = {name: [rows[index], digest] for name, (rows, digest) in places.items()}
                yield part, SourceRow(f"{part.name}/{key}", part.name, payload=(members, arrays))

    def _places(self, name: str, part: InputPart, keys: Sequence[str]) -> tuple[Sequence[int], str]:
        """The row in the .npy of each sample of a tar, and the digest of the .npy.

        Raises:
            ConfigError: there are not as many rows as samples, or a key is not of the tar or has no row.
        """
        folder, width = self.folders[name], self.config.arrays[name].index_width
        if width is None:
            return range(len(keys)), folder.check_rows(part.path, len(keys))
        num_rows, digest = folder.num_rows_and_digest(part.path)
        return [row_of_key(folder, part.path, key, width, num_rows) for key in keys], digest

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        del scratch
        with self._open_tars(shard) as tars:
            for row in rows:
                emit(self._read(tars.open(row.name), row))

    def _open_tars(self, shard: Shard) -> OpenTars:
        return OpenTars(lambda name: path_of(shard, name, self.folder, self.parts))

    def _read(self, file: BinaryIO, row: SourceRow) -> Original:
        members: dict[str, Span] = row.payload[0]
        if "image" not in members:
            return Original.dropped(row, "no_image", f"members: {', '.join(sorted(members))}")
        wanted = {kind: span for kind, span in members.items() if kind in CONTENT}
        content = {kind: read_span(file, span) for kind, span in wanted.items()}
        if any(len(content[kind]) < size for kind, (_, size) in wanted.items()):
            return Original.dropped(row, "truncated", "the tar ends inside this sample")
        metadata = {"cls": content.get("cls", b"").decode("ascii", "replace"), **_json_object(content.get("json"))}
        if "txt" in content:
            captions = [content["txt"].decode("utf-8-sig", "surrogateescape")]
        else:
            captions = captions_of(metadata, self.config.caption_column)
        url = metadata.get("url")
        url = url if isinstance(url, str) else None
        annotations = self.config.annotations(metadata)
        orientation = orientation_in(metadata.get(self.config.exif_column or ""))
        return Original(
            row.position,
            row.key,
            url,
            tuple(captions),
            content["image"],
            annotations=annotations,
            orientation=orientation,
        )

    def fingerprint(self) -> dict[str, object]:
        return {
            "caption_column": self.config.caption_column,
            **exif_settings(self.config.exif_column),
            **self.config.annotation_settings,
        }

    def describe_array(self, name: str) -> dict[str, object]:
        array = self.config.arrays.get(name)
        if array is None:
            raise no_array(name, self.config.arrays)
        return {**array.model_dump(exclude={"folder"}, exclude_none=True), "folder": array.folder is not None}

    def precomputed(self, shard: Shard, name: str, positions: Sequence[int]) -> Iterator[PrecomputedEmbedding]:
        array, rows = self.config.arrays[name], self.rows_of(shard)
        with self._open_tars(shard) as tars:
            for row in (rows[position] for position in positions):
                if array.folder is not None:
                    index, _ = row.payload[1][name]
                    path = path_of(shard, row.name, self.folder, self.parts)
                    yield PrecomputedEmbedding(*self.folders[name].read(path, index))
                else:
                    yield read_member(tars, row.name, row.key, row.payload[0], array)


def _json_object(data: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
