"""Local pictures with a caption each: `NAME.txt` beside `NAME.png`, or a captions table."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, cast

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.stage import Shard
from stages.captions import clean_captions
from stages.sources.base import Emit, Original, Source, cut_into_shards, mark_duplicates, require_path
from stages.sources.tables import columns, estimate_rows, read_rows
from stages.sources.urls import captions_of

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm"))
_TABLES = tuple(f"captions.{suffix}" for suffix in ("tsv", "csv", "jsonl", "parquet"))


class FolderConfig(Config):
    """A folder of pictures."""

    kind: Literal["folder"] = "folder"
    path: str | None = None
    """The folder. With a captions.tsv|csv|jsonl|parquet in it, its rows are the samples; without, all
    pictures below the folder, each with the captions of NAME.txt beside it (one a line)."""
    file_column: str = "file"
    """Column of the picture's path in the captions table, relative to the folder or its `images/`."""
    caption_column: str = "caption"
    """Column of the caption, or of a list of captions, in the captions table."""

    def build(self) -> "FolderSource":
        return FolderSource(self)


class FolderSource(Source):
    """A row is [file, captions, bytes, is_duplicate]."""

    def __init__(self, config: FolderConfig):
        self.config = config
        self.root = Path(require_path(config.path, "folder")).absolute()

    @property
    def table(self) -> Path | None:
        return next((self.root / name for name in _TABLES if (self.root / name).is_file()), None)

    def check(self) -> None:
        if not self.root.is_dir():
            raise ConfigError(f"source.path: {self.root} is not a folder; check the path")
        if self.table is not None:
            present = columns(str(self.table))
            for name in ("file_column", "caption_column"):
                column = getattr(self.config, name)
                if present and column not in present:
                    raise ConfigError(
                        f"source.{name}: {self.table} has no column {column!r}; it has: {', '.join(present)}"
                    )
        if next(self.shards(1), None) is None:
            where = self.table or self.root
            raise ConfigError(f"source.path: {where} holds no pictures; give a folder with at least one")

    def shards(self, shard_size: int) -> Iterator[Shard]:
        rows = self._walk(self.root, frozenset()) if self.table is None else self._table_rows(self.table)
        return cut_into_shards(mark_duplicates((str(row[0]), row) for row in rows), shard_size)

    def _table_rows(self, table: Path) -> Iterator[list[object]]:
        config = self.config
        for record in read_rows(str(table), [config.file_column, config.caption_column]):
            name = str(record.get(config.file_column) or "")
            path = self._locate(name)
            size = path.stat().st_size if path is not None else -1
            yield [name, captions_of(record, config.caption_column), size]

    def _walk(self, folder: Path, above: frozenset[Path]) -> Iterator[list[object]]:
        above |= {folder.resolve()}
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                if path.resolve() not in above:  # a link to a folder above would go round for ever
                    yield from self._walk(path, above)
            elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                text = path.with_suffix(".txt")
                lines = text.read_text("utf-8-sig", "surrogateescape") if text.is_file() else ""
                yield [path.relative_to(self.root).as_posix(), lines.splitlines(), path.stat().st_size]

    def _locate(self, name: str) -> Path | None:
        """The picture's path; None if it is missing, or outside the folder."""
        if not _stays_inside(name):
            return None
        candidates = (self.root / name, self.root / "images" / name)
        try:
            return next((path for path in candidates if path.is_file()), None)
        except OSError:  # a name longer than the file system allows
            return None

    def estimate_rows(self) -> int | None:
        return estimate_rows([str(self.table)]) if self.table else None

    def fetch(self, shard: Shard, wanted: frozenset[str] | None, scratch: Path, emit: Emit) -> None:
        del scratch
        for row, (name, captions, _, is_duplicate) in enumerate(
            cast(Sequence[tuple[str, list[str], int, bool]], shard.rows)
        ):
            if wanted is None or name in wanted:
                emit(self._read(row, name, captions, is_duplicate))

    def _read(self, row: int, name: str, raw_captions: list[str], is_duplicate: bool) -> Original:
        if is_duplicate:
            return Original(row, name, None, (), None, "duplicate_key")
        if not _stays_inside(name):
            return Original(row, name, None, (), None, "unsafe_path", "must stay inside the folder")
        path = self._locate(name)
        if path is None:
            return Original(row, name, None, (), None, "missing_file", f"not found below {self.root.name}/")
        captions, reason = clean_captions(raw_captions, allow_empty=False)
        if reason is not None:
            return Original(row, name, None, captions, None, reason)
        try:
            return Original(row, name, None, captions, path.read_bytes())
        except OSError as error:
            return Original(row, name, None, captions, None, "unreadable_file", error.strerror or "")

    def fingerprint(self) -> dict[str, object]:
        return {"captions": self.table.suffix if self.table else ".txt beside each picture"}


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts
