"""Runs tasks in processes of this machine, without Ray. Same tasks, same results."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path

from pipeline.executors.base import ExecutionConfig, Executor, usable_cpus
from pipeline.executors.task import TaskOutcome, TaskRequest
from pipeline.executors.watchdog import run_watched, worker_lost
from pipeline.signals import stop_signals_held
from pipeline.stage import Stage
from pipeline.storage.run_folder import RunFolder


class LocalExecutor(Executor):
    """Each worker has one process and one task, so the death of a worker is attributed to its task."""

    def __init__(self, stages: Sequence[Stage], run: RunFolder, config: ExecutionConfig):
        self.run = run
        self.gpus = visible_gpus()
        num_cpus = config.num_cpus or usable_cpus()
        shared = _Pool([_Worker(gpu=None) for _ in range(num_cpus)])
        self.pools = {s.name: shared if s.max_workers is None else self._own_pool(s) for s in stages}
        self.workers = [worker for pool in {*self.pools.values(), shared} for worker in pool.workers]
        self.window = config.max_in_flight_shards or max(4, 2 * len(self.workers))
        self.running: dict[Future[TaskOutcome], tuple[_Pool, _Worker, TaskRequest]] = {}

    def _own_pool(self, stage: Stage) -> "_Pool":
        """One worker per GPU, or fraction of a GPU, for a stage whose workers keep their models."""
        num_gpus = stage.resources.num_gpus
        slots = [None] if not self.gpus or num_gpus == 0 else self.gpus * max(1, int(1 / (num_gpus or 1)))
        count = stage.max_workers or len(slots)
        return _Pool([_Worker(gpu=slots[i % len(slots)]) for i in range(count)])

    @property
    def num_tasks(self) -> int:
        return len(self.running) + sum(len(pool.waiting) for pool in set(self.pools.values()))

    def submit(self, stage: Stage, request: TaskRequest) -> None:
        pool = self.pools[stage.name]
        pool.waiting.append((stage, request))
        self._feed(pool)

    def _feed(self, pool: "_Pool") -> None:
        """Hands waiting tasks to idle workers; workers with a running process come first."""
        while pool.waiting and pool.idle:
            worker = max(pool.idle, key=lambda worker: worker.process is not None)
            pool.idle.remove(worker)
            stage, request = pool.waiting.popleft()
            self.running[worker.submit(stage, self.run, request)] = (pool, worker, request)

    def wait(self, timeout_s: float) -> list[TaskOutcome]:
        for pool in set(self.pools.values()):
            self._feed(pool)
        done, _ = wait(self.running, timeout=timeout_s, return_when=FIRST_COMPLETED)
        outcomes = []
        for future in done:
            pool, worker, request = self.running.pop(future)
            try:
                outcomes.append(future.result())
            except BrokenProcessPool:
                worker.stop()
                outcomes.append(worker_lost(self.run, request, "the worker process died (killed, or out of memory)"))
            pool.idle.append(worker)
        return outcomes

    def withdraw(self) -> None:
        for pool in self.pools.values():
            pool.waiting.clear()

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()


@dataclass(eq=False)
class _Pool:
    """Workers, and the tasks that wait for one of them."""

    workers: list["_Worker"]
    waiting: deque[tuple[Stage, TaskRequest]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.idle = list(self.workers)


class _Worker:
    """A process that starts with its first task, and again after its death."""

    def __init__(self, gpu: str | None):
        self.gpu = gpu
        self.process: ProcessPoolExecutor | None = None

    def submit(self, stage: Stage, run: RunFolder, request: TaskRequest) -> Future[TaskOutcome]:
        if self.process is not None:
            try:
                return self.process.submit(run_watched, stage, run, request)
            except BrokenProcessPool:  # it was killed while it was idle
                self.stop()
        with stop_signals_held():
            resource_tracker.ensure_running()  # its start unblocks some of the signals
        with stop_signals_held():
            self.process = ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self.gpu,),
            )
            return self.process.submit(run_watched, stage, run, request)

    def stop(self) -> None:
        """Kills the process; its unfinished files have temporary names."""
        if self.process is None:
            return
        processes = list((self.process._processes or {}).values())
        self.process.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        for process in processes:
            process.join(timeout=5)
        self.process = None


def _start_worker(gpu: str | None) -> None:
    """Pins the worker to its GPU, and ends it when the driver has ended for any reason."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-driver").start()


def visible_gpus() -> list[str]:
    """GPU ids in the form of CUDA_VISIBLE_DEVICES; the driver itself never loads CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu and gpu != "-1"]
    devices = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*")]
    return sorted(name for name in devices if name.isdigit())
