"""A worker process of this machine: receives tasks through a pipe, and runs one or several at a time.

On Linux workers of a run with stages that import large packages are forked from one process that has imported them
(multiprocessing's fork server), so each package is imported once per run and its memory is shared. That process runs
nothing else: it has no threads of Python and does not use a GPU. Elsewhere, and in other runs, workers are started
afresh.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from pipeline.executors.process import WAITING_THREADS, prepare_process
from pipeline.executors.task import Setup, SetupRequest, TaskOutcome, TaskRequest
from pipeline.executors.watchdog import run_watched, set_up_watched
from pipeline.signals import stop_signals_held
from pipeline.stage import Stage
from pipeline.storage.run_folder import RunFolder

Result = TypeVar("Result")
Work = tuple[Stage, RunFolder, TaskRequest | SetupRequest]

_CAN_FORK = sys.platform == "linux"
_FIRST_IMPORT = "pipeline.executors.without_gc"
_imported: set[str] = set()
"""Modules of the process to fork from, once it was started."""
_is_warm = False
"""Whether `call_warm` uses it."""


def warm_up(modules: Sequence[str]) -> None:
    """Starts the process that workers are forked from, which begins to import the modules; returns at once.

    Where it runs already, it imports nothing further, and workers import for themselves what they need.
    """
    if not _CAN_FORK:
        return
    _ensure_tracker()
    if not _imported:
        _imported.update(modules)
    with stop_signals_held(), _environment(WAITING_THREADS):
        multiprocessing.get_context("forkserver").set_forkserver_preload([_FIRST_IMPORT, __name__, *modules])
        forkserver.ensure_running()


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """With these variables, where this process does not have them itself."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _ensure_tracker() -> None:
    with stop_signals_held():
        resource_tracker.ensure_running()  # its start unblocks some of the signals


@contextmanager
def warmed(modules: Sequence[str]) -> Iterator[None]:
    """`warm_up`, and within the block `call_warm` makes use of it. Without modules it does nothing."""
    global _is_warm
    if modules:
        warm_up(modules)
    _is_warm = bool(modules) and _imported.issuperset(modules)
    try:
        yield
    finally:
        _is_warm = False


def call_warm(function: Callable[..., Result], *arguments: object) -> Result:
    """The result of a function that needs large packages: within `warmed` from a process that is forked for it, so
    that this process does not import them too; else from this process. What the function raises is raised here.
    Function and arguments must be picklable; if the result is not, it is made here after all."""
    if not _is_warm:
        return function(*arguments)
    context: Any = multiprocessing.get_context("forkserver")
    with stop_signals_held():
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_send_result, args=(sending, dict(os.environ), function, arguments))
        process.start()
        sending.close()
    try:
        result, error = receiving.recv()
    except (EOFError, OSError):  # it has died, or its answer cannot be sent
        return function(*arguments)
    finally:
        receiving.close()
        process.kill()
        process.join()
    if error is not None:
        raise error
    return result


