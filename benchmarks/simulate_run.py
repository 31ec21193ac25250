"""One scenario of simulate.py, in its own process: NAME SHARDS FOLDER; prints JSON.

The scheduler, its ledger, tally, progress and event log are the real ones. The executor is simulated; its stage times
are those of `--profile l4x1` and of T5 v1.1 XXL in docs/how-to/planning.md, with a tail that is an assumption.
"""

import json
import math
import random
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engine_run import peak_mib
from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.state import RunState
from pipeline.executors.base import ExecutionConfig
from pipeline.executors.task import TaskOutcome, TaskRequest
from pipeline.plan import Plan
from pipeline.planning.hardware import load_profile
from pipeline.planning.simulated_executor import (
    NodeEvent,
    SimulatedCluster,
    SimulatedExecutor,
    SimulatedStage,
    TaskOutcomeModel,
)
from pipeline.signals import StopSignals
from pipeline.stage import Group, Shard, Stage, Task
from pipeline.storage.events import EventLog
from pipeline.storage.record import CommittedFile, Record
from pipeline.storage.run_folder import RunFolder

# ---- the cluster and its stages ----

ROWS = 4000  # 100,000 such shards are 400 million pairs
NODES, CPUS, GPUS = 8, 448, 64
PROFILE = load_profile("l4x1")
ENCODE_FLOP = 144e9  # a caption: docs/how-to/planning.md, T5 v1.1 XXL
FETCH_SLOTS = 0.5  # as FetchStage: half of its time it waits
SIGMA = {"fetch": 0.6, "resize": 0.15, "encode": 0.15}  # assumption: lognormal, of mean 1
FAILING = 0.01  # attempts
HOPELESS = 10_000  # each so many-th shard fails whenever it is resized
LEAVE_EVERY_S, AWAY_S = 1800.0, 1200.0  # a node goes, its successor comes
SEED = 0
CONFIG = ExecutionConfig(retry_delay_s=0)  # pauses would be real ones

SIMULATED_STAGES = (
    SimulatedStage(
        "fetch", (), 5.0, 0.0, PROFILE.cpu_s_per_row["fetch"] / FETCH_SLOTS, {"cpus": FETCH_SLOTS}, None, 0.5
    ),
    SimulatedStage("resize", ("fetch",), 5.0, 0.0, PROFILE.cpu_s_per_row["resize"], {"cpus": 1.0}),
    SimulatedStage(
        "encode",
        ("resize",),
        PROFILE.model_start_s,
        0.0,
        ENCODE_FLOP / (PROFILE.tflops["bfloat16"] * 1e12 * PROFILE.utilisation),
        {"gpus": 1.0},
        GPUS,
    ),
)


class Counted(Stage):
    def __init__(self, name: str, inputs: tuple[str, ...], groups: tuple[Group, ...], max_workers: int | None = None):
        self.name, self.inputs, self.groups, self.max_workers = name, inputs, groups, max_workers

    def process(self, task: Task) -> None:
        raise AssertionError("simulated, not run")


def plan_of(shards: int) -> Plan:
    lasting = tuple(Group(name, {}) for name in ("samples", "images-64", "images-256"))
    stages = (
        Counted("fetch", (), (Group("originals", {}, transient=True),)),
        Counted("resize", ("originals",), lasting),
        Counted("encode", ("samples",), (Group("text-t5", {}),), GPUS),
    )
    return Plan(stages, lambda: (Shard(i, [i], ROWS) for i in range(shards)), lambda *_: {}, row_group="samples")


class Drawn:
    """Times and failures of tasks: functions of seed, shard, stage and attempt, whatever the order."""

    def __init__(self, *, failing: bool):
        self.failing = failing

    def __call__(self, request: TaskRequest) -> TaskOutcomeModel:
        draw = random.Random(f"{SEED} {request.shard.index} {request.stage} {request.attempt}")
        sigma = SIGMA[request.stage]
        stretch = math.exp(draw.gauss(-(sigma**2) / 2, sigma))
        hopeless = request.stage == "resize" and request.shard.index % HOPELESS == HOPELESS - 1
        if self.failing and (hopeless or draw.random() < FAILING):
            return TaskOutcomeModel(stretch * draw.random(), "failed")
        return TaskOutcomeModel(stretch)


def comings_and_goings(seconds: float) -> list[NodeEvent]:
    leaving = [(k * LEAVE_EVERY_S, k % NODES) for k in range(1, int(seconds / LEAVE_EVERY_S) + 1)]
    return [
        change for at, node in leaving for change in (NodeEvent(at, node, False), NodeEvent(at + AWAY_S, node, True))
    ]


