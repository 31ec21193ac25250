"""webdataset tars: members of equal base name form a sample."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from pydantic import Field, model_validator

from imagen_core.far.ranges import has_ranges
from imagen_core.store import ColumnType
from pipeline.errors import ConfigError
from pipeline.stage import Shard
from pipeline.storage import parallel_map
from stages.images.exif_text import exif_settings, orientation_in
from stages.sources.annotations import AnnotationsConfig
from stages.sources.arrays.folders import ArrayFolder, no_array
from stages.sources.arrays.tars import ArrayConfig, read_member, row_of_key
from stages.sources.base import (
    COPY,
    MAX_FILE_BYTES,
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
from stages.sources.records.cells import BadCell, captions_of
from stages.sources.records.kept import Kept, types_of_records
from stages.sources.tables import HEAD_ROWS
from stages.sources.tabular.kept_rows import marked, row_filter
from stages.sources.tarfiles.choice import CONTENT, Ambiguous, MemberChoice
from stages.sources.tarfiles.index import Members, TarIndex
from stages.sources.tarfiles.near import NearTars
from stages.sources.tarfiles.opening import OpenTars, Span, open_tar, read_span

_AT_ONCE = 16
"""Tars of an object store, or parts of a shard, that are read at the same time where little of each is read."""
_LABEL = "cls"
_DROP = "drop"
"""In place of members: reason and detail of a row that is dropped unread."""


class WebdatasetConfig(AnnotationsConfig):
    """webdataset tars, as img2dataset and others write them. Columns are keys of KEY.json."""

    kind: Literal["webdataset"] = "webdataset"
    path: str | None = None
    """A tar, a folder of tars, a glob, or a brace range such as `data/{00000..00099}.tar`; with `file_list` the folder
    that its names are relative to. Tars may be compressed (gzip, bzip2, xz, Zstandard)."""
    file_list: str | None = None
    """A list of the tars to read: one name per line, or NeMo's wdinfo.pkl."""
    caption_column: str | None = "caption"
    """Key of the caption in KEY.json, or of a list of captions; used where there is no KEY.txt. null: every caption is
    empty, also where there is a KEY.txt."""
    key_ends_at: Literal["first_dot", "last_dot"] = "first_dot"
    """Where a member's key ends: at the first dot of its file name, as in webdataset, or at the last dot, for keys
    that have dots themselves."""
    image_member: str | None = None
    """Suffix of the image, such as `jpg` for KEY.jpg, or several of which the first present one is taken (`jpg;png`).
    null: the only image of a sample; a sample of several is refused."""
    caption_member: str | None = None
    """Suffix of the text with the caption, or several as above. null: KEY.txt."""
    label_member: str | None = None
    """Suffix of the text with the number of the image's class, or several as above. null: KEY.cls, where
    label_column=cls."""
    exif_column: str | None = "exif"
    """Key in KEY.json of the EXIF as img2dataset keeps it, JSON with `Image Orientation`: it turns images that have no
    orientation of their own. The key need not be there. null: it is not used."""
    arrays: dict[str, ArrayConfig] = Field(default_factory=dict)
    """Embeddings that come with the samples, by a name that encoders of kind `given` request."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.label_member is not None and self.label_column is not None:
            raise ValueError("give either label_member or label_column, which is a key of KEY.json")
        return self

    @property
    def annotation_columns(self) -> dict[str, str]:
        label = {} if self.label_member is None else {"label": _LABEL}
        return {**super().annotation_columns, **label}

    @property
    def choice(self) -> MemberChoice:
        """How the members of a sample are told from each other."""
        arrays = frozenset(array.member.lower() for array in self.arrays.values() if array.member is not None)
        return MemberChoice(
            _alternatives(self.image_member),
            _alternatives(self.caption_member),
            _alternatives(self.label_member),
            arrays,
        )

    @property
    def member_settings(self) -> dict[str, object]:
        """The members' part of the fingerprint: what is not the default."""
        named = {name: getattr(self, name) for name in ("image_member", "caption_member", "label_member")}
        ends = {} if self.key_ends_at == "first_dot" else {"key_ends_at": self.key_ends_at}
        return {**{name: value for name, value in named.items() if value is not None}, **ends}

    def split_name(self, name: str) -> tuple[str, str]:
        """The last part of the key, and the suffix, of a member's file name."""
        key, _, suffix = name.partition(".") if self.key_ends_at == "first_dot" else name.rpartition(".")
        return (key, suffix) if key else (suffix, "")

    def build(self) -> "WebdatasetSource":
        return WebdatasetSource(self)