def _send_result(
    sending: Connection, environment: Mapping[str, str], function: Callable[..., object], arguments: Sequence[object]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    result, failure = None, None
    try:
        result = function(*arguments)
    except Exception as error:  # noqa: BLE001 - raised in the driver
        failure = error
    with suppress(Exception):  # what cannot be sent is missed by the driver
        sending.send((result, failure))


class WorkerProcess:
    """A process that starts when it is needed, and again after its death.

    Args:
        gpu: the only GPU that it sees; None: as this process.
        num_slots: tasks that it runs at once, in threads; a single one runs in its main thread.
        forked: it is a copy of the process that `warm_up` started, where there is one.
    """

    def __init__(self, gpu: str | None, num_slots: int = 1, *, forked: bool = False):
        self.gpu = gpu
        self.num_slots = num_slots
        self.forked = forked
        self.process: BaseProcess | None = None
        self.connection: Connection | None = None
        self.given: dict[int, TaskRequest | SetupRequest] = {}
        """What it has not answered yet."""
        self.set_up: set[str] = set()
        """The stages whose `setup` it was asked for before their first task."""
        self._count = 0

    @property
    def tasks(self) -> list[TaskRequest]:
        """Those that it has not finished yet."""
        return [request for request in self.given.values() if isinstance(request, TaskRequest)]

    def can_take(self, request: TaskRequest) -> bool:
        """Whether it may have this task now."""
        tasks = self.tasks
        if request.alone or any(task.alone for task in tasks):
            return not tasks
        return len(tasks) < self.num_slots

    @property
    def ends(self) -> list[Any]:
        """What to wait for: something of it becomes ready with its next answer, or its death."""
        return [end for end in (self.connection, self.process and self.process.sentinel) if end is not None]

    def give(self, work: Work) -> None:
        """Hands the work to the process; starts it if there is none."""
        if self.process is None or (not self.given and not self.process.is_alive()):  # it was killed while idle
            self.stop()
            self._start()
        assert self.connection is not None
        self._count += 1
        self.given[self._count] = work[2]
        with suppress(OSError):  # it has just died, which `answers` will say
            self.connection.send((self._count, work))

    def answers(self) -> tuple[list[TaskOutcome | Setup], list[TaskRequest]]:
        """What has been finished since the last call, and the tasks that have died with the process."""
        assert self.connection is not None
        assert self.process is not None
        found: list[TaskOutcome | Setup] = []
        is_dead = not self.process.is_alive()
        try:
            while self.connection.poll():
                number, answer = self.connection.recv()
                del self.given[number]
                found.append(answer)
        except (EOFError, OSError):
            is_dead = True
        lost = self.tasks if is_dead else []
        if is_dead:
            self.stop()
        return found, lost

    def _start(self) -> None:
        _ensure_tracker()
        context: Any = multiprocessing.get_context("forkserver" if self.forked and _CAN_FORK else "spawn")
        with stop_signals_held():
            self.connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.gpu, self.num_slots, dict(os.environ)))
            process.start()
            self.process = process
            theirs.close()  # so that its end is seen here

    def stop(self) -> None:
        """Kills the process; its unfinished files have temporary names."""
        self.given.clear()
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self.process is not None:
            self.process.kill()
            self.process.join(timeout=5)
            if not self.process.is_alive():
                self.process.close()
            self.process = None


def _serve(connection: Connection, gpu: str | None, num_slots: int, environment: Mapping[str, str]) -> None:
    """What a worker does until it is killed, or the driver has ended."""
    os.environ.clear()  # a forked one has that of the first run of its driver
    os.environ.update(environment)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    prepare_process()
    _end_with_driver()
    answering = threading.Lock()

    def work(number: int, stage: Stage, run: RunFolder, request: TaskRequest | SetupRequest) -> None:
        is_task = isinstance(request, TaskRequest)
        answer = run_watched(stage, run, request) if is_task else set_up_watched(stage, run, request)
        with answering:
            connection.send((number, answer))

    threads = ThreadPoolExecutor(num_slots + 1) if num_slots > 1 else None
    while True:
        try:
            number, (stage, run, request) = connection.recv()
        except (EOFError, OSError):  # the driver has ended, or closed its end before it kills this process
            os._exit(1)
        if threads is None:
            work(number, stage, run, request)
        else:
            threads.submit(_or_end, work, number, stage, run, request)


def _or_end(work: Any, *arguments: object) -> None:
    """What a task does not catch ends the process, as it would in the main thread."""
    try:
        work(*arguments)
    except BaseException as error:  # noqa: BLE001 - said, and the driver sees the process end
        sys.excepthook(type(error), error, error.__traceback__)
        os._exit(1)


def _end_with_driver() -> None:
    """Ends this process when the driver has ended for any reason, also while a task runs."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-driver").start()
