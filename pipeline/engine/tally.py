"""Counts of a run: shards, rows and drops by group."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

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
        self.shards += 1
        self.rows += record.rows
        self.bytes += record.bytes
        for reason, count in record.drops.items():
            self.drops[reason] = self.drops.get(reason, 0) + count
        for name, value in record.counters.items():
            merge = min if name.endswith("_min") else max if name.endswith("_max") else operator.add
            self.counters[name] = merge(self.counters[name], value) if name in self.counters else value
