"""Ends a worker whose tasks show no sign of progress, so that its driver starts another one.

No thread of Python can be stopped from outside, so the process ends. A thread of it keeps the time; where a call into
a library holds the interpreter, so that no thread of Python runs, faulthandler ends the process a little later.
"""

import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipeline.executors.task import Setup, SetupRequest, TaskOutcome, TaskRequest, run_task, set_up
from pipeline.stage import Stage, note_progress, seconds_without_progress
from pipeline.storage.run_folder import RunFolder

_GRACE_S = 60.0
_STDERR = 2


class Watchdog:
    """Watches the tasks of this process. A sign of one of them counts for all: they wait for each other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tasks: list[tuple[RunFolder, TaskRequest | SetupRequest]] = []
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, run: RunFolder, request: TaskRequest | SetupRequest) -> Iterator[None]:
        """While the block runs, the process ends `request.limit_s` after the last sign of progress."""
        if request.limit_s is None:
            yield
            return
        watched = (run, request)
        with self._changed:
            note_progress()
            self._tasks.append(watched)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
                self._thread.start()
            self._arm()
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                note_progress()
                self._tasks.remove(watched)
                self._arm()

    def _left_s(self) -> float:
        """Seconds until the process ends, if there is no further sign."""
        return min(request.limit_s or 0.0 for _, request in self._tasks) - seconds_without_progress()

    def _arm(self) -> None:
        if self._tasks:
            faulthandler.dump_traceback_later(max(0.0, self._left_s()) + _GRACE_S, exit=True, file=_STDERR)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not self._tasks:
                    self._changed.wait()
                left_s = self._left_s()
                if left_s <= 0:
                    self._end()
                self._arm()
                self._changed.wait(left_s)

    def _end(self) -> None:
        """Notes where the tasks hang, and ends the process."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
            if ident != threading.get_ident()
        ]
        for run, request in self._tasks:
            with suppress(Exception):  # the process ends in any case
                run.storage.write_text(_note(run, request), "\n".join(stacks))
        os._exit(1)


_watchdog = Watchdog()


def run_watched(stage: Stage, run: RunFolder, request: TaskRequest) -> TaskOutcome:
    """`run_task` in a worker process, within the request's limit."""
    with _watchdog.watching(run, request):
        return run_task(stage, run, request)


def set_up_watched(stage: Stage, run: RunFolder, request: SetupRequest) -> Setup:
    """`set_up` in a worker process, within the request's limit."""
    with _watchdog.watching(run, request):
        return set_up(stage, run)


def worker_lost(run: RunFolder, request: TaskRequest, why: str) -> TaskOutcome:
    """The outcome of a task whose worker has died; `why` is said if it did not hang."""
    outcome = TaskOutcome(request, error=why, lost="worker")
    for name in (_note(run, request), _note(run, SetupRequest(request.stage))):
        if run.storage.size(name) is not None:
            limit = f"{request.limit_s:g} s (execution.task_limit_s)"
            outcome.error = f"no sign of progress for {limit}; its worker was ended"
            outcome.traceback = f"{outcome.error}\n\n{run.storage.read(name).decode(errors='replace')}"
            run.storage.delete(name)
            return outcome
    return outcome


def _note(run: RunFolder, request: TaskRequest | SetupRequest) -> str:
    part = request.shard.name if isinstance(request, TaskRequest) else "setup"
    return f"{run.failures}/{request.stage}-{part}.hangs"
