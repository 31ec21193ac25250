"""Runs tasks on Ray: plain Ray tasks for stateless stages, actors for stages that keep a model.

Ray schedules, retries lost workers and places GPUs; this file only hands over tasks and collects results.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from pipeline.errors import MachineError
from pipeline.executors.base import ExecutionConfig, Executor, usable_cpus
from pipeline.runfolder import RunFolder
from pipeline.stage import Stage
from pipeline.task import TaskOutcome, TaskRequest, run_task

log = logging.getLogger(__name__)

_TASK_RETRIES = 3
_PREFETCH = 1  # tasks that wait in an actor, beside those it runs
_PROBE_TIMEOUT_S = 10.0
_OBJECT_STORE_BYTES = 256 * 2**20  # data travels through files; the object store only carries descriptors


class RayExecutor(Executor):
    """Joins the cluster at `address`, or starts Ray on this machine for the length of the run."""

    def __init__(self, stages: Sequence[Stage], run: RunFolder, config: ExecutionConfig, address: str | None):
        self.stages = {stage.name: stage for stage in stages}
        self.run = run
        self.config = config
        self.address = address
        self.started = False
        self.running: dict[Any, tuple[_Pool | None, _Worker | None, TaskRequest]] = {}
        self.pools: dict[str, _Pool] = {}
        # Before Ray is up only this machine is known; `_start` sets the cluster's window.
        self.window = config.max_in_flight_shards or 4

    def submit(self, stage: Stage, request: TaskRequest) -> None:
        if not self.started:
            self._start()
        pool = self.pools.get(stage.name)
        if pool is None:
            reference = self.remote_task[stage.name].remote(self.stage_refs[stage.name], self.run, request)
            self.running[reference] = (None, None, request)
        else:
            pool.waiting.append(request)
            self._feed(pool)

    @property
    def num_tasks(self) -> int:
        return len(self.running) + sum(len(pool.waiting) for pool in self.pools.values())

    def wait(self, timeout_s: float) -> list[TaskOutcome]:
        import ray

        ready, _ = ray.wait(list(self.running), num_returns=1, timeout=timeout_s)
        if ready:  # take all that are ready by now, in one go
            ready, _ = ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        return [self._collect(reference) for reference in ready]

    def withdraw(self) -> None:
        for pool in self.pools.values():
            pool.waiting.clear()

    def close(self) -> None:
        if not self.started:
            return
        import ray
        from ray.exceptions import RayError

        for pool in self.pools.values():
            for worker in pool.workers:
                with contextlib.suppress(RayError):
                    ray.kill(worker.actor)
        ray.shutdown()
        self.started = False

    def _collect(self, reference: Any) -> TaskOutcome:
        import ray
        from ray.exceptions import RayActorError, RayError

        pool, worker, request = self.running.pop(reference)
        if worker is not None:
            worker.num_running -= 1
        try:
            outcome = cast(TaskOutcome, ray.get(reference))
        except RayActorError as error:
            assert pool is not None
            pool.workers = [w for w in pool.workers if w is not worker]
            outcome = TaskOutcome(request, error=f"the worker died: {_first_line(error)}")
        except RayError as error:
            outcome = TaskOutcome(request, error=f"Ray could not run the task: {_first_line(error)}")
        if pool is not None:
            self._feed(pool)
        return outcome

    def _feed(self, pool: "_Pool") -> None:
        """Hands waiting tasks to the least busy worker; adds a worker while all are busy and more are allowed."""
        while pool.waiting:
            worker = min(pool.workers, key=lambda w: w.num_running, default=None)
            if (worker is None or worker.num_running) and len(pool.workers) < pool.max_workers:
                worker = _Worker(pool.actor_class.remote(pool.stage, self.run))
                pool.workers.append(worker)
            if worker is None or worker.num_running >= pool.stage.tasks_per_worker + _PREFETCH:
                return
            request = pool.waiting.popleft()
            reference = worker.actor.process.remote(request)
            worker.num_running += 1
            self.running[reference] = (pool, worker, request)

    def _start(self) -> None:
        import ray

        num_cpus, num_gpus = connect(self.config.num_cpus, self.address)
        self.started = True
        self.remote_task, self.stage_refs = {}, {}
        remote = ray.remote(run_task)
        actor_class = ray.remote(_StageActor)
        for name, stage in self.stages.items():
            gpus = _gpus_of(stage, num_gpus)
            if stage.max_workers is None:
                self.stage_refs[name] = ray.put(stage)
                self.remote_task[name] = remote.options(
                    num_cpus=min(stage.resources.num_cpus, num_cpus),
                    num_gpus=gpus,
                    max_retries=_TASK_RETRIES,
                    name=name,
                )
            else:
                # Workers live as long as the run. Off the GPU they reserve no CPU: they would starve the tasks.
                options = actor_class.options(
                    num_cpus=stage.resources.num_cpus if gpus else 0,
                    num_gpus=gpus,
                    max_restarts=_TASK_RETRIES,
                    max_task_retries=_TASK_RETRIES,
                    max_concurrency=stage.tasks_per_worker,
                )
                limit = stage.max_workers or max(1, int(num_gpus / gpus) if gpus else 1)
                self.pools[name] = _Pool(stage, options, limit)
        workers = num_cpus + sum(pool.max_workers for pool in self.pools.values())
        self.window = self.config.max_in_flight_shards or max(4, 2 * int(workers))


def _gpus_of(stage: Stage, cluster_gpus: float) -> float:
    """GPUs of one worker: as the stage says; by default one, where the cluster has any."""
    if not cluster_gpus:
        return 0.0
    return 1.0 if stage.resources.num_gpus is None else stage.resources.num_gpus


@dataclass(slots=True, eq=False)
class _Worker:
    actor: Any
    num_running: int = 0


@dataclass(slots=True, eq=False)
class _Pool:
    stage: Stage
    actor_class: Any
    max_workers: int
    workers: list[_Worker] = field(default_factory=list)
    waiting: deque[TaskRequest] = field(default_factory=deque)


class _StageActor:
    """Keeps a stage, and the models it loaded, across shards."""

    def __init__(self, stage: Stage, run: RunFolder):
        self.stage = stage
        self.run = run

    def process(self, request: TaskRequest) -> TaskOutcome:
        return run_task(self.stage, self.run, request)


def connect(num_cpus: int | None, address: str | None) -> tuple[float, float]:
    """Joins or starts Ray; returns the cluster's CPUs and GPUs.

    A local Ray runs without a dashboard, and with Ray's default: token authentication on every port.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_enable_metrics_collection", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default Ray ends workers that are idle for a second, and their successors load all packages again.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "86400000")
    import ray

    on_terminate = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ray").setLevel(logging.ERROR)  # or it warns that authentication is on, as it should be
    started = time.perf_counter()
    try:
        _probe(address)
        if address is not None:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            os.environ.pop("RAY_ADDRESS", None)
            ray.init(
                address="local",
                num_cpus=num_cpus or usable_cpus(),
                include_dashboard=False,
                dashboard_host="127.0.0.1",
                object_store_memory=_OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"--address {address}" if address else "a local Ray"
        raise MachineError(
            f"{where}: cannot be reached or started ({_first_line(error)}); check the address, or use --executor local"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init put its own handler there
    resources = ray.cluster_resources()
    log.debug("Ray is up after %.1f s: %s", time.perf_counter() - started, resources)
    return resources.get("CPU", 1.0), resources.get("GPU", 0.0)


def _probe(address: str | None) -> None:
    """Refuses an address where nobody listens; Ray itself would try for minutes.

    Raises:
        OSError: no connection.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT_S).close()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
