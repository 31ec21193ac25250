"""What a worker process sets for itself before its first task."""

import ctypes
import os
from contextlib import suppress

WAITING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of workers: threads of a model that wait for each other sleep. By default they spin, and take the cores
that other workers compute on. OpenMP reads it when torch is imported."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 * 2**20
_MAPPED_BYTES = 32 * 2**20
"""The most that glibc allows."""


def prepare_process() -> None:
    """Lets waiting threads sleep, unless the environment says otherwise, and, with glibc, keeps freed memory.

    glibc gives the memory of an image or of a model's activations back to the system with every `free`, and takes it
    again, page by page, for the next one: as much time as decoding a JPEG needs.
    """
    for name, value in WAITING_THREADS.items():
        os.environ.setdefault(name, value)
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
