"""Watches a run from outside, on this machine or elsewhere: from its events and records alone, which it only reads.

Of the events only the new ones are read each time. They say what each task made and how fast; what is finished is what
the records say, whose names are listed now and then. So a run that was killed, resumed or rebuilt meanwhile, or whose
last events were lost, is counted right.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.engine.division import view_parts
from pipeline.engine.rates import Bins, RecentTasks
from pipeline.engine.retries import retried_reasons
from pipeline.engine.run_view import (
    INTERRUPTED,
    READING,
    RUNNING,
    DropsView,
    FailedTry,
    GroupView,
    NodeView,
    RunView,
    StageView,
)
from pipeline.errors import ConfigError
from pipeline.storage import LocalStorage
from pipeline.storage.events import EventReader, ReplacedError, event_folders_of_parts
from pipeline.storage.lock import is_running
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import PLAN, RunFolder

_MOST_FAILURES = 50
_LISTED_AGAIN = 20.0
"""Records are listed again after so many times the seconds that it took."""
_LISTED_S, _LISTED_FAR_S = 1.5, 15.0
"""Least seconds between listings, on a local folder and on an object store."""
_RECORDS_S, _EVENTS_S = 1.0, 1.5
"""Seconds per look for reading records of which there is no event, and for reading events."""


class _Shards:
    """Rows and drops of each finished shard of a group, with their sums."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.drops: dict[int, Mapping[str, int]] = {}
        self.before: dict[int, Mapping[str, int]] = {}
        """Of the drops, those that an earlier stage found."""
        self.total_rows = 0
        self.total_drops: Counter[str] = Counter()
        self.total_before: Counter[str] = Counter()

    def put(self, shard: int, rows: int, drops: Mapping[str, int], before: Mapping[str, int]) -> None:
        self.remove(shard)
        self.rows[shard] = rows
        self.total_rows += rows
        if drops:
            self.drops[shard] = drops
            self.total_drops.update(drops)
        if before:
            self.before[shard] = before
            self.total_before.update(before)

    def remove(self, shard: int) -> None:
        if shard in self.rows:
            self.total_rows -= self.rows.pop(shard)
            self.total_drops.subtract(self.drops.pop(shard, {}))
            self.total_before.subtract(self.before.pop(shard, {}))


@dataclass(slots=True)
class _Latest:
    """What the latest run of the folder did; of one with parts, what the drivers of all parts did."""

    executor: str = ""
    started: float | None = None
    last: float | None = None
    outcome: str | None = None
    total: int | None = None
    tasks: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    bins: dict[str, Bins] = field(default_factory=dict)
    recent: dict[str, RecentTasks] = field(default_factory=dict)
    nodes: dict[str, NodeView] = field(default_factory=dict)
    failures: deque[FailedTry] = field(default_factory=lambda: deque(maxlen=_MOST_FAILURES))
    parts: dict[str, int] | None = None
    """Shards of each part that has begun; None of a run without parts."""


