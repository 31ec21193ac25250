"""Datasets in the Hugging Face format, from the hub or saved locally. Needs the extra `huggingface`."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ConfigError, MachineError, first_line
from pipeline.stage import Shard
from stages.captions import clean_captions
from stages.images.exif_text import exif_settings, orientation_in
from stages.sources.annotations import AnnotationsConfig
from stages.sources.base import Emit, InputPart, Original, Source, SourceRow, require_path
from stages.sources.download.config import DownloadConfig
from stages.sources.download.downloader import load_downloader
from stages.sources.download.originals import download_originals
from stages.sources.records.cells import BadCell, captions_of, image_of, text_of, top_levels

_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"


class HuggingfaceConfig(AnnotationsConfig):
    """A dataset of the Hugging Face hub, or one saved with `save_to_disk`."""

    kind: Literal["huggingface"] = "huggingface"
    path: str | None = None
    """Hub id such as `lambdalabs/naruto-blip-captions`, or a local folder."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Commit, tag or branch on the hub; pin it to make runs repeatable."""
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


class HuggingfaceSource(Source):
    """The payload of a row is its number and the fingerprint of the dataset.

    The data stay in the memory-mapped Arrow files of `datasets`.
    """

    layout = ("key", "payload")

    def __init__(self, config: HuggingfaceConfig):
        self.config = config
        self.path = require_path(config.path, "huggingface")

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise MachineError("source.kind=huggingface needs `datasets`: pip install 'datasets>=4.0'") from error
        try:
            if (Path(self.path) / "state.json").exists() or (Path(self.path) / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(self.path)
                return loaded[self.config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return datasets.load_dataset(self.path, split=self.config.split, revision=self.config.revision)
        except (ConnectionError, TimeoutError) as error:
            raise MachineError(
                f"source.path: {self.path!r}: the hub cannot be reached: {first_line(error)}; check the network, "
                "or give a folder made by save_to_disk"
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"source.path: dataset {self.path!r}, split {self.config.split!r} cannot be loaded: {error}"
            ) from error

    def check(self) -> None:
        dataset = self._load()
        image = "url_column" if self.config.url_column else "image_column"
        present = {field.name: field.type for field in dataset.features.arrow_schema}
        self.config.check_columns((image, "caption_column"), present, self.path)
        if not len(dataset):
            raise ConfigError(f"source.path: {self.path} holds no rows; give a dataset with at least one row")

    def parts(self) -> Iterator[InputPart]:
        yield InputPart("dataset")

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, SourceRow]]:
        for part in parts:
            dataset = self._load()
            _check_ends(dataset)
            # The fingerprint is the library's own hash of the data and what was done to them.
            fingerprint = dataset._fingerprint
            for number in range(len(dataset)):
                yield part, SourceRow(f"{number:09d}", payload=(number, fingerprint))

    def prepare(self) -> None:
        if self.config.url_column is not None:
            load_downloader()

    def captions(self, shard: Shard) -> list[tuple[str, ...]]:
        column, dataset = self.config.caption_column, self._load()
        if column is None:
            return [("",)] * shard.num_rows
        dataset = dataset.select_columns(top_levels([column], dataset.column_names))
        return [_clean(dataset[row.payload[0]], column) for row in self.rows_of(shard)]

    def estimate_rows(self) -> int:
        return len(self._load())

    def fetch(self, shard: Shard, rows: Sequence[SourceRow], scratch: Path, emit: Emit) -> None:
        import datasets

        del shard
        dataset, config = self._load(), self.config
        if config.url_column is not None:
            wanted = [c for c in (config.url_column, config.caption_column) if c is not None]
            wanted += config.annotation_columns.values()
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


def _clean(record: dict[str, Any], column: str) -> tuple[str, ...]:
    """The captions of a record as a run would have them; none if the row would be dropped."""
    try:
        return clean_captions(captions_of(record, column))[0]
    except BadCell:
        return ()
