"""What a run would do: `pipeline plan`."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from pipeline.engine.room import Room, rooms
from pipeline.engine.state import RunState
from pipeline.errors import ConfigError
from pipeline.executors.base import ExecutionConfig
from pipeline.options import PlanOptions, WorkflowConfig
from pipeline.plan import Plan
from pipeline.planning.estimate import Basis, bytes_otherwise, expected_bytes, predict
from pipeline.planning.hardware import Hardware, load_profile, this_machine
from pipeline.planning.probe import probe
from pipeline.planning.survey import Survey, count_work, survey
from pipeline.storage import LocalStorage
from pipeline.storage.run_folder import ESTIMATE, RunFolder


def preview(
    workflow: str, config: WorkflowConfig, make_plan: Callable[[RunFolder], Plan], out: str, options: PlanOptions
) -> dict[str, object]:
    """Counts shards, rows and bytes of the plan, and what the run folder already has; predicts the time if requested.

    Raises:
        ConfigError: unusable configuration, input or profile.
        PipelineError: the probe failed.
    """
    run = RunFolder(out)
    if options.save and options.rows is not None:
        raise ConfigError(f"--save: a plan for --rows {options.rows} is not one for the run in {out}; leave one out")
    state = RunState(make_plan(run), run)
    plan = state.plan
    if options.check_input and plan.input is not None:
        plan.input.read_all()
    hardware = load_profile(options.profile) if options.profile else this_machine(config.execution)
    with run.indexed():
        state.ledger.check_groups(write=False)
        found = survey(state)
    if options.rows is not None:
        found = found.scaled(options.rows, plan)
    far = not isinstance(run.storage, LocalStorage)
    basis = _basis(config.execution, plan, found, hardware, options, far=far)
    bytes_to_do, otherwise = expected_bytes(plan, basis), bytes_otherwise(basis)
    result = {
        **plan.describe(workflow),
        "shards": found.shards,
        "input_rows": found.rows,
        "groups": {
            name: {
                "shards_done": group.shards_done,
                "shards_to_do": group.shards_to_do,
                "bytes_done": group.bytes_done,
                "bytes_to_do": bytes_to_do[name],
                **({"bytes_otherwise": otherwise[name]} if otherwise.get(name) else {}),
            }
            for name, group in found.groups.items()
        },
        "out": str(out),
        "notices": list(plan.notices),
        "outlook": _outlook(plan, found),
        "disk": [] if options.profile else [asdict(room) for room in _rooms(plan, run, found, bytes_to_do, config)],
        "estimate": predict(plan, basis, bytes_to_do) if options.probe or options.profile else None,
    }
    if options.save:
        run.storage.write_json(ESTIMATE, {"time": round(time.time(), 3), **result})
    return result


def _outlook(plan: Plan, found: Survey) -> dict[str, object]:
    if plan.outlook is None or not found.samples:
        return {}
    return dict(plan.outlook(found.samples, {name: group.rows_to_do for name, group in found.groups.items()}))


def _rooms(
    plan: Plan, run: RunFolder, found: Survey, bytes_to_do: Mapping[str, int | None], config: WorkflowConfig
) -> list[Room]:
    rows = {name: group.rows_to_do for name, group in found.groups.items()}
    return rooms(plan, run, bytes_to_do, rows, rows, config.execution.num_cpus)


def _basis(
    execution: ExecutionConfig, plan: Plan, found: Survey, hardware: Hardware, options: PlanOptions, *, far: bool
) -> Basis:
    """With a profile only stages that cannot be counted are probed; the others need no models."""
    counted = count_work(plan, found)
    executor = options.executor or "ray"
    measured = None
    if options.probe and any(batch.needs for batch in found.work):
        stages = [stage for stage in plan.stages if not options.profile or stage.name not in counted]
        measured = probe(plan, stages, found.samples, executor, execution)
    executor = "ray" if options.profile else executor
    window = execution.max_in_flight_shards
    return Basis(found, counted, measured, hardware, executor, window, options.profile, far)
