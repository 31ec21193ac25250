"""`--retry-dropped`: tries dropped rows again, without touching the shards they came from.

Each round copies the source rows of the chosen drops into RUN/retries/ROUND.jsonl and appends them to the stream
as further shards, numbered from ROUND x 10,000,000. So finished files stay as they are, and the rows of all
groups stay aligned. A row's last try counts: a retried row no longer counts in the shard it came from.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any

from pipeline.engine.ledger import changed_input
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.fingerprint import canonical_json
from pipeline.plan import Plan
from pipeline.stage import Shard
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import RunFolder

_FIRST_INDEX = 10_000_000
_FOLDER = "retries"
ALL = "all"
REMOVED = "removed"  # the drop reason of what was removed from the store: never tried again


class Retries:
    """The retry rounds of a run."""

    def __init__(self, plan: Plan, run: RunFolder):
        """
        Args:
            plan: its shards come from the source alone.
        """
        self.plan = plan
        self.run = run

    def all_shards(self) -> Iterator[Shard]:
        """The shards of the source, followed by the shards of the retry rounds, whose rows have the cells of further
        columns that they have in the source."""
        rows = self.rows
        if not rows:
            yield from self.plan.shards()
            return
        origins = retry_origins(self.run)
        cells: dict[tuple[int, int], dict[str, Any]] = {}
        columns: set[str] = set()
        for shard in chain(self.plan.shards(), retry_shards(self.run)):
            columns |= shard.cell_digests.keys()
            if columns and shard.index in origins:
                found = [cells.get(origin, {}) for origin in origins[shard.index]]
                texts = {name: canonical_json([cell.get(name) for cell in found]) for name in sorted(columns)}
                shard.take_cells({name: text.encode("utf-8", "surrogatepass") for name, text in texts.items()})
            if shard.cell_digests and shard.index in rows:
                of_shard = {column: shard.cells(column) for column in shard.cell_digests}
                for row in rows[shard.index]:
                    cells[shard.index, row] = {column: found[row] for column, found in of_shard.items()}
            yield shard

    @cached_property
    def rows(self) -> dict[int, set[int]]:
        """Shard index -> rows that a later round tries again."""
        return retried_rows(self.run)

    def begin_round(self, reasons: Sequence[str], others: Counter[str] | None = None) -> Counter[str]:
        """Makes a round of the rows dropped for one of `reasons` (or `all`, except `removed`) and not retried yet.

        Args:
            others: what `Plan.retry` has tried again.

        Returns:
            How many rows will be tried again, by reason.

        Raises:
            StaleOutputError: the source has changed since the drops were recorded.
            ConfigError: no dropped sample has one of the reasons.
        """
        chosen = Counter(others)
        lines: list[dict[str, Any]] = []
        found: set[str] = set()
        shard_size = 1
        for shard in self.all_shards():
            shard_size = max(shard_size, shard.num_rows)
            self._refuse_changed(shard)
            drops = [drop for drop in self._drops(shard.name) if drop["row"] not in self.rows.get(shard.index, ())]
            rows = shard.rows if drops else []
            for drop in drops:
                row, reason = drop["row"], drop["reason"]
                found.add(reason)
                if reason != REMOVED and (reason in reasons or ALL in reasons):
                    chosen[reason] += 1
                    line = {"shard": shard.index, "row": row, "reason": reason, "source": rows[row]}
                    files = {name: path for name, path in shard.files.items() if name in rows[row]}
                    lines.append({**line, "files": files} if files else line)
        if not chosen and ALL not in reasons:
            available = ", ".join(sorted(found)) or "none"
            raise ConfigError(
                f"--retry-dropped {','.join(reasons)}: no dropped sample has it; available reasons: {available}"
            )
        if lines:
            number = len(_round_files(self.run)) + 1
            self.run.storage.write_json_lines(f"{_FOLDER}/{number:05d}-{shard_size}.jsonl", lines)
            del self.rows
        return chosen

    def _refuse_changed(self, shard: Shard) -> None:
        record = self.run.read_record(self.plan.row_group, shard.name)
        if record is not None and record.input != shard.digest:
            raise StaleOutputError(changed_input(self.run, shard, record))

    def drops(self) -> Counter[str]:
        """Recorded drops that a later round has tried again, by reason; they no longer count where they happened."""
        return Counter(
            drop["reason"]
            for index, rows in self.rows.items()
            for drop in self._drops(shard_name(index))
            if drop["row"] in rows
        )

    def fit(self) -> bool:
        """True if the rows of all rounds still come from the shards that the source has now."""
        return not self.rows or all(self._fits(shard) for shard in self.all_shards() if shard.index in self.rows)

    def _fits(self, shard: Shard) -> bool:
        record = self.run.read_record(self.plan.row_group, shard.name)
        return record is None or record.input == shard.digest

    def delete(self) -> None:
        """Deletes all rounds and what was made from them."""
        for shard in retry_shards(self.run):
            for group in self.plan.groups:
                self.run.delete_shard(group, shard.name)
        self.run.storage.delete_folder(_FOLDER)
        self.rows = {}

    def _drops(self, shard: str) -> Iterator[dict[str, Any]]:
        name = self.run.drops_name(self.plan.row_group, shard)
        if self.run.size(name) is not None:
            yield from self.run.storage.read_json_lines(name, "delete it: the next run writes it again")


def retry_shards(run: RunFolder) -> Iterator[Shard]:
    """The shards of all rounds."""
    for number, file in enumerate(_round_files(run), start=1):
        size = int(PurePosixPath(file).stem.partition("-")[2])
        lines = _read(run, file)
        index = number * _FIRST_INDEX
        while batch := list(islice(lines, size)):
            files = {name: path for line in batch for name, path in line.get("files", {}).items()}
            yield Shard(index, [line["source"] for line in batch], len(batch), files)
            index += 1


def retried_rows(run: RunFolder) -> defaultdict[int, set[int]]:
    """Shard index -> rows that a later round tries again."""
    result: defaultdict[int, set[int]] = defaultdict(set)
    for file in _round_files(run):
        for line in _read(run, file):
            result[line["shard"]].add(line["row"])
    return result


def retried_reasons(run: RunFolder) -> Counter[str]:
    """How many dropped rows a later round tries again, by the reason of the drop."""
    return Counter(str(line["reason"]) for file in _round_files(run) for line in _read(run, file))


def retry_origins(run: RunFolder) -> dict[int, list[tuple[int, int]]]:
    """Index of each retry shard -> (shard index, row) that each of its rows was tried as before."""
    result: dict[int, list[tuple[int, int]]] = {}
    for number, file in enumerate(_round_files(run), start=1):
        size = int(PurePosixPath(file).stem.partition("-")[2])
        for place, line in enumerate(_read(run, file)):
            result.setdefault(number * _FIRST_INDEX + place // size, []).append((line["shard"], line["row"]))
    return result


def _round_files(run: RunFolder) -> list[str]:
    return sorted(f"{_FOLDER}/{name}" for name in run.storage.names(_FOLDER) if name.endswith(".jsonl"))


def _read(run: RunFolder, name: str) -> Iterator[dict[str, Any]]:
    return run.storage.read_json_lines(name, "restore it from a copy: it has the rows of this round's shards")


def has_retries(run: RunFolder) -> bool:
    """Whether a round was recorded."""
    return bool(_round_files(run))


def redact_retries(
    run: RunFolder,
    removed: Mapping[int, Collection[int]],
    is_removed: Callable[[list[object]], bool],
    redact: Callable[[list[object]], list[object]],
) -> None:
    """Deletes the content of removed rows from the rounds, and updates the records of their shards.

    Args:
        removed: rows by shard index.
        is_removed: whether a source row is removed in addition to those.
        redact: a source row without content, such as captions and URLs.
    """
    before = {shard.index: shard.digest for shard in retry_shards(run)}
    for number, file in enumerate(_round_files(run), start=1):
        size = int(PurePosixPath(file).stem.partition("-")[2])
        lines = list(_read(run, file))
        redacted: set[int] = set()
        for place, line in enumerate(lines):
            shard = number * _FIRST_INDEX + place // size
            if line.get("removed") or place % size in removed.get(shard, ()) or is_removed(line["source"]):
                line.update(source=redact(line["source"]), removed=True)
                redacted.add(shard)
        if redacted:
            run.storage.write_json_lines(file, lines)
        for shard in (shard for shard in retry_shards(run) if shard.index in redacted):
            for group in run.started_groups():
                record = run.read_record(group, shard.name)
                if record is not None and record.input == before[shard.index]:
                    run.write_record(replace(record, input=shard.digest))
