"""Dropped rows with their URL and captions, which the lists of drops do not have: they are read from the source."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import yaml

from pipeline.engine.retries import REMOVED, retry_shards
from pipeline.errors import ConfigError, StaleOutputError
from pipeline.stage import Shard
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import CONFIG, RunFolder
from stages.precompute.fetch import SAMPLES
from stages.sources.base import Source
from stages.sources.incremental import InputBatches
from stages.sources.registry import source_of_run


def drops_of_url(run: RunFolder, url: str) -> list[dict[str, Any]]:
    """The drops of input rows with this URL; reads the source to its end.

    Raises:
        ConfigError, StaleOutputError: the source is gone, or has changed.
    """
    source, found = source_of_run(run), []
    for shard in _input(run, source):
        rows = [place for place, row in enumerate(shard.rows) if source.identifiers(row)[1] == url]
        found += [drop for drop in _drops(run, shard.index) if drop["row"] in rows] if rows else []
    return found


def first_drops(run: RunFolder, limit: int) -> list[dict[str, Any]]:
    """The first drops of the input: shard, row, key, reason and detail, and what the source lists of the row.

    URL and captions are None where a worker reads them, and absent where the source is gone or the row was removed; no
    further shard of the source is read than the drops need.
    """
    drops: list[dict[str, Any]] = []
    for shard in sorted(run.recorded_shards(SAMPLES)):
        drops += _drops(run, shard)
        if len(drops) >= limit:
            break
    drops = drops[:limit]
    with suppress(ConfigError, StaleOutputError, FileNotFoundError):  # gone or changed: the keys still say which rows
        add_source_rows(run, drops)
    return drops


def add_source_rows(run: RunFolder, drops: Sequence[dict[str, Any]]) -> None:
    """Adds `url` and `captions` to drops of the input, with `shard`, `row` and `reason`, as the source lists them, or
    None where a worker reads them. Reads no further shard than the drops need. Removed rows stay without.

    Raises:
        ConfigError, StaleOutputError: the source is gone, or has changed.
    """
    wanted = {drop["shard"] for drop in drops}
    source = source_of_run(run)
    shards = _input(run, source) if wanted else iter(())
    while wanted and (shard := next(shards, None)) is not None:
        rows = source.rows_of(shard) if shard.index in wanted else []
        for drop in (drop for drop in drops if drop["shard"] == shard.index and drop["reason"] != REMOVED):
            row = rows[drop["row"]]
            drop.update(url=row.url, captions=None if row.captions is None else list(row.captions))
        wanted.discard(shard.index)


def _input(run: RunFolder, source: Source) -> Iterator[Shard]:
    """The shards of the source as the run has them, then those of retry rounds."""
    shard_size = yaml.safe_load(run.storage.read(CONFIG))["shard_size"]
    return chain(InputBatches(source, run, shard_size, SAMPLES).shards(), retry_shards(run))


def _drops(run: RunFolder, shard: int) -> list[dict[str, Any]]:
    name = run.drops_name(SAMPLES, shard_name(shard))
    if run.storage.size(name) is None:
        return []
    return [{"shard": shard, "group": SAMPLES, **json.loads(line)} for line in run.storage.read_lines(name)]
