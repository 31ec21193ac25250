"""One measured run of engine.py, in its own process: MODE EXECUTOR WORKERS TASKS FOLDER; prints JSON."""

import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from pipeline.executors.ray_cluster import without_needless_processes
from pipeline.executors.task import TaskRequest, run_task
from pipeline.options import RunOptions, WorkflowConfig
from pipeline.plan import Plan
from pipeline.stage import Group, GroupResult, Shard, Stage, Task
from pipeline.storage.files import write_text
from pipeline.storage.run_folder import RunFolder
from pipeline.workflow import ShardedWorkflow

# ---- a plan of tiny shards ----


class Tiny(Stage):
    name = "tiny"
    groups = (Group("tiny", {}),)

    def process(self, task: Task) -> None:
        task.output("tiny", ".txt").write_text(f"{task.shard.index}\n")
        task.done("tiny", GroupResult(rows=1))


class TinyWorkflow(ShardedWorkflow):
    name = "tiny"
    summary = "one small file a shard"
    config_class = WorkflowConfig
    tasks = 0

    @classmethod
    def of(cls, tasks: int, workers: int) -> "TinyWorkflow":
        workflow = cls(WorkflowConfig.model_validate({"execution": {"num_cpus": workers}}))
        workflow.tasks = tasks
        return workflow

    def plan(self, run: RunFolder) -> Plan:
        return Plan((Tiny(),), lambda: shards(self.tasks), lambda *_: {}, row_group="tiny")


def shards(number: int) -> Iterator[Shard]:
    return (Shard(index, [index], 1) for index in range(number))


def run_engine(executor: str, workers: int, tasks: int, folder: Path) -> dict[str, float]:
    workflow = TinyWorkflow.of(tasks, workers)
    started = time.time()
    workflow.run(folder, RunOptions(executor, quiet=True))
    peak = peak_mib()
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    done = [line for line in lines if line["event"] == "task"]
    assert len(done) == tasks
    return {
        "ms_per_task": 1000 * (done[-1]["time"] - done[0]["time"]) / (tasks - 1),
        "in_task_ms": 1000 * statistics.mean(line["seconds"] for line in done),
        "start_s": done[0]["time"] - started,
        "driver_peak_mib": peak,
    }


def resume(executor: str, workers: int, tasks: int, folder: Path) -> dict[str, float]:
    """The same command again after all tasks are finished."""
    workflow = TinyWorkflow.of(tasks, workers)
    started = time.perf_counter()
    summary = workflow.run(folder, RunOptions(executor, quiet=True))
    seconds = time.perf_counter() - started
    assert summary["tally"]["shards_skipped"] == tasks  # type: ignore[index]
    return {"seconds": seconds, "ms_per_task": 1000 * seconds / tasks, "driver_peak_mib": peak_mib()}


def peak_mib() -> float:
    """Of this process; Linux counts the parent's memory in ru_maxrss, so /proc comes first."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---- the limit ----


def bare_task(folder: Path, index: int) -> None:
    write_text(folder / "store" / f"{index:05d}.txt", f"{index}\n")
    write_text(folder / "state" / f"{index:05d}.json", "x" * 500)


def run_bare(executor: str, workers: int, tasks: int, folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    times = (bare_ray if executor == "ray" else bare_pool)(workers, tasks, folder)
    return {
        "ms_per_task": 1000 * (times[-1] - times[0]) / (tasks - 1),
        "start_s": times[0] - started,
        "driver_peak_mib": peak_mib(),
    }


def bare_pool(workers: int, tasks: int, folder: Path) -> list[float]:
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return windowed(
            lambda index: pool.submit(bare_task, folder, index),
            lambda running: list(wait(running, return_when=FIRST_COMPLETED).done),
            workers,
            tasks,
        )


def bare_ray(workers: int, tasks: int, folder: Path) -> list[float]:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    with without_needless_processes():
        ray.init(
            address="local", num_cpus=workers, include_dashboard=False, logging_level="ERROR", log_to_driver=False
        )
    remote = ray.remote(bare_task)

    def ready(running: list[Any]) -> list[Any]:
        done = ray.wait(running, num_returns=1)[0]
        done = ray.wait(running, num_returns=len(running), timeout=0)[0] or done
        ray.get(done)
        return done

    return windowed(lambda index: remote.remote(folder, index), ready, workers, tasks)


def windowed(
    submit: Callable[[int], Any], ready: Callable[[list[Any]], list[Any]], workers: int, tasks: int
) -> list[float]:
    """Runs tasks with as many in flight as the engine has; the time at which each was known to be done."""
    running: list[Any] = []
    times: list[float] = []
    for index in range(tasks):
        running.append(submit(index))
        while len(running) >= max(4, 2 * workers) or (running and index == tasks - 1):
            done = ready(running)
            times += [time.perf_counter()] * len(done)
            running = [task for task in running if task not in done]
    return times


# ---- where a task's time goes ----


def count_fsyncs(executor: str, workers: int, tasks: int, folder: Path) -> dict[str, float]:
    run = RunFolder(folder)
    fingerprints = TinyWorkflow.of(tasks, workers).plan(run).digests
    fsync, spent = os.fsync, []

    def timed(descriptor: int) -> None:
        started = time.perf_counter()
        fsync(descriptor)
        spent.append(time.perf_counter() - started)

    os.fsync = timed
    outcomes = [
        run_task(Tiny(), run, TaskRequest("tiny", s, frozenset(["tiny"]), fingerprints)) for s in shards(tasks)
    ]
    os.fsync = fsync
    return {
        "in_task_ms": 1000 * statistics.mean(outcome.seconds for outcome in outcomes),
        "fsyncs_per_task": len(spent) / tasks,
        "fsync_ms": 1000 * sum(spent) / tasks,
    }


MODES = {"engine": run_engine, "bare": run_bare, "resume": resume, "fsync": count_fsyncs}


def main() -> None:
    mode, executor, workers, tasks, folder = sys.argv[1:]
    print(json.dumps(MODES[mode](executor, int(workers), int(tasks), Path(folder))))


if __name__ == "__main__":
    main()
