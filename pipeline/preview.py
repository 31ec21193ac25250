"""Looks at a plan and at a run folder: `pipeline plan` and `pipeline status`."""

import json
import time
from typing import Any

from pipeline.errors import ConfigError
from pipeline.estimate import Basis, expected_bytes, predict
from pipeline.hardware import Hardware, load_profile, this_machine
from pipeline.lock import is_running
from pipeline.plan import Plan
from pipeline.probe import probe
from pipeline.retries import with_retries
from pipeline.runfolder import ESTIMATE, METRICS, PLAN, SUMMARY, RunFolder
from pipeline.runner import describe
from pipeline.state import check_groups
from pipeline.storage import LocalStorage
from pipeline.survey import Survey, count_work, survey
from pipeline.workflow import PlanOptions, ShardedWorkflow


def preview(workflow: ShardedWorkflow, out: str, options: PlanOptions) -> dict[str, object]:
    """Counts shards, rows and bytes of the plan, and what the run folder already has; predicts time if asked to.

    Raises:
        ConfigError: unusable configuration, input or profile.
        PipelineError: the probe failed.
    """
    run = RunFolder(out)
    if isinstance(run.storage, LocalStorage) and run.root.exists() and not run.root.is_dir():
        raise ConfigError(f"--out {out}: is not a folder; choose a folder that you can write to")
    if options.save and options.rows is not None:
        raise ConfigError(f"--save: a plan for --rows {options.rows} is none of the run in {out}; leave one out")
    plan = with_retries(workflow.plan(run), run)
    run.transient_groups = plan.transient_groups
    hardware = load_profile(options.profile) if options.profile else this_machine(workflow.config.execution)
    check_groups(plan, run, restart=False, write=False)
    found = survey(plan, run)
    if options.rows is not None:
        found = found.scaled(options.rows, plan)
    basis = _basis(workflow, plan, found, hardware, options)
    bytes_to_do = expected_bytes(plan, basis)
    result = {
        **describe(workflow, plan),
        "shards": found.shards,
        "input_rows": found.rows,
        "groups": {
            name: {
                "shards_done": group.shards_done,
                "shards_to_do": group.shards_to_do,
                "bytes_done": group.bytes_done,
                "bytes_to_do": bytes_to_do[name],
            }
            for name, group in found.groups.items()
        },
        "out": str(out),
        "estimate": predict(plan, basis, bytes_to_do) if options.probe or options.profile else None,
    }
    if options.save:
        run.storage.write_json(ESTIMATE, {"time": round(time.time(), 3), **result})
    return result


def _basis(workflow: ShardedWorkflow, plan: Plan, found: Survey, hardware: Hardware, options: PlanOptions) -> Basis:
    """With a profile only stages that cannot be counted are probed: the others are computed, without their models."""
    counted = count_work(plan, found.samples)
    executor, execution = options.executor or workflow.default_executor, workflow.config.execution
    measured = None
    if options.probe and any(batch.needs for batch in found.work):
        stages = [stage for stage in plan.stages if not options.profile or stage.name not in counted]
        measured = probe(plan, stages, found.samples, executor, execution)
    executor = "ray" if options.profile else executor
    return Basis(found, counted, measured, hardware, executor, execution.max_in_flight_shards, options.profile)


def run_status(place: str) -> dict[str, object]:
    """Reads the state of a run folder.

    Raises:
        ConfigError: the folder is not a run folder.
    """
    run = RunFolder(place)
    plan = run.storage.read_json(PLAN)
    if plan is None:
        raise ConfigError(f"{place}: not a run folder (no plan.json); give the --out of a `pipeline run`")
    groups = {}
    for stage in plan["stages"]:
        for name in stage["groups"]:
            if name in plan["transient_groups"]:
                continue
            shards = rows = 0
            drops: dict[str, int] = {}
            for record in run.records(name):
                shards, rows = shards + 1, rows + int(str(record["rows"]))
                reasons = record["drops"]
                assert isinstance(reasons, dict)
                for reason, count in reasons.items():
                    drops[reason] = drops.get(reason, 0) + count
            groups[name] = {"shards": shards, "rows": rows, "drops": drops}
    summary = run.storage.read_json(SUMMARY)
    return {
        "run": place,
        "workflow": plan["workflow"],
        "running": is_running(run.storage),
        "outcome": summary["outcome"] if summary else None,
        "groups": groups,
        "metrics": _newest_metrics(run),
    }


def _newest_metrics(run: RunFolder) -> dict[str, Any] | None:
    """The last of the lines in `metrics.jsonl`, which a training writes; a line that is being written is none yet."""
    if run.storage.size(METRICS) is None:
        return None
    for line in reversed(run.storage.read(METRICS).splitlines()):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return None