class WebdatasetSource(Source):
    """The payload of a row has the members of its sample, {image, txt, json, ....npy -> span}.

    With folders of arrays, it also has each array's row there and the digest of the .npy. The driver reads only the
    headers of tars.
    """

    has_images_at_hand = True
    rows_stand_alone = True
    layout = ("key", "name", "payload", "is_duplicate")
    keys_may_repeat = True

    def __init__(self, config: WebdatasetConfig):
        self.config = config
        self.path = require_path(config.path, "webdataset")
        self._choice = config.choice
        self.row_filter = row_filter(config.where)
        self._near = NearTars()
        self.folders = {
            name: ArrayFolder(name, array.folder) for name, array in config.arrays.items() if array.folder is not None
        }

    @cached_property
    def folder(self) -> str:
        return base_folder(self.path)

    def check(self) -> None:
        for folder in self.folders.values():
            folder.check(part.path for part in self.parts())
        damage = ""
        for part in self.parts():
            index = self._index(part)
            samples = index.head()
            for key, members in samples:
                try:
                    self._choice.of(members)
                except Ambiguous as error:
                    raise ConfigError(f"source.path: {index.path}: the sample {key!r} has {error}") from error
            if samples:
                self.config = self.config.with_types(partial(_types, index.path, samples))
                if self.row_filter is not None:
                    records = _records(index.path, samples)
                    present = {name: None for record in records for name in record}
                    self.row_filter.check(present, f"the JSON of the first samples of {index.path}")
                return
            damage = damage or (index.damage and f"{index.path} is not a readable tar: {index.damage}")
        raise ConfigError(
            f"source.path: {damage or f'{self.path} holds no samples'}; give tars with at least one member"
        )

    def _index(self, part: InputPart) -> TarIndex:
        return TarIndex(f"{self.folder}/{part.path}", self.config.split_name, part.copy)

    def begin_run(self) -> None:
        self._near.begin()

    def parts(self) -> Iterator[InputPart]:
        if self.config.file_list is not None:
            return iter(named_parts(find_listed(self.path, self.config.file_list)))
        self.ignored_files.clear()
        found = find_files(self.path, "source.path", ("tar",), braces=True, ignored=self.ignored_files)
        return iter(named_parts(found))

    def estimate_rows(self) -> int | None:
        return None if self.config.file_list is None else listed_rows(self.config.file_list)

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        self.ignored_members.clear()
        self.unread_bytes = 0
        for part, index, found in self._indexed(parts):
            samples: Iterable[tuple[str, Members]] = found
            places: dict[str, tuple[Sequence[int], str]] = {}
            if self.folders:  # all of a tar must fit its arrays before any of it is used
                samples = list(samples)
                places = {name: self._places(name, part, [key for key, _ in samples]) for name in self.folders}
            is_told = False
            for (number, (key, members)), is_kept in self._marked(part, samples):
                self.filtered += not is_kept
                if not is_kept:
                    continue
                arrays = {name: [rows[number], digest] for name, (rows, digest) in places.items()}
                chosen = self._chosen(members)
                is_told |= _is_truncated(chosen, index.cut) and not index.unread_bytes
                payload = (chosen, arrays) if self.folders else (chosen,)
                yield part, SourceRow(f"{part.name}/{key}", part.name, payload=payload)
            if index.damage and not is_told:  # else the drop `truncated` of a sample tells all
                payload = ({_DROP: ["damaged_tar", index.damage]}, *([{}] if self.folders else []))
                yield part, SourceRow(part.path, part.name, payload=payload)
            self.ignored_members.update(index.ignored)
            self.unread_bytes += index.unread_bytes

    def _marked(
        self, part: InputPart, samples: Iterable[tuple[str, Members]]
    ) -> Iterator[tuple[tuple[int, tuple[str, Members]], bool]]:
        """The samples of a tar with their numbers, each with whether `where` keeps it, which its JSON tells."""
        if self.row_filter is None:
            yield from ((numbered, True) for numbered in enumerate(samples))
            return
        with closing(open_tar(part.copy or f"{self.folder}/{part.path}")) as file:
            yield from marked(enumerate(samples), lambda numbered: _record(file, numbered[1][1]), self.row_filter)

    def _indexed(
        self, parts: Iterable[InputPart]
    ) -> Iterator[tuple[InputPart, TarIndex, Iterator[tuple[str, Members]]]]:
        """The tars with their samples; those of an object store that are not copied are indexed several at once, as
        each header is a request."""

        def indexed(part: InputPart) -> tuple[InputPart, TarIndex, Iterator[tuple[str, Members]]]:
            copy = self._near.copied(f"{self.folder}/{part.path}", part.bytes)
            near = part if copy is None else replace(part, copy=str(copy))
            index = self._index(near)
            return near, index, index.samples()

        def ahead(part: InputPart) -> tuple[InputPart, TarIndex, Iterator[tuple[str, Members]]]:
            near, index, samples = indexed(part)
            return near, index, chain(list(islice(samples, 1)), samples)  # the first comes when all headers were read

        if self._near.is_active or not has_ranges(self.path):
            yield from map(indexed, parts)
        else:
            yield from parallel_map(ahead, parts, _AT_ONCE)

    def _chosen(self, members: Members) -> dict[str, Any]:
        """The members of a sample by what they are; or why it is dropped."""
        try:
            return self._choice.of(members)
        except Ambiguous as error:
            return {_DROP: ["ambiguous_members", str(error)]}

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
        spans = ((row.name, span) for row in rows for span in self._wanted(row).values())
        with self._open_tars(shard, spans) as tars:
            for row in rows:
                drop = row.payload[0].get(_DROP)
                emit(self._read(tars.open(row.name), row) if drop is None else Original.dropped(row, *drop))

    def _open_tars(self, shard: Shard, spans: Iterable[tuple[str, Span]] = ()) -> OpenTars:
        copies = {name.removesuffix(COPY): path for name, path in shard.files.items() if name.endswith(COPY)}
        return OpenTars(lambda name: path_of(shard, name, self.folder, self.parts), spans, copies)

    def _wanted(self, row: SourceRow) -> dict[str, Span]:
        """The members of a row that are read, with their places."""
        members: dict[str, Any] = row.payload[0]
        return {} if _DROP in members else {kind: members[kind] for kind in CONTENT if kind in members}

    def captions(self, shard: Shard) -> list[tuple[str, ...]]:
        """Reads the members with text only, of an object store several at once."""
        rows = [row for row in self.rows_of(shard) if not row.is_duplicate and row.drop is None]
        at_once = _AT_ONCE if has_ranges(self.path) else 1

        def read(rows: list[SourceRow]) -> list[tuple[str, ...]]:
            with self._open_tars(shard) as tars:
                return [self._caption(tars, row) for row in rows]

        size = max(1, -(-len(rows) // at_once))
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [captions for found in parallel_map(read, parts, at_once) for captions in found]

    def _caption(self, tars: OpenTars, row: SourceRow) -> tuple[str, ...]:
        if _DROP in row.payload[0]:
            return ()
        return self._read(tars.open(row.name), row, image=False).cleaned().captions or ()

    def _read(self, file: BinaryIO, row: SourceRow, *, image: bool = True) -> Original:
        """A row as it is fetched; without `image` all but the image's bytes."""
        members: dict[str, Span] = row.payload[0]
        if "image" not in members:
            return Original.dropped(row, "no_image", f"members: {', '.join(sorted(members))}")
        wanted = self._wanted(row)
        largest = max(size for _, size in wanted.values())
        if largest > MAX_FILE_BYTES:
            return Original.dropped(row, "too_large", f"a member of {largest:,} bytes, over {MAX_FILE_BYTES:,}")
        content = {kind: read_span(file, span) for kind, span in wanted.items() if image or kind != "image"}
        if any(len(data) < wanted[kind][1] for kind, data in content.items()):
            return Original.dropped(row, "truncated", "the tar ends inside this sample")
        label = {_LABEL: content.get("cls", b"").decode("ascii", "replace")}
        described = _json_object(content.get("json"))
        metadata = {**label, **described} if self.config.label_member is None else {**described, **label}
        url = metadata.get("url")
        url = url if isinstance(url, str) else None
        try:
            captions = self._captions(metadata, content.get("txt"))
            annotations = self.config.annotations(metadata)
        except BadCell as bad:
            return Original.dropped(row, bad.reason, bad.detail)
        return Original(
            row.position,
            row.key,
            url,
            captions,
            content.get("image", b""),
            annotations=annotations,
            orientation=orientation_in(metadata.get(self.config.exif_column or "")),
        )

    def _captions(self, metadata: dict[str, Any], text: bytes | None) -> tuple[str, ...] | None:
        if self.config.caption_column is None:
            return None
        if text is not None:
            return (text.decode("utf-8-sig", "surrogateescape"),)
        return tuple(captions_of(metadata, self.config.caption_column))

    def fingerprint(self) -> dict[str, object]:
        config = self.config
        return {
            "caption_column": config.caption_column,
            **exif_settings(config.exif_column),
            **config.annotation_settings,
            **config.member_settings,
        }

    def describe_array(self, name: str) -> dict[str, object]:
        array = self.config.arrays.get(name)
        if array is None:
            raise no_array(name, self.config.arrays)
        return {**array.model_dump(exclude={"folder"}, exclude_none=True), "folder": array.folder is not None}

    def precomputed(self, shard: Shard, name: str, positions: Sequence[int]) -> Iterator[PrecomputedEmbedding]:
        array, rows = self.config.arrays[name], self.rows_of(shard)
        member = (array.member or "").lower()
        found = (rows[position] for position in positions)
        spans = ((row.name, row.payload[0][member]) for row in found if member in row.payload[0])
        with self._open_tars(shard, spans) as tars:
            for row in (rows[position] for position in positions):
                if array.folder is not None:
                    index, _ = row.payload[1][name]
                    path = path_of(shard, row.name, self.folder, self.parts)
                    yield PrecomputedEmbedding(*self.folders[name].read(path, index))
                else:
                    yield read_member(tars, row.name, row.key, row.payload[0], array)


def _types(path: str, samples: Sequence[tuple[str, Members]], keep: Kept) -> dict[str, ColumnType]:
    """The types of columns to keep, from the JSON of the first samples of a tar."""
    return types_of_records(keep, _records(path, samples))


def _records(path: str, samples: Sequence[tuple[str, Members]]) -> list[dict[str, Any]]:
    """The JSON of the first samples of a tar."""
    with closing(open_tar(path)) as file:
        return [_record(file, members) for _, members in samples[:HEAD_ROWS]]


def _record(file: BinaryIO, members: Members) -> dict[str, Any]:
    return _json_object(read_span(file, members["json"])) if "json" in members else {}


def _alternatives(suffixes: str | None) -> tuple[str, ...]:
    return tuple(suffix.strip().lstrip(".") for suffix in (suffixes or "").split(";") if suffix.strip(" ."))


def _is_truncated(members: dict[str, Any], cut: Span | None) -> bool:
    """Whether a sample is dropped as `truncated`, as the tar ends inside its member at `cut`."""
    return cut is not None and "image" in members and any(members.get(kind) == cut for kind in CONTENT)


def _json_object(data: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
