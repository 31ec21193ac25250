"""Prints results as text on standard output."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.units import human_bytes, human_seconds

_WHOLE_CELL = 20
"""Longest cell, in characters, of a column that is never wrapped."""
_PAID = ("requests", "tokens_in", "tokens_out")
"""Counters of a group that are shown, of what is paid for."""


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """Prints a plain table. Only long cells are wrapped: numbers and short names stay whole in a narrow terminal."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    needed = 0
    for index, column in enumerate(columns):
        width = max((len(str(row[index])) for row in rows), default=0)
        if width <= _WHOLE_CELL:
            width = max(width, *map(len, column.split()), 1)
            table.add_column("\n".join(wrap(column, width)), no_wrap=True)
        else:
            width = _WHOLE_CELL
            table.add_column(column, overflow="fold")
        needed += width + 2
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(soft_wrap=False)
    console.width = max(console.width, needed)
    console.print(table)


def show_summary(summary: Mapping[str, Any], next_steps: Sequence[tuple[str, str]]) -> None:
    """What a run made and dropped, and the next steps."""
    if "summary" in summary:
        show_values(summary["summary"])
        print(f"{summary['outcome']}: {summary['seconds']:.1f} s")
        _show_next_steps(next_steps)
        return
    tally = summary["tally"]
    rows = []
    for name, group in tally["groups"].items():
        drops = ", ".join(f"{reason} {count}" for reason, count in group["drops"].items()) or "-"
        rows.append([name, group["shards"], group["rows"], human_bytes(group["bytes"]), drops])
    show_table(["group", "shards", "rows", "on disk", "drops"], rows)
    skipped = f", {tally['shards_skipped']} already finished" if tally["shards_skipped"] else ""
    kept = f"{summary['num_samples']} of " if "num_samples" in summary else ""
    print(
        f"{summary['outcome']}: {kept}{tally['input_rows']} samples in {tally['shards']} shards{skipped}, "
        f"{summary['seconds']:.1f} s"
    )
    _show_notices(summary)
    _show_next_steps(next_steps)


def show_job(job: Mapping[str, Any]) -> None:
    """State of a submitted job."""
    print(f"{job['job']}: {job['workflow']} to {job['out']}: {job['status'].lower()}", end="")
    print("" if job["exit_code"] is None else f", exit code {job['exit_code']}")
    if job["last_line"]:
        print(job["last_line"])


def _show_next_steps(next_steps: Sequence[tuple[str, str]]) -> None:
    for label, path in next_steps:
        print(f"{label:<7} {path}")


def _show_notices(result: Mapping[str, Any]) -> None:
    for notice in result.get("notices", ()):
        print(notice)


def show_values(values: Mapping[str, Any]) -> None:
    """Names and values; the suffix of a name gives the unit (`_bytes`)."""
    show_table(["name", "value"], [[name.replace("_", " "), _human(name, value)] for name, value in values.items()])


_MOST_SHOWN = 12