class Cluster(SimulatedExecutor):
    """Takes the time of the simulation itself; writes, if given a folder, what real workers write there."""

    def __init__(self, *, failing: bool = False, node_events: Sequence[NodeEvent] = (), writes: Path | None = None):
        machine = SimulatedCluster({"cpus": CPUS, "gpus": GPUS}, CPUS, 2 * (CPUS + GPUS), NODES)
        super().__init__(SIMULATED_STAGES, machine, outcome_model=Drawn(failing=failing), node_events=node_events)
        self.writes = writes
        self.own_s = 0.0
        self.tasks = 0

    def submit(self, stage: Stage, request: TaskRequest) -> None:
        began = time.perf_counter()  # process_time would cost more than what it measures
        super().submit(stage, request)
        self.own_s += time.perf_counter() - began

    def wait(self, timeout_s: float) -> list[TaskOutcome]:
        began = time.perf_counter()
        outcomes = super().wait(timeout_s)
        self.tasks += len(outcomes)
        self.own_s += time.perf_counter() - began
        return outcomes

    def records(self, request: TaskRequest) -> dict[str, Record]:
        return {group: self._record(request, group) for group in sorted(request.wanted)}

    def _record(self, request: TaskRequest, group: str) -> Record:
        shard = request.shard
        folder = "staging" if group == "originals" else "store"
        path = f"{folder}/{group}/{shard.name}.parquet"
        record = Record(
            group=group,
            shard=shard.index,
            fingerprint=request.fingerprints[group],
            input=shard.digest,
            input_rows=ROWS,
            rows=ROWS,
            files=(CommittedFile(path, 0, "0" * 64),),
            counters={"captions": ROWS, "tokens": 16 * ROWS},
        )
        if self.writes is not None:
            for name, text in (
                (path, ""),
                (f"state/{group}/{shard.name}.json", json.dumps(record.to_json(), indent=1)),
            ):
                try:
                    (self.writes / name).write_text(text)
                except FileNotFoundError:
                    (self.writes / name).parent.mkdir(parents=True)
                    (self.writes / name).write_text(text)
        return record


class Finished(Progress):
    """Notes when each shard was finished, on the simulated clock."""

    def __init__(self, plan: Plan, cluster: Cluster):
        super().__init__(plan.stages, quiet=True)
        self.cluster = cluster
        self.times = array("d")

    def finish(self, shard: Shard) -> None:
        self.times.append(self.cluster.simulation.seconds)
        super().finish(shard)


# ---- scenarios ----


def scenario(name: str, shards: int, folder: Path) -> dict[str, float]:
    calm_s = shards * SIMULATED_STAGES[-1].seconds(ROWS) / GPUS
    cluster = {
        "calm": lambda: Cluster(),
        "1% failing": lambda: Cluster(failing=True),
        "nodes come and go, 1% failing": lambda: Cluster(failing=True, node_events=comings_and_goings(2 * calm_s)),
        "calm, files written": lambda: Cluster(writes=folder),
        "all finished": lambda: Cluster(),
    }[name]()
    run, plan = RunFolder(folder, frozenset(["originals"])), plan_of(shards)
    folder.mkdir(exist_ok=True)
    state = RunState(plan, run)
    state.ledger.check_groups()
    events, progress = EventLog(run.storage), Finished(plan, cluster)
    before_mib, began, began_cpu = peak_mib(), time.perf_counter(), time.process_time()
    tally = Scheduler(state, cluster, events, progress, CONFIG, StopSignals()).execute()
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    events.close()
    scheduling_s = cpu_s * (1 - cluster.own_s / seconds)
    assert tally.shards == shards
    assert tally.groups["text-t5"].shards == shards - tally.shards_failed
    return {
        "shards": shards,
        "shards_failed": tally.shards_failed,
        "tasks": cluster.tasks,
        "scheduling_s": scheduling_s,
        "scheduling_ms_per_shard": 1000 * scheduling_s / shards,
        "simulation_s": cpu_s - scheduling_s,
        "driver_peak_mib": peak_mib(),
        "driver_growth_mib": peak_mib() - before_mib,
        **(simulated(cluster, progress.times) if cluster.tasks else {}),
    }


def simulated(cluster: Cluster, finished: Sequence[float]) -> dict[str, float]:
    """What the simulated clock says; the bottleneck is the encoders."""
    played = cluster.played
    busy, lost, offered = (found["encode"] for found in (played.busy_s, played.lost_s, played.offered_s))
    cpus = sum(played.busy_s[s.name] * s.slots for s in SIMULATED_STAGES if s.workers is None)
    nearly = finished[math.ceil(0.99 * len(finished)) - 1]
    return {
        "hours": played.seconds / 3600,
        "of_ideal": offered / (busy - lost),
        "encoders_busy": busy / offered,
        "encoders_useful": (busy - lost) / offered,
        "cpus_busy": cpus / played.offered_s[""],
        "last_percent_s": played.seconds - nearly,
        "last_percent_of_run": (played.seconds - nearly) / played.seconds,
    }


def main() -> None:
    name, shards, folder = sys.argv[1:]
    print(json.dumps(scenario(name, int(shards), Path(folder))))


if __name__ == "__main__":
    main()
