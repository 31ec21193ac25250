"""Runs one task in a worker: the stage, then the commit protocol.

Files are written under temporary names or on local scratch, made durable and published; then the quarantine list; last
the completion record. A process that is killed at any point leaves a (group, shard) either complete or absent.
"""

import json
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from imagen_core.far import StorageError, without_secrets
from pipeline.errors import EXIT_ENVIRONMENT, PipelineError, storage_error
from pipeline.executors.process import set_up_once
from pipeline.fingerprint import digest
from pipeline.stage import Drop, Shard, Stage, Task, note_progress
from pipeline.storage import LocalStorage
from pipeline.storage.disk import disk_message, takes_no_data
from pipeline.storage.files import file_digest
from pipeline.storage.lock import Lease
from pipeline.storage.record import CommittedFile, Record
from pipeline.storage.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """One stage on one shard. Small and picklable; the stage itself travels once to each worker."""

    stage: str
    shard: Shard
    wanted: frozenset[str]
    fingerprints: dict[str, str]
    """Group -> digest of its fingerprint, for the record."""
    present: frozenset[str] = frozenset()
    """Groups committed for this shard when the request was made."""
    records: Mapping[str, Record] = field(default_factory=dict)
    """Records of those, so that no worker reads them again."""
    listed_drops: frozenset[str] | None = None
    """Wanted groups whose list of drops an earlier try may have left; None: any."""
    retried_rows: frozenset[int] = frozenset()
    """Rows that a retry round tries again; the shard they came from leaves them out."""
    attempt: int = 1
    alone: bool = False
    """A worker died while it ran this task: no other task may run in its worker at the same time."""
    limit_s: float | None = None
    """The worker is ended after so many seconds without a sign of progress; None for never."""


@dataclass(slots=True)
class TaskOutcome:
    """What a worker reports about a finished task."""

    request: TaskRequest
    seconds: float = 0.0
    setup_s: float = 0.0
    """Part of `seconds` that a worker spends once: loading packages and models."""
    cpu_s: float = 0.0
    """CPU time of all threads of the worker, without `setup_s`; a share of it while the worker has several tasks."""
    records: dict[str, Record] = field(default_factory=dict)
    error: str | None = None
    """Message of the failure, or None."""
    traceback: str = ""
    lost: Literal["", "worker", "node"] = ""
    """The task did not fail: the worker that ran it died, or its node was lost."""
    node: str = ""
    """Ray's id of the node that ran it."""
    unseen: str = ""
    """The task was not begun: what its node found in the place of the run folder."""
    fatal_exit_code: int | None = None
    """Set if no shard can succeed (model missing, disk full): the run ends with this code."""


@dataclass(frozen=True, slots=True)
class SetupRequest:
    """The `setup` of a stage, before a worker has a task of it."""

    stage: str
    limit_s: float | None = None
    """As of a task."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker reports about a `setup` that it did before its first task. If it failed, the first task fails."""

    stage: str
    seconds: float
    cpu_s: float
    """CPU time of the worker since it was started."""
    error: str | None = None


class _CpuShares:
    """Divides the CPU time of this process among the tasks that run in it at the same time, in equal parts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}
        self._counted = 0.0

    def begin(self, task: int) -> None:
        with self._lock:
            self._divide()
            self._running[task] = 0.0

    def end(self, task: int) -> float:
        """CPU seconds of the task."""
        with self._lock:
            self._divide()
            return self._running.pop(task, 0.0)

    def _divide(self) -> None:
        now = time.process_time()
        for task in self._running:
            self._running[task] += (now - self._counted) / len(self._running)
        self._counted = now


_cpu = _CpuShares()
_prepared: dict[str, Stage] = {}
_prepare_lock = threading.Lock()

_LEASE_HOLDS_S = 5.0
"""How long a worker commits to an object store without asking for the lease again, and so for how long it may still
commit once another run has taken the folder over."""
_lease_asked: list[Any] = ["", 0.0]
"""Owner of the lease that this process asked for last, and when (monotonic clock)."""
_lease_mutex = threading.Lock()


def run_task(stage: Stage, run: RunFolder, request: TaskRequest) -> TaskOutcome:
    """Runs the stage on the shard and commits what it wrote. Never raises for the stage's failures."""
    started = time.perf_counter()
    outcome = TaskOutcome(request)
    task = Task(run, request.shard, request.wanted, request.present, request.retried_rows, request.records)
    try:
        prepared = _prepare(stage, run)
        note_progress()
        outcome.setup_s = time.perf_counter() - started
        _cpu.begin(id(task))
        prepared.process(task)
        outcome.records = _commit(run, task, request, {group.name: group.cells for group in prepared.groups})
    except PipelineError as error:
        outcome.error, outcome.fatal_exit_code = str(error), error.exit_code
        outcome.traceback = traceback.format_exc()
        if error.__cause__ is not None and takes_no_data(error.__cause__):  # else it reads as damage of the input
            explained = disk_message(error.__cause__, run.storage.local)
            outcome.error, outcome.fatal_exit_code = explained or outcome.error, EXIT_ENVIRONMENT
    except StorageError as error:  # patience has ended: the other shards would wait as long
        outcome.error, outcome.traceback = str(error), traceback.format_exc()
        outcome.fatal_exit_code = storage_error(error).exit_code if error.passes else None
    except Exception as error:  # noqa: BLE001 - the boundary of a worker: reported, retried, quarantined
        outcome.error, outcome.traceback = f"{type(error).__name__}: {error}", traceback.format_exc()
        if takes_no_data(error):
            explained = disk_message(error, run.storage.local)
            outcome.error, outcome.fatal_exit_code = explained or outcome.error, EXIT_ENVIRONMENT
    finally:
        outcome.cpu_s = _cpu.end(id(task))
        task.release()
    if outcome.error is not None:  # it is written into files
        outcome.error, outcome.traceback = without_secrets(outcome.error), without_secrets(outcome.traceback)
    outcome.seconds = time.perf_counter() - started - task.waited_s
    return outcome


