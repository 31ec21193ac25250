"""What the engine costs in addition to the work: time per task, start-up, memory of the driver, and resuming.

    python -m benchmarks.engine --out benchmarks/results/engine.json

A task writes a file of one line. The engine then checks, commits and records it durably and continues. The limit is
the same two files (data and record), written as durably by bare tasks: `concurrent.futures` for the local executor,
Ray tasks for Ray. Every run has its own process and a fresh folder; kinds of runs take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import report

EXECUTORS = ("local", "ray")
FEW = 100  # shards of the run whose memory the long run's is compared with
NOTES = [
    "ms_per_task: wall time between the first and the last finished task, by task; in_task_ms: of it inside the "
    "worker, by task and worker; bare: the same files written as durably by tasks without the engine",
    "start_s: from the call to the first finished task, imports included",
    "driver_peak_mib: peak resident memory of the process that schedules",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/engine.json")
    parser.add_argument("--dir", type=Path, help="where to put the temporary files; default: the system's")
    parser.add_argument("--tasks", type=int, default=300, help="tasks per run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many", type=int, default=10_000, help="shards of the long run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        runs = Runs(Path(folder))
        kinds = [(mode, executor, n) for executor in EXECUTORS for n in (1, 2) for mode in ("bare", "engine")]
        for _ in range(args.rounds):
            for mode, executor, workers in kinds:
                runs.measure(mode, executor, workers, args.tasks)
        for executor in reversed(EXECUTORS):
            runs.measure("engine", executor, 2, FEW)
            finished = runs.measure("engine", executor, 2, args.many)
        runs.measure("resume", "local", 2, args.many, finished)
        runs.measure("fsync", "none", 1, args.tasks)
        rows = [*runs.medians(), *runs.differences(args.tasks, args.many)]
        report("engine", rows, runs.ratios(args.tasks), args.out, ["imagen-precompute", "ray"], NOTES)


class Runs:
    """Runs of engine_run.py, and the medians of what they report."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[tuple[str, str, int, int], list[dict[str, float]]] = {}

    def measure(self, mode: str, executor: str, workers: int, tasks: int, folder: Path | None = None) -> Path:
        folder = folder or self.folder / str(len(list(self.folder.iterdir())))
        command = [sys.executable, "-m", "benchmarks.engine_run", mode, executor, *map(str, (workers, tasks, folder))]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE)
        self.found.setdefault((mode, executor, workers, tasks), []).append(json.loads(done.stdout.splitlines()[-1]))
        return folder

    def median(self, value: str, *key: Any) -> float:
        return statistics.median(found[value] for found in self.found[key])

    def medians(self) -> Iterator[dict[str, Any]]:
        for key, found in self.found.items():
            yield named(*key) | {value: round(self.median(value, *key), 3) for value in found[0]}

    def differences(self, tasks: int, many: int) -> Iterator[dict[str, Any]]:
        for executor in EXECUTORS:
            for workers in (1, 2):
                ms = [self.median("ms_per_task", mode, executor, workers, tasks) for mode in ("engine", "bare")]
                yield named("engine - bare", executor, workers, tasks) | {"ms_per_task": round(ms[0] - ms[1], 3)}
            mib = [self.median("driver_peak_mib", "engine", executor, 2, n) for n in (many, FEW)]
            yield named("many - few", executor, 2, many - FEW) | {"driver_peak_mib": round(mib[0] - mib[1], 2)}

    def ratios(self, tasks: int) -> dict[str, float]:
        ratios = {}
        for workers in (1, 2):
            local, ray = (self.median("ms_per_task", "engine", executor, workers, tasks) for executor in EXECUTORS)
            for executor, ms in zip(EXECUTORS, (local, ray), strict=True):
                bare = self.median("ms_per_task", "bare", executor, workers, tasks)
                ratios[f"ms a task, {workers} workers: {executor} / {executor} bare"] = ms / bare
            ratios[f"ms a task, {workers} workers: ray / local"] = ray / local
        fsync, whole = (self.median(value, "fsync", "none", 1, tasks) for value in ("fsync_ms", "in_task_ms"))
        ratios["ms in a task: fsync / all"] = fsync / whole
        return {name: round(value, 2) for name, value in ratios.items()}


def named(*key: Any) -> dict[str, Any]:
    return dict(zip(("what", "executor", "workers", "tasks"), key, strict=True))


if __name__ == "__main__":
    main()
