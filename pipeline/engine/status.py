"""The state of a run folder: `pipeline status`."""

import json
from typing import Any

from pipeline.engine.division import view_parts
from pipeline.errors import ConfigError
from pipeline.storage.lock import is_running
from pipeline.storage.run_folder import METRICS, PLAN, SUMMARY, RunFolder


def run_status(place: str) -> dict[str, object]:
    """Reads the state of a run folder.

    Raises:
        ConfigError: the folder is not a run folder.
    """
    run = RunFolder(place)
    plan, summary = run.read_engine_file(PLAN), run.read_engine_file(SUMMARY)
    if plan is None:
        raise ConfigError(f"{place}: not a run folder (no plan.json); give the --out of a `pipeline run`")
    parts = view_parts(run)
    with run.indexed():
        groups = {
            name: _group_status(run, name)
            for stage in plan.get("stages", ())
            for name in stage["groups"]
            if name not in plan["transient_groups"]
        }
    return {
        "run": place,
        "workflow": plan.get("workflow"),
        "running": is_running(run.storage),
        "outcome": summary.get("outcome") if summary else None,
        **({"filtered": summary["filtered"]} if summary and summary.get("filtered") else {}),
        "groups": groups,
        **({"parts": {**parts.to_json(), "missing": parts.missing_text()}} if parts is not None else {}),
        "metrics": _newest_metrics(run),
    }


def _group_status(run: RunFolder, name: str) -> dict[str, object]:
    shards = rows = 0
    drops: dict[str, int] = {}
    for record in run.records(name):
        shards, rows = shards + 1, rows + record.rows
        for reason, count in record.drops.items():
            drops[reason] = drops.get(reason, 0) + count
    return {"shards": shards, "rows": rows, "drops": drops}


def _newest_metrics(run: RunFolder) -> dict[str, Any] | None:
    """The last complete line of `metrics.jsonl`, which a training writes."""
    if run.storage.size(METRICS) is None:
        return None
    for line in reversed(run.storage.read(METRICS).splitlines()):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            return values
    return None
