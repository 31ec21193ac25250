"""Predicts a run: bytes, time, GPU-hours, cost and the bottleneck, from counted work and measured or assumed costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError
from pipeline.plan import Plan
from pipeline.planning.hardware import Hardware
from pipeline.planning.probe import LinearCost, Measured
from pipeline.planning.simulate import SimulatedShard, simulate
from pipeline.planning.simulated_executor import SimulatedCluster, SimulatedStage, SimulationResult
from pipeline.planning.spot import StageLoad, spot_run, usd
from pipeline.planning.survey import Counted, Survey
from pipeline.stage import Stage

_SIMULATED_SHARDS = 400
_TB = 1e12


@dataclass(frozen=True, slots=True)
class Basis:
    """The basis of a prediction."""

    survey: Survey
    counted: Mapping[str, Counted]
    """Work per input row, by stage."""
    measured: Measured | None = None
    hardware: Hardware | None = None
    executor: str = "ray"
    window: int | None = None
    """`execution.max_in_flight_shards`."""
    profile: str | None = None
    """Name of the hardware profile; None means this machine."""
    far: bool = False
    """Whether the run folder is on an object store, so that each file costs something."""

    @property
    def kept(self) -> float:
        return self.measured.kept if self.measured else 1.0


def expected_bytes(plan: Plan, basis: Basis) -> dict[str, int | None]:
    """Bytes still to write of each lasting group; None if unknown."""
    result: dict[str, int | None] = {}
    makers = {group.name: stage for stage in plan.stages for group in stage.groups}
    for name, group in basis.survey.groups.items():
        cost = _bytes_cost(makers[name], name, basis)
        rows = group.rows_to_do * basis.kept
        result[name] = None if cost is None else round(group.shards_to_do * cost.fixed + rows * cost.slope)
    return {n: 0 if not basis.survey.groups[n].shards_to_do else b for n, b in result.items()}


def bytes_otherwise(basis: Basis) -> dict[str, dict[str, int]]:
    """Bytes that what is still to write would take in other layouts, by group and layout."""
    result: dict[str, dict[str, int]] = {}
    for counted in basis.counted.values():
        for group, layouts in counted.bytes_otherwise.items():
            rows = basis.survey.groups[group].rows_to_do * basis.kept
            result[group] = {name: round(rows * per_row) for name, per_row in layouts.items() if rows}
    return result


def _bytes_cost(stage: Stage, group: str, basis: Basis) -> LinearCost | None:
    """Bytes by kept rows: counted, else measured, else the stage's own estimate; None if unknown."""
    if stage.name in basis.counted:
        return LinearCost(0.0, basis.counted[stage.name].bytes[group])
    if basis.measured and stage.name in basis.measured.stages:
        return basis.measured.stages[stage.name].bytes[group]
    known = stage.estimate_bytes(group, 1_000_000)
    return None if known is None else LinearCost(0.0, known / 1_000_000)


def predict(plan: Plan, basis: Basis, bytes_to_do: Mapping[str, int | None]) -> dict[str, Any]:
    """The prediction as JSON, of the stages that still have work to do.

    Raises:
        ConfigError: the profile lacks a number.
    """
    hardware = basis.hardware
    assert hardware is not None
    needed = {name for batch in basis.survey.work for name in batch.needs}
    simulated_stages = [
        _simulated_stage(plan, stage, basis, hardware) for stage in plan.stages if stage.name in needed
    ]
    cluster = _cluster(simulated_stages, basis, hardware)
    batches = [(SimulatedShard(b.needs, b.rows), b.count) for b in basis.survey.work if b.needs]
    simulation = _simulate(simulated_stages, batches, cluster)
    start_s = basis.measured.run_start_s if basis.measured and basis.profile is None else 0.0
    seconds = simulation.seconds + start_s if batches else 0.0
    stages = [_stage(plan, s, basis, hardware, simulation, batches, bytes_to_do) for s in simulated_stages]
    return {
        "basis": _describe(basis),
        "seconds": round(seconds, 1),
        "run_start_s": round(start_s, 1),
        "kept": round(basis.kept, 4),
        "bottleneck": _bottleneck(simulated_stages, cluster, simulation, seconds),
        "stages": stages,
        "gpu_hours": sum(stage["gpu_hours"] for stage in stages),
        "usd_compute": usd(hardware.usd_per_hour, seconds),
        "spot": _spot(simulated_stages, batches, cluster, simulation, basis, seconds),
        "object_store": _object_store(basis.survey, hardware, bytes_to_do),
        "hardware": hardware.model_dump(mode="json"),
    }


