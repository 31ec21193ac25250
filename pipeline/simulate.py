"""Predicts how long shards take to pass the stages, by playing the run on a clock that does not wait.

The rules are those of the scheduler and the executors: a window of shards, stages in order, a worker that loads first,
workers that are limited in number. Tasks that together ask for more of a resource (CPUs, GPUs, network) than there is
slow each other down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Station:
    """A stage as the clock sees it."""

    name: str
    after: tuple[str, ...]
    """Stages whose groups it reads."""
    start_s: float
    """What a worker needs before its first task: process start, packages, models."""
    shard_s: float
    """What a task takes at least, with the machine to itself."""
    row_s: float
    """What each row adds."""
    uses: Mapping[str, float]
    """How much of each resource a running task asks for, e.g. `cpus` 1.9."""
    workers: int | None = None
    """Workers of its own; None: it runs in the shared processes."""
    slots: float = 1.0
    """Shared processes that a task takes."""

    def seconds(self, rows: float) -> float:
        return self.shard_s + rows * self.row_s


@dataclass(frozen=True, slots=True)
class Machine:
    """What the stations share."""

    capacity: Mapping[str, float]
    """Of each resource."""
    processes: float
    """Shared processes."""
    window: int
    """Shards in flight."""


@dataclass(frozen=True, slots=True)
class Job:
    """A shard: the stages it still needs, and its rows."""

    needs: tuple[str, ...]
    rows: float


@dataclass(slots=True)
class Played:
    """What came out."""

    seconds: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)
    """Worker seconds of each stage, start-up left out."""
    used: dict[str, float] = field(default_factory=dict)
    """Resource -> amount x seconds."""


@dataclass(slots=True, eq=False)
class _Task:
    job: int
    station: Station
    process: set[str]
    start_left: float
    work_left: float
    rate: float = 1.0

    @property
    def left(self) -> float:
        """Of what it is at: starting, then working."""
        return self.start_left or self.work_left


_CPU_START = {"cpus": 1.0}  # importing and loading are one thread's work


def play(stations: Sequence[Station], jobs: Sequence[Job], machine: Machine) -> Played:
    """Runs the jobs through the stations."""
    result = Played(busy_s={s.name: 0.0 for s in stations}, used=dict.fromkeys(machine.capacity, 0.0))
    idle: dict[str, list[set[str]]] = {
        "": []
    }  # processes that wait, by owner; each is the set of stages it has loaded
    taken: dict[str, float] = {}
    waiting: list[tuple[int, Station]] = []
    open_needs: dict[int, list[Station]] = {}
    finished: dict[int, set[str]] = {}
    running: list[_Task] = []
    admitted = 0
    while True:
        while admitted < len(jobs) and len(open_needs) < machine.window:
            open_needs[admitted] = [s for s in stations if s.name in jobs[admitted].needs]
            finished[admitted] = set()
            waiting += _ready(admitted, jobs[admitted], open_needs, finished)
            admitted += 1
        waiting = [entry for entry in waiting if not _start(*entry, jobs, machine, idle, taken, running)]
        if not running:
            return result
        _share(running, machine.capacity)
        step = min(task.left / task.rate for task in running)
        result.seconds += step
        for task in running:
            _advance(task, step, result)
        for task in [t for t in running if not t.left]:
            running.remove(task)
            owner = "" if task.station.workers is None else task.station.name
            taken[owner] -= task.station.slots if not owner else 1
            idle[owner].append(task.process)
            finished[task.job].add(task.station.name)
            waiting += _ready(task.job, jobs[task.job], open_needs, finished)
            if finished[task.job].issuperset(jobs[task.job].needs):
                del open_needs[task.job], finished[task.job]


def _ready(
    index: int, job: Job, needs: dict[int, list[Station]], finished: dict[int, set[str]]
) -> list[tuple[int, Station]]:
    """What the job needs and is not waiting for a stage that it also needs."""
    ready = [s for s in needs[index] if finished[index].issuperset(set(s.after) & set(job.needs))]
    needs[index] = [s for s in needs[index] if s not in ready]
    return [(index, station) for station in ready]


def _start(
    job: int,
    station: Station,
    jobs: Sequence[Job],
    machine: Machine,
    idle: dict[str, list[set[str]]],
    taken: dict[str, float],
    running: list[_Task],
) -> bool:
    owner = "" if station.workers is None else station.name
    limit, slots = (machine.processes, station.slots) if not owner else (station.workers or 1, 1)
    if taken.get(owner, 0.0) + slots > limit + 1e-9:
        return False
    taken[owner] = taken.get(owner, 0.0) + slots
    processes = idle.setdefault(owner, [])
    process = max(processes, key=lambda loaded: (station.name in loaded, len(loaded)), default=None)
    if process is None:
        process = set()
    else:
        processes.remove(process)
    start = 0.0 if station.name in process else station.start_s
    process.add(station.name)
    running.append(_Task(job, station, process, start, station.seconds(jobs[job].rows)))
    return True


def _uses(task: _Task) -> Mapping[str, float]:
    return _CPU_START if task.start_left else task.station.uses


def _share(running: Sequence[_Task], capacity: Mapping[str, float]) -> None:
    """Sets each task's speed: a resource asked for twice over makes the time spent on it twice as long."""
    asked = {name: sum(_uses(task).get(name, 0.0) for task in running) for name in capacity}
    slow = {name: max(1.0, asked[name] / capacity[name]) if capacity[name] else 1.0 for name in capacity}
    for task in running:
        uses = _uses(task)
        stretch = 1.0
        for name, amount in uses.items():
            part = min(1.0, amount) if name == "cpus" else 1.0  # the rest of its time it waits for something else
            stretch = max(stretch, 1 - part + part * slow.get(name, 1.0))
        task.rate = 1.0 / stretch


def _advance(task: _Task, step: float, result: Played) -> None:
    done = step * task.rate
    for name, amount in _uses(task).items():
        if name in result.used:
            result.used[name] += amount * done
    if task.start_left:
        task.start_left = _less(task.start_left, done)
    else:
        result.busy_s[task.station.name] += step
        task.work_left = _less(task.work_left, done)


def _less(left: float, done: float) -> float:
    return left - done if left - done > 1e-9 else 0.0
