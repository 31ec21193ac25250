"""Compares a run with the plan that was saved for it (`pipeline plan --save`)."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from pipeline.storage.events import read_events
from pipeline.storage.run_folder import ESTIMATE, PLAN, RunFolder
from pipeline.units import human_bytes, human_seconds


def compare_with_plan(run: RunFolder, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """Planned and actual bytes of each group, and seconds of each stage; None if no plan was saved.

    Seconds are those since the plan was made, over all runs of the folder; a stage's are of its workers, without
    their start.

    Args:
        sizes: bytes on disk of each group.
    """
    saved: dict[str, Any] | None = run.storage.read_json(ESTIMATE, "delete it, or run `pipeline plan --save` again")
    plan = run.read_engine_file(PLAN)
    if saved is None or plan is None:
        return None
    if saved["fingerprints"] != plan["fingerprints"]:
        return {"same_configuration": False}
    groups = [
        _row("group", name, group["bytes_done"] + (group["bytes_to_do"] or 0), sizes[name])
        for name, group in saved["groups"].items()
        if name in sizes
    ]
    estimate = saved["estimate"]
    if estimate is None:
        return {"same_configuration": True, "groups": groups, "stages": []}
    busy, seconds = _times(run, saved["time"])
    stages = [_row("stage", s["stage"], s["busy_s"], round(busy[s["stage"]], 2)) for s in estimate["stages"]]
    return {
        "same_configuration": True,
        "basis": estimate["basis"],
        "groups": groups,
        "stages": [_row("stage", "all, overlapping", estimate["seconds"], round(seconds, 2)), *stages],
    }


def comparison_lines(planned: Mapping[str, Any] | None) -> list[str]:
    """For people, on the command line."""
    if planned is None:
        return []
    if not planned["same_configuration"]:
        return ["planned with another configuration; no comparison"]
    rows = [(row["group"], human_bytes(row["planned"]), human_bytes(row["actual"]), row) for row in planned["groups"]]
    rows += [
        (row["stage"], human_seconds(row["planned"]), human_seconds(row["actual"]), row) for row in planned["stages"]
    ]
    return [
        f"{name:<18} planned {expected:>10}  actual {actual:>10}  {_shown(row['ratio'])}"
        for name, expected, actual, row in rows
    ]


def _times(run: RunFolder, since: float) -> tuple[dict[str, float], float]:
    """Worker seconds by stage and wall seconds of the runs, from the events after `since` (Unix time)."""
    busy: dict[str, float] = defaultdict(float)
    seconds = 0.0
    started: float | None = None
    for event in read_events(run.storage):
        if event.get("time", 0.0) < since:
            continue
        if event["event"] == "task":
            busy[event["stage"]] += event["seconds"] - event["setup_s"]
        elif event["event"] == "run_started":
            started = event["time"]
        elif event["event"] == "run_ended" and started is not None:
            seconds, started = seconds + event["time"] - started, None
    return busy, seconds


def _row(kind: str, name: str, planned: float, actual: float) -> dict[str, Any]:
    return {
        kind: name,
        "planned": planned,
        "actual": actual,
        "ratio": round(planned / actual, 4) if actual else None,
    }


def _shown(ratio: float | None) -> str:
    return "" if ratio is None else f"planned / actual {ratio:.2f}"
