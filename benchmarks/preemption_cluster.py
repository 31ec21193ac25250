"""A cluster of Ray nodes on this machine whose nodes, or whose head, are killed and started again."""

import random
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.pipeline.executors.cluster import RayNodes, ray_nodes

CPUS = 2
_HEAD = "head"


class Clusters:
    """One cluster at a time: a head without CPUs, and nodes that do the work.

    Args:
        work: a new folder for their files.
        wanted: nodes that are up where nothing was killed.
    """

    def __init__(self, work: Path, wanted: int, chance: random.Random):
        self.work, self.wanted, self.chance = work, wanted, chance
        work.mkdir(parents=True)
        self.up: set[str] = set()
        self.added = 0
        """Nodes that were started in the place of killed ones."""
        self._count = 0
        self._clusters = 0
        self._stack = ExitStack()
        self._threads: list[threading.Thread] = []
        self._failed: list[BaseException] = []
        self._token = secrets.token_hex(32)
        with socket.socket() as free:  # a head that is started again has the same address
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.nodes: RayNodes

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def start(self) -> None:
        """Starts a head and all nodes."""
        self._clusters += 1
        self.nodes = self._stack.enter_context(ray_nodes(self.work / f"cluster-{self._clusters}"))
        (self.nodes.folder / "token").write_text(self._token)
        self.nodes.start(_HEAD, f"--port={self._port}", "--num-cpus=0", "--include-dashboard=false")
        for _ in range(self.wanted):
            self._in_background(self._start_node)
        self._join()

    def kill_one(self) -> None:
        """Kills a node, and starts a new one."""
        self._raise()
        name = self.chance.choice(sorted(self.up))
        self.up.discard(name)
        self.nodes.kill(name)
        self.added += 1
        self._in_background(self._start_node)

    def kill_head(self) -> None:
        """Kills the head, and with it all nodes."""
        self._join()
        self.nodes.kill(_HEAD)
        self._stop()

    def _stop(self) -> None:
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self.up.clear()
        self._stack.close()

    def _start_node(self) -> None:
        for last in (False, False, True):  # on a busy machine Ray may find its start too slow
            self._count += 1
            name = f"node-{self._count}"
            try:
                self.nodes.start(name, f"--num-cpus={CPUS}", '--resources={"work": 1000}')
            except AssertionError:
                self.nodes.kill(name)
                if last:
                    raise
            else:
                self.up.add(name)
                return

    def _in_background(self, start: Callable[[], None]) -> None:
        def run() -> None:
            try:
                start()
            except BaseException as error:  # noqa: BLE001 - raised in `_raise`
                self._failed.append(error)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._raise()

    def _raise(self) -> None:
        if self._failed:
            raise self._failed[0]
