"""Counts of a run: shards, rows and drops by group."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.storage.record import Record


@dataclass(slots=True)
class Tally:
    """Sums over all shards, from records; its size does not grow with the number of shards."""

    shards: int = 0
    shards_skipped: int = 0
    shards_failed: int = 0
    input_rows: int = 0
    groups: dict[str, "GroupTally"] = field(default_factory=dict)
    failures: list[dict[str, object]] = field(default_factory=list)
    """The first few failed tasks: shard, stage, error."""

    def add(self, record: Record) -> None:
        self.groups.setdefault(record.group, GroupTally()).add(record)

    def add_all(self, tally: Mapping[str, Any]) -> None:
        """Adds the sums of other shards, as `dataclasses.asdict` makes them."""
        for name in ("shards", "shards_skipped", "shards_failed", "input_rows"):
            setattr(self, name, getattr(self, name) + tally[name])
        for group, sums in tally["groups"].items():
            self.groups.setdefault(group, GroupTally()).add_sums(**sums)
        self.failures += tally["failures"]

    def subtract_retried(self, group: str, drops: Mapping[str, int]) -> None:
        """Subtracts drops of rows that were tried again: they count in the shard that tried them last."""
        self.input_rows -= sum(drops.values())
        counted = self.groups[group].drops if group in self.groups else {}
        for reason, count in drops.items():
            left = counted.pop(reason, 0) - count
            if left > 0:
                counted[reason] = left


@dataclass(slots=True)
class GroupTally:
    """Sums over the records of one group."""

    shards: int = 0
    rows: int = 0
    bytes: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        self.add_sums(1, record.rows, record.bytes, record.drops, record.counters)

    def add_sums(
        self, shards: int, rows: int, bytes: int, drops: Mapping[str, int], counters: Mapping[str, float]
    ) -> None:
        """Adds what several records of other shards sum up to."""
        self.shards += shards
        self.rows += rows
        self.bytes += bytes
        for reason, count in drops.items():
            self.drops[reason] = self.drops.get(reason, 0) + count
        for name, value in counters.items():
            merge = min if name.endswith("_min") else max if name.endswith("_max") else operator.add
            self.counters[name] = merge(self.counters[name], value) if name in self.counters else value
