"""Runs tasks on a simulated clock: the scheduler is real, the work is only counted.

Stages run in shared processes or in their own workers, and each process loads a stage before its first task. Tasks
that together need more of a resource (CPUs, GPUs, network) than is available slow each other down. Nodes may be lost
and come back, and tasks may fail.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.executors.base import Executor
from pipeline.executors.task import TaskOutcome, TaskRequest
from pipeline.stage import Stage
from pipeline.storage.record import Record


@dataclass(frozen=True, slots=True)
class SimulatedStage:
    """The costs of a stage."""

    name: str
    after: tuple[str, ...]
    """Stages whose groups it reads."""
    start_s: float
    """Seconds before a worker's first task: process start, packages, models."""
    shard_s: float
    """Fixed seconds of a task that has the machine to itself."""
    row_s: float
    """Seconds per row, in addition."""
    uses: Mapping[str, float]
    """Amount of each resource that a running task uses, e.g. `cpus` 1.9."""
    workers: int | None = None
    """Number of its own workers; None means that it runs in the shared processes."""
    slots: float = 1.0
    """Shared processes that a task occupies."""

    def seconds(self, rows: float) -> float:
        return self.shard_s + rows * self.row_s


@dataclass(frozen=True, slots=True)
class SimulatedCluster:
    """What the stages share."""

    capacity: Mapping[str, float]
    """Amount of each resource."""
    processes: float
    """Number of shared processes."""
    window: int
    """Shards in flight."""
    nodes: int = 1
    """Number of equal nodes that all this is spread over."""


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """A node is lost, with all tasks that it runs, or comes back."""

    at_s: float
    node: int
    comes: bool


@dataclass(frozen=True, slots=True)
class TaskOutcomeModel:
    """How one task deviates from its stage's costs."""

    stretch: float = 1.0
    """Factor on its seconds."""
    error: str | None = None
    """It fails with this message at the end of its time; None means that it succeeds."""


@dataclass(slots=True)
class SimulationResult:
    """Times and resources of the simulated run."""

    seconds: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)
    """Worker seconds of each stage, without start-up."""
    lost_s: dict[str, float] = field(default_factory=dict)
    """The part of `busy_s` spent in tasks that failed or were lost with their node."""
    offered_s: dict[str, float] = field(default_factory=dict)
    """Available worker seconds of each stage with its own workers, and of the shared processes: ``""``."""
    used: dict[str, float] = field(default_factory=dict)
    """Resource -> amount x seconds."""


