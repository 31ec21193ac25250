"""What a run notes of its input: the digest of every shard, and of which files in which version it was made.

RUN/input/known.jsonl serves a later start instead of the files, as long as none of them has another size, time or, on
an object store, ETag. It only saves time: without it, or where it does not fit, the files are read again.
"""

import json
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from imagen_core.far import is_far
from pipeline.errors import ConfigError
from pipeline.fingerprint import digest
from pipeline.stage import Shard
from pipeline.storage.run_folder import RunFolder
from stages.digests import version_of
from stages.sources.base import InputPart
from stages.sources.files import open_filesystem
from stages.sources.tabular.table_rows import Span, TableRange, TableSource, files_of

_FILE = "input/known.jsonl"
_FORMAT = 1
_YOUNG_NS = 2 * 10**9
"""A file may change again within the resolution of its time; one that was changed just now is not noted."""


@dataclass(frozen=True, slots=True)
class _Noted:
    parts: list[Any]
    """Entries of the parts that the shards are of, each with the version of its file."""
    shards: list[Any]
    filtered: int = 0
    """How many rows `source.where` left out of these parts."""


class KnownShards:
    """The shards of a source of tables, from the notes of earlier passes as far as these still hold.

    Args:
        use: use what was noted.
        note: note what is read, once all of it was.
        count: read no rows where footers say how many there are: nobody asks for digests.
    """

    def __init__(
        self, run: RunFolder, source: TableSource, shard_size: int, *, use: bool, note: bool, count: bool = False
    ):
        self.run = run
        self.source = source
        self.use = use
        self.note = note
        self.count = count
        self.shard_size = shard_size
        self._settings = digest([_FORMAT, shard_size, source.settings()])

    def shards(self, parts: Sequence[InputPart]) -> Iterator[Shard]:
        """The shards of all `parts`."""
        began_ns = time.time_ns()
        entries = self._entries(parts)
        noted = self._fitting(entries)
        self.source.filtered = noted.filtered
        for index, line in enumerate(noted.shards):
            yield self._shard(index, line, parts)
        number = sum(part.rows or 0 for part in parts[: len(noted.parts)])  # if one is None, keys have no such number
        fresh = parts[len(noted.parts) :]
        if not fresh:
            return
        unread = self.source.unread_shards(self.shard_size, fresh, len(noted.shards), number) if self.count else None
        if unread is not None:
            yield from unread
            return
        places: dict[str, list[tuple[int, int]]] = {}
        for place, part in enumerate(parts):
            places.setdefault(part.path, []).append((part.first, place))
        lines = noted.shards
        for shard, rows in self.source.ranged_shards(self.shard_size, fresh, len(lines), number):
            if self.note:
                lines.append(_line(shard, rows, places))
            yield shard
        is_settled = all(entry[1] is not None and entry[1][0] < began_ns - _YOUNG_NS for entry in entries)
        if self.note and is_settled and entries == self._entries(parts):
            header = {"settings": self._settings, "parts": entries, "filtered": self.source.filtered}
            self.run.storage.write_json_lines(_FILE, [header, *lines])

    def _fitting(self, entries: Sequence[Any]) -> _Noted:
        """What was noted of the first of these parts, if none of them has changed."""
        noted = self._read() if self.use else _Noted([], [])
        known = len(noted.parts)
        fits = noted.parts == json.loads(json.dumps(entries[:known])) and all(entry[1] for entry in noted.parts)
        if not fits or (known < len(entries) and self.source.keys_may_repeat):  # later rows are compared with these
            return _Noted([], [])
        return noted

    def _read(self) -> _Noted:
        try:
            if self.run.storage.size(_FILE) is None:
                return _Noted([], [])
            header, *shards = self.run.storage.read_json_lines(_FILE)
            is_same = header["settings"] == self._settings
            return _Noted(header["parts"], shards, header["filtered"]) if is_same else _Noted([], [])
        except (ConfigError, ValueError, TypeError, KeyError):
            return _Noted([], [])

    def _entries(self, parts: Iterable[InputPart]) -> list[Any]:
        if is_far(self.source.folder):
            open_filesystem(self.source.folder, "source.path")[0].invalidate_cache()
        return [[[part.path, part.name, part.first, part.rows, part.batch], self._version(part)] for part in parts]

    def _version(self, part: InputPart) -> list[Any] | None:
        """Time in ns (0 where there is an ETag), and what else changes with the file; None if nothing tells."""
        path = f"{self.source.folder}/{part.path}"
        if not is_far(path):
            version = version_of(Path(path.removeprefix("file://")))
            return [version[2], list(version)]
        filesystem, plain = open_filesystem(path, "source.path")
        info = filesystem.info(plain)
        tag = info.get("ETag") or info.get("etag")
        return None if tag is None else [0, [str(tag), info.get("size")]]

    def _shard(self, index: int, line: Any, parts: Sequence[InputPart]) -> Shard:
        found, num_rows, near, spans, repeated, *cells = line
        named = [(parts[place], span) for place, *span in spans]
        rows = TableRange(
            self.source,
            tuple(Span(part.path, part.name, *span) for part, span in named),
            tuple(repeated),
            bool(near),
        )
        return Shard.of_range(index, rows, found, num_rows, files_of(part for part, _ in named), *cells)


def _line(shard: Shard, rows: TableRange, places: Mapping[str, Sequence[tuple[int, int]]]) -> list[Any]:
    spans = []
    for span in rows.spans:
        begins = places[span.path]
        _, place = begins[bisect_right(begins, span.first, key=itemgetter(0)) - 1]
        spans.append([place, span.first, span.rows, span.number])
    cells = [dict(shard.cell_digests)] if shard.cell_digests else []
    return [shard.digest, shard.num_rows, rows.near, spans, list(rows.repeated), *cells]