def _human(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return human_bytes(value) if name.endswith("_bytes") else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if any(isinstance(item, Mapping) for item in items):
        return f"{len(items)} (--json shows them)"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_human(f'{name}.{key}', item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        shown = [_human(name, item) for item in value]
        return ", ".join(shown if len(shown) <= _MOST_SHOWN else [*shown[:3], f"... ({len(shown)} in all)", shown[-1]])
    return str(value)


def show_preview(result: Mapping[str, Any]) -> None:
    """Shards and bytes of each stage, done and to do; for a job its sizes and needs."""
    if "summary" in result:
        show_values(result["summary"])
        if "estimate" in result:
            _show_training_estimate(result["estimate"])
        return
    makers = {group: stage for stage in result["stages"] for group in stage["groups"]}
    rows = []
    for name, group in result["groups"].items():
        todo = "unknown" if group["bytes_to_do"] is None else human_bytes(group["bytes_to_do"])
        stage = makers[name]["name"]
        rows.append([stage, name, group["shards_done"], group["shards_to_do"], human_bytes(group["bytes_done"]), todo])
    show_table(["stage", "group", "shards done", "shards to do", "on disk", "still to write"], rows)
    print(f"{result['input_rows']:,} samples in {result['shards']:,} shards; run folder {result['out']}")
    for name, group in result["groups"].items():
        for layout, size in group.get("bytes_otherwise", {}).items():
            stored = group["bytes_to_do"]
            times = f", {size / stored:.3g} times as much" if stored else ""
            print(f"{name}: {human_bytes(stored)} stored; {layout}: {human_bytes(size)}{times}")
    for name, entry in result.get("outlook", {}).items():
        print(f"{name}: {entry['text']}")
    for room in result.get("disk", ()):
        _show_room(room)
    _show_notices(result)
    if result["estimate"] is None:
        print("time: --probe measures it here; --profile NAME computes it for other hardware")
    else:
        _show_estimate(result["estimate"])


def _show_room(values: Mapping[str, Any]) -> None:
    from pipeline.engine.room import Room

    room = Room(**values)
    least = f"; it cannot be less than {human_bytes(room.least_bytes)}" if room.is_hopeless else ""
    print(f"disk: {room}{f', too little{least}' if room.is_too_small else ''}")


def _show_estimate(estimate: Mapping[str, Any]) -> None:
    rows = [
        [
            stage["stage"],
            f"{stage['rows']:,}",
            f"{stage['tokens']:,}" if "tokens" in stage else "-",
            "unknown" if stage["bytes"] is None else human_bytes(stage["bytes"]),
            human_seconds(stage["alone_s"]),
            human_seconds(stage["busy_s"]),
            f"{stage['gpu_hours']:,.3g}",
            "unknown" if stage["usd_per_month"] is None else f"{stage['usd_per_month']:,.2f}",
        ]
        for stage in estimate["stages"]
    ]
    print()
    show_table(["stage", "samples", "tokens", "bytes", "alone", "busy", "GPU-hours", "$/month stored"], rows)
    bottleneck, store, compute = estimate["bottleneck"], estimate["object_store"], estimate["usd_compute"]
    mostly = f", mostly with {bottleneck['mostly']}" if "mostly" in bottleneck else ""
    print(
        f"time        {human_seconds(estimate['seconds'])}, stages overlapping"
        + ("" if compute is None else f"; ${compute:,.2f} for the machine")
    )
    if (spot := estimate["spot"]) is not None:
        _show_spot(spot)
        if (rows := spot["best_shard_rows"]) is not None:
            print(f"shards      of {rows:,} samples are best there: {_time_and_money(spot['at_best'])}")
    print(f"bottleneck  {bottleneck['name']}: busy {bottleneck['busy']:.0%} of the time{mostly}")
    print(
        f"store       {human_bytes(store['bytes'])} in {store['files']:,} files: "
        f"${store['usd_per_month']:,.2f} a month, ${store['usd_to_write']:,.2f} to write"
    )
    print(f"basis       {estimate['basis']}")


def _show_training_estimate(estimate: Mapping[str, Any]) -> None:
    print()
    every = f"checkpoints every {estimate['checkpoint_every_steps']:,} steps"
    print(f"time        {_time_and_money({**estimate, 'usd': estimate['usd_compute']})}, {every}")
    if (spot := estimate["spot"]) is not None:
        _show_spot(spot)
        best = _time_and_money(spot["at_best"])
        print(f"checkpoints every {spot['best_every_steps']:,} steps are best there: {best}")
    print(f"basis       {estimate['basis']}")


def _show_spot(spot: Mapping[str, Any]) -> None:
    counts = ""
    if spot["interruptions"] is not None and spot["redone"] is not None:
        counts = f", {spot['interruptions']:,.3g} interruptions, {100 * spot['redone']:.2g}% of the work done again"
    print(f"spot        {_time_and_money(spot)}{counts}")


def _time_and_money(found: Mapping[str, Any]) -> str:
    if found["seconds"] is None:
        return "it never ends: machines are taken away before they finish"
    return human_seconds(found["seconds"]) + ("" if found["usd"] is None else f", ${found['usd']:,.2f}")


def show_status(result: Mapping[str, Any]) -> None:
    """Progress of a run."""
    rows = [
        [name, group["shards"], group["rows"], ", ".join(f"{r} {c}" for r, c in group["drops"].items()) or "-"]
        for name, group in result["groups"].items()
    ]
    if rows:
        show_table(["group", "shards", "rows", "drops"], rows)
    paid = [
        [name, *(f"{group['counters'].get(counter, 0):,.0f}" for counter in _PAID)]
        for name, group in result["groups"].items()
        if any(counter in group["counters"] for counter in _PAID)
    ]
    if paid:
        show_table(["group", *_PAID], paid)
    if filtered := result.get("filtered"):
        print(f"{filtered:,} other rows of the source were filtered by source.where")
    if result["metrics"] is not None:
        show_values(result["metrics"])
    if parts := result.get("parts"):
        missing = f"; {parts['missing']}" if parts["missing"] else ""
        print(f"parts: {parts['done']} of {parts['parts']} done{missing}")
    state = "running" if result["running"] else result["outcome"] or "not finished; run the same command again"
    print(f"{result['workflow']}: {state}")


def show_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    """Results of `pipeline doctor`."""
    show_table(["", "check", "found"], [[c["status"], c["name"], c["message"]] for c in checks])


def show_cluster(result: Mapping[str, Any]) -> None:
    """Results of `pipeline doctor --cluster`: a line per node, then everything that is not as it should be."""
    rows = []
    for node in result["nodes"]:
        facts = node["facts"]
        gpus = sorted({gpu["name"] for gpu in facts.get("gpus", ())})
        rows.append(
            [
                node["node"],
                f"{node['resources'].get('CPU', 0):g}",
                f"{node['resources'].get('GPU', 0):g} {', '.join(gpus)}".strip(),
                *(_node_facts(facts) if facts else ["-"] * 4),
            ]
        )
    show_table(["node", "CPUs", "GPUs", "memory", "Python", "temporary", "/dev/shm"], rows)
    problems = [check for check in result["checks"] if check["status"] != "ok"]
    if problems:
        print()
        rows = [[check["status"], check["node"] or "all", check["name"], check["message"]] for check in problems]
        show_table(["", "node", "check", "found"], rows)
    bad = {check["node"] for check in problems if check["status"] == "bad"}
    found = (
        "a run will work on all" if not bad else f"not so: {', '.join(sorted(node or 'the cluster' for node in bad))}"
    )
    print(f"\n{result['address']}: {result['num_nodes']} nodes; {found}")


def _node_facts(facts: Mapping[str, Any]) -> list[str]:
    return [
        human_bytes(facts["memory_bytes"]),
        facts["versions"]["python"],
        human_bytes(facts["temporary"]["free_bytes"]),
        human_bytes(facts["shared_memory"]["free_bytes"]),
    ]
