"""Stopping a run: after the first signal running work finishes, the second one ends it at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Self

from pipeline.errors import PreemptedError

_PREEMPTING = (signal.SIGTERM, signal.SIGHUP)
_ALL = (signal.SIGINT, *_PREEMPTING)


class StopSignals:
    """Within this block the first Ctrl-C, SIGTERM or SIGHUP is recorded; the second one raises.

    Signals that the process was started to ignore (nohup) stay ignored.

    Args:
        grace_s: seconds after the first signal until a second one is sent; None disables this.
    """

    def __init__(self, grace_s: float | None = None):
        self.grace_s = grace_s
        self.received: int | None = None
        """The first signal."""
        self._previous: dict[int, object] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        for number in _ALL:
            previous = signal.getsignal(number)
            if previous is signal.SIG_IGN:
                continue
            try:
                signal.signal(number, self._record)
            except ValueError:  # not in the main thread, which handles signals
                break
            self._previous[number] = previous
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def raise_stop(self) -> NoReturn:
        """Raises the exception of the first signal.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            PreemptedError: another signal.
        """
        assert self.received is not None
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise_preempted(self.received)

    def _record(self, number: int, frame: object) -> None:
        if self.received is not None:
            self._restore()
            self.raise_stop()
        self.received = number
        if self.grace_s is not None:
            self._timer = threading.Timer(self.grace_s, os.kill, (os.getpid(), number))
            self._timer.daemon = True
            self._timer.start()

    def _restore(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}


def raise_when_preempted() -> None:
    """From now on SIGTERM and SIGHUP raise `PreemptedError` at any point of the program."""
    for number in _PREEMPTING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, raise_preempted)


def raise_preempted(number: int, frame: object = None) -> NoReturn:
    raise PreemptedError(f"stopped by {signal.Signals(number).name}; run the same command again to resume")


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Blocks the signals: for this thread until the end of the block, and permanently for processes started in it.

    So only the driver ends its workers, even if a terminal signals the process group.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
