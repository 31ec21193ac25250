"""Runs a sharded workflow in a run folder from start to end: the main path of `pipeline run precompute`."""

import time
from collections.abc import Callable
from dataclasses import asdict

from pipeline.config import dump_yaml
from pipeline.engine.input import fix_input
from pipeline.engine.ledger import check_groups, refuse_changed_input
from pipeline.engine.progress import Progress
from pipeline.engine.retries import begin_round, delete_retries, retried_drops, rounds_fit, with_retries
from pipeline.engine.scheduler import Scheduler
from pipeline.engine.tally import Tally
from pipeline.errors import EXIT_FAILED, DropLimitError, ShardError
from pipeline.executors.base import ExecutionConfig, Executor
from pipeline.executors.registry import make_executor
from pipeline.options import RunOptions, Summary, WorkflowConfig
from pipeline.plan import Plan
from pipeline.signals import StopSignals
from pipeline.storage.disk import disk_errors_explained
from pipeline.storage.events import EventLog
from pipeline.storage.run_folder import CONFIG, PLAN, QUARANTINE, SUMMARY, RunFolder


def run_workflow(
    workflow: str, config: WorkflowConfig, make_plan: Callable[[RunFolder], Plan], out: str, options: RunOptions
) -> Summary:
    """Runs, or goes on with, the workflow in folder `out`.

    Raises:
        ConfigError: unusable configuration or input; nothing was changed.
        StaleOutputError: the folder holds work of another configuration.
        LockedError: another run works in the folder.
        ShardError: some shards failed after all tries; the rest is finished.
        MachineError: the disk is full, among others.
        KeyboardInterrupt, PreemptedError: stopped by a signal.
        DropLimitError: finished, but too many samples were dropped.
    """
    run = RunFolder(out)
    plan = with_retries(make_plan(run), run)
    run.transient_groups = plan.transient_groups
    executor = make_executor(options.executor, plan.stages, run, config.execution, options.address)
    with disk_errors_explained(run.storage.local), run.lock(take_over=options.take_over):
        refuse_changed_input(plan, run, restart=options.restart)
        removed = check_groups(plan, run, restart=options.restart)
        fix_input(plan, run, restart=options.restart)
        if options.restart and (plan.row_group in removed or not rounds_fit(plan, run)):
            delete_retries(plan, run)
        if options.retry_dropped:
            begin_round(plan, run, options.retry_dropped)
        run.storage.clean()
        run.storage.delete(SUMMARY)
        run.storage.delete_folder(run.failures)
        run.storage.write_text(CONFIG, dump_yaml(config))
        run.storage.write_json(PLAN, plan.describe(workflow))
        events = EventLog(run.storage)
        try:
            return _execute(workflow, config.execution, plan, run, executor, events, options)
        finally:
            events.close()


def _execute(
    workflow: str,
    execution: ExecutionConfig,
    plan: Plan,
    run: RunFolder,
    executor: Executor,
    events: EventLog,
    options: RunOptions,
) -> Summary:
    started = time.perf_counter()
    progress = Progress(plan.stages, plan.estimated_shards, quiet=options.quiet)
    stop = StopSignals(execution.grace_s)
    scheduler = Scheduler(plan, run, executor, events, progress, execution, stop, restart=options.restart)
    events.write("run_started", workflow=workflow, executor=options.executor)
    outcome = "interrupted"
    with stop:
        try:
            with progress:
                tally = scheduler.execute()
            tally.leave_out(plan.row_group, retried_drops(plan, run))
            facts = plan.finalize(run, tally.input_rows, scheduler.failed_shards)
            outcome = "failed" if tally.shards_failed else "finished"
        except BaseException as error:
            outcome = f"stopped: {type(error).__name__}"
            raise
        finally:
            executor.close()
            run.storage.clean()  # of workers that died, or were abandoned
            events.write("run_ended", outcome=outcome)
    summary: Summary = {
        "workflow": workflow,
        "outcome": outcome,
        "executor": options.executor,
        "seconds": round(time.perf_counter() - started, 3),
        "tally": asdict(tally),
        "this_run": progress.rates(),
        **facts,
    }
    run.storage.write_json(SUMMARY, summary)
    _check_limits(plan, run, tally, summary)
    return summary


def _check_limits(plan: Plan, run: RunFolder, tally: Tally, summary: Summary) -> None:
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
    samples, rows = int(str(summary.get("num_samples", tally.input_rows))), tally.input_rows
    dropped = rows - samples
    if rows and dropped / rows > plan.max_drop_fraction:
        raise DropLimitError(
            f"max_drop_fraction: {dropped} of {rows} samples were dropped ({dropped / rows:.1%}), "
            f"more than the {plan.max_drop_fraction:.1%} allowed; "
            f"see {run.url}/{QUARANTINE} for each key and reason. The store holds the {samples} good ones.",
            summary,
        )
