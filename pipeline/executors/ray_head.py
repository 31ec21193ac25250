"""Watches the head of the Ray cluster, and ends the run in good order when it is lost.

Ray itself ends a process that has not reached its head (the GCS) for 60 s, at once and with exit code 1, whatever the
process is doing; and calls that need the head block until then. So the head is asked every second whether it listens.
A head that was started again at the same address, without its state, is another cluster: the first call to it ends a
process at once, with exit code 1 and a stack trace (WrongClusterID).
"""

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self, cast

from pipeline.errors import EXIT_PREEMPTED, PreemptedError
from pipeline.executors.ray_cluster import probe

_EVERY_S = 1.0
_AGAIN_S = 0.1  # while it is silent: to know that it is another one before Ray does
_PATIENCE_S = 30.0  # a head that others start again may come back
_OWN_PATIENCE_S = 3.0  # nobody starts one again that this process started
_LAST_S = 15.0  # for the run to end by itself


class HeadWatch:
    """While the block runs, knows whether the head of the cluster that this process has joined listens.

    Args:
        own: this process has started the cluster.
        cluster: id of the cluster; empty if it is unknown.
    """

    def __init__(self, address: str, *, own: bool, cluster: str = ""):
        self.address = address
        self.own = own
        self.cluster = cluster
        self.is_another = False
        """Whether the head that listens now is that of another cluster."""
        self._in_call = False
        self.patience_s = _OWN_PATIENCE_S if own else _PATIENCE_S
        self._silent_since: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="head")

    @classmethod
    def start(cls, *, own: bool) -> "HeadWatch":
        """Watches the head that Ray has connected to."""
        import ray

        watch = cls(ray.get_runtime_context().gcs_address, own=own)
        with suppress(OSError):
            watch.cluster = cluster_id(watch.address)
        watch._thread.start()
        return watch

    def stop(self) -> None:
        self._ended.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def silent_s(self) -> float:
        """Seconds for which the head has not been reached; 0 if it was reached at the last try."""
        since = self._silent_since
        return 0.0 if since is None else max(time.monotonic() - since, 1e-9)

    @property
    def is_lost(self) -> bool:
        """Whether the head has not been reached for so long that the run ends."""
        return self.is_another or self.silent_s > self.patience_s

    @contextmanager
    def in_call(self) -> Iterator[None]:
        """Tells that the process asks its head for something in the block."""
        self._in_call = True
        try:
            yield
        finally:
            self._in_call = False

    def check(self) -> None:
        """Raises PreemptedError if the head is lost."""
        if self.is_lost:
            raise PreemptedError(self.message())

    def message(self) -> str:
        if self.own:
            return (
                "the head of the local Ray (gcs_server) has ended: killed, or out of memory. Finished work stays; run "
                "the same command again to resume"
            )
        if self.is_another:
            return (
                f"the head of the Ray cluster ({self.address}) was started again and knows nothing of this run. "
                "Finished work stays; run the same command again"
            )
        return (
            f"the head of the Ray cluster ({self.address}) was not reached for {self.silent_s:.0f} s: its gcs_server "
            "has ended, or the network is down. Finished work stays; run the same command again once the cluster is "
            "back"
        )

    def leave(self) -> None:
        """Leaves Ray without its head, for which `ray.shutdown` would wait until Ray ends the process with 1."""
        import ray
        from ray._private import worker

        atexit.unregister(ray.shutdown)
        if worker._global_node is not None and self.own:
            worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
        atexit.register(_end)  # before Ray's libraries are unloaded, which waits as well

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S if self._silent_since is None else _AGAIN_S):
            try:
                probe(self.address)
                if self._silent_since is not None and not self.is_another:
                    self.is_another = bool(self.cluster) and cluster_id(self.address) != self.cluster
            except OSError:
                self._silent_since = self._silent_since or time.monotonic()
            else:
                self._silent_since = self._silent_since if self.is_another else None
            hangs = self.silent_s > self.patience_s + _LAST_S or (self.is_another and self._in_call)
            if hangs and not self._ended.is_set():
                print(f"error: {self.message()}", file=sys.stderr)
                _end()


def cluster_id(address: str) -> str:
    """The id of the cluster whose head listens there.

    Raises:
        OSError: it does not say.
    """
    from ray import _raylet
    from ray.exceptions import RayError

    try:
        return str(cast(Any, _raylet).GcsClient(address=address).cluster_id.hex())
    except RayError as error:  # it is not ready, or wants another token
        raise OSError(str(error)) from error


def _end() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(EXIT_PREEMPTED)
