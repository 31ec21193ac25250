"""Which nodes of a cluster see the run folder?

The driver writes a token into the run folder. A process of each node reads it there, and writes an answer that the
driver reads. A node where the same path is another disk, or none, is named and gets no more work: what it would commit
nobody would find.
"""

import logging
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import MachineError, PipelineError, first_line
from pipeline.executors.ray_cluster import ClusterNode, Demand, describe
from pipeline.storage import LocalStorage
from pipeline.storage.record import Record, shard_name
from pipeline.storage.run_folder import RunFolder

log = logging.getLogger(__name__)

_FOLDER = ".nodes-"
_DRIVER = "driver"
_NODE_ID = "ray.io/node-id"  # Ray gives every node this label
_PATIENCE_S = 2.0  # until a file system has shown a new file to others
_PAUSE_S = 0.25

_seen: set[str] = set()


@dataclass(frozen=True, slots=True)
class Token:
    """What the driver wrote into the run folder. Picklable: workers get a copy and look for it.

    Its file has a new name in each run: no file system can remember that there was no such file, or an earlier one.
    """

    run: RunFolder
    value: str

    @classmethod
    def write(cls, run: RunFolder) -> "Token":
        """Writes a new token, and deletes those of killed drivers; of those of parts only those of the same part."""
        owner = run.storage.owner
        for name, _ in list(run.storage.entries()):
            if name.startswith(_FOLDER + owner):
                run.storage.delete_folder(name)
        token = cls(run, owner + uuid.uuid4().hex[:16])
        run.storage.write_text(token._name(_DRIVER), token.value)
        return token

    def delete(self) -> None:
        self.run.storage.delete_folder(f"{_FOLDER}{self.value}")

    def problem(self) -> str:
        """Why this process does not see the token; empty if it does."""
        end = time.monotonic() + _PATIENCE_S
        while problem := self._problem():
            if time.monotonic() > end:
                return problem
            time.sleep(_PAUSE_S)
        return ""

    def _problem(self) -> str:
        try:
            found = self.run.storage.read(self._name(_DRIVER)).decode(errors="replace")
        except FileNotFoundError:
            return self._absent()
        except (OSError, PipelineError) as error:
            return f"{type(error).__name__}: {first_line(error)}"
        return "" if found == self.value else f"{self._name(_DRIVER)} has another content there"

    def problem_now(self) -> str:
        """The same before a task; on an object store only before the first one of this process."""
        if self.value in _seen:
            return ""
        problem = self.problem()
        if not problem and not isinstance(self.run.storage, LocalStorage):
            _seen.add(self.value)
        return problem

    def answer(self, node: str) -> str:
        """Reads the token and writes an answer, in a process of the node; what `problem` returns."""
        problem = self.problem()
        if not problem:
            try:
                self.run.storage.write_text(self._name(node), self.value)
            except (OSError, PipelineError) as error:
                return f"nothing can be written there: {type(error).__name__}: {first_line(error)}"
        return problem

    def is_answered(self, node: str) -> bool:
        """Whether the answer of a node is here."""
        end = time.monotonic() + _PATIENCE_S
        while self.run.storage.size(self._name(node)) is None:
            if time.monotonic() > end:
                return False
            time.sleep(_PAUSE_S)
        return True

    def _absent(self) -> str:
        storage = self.run.storage
        if isinstance(storage, LocalStorage) and not storage.root.is_dir():
            return "there is no such folder"
        return "a folder of this name is there, but without the file that this run wrote into it"

    def _name(self, of: str) -> str:
        return f"{_FOLDER}{self.value}/{of}"


class SeeingNodes:
    """The driver's knowledge of the nodes, and the question to each of them."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.token = Token.write(run)
        self.blind: dict[str, str] = {}
        """Node -> what it found in the place of the run folder."""
        self._asked: dict[Any, ClusterNode] = {}
        self._known: dict[str, ClusterNode] = {}

    @property
    def questions(self) -> list[Any]:
        """References of the questions that are not answered yet."""
        return list(self._asked)

    def ask(self, nodes: Iterable[ClusterNode]) -> None:
        """Asks each node that was not asked before; it takes no CPU there."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in nodes:
            if node.id not in self._known:
                self._known[node.id] = node
                place = NodeAffinitySchedulingStrategy(node.id, soft=False)
                question = ray.remote(Token.answer).options(num_cpus=0, max_retries=0, scheduling_strategy=place)
                self._asked[question.remote(self.token, node.id)] = node

    def take(self, reference: Any) -> bool:
        """Takes the answer to a question; True if the node is now known not to see the run folder."""
        import ray
        from ray.exceptions import RayError

        node = self._asked.pop(reference)
        try:
            problem = str(ray.get(reference))
        except RayError as error:  # the node is gone, or cannot start a process; its tasks will tell
            log.debug("node %s gave no answer: %s", node.id, first_line(error))
            return False
        if not problem and not self.token.is_answered(node.id):
            problem = "what it writes there does not appear here"
        return bool(problem) and self.refuse(node.id, problem)

    def refuse(self, node: str, problem: str) -> bool:
        """Names a node that is not used any more; False if that was known."""
        if node in self.blind:
            return False
        self.blind[node] = problem
        log.warning(
            "node %s does not see the run folder and is not used: %s: %s", self._label(node), self.run.url, problem
        )
        return True

    def seeing(self, nodes: Iterable[ClusterNode]) -> list[ClusterNode]:
        """Those of the nodes that are not known to be blind."""
        return [node for node in nodes if node.id not in self.blind]

    def selector(self) -> dict[str, str]:
        """Ray's label selector of all nodes but the blind ones."""
        return {_NODE_ID: f"!in({', '.join(sorted(self.blind))})"} if self.blind else {}

    def require(self, nodes: list[ClusterNode], demands: Mapping[str, Demand]) -> None:
        """Checks that each stage has a node left, unless it had none before.

        Raises:
            MachineError: only nodes that do not see the run folder have what a stage needs; names them.
        """
        left, blind = self.seeing(nodes), [node for node in nodes if node.id in self.blind]
        for stage, demand in demands.items():
            if any(_fits(node, demand) for node in blind) and not any(_fits(node, demand) for node in left):
                raise MachineError(self._none_left(stage, demand))

    def are_here(self, records: Iterable[Record]) -> bool:
        """Whether what a task reports as committed is in the run folder as the driver sees it.

        It looks for the files. The driver has looked for the record before it was made, and a network file system may
        remember for a while that there was none.
        """
        storage = self.run.storage
        if not isinstance(storage, LocalStorage):
            return True  # one place for all
        for record in records:
            if any(storage.size(file.path) != file.bytes for file in record.files):
                return False
            if not record.files and self.run.read_record(record.group, shard_name(record.shard)) is None:
                return False
        return True

    def _none_left(self, stage: str, demand: Demand) -> str:
        found = "; ".join(f"{self._label(node)}: {problem}" for node, problem in self.blind.items())
        needed = f" with {describe(demand)}" if demand else ""
        return (
            f"--out {self.run.url}: no node{needed} is left for {stage}, as these do not see this folder: {found}. "
            "Mount the file system at this path on every node, or give --out an object store. Nothing was lost: run "
            "the same command again"
        )

    def _label(self, node: str) -> str:
        known = self._known.get(node)
        return f"{known.host} ({known.address}, {node[:8]})" if known else node


def _fits(node: ClusterNode, demand: Demand) -> bool:
    return not demand or node.room(demand) > 0
