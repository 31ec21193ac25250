"""Looks at a plan and at a run folder without running anything: `pipeline plan` and `pipeline status`."""

import json
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.retries import with_retries
from pipeline.runfolder import RunFolder
from pipeline.runner import describe
from pipeline.state import Ledger, check_groups
from pipeline.workflow import ShardedWorkflow


def preview(workflow: ShardedWorkflow, out: Path) -> dict[str, object]:
    """Counts shards, rows and expected bytes of the plan, and what the run folder already has."""
    run = RunFolder(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is not a folder; choose a folder that you can write to")
    plan = with_retries(workflow.plan(run), run)
    run.transient_groups = plan.transient_groups
    check_groups(plan, run, restart=False, write=False)
    ledger = Ledger(plan, run, read_only=True)
    shards = rows = 0
    groups = {
        name: {"shards_done": 0, "shards_to_do": 0, "bytes_done": 0, "bytes_to_do": 0}
        for name in plan.groups
        if name not in plan.transient_groups
    }
    makers = {group.name: stage for stage in plan.stages for group in stage.groups}
    unknown: set[str] = set()
    for shard in plan.shards():
        shards, rows = shards + 1, rows + shard.num_rows
        finished = ledger.finished(shard)
        for name, entry in groups.items():
            record = finished.get(name)
            if record is not None:
                files = record["files"]
                assert isinstance(files, list)
                entry["shards_done"] += 1
                entry["bytes_done"] += sum(file["bytes"] for file in files)
                continue
            entry["shards_to_do"] += 1
            expected = makers[name].estimate_bytes(name, shard.num_rows)
            if expected is None:
                unknown.add(name)
            else:
                entry["bytes_to_do"] += expected
    shown = {n: {**e, "bytes_to_do": None} if n in unknown and e["shards_to_do"] else e for n, e in groups.items()}
    return {**describe(workflow, plan), "shards": shards, "input_rows": rows, "groups": shown, "out": str(out)}


def run_status(root: Path) -> dict[str, object]:
    """Reads the state of a run folder.

    Raises:
        ConfigError: the folder is not a run folder.
    """
    run = RunFolder(root)
    if not run.plan_file.exists():
        raise ConfigError(f"{root}: not a run folder (no plan.json); give the --out of a `pipeline run`")
    plan = json.loads(run.plan_file.read_text(encoding="utf-8"))
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
    summary = json.loads(run.summary_file.read_text(encoding="utf-8")) if run.summary_file.exists() else None
    return {
        "run": str(root),
        "workflow": plan["workflow"],
        "running": _is_locked(run),
        "outcome": summary["outcome"] if summary else None,
        "groups": groups,
    }


def _is_locked(run: RunFolder) -> bool:
    try:
        with run.lock():
            return False
    except ConfigError:
        return True
