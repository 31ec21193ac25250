"""The dropped rows of a run, a page at a time.

How many rows of which reason each shard has is known from the records, so a page reads only the lists of its own
shards. A search reads lists from where the page begins until the page is full or the time is over.
"""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipeline.engine.retries import retried_rows
from pipeline.engine.run_view import DropsView
from pipeline.engine.watch import RunWatch
from pipeline.errors import ConfigError, PipelineError, StaleOutputError
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import RunFolder
from stages.browse.run.staged import Staged, StagedOriginals
from stages.browse.web import error_line
from stages.precompute.fetch import SAMPLES
from stages.store_tools.dropped import add_source_rows

PAGE_ROWS = 50
_SEARCH_S, _STAGED_S = 3.0, 3.0
_MOST_CHARACTERS = 2000
_FEW_SHARDS = 100
"""The source of a run with at most so many shards is read for the URLs of a page without being asked."""


@dataclass(slots=True)
class DroppedRow:
    """A dropped row.

    Attributes:
        row: in the input of the shard; of a group that is made from samples, the row of the sample, which stays in the
            store and is excluded.
        retried: a later round tries it again, and it counts there.
        url, captions: None if they are not known.
        has_image: its bytes are staged, and a browser may show them.
    """

    stage: str
    group: str
    shard: int
    row: int
    key: str
    reason: str
    detail: str
    retried: bool = False
    url: str | None = None
    captions: tuple[str, ...] | None = None
    has_image: bool = False

    @property
    def is_input(self) -> bool:
        return self.group == SAMPLES


@dataclass(slots=True)
class DropsPage:
    """Some of the dropped rows that were asked for.

    Attributes:
        total: rows of the chosen groups and reasons, without regard to the text that is searched for.
        first: the place of the first one among them, from 0.
        next: where the next page begins; None at the end.
        is_cut: the time was over before the page was full.
        unread: shards whose staged originals are not read to their end yet, so that images of theirs may be missing.
        problems: lists that are missing, or cannot be read.
    """

    total: int
    first: int
    rows: list[DroppedRow] = field(default_factory=list)
    next: int | None = None
    is_cut: bool = False
    problems: list[str] = field(default_factory=list)
    unread: int = 0


