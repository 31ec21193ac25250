"""Runs tasks on Ray: plain Ray tasks for stateless stages, actors for stages that keep a model.

Ray schedules and places; this file submits tasks, collects results, and follows changes of the cluster.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any, cast

from pipeline.errors import PipelineError, first_line
from pipeline.executors.base import ExecutionConfig, Executor
from pipeline.executors.ray_cluster import ClusterNode, Demand, connect, describe, leave, living_nodes, total
from pipeline.executors.ray_head import HeadWatch
from pipeline.executors.ray_nodes import SeeingNodes
from pipeline.executors.ray_pool import UNSEEN, RayWorker, StageActor, Started, WorkerPool, run_here, waits
from pipeline.executors.task import SetupRequest, TaskOutcome, TaskRequest
from pipeline.executors.watchdog import worker_lost
from pipeline.stage import Stage
from pipeline.storage.run_folder import RunFolder

log = logging.getLogger(__name__)

_REFRESH_S = 10.0  # between checks of the cluster
_STARVED_S = 30.0  # after this the user is informed of busy resources
_REPEAT_S = 300.0
_APPEAR_S = 90.0  # how long a network file system may remember that a file was not there
_PAUSE_S = 0.2
_NODE_DIED = "its node has died"  # Ray says only in words why an actor never started


class RayExecutor(Executor):
    """Joins the cluster at `address`, or starts Ray on this machine for the duration of the run."""

    def __init__(self, stages: Sequence[Stage], run: RunFolder, config: ExecutionConfig, address: str | None):
        self.stages = {stage.name: stage for stage in stages}
        self.run = run
        self.config = config
        self.address = address
        self.started = False
        self.nodes: list[ClusterNode] = []
        self.refreshed = 0.0
        self.warned: dict[str, float] = {}
        self.running: dict[Any, tuple[WorkerPool | None, RayWorker | None, TaskRequest | None]] = {}
        self.pools: dict[str, WorkerPool] = {}
        self.demands: dict[str, Demand] = {}
        self.head: HeadWatch | None = None
        self.seeing: SeeingNodes | None = None
        self.unconfirmed: list[tuple[float, TaskOutcome]] = []
        """Finished tasks whose files have not appeared here yet, and until when they may (monotonic clock)."""
        # Before Ray is up only this machine is known; `_refresh` sets the cluster's window.
        self.window = config.max_in_flight_shards or 4

    def expect(self, stages: Sequence[Stage]) -> None:
        if not self.started:
            self._start()
        if self._is_headless():
            return
        for stage in stages:
            request = SetupRequest(stage.name, self.config.task_limit_s)
            pool = self.pools.get(stage.name)
            if pool is not None:
                self._track(pool, pool.begin(request))

    def submit(self, stage: Stage, request: TaskRequest) -> None:
        if not self.started:
            self._start()
        pool = self.pools.get(stage.name)
        if pool is None:
            token = self.seeing.token if self.seeing else None
            reference = self.remote_task[stage.name].remote(self.stage_refs[stage.name], self.run, request, token)
            self.running[reference] = (None, None, request)
        else:
            pool.waiting.append(request)
            if not self._is_headless():
                self._track(pool, pool.feed())

    def _is_headless(self) -> bool:
        """Whether Ray's head is not reached at the moment: calls that need it would block."""
        return self.head is not None and self.head.silent_s > 0

    @property
    def num_tasks(self) -> int:
        given = sum(request is not None for _, _, request in self.running.values())
        return given + sum(len(pool.waiting) for pool in self.pools.values()) + len(self.unconfirmed)

    def wait(self, timeout_s: float) -> list[TaskOutcome]:
        import ray

        if self.head is not None and self._is_headless():
            self.head.check()
            time.sleep(min(timeout_s, _PAUSE_S))
            return []
        if time.monotonic() - self.refreshed > _REFRESH_S:
            self._refresh(self._living_nodes())
        if self.unconfirmed:
            timeout_s = min(timeout_s, _PAUSE_S)
        references = [*self.running, *(self.seeing.questions if self.seeing else ())]
        try:
            ready, _ = ray.wait(references, num_returns=1, timeout=timeout_s) if references else ([], None)
            if ready:  # take all ready ones at once
                ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        except SystemError as error:  # how Ray's C++ passes on what a signal handler raised
            raise error.__cause__ or error from None
        if not references:
            time.sleep(timeout_s)
        outcomes = []
        for reference in ready:
            if reference not in self.running:
                self._answered(reference)
            elif (outcome := self._collect(reference)) is not None:
                outcomes.append(self._seen(outcome))
        return self._confirmed([outcome for outcome in outcomes if outcome is not None])

    def _answered(self, reference: Any) -> None:
        """A node has answered whether it sees the run folder."""
        assert self.seeing is not None
        if self.seeing.take(reference):
            self._leave_blind_nodes()

    def _seen(self, outcome: TaskOutcome) -> TaskOutcome:
        """The outcome; a lost node, if the node does not see the run folder, and then it gets no more work."""
        if self.seeing is None:
            return outcome
        if outcome.unseen and self.seeing.refuse(outcome.node, outcome.unseen):
            self._leave_blind_nodes()
        problem = self.seeing.blind.get(outcome.node, "")
        if problem and outcome.error is not None and outcome.lost != "node":  # whatever it did not find
            return TaskOutcome(outcome.request, error=UNSEEN.format(problem), lost="node", node=outcome.node)
        return outcome

    def _confirmed(self, outcomes: list[TaskOutcome]) -> list[TaskOutcome]:
        """The outcomes whose files are here, earlier ones among them; where they never appear, the node is left."""
        if self.seeing is None:
            return outcomes
        confirmed, until = [], time.monotonic() + _APPEAR_S
        waiting = self.unconfirmed + [(until, outcome) for outcome in outcomes]
        self.unconfirmed = []
        for end, outcome in waiting:
            if outcome.error is not None or self.seeing.are_here(outcome.records.values()):
                confirmed.append(outcome)
            elif outcome.node not in self.seeing.blind and time.monotonic() < end:
                self.unconfirmed.append((end, outcome))
            else:
                problem = "what it committed does not appear here"
                if self.seeing.refuse(outcome.node, problem):
                    self._leave_blind_nodes()
                error = UNSEEN.format(self.seeing.blind[outcome.node])
                confirmed.append(TaskOutcome(outcome.request, error=error, lost="node", node=outcome.node))
        return confirmed

    def _leave_blind_nodes(self) -> None:
        """Gives no more work to nodes that do not see the run folder.

        Raises:
            MachineError: no other node has what a stage needs.
        """
        assert self.seeing is not None
        self._place_on(self.seeing.selector())
        for pool in self.pools.values():
            for worker in [worker for worker in pool.workers if worker.node in self.seeing.blind]:
                pool.drop(worker)
        self._refresh(self._living_nodes())

    def withdraw(self) -> None:
        for pool in self.pools.values():
            pool.waiting.clear()

    def close(self) -> None:
        if not self.started:
            return
        self.started = False
        if self.head is not None and self.head.is_lost:
            self.head.leave()
        else:
            for pool in self.pools.values():
                for worker in pool.workers:
                    pool.drop(worker)
            leave()
        if self.head is not None:
            self.head.stop()
        if self.seeing is not None:
            with suppress(OSError, PipelineError):  # else the next run does
                self.seeing.token.delete()

    def _track(self, pool: WorkerPool, started: list[Started]) -> None:
        for reference, worker, request in started:
            self.running[reference] = (pool, worker, request)

    def _collect(self, reference: Any) -> TaskOutcome | None:
        """The outcome of a task; None if it was the start of a worker."""
        import ray
        from ray.exceptions import ActorUnavailableError, RayError

        pool, worker, request = self.running.pop(reference)
        result, failure = None, None
        try:
            result = ray.get(reference)
        except RayError as error:
            failure = error
        outcome = None
        if request is not None:
            outcome = cast(TaskOutcome, result) if failure is None else self._lost(request, failure, worker)
        if pool is not None and worker is not None:
            if request is not None:
                pool.finish(worker)
            elif failure is None:
                pool.placed(worker, str(result))
                if self.seeing is not None and worker.node in self.seeing.blind:
                    pool.drop(worker)
            elif worker in pool.workers and _NODE_DIED not in str(failure):
                pool.start_failed(failure)
            if failure is not None:
                if isinstance(failure, ActorUnavailableError):
                    worker.node = ""  # unknown; its other tasks are not to blame
                pool.drop(worker)
            self._track(pool, pool.feed())
        return outcome

    def _lost(self, request: TaskRequest, error: Exception, worker: RayWorker | None) -> TaskOutcome:
        """The outcome of a task that Ray could not finish: was the node lost, or only the worker?"""
        from ray.exceptions import (
            ActorUnavailableError,
            NodeDiedError,
            ObjectLostError,
            OutOfMemoryError,
            RayActorError,
            WorkerCrashedError,
        )

        if isinstance(error, NodeDiedError | ObjectLostError | ActorUnavailableError):
            return TaskOutcome(request, error=f"its node was lost: {first_line(error)}", lost="node")
        if isinstance(error, RayActorError):
            assert worker is not None
            left = {node.id for node in self._living_nodes()} - (self.seeing.blind.keys() if self.seeing else set())
            if error.preempted or worker.node not in left:
                return TaskOutcome(request, error="its node was lost", lost="node", node=worker.node)
        if isinstance(error, RayActorError | WorkerCrashedError | OutOfMemoryError):
            return worker_lost(self.run, request, f"the worker died: {first_line(error)}")
        return TaskOutcome(request, error=f"Ray could not run the task: {first_line(error)}")

    def _living_nodes(self) -> list[ClusterNode]:
        with self.head.in_call() if self.head is not None else nullcontext():
            return living_nodes()

    def _start(self) -> None:
        import ray

        nodes = connect(self.config.num_cpus, self.address)
        self.started = True
        self.head = HeadWatch.start(own=self.address is None)
        self.remote_task, self.stage_refs = {}, {}
        if self.address is not None:
            self.seeing = SeeingNodes(self.run)
        for name, stage in self.stages.items():
            demand = self.demands[name] = self.demand(stage, nodes)
            self.stage_refs[name] = ray.put(stage)
            if self._has_pool(stage):
                token = self.seeing.token if self.seeing else None
                self.pools[name] = WorkerPool(stage, self.run, demand, None, self.stage_refs[name], token)
        self._place_on({})
        self._refresh(nodes)

    def _place_on(self, selector: dict[str, str]) -> None:
        """From now on tasks and workers go to nodes with these labels."""
        import ray

        for name in self.stages:
            demand = self.demands[name]
            # The scheduler retries, not Ray: it knows the cause, and Ray retries out-of-memory kills without end.
            placement: dict[str, Any] = {
                "num_cpus": demand.get("CPU", 0),
                "num_gpus": demand.get("GPU", 0),
                "resources": {key: amount for key, amount in demand.items() if key not in ("CPU", "GPU")},
                **({"label_selector": selector} if selector else {}),
            }
            if name not in self.pools:
                self.remote_task[name] = ray.remote(run_here).options(max_retries=0, name=name, **placement)
            else:
                actor = ray.remote(StageActor).options(max_concurrency=self.pools[name].slots, **placement)
                self.pools[name].actor_class = actor

    def _has_pool(self, stage: Stage) -> bool:
        """Whether the stage has long-lived workers. One that only imports large packages, or that waits rather than
        computes, has them on a Ray that was started here, so that no more processes start than there are CPUs: in a
        cluster its waiting tasks are the demand that an autoscaler sees, and Ray places each."""
        return stage.max_workers is not None or (self.address is None and (bool(stage.modules) or waits(stage)))

    def demand(self, stage: Stage, nodes: list[ClusterNode]) -> Demand:
        """Resources that a task or worker of the stage requests; without a cluster at most those of this machine."""
        wanted, joined = stage.resources, self.address is not None
        gpus = wanted.num_gpus
        if gpus is None or not joined:
            gpus = min(1.0 if gpus is None else gpus, total(nodes, "GPU"))
        # Workers live as long as there is work. Without a GPU they reserve no CPU: they would starve the tasks.
        cpus = 0.0 if self._has_pool(stage) and not gpus else wanted.num_cpus
        largest = max((node.resources.get("CPU", 0.0) for node in nodes), default=0.0)
        own = wanted.custom or ({} if gpus else self.config.resources)
        demand = {"CPU": min(cpus, largest or cpus), "GPU": gpus, **(own if joined else {})}
        return {name: amount for name, amount in demand.items() if amount}

    def _refresh(self, nodes: list[ClusterNode]) -> None:
        """Follows the cluster: window, number of workers, idle workers, tasks that no node can run."""
        if self.seeing is not None:
            self.seeing.ask(nodes)
            self.seeing.require(nodes, self.demands)
            nodes = self.seeing.seeing(nodes)
        self.nodes, self.refreshed = nodes, time.monotonic()
        for pool in self.pools.values():
            pool.resize(nodes)
            pool.release_idle(self.config.idle_release_s)
            self._track(pool, pool.feed())
        limits = [pool.limit for pool in self.pools.values() if not waits(pool.stage)]
        workers = max(1.0, total(nodes, "CPU")) + sum(limits)
        self.window = self.config.max_in_flight_shards or max(4, 2 * int(workers))
        for name in {request.stage for _, _, request in self.running.values() if request} | set(self.pools):
            self._warn_missing(name)

    def _warn_missing(self, name: str) -> None:
        """Warns about the resources that a stage waits for, if no node has them or they have been busy for long."""
        demand, pool = self.demands[name], self.pools.get(name)
        starved = pool.starved_s() if pool else 0.0
        possible = not demand or any(node.room(demand) for node in self.nodes)
        idle = pool is not None and not pool.waiting
        if idle or (possible and starved < _STARVED_S) or time.monotonic() < self.warned.get(name, 0.0):
            return
        self.warned[name] = time.monotonic() + _REPEAT_S
        why = "all that have it are busy" if possible else "none has it"
        log.warning("%s waits for a node with %s: of %d nodes %s", name, describe(demand), len(self.nodes), why)
