"""Workflows that are one job and not a stream of shards: training, sampling, evaluation.

They have the same run folder, lock, events, summary and exit codes as the sharded workflows; each decides by itself
what can be resumed.
"""

import os
import signal
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pipeline.config import dump_yaml
from pipeline.engine.progress import Lines
from pipeline.errors import ConfigError, PreemptedError, StaleOutputError
from pipeline.executors.process import keep_freed_memory
from pipeline.options import PlanOptions, RunOptions, Summary
from pipeline.signals import StopSignals
from pipeline.storage import LocalStorage
from pipeline.storage.disk import disk_errors_explained
from pipeline.storage.events import EventLog
from pipeline.storage.mirror import WorkingFolder, working_folder
from pipeline.storage.out_folder import check_out
from pipeline.storage.run_folder import CONFIG, PLAN, SUMMARY, RunFolder
from pipeline.workflow import Workflow


@dataclass(slots=True)
class Job:
    """The run of a job, as its work sees it."""

    run: RunFolder
    options: RunOptions
    lines: Lines
    """Shows the progress."""
    signals: StopSignals = field(default_factory=StopSignals)
    _announced: bool = False
    _working: WorkingFolder | None = None
    _why_stop: str = ""

    def check(self) -> None:
        """To be called at the end of each step, and before what is written for good.

        Raises:
            LockedError: another run has taken the folder over.
        """
        self.run.check_step()

    def should_stop(self) -> bool:
        """Whether to save and return soon; to be called at the end of each step.

        True after a stop signal (Ctrl-C, SIGTERM or SIGHUP), which is shown the first time, and if the changes of a
        local copy could not be sent for long.

        Raises:
            LockedError: another run has taken the folder over.
        """
        self.check()
        if not self._why_stop and self._working is not None:
            self._why_stop = self._working.why_stop()
        if self.signals.received is None and not self._why_stop:
            return False
        if not self._announced:
            self._announced = True
            if self.signals.received is None:
                self.lines.message(f"{self._why_stop}; finishing the current step")
            else:
                name = signal.Signals(self.signals.received).name
                self.lines.message(f"{name}: finishing the current step; send it again to stop at once")
        return True

    def raise_stop(self) -> NoReturn:
        """Raises what ends a run that `should_stop`.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            PreemptedError: otherwise.
        """
        if self._why_stop and self.signals.received != signal.SIGINT:
            raise PreemptedError(f"{self._why_stop}; all was sent at the end: run the same command again to resume")
        self.signals.raise_stop()

    def send(self) -> None:
        """Where the work is in a local copy, sends its changes now: what follows is sent after them.

        Raises:
            LockedError: another run has taken the folder over.
            MachineError: the object store does not take them.
        """
        if self._working is not None:
            self._working.send()

    @contextmanager
    def working_folder(self) -> Iterator[Path]:
        """The folder to work in: the run's own, or on an object store a local copy whose changes are sent back.

        Raises:
            ConfigError: this is one of several processes, which would each have a copy.
            MachineError: the last changes could not be sent; says where they are kept.
        """
        if not isinstance(self.run.storage, LocalStorage) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"--out {self.run.url}: under torchrun give a folder that all processes see; on an object store use "
                "--executor ray, or one process"
            )
        with working_folder(self.run.storage, self.run.lease) as self._working:
            yield self._working.path
        self._working = None


class JobWorkflow(Workflow):
    """A workflow whose `work` does everything."""

    default_executor = "local"

    @abstractmethod
    def work(self, job: Job) -> Mapping[str, object]:
        """Does the work and returns its results, for the summary.

        After a stop signal it returns early; the same command then resumes.
        """

    @abstractmethod
    def dry_run(self) -> Mapping[str, object]:
        """What the run would do: sizes and needs. Cheap, writes nothing."""

    def run(self, out: str, options: RunOptions) -> Summary:
        return run_job(self, out, options)

    def preview(self, out: str, options: PlanOptions = PlanOptions()) -> dict[str, object]:  # noqa: B008 - frozen
        if options != PlanOptions(executor=options.executor):
            raise ConfigError(f"--probe, --profile, --rows, --save: {self.name} has no shards to plan; leave them out")
        check_out(RunFolder(out), self.name, self.config.model_dump(mode="json"))
        return {"workflow": self.name, "out": str(out), "summary": dict(self.dry_run())}


def run_job(workflow: JobWorkflow, out: str, options: RunOptions) -> Summary:
    """Runs the job in folder `out`.

    One of several processes (torchrun sets RANK) only works; the first one also keeps the run folder.

    Raises:
        PreemptedError: stopped by SIGTERM or SIGHUP.
        KeyboardInterrupt: stopped by Ctrl-C.
        PipelineError: what `work` raises.
    """
    if options.part is not None:
        raise ConfigError(f"--part {options.part}: {workflow.name} has no parts; leave it out")
    keep_freed_memory()
    run = RunFolder(out)
    if not _is_follower():
        check_out(run, workflow.name, workflow.config.model_dump(mode="json"))
    try:
        with disk_errors_explained(run.storage.local):
            return _run(workflow, Job(run, options, Lines(quiet=options.quiet)))
    except PreemptedError as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        note = "torchrun makes 1 of this exit code 75, --executor ray keeps it"
        raise PreemptedError(f"{error} ({note})") from error


def _run(workflow: JobWorkflow, job: Job) -> Summary:
    options = job.options
    if _is_follower():
        job.lines.quiet = True
        results = _work(workflow, job)
        return {"workflow": workflow.name, "outcome": "finished", "summary": dict(results), "seconds": 0.0}
    with job.run.lock(take_over=options.take_over):
        return _execute(workflow, job)


def _is_follower() -> bool:
    """True in all processes of torchrun but the first, which keeps the run folder."""
    return int(os.environ.get("RANK", "0")) > 0


def _execute(workflow: JobWorkflow, job: Job) -> Summary:
    run, started = job.run, time.perf_counter()
    if job.options.retry_dropped:
        raise ConfigError(f"--retry-dropped: {workflow.name} drops no samples; leave it out")
    storage = run.storage
    previous = {name: storage.read(name) for name in (CONFIG, PLAN, SUMMARY) if storage.size(name) is not None}
    storage.delete(SUMMARY)
    storage.write_text(CONFIG, dump_yaml(workflow.config))
    storage.write_json(PLAN, {"workflow": workflow.name, "stages": [], "transient_groups": []})
    events = EventLog(storage, run.lease)
    events.write("run_started", workflow=workflow.name, executor=job.options.executor)
    outcome = "interrupted"
    try:
        results = _work(workflow, job)
        outcome = "finished"
    except BaseException as error:
        outcome = f"stopped: {type(error).__name__}"
        if isinstance(error, ConfigError | StaleOutputError):  # refused: the folder stays unchanged
            run.check()
            for name in (CONFIG, PLAN, SUMMARY):
                if name in previous:
                    storage.write(name, previous[name])
                else:
                    storage.delete(name)
        raise
    finally:
        events.write("run_ended", outcome=outcome)
        events.close()
    summary: Summary = {
        "workflow": workflow.name,
        "outcome": outcome,
        "executor": job.options.executor,
        "seconds": round(time.perf_counter() - started, 3),
        "summary": dict(results),
    }
    run.check()
    storage.write_json(SUMMARY, summary)
    return summary


def _work(workflow: JobWorkflow, job: Job) -> Mapping[str, object]:
    with job.signals:
        results = workflow.work(job)
    if job.should_stop():
        job.raise_stop()
    return results
