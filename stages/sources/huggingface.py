"""Datasets in the Hugging Face format, from the hub or saved locally. Needs the extra `huggingface`."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import xxhash

from pipeline.errors import ConfigError, MachineError, first_line
from pipeline.fingerprint import digest
from pipeline.stage import Shard
from stages.captions import clean_captions
from stages.digests import Version, remembered_digest, version_of
from stages.images.exif_text import exif_settings, orientation_in
from stages.sources.annotations import AnnotationsConfig
from stages.sources.base import Emit, InputPart, Original, Source, SourceRow, require_path
from stages.sources.download.config import DownloadConfig
from stages.sources.download.downloader import load_downloader
from stages.sources.download.originals import download_originals
from stages.sources.folder import is_image
from stages.sources.records.cells import BadCell, caption_cell, captions_of, image_of, text_of, top_levels
from stages.sources.records.kept import types_of_tables
from stages.sources.tabular.kept_rows import row_filter

_COMMIT = re.compile(r"commit (?P<commit>[0-9a-zA-Z]+)(?: of (?P<revision>.+))?")
_BLOCK = 2**22
_ROWS = 2**14
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"


class HuggingfaceConfig(AnnotationsConfig):
    """A dataset of the Hugging Face hub, or one saved with `save_to_disk`."""

    takes_caption_sets = True

    kind: Literal["huggingface"] = "huggingface"
    path: str | None = None
    """Hub id such as `lambdalabs/naruto-blip-captions`, or a local folder."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Commit, tag or branch on the hub. It is resolved to a commit when a run begins; the run stays at that commit."""
    image_column: str = "image"
    """Column of the image."""
    url_column: str | None = None
    """Column of the image's URL, such as `image_url` of Conceptual Captions: then images are downloaded, and
    `image_column` is not read."""
    caption_column: str | None = "text"
    """Column of the caption, or of a list of captions, or a path into nested columns such as `sentences.raw`. null:
    every caption is empty."""
    download: DownloadConfig = DownloadConfig()
    """How to fetch what `url_column` names."""

    exif_column: str | None = "exif"
    """Column of the EXIF as img2dataset keeps it, JSON with `Image Orientation`: it turns images that have no
    orientation of their own. The column need not be there. null: it is not used."""

    def build(self) -> "HuggingfaceSource":
        return HuggingfaceSource(self)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A dataset in the memory-mapped Arrow files of `datasets`."""

    dataset: Any
    identity: str
    """`commit SHA` on the hub, with the revision that it was resolved from; or the digest of the content of files."""
    watched: Mapping[Path, Version]
    """The files behind it, as they were; images left out, of which there may be millions."""

    def names(self, recorded: str) -> bool:
        """Whether a row's record names this dataset; earlier versions recorded the library's own fingerprint."""
        return recorded in (self.identity, self.dataset._fingerprint)

    def is_current(self) -> bool:
        """Whether its files are still what they were."""
        try:
            return all(version_of(path) == version for path, version in self.watched.items())
        except OSError:
            return False


class HuggingfaceSource(Source):
    """The payload of a row is its number and the identity of the dataset: its commit, or the digest of its files.

    The name of the one part is the identity too. So the run folder keeps it, a run that is resumed reads the same
    commit, and workers get it with each shard. Parts without a name are those of earlier versions, whose rows have
    the fingerprint of `datasets`, made of paths and times.
    """

    layout = ("key", "payload")

    def __init__(self, config: HuggingfaceConfig):
        self.config = config
        self.path = require_path(config.path, "huggingface")
        self.row_filter = row_filter(config.where)
        self._commit: str | None = None
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict[str, object]:
        """Workers open the dataset on their own, at the driver's commit."""
        return {**self.__dict__, "_opened": None}

    def resume(self, begun_with: InputPart | None) -> None:
        found = _COMMIT.fullmatch(begun_with.name) if begun_with is not None else None
        if found is not None and found["revision"] == self.config.revision:
            self._commit = found["commit"]

    def _open(self) -> _Opened:
        """The dataset, opened once for as long as its files stay the same."""
        if self._opened is None or not self._opened.is_current():
            dataset, builder = self._load()
            _check_ends(dataset)
            commit = None if builder is None or not builder.repo_id else str(builder.hash)
            if self._commit not in (None, commit):
                raise MachineError(
                    f"source.path: {self.path!r}: this run reads commit {self._commit}, but `datasets` found "
                    f"{commit or 'local files'}: it takes the newest copy in its cache where the hub cannot be "
                    "reached; check the network, or copy the cache of a machine that has the commit"
                )
            self._commit = commit
            if commit is not None:
                of = f" of {self.config.revision}" if self.config.revision else ""
                self._opened = _Opened(dataset, f"commit {commit}{of}", {})
            else:
                self._opened = self._with_digest(dataset, builder)
        return self._opened

    def _with_digest(self, dataset: Any, builder: Any) -> _Opened:
        """A dataset of local files, with the digest of their content, names and columns."""
        folder = Path(self.path).resolve()
        if builder is None:
            names = [os.path.abspath(file["filename"]) for file in dataset.cache_files]
            folder = Path(os.path.abspath(self.path))
        else:
            names = _files_of_split(builder.config.data_files or {}, self.config.split)
        files = [Path(name) for name in names if "://" not in name]
        some_far = len(files) < len(names)  # as a dataset card may name them
        others = [builder.hash] if builder is not None and some_far else []
        watched = {path: version_of(path) for path in files if not is_image(path.name)}
        content = remembered_digest(
            files,
            lambda: digest([[os.path.relpath(path, folder), path.stat().st_size, _xxh3(path)] for path in files]),
        )
        columns = str(dataset.features.arrow_schema.remove_metadata())
        return _Opened(dataset, digest({"files": content, "columns": columns, "others": others}), watched)

    def _for(self, shard: Shard) -> Any:
        """The dataset that the rows of a shard are from.

        Raises:
            MachineError: this process finds another one.
        """
        recorded = str(self.rows_of(shard)[0].payload[1])
        if self._commit is None and (found := _COMMIT.fullmatch(recorded)) is not None:
            self._commit = found["commit"]
        opened = self._open()
        if not opened.names(recorded):
            raise MachineError(
                f"source.path: {self.path!r}: this worker finds another dataset than the run began with: {recorded} "
                f"-> {opened.identity}; put the same one on every node and leave it as it is during the run, or start "
                "a new run"
            )
        return opened.dataset

    def _load(self) -> tuple[Any, Any]:
        """The split, and its builder; no builder for a folder of `save_to_disk`."""
        try:
            import datasets
        except ImportError as error:
            raise MachineError("source.kind=huggingface needs `datasets`: pip install 'datasets>=4.0'") from error
        split = self.config.split
        if "://" in self.path:
            raise ConfigError(
                f"source.path: {self.path!r}: a dataset of this kind is a hub id or a local folder; copy it here, or "
                "read its files with source.kind=parquet, webdataset or folder, which take URLs"
            )
        try:
            if (Path(self.path) / "state.json").exists() or (Path(self.path) / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(self.path, keep_in_memory=False)
                return (loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded), None
            builder = datasets.load_dataset_builder(self.path, revision=self._commit or self.config.revision)
            builder.download_and_prepare()
            return builder.as_dataset(split=split, in_memory=False), builder
        except (ConnectionError, TimeoutError) as error:
            raise MachineError(
                f"source.path: {self.path!r}: the hub cannot be reached: {first_line(error)}; check the network, "
                "or give a folder made by save_to_disk"
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"source.path: dataset {self.path!r}, split {split!r} cannot be loaded: {error}"
            ) from error

    def check(self) -> None:
        dataset = self._open().dataset
        image = "url_column" if self.config.url_column else "image_column"
        present = {field.name: field.type for field in dataset.features.arrow_schema}
        self.config.check_columns((image, "caption_column"), present, self.path)
        self.config = self.config.with_types(lambda keep: types_of_tables(keep, [(self.path, present)]))
        if self.row_filter is not None:
            self.row_filter.check(present, self.path)
        if not len(dataset):
            raise ConfigError(f"source.path: {self.path} holds no rows; give a dataset with at least one row")

    def parts(self) -> Iterator[InputPart]:
        yield InputPart("dataset", name=self._open().identity)

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        for part in parts:
            opened = self._open()
            if part.name:
                part = replace(part, name=opened.identity)
            identity = part.name or opened.dataset._fingerprint
            for number in self._kept(opened.dataset):
                yield part, SourceRow(f"{number:09d}", payload=(number, identity))

    def _kept(self, dataset: Any) -> Iterator[int]:
        """The numbers of the rows that `where` keeps."""
        if self.row_filter is None:
            yield from range(len(dataset))
            return
        columns = dataset.select_columns(list(self.row_filter.columns)).with_format("arrow")
        number = 0
        for first in range(0, len(dataset), _ROWS):
            for batch in columns[first : first + _ROWS].to_batches():
                places = self.row_filter.places(batch)
                self.filtered += len(batch) - len(places)
                yield from (number + place for place in places.tolist())
                number += len(batch)

    def prepare(self) -> None:
        if self.config.url_column is not None:
            load_downloader()

    def captions(self, shard: Shard) -> list[tuple[str, ...]]:
        column = self.config.caption_column
        if column is None:
            return [("",)] * shard.num_rows
        dataset = self._for(shard)
        dataset = dataset.select_columns(top_levels([column], dataset.column_names))
        return [_clean(dataset[row.payload[0]], column) for row in self.rows_of(shard)]

    def caption_cells(self, shard: Shard, column: str) -> list[list[str] | None]:
        dataset = self._for(shard)
        dataset = dataset.select_columns(top_levels([column], dataset.column_names))
        return [caption_cell(dataset[row.payload[0]], column) for row in self.rows_of(shard)]

    def estimate_rows(self) -> int:
        return len(self._open().dataset)

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        import datasets

        dataset, config = self._for(shard), self.config
        if config.url_column is not None:
            wanted = [c for c in (config.url_column, config.caption_column) if c is not None]
            wanted += config.annotation_names
            dataset = dataset.select_columns(top_levels(wanted, dataset.column_names))
            listed = (self._without_image(row, dataset[row.payload[0]]) for row in rows)
            download_originals(listed, scratch, config.download, emit)
            return
        if isinstance(dataset.features.get(config.image_column), datasets.Image):
            dataset = dataset.cast_column(config.image_column, datasets.Image(decode=False))
        for row in rows:
            record = dataset[row.payload[0]]
            original = self._without_image(row, record)
            emit(original if original.reason else self._with_image(original, record))

    def _without_image(self, row: SourceRow, record: dict[str, Any]) -> Original:
        config = self.config
        try:
            url = text_of(record, config.url_column) or "" if config.url_column else None
            captions = None if config.caption_column is None else tuple(captions_of(record, config.caption_column))
            return Original(row.position, row.key, url, captions, annotations=config.annotations(record))
        except BadCell as bad:
            return Original.dropped(row, bad.reason, bad.detail)

    def _with_image(self, original: Original, record: dict[str, Any]) -> Original:
        try:
            data, path = image_of(record, self.config.image_column)
            if path is not None:
                data = Path(path).read_bytes()
        except BadCell as bad:
            return replace(original, reason=bad.reason, detail=bad.detail)
        except FileNotFoundError:
            return replace(original, reason="missing_file", detail=f"{path} is not found")
        except OSError as error:
            return replace(original, reason="unreadable_file", detail=error.strerror or "")
        orientation = orientation_in(record.get(self.config.exif_column or ""))
        return replace(original, data=data, reason="no_image" if data is None else None, orientation=orientation)

    def fingerprint(self) -> dict[str, object]:
        return {
            "split": self.config.split,
            "revision": self.config.revision,
            "image_column": self.config.image_column,
            "caption_column": self.config.caption_column,
            **({"url_column": self.config.url_column} if self.config.url_column else {}),
            **exif_settings(self.config.exif_column),
            **self.config.annotation_settings,
        }


def _check_ends(dataset: Any) -> None:
    """Checks that each Arrow file of a dataset ends with the mark of its end.

    A file that was cut between two batches is read as one of fewer rows.

    Raises:
        ConfigError: one does not.
    """
    for file in dataset.cache_files:
        with Path(file["filename"]).open("rb") as arrow:
            arrow.seek(max(0, arrow.seek(0, os.SEEK_END) - len(_ARROW_END)))
            end = arrow.read()
        if end != _ARROW_END:
            raise ConfigError(
                f"source.path: {file['filename']} ends without the end mark of Arrow, so rows may be missing; copy or "
                "save it again"
            )


def _files_of_split(data_files: Mapping[str, Sequence[str]], split: str) -> list[str]:
    """The files of the splits that an expression such as `train[:10%]+test` names; of all, if it names none."""
    words = set(re.findall(r"[\w.-]+", split))
    named = [name for name in data_files if str(name) in words] or list(data_files)
    return [file for name in named for file in data_files[name]]


def _xxh3(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


def _clean(record: dict[str, Any], column: str) -> tuple[str, ...]:
    """The captions of a record as a run would have them; none if the row would be dropped."""
    try:
        return clean_captions(captions_of(record, column))[0]
    except BadCell:
        return ()
