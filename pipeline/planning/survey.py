"""One pass over a plan's shards: the finished work, the remaining work, and a few shards spread over the input."""

from dataclasses import dataclass, field

from pipeline.engine.state import RunState
from pipeline.plan import Plan
from pipeline.stage import Shard, Stage, Workload

_SAMPLE_ROWS = 4096
_LEAST_SAMPLES = 4


@dataclass(slots=True)
class GroupSurvey:
    """One lasting group."""

    shards_done: int = 0
    bytes_done: int = 0
    shards_to_do: int = 0
    rows_to_do: int = 0


@dataclass(slots=True)
class ShardBatch:
    """Consecutive shards with the same stages to run and the same number of rows."""

    needs: tuple[str, ...]
    """Stages still to run; empty for finished shards."""
    rows: int
    """Rows of each shard."""
    count: int = 0


@dataclass(slots=True)
class Survey:
    """The work of a run. Its size grows with the number of changes from one shard to the next, not with the number of
    shards."""

    groups: dict[str, GroupSurvey]
    work: list[ShardBatch] = field(default_factory=list)
    samples: list[Shard] = field(default_factory=list)
    """Complete shards, evenly spread over the input: some thousand rows."""

    @property
    def shards(self) -> int:
        return sum(batch.count for batch in self.work)

    @property
    def rows(self) -> int:
        return sum(batch.rows * batch.count for batch in self.work)

    def scaled(self, rows: int, plan: Plan) -> "Survey":
        """The same input with another number of rows, and no finished work."""
        size = plan.shard_size or max(batch.rows for batch in self.work)
        needs = tuple(stage.name for stage in plan.needed(frozenset()))
        work = [ShardBatch(needs, size, rows // size), ShardBatch(needs, rows % size, 1)]
        work = [batch for batch in work if batch.rows and batch.count]
        shards = sum(batch.count for batch in work)
        return Survey({name: GroupSurvey(0, 0, shards, rows) for name in self.groups}, work, self.samples)


def survey(state: RunState) -> Survey:
    """Streams the shards; writes nothing."""
    plan = state.plan
    result = Survey({name: GroupSurvey() for name in plan.groups if name not in plan.transient_groups})
    stride = 1
    for index, (shard, finished) in enumerate(state.ledger.finished(plan.shards(), read_only=True)):
        for name, group in result.groups.items():
            record = finished.get(name)
            if record is None:
                group.shards_to_do += 1
                group.rows_to_do += shard.num_rows
                continue
            group.shards_done += 1
            group.bytes_done += record.bytes
        needs = tuple(stage.name for stage in plan.needed(finished.keys()))
        if not result.work or (result.work[-1].needs, result.work[-1].rows) != (needs, shard.num_rows):
            result.work.append(ShardBatch(needs, shard.num_rows))
        result.work[-1].count += 1
        if index % stride == 0:
            result.samples.append(shard)
        if len(result.samples) > max(_LEAST_SAMPLES, _SAMPLE_ROWS // result.samples[0].num_rows):
            result.samples, stride = result.samples[::2], 2 * stride
    return result


@dataclass(slots=True)
class Counted:
    """The work of one stage on an average input row, and the unit in which it is counted."""

    counter: str
    units: float
    flops: float
    dtype: str
    bytes: dict[str, float]
    bytes_otherwise: dict[str, dict[str, float]] = field(default_factory=dict)
    """By group and layout, as in `Workload`."""


def count_work(plan: Plan, found: Survey) -> dict[str, Counted]:
    """Work by stage, of the stages that can count it from captions; of groups that are finished only the bytes."""
    samples = found.samples
    counting = [stage for stage in plan.stages if type(stage).workload is not Stage.workload]
    if plan.captions is None or not samples or not counting:
        return {}
    to_do = frozenset(name for name, group in found.groups.items() if group.shards_to_do)
    rows = sum(shard.num_rows for shard in samples)
    further = plan.further_captions or (lambda shard: {})
    captions = [(plan.captions(shard), further(shard)) for shard in samples]
    result: dict[str, Counted] = {}
    for stage in counting:
        work = [done for texts in captions if (done := stage.workload(*texts, to_do)) is not None]
        if work:
            result[stage.name] = _average(work, rows)
    return result


def _average(work: list[Workload], rows: int) -> Counted:
    first = work[0]
    return Counted(
        counter=first.counter,
        units=sum(w.units for w in work) / rows,
        flops=sum(w.flops for w in work) / rows,
        dtype=first.dtype,
        bytes={group: sum(w.bytes[group] for w in work) / rows for group in first.bytes},
        bytes_otherwise={
            group: {name: sum(w.bytes_otherwise[group][name] for w in work) / rows for name in layouts}
            for group, layouts in first.bytes_otherwise.items()
        },
    )