class SimulatedExecutor(Executor):
    """Finishes tasks in the order in which they would end. Deterministic."""

    def __init__(
        self,
        simulated_stages: Sequence[SimulatedStage],
        cluster: SimulatedCluster,
        *,
        outcome_model: Callable[[TaskRequest], TaskOutcomeModel] = lambda _: TaskOutcomeModel(),
        node_events: Sequence[NodeEvent] = (),
    ):
        self.simulated_stages = {simulated.name: simulated for simulated in simulated_stages}
        self.cluster = cluster
        self.outcome_model = outcome_model
        self.node_events = deque(sorted(node_events, key=lambda event: event.at_s))
        self.window = cluster.window
        self._owners = {_owner(simulated): simulated.workers or cluster.processes for simulated in simulated_stages}
        self.simulation = SimulationResult(
            busy_s=dict.fromkeys(self.simulated_stages, 0.0),
            lost_s=dict.fromkeys(self.simulated_stages, 0.0),
            offered_s=dict.fromkeys(self._owners, 0.0),
            used=dict.fromkeys(cluster.capacity, 0.0),
        )
        self._nodes = [_SimulatedNode(number, cluster.nodes, self._owners) for number in range(cluster.nodes)]
        self._starting = {name: _Lane(_CPU_START) for name in self.simulated_stages}
        self._working = {name: _Lane(simulated.uses) for name, simulated in self.simulated_stages.items()}
        self._waiting: dict[str, deque[tuple[int, TaskRequest]]] = {name: deque() for name in self.simulated_stages}
        self._submitted = 0

    def submit(self, stage: Stage, request: TaskRequest) -> None:
        self._submitted += 1
        self._waiting[stage.name].append((self._submitted, request))

    @property
    def num_tasks(self) -> int:
        return sum(map(len, self._waiting.values())) + sum(len(lane.heap) for lane in self._lanes())

    def wait(self, timeout_s: float) -> list[TaskOutcome]:
        """Advances the simulated clock until the next task has finished; takes no real time."""
        outcomes: list[TaskOutcome] = []
        while not outcomes:
            self._start_waiting()
            outcomes = self._step()
        return outcomes

    def withdraw(self) -> None:
        for queue in self._waiting.values():
            queue.clear()

    def close(self) -> None:
        self.withdraw()

    def records(self, request: TaskRequest) -> dict[str, Record]:
        """The records of a finished task; nothing is written here."""
        shard, rows = request.shard, request.shard.num_rows
        return {
            group: Record(group, shard.index, request.fingerprints[group], shard.digest, input_rows=rows, rows=rows)
            for group in request.wanted
        }

    def _start_waiting(self) -> None:
        """Starts waiting tasks, first come first served, as far as processes are free."""
        full: set[str] = set()
        while True:
            heads = [(queue[0][0], name) for name, queue in self._waiting.items() if queue and name not in full]
            if not heads:
                return
            name = min(heads)[1]
            simulated = self.simulated_stages[name]
            node = max(self._nodes, key=lambda n: n.room(simulated))
            if node.room(simulated) < 0:
                full.add(name)
                continue
            order, request = self._waiting[name].popleft()
            outcome_model = self.outcome_model(request)
            work_s = simulated.seconds(request.shard.num_rows) * outcome_model.stretch
            loaded = node.take(simulated)
            task = _SimulatedTask(
                order,
                request,
                node,
                loaded | {name},
                outcome_model.error,
                0.0 if name in loaded else simulated.start_s,
            )
            task.work_s = work_s
            self._put(self._starting if task.start_s else self._working, task, task.start_s or work_s)

    def _put(self, lanes: Mapping[str, "_Lane"], task: "_SimulatedTask", seconds: float) -> None:
        lane = lanes[task.request.stage]
        heapq.heappush(lane.heap, (lane.done + seconds, task.order, task))

    def _lanes(self) -> Iterator["_Lane"]:
        yield from self._starting.values()
        yield from self._working.values()

    def _step(self) -> list[TaskOutcome]:
        """Advances the clock to the next end of a task or change of a node; returns the tasks that ended."""
        up = sum(node.up for node in self._nodes) / len(self._nodes)
        busy = [lane for lane in self._lanes() if lane.heap]
        self._share(busy, up)
        step, first = min(((lane.left() / lane.rate, i) for i, lane in enumerate(busy)), default=(_NEVER, -1))
        event_in = self.node_events[0].at_s - self.simulation.seconds if self.node_events else _NEVER
        assert min(step, event_in) < _NEVER, "tasks wait, nothing runs, and no node comes back"
        if event_in < step:
            self._pass(busy, max(0.0, event_in), up)
            return self._apply(self.node_events.popleft())
        self._pass(busy, step, up)
        busy[first].done = busy[first].heap[0][0]  # exactly its end, without a rounding error
        for lane in self._starting.values():
            for task in lane.ended():
                self._put(self._working, task, task.work_s)
        return [self._end(task) for lane in self._working.values() for task in lane.ended()]

    def _share(self, busy: Sequence["_Lane"], up: float) -> None:
        """Sets the speed of each lane: using a resource that is requested twice over takes twice as long."""
        slow = {}
        for name, capacity in self.cluster.capacity.items():
            requested = sum(len(lane.heap) * lane.uses.get(name, 0.0) for lane in busy)
            slow[name] = max(1.0, requested / (capacity * up)) if capacity * up else 1.0
        for lane in busy:
            stretch = 1.0
            for name, amount in lane.uses.items():
                part = min(1.0, amount) if name == "cpus" else 1.0  # in the rest of its time it waits
                stretch = max(stretch, 1 - part + part * slow.get(name, 1.0))
            lane.rate = 1.0 / stretch

    def _pass(self, busy: Sequence["_Lane"], step: float, up: float) -> None:
        self.simulation.seconds += step
        for lane in busy:
            lane.done += step * lane.rate
            for name, amount in lane.uses.items():
                if name in self.simulation.used:
                    self.simulation.used[name] += amount * step * lane.rate * len(lane.heap)
        for name, lane in self._working.items():
            self.simulation.busy_s[name] += step * len(lane.heap)
        for owner, count in self._owners.items():
            self.simulation.offered_s[owner] += step * count * up

    def _end(self, task: "_SimulatedTask") -> TaskOutcome:
        name = task.request.stage
        task.node.give_back(self.simulated_stages[name], task.loaded)
        outcome = TaskOutcome(task.request, task.start_s + task.work_s, task.start_s, error=task.error)
        if task.error is None:
            outcome.records = self.records(task.request)
        else:
            self.simulation.lost_s[name] += task.work_s
        return outcome

    def _apply(self, event: NodeEvent) -> list[TaskOutcome]:
        assert self._nodes[event.node].up != event.comes, f"node {event.node} is in this state already"
        self._nodes[event.node] = node = _SimulatedNode(event.node, len(self._nodes), self._owners, up=event.comes)
        if event.comes:
            return []
        lost = [task for lane in self._starting.values() for _, task in lane.without(node.number)]
        for name, lane in self._working.items():
            for left_s, task in lane.without(node.number):
                self.simulation.lost_s[name] += task.work_s - left_s
                lost.append(task)
        lost.sort(key=lambda task: task.order)
        return [TaskOutcome(task.request, error=f"node {node.number} was lost", lost="node") for task in lost]


