"""Runs one part of a sharded workflow next to drivers of the others, and puts together what all have made.

Drivers of parts share the run folder and write none of the same files: each has a lease, events and a summary of its
own below `parts/`, and commits its own shards. The last one to end puts the rest together, as does `pipeline finish`,
while it holds all of the folder.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from pipeline.config import dump_yaml
from pipeline.engine.division import Division, PartsView, read_division, summary_of_part, view_parts
from pipeline.engine.input import record_input
from pipeline.engine.progress import Lines
from pipeline.engine.retries import has_retries
from pipeline.engine.room import check_room
from pipeline.engine.runner import check_failures, check_limits, execute, finish_all, save_index
from pipeline.engine.state import RunState
from pipeline.engine.tally import Tally
from pipeline.errors import ConfigError, LockedError, PartsMissingError
from pipeline.executors.registry import make_executor
from pipeline.options import Part, RunOptions, Summary, WorkflowConfig
from pipeline.plan import Plan
from pipeline.storage.disk import disk_errors_explained
from pipeline.storage.events import EventLog
from pipeline.storage.lock import LEASE, RunLock, describe_holder, is_held, lease_of_part
from pipeline.storage.open import open_storage
from pipeline.storage.record import shard_name, shard_of
from pipeline.storage.run_folder import CONFIG, PLAN, SUMMARY, RunFolder

MakePlan = Callable[[RunFolder], Plan]
_DIVIDING = lease_of_part("plan")
"""The lease of the driver that divides the work, while it does."""
_POLL_S = 0.5
_LAST_S = 30.0
"""How long a driver that has seen all parts done waits for the others to leave the folder."""


def run_part(
    workflow: str, config: WorkflowConfig, make_plan: MakePlan, out: str, options: RunOptions, part: Part
) -> Summary:
    """Runs, or resumes, one part of the workflow in folder `out`; the last one to end finishes the run.

    Returns:
        The summary of the run if this driver finished it, else that of the part.

    Raises:
        As of `run_workflow`; of too many drops only where it finishes the run.
    """
    _refuse_options(options, part)
    run = RunFolder(out)
    if (found := read_division(run)) is not None:
        found.check_part(part, run)
    state = RunState(make_plan(run), run)
    if state.plan.no_parts:
        raise ConfigError(f"--part {part}: {state.plan.no_parts}")
    executor = make_executor(options.executor, state.plan.stages, run, config.execution, options.address)
    with disk_errors_explained(run.storage.local):
        with run.lock(take_over=options.take_over, part=part.number):
            low_disk = check_room(state.plan, run, config.execution, here=options.address is None, refuse=True)
            division = _join(workflow, state, config, options, part)
            ranges = _take(state, division, part)
            num_shards = sum(map(len, ranges))
            notices = (*state.plan.notices, *low_disk)
            state.plan = replace(state.plan, notices=notices, estimated_shards=num_shards)
            _prepare(state, division, part, ranges)
            told = {"part": str(part), "division": division.id, "shards": [[r.start, r.stop] for r in ranges]}
            events = _events(run, part)
            try:
                summary, tally = execute(
                    workflow, config.execution, state, executor, events, options, _finish_part, told
                )
                run.storage.write_json(summary_of_part(part.number), summary)
            finally:
                events.close()
        finished = _finish_if_last(workflow, config, make_plan, run, division, options)
    if finished is not None:
        return finished
    view = view_parts(run, division)
    summary["missing"] = view.missing_text() if view is not None else ""
    check_failures(run, tally, summary)
    return summary


def _refuse_options(options: RunOptions, part: Part) -> None:
    for name, is_set in (("--restart", options.restart), ("--retry-dropped", bool(options.retry_dropped))):
        if is_set:
            raise ConfigError(
                f"--part {part} {name}: {name} is for all of the run at once; give it without --part, while no "
                "part is at work"
            )


def _join(workflow: str, state: RunState, config: WorkflowConfig, options: RunOptions, part: Part) -> Division:
    """The division that is there, if it fits; else makes one, or waits for the driver that does."""
    run, plan = state.run, state.plan
    if has_retries(run):
        raise ConfigError(
            f"--part {part}: {run.url} has rounds of --retry-dropped, which belong to no part; run without --part"
        )
    assert plan.input is not None
    plan.input.begin_run()
    if options.check_input:
        plan.input.read_all()
    lines, shared = Lines(quiet=options.quiet), _shared(config)
    while True:
        if (found := _fitting(state, part, shared)) is not None:
            return found
        try:
            with RunLock(run.storage, name=_DIVIDING):
                return _fitting(state, part, shared) or _divide(workflow, state, config, part)
        except LockedError:
            lines.show(f"another driver counts the input: {describe_holder(run.storage)}")
            time.sleep(_POLL_S)
            run.check()


def _fitting(state: RunState, part: Part, shared: Mapping[str, Any]) -> Division | None:
    """The division of the folder; None if a new one is to be made.

    Raises:
        ConfigError: it has another number of parts.
        StaleOutputError: it was made with another configuration.
    """
    run, plan = state.run, state.plan
    found = read_division(run)
    if found is None:
        return None
    found.check_part(part, run)
    is_same = found.parts == part.count and dict(found.fingerprints) == plan.digests and found.config == shared
    if found.finished and not (is_same and plan.input is not None and not plan.input.has_new_input()):
        return None
    found.check_same(run, shared, plan.digests)
    return found


def _divide(workflow: str, state: RunState, config: WorkflowConfig, part: Part) -> Division:
    """Counts the input, records it, and divides the work."""
    run, plan, ledger = state.run, state.plan, state.ledger
    assert plan.input is not None
    ledger.refuse_changed_input()
    ledger.check_groups()
    record_input(state)
    counts = plan.input.count()
    committed = 1 + max((shard for shard in run.recorded_shards(plan.row_group)), default=-1)
    begins = (0, committed) if 0 < committed < counts.shards else (0,)
    division = Division(uuid.uuid4().hex, part.count, begins, counts, _shared(config), dict(plan.digests))
    run.storage.write_text(CONFIG, dump_yaml(config))
    run.storage.write_json(PLAN, plan.describe(workflow))
    division.write(run)
    return division


def _shared(config: WorkflowConfig) -> dict[str, Any]:
    """The configuration without what may differ between drivers."""
    return config.model_dump(mode="json", exclude={"execution"})


def _take(state: RunState, division: Division, part: Part) -> list[range]:
    """Makes the state that of one part."""
    ranges = division.ranges(part.number)
    assert state.plan.input is not None
    state.plan.input.take(ranges, division.counts)
    state.ledger.within = ranges
    return ranges


def _prepare(state: RunState, division: Division, part: Part, ranges: Sequence[range]) -> None:
    """Refuses what does not fit, and deletes what the previous driver of this part said about itself."""
    run = state.run
    state.ledger.refuse_changed_input()
    if division.finished:
        replace(division, finished=False).write(run)
    run.storage.delete(summary_of_part(part.number))
    run.storage.delete(SUMMARY)
    for name in list(run.storage.names(run.failures)):
        shard = shard_of(name.removesuffix(".txt").rpartition("-")[2])
        if shard is not None and any(shard in those for those in ranges):
            run.storage.delete(f"{run.failures}/{name}")


def _events(run: RunFolder, part: Part) -> EventLog:
    storage = open_storage(f"{run.url}/{run.part_folder(part.number)}")
    storage.before_change = run.storage.before_change
    return EventLog(storage, run.lease)


def _finish_part(state: RunState, tally: Tally, failed_shards: Sequence[int], lines: Lines) -> Mapping[str, object]:
    return {"failed_shards": list(failed_shards)}


def _finish_if_last(
    workflow: str, config: WorkflowConfig, make_plan: MakePlan, run: RunFolder, division: Division, options: RunOptions
) -> Summary | None:
    """Finishes the run if all parts are done; None if they are not, or another driver does it.

    Of drivers that end at the same moment one gets the folder: who finds it taken leaves it to the one that has it;
    who finds the lease of another part waits until that has gone.
    """
    end = time.monotonic() + _LAST_S
    while True:
        view = view_parts(run, division)
        if view is None or view.missing:
            return None
        try:
            with run.lock():
                now = read_division(run)
                if now is None or now.id != division.id or now.finished:
                    return None
                return _finish(workflow, config, make_plan, run, view, options)
        except LockedError:
            if is_held(run.storage, LEASE) or time.monotonic() > end:
                return None
            time.sleep(_POLL_S)


def finish_run(workflow: str, config: WorkflowConfig, make_plan: MakePlan, out: str, options: RunOptions) -> Summary:
    """Puts together what the parts of a run have made; nothing happens if that was done.

    Raises:
        PartsMissingError: some parts are not done; names them.
        ConfigError: the run was not divided into parts.
        LockedError: a run is at work in the folder.
        ShardError, DropLimitError: as of `run_workflow`.
    """
    run = RunFolder(out)
    view, summary = view_parts(run), run.read_engine_file(SUMMARY)
    if view is None:
        if summary is None:
            raise ConfigError(
                f"{run.url}: no parts were begun here, and no run has ended; run `pipeline run {workflow}` first"
            )
        return summary
    _refuse_missing(run, view)
    with disk_errors_explained(run.storage.local), run.lock(take_over=options.take_over):
        view = view_parts(run)
        assert view is not None
        _refuse_missing(run, view)
        return _finish(workflow, config, make_plan, run, view, options)


def _refuse_missing(run: RunFolder, view: PartsView) -> None:
    if view.missing:
        raise PartsMissingError(
            f"{run.url}: {len(view.missing)} of {view.division.parts} parts are missing: {view.missing_text()}. Run "
            f"them with --part K/{view.division.parts}, then this again"
        )


def _finish(
    workflow: str, config: WorkflowConfig, make_plan: MakePlan, run: RunFolder, view: PartsView, options: RunOptions
) -> Summary:
    """Writes the final file and the summary of the run, which this process holds."""
    started = time.perf_counter()
    division, summaries = view.division, [view.done[part] for part in sorted(view.done)]
    state = RunState(make_plan(run), run)
    plan = state.plan
    division.check_same(run, _shared(config), plan.digests)
    assert plan.input is not None
    plan.input.take([], division.counts)
    tally = Tally()
    for summary in summaries:
        tally.add_all(summary["tally"])
    failed = sorted(shard for summary in summaries for shard in summary["failed_shards"])
    _refuse_lost(state, division, failed)
    lines = Lines(quiet=options.quiet)
    results = finish_all(state, tally, failed, lines)
    run.check()
    save_index(run)
    result: Summary = {
        "workflow": workflow,
        "outcome": "failed" if failed else "finished",
        "executor": summaries[0]["executor"],
        "seconds": round(sum(s["seconds"] for s in summaries) + time.perf_counter() - started, 3),
        "parts": division.parts,
        "tally": asdict(tally),
        "this_run": _rates(summaries),
        **({"notices": list(plan.notices)} if plan.notices else {}),
        **results,
    }
    run.storage.write_json(SUMMARY, result)
    replace(division, finished=True).write(run)
    check_limits(state, tally, result)
    return result


def _refuse_lost(state: RunState, division: Division, failed: Sequence[int]) -> None:
    """
    Raises:
        PartsMissingError: a shard that a part has finished is gone.
        StaleOutputError: there are more shards than the input has.
    """
    run, plan = state.run, state.plan
    wanted = set(range(division.counts.shards)).difference(failed)
    for group in plan.groups.keys() - plan.transient_groups:
        if lost := wanted.difference(run.recorded_shards(group)):
            first = min(lost)
            raise PartsMissingError(
                f"{run.url}: shard {shard_name(first)} of {group} is gone, of part {division.part_of(first)}; run "
                f"that part again with --part {division.part_of(first)}/{division.parts}"
            )
    state.ledger.note_seen(range(division.counts.shards))
    state.ledger.check_leftovers()


def _rates(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What all parts did in their last run."""
    result: dict[str, dict[str, float]] = {}
    for summary in summaries:
        for stage, rates in summary["this_run"].items():
            sums = result.setdefault(stage, dict.fromkeys(rates, 0))
            for name, value in rates.items():
                sums[name] = round(sums[name] + value, 3)
    return result