def _spot(
    simulated_stages: Sequence[SimulatedStage],
    batches: Sequence[tuple[SimulatedShard, int]],
    cluster: SimulatedCluster,
    simulation: SimulationResult,
    basis: Basis,
    seconds: float,
) -> dict[str, Any] | None:
    """The same on spot machines; None if the profile has none, or nothing takes time."""
    hardware = basis.hardware
    assert hardware is not None
    if hardware.spot is None or not any(simulation.busy_s.values()):
        return None
    loads = [
        StageLoad(simulated, *_extent(simulated, batches), simulation.busy_s[simulated.name]).with_task_s(hardware)
        for simulated in simulated_stages
    ]
    files = sum(group.shards_to_do for group in basis.survey.groups.values()) if basis.far else 0
    return spot_run(loads, cluster, hardware, seconds, files)


def _simulated_stage(plan: Plan, stage: Stage, basis: Basis, hardware: Hardware) -> SimulatedStage:
    makers = {group.name: s.name for s in plan.stages for group in s.groups}
    counted = basis.counted.get(stage.name)
    cost = basis.measured.stages.get(stage.name) if basis.measured else None
    workers, gpus = _workers(stage, hardware)
    start_s, seconds, uses = 0.0, LinearCost(), {"cpus": 1.0}
    if cost is not None:
        units = counted.units * basis.kept if counted else 1.0
        start_s = cost.start_s
        seconds = LinearCost(cost.seconds.fixed, cost.seconds.slope * units)
        uses = {"cpus": cost.cores, "gpus": gpus}
    elif counted is not None:
        start_s = hardware.model_start_s
        seconds = LinearCost(
            0.0, counted.flops * basis.kept / (_tflops(hardware, counted.dtype) * hardware.utilisation * 1e12)
        )
        uses = {"gpus": gpus} if gpus else {"cpus": float(hardware.num_cpus)}
    elif (known := hardware.seconds_per_row(stage.name)) is not None:
        seconds = LinearCost(0.0, known)
    else:
        raise ConfigError(
            f"--profile {basis.profile}: cpu_s_per_row has no {stage.name}; add it, or measure it with --probe"
        )
    fetched = cost.bytes[stage.groups[0].name].slope if cost else hardware.original_bytes
    if not stage.inputs and seconds.slope:
        uses["network"] = fetched * 8e-9 / seconds.slope
    if basis.executor == "inline":
        workers = None
    return SimulatedStage(
        name=stage.name,
        after=tuple(dict.fromkeys(makers[name] for name in stage.inputs)),
        start_s=start_s,
        shard_s=seconds.fixed,
        row_s=seconds.slope,
        uses=uses,
        workers=workers,
        slots=min(stage.resources.num_cpus, hardware.num_cpus) if basis.executor == "ray" else 1.0,
    )


def _workers(stage: Stage, hardware: Hardware) -> tuple[int | None, float]:
    """Number of its own workers (None means the shared processes), and GPUs per worker."""
    if stage.max_workers is None:
        return None, 0.0
    wanted = 1.0 if stage.resources.num_gpus is None else stage.resources.num_gpus
    gpus = wanted if hardware.num_gpus else 0.0
    return stage.max_workers or max(1, int(hardware.num_gpus / gpus) if gpus else 1), gpus


def _tflops(hardware: Hardware, dtype: str) -> float:
    if dtype not in hardware.tflops:
        raise ConfigError(f"--profile: tflops has no {dtype}, the compute_dtype of an encoder; add it to the profile")
    return hardware.tflops[dtype]


def _cluster(simulated_stages: Sequence[SimulatedStage], basis: Basis, hardware: Hardware) -> SimulatedCluster:
    capacity = {"cpus": float(hardware.num_cpus)}
    if hardware.num_gpus:
        capacity["gpus"] = float(hardware.num_gpus)
    if hardware.network_gbit_per_s is not None:
        capacity["network"] = hardware.network_gbit_per_s
    if basis.executor == "inline":
        return SimulatedCluster(capacity, 1, 1)
    workers = hardware.num_cpus + sum(s.workers or 0 for s in simulated_stages)
    return SimulatedCluster(capacity, hardware.num_cpus, basis.window or max(4, 2 * workers))


