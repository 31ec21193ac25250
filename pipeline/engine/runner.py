"""Runs a sharded workflow in a run folder: the main path of `pipeline run precompute`."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import yaml

from pipeline.config import dump_yaml
from pipeline.engine.input import record_input
from pipeline.engine.progress import Lines, Progress
from pipeline.engine.room import check_room
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.state import RunState
from pipeline.engine.tally import Tally
from pipeline.errors import EXIT_FAILED, DropLimitError, LockedError, PipelineError, ShardError
from pipeline.executors.base import ExecutionConfig, Executor
from pipeline.executors.registry import make_executor
from pipeline.fingerprint import differences
from pipeline.options import RunOptions, Summary, WorkflowConfig
from pipeline.plan import Plan
from pipeline.signals import StopSignals
from pipeline.storage.disk import disk_errors_explained
from pipeline.storage.events import EventLog
from pipeline.storage.run_folder import CONFIG, DIVISION, PLAN, QUARANTINE, SUMMARY, RunFolder

log = logging.getLogger(__name__)


def run_workflow(
    workflow: str, config: WorkflowConfig, make_plan: Callable[[RunFolder], Plan], out: str, options: RunOptions
) -> Summary:
    """Runs, or resumes, the workflow in folder `out`.

    Raises:
        ConfigError: unusable configuration or input; nothing was changed.
        StaleOutputError: the folder holds work of another configuration.
        LockedError: another run works in the folder.
        ShardError: some shards failed after all tries; the others are finished.
        MachineError: the disk is full, among others.
        KeyboardInterrupt, PreemptedError: stopped by a signal.
        DropLimitError: finished, but too many samples were dropped.
    """
    state = RunState.open(out, make_plan, restart=options.restart)
    run, plan = state.run, state.plan
    address = options.cluster
    executor = make_executor(options.executor, plan.stages, run, config.execution, address)
    with disk_errors_explained(run.storage.local), run.lock(take_over=options.take_over):
        here, refuse = address is None, not options.restart
        low_disk = check_room(plan, run, config.execution, here=here, refuse=refuse)
        _prepare(state, options)
        if low_disk:
            plan = state.plan = replace(plan, notices=(*plan.notices, *low_disk))
        changes = _changed_settings(run, config)
        run.storage.write_text(CONFIG, dump_yaml(config))
        run.storage.write_json(PLAN, plan.describe(workflow))
        events = EventLog(run.storage, run.lease)
        try:
            told: Summary = {"changed_settings": changes} if changes else {}
            summary, tally = execute(workflow, config.execution, state, executor, events, options, finish_all, told)
            run.storage.write_json(SUMMARY, summary)
        finally:
            events.close()
        check_limits(state, tally, summary)
        return summary


def _prepare(state: RunState, options: RunOptions) -> None:
    """Refuses, or with --restart deletes, what no longer fits; deletes what the previous run said about itself."""
    run, plan, retries = state.run, state.plan, state.retries
    if plan.input is not None:
        plan.input.begin_run()
        if options.check_input:
            plan.input.read_all()
    state.ledger.refuse_changed_input()
    deleted = state.ledger.check_groups()
    record_input(state)
    if options.restart and (plan.row_group in deleted or not retries.fit()):
        retries.delete()
    if options.retry_dropped:
        others = plan.retry(run, options.retry_dropped) if plan.retry is not None else None
        retries.begin_round(options.retry_dropped, others)
    run.storage.delete(DIVISION)  # of drivers of parts: this one does what they left
    run.storage.delete(SUMMARY)
    run.storage.delete_folder(run.failures)


def _changed_settings(run: RunFolder, config: WorkflowConfig) -> list[str]:
    """`key: old -> new` of the settings that differ from the previous run of this folder; not those of execution.

    What decides finished work was refused before, so these are settings that finished shards were made without.
    """
    if run.storage.size(CONFIG) is None:
        return []
    try:
        previous = yaml.safe_load(run.storage.read(CONFIG))
    except (yaml.YAMLError, ValueError):
        previous = None
    if not isinstance(previous, dict):
        return [f"{CONFIG}: was damaged, so what changed since the previous run is not known"]
    changes = differences(previous, config.model_dump(mode="json"))
    return [change for change in changes if not change.startswith("execution.")]


Finish = Callable[[RunState, Tally, Sequence[int], Lines], Mapping[str, object]]
"""What follows the last shard: of a state, the sums, and indices of failed shards; returns entries of the summary."""


def finish_all(state: RunState, tally: Tally, failed_shards: Sequence[int], lines: Lines) -> Mapping[str, object]:
    """Writes the final file, once all shards are finished, and deletes what no record has."""
    run, plan = state.run, state.plan
    results = plan.finalize(run, tally.input_rows, failed_shards, lines.show)
    lines.clear()
    run.check()  # what another run has written since is not for this one to sweep
    if run.index is not None and run.index.is_changed:
        run.index.list_again()  # with what workers that died have left
    state.ledger.sweep()
    return results


def execute(
    workflow: str,
    execution: ExecutionConfig,
    state: RunState,
    executor: Executor,
    events: EventLog,
    options: RunOptions,
    finish: Finish,
    told: Mapping[str, object],
) -> tuple[Summary, Tally]:
    """Runs the shards of a plan, in a folder that this process holds.

    Args:
        told: further entries of the summary.
    Returns:
        The summary, which is not written yet, and its sums.
    """
    run, plan, started = state.run, state.plan, time.perf_counter()
    progress = Progress(plan.stages, plan.estimated_shards, quiet=options.quiet)
    stop = StopSignals(execution.grace_s)
    scheduler = Scheduler(state, executor, events, progress, execution, stop)
    total: dict[str, object] = {} if plan.estimated_shards is None else {"shards": plan.estimated_shards}
    total |= {} if options.part is None else {"part": str(options.part)}
    events.write("run_started", workflow=workflow, executor=options.executor, **total)
    outcome = "interrupted"
    with stop:
        for notice in plan.notices:
            progress.message(notice)
        try:
            with progress:
                tally = scheduler.execute()
            tally.subtract_retried(plan.row_group, state.retries.drops())
            run.check()
            lines = Lines(quiet=options.quiet, started=progress.started)
            results = finish(state, tally, scheduler.failed_shards, lines)
            outcome = "failed" if tally.shards_failed else "finished"
        except BaseException as error:
            outcome = f"stopped: {type(error).__name__}"
            raise
        finally:
            executor.close()
            if run.lease is None or not run.lease.lost:
                run.storage.clean()  # of workers that died, or were abandoned
                save_index(run)
            events.write("run_ended", outcome=outcome)
    summary: Summary = {
        "workflow": workflow,
        "outcome": outcome,
        "executor": options.executor,
        "seconds": round(time.perf_counter() - started, 3),
        "tally": asdict(tally),
        "this_run": progress.rates(),
        **({"notices": list(plan.notices)} if plan.notices else {}),
        **told,
        **results,
    }
    run.check()
    return summary, tally


def save_index(run: RunFolder) -> None:
    """Keeps what is known of the records for the next run, which finds out by itself what this one cannot write."""
    if run.index is None:
        return
    try:
        run.index.save()
    except LockedError:  # found out just now; whoever has the folder writes them
        pass
    except (PipelineError, OSError) as error:
        log.warning("the records could not be written together, so the next run reads each: %s", error)


def check_limits(state: RunState, tally: Tally, summary: Summary) -> None:
    """
    Raises:
        ShardError: shards failed.
        DropLimitError: more samples were dropped than the plan allows.
    """
    check_failures(state.run, tally, summary)
    run, plan = state.run, state.plan
    samples, rows = int(str(summary.get("num_samples", tally.input_rows))), tally.input_rows
    dropped = rows - samples
    if rows and dropped / rows > plan.max_drop_fraction:
        raise DropLimitError(
            f"max_drop_fraction: {dropped} of {rows} samples were dropped ({dropped / rows:.1%}), "
            f"more than the {plan.max_drop_fraction:.1%} allowed; "
            f"see {run.url}/{QUARANTINE} for each key and reason. The store holds the other {samples}.",
            summary,
        )


def check_failures(run: RunFolder, tally: Tally, summary: Summary) -> None:
    """
    Raises:
        ShardError: shards failed.
    """
    if tally.shards_failed:
        first = tally.failures[0]
        error = ShardError(
            f"{tally.shards_failed} of {tally.shards} shards failed; the others are finished. "
            f"First: {first['stage']} on shard {first['shard']}: {first['error']}\n"
            f"Tracebacks: {run.url}/{run.failures}. Run the same command again to retry them.",
            summary,
        )
        if tally.shards_failed == tally.shards:
            error.exit_code = EXIT_FAILED
        raise error
