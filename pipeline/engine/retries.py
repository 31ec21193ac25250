"""`--retry-dropped`: tries dropped rows again, without touching the shards they came from.

Each round copies the source rows of the chosen drops into RUN/retries/ROUND.jsonl and appends them to the stream
as further shards, numbered from ROUND x 10,000,000. So finished files stay as they are, and the rows of all
groups stay aligned. A row's last try counts: a retried row leaves the counts of the shard it came from.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any

from pipeline.engine.ledger import changed_input
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.plan import Plan
from pipeline.stage import Shard
from pipeline.storage.run_folder import RunFolder

_FIRST_INDEX = 10_000_000
_FOLDER = "retries"
ALL = "all"
REMOVED = "removed"  # the drop reason of samples that were taken out of the store: never tried again


def with_retries(plan: Plan, run: RunFolder) -> Plan:
    """The plan, its stream of shards followed by the shards of earlier retry rounds."""
    base = plan.shards
    return replace(plan, shards=lambda: chain(base(), _retry_shards(run)))


def begin_round(plan: Plan, run: RunFolder, reasons: Sequence[str]) -> Counter[str]:
    """Collects the rows dropped for one of `reasons` (`all`: any but `removed`) and not retried yet, as a new round.

    Returns:
        How many rows will be tried again, by reason.

    Raises:
        StaleOutputError: the source has changed since the drops were recorded.
        ConfigError: no dropped sample has one of the reasons.
    """
    retried = retried_rows(run)
    wanted: Callable[[str], bool] = lambda r: r != REMOVED and (r in reasons or ALL in reasons)  # noqa: E731
    chosen: Counter[str] = Counter()
    lines: list[str] = []
    other_reasons: set[str] = set()
    shard_size = 1
    for shard in plan.shards():
        shard_size = max(shard_size, shard.num_rows)
        record = run.read_record(plan.row_group, shard.name)
        if record is not None and record["input"] != shard.digest:
            raise StaleOutputError(changed_input(run, shard, plan.row_group, record))
        drops = list(_drops(run, plan.row_group, shard.name))
        rows = shard.rows if drops else []
        for drop in drops:
            row, reason = drop["row"], drop["reason"]
            if row not in retried[shard.index]:
                other_reasons.add(reason)
            if wanted(reason) and row not in retried[shard.index]:
                chosen[reason] += 1
                line = {"shard": shard.index, "row": row, "reason": reason, "source": rows[row]}
                files = {name: path for name, path in shard.files.items() if name in rows[row]}
                lines.append(json.dumps({**line, "files": files} if files else line))
    if not lines and ALL not in reasons:
        available = ", ".join(sorted(other_reasons)) or "none"
        raise ConfigError(
            f"--retry-dropped {','.join(reasons)}: no dropped sample has it; available reasons: {available}"
        )
    if lines:
        rounds = _round_files(run)
        run.storage.write_text(f"{_FOLDER}/{len(rounds) + 1:05d}-{shard_size}.jsonl", "\n".join(lines) + "\n")
    return chosen


def retried_drops(plan: Plan, run: RunFolder) -> Counter[str]:
    """Recorded drops that a later round has tried again, by reason; they no longer count where they happened."""
    return Counter(
        drop["reason"]
        for index, rows in retried_rows(run).items()
        for drop in _drops(run, plan.row_group, f"{index:05d}")
        if drop["row"] in rows
    )


def rounds_fit(plan: Plan, run: RunFolder) -> bool:
    """True if the rows of all rounds still come from the shards the source has now."""
    retried = retried_rows(run)
    if not retried:
        return True
    shards = (shard for shard in plan.shards() if shard.index in retried)
    return all(_record_fits(run, plan.row_group, shard) for shard in shards)


def delete_retries(plan: Plan, run: RunFolder) -> None:
    """Deletes all rounds and the files made from them."""
    for shard in _retry_shards(run):
        for group in plan.groups:
            run.delete_shard(group, shard.name)
    run.storage.delete_folder(_FOLDER)


def _retry_shards(run: RunFolder) -> Iterator[Shard]:
    for number, file in enumerate(_round_files(run), start=1):
        size = int(PurePosixPath(file).stem.partition("-")[2])
        lines = _read(run, file)
        index = number * _FIRST_INDEX
        while batch := list(islice(lines, size)):
            files = {name: path for line in batch for name, path in line.get("files", {}).items()}
            yield Shard(index, [line["source"] for line in batch], len(batch), files)
            index += 1


def retried_rows(run: RunFolder) -> defaultdict[int, set[int]]:
    """Shard index -> rows that a later round has retried."""
    result: defaultdict[int, set[int]] = defaultdict(set)
    for file in _round_files(run):
        for line in _read(run, file):
            result[line["shard"]].add(line["row"])
    return result


def retry_origins(run: RunFolder) -> dict[int, list[tuple[int, int]]]:
    """Index of each retry shard -> for each of its rows (shard index, row) of its previous try."""
    result: dict[int, list[tuple[int, int]]] = {}
    for number, file in enumerate(_round_files(run), start=1):
        size = int(PurePosixPath(file).stem.partition("-")[2])
        for place, line in enumerate(_read(run, file)):
            result.setdefault(number * _FIRST_INDEX + place // size, []).append((line["shard"], line["row"]))
    return result


def _record_fits(run: RunFolder, group: str, shard: Shard) -> bool:
    record = run.read_record(group, shard.name)
    return record is None or record["input"] == shard.digest


def _drops(run: RunFolder, group: str, shard: str) -> Iterator[dict[str, Any]]:
    name = run.drops_name(group, shard)
    if run.storage.size(name) is not None:
        yield from _read(run, name)


def _round_files(run: RunFolder) -> list[str]:
    return sorted(f"{_FOLDER}/{name}" for name in run.storage.names(_FOLDER) if name.endswith(".jsonl"))


def _read(run: RunFolder, name: str) -> Iterator[dict[str, Any]]:
    return map(json.loads, run.storage.read_lines(name))


def has_retries(run: RunFolder) -> bool:
    """Whether a round was recorded."""
    return bool(_round_files(run))


def redact_retries(
    run: RunFolder,
    removed: Mapping[int, Collection[int]],
    is_removed: Callable[[list[object]], bool],
    redact: Callable[[list[object]], list[object]],
) -> None:
    """Takes the content of removed rows out of the rounds, and updates the records of their shards.

    Args:
        removed: rows by shard index.
        is_removed: whether a source row is removed in addition to those.
        redact: a source row without content, such as captions and URLs.
    """
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
            run.storage.write_text(file, "\n".join(json.dumps(line) for line in lines) + "\n")
        for shard in (shard for shard in _retry_shards(run) if shard.index in redacted):
            for group in run.started_groups():
                record = run.read_record(group, shard.name)
                if record is not None:
                    run.storage.write_json(run.record_name(group, shard.name), {**record, "input": shard.digest})