_CPU_START = {"cpus": 1.0}  # importing and loading use one thread
_NEVER = float("inf")


@dataclass(slots=True, eq=False)
class _SimulatedTask:
    order: int
    request: TaskRequest
    node: "_SimulatedNode"
    loaded: frozenset[str]
    """Stages that its process has loaded, including its own."""
    error: str | None
    start_s: float
    work_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Lane:
    """Running tasks of equal speed: of one stage, all starting or all working."""

    uses: Mapping[str, float]
    done: float = 0.0
    """Seconds of work that a task running since the beginning would have done."""
    rate: float = 1.0
    heap: list[tuple[float, int, _SimulatedTask]] = field(default_factory=list)
    """Value of `done` at which each task ends."""

    def left(self) -> float:
        return max(0.0, self.heap[0][0] - self.done)

    def ended(self) -> Iterator[_SimulatedTask]:
        while self.heap and self.left() <= 1e-9:
            yield heapq.heappop(self.heap)[2]

    def without(self, node: int) -> list[tuple[float, _SimulatedTask]]:
        """Removes the tasks of a node; returns each with its remaining seconds."""
        gone = [(end - self.done, task) for end, _, task in self.heap if task.node.number == node]
        self.heap = [entry for entry in self.heap if entry[2].node.number != node]
        heapq.heapify(self.heap)
        return gone


class _SimulatedNode:
    """Processes of one node, by owner: a stage with its own workers, or ``""`` for the shared ones."""

    def __init__(self, number: int, nodes: int, owners: Mapping[str, float], *, up: bool = True):
        self.number = number
        self.up = up
        self.free = {
            owner: 0.0 if not up else count / nodes if not owner else (count + nodes - 1 - number) // nodes
            for owner, count in owners.items()
        }
        self.idle: dict[str, Counter[frozenset[str]]] = {owner: Counter() for owner in owners}
        """Idle processes: number by the stages they have loaded."""

    def room(self, simulated: SimulatedStage) -> float:
        """Free processes after one more task of the stage; negative if it does not fit."""
        return self.free[_owner(simulated)] - _slots(simulated) + 1e-9

    def take(self, simulated: SimulatedStage) -> frozenset[str]:
        """Takes a process, preferably one that has loaded the stage; returns the stages it has loaded."""
        self.free[_owner(simulated)] -= _slots(simulated)
        idle = self.idle[_owner(simulated)]
        loaded = max(idle, key=lambda stages: (simulated.name in stages, len(stages), sorted(stages)), default=None)
        if loaded is None:
            return frozenset()
        idle[loaded] -= 1
        if not idle[loaded]:
            del idle[loaded]
        return loaded

    def give_back(self, simulated: SimulatedStage, loaded: frozenset[str]) -> None:
        self.free[_owner(simulated)] += _slots(simulated)
        self.idle[_owner(simulated)][loaded] += 1


def _owner(simulated: SimulatedStage) -> str:
    return "" if simulated.workers is None else simulated.name


def _slots(simulated: SimulatedStage) -> float:
    return simulated.slots if simulated.workers is None else 1.0
