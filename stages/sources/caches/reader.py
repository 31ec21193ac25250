"""Reads the text cache of a folder of images."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import cached_property
from itertools import tee

from pipeline.errors import ConfigError
from stages.captions import clean_captions
from stages.sources.base import KeyRegistry, PrecomputedEmbedding, SourceRow
from stages.sources.caches.base import CacheConfig, Unusable
from stages.sources.tree import Content, Tree, places


class CacheReader:
    """One of the source's caches."""

    def __init__(self, name: str, config: CacheConfig, images: str):
        self.field = f"source.arrays.{name}"
        self.config = config
        self.folder = images if config.folder is None else config.folder

    @cached_property
    def tree(self) -> Tree:
        return Tree(self.folder)

    def check(self, images: Iterable[str]) -> None:
        """Checks that the cache's folder is there, and that no two images would be read from the same file.

        Raises:
            ConfigError: with the paths.
        """
        if not self.tree.is_folder():
            raise ConfigError(f"{self.field}.folder: {self.tree.url} is not a folder; check the path")
        with closing(KeyRegistry()) as images_seen, closing(KeyRegistry()) as files_seen:
            for image in images:
                files = self.config.files(image, ())
                if files and images_seen.is_new(image) and not files_seen.is_new(files[0]):
                    raise ConfigError(
                        f"{self.field}: {image} and an image before it would both be read from {files[0]}, but the "
                        "cache has one caption there; make a run of each folder, with its own cache"
                    )

    def read(self, rows: Iterable[SourceRow]) -> Iterator[PrecomputedEmbedding]:
        """The embedding of each row's caption, or why there is none."""
        asked, rows = tee(rows)
        contents = self.tree.read(self._files(row) for row in asked)
        for row, content in zip(rows, contents, strict=True):
            yield self._embedding(row, content)

    def _files(self, row: SourceRow) -> list[str]:
        """Where the embedding of a row may be; next to its image, that is where a table's images may be, too."""
        files = self.config.files(row.key, row.captions or ("",))
        return [place for file in files for place in (places(file) if self.config.folder is None else (file,))]

    def _embedding(self, row: SourceRow, content: Content) -> PrecomputedEmbedding:
        name = next(iter(self._files(row)), "")
        where = f"{self.field}: {name} of {row.key}"
        if isinstance(content, FileNotFoundError):
            return PrecomputedEmbedding(where, reason="missing_embedding", detail=f"no file {name}")
        if isinstance(content, OSError):
            return PrecomputedEmbedding(where, reason="unreadable_embedding", detail=content.strerror or str(content))
        try:
            array = self.config.embedding(content, clean_captions(row.captions)[0])
            return PrecomputedEmbedding(where, array, has_own_file=True)
        except Unusable as found:
            return PrecomputedEmbedding(where, reason=found.reason, detail=found.detail)