class Drops:
    """The drops of one run. Safe for threads."""

    def __init__(self, watch: RunWatch):
        self.watch = watch
        self.run: RunFolder = watch.run
        self.staged = StagedOriginals(self.run)
        self._mutex = threading.Lock()
        self._retried: tuple[object, Mapping[int, set[int]]] = ((), {})

    def choices(self) -> tuple[DropsView, ...]:
        """Every stage, group and reason that has drops."""
        return self.watch.look(max_age_s=1.0).drops

    def page(
        self,
        group: str | None = None,
        reason: str | None = None,
        text: str = "",
        first: int = 0,
        rows: int = PAGE_ROWS,
    ) -> DropsPage:
        """Dropped rows from the `first` on, in the order of stages, shards and rows.

        Args:
            group, reason: of these only.
            text: only rows whose key or detail contains it, without regard to case.
        """
        stages: dict[str, dict[str, str]] = {}
        for found in reversed(self.choices()):
            stages.setdefault(found.group, {})[found.reason] = found.stage
        shards = [
            (_List(name, shard, stages[name]), count)
            for name in reversed(stages)
            if group in (None, name)
            for shard, drops in self.watch.drops_by_shard(name).items()
            if (count := sum(drops.values()) if reason is None else drops.get(reason, 0))
        ]
        page = DropsPage(sum(count for _, count in shards), first)
        self._fill(page, shards, reason, text.casefold(), rows)
        return page

    def _fill(
        self, page: DropsPage, shards: "list[tuple[_List, int]]", reason: str | None, text: str, rows: int
    ) -> None:
        place, until = 0, time.monotonic() + _SEARCH_S
        for listed, count in shards:
            if place + count <= page.first:
                place += count
                continue
            if len(page.rows) == rows or time.monotonic() > until:
                page.next, page.is_cut = place, len(page.rows) < rows
                return
            skip = max(0, page.first - place)
            for number, row in self._listed(page, listed, reason, skip, count):
                if len(page.rows) == rows:
                    page.next = place + number
                    return
                if text in row.key.casefold() or text in row.detail.casefold():
                    page.rows.append(row)
            place += count

    def _listed(
        self, page: DropsPage, of: "_List", reason: str | None, skip: int, count: int
    ) -> Iterator[tuple[int, DroppedRow]]:
        """The rows of a list from number `skip` on, with their numbers among those of the reason."""
        name, number = self.run.drops_name(of.group, shard_name(of.shard)), 0
        retried = self._retried_rows().get(of.shard, set()) if of.group == SAMPLES else set()
        try:
            for line in self.run.storage.read_lines(name):
                row = _row(line, of, retried)
                if reason not in (None, row.reason):
                    continue
                if number >= skip:
                    yield number, row
                number += 1
        except (OSError, ValueError, KeyError, TypeError) as error:
            missing = isinstance(error, FileNotFoundError)
            what = "is missing; the next run writes it again" if missing else f"cannot be read: {error_line(error)}"
            page.problems.append(f"{name}: {what}; {count - number:,} of its {count:,} rows are not shown")

    def _retried_rows(self) -> Mapping[int, set[int]]:
        with self._mutex:
            names = tuple(sorted(self.run.storage.names("retries")))
            if names != self._retried[0]:
                self._retried = names, retried_rows(self.run)
            return self._retried[1]

    def add_urls(self, page: DropsPage, *, wanted: bool = False) -> str | None:
        """Adds URLs, captions and whether there is an image, from the staged originals and then from the source.

        Args:
            wanted: reads a long source too.
        Returns:
            Why some are not known, if the source is there to be read; None otherwise.
        Raises:
            ConfigError, StaleOutputError: the source is gone or has changed.
        """
        unknown, known = [], self._staged(page)
        for row in (row for row in page.rows if row.is_input):
            staged = known.get((row.shard, row.row))
            if staged is not None:
                row.url, row.captions, row.has_image = staged.url, staged.captions, staged.is_image
            else:
                unknown.append(row)
        if not unknown:
            return None
        if not wanted and not self._has_few_shards():
            return "the source has many shards"
        found: list[dict[str, Any]] = [{"shard": r.shard, "row": r.row, "reason": r.reason} for r in unknown]
        add_source_rows(self.run, found)
        for row, values in zip(unknown, found, strict=True):
            captions = values.get("captions")
            row.url, row.captions = values.get("url"), None if captions is None else tuple(captions)
        return None

    def _staged(self, page: DropsPage) -> dict[tuple[int, int], Staged]:
        """What is staged of the rows of a page, by shard and row, as far as it is found within some seconds."""
        found, until = dict[tuple[int, int], Staged](), time.monotonic() + _STAGED_S
        for shard in dict.fromkeys(row.shard for row in page.rows if row.is_input):
            if time.monotonic() > until:
                page.unread += 1
                continue
            with suppress(OSError, ValueError, KeyError, PipelineError):
                rows, is_whole = self.staged.rows(shard, until)
                found |= {(shard, row): staged for row, staged in rows.items()}
                page.unread += not is_whole
        return found

    def _has_few_shards(self) -> bool:
        shards = self.run.recorded_shards(SAMPLES)
        return next(islice(shards, _FEW_SHARDS, None), None) is None


SOURCE_ERRORS = (ConfigError, StaleOutputError)


@dataclass(frozen=True, slots=True)
class _List:
    """The list of drops of a (group, shard), with the stages that find its reasons."""

    group: str
    shard: int
    stages: Mapping[str, str]


def _row(line: str, of: _List, retried: set[int]) -> DroppedRow:
    values = json.loads(line)
    row, key, reason = int(values["row"]), str(values["key"]), str(values["reason"])
    detail = str(values.get("detail") or "")[:_MOST_CHARACTERS]
    stage = of.stages.get(reason, "")
    return DroppedRow(stage, of.group, of.shard, row, key[:_MOST_CHARACTERS], reason, detail, row in retried)
