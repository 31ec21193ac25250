"""Runs tasks in processes of this machine, without Ray. Same tasks, same results."""

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from pipeline.executors.base import ExecutionConfig, Executor, usable_cpus
from pipeline.executors.local_worker import WorkerProcess, warm_up
from pipeline.executors.task import Setup, SetupRequest, TaskOutcome, TaskRequest
from pipeline.executors.watchdog import worker_lost
from pipeline.stage import Stage
from pipeline.storage.run_folder import RunFolder


class LocalExecutor(Executor):
    """Each worker has one process; one that keeps a model takes several tasks, as it does on Ray."""

    def __init__(self, stages: Sequence[Stage], run: RunFolder, config: ExecutionConfig):
        self.run = run
        self.limit_s = config.task_limit_s
        self.gpus = visible_gpus()
        self.num_cpus = config.num_cpus or usable_cpus()
        stateless = [s for s in stages if s.max_workers is None and s.resources.num_cpus >= 1]
        self.forked = any(stage.modules for stage in stages)
        shared = _Pool([WorkerProcess(None, forked=self.forked) for _ in range(self.num_cpus)])
        self.order = [stage.name for stage in stages]
        self.pools = {s.name: shared if s in stateless else self._own_pool(s) for s in stages}
        self.workers = [worker for pool in {*self.pools.values(), shared} for worker in pool.workers]
        self.modules = {s.name: (type(s).__module__, *s.modules) for s in stages if s.modules}
        self.window = config.max_in_flight_shards or max(4, 2 * len(self.workers))

    def _own_pool(self, stage: Stage) -> "_Pool":
        """Processes of a stage that waits rather than computes, so that others compute meanwhile; or one worker per
        GPU, or fraction of a GPU, for a stage whose workers keep their models."""
        if stage.max_workers is None:
            return _Pool([WorkerProcess(None, forked=self.forked) for _ in range(self.num_cpus)])
        num_gpus = stage.resources.num_gpus
        gpus = [None] if not self.gpus or num_gpus == 0 else self.gpus * max(1, int(1 / (num_gpus or 1)))
        count = stage.max_workers or len(gpus)
        slots = stage.tasks_per_worker
        return _Pool([WorkerProcess(gpus[i % len(gpus)], slots, forked=self.forked) for i in range(count)])

    def expect(self, stages: Sequence[Stage]) -> None:
        if not self.modules.keys().isdisjoint(stage.name for stage in stages):
            warm_up(list(dict.fromkeys(module for modules in self.modules.values() for module in modules)))
        for stage in stages:
            request = SetupRequest(stage.name, self.limit_s)
            worker = next((w for w in self.pools[stage.name].workers if stage.name not in w.set_up), None)
            if worker is not None:
                worker.set_up.add(stage.name)
                worker.give((stage, self.run, request))

    @property
    def num_tasks(self) -> int:
        given = sum(len(worker.tasks) for worker in self.workers)
        return given + sum(len(pool.waiting) for pool in set(self.pools.values()))

    def submit(self, stage: Stage, request: TaskRequest) -> None:
        pool = self.pools[stage.name]
        pool.waiting.append((stage, request))
        self._feed(pool)

    def _feed(self, pool: "_Pool") -> None:
        """Hands waiting tasks to workers, those of later stages first, so that shards are finished before others are
        begun: to workers with the fewest tasks first, and to those that have a process."""
        while pool.waiting:
            stage, request = max(pool.waiting, key=lambda work: self.order.index(work[0].name))
            free = [worker for worker in pool.workers if worker.can_take(request)]
            if not free:
                return
            pool.waiting.remove((stage, request))
            worker = min(free, key=lambda w: (len(w.tasks), w.process is None, len(w.given)))
            worker.give((stage, self.run, request))

    def wait(self, timeout_s: float) -> list[TaskOutcome]:
        for pool in set(self.pools.values()):
            self._feed(pool)
        outcomes: list[TaskOutcome] = []
        busy = [worker for worker in self.workers if worker.given]
        ends = [end for worker in busy for end in worker.ends]
        wait(ends, timeout=timeout_s)
        for worker in busy:
            answers, lost = worker.answers()
            outcomes += [answer for answer in answers if not isinstance(answer, Setup)]
            outcomes += [worker_lost(self.run, request, _DIED) for request in lost]
        return outcomes

    def withdraw(self) -> None:
        for pool in self.pools.values():
            pool.waiting.clear()

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()


_DIED = "the worker process died (killed, or out of memory)"


@dataclass(eq=False)
class _Pool:
    """Workers, and the tasks that wait for one of them."""

    workers: list[WorkerProcess]
    waiting: deque[tuple[Stage, TaskRequest]] = field(default_factory=deque)


def visible_gpus() -> list[str]:
    """GPU ids in the form of CUDA_VISIBLE_DEVICES; the driver itself never loads CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu and gpu != "-1"]
    devices = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*")]
    return sorted(name for name in devices if name.isdigit())