def set_up(stage: Stage, run: RunFolder) -> Setup:
    """Loads the stage's models before its first task. Never raises: that task meets the failure again."""
    started, error = time.perf_counter(), None
    try:
        _prepare(stage, run)
    except Exception as failure:  # noqa: BLE001 - as in `run_task`
        error = without_secrets(f"{type(failure).__name__}: {failure}")
    return Setup(stage.name, time.perf_counter() - started, time.process_time(), error)


def _prepare(stage: Stage, run: RunFolder) -> Stage:
    """The stage with its models loaded; loads them once per process."""
    key = digest([run.url, stage.name, [[group.name, dict(group.config)] for group in stage.groups]])
    with _prepare_lock:
        if key not in _prepared:
            with set_up_once():
                stage.setup(run)
            _prepared[key] = stage
        return _prepared[key]


def release_stages() -> None:
    """Releases the models that this process has loaded."""
    with _prepare_lock:
        _prepared.clear()


def _commit(run: RunFolder, task: Task, request: TaskRequest, cells: Mapping[str, str | None]) -> dict[str, Record]:
    missing = request.wanted - task.results.keys()
    assert not missing, f"stage {request.stage} finished without declaring {sorted(missing)}"
    if run.lease is not None and not isinstance(run.storage, LocalStorage):
        _check_lease(run.lease)  # on a local folder no worker outlives the driver's lock
    digests = {group: task.shard.digest_of(cells.get(group)) for group in request.wanted}
    return {group: _commit_group(run, task, group, request, digests[group]) for group in sorted(request.wanted)}


def _check_lease(lease: Lease) -> None:
    """Asks whether the run still has its folder, unless this process did within `_LEASE_HOLDS_S`."""
    with _lease_mutex:
        owner, asked = _lease_asked
        now = time.monotonic()  # before the answer, so that what it says is not taken for newer
        if owner == lease.owner and now - asked < _LEASE_HOLDS_S:
            return
    lease.check()
    with _lease_mutex:
        _lease_asked[:] = lease.owner, now


def _commit_group(run: RunFolder, task: Task, group: str, request: TaskRequest, digest_of_input: str) -> Record:
    result = task.results[group]
    files = []
    for name, local in task.outputs(group).items():
        files.append(CommittedFile(name, os.path.getsize(local), file_digest(local)))
        run.storage.publish(local, name)
        note_progress()
    if result.drops or request.listed_drops is None or group in request.listed_drops:
        write_drops(run, task.shard.name, group, result.drops)
    record = Record(
        group=group,
        shard=task.shard.index,
        fingerprint=request.fingerprints[group],
        input=digest_of_input,
        input_rows=task.shard.num_rows,
        rows=result.rows,
        drops=dict(sorted(Counter(drop.reason for drop in result.drops).items())),
        files=tuple(files),
        counters=dict(result.counters),
        info=dict(result.info),
    )
    run.write_record(record)
    return record


def write_drops(run: RunFolder, shard: str, group: str, drops: Sequence[Drop]) -> None:
    """Writes the list of the dropped rows of a (group, shard); deletes it if there are none."""
    name = run.drops_name(group, shard)
    if not drops:
        run.storage.delete(name)
        return
    lines = (
        json.dumps(
            {"row": drop.row, "key": drop.key, "reason": drop.reason, "detail": without_secrets(drop.detail)},
            ensure_ascii=False,
        )
        for drop in drops
    )
    run.storage.write_text(name, "\n".join(lines) + "\n")