def _simulate(
    simulated_stages: Sequence[SimulatedStage],
    batches: Sequence[tuple[SimulatedShard, int]],
    cluster: SimulatedCluster,
) -> SimulationResult:
    """Simulates all shards, or of a large run enough of them to extrapolate."""
    total = sum(count for _, count in batches)
    most = max(_SIMULATED_SHARDS, 8 * cluster.window)
    if total <= most:
        return simulate(simulated_stages, _spread(batches, total), cluster)
    short, long = (simulate(simulated_stages, _spread(batches, n), cluster) for n in (most // 2, most))
    further = (total - most) / (most - most // 2)  # in multiples of the second half of the simulated shards
    return SimulationResult(
        seconds=long.seconds + further * (long.seconds - short.seconds),
        busy_s={name: value + further * (value - short.busy_s[name]) for name, value in long.busy_s.items()},
        used={name: value + further * (value - short.used[name]) for name, value in long.used.items()},
    )


def _spread(batches: Sequence[tuple[SimulatedShard, int]], count: int) -> list[SimulatedShard]:
    """This number of shards, evenly spread over the batches, in order."""
    total = sum(n for _, n in batches)
    jobs: list[SimulatedShard] = []
    seen = 0
    for job, n in batches:
        seen += n
        jobs += [job] * (seen * count // total - len(jobs) if total else 0)
    return jobs


def _stage(
    plan: Plan,
    simulated: SimulatedStage,
    basis: Basis,
    hardware: Hardware,
    simulation: SimulationResult,
    batches: Sequence[tuple[SimulatedShard, int]],
    bytes_to_do: Mapping[str, int | None],
) -> dict[str, Any]:
    stage = next(s for s in plan.stages if s.name == simulated.name)
    shards, rows = _extent(simulated, batches)
    work_s = shards * simulated.shard_s + rows * simulated.row_s
    sizes = [bytes_to_do[group.name] for group in stage.groups if group.name in bytes_to_do]
    size = None if None in sizes else sum(s for s in sizes if s is not None)
    counted = basis.counted.get(simulated.name)
    return {
        "stage": simulated.name,
        "rows": int(rows),
        "bytes": size,
        "busy_s": round(simulation.busy_s[simulated.name], 2),
        "alone_s": round(work_s / _parallel(simulated, hardware), 2),
        "gpu_hours": work_s * simulated.uses.get("gpus", 0.0) / 3600,
        "usd_per_month": None if size is None else size / _TB * hardware.usd_per_tb_month,
        **({} if counted is None else {counted.counter: round(counted.units * rows * basis.kept)}),
        **({} if counted is None else {"flops": counted.flops * rows * basis.kept}),
    }


def _extent(simulated: SimulatedStage, batches: Sequence[tuple[SimulatedShard, int]]) -> tuple[int, int]:
    """Shards and rows that need the stage."""
    shards = sum(count for job, count in batches if simulated.name in job.needs)
    return shards, sum(job.rows * count for job, count in batches if simulated.name in job.needs)


def _parallel(simulated: SimulatedStage, hardware: Hardware) -> float:
    """Tasks that run concurrently at full speed if no other stage runs."""
    limits = [simulated.workers or hardware.num_cpus / simulated.slots]
    capacity = {"cpus": hardware.num_cpus, "gpus": hardware.num_gpus, "network": hardware.network_gbit_per_s}
    limits += [have / simulated.uses[name] for name, have in capacity.items() if have and simulated.uses.get(name)]
    return max(1.0, min(limits))


def _bottleneck(
    simulated_stages: Sequence[SimulatedStage], cluster: SimulatedCluster, simulation: SimulationResult, seconds: float
) -> dict[str, object]:
    """The resource of the machine, or the workers of a stage, with the largest busy fraction of the time."""
    if not seconds:
        return {"name": "nothing to do", "busy": 0.0}
    busy = {name: used / cluster.capacity[name] / seconds for name, used in simulation.used.items()}
    for simulated in simulated_stages:
        if simulated.workers is not None:
            busy[f"workers of {simulated.name}"] = simulation.busy_s[simulated.name] / simulated.workers / seconds
    name = max(busy, key=lambda key: busy[key])
    heaviest = max(simulated_stages, key=lambda s: simulation.busy_s[s.name] * s.uses.get(name, 0.0))
    result: dict[str, object] = {"name": name, "busy": round(busy[name], 3)}
    if heaviest.uses.get(name):
        result["mostly"] = heaviest.name
    return result


def _object_store(survey: Survey, hardware: Hardware, bytes_to_do: Mapping[str, int | None]) -> dict[str, object]:
    sizes = [size for size in bytes_to_do.values() if size is not None]
    files = sum(group.shards_to_do for group in survey.groups.values())
    return {
        "bytes": sum(sizes),
        "files": files,
        "usd_per_month": sum(sizes) / _TB * hardware.usd_per_tb_month,
        "usd_to_write": files / 1e6 * hardware.usd_per_million_puts,
    }


def _describe(basis: Basis) -> str:
    measured = basis.measured
    parts = [] if basis.profile is None else [f"profile {basis.profile}"]
    if measured is not None:
        parts.append(
            f"{', '.join(measured.stages)} measured here on {measured.rows:,} rows in {measured.seconds:.0f} s"
        )
    return "; ".join(parts)
