"""What all tests share."""

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest

from tests.network import forbid_outside_access, refused
from tests.runs import cascade, copy_of_small_run, emoji, small_run  # noqa: F401 (fixtures)

forbid_outside_access()

_IN_MEMORY = "/dev/shm"
_ROOM_BYTES = 8 << 30


def pytest_configure() -> None:
    """Files of tests lie in memory where there is room: half of the tests' time would go into waiting for a disk."""
    if os.path.isdir(_IN_MEMORY) and shutil.disk_usage(_IN_MEMORY).free >= _ROOM_BYTES:
        os.environ.setdefault("TMPDIR", _IN_MEMORY)
        tempfile.tempdir = None


def pytest_collection_finish() -> None:
    """Takes all that was imported out of garbage collections, which would walk through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left_this_machine() -> Iterator[None]:
    """Fails the test in which anything was refused, here or in a process that was started."""
    yield
    assert refused() == []


@pytest.fixture(scope="session", autouse=True)
def heeded_signals() -> Iterator[None]:
    """Handles signals that nohup or a script's `&` made this process ignore, so that tests can stop runs."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in handlers if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, handlers[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
