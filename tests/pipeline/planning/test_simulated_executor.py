"""A cluster on a simulated clock shows what the scheduler does with many shards, failures and lost nodes."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.engine.progress import Progress
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.state import RunState
from pipeline.engine.tally import Tally
from pipeline.executors.base import ExecutionConfig
from pipeline.executors.task import TaskRequest
from pipeline.plan import Plan
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
from pipeline.storage.run_folder import RunFolder

SHARDS, NODES = 2000, 2
CONFIG = ExecutionConfig(retry_delay_s=0)  # pauses would be real ones
SIMULATED_STAGES = (
    SimulatedStage("fetch", (), start_s=2.0, shard_s=6.0, row_s=0.0, uses={"cpus": 0.5}, slots=0.5),
    SimulatedStage("resize", ("fetch",), start_s=2.0, shard_s=10.0, row_s=0.0, uses={"cpus": 1.0}),
    SimulatedStage("encode", ("resize",), start_s=30.0, shard_s=3.0, row_s=0.0, uses={"gpus": 1.0}, workers=4),
)
MACHINE = SimulatedCluster({"cpus": 28.0, "gpus": 4.0}, processes=28, window=64, nodes=NODES)
SIGMA = 0.3  # of the logarithm of a task's time


class Counted(Stage):
    def __init__(self, simulated: SimulatedStage):
        self.name, self.inputs = simulated.name, simulated.after
        self.groups = (Group(simulated.name, {}),)

    def process(self, task: Task) -> None:
        raise AssertionError("simulated, not run")


def drawn(request: TaskRequest) -> random.Random:
    return random.Random(f"0 {request.shard.index} {request.stage} {request.attempt}")


def uneven(request: TaskRequest) -> TaskOutcomeModel:
    return TaskOutcomeModel(math.exp(drawn(request).gauss(-(SIGMA**2) / 2, SIGMA)))


def failing(request: TaskRequest) -> TaskOutcomeModel:
    """1 % of all attempts, and each attempt to resize shard 77."""
    fails = drawn(request).random() < 0.01 or (request.stage, request.shard.index) == ("resize", 77)
    return TaskOutcomeModel(uneven(request).stretch, "failed" if fails else None)


class Watched(Progress):
    """Counts shards in flight and tasks that succeeded."""

    def __init__(self, stages: Sequence[Stage]):
        super().__init__(stages, quiet=True)
        self.in_flight = self.most = 0

    def admit(self, shard: Shard, needed: Sequence[Stage]) -> None:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)

    def finish(self, shard: Shard) -> None:
        self.in_flight -= 1


def simulate(
    folder: Path, outcome_model: Callable[[TaskRequest], TaskOutcomeModel], node_events: Sequence[NodeEvent] = ()
) -> tuple[SimulatedExecutor, Tally, Watched]:
    stages = tuple(Counted(simulated) for simulated in SIMULATED_STAGES)
    plan = Plan(stages, lambda: (Shard(i, i, 1000) for i in range(SHARDS)), lambda *_: {})
    folder.mkdir(exist_ok=True)
    run, executor = (
        RunFolder(folder),
        SimulatedExecutor(SIMULATED_STAGES, MACHINE, outcome_model=outcome_model, node_events=node_events),
    )
    log, progress = EventLog(run.storage), Watched(stages)
    tally = Scheduler(RunState(plan, run), executor, log, progress, CONFIG, StopSignals()).execute()
    log.close()
    return executor, tally, progress


def useful(executor: SimulatedExecutor) -> float:
    """Part of the encoders' time spent on tasks that succeeded."""
    simulation = executor.simulation
    return (simulation.busy_s["encode"] - simulation.lost_s["encode"]) / simulation.offered_s["encode"]


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def done(folder: Path) -> Counter[tuple[str, int]]:
    """(stage, shard) -> how often it was finished."""
    return Counter((str(e["stage"]), int(str(e["shard"]))) for e in events(folder) if e["event"] == "task")


def test_the_slowest_workers_are_busy_95_percent_of_the_time(tmp_path: Path) -> None:
    executor, tally, _ = simulate(tmp_path, uneven)
    assert (tally.shards, tally.shards_failed) == (SHARDS, 0)
    assert useful(executor) >= 0.95
    assert executor.simulation.busy_s["resize"] / executor.simulation.offered_s[""] < 0.6, (
        "the encoders are the bottleneck"
    )


@pytest.mark.slow
def test_failures_are_retried_and_hopeless_shards_set_aside(tmp_path: Path) -> None:
    executor, tally, _ = simulate(tmp_path, failing)
    assert useful(executor) >= 0.94, "1 % of the tasks are done twice"
    assert [failure["shard"] for failure in tally.failures] == [77]
    assert [p.name for p in (tmp_path / "quarantine/failed").iterdir()] == ["resize-00077.txt"]
    expected = Counter({(s.name, i): 1 for s in SIMULATED_STAGES for i in range(SHARDS)})
    del expected["resize", 77], expected["encode", 77]
    assert done(tmp_path) == expected
    failed = [e for e in events(tmp_path) if e["event"] == "task_failed"]
    assert 0.008 < (len(failed) - 3) / (3 * SHARDS) < 0.012


@pytest.mark.slow
def test_a_lost_node_costs_what_it_ran_and_its_time_away(tmp_path: Path) -> None:
    calm, _, _ = simulate(tmp_path / "calm", uneven)
    away = [NodeEvent(500.0, 1, comes=False), NodeEvent(700.0, 1, comes=True)]
    executor, tally, _ = simulate(tmp_path / "lost", uneven, away)
    assert (tally.shards, tally.shards_failed) == (SHARDS, 0)
    assert done(tmp_path / "lost") == done(tmp_path / "calm")
    lost = [e for e in events(tmp_path / "lost") if e["event"] == "task_failed"]
    assert {e["error"] for e in lost} == {"node 1 was lost"}
    assert Counter(str(e["stage"]) for e in lost)["encode"] == 2, "its two encoders were at work"
    assert executor.simulation.seconds == pytest.approx(calm.simulation.seconds + 200 / 2, abs=30), (
        "half the workers, 200 s"
    )
    assert useful(executor) >= 0.94


def test_no_more_shards_are_in_flight_than_the_window(tmp_path: Path) -> None:
    _, _, watched = simulate(tmp_path, failing)
    assert (watched.most, watched.in_flight) == (MACHINE.window, 0)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    first, second = (simulate(tmp_path / name, failing)[0].simulation for name in "ab")
    assert first == second