class RunWatch:
    """Looks at a run folder again and again. Safe for threads; its size grows with the shards, a few bytes each.

    Raises:
        ConfigError: the folder is not a run folder.
    """

    def __init__(self, place: str):
        self.run = RunFolder(place)
        self._mutex = threading.Lock()
        self._seen: tuple[float, RunView] | None = None
        self._start()

    def _start(self) -> None:
        self._readers = {"": EventReader(self.run.storage)}
        """Of the events of the run, and of those of each part."""
        self._parts_at = 0.0
        self._groups: dict[str, _Shards] = {}
        self._latest = _Latest()
        self._damaged: set[tuple[str, int]] = set()
        self._list_at = 0.0
        self._retried: Mapping[str, int] = {}
        self._is_behind = False

    def look(self, max_age_s: float = 0.0) -> RunView:
        """The run now, or as it was seen within the last `max_age_s` seconds."""
        with self._mutex:
            if self._seen is None or time.monotonic() - self._seen[0] > max_age_s:
                view = self._look()
                self._seen = time.monotonic(), view
            return self._seen[1]

    def drops_by_shard(self, group: str) -> dict[int, Mapping[str, int]]:
        """The drops by reason of each shard of a group that has any, as of the last look, in shard order."""
        with self._mutex:
            shards = self._groups.get(group)
            return {} if shards is None else dict(sorted(shards.drops.items()))

    def _look(self) -> RunView:
        plan = self.run.read_engine_file(PLAN)
        if plan is None:
            raise ConfigError(f"{self.run.url}: not a run folder (no plan.json); give the --out of a `pipeline run`")
        running = is_running(self.run.storage)  # before the events: one that ends now is seen to have ended next time
        try:
            self._read_events()
        except ReplacedError:
            self._start()
            self._read_events()
        lasting = [
            name for stage in plan["stages"] for name in stage["groups"] if name not in plan["transient_groups"]
        ]
        if not self._is_behind:
            self._list_records(lasting)
        return self._view(plan, set(lasting), running)

    def _read_events(self) -> None:
        now = time.monotonic()
        until, is_far = now + _EVENTS_S, not isinstance(self.run.storage, LocalStorage)
        with_parts = now >= self._parts_at
        if with_parts:
            self._parts_at = now + (_LISTED_FAR_S if is_far else 0.0)
            for part, folder in event_folders_of_parts(self.run.storage).items():
                self._readers.setdefault(part, EventReader(folder))
        self._is_behind = False
        for part, reader in self._readers.items():
            for event in reader.new() if with_parts or not part else ():
                # a damaged line may be JSON all the same
                with suppress(KeyError, TypeError, ValueError, AttributeError):
                    self._take(event, part)
                if time.monotonic() > until:
                    self._is_behind = True
                    self._parts_at = 0.0
                    return

    def _take(self, event: dict[str, Any], part: str = "") -> None:
        kind, latest = event.get("event"), self._latest
        if kind == "run_started":
            self._begin(event, part)
            latest = self._latest
        if part and latest.parts is None:  # of parts before the latest run, which was one of all
            latest = _Latest()
        if kind == "run_ended":
            latest.outcome = str(event["outcome"])
        elif kind == "task":
            self._take_task(event, latest)
        elif kind == "task_failed":
            latest.failed[str(event["stage"])] += 1
            latest.failures.append(
                FailedTry(
                    float(event["time"]),
                    str(event["stage"]),
                    int(event["shard"]),
                    int(event.get("attempt", 1)),
                    str(event.get("lost", "")),
                    str(event["error"]),
                )
            )
        if "time" in event:
            latest.last = max(float(event["time"]), latest.last or 0.0)

    def _begin(self, event: dict[str, Any], part: str) -> None:
        """Takes the start of a run; the drivers of parts that come after the last run of all are one run together."""
        total, at, latest = event.get("shards"), float(event["time"]), self._latest
        if not part or (latest.parts is None and at > (latest.started or 0.0)):
            self._latest = latest = _Latest(executor=str(event.get("executor") or ""), started=at)
            latest.total = int(total) if total is not None else None
            latest.parts = {} if part else None
        if latest.parts is not None:
            latest.parts[part] = int(total or 0)
            latest.total = sum(latest.parts.values())
            latest.started = min(at, latest.started or at)

    def _take_task(self, event: dict[str, Any], latest: _Latest) -> None:
        stage, shard, at = str(event["stage"]), int(event["shard"]), float(event["time"])
        seconds, node = float(event["seconds"]), event.get("node")
        for name, group in event["groups"].items():
            drops, before = dict(group["drops"]), dict(group.get("found_before", {}))
            self._groups.setdefault(name, _Shards()).put(shard, int(group["rows"]), drops, before)
        rows = max((int(group["rows"]) for group in event["groups"].values()), default=0)
        latest.tasks[stage] += 1
        latest.rows[stage] += rows
        latest.recent.setdefault(stage, RecentTasks()).add(at, seconds)
        if stage not in latest.bins:
            latest.bins[stage] = Bins(latest.started or at)
        latest.bins[stage].add(at, rows, seconds)
        if node:
            before = latest.nodes.get(node, NodeView(str(node), 0, 0.0, at))
            latest.nodes[node] = NodeView(str(node), before.tasks + 1, before.seconds + seconds, at)

    def _list_records(self, groups: list[str]) -> None:
        """Compares what the events said with the records there are."""
        started = time.monotonic()
        if started < self._list_at:
            return
        for name in groups:
            known = self._groups.setdefault(name, _Shards())
            before = set(known.rows)
            found = set(self.run.recorded_shards(name))
            for shard in before - found:  # deleted since: rebuilt, or a part of it was lost
                known.remove(shard)
            for shard in sorted(found - known.rows.keys()):
                if time.monotonic() - started > _RECORDS_S:
                    break
                if (name, shard) in self._damaged:
                    continue
                record = self.run.read_record(name, shard_name(shard))
                if record is None:
                    self._damaged.add((name, shard))
                else:
                    known.put(shard, record.rows, record.drops, record.info.get("found_before", {}))
        self._retried = retried_reasons(self.run)
        least = _LISTED_S if isinstance(self.run.storage, LocalStorage) else _LISTED_FAR_S
        now = time.monotonic()
        self._list_at = now + max(least, _LISTED_AGAIN * (now - started))

    def _view(self, plan: Mapping[str, Any], lasting: set[str], running: bool) -> RunView:
        latest = self._latest
        groups = tuple(
            GroupView(name, stage["name"], len(shards.rows), shards.total_rows, _most_first(shards.total_drops))
            for stage in plan["stages"]
            for name in stage["groups"]
            if name in lasting and (shards := self._groups.get(name)) is not None
        )
        if running:
            state = RUNNING
        elif self._is_behind:
            state = READING
        elif latest.parts is not None and (parts := view_parts(self.run)) is not None and parts.missing:
            state = f"parts are missing: {parts.missing_text()}"
        else:
            state = latest.outcome or (INTERRUPTED if latest.started else "not started")
        drops = self._drops(plan, groups)
        return RunView(
            url=self.run.url,
            workflow=str(plan.get("workflow")),
            executor=latest.executor,
            state=state,
            total_shards=latest.total,
            started=latest.started,
            last_event=latest.last,
            stages=self._stages(plan, lasting, drops, running),
            groups=groups,
            drops=drops,
            throughput={name: tuple(bins.rates(latest.last or 0.0)) for name, bins in latest.bins.items()},
            nodes=tuple(sorted(latest.nodes.values(), key=lambda node: node.name)),
            failures=tuple(reversed(latest.failures)),
            num_failed_tries=sum(latest.failed.values()),
            retried=self._retried,
            is_behind=self._is_behind,
        )

    def _drops(self, plan: Mapping[str, Any], groups: Sequence[GroupView]) -> tuple[DropsView, ...]:
        inputs = {stage["name"]: stage["inputs"] for stage in plan["stages"]}
        makers = {group: stage["name"] for stage in plan["stages"] for group in stage["groups"]}
        views: list[DropsView] = []
        for group in groups:
            found = Counter(self._groups[group.name].total_before)
            earlier = [makers[name] for name in inputs[group.stage]][:1] or [group.stage]
            views += [DropsView(earlier[0], group.name, *item) for item in _most_first(found).items()]
            own = Counter(group.drops)
            own.subtract(found)
            views += [DropsView(group.stage, group.name, *item) for item in _most_first(own).items()]
        return tuple(views)

    def _stages(
        self, plan: Mapping[str, Any], lasting: set[str], drops: Sequence[DropsView], running: bool
    ) -> tuple[StageView, ...]:
        latest, done = self._latest, self._done(plan, lasting)
        known = max([latest.total or 0, *done.values()]) if latest.total else None
        seconds = (latest.last or 0.0) - (latest.started or 0.0)
        views = []
        for stage in plan["stages"]:
            name = stage["name"]
            tasks, left = latest.tasks[name], (known or 0) - done[name]
            recent = latest.recent.get(name)
            views.append(
                StageView(
                    name,
                    done[name],
                    known,
                    latest.rows[name],
                    latest.rows[name] / seconds if tasks and seconds > 0 else None,
                    recent.busy(latest.started, latest.last) if recent is not None and running else 0.0,
                    sum(found.count for found in drops if found.stage == name),
                    latest.failed[name],
                    left * seconds / tasks if running and tasks and left > 0 and seconds > 0 else None,
                )
            )
        return tuple(views)

    def _done(self, plan: Mapping[str, Any], lasting: set[str]) -> dict[str, int]:
        """Finished shards of each stage. Where nothing lasts of a stage, what was made from it is finished too."""
        done: dict[str, int] = {}
        for stage in plan["stages"]:
            groups = [name for name in stage["groups"] if name in lasting] or stage["groups"]
            done[stage["name"]] = min(
                (len(self._groups[n].rows) if n in self._groups else 0 for n in groups), default=0
            )
        for stage in reversed(plan["stages"]):
            if not lasting.intersection(stage["groups"]):
                users = [user for user in plan["stages"] if set(user["inputs"]) & set(stage["groups"])]
                done[stage["name"]] = max([done[stage["name"]], *(done[user["name"]] for user in users)])
        return done


def _most_first(drops: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in drops.most_common() if count > 0}
