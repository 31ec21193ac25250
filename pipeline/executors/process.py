"""What a worker process sets for itself before its first task."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

WAITING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_THREAD_TIMEOUT": "4"}
"""Environment of workers: threads of a model that wait for each other sleep. By default they spin, and take the cores
that other workers compute on. OpenMP reads it when torch is imported; OpenBLAS, whose threads wait for 2**4 cycles,
when NumPy or SciPy is."""
SHORT_SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
"""Environment of a process that trains or samples: threads that wait for each other spin for microseconds, which is
the usual wait, and then sleep. By default they spin for milliseconds, and where another process has one of the cores,
they spin on the other while the one that they wait for does not run. The first is GNU's OpenMP, which torch has on
Linux, the second LLVM's and Intel's."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 * 2**20
_MAPPED_BYTES = 32 * 2**20
"""The most that glibc allows."""

_is_worker = False


def let_threads_sleep() -> None:
    """Sets `SHORT_SPIN` for this process and those it starts, unless the environment says anything about the waiting
    of threads. It has an effect before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ and SHORT_SPIN.keys().isdisjoint(os.environ):
        os.environ.update(SHORT_SPIN)


def keep_freed_memory() -> None:
    """With glibc, keeps freed memory for what comes next, up to 256 MiB.

    glibc gives the memory of an image or of a model's activations back to the system with every `free`, and takes it
    again, page by page, for the next one: as much time as decoding a JPEG needs.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def prepare_process() -> None:
    """Lets waiting threads sleep, unless the environment says otherwise, and keeps freed memory.

    The first call also stops the search for garbage until a stage is set up (`set_up_once`). What is there already
    stays for good: it is no longer looked through, so that memory shared with other processes stays shared.
    """
    global _is_worker
    if not _is_worker:
        _is_worker = True
        gc.disable()
        gc.freeze()
    for name, value in WAITING_THREADS.items():
        os.environ.setdefault(name, value)
    keep_freed_memory()


@contextmanager
def set_up_once() -> Iterator[None]:
    """While a worker imports packages and loads a model: hundreds of thousands of objects, which all stay. Searching
    them for garbage takes a fifth of the time meanwhile, and a third of that of a download afterwards. So it is done
    once, at the end of the block; then they are left out. In a process that is no worker nothing changes.
    """
    if not _is_worker:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.collect()  # or a copy of the weights in a cycle would stay
        gc.freeze()
        gc.enable()
