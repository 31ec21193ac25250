"""Captions to sample images from: those of a store's samples or of a file, all or a seeded selection."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from imagen_core.store import Store, StoreError
from imagen_core.store.read.order import CAPTION, ORDER, choices, derive_key, permute
from pipeline.config import Config
from pipeline.errors import ConfigError
from stages.captions import clean_caption, is_valid_text
from stages.sources.records.cells import BadCell, text_of
from stages.sources.records.types import check_column
from stages.sources.tables import FORMATS, columns, read_rows, table_format
from stages.stores import open_store


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption of a set."""

    text: str
    key: str | None = None
    """Key of the sample it belongs to, in a store."""
    sample: int | None = None
    """Index of that sample."""
    number: int = 0
    """Which of the sample's captions it is."""
    transcription: str | None = None
    """The text to be written in the image; None if not known."""
    label: int | None = None
    """The image's class, from 0; None if not known."""
    original: tuple[int, int] | None = None
    """Width and height of the sample's original image in pixels; None if it is of no store."""


class _CaptionSet(Config):
    path: str
    num_captions: int | None = Field(default=None, ge=1)
    """How many to take without replacement; null: all, in their order. Fewer are the first ones of more."""
    seed: int = Field(default=0, ge=0)
    """Decides which captions are taken, and in which order."""

    def _chosen(self, count: int) -> Sequence[int]:
        if self.num_captions is None:
            return range(count)
        return selection(count, self.num_captions, self.seed, f"captions.num_captions: {self.path}")


class StoreCaptions(_CaptionSet):
    """Captions of a store's samples: one per sample. The store's embeddings are used if its encoder is the
    cascade's."""

    kind: Literal["store"] = "store"
    path: str
    """Store, or the run folder around it."""

    @cached_property
    def store(self) -> Store:
        return open_store(self.path)

    def captions(self) -> list[Caption]:
        """Where a sample has several captions, a hash of the seed and its index chooses one.

        Raises:
            ConfigError: the store cannot be read, or has fewer samples than captions are requested.
        """
        chosen = self._chosen(len(self.store))
        hashes = choices(np.asarray(chosen, np.int64), derive_key(self.seed, CAPTION))
        found: dict[int, Caption] = {}
        try:
            for index, chance in sorted(zip(chosen, hashes, strict=True)):  # shard by shard
                shard, row = self.store.locate(index)
                samples = self.store.shard(shard).samples
                key, texts, _, _, _, width, height, *_ = samples.fields(row)
                number = chance % len(texts)
                written, label = samples.transcription(row), samples.label(row)
                found[index] = Caption(texts[number], key, index, number, written, label, (width, height))
        except StoreError as error:
            raise ConfigError(f"captions.path: {error}") from error
        return [found[index] for index in chosen]


class FileCaptions(_CaptionSet):
    """Captions of a file: txt with one per line, or a column of csv, tsv, jsonl or parquet."""

    kind: Literal["file"] = "file"
    path: str
    """The file; a path or a URL."""
    caption_column: str = "caption"
    """Column of a table, or a path into nested columns."""

    def captions(self) -> list[Caption]:
        """Empty lines are left out.

        Raises:
            ConfigError: the file cannot be read, has no such column, or has fewer captions than requested.
        """
        texts = [clean_caption(text) for text in self._read()]
        texts = [text for text in texts if text]
        bad = next((text for text in texts if not is_valid_text(text)), None)
        if bad is not None:
            raise ConfigError(f"captions.path: {self.path}: {bad!r} is not valid text; write it in UTF-8")
        if not texts:
            raise ConfigError(f"captions.path: {self.path} has no captions; give a file with at least one")
        return [Caption(texts[index]) for index in self._chosen(len(texts))]

    def _read(self) -> list[str]:
        kind = table_format(self.path)
        if kind not in FORMATS:
            raise ConfigError(
                f"captions.path: {self.path}: format {kind!r} is not supported; use {', '.join(FORMATS)}"
            )
        try:
            if kind == "txt":
                return [row["url"] for row in read_rows(self.path, None)]
            check_column("caption_column", self.caption_column, "text", columns(self.path), self.path)
            rows = read_rows(self.path, [self.caption_column])
            return [text_of(row, self.caption_column) or "" for row in rows]
        except ConfigError as error:
            raise ConfigError(re.sub(r"^source\.", "captions.", str(error))) from error
        except BadCell as bad:
            raise ConfigError(f"captions.path: {self.path}: {bad.detail}; mend the file") from bad


AnyCaptions = Annotated[StoreCaptions | FileCaptions, Field(discriminator="kind")]


def store_of(captions: StoreCaptions | FileCaptions | None) -> Store | None:
    """The store whose captions these are; None if they are not a store's."""
    return captions.store if isinstance(captions, StoreCaptions) else None


def selection(count: int, size: int, seed: int, what: str) -> list[int]:
    """`size` numbers of range(count) without replacement; a smaller selection is the beginning of a larger one, with
    every version of numpy.

    Raises:
        ConfigError: there are fewer than `size`; the message begins with `what`.
    """
    if size > count:
        raise ConfigError(f"{what}: {size} requested, but there are {count}; request at most {count}")
    return permute(np.arange(size), count, derive_key(seed, ORDER)).tolist()
