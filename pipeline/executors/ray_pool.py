"""Long-lived Ray workers of one stage: the first is started with the run and others while tasks wait; stopped when
idle, replaced when they die."""

import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import MachineError, first_line
from pipeline.executors.process import prepare_process
from pipeline.executors.ray_cluster import ClusterNode, Demand, total
from pipeline.executors.ray_nodes import Token
from pipeline.executors.task import SetupRequest, TaskOutcome, TaskRequest
from pipeline.executors.watchdog import run_watched, set_up_watched
from pipeline.stage import Stage
from pipeline.storage.run_folder import RunFolder

_PREFETCH = 1  # tasks that wait in a worker, in addition to those that it runs
_MAX_FAILED_STARTS = 3
UNSEEN = "its node does not see the run folder: {}"


@dataclass(slots=True, eq=False)
class RayWorker:
    """An actor; it receives tasks once its node is known."""

    actor: Any
    node: str = ""
    num_running: int = 0
    alone: bool = False
    """It runs a task that must run without others."""
    since: float = field(default_factory=time.monotonic)
    """Start of its present wait, for a node or for a task (monotonic clock)."""


Started = tuple[Any, RayWorker, TaskRequest | None]
"""An object reference to wait for, its worker, and the task; None stands for the start of the worker itself."""


def waits(stage: Stage) -> bool:
    """Whether the stage keeps no model and waits rather than computes, so that a process may run several tasks."""
    return stage.max_workers is None and 0 < stage.resources.num_cpus < 1


class WorkerPool:
    """Hands tasks to workers. More workers are requested from Ray only while tasks wait: an autoscaler sees the
    pending ones as demand."""

    def __init__(
        self,
        stage: Stage,
        run: RunFolder,
        demand: Demand,
        actor_class: Any,
        stage_ref: Any,
        token: Token | None = None,
    ):
        self.stage = stage
        self.run = run
        self.token = token
        self.demand = demand
        self.actor_class = actor_class
        self.stage_ref = stage_ref
        self.slots = int(1 / stage.resources.num_cpus) if waits(stage) else stage.tasks_per_worker
        """Tasks that a worker runs at once."""
        self.limit = 1
        self.failed_starts = 0
        self.workers: list[RayWorker] = []
        self.waiting: deque[TaskRequest] = deque()

    def resize(self, nodes: list[ClusterNode]) -> None:
        """Sets the maximum of workers: the stage's own, else as many as fit on the nodes' GPUs, else one, or one for
        each CPU if they keep no model."""
        room = sum(node.room(self.demand) for node in nodes) if "GPU" in self.demand else 1
        if self.stage.max_workers is None:
            room = int(total(nodes, "CPU"))
        self.limit = self.stage.max_workers or max(1, room)

    def begin(self, request: SetupRequest) -> list[Started]:
        """Starts a worker before there is a task for it, which then loads packages and models. Of workers that keep a
        model the others start while tasks wait for them, as an autoscaler expects."""
        if len(self.workers) >= (self.limit if self.stage.max_workers is None else 1):
            return []
        started = self._start_worker()
        started[1].actor.set_up.remote(request)
        return [started]

    def _start_worker(self) -> Started:
        worker = RayWorker(self.actor_class.remote(self.stage_ref, self.run, self.token))
        self.workers.append(worker)
        return worker.actor.node.remote(), worker, None

    def feed(self) -> list[Started]:
        """Adds workers for tasks that no idle one can take, and hands waiting tasks to the least busy worker."""
        started: list[Started] = []
        free = sum(not worker.num_running for worker in self.workers)  # idle, or waiting for a node
        for _ in range(min(self.limit - len(self.workers), len(self.waiting) - free)):
            started.append(self._start_worker())
        while self.waiting:
            placed = (worker for worker in self.workers if worker.node and not worker.alone)
            worker = min(placed, key=lambda w: w.num_running, default=None)
            alone = self.waiting[0].alone
            if worker is None or worker.num_running >= (1 if alone else self.slots + _PREFETCH):
                return started
            request = self.waiting.popleft()
            worker.num_running += 1
            worker.alone = alone
            started.append((worker.actor.process.remote(request), worker, request))
        return started

    def finish(self, worker: RayWorker) -> None:
        """A task of the worker has ended."""
        worker.num_running -= 1
        worker.alone = False
        worker.since = time.monotonic()

    def placed(self, worker: RayWorker, node: str) -> None:
        """The worker has started on this node."""
        worker.node, worker.since = node, time.monotonic()
        self.failed_starts = 0

    def start_failed(self, error: Exception) -> None:
        """A worker could not be started.

        Raises:
            MachineError: nor could the previous ones.
        """
        self.failed_starts += 1
        if self.failed_starts >= _MAX_FAILED_STARTS:
            raise MachineError(f"{self.stage.name}: its workers cannot be started on Ray: {first_line(error)}")

    def drop(self, worker: RayWorker) -> None:
        """Stops a worker; `feed` starts another one if it is needed."""
        import ray
        from ray.exceptions import RayError

        self.workers = [w for w in self.workers if w is not worker]
        with contextlib.suppress(RayError):
            ray.kill(worker.actor)

    def release_idle(self, idle_s: float) -> None:
        """Stops workers that have been idle for this long, so that their node can be released."""
        if not self.waiting:
            for worker in self.workers:
                if not worker.num_running and time.monotonic() - worker.since > idle_s:
                    self.drop(worker)

    def starved_s(self) -> float:
        """Seconds for which tasks have waited for a worker that Ray could not place."""
        if not self.waiting:
            return 0.0
        return max((time.monotonic() - worker.since for worker in self.workers if not worker.node), default=0.0)


class StageActor:
    """Keeps a stage, and the models it loaded, across shards."""

    def __init__(self, stage: Stage, run: RunFolder, token: Token | None):
        self.stage = stage
        self.run = run
        self.token = token

    def node(self) -> str:
        """Id of its node."""
        return node_id()

    def set_up(self, request: SetupRequest) -> None:
        """Loads packages and models, before there is a task."""
        set_up_here(self.stage, self.run, request, self.token)

    def process(self, request: TaskRequest) -> TaskOutcome:
        return run_here(self.stage, self.run, request, self.token)


def run_here(stage: Stage, run: RunFolder, request: TaskRequest, token: Token | None) -> TaskOutcome:
    """Runs the task in this Ray process and records the node; does not begin it without the token of the run."""
    prepare_process()
    unseen = token.problem_now() if token is not None else ""
    if unseen:
        return TaskOutcome(request, error=UNSEEN.format(unseen), lost="node", node=node_id(), unseen=unseen)
    outcome = run_watched(stage, run, request)
    outcome.node = node_id()
    return outcome


def set_up_here(stage: Stage, run: RunFolder, request: SetupRequest, token: Token | None) -> None:
    """Loads packages and models in this Ray process, unless its node does not see the run folder."""
    prepare_process()
    if token is None or not token.problem_now():
        set_up_watched(stage, run, request)


def node_id() -> str:
    """Id of this process's node."""
    import ray

    return ray.get_runtime_context().get_node_id()
