"""Runs tasks in processes of this machine, without Ray. Same tasks, same results."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from pipeline.executors.base import ExecutionConfig, Executor, usable_cpus
from pipeline.runfolder import RunFolder
from pipeline.stage import Stage
from pipeline.task import TaskOutcome, TaskRequest, run_task


class LocalExecutor(Executor):
    """One process pool for stateless stages, and one process for each worker of a stage that keeps models."""

    def __init__(self, stages: Sequence[Stage], run: RunFolder, config: ExecutionConfig):
        self.run = run
        self.num_cpus = config.num_cpus or usable_cpus()
        self.gpus = visible_gpus()
        self.pools: dict[str, list[_Pool]] = {}
        shared = _Pool(self.num_cpus, gpu=None)
        for stage in stages:
            self.pools[stage.name] = [shared] if stage.max_workers is None else self._own_pools(stage)
        workers = self.num_cpus + sum(len(p) for p in self.pools.values() if p != [shared])
        self.window = config.max_in_flight_shards or max(4, 2 * workers)
        self.running: dict[Future[TaskOutcome], tuple[_Pool, int, TaskRequest]] = {}

    def _own_pools(self, stage: Stage) -> list["_Pool"]:
        num_gpus = stage.resources.num_gpus
        slots = [None] if not self.gpus or num_gpus == 0 else self.gpus * max(1, int(1 / (num_gpus or 1)))
        count = stage.max_workers or len(slots)
        return [_Pool(1, gpu=slots[i % len(slots)]) for i in range(count)]

    def submit(self, stage: Stage, request: TaskRequest) -> None:
        pool = min(self.pools[stage.name], key=lambda p: p.num_running)
        future = pool.submit(stage, self.run, request)
        self.running[future] = (pool, pool.generation, request)

    def wait(self) -> list[TaskOutcome]:
        done, _ = wait(self.running, timeout=10, return_when=FIRST_COMPLETED)
        outcomes = []
        for future in done:
            pool, generation, request = self.running.pop(future)
            pool.num_running -= 1
            try:
                outcomes.append(future.result())
            except BrokenProcessPool:
                if pool.generation == generation:  # one death breaks every task of the pool, restart it once
                    pool.restart()
                outcomes.append(TaskOutcome(request, error="a worker process died (killed, or out of memory)"))
        return outcomes

    def close(self) -> None:
        for pools in self.pools.values():
            for pool in pools:
                pool.stop()


class _Pool:
    """A process pool that can be started again after a worker was killed."""

    def __init__(self, size: int, gpu: str | None):
        self.size = size
        self.gpu = gpu
        self.num_running = 0
        self.generation = 0
        self.processes: ProcessPoolExecutor | None = None

    def submit(self, stage: Stage, run: RunFolder, request: TaskRequest) -> Future[TaskOutcome]:
        self.num_running += 1
        for attempt in range(2):
            if self.processes is None:
                self.processes = ProcessPoolExecutor(
                    self.size,
                    mp_context=multiprocessing.get_context("spawn"),
                    initializer=_start_worker,
                    initargs=(self.gpu,),
                )
            try:
                return self.processes.submit(run_task, stage, run, request)
            except BrokenProcessPool:
                if attempt:
                    raise
                self.restart()
        raise AssertionError("unreachable")

    def restart(self) -> None:
        self.generation += 1
        if self.processes is not None:
            self.processes.shutdown(wait=False, cancel_futures=True)
            self.processes = None

    def stop(self) -> None:
        if self.processes is None:
            return
        workers = list((self.processes._processes or {}).values())
        self.processes.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(timeout=5)
        self.processes = None


def _start_worker(gpu: str | None) -> None:
    """Pins the worker to its GPU, and ends it when the driver is gone, however it died."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-driver").start()


def visible_gpus() -> list[str]:
    """GPU ids as CUDA_VISIBLE_DEVICES takes them; the driver itself never loads CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu and gpu != "-1"]
    devices = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*")]
    return sorted(name for name in devices if name.isdigit())
