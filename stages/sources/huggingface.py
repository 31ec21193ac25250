"""Datasets in the Hugging Face format, from the hub or saved locally. Needs the extra `huggingface`."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pipeline.errors import ConfigError, MachineError
from pipeline.stage import Shard
from stages.captions import clean_captions
from stages.sources.annotations import ANNOTATION_COLUMNS, AnnotationsConfig
from stages.sources.base import Emit, InputPart, Original, Row, Source, require_path
from stages.sources.download.config import DownloadConfig
from stages.sources.download.downloader import load_downloader
from stages.sources.parquet import image_bytes
from stages.sources.urls import UrlRow, captions_of, fetch_rows


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
    caption_column: str = "text"
    """Column of the caption, or of a list of captions."""

    download: DownloadConfig = DownloadConfig()
    """How to fetch what `url_column` names."""

    def build(self) -> "HuggingfaceSource":
        return HuggingfaceSource(self)


class HuggingfaceSource(Source):
    """A row is [key, row number, fingerprint of the dataset].

    The data stay in the memory-mapped Arrow files of `datasets`.
    """

    def __init__(self, config: HuggingfaceConfig):
        self.config = config
        self.path = require_path(config.path, "huggingface")

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise MachineError(
                "source.kind=huggingface needs `datasets`: pip install 'imagen-precompute[huggingface]'"
            ) from error
        try:
            if (Path(self.path) / "state.json").exists() or (Path(self.path) / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(self.path)
                return loaded[self.config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return datasets.load_dataset(self.path, split=self.config.split, revision=self.config.revision)
        except (OSError, ValueError, KeyError, ConnectionError) as error:
            raise ConfigError(
                f"source.path: dataset {self.path!r}, split {self.config.split!r} cannot be loaded: {error}"
            ) from error

    def check(self) -> None:
        dataset = self._load()
        image = "url_column" if self.config.url_column else "image_column"
        for name in (image, "caption_column", *ANNOTATION_COLUMNS):
            column = getattr(self.config, name)
            if column is not None and column not in dataset.column_names:
                raise ConfigError(
                    f"source.{name}: {self.path} has no column {column!r}; it has: {', '.join(dataset.column_names)}"
                )
        if not len(dataset):
            raise ConfigError(f"source.path: {self.path} holds no rows; give a dataset with at least one row")

    def parts(self) -> Iterator[InputPart]:
        yield InputPart("dataset")

    def rows(self, parts: Iterable[InputPart]) -> Iterator[tuple[InputPart, Row]]:
        for part in parts:
            dataset = self._load()
            # The fingerprint is the library's own hash of the data and what was done to them.
            fingerprint = dataset._fingerprint
            for row in range(len(dataset)):
                yield part, [f"{row:09d}", row, fingerprint]

    def prepare(self) -> None:
        if self.config.url_column is not None:
            load_downloader()

    def captions(self, shard: Shard) -> list[tuple[str, ...]]:
        column = self.config.caption_column
        dataset = self._load().select_columns([column])
        records = (dataset[row] for _, row, _ in cast(Sequence[tuple[str, int, str]], shard.rows))
        return [clean_captions(captions_of(record, column), allow_empty=False)[0] for record in records]

    def estimate_rows(self) -> int:
        return len(self._load())

    def fetch(self, shard: Shard, wanted: frozenset[str] | None, scratch: Path, emit: Emit) -> None:
        import datasets

        dataset = self._load()
        if self.config.url_column is not None:
            fetch_rows(self._url_rows(dataset, shard), wanted, scratch, self.config.download, emit)
            return
        if isinstance(dataset.features[self.config.image_column], datasets.Image):
            dataset = dataset.cast_column(self.config.image_column, datasets.Image(decode=False))
        for position, (key, row, _) in enumerate(cast(Sequence[tuple[str, int, str]], shard.rows)):
            if wanted is None or key in wanted:
                emit(self._original(position, key, dataset[row]))

    def _url_rows(self, dataset: Any, shard: Shard) -> list[UrlRow]:
        url_column, caption_column = str(self.config.url_column), self.config.caption_column
        dataset = dataset.select_columns([url_column, caption_column, *self.config.annotation_columns.values()])
        rows = ((key, dataset[row]) for key, row, _ in cast(Sequence[tuple[str, int, str]], shard.rows))
        made = [
            (key, str(r[url_column] or ""), captions_of(r, caption_column), *self.config.row_end(r), False)
            for key, r in rows
        ]
        return cast(list[UrlRow], made)

    def _original(self, position: int, key: str, record: dict[str, Any]) -> Original:
        captions, reason = clean_captions(captions_of(record, self.config.caption_column), allow_empty=False)
        cell = record.get(self.config.image_column)
        data = image_bytes(cell)
        if data is None and isinstance(cell, dict) and cell.get("path") and Path(cell["path"]).is_file():
            data = Path(cell["path"]).read_bytes()
        if reason is None and data is None:
            reason = "no_image"
        annotations = self.config.annotations(record)
        return Original(position, key, None, captions, None if reason else data, reason, annotations=annotations)

    def fingerprint(self) -> dict[str, object]:
        return {
            "split": self.config.split,
            "revision": self.config.revision,
            "image_column": self.config.image_column,
            "caption_column": self.config.caption_column,
            **({"url_column": self.config.url_column} if self.config.url_column else {}),
            **self.config.annotation_settings,
        }
