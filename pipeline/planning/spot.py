"""A run or a training on spot machines: expected time and money, and which segments make them least."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import ConfigError
from pipeline.planning.hardware import Hardware
from pipeline.planning.interruptions import Interruptions
from pipeline.planning.simulated_executor import SimulatedCluster, SimulatedStage

_SHARD_ROWS = [2**power for power in range(4, 21)]
_LEAST_WINDOWS = 4
"""A run has at least so many windows of shards, or its end, when most workers have no task left, would count."""


@dataclass(frozen=True, slots=True)
class StageLoad:
    """What a stage has to do in a run without interruptions."""

    stage: SimulatedStage
    shards: float
    rows: int
    busy_s: float
    """Worker seconds, with those in which its tasks wait for CPUs, GPUs or the network."""

    @property
    def work_s(self) -> float:
        return self.shards * self.stage.shard_s + self.rows * self.stage.row_s

    @property
    def task_s(self) -> float:
        """Seconds of an average task, which are lost with its node."""
        return self.busy_s / self.shards if self.shards else 0.0

    def with_task_s(self, hardware: Hardware) -> "StageLoad":
        """With the seconds of a task that do not depend on its rows, where they are not measured."""
        if self.stage.shard_s:
            return self
        stage = replace(self.stage, shard_s=hardware.task_s)
        return replace(self, stage=stage, busy_s=self.busy_s + self.shards * hardware.task_s)

    def in_shards_of(self, rows: int) -> "StageLoad":
        shards = self.rows / rows
        work_s = shards * self.stage.shard_s + self.rows * self.stage.row_s
        return replace(self, shards=shards, busy_s=self.busy_s * work_s / self.work_s if self.work_s else 0.0)

    def paid_s(self, machine: Interruptions) -> float:
        """Expected worker seconds on machines that are taken away, starts included."""
        return self.shards * machine.starting_in(self.stage.start_s).paid_s(self.task_s)


def usd(usd_per_hour: float | None, paid_s: float) -> float | None:
    """The price of a machine for so many seconds; None if it is unknown."""
    return None if usd_per_hour is None else usd_per_hour * paid_s / 3600


def spot_run(
    loads: Sequence[StageLoad], cluster: SimulatedCluster, hardware: Hardware, seconds: float, files: int
) -> dict[str, Any]:
    """The same run on spot machines, as JSON.

    A task that its node takes away is done again from its start; what is committed stays. Each worker is delayed as if
    it were alone: nodes are interrupted independently of what their workers do. The head of the cluster, with the
    driver, is taken to stay.

    Args:
        seconds: without interruptions.
        files: written to an object store, each at a price; 0 if there is none.
    """
    assert hardware.spot is not None
    machine = _interruptions(hardware, nodes=1)
    calm_s = _occupied_s(loads, cluster, Interruptions(0.0))

    def with_shards_of(rows: int | None) -> dict[str, Any]:
        cut = loads if rows is None else [load.in_shards_of(rows) for load in loads]
        paid_s = seconds * _occupied_s(cut, cluster, machine) / calm_s
        written = files * sum(load.shards for load in cut) / sum(load.shards for load in loads)
        puts = written / 1e6 * hardware.usd_per_million_puts
        found = _expected(machine, hardware, paid_s, nodes=hardware.num_nodes)
        return {**found, "usd_with_files": None if found["usd"] is None else found["usd"] + puts}

    here = with_shards_of(None)
    redone = sum(load.shards * machine.starting_in(load.stage.start_s).redone_s(load.task_s) for load in loads)
    work = sum(load.busy_s for load in loads)
    most = max(load.rows for load in loads) / (_LEAST_WINDOWS * cluster.window)
    choices = {rows: with_shards_of(rows) for rows in _SHARD_ROWS if rows <= most}
    best = min(choices, key=lambda rows: _cost(choices[rows]), default=None)
    return {
        **here,
        "redone": _finite(redone / work),
        "best_shard_rows": best,
        "at_best": None if best is None else choices[best],
    }


def spot_training(hardware: Hardware, profile: str, num_steps: int, every_steps: int) -> dict[str, Any]:
    """A training on machines that stay and, where the profile has them, on spot machines, as JSON.

    Its processes are on all nodes, so the loss of one of them takes all back to the last checkpoint.

    Raises:
        ConfigError: the profile does not know how long a step or a checkpoint takes.
    """
    step_s, checkpoint_s, nodes = hardware.step_s, hardware.checkpoint_s, hardware.num_nodes
    if step_s is None or checkpoint_s is None:
        raise ConfigError(
            f"--profile {profile}: {'step_s' if step_s is None else 'checkpoint_s'} is missing; copy the profile and "
            "enter the seconds of a step (step_s of metrics.jsonl) and of a checkpoint, of a short run there"
        )

    def paid_s(machine: Interruptions, every: int) -> float:
        return num_steps / every * machine.paid_s(every * step_s + checkpoint_s)

    stays_s = paid_s(Interruptions(0.0), every_steps)
    result: dict[str, Any] = {
        "basis": f"profile {profile}",
        "step_s": step_s,
        "checkpoint_s": checkpoint_s,
        "checkpoint_every_steps": every_steps,
        "seconds": stays_s,
        "usd_compute": usd(hardware.usd_per_hour, stays_s),
        "spot": None,
        "hardware": hardware.model_dump(mode="json"),
    }
    if hardware.spot is not None:
        machine = _interruptions(hardware, nodes)
        machine = machine.starting_in(hardware.model_start_s)
        best_s = min(machine.best_work_s(checkpoint_s), num_steps * step_s)
        near = {max(1, math.floor(best_s / step_s)), max(1, math.ceil(best_s / step_s))}
        best = min(near, key=lambda every: paid_s(machine, every))
        redone_s = num_steps / every_steps * machine.redone_s(every_steps * step_s + checkpoint_s)
        young_s = math.sqrt(2 * checkpoint_s / machine.per_s) if machine.per_s else math.inf
        result["spot"] = {
            **_expected(machine, hardware, paid_s(machine, every_steps)),
            "redone": _finite(redone_s / stays_s),
            "young_steps": _finite(young_s / step_s),
            "best_every_steps": best,
            "at_best": _expected(machine, hardware, paid_s(machine, best)),
        }
    return result


def _interruptions(hardware: Hardware, nodes: int) -> Interruptions:
    """What befalls work that needs all of these nodes."""
    spot = hardware.spot
    assert spot is not None
    return Interruptions(nodes * spot.interruptions_per_node_hour / 3600, spot.wait_s, spot.start_s)


def _expected(machine: Interruptions, hardware: Hardware, paid_s: float, nodes: int = 1) -> dict[str, Any]:
    """`nodes`: how many are interrupted as `machine` is, each on its own."""
    price = usd(hardware.spot_usd_per_hour, paid_s)
    return {
        "seconds": _finite(machine.all_s(paid_s)),
        "usd": None if price is None else _finite(price),
        "interruptions": _finite(nodes * machine.per_s * paid_s),
    }


def _occupied_s(loads: Sequence[StageLoad], cluster: SimulatedCluster, machine: Interruptions) -> float:
    """The least seconds in which the work can be done: of the resource, or of the workers, with the most of it."""
    amounts: dict[str, float] = {}
    for load in loads:
        stage, busy_s = load.stage, load.paid_s(machine)
        work_s = busy_s * load.work_s / load.busy_s if load.busy_s else 0.0
        for name, amount in stage.uses.items():
            if name in cluster.capacity:
                amounts[name] = amounts.get(name, 0.0) + work_s * amount / cluster.capacity[name]
        if stage.workers is None:
            amounts[""] = amounts.get("", 0.0) + busy_s * stage.slots / cluster.processes
        else:
            amounts[f"workers of {stage.name}"] = busy_s / stage.workers
    return max(amounts.values())


def _cost(found: Mapping[str, Any]) -> tuple[float, float]:
    money, seconds = found["usd_with_files"], found["seconds"]
    seconds = math.inf if seconds is None else seconds
    return (seconds if money is None else money, seconds)


def _finite(value: float) -> float | None:
    """None for what never ends."""
    return value if math.isfinite(value) else None
