"""The command line. Heavy modules are imported inside the commands, so that --help is quick."""

import atexit
import gc
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from imagen_core.far import without_secrets
from pipeline.cli.config_commands import ConfigFile, Overrides, WorkflowArg, build, config_app, run_and_show
from pipeline.cli.export_command import export
from pipeline.cli.finish_command import finish
from pipeline.cli.schedule_command import schedule
from pipeline.cli.stage_commands import AsJson, Quiet, TakeOver, print_json, stage_commands
from pipeline.errors import EXIT_FAILED, EXIT_INTERRUPTED, ConfigError, PipelineError, StaleOutputError

if TYPE_CHECKING:
    from pipeline.deploy.submit import RayJobs


class _Commands(TyperGroup):
    """The commands; arguments and values of options that begin with `~/` are paths in the home folder."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        home = os.path.expanduser("~/")
        return super().parse_args(ctx, [_HOME.sub(lambda found: found[1] + home, arg) for arg in args])


_TORCHRUN = "exit code {} of this process; torchrun ends with 1 instead. Use --executor ray where a scheduler reads it"
_HOME = re.compile(r"^(--[a-z-]+=|)~/")

app = typer.Typer(
    name="pipeline",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Precompute text embeddings and image pyramids for Imagen-style training, once and resumably; train, sample "
    "and evaluate.",
)
app.add_typer(config_app, name="config")
app.add_typer(stage_commands)
app.command()(export)
app.command()(finish)
app.command()(schedule)

Out = Annotated[str | None, typer.Option("--out", help="Run folder or URL (s3://...). Default: runs/WORKFLOW.")]
ExecutorName = Annotated[
    str | None,
    typer.Option(help="ray, local or inline (this process). Default: ray for precompute, local for the others."),
]
CheckInput = Annotated[
    bool, typer.Option("--check-input", help="Read all of the input, also files that have the size and time they had.")
]
JobsAddress = Annotated[
    str,
    typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's head, like http://HEAD:8265."),
]
JobsAddressOrNone = Annotated[
    str | None, typer.Option("--address", help="The cluster's head, like http://HEAD:8265: show one of its jobs.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pipeline {version('imagen-precompute')}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    if debug:
        os.environ["PIPELINE_DEBUG"] = "1"
    logging.basicConfig(level=logging.DEBUG if _debugging() else logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_WithoutSecrets("%(levelname)s %(name)s: %(message)s"))


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


@app.command()
def run(
    workflow: WorkflowArg,
    overrides: Overrides = None,
    config: ConfigFile = None,
    out: Out = None,
    executor: ExecutorName = None,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Rebuild what no longer fits the config.")] = False,
    retry_dropped: Annotated[
        str | None,
        typer.Option(metavar="REASONS", help="Try dropped samples again: comma-separated drop reasons, or all."),
    ] = None,
    take_over: TakeOver = False,
    check_input: CheckInput = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Do part K of N, next to drivers of the other parts. The last one to end finishes the run, or "
            "`pipeline finish`.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a workflow. The same command again resumes it."""
    if dry_run:
        if part is not None:
            raise ConfigError(f"--part {part}: --dry-run shows all of the run; leave one out")
        shown = partial(plan, workflow, overrides, config, out, executor, check_input=check_input, as_json=as_json)
        _dry_run(shown, restart, as_json)
        return
    from pipeline.executors.process import let_threads_sleep
    from pipeline.options import Part, RunOptions

    let_threads_sleep()  # before the workflow imports torch
    folder = out or f"runs/{workflow}"
    chosen = build(workflow, config, overrides, folder)
    reasons = tuple(reason.strip() for reason in (retry_dropped or "").split(",") if reason.strip())
    options = RunOptions(
        executor or chosen.default_executor,
        address,
        restart,
        reasons,
        quiet,
        take_over,
        check_input,
        None if part is None else Part.parse(part),
    )
    run_and_show(chosen, folder, options, as_json=as_json)


@app.command()
def plan(
    workflow: WorkflowArg,
    overrides: Overrides = None,
    config: ConfigFile = None,
    out: Out = None,
    executor: ExecutorName = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Predict the time: run the stages for some seconds on rows spread over the input, in a temporary "
            "folder. Downloads these rows and loads the models.",
        ),
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Predict time and cost on other hardware: h200x1, h200x8, a100x8, l4x1, cpu16, or your YAML file. "
            "Needs no weights. With --probe, what runs no model is measured here."
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Plan for this number of rows like the rows of the input.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write RUN/estimate.json; `report` will compare the run with it.")
    ] = False,
    check_input: CheckInput = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: shards, stages, finished work, bytes; with --probe or --profile also time and cost.

    Writes nothing, except for --save.
    """
    from pipeline.cli.show import show_preview
    from pipeline.options import PlanOptions

    options = PlanOptions(probe, profile, rows, executor, save, check_input)
    folder = out or f"runs/{workflow}"
    result = build(workflow, config, overrides, folder).preview(folder, options)
    print_json(result) if as_json else show_preview(result)


@app.command()
def submit(
    workflow: WorkflowArg,
    address: JobsAddress,
    out: Annotated[str, typer.Option(help="Run folder: a URL, or an absolute path that all nodes share.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    restart: Annotated[bool, typer.Option("--restart", help="Rebuild what no longer fits the config.")] = False,
    retry_dropped: Annotated[
        str | None, typer.Option(metavar="REASONS", help="Try dropped samples again, as in `run`.")
    ] = None,
    code: Annotated[
        bool, typer.Option("--code/--no-code", help="Ship this installation's code, or use the code on the nodes.")
    ] = True,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job until it ends, or only start it.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Run a workflow on a Ray cluster. Shows its progress and exits with its exit code."""
    from pipeline.deploy.submit import RayJobs, check_shared

    check_shared(out)
    resolved = build(workflow, config, overrides, out).config
    options = ["--restart"] * restart + (["--retry-dropped", retry_dropped] if retry_dropped else [])
    jobs = RayJobs(address)
    job = jobs.submit(workflow, resolved, out, options, with_code=code)
    typer.echo(f"submitted {job}", err=as_json or wait)
    if wait:
        _follow(jobs, job, as_json)
    elif as_json:
        print_json(jobs.status(job))


@app.command()
def status(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="Run folder; or, with --address, a job.")],
    address: JobsAddressOrNone = None,
    follow: Annotated[bool, typer.Option("--follow", help="Follow the job until it ends, as `submit` does.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the run until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the progress of a run or of a submitted job."""
    if address is not None and watch:
        raise ConfigError("--watch: a job is followed by --follow; give that, or the RUN without --address")
    if address is not None:
        from pipeline.cli.show import show_job
        from pipeline.deploy.submit import RayJobs

        jobs = RayJobs(address)
        if follow:
            _follow(jobs, run_folder, as_json)
            return
        job = jobs.status(run_folder)
        print_json(job) if as_json else show_job(job)
        return
    if follow:
        raise ConfigError("--follow: only a job can be followed; give its --address, or --watch for a run folder")
    from pipeline.cli.show import show_status
    from pipeline.engine.status import run_status

    if watch:
        from pipeline.cli.watch import watch_run

        watch_run(run_folder, print_json if as_json else show_status, as_json=as_json)
        return
    result = run_status(run_folder)
    print_json(result) if as_json else show_status(result)


@app.command()
def stop(
    job: Annotated[str, typer.Argument(metavar="JOB", help="What `submit` printed.")],
    address: JobsAddress,
    as_json: AsJson = False,
) -> None:
    """Stop a submitted job. The same `submit` again resumes it."""
    from pipeline.cli.show import show_job
    from pipeline.deploy.submit import RayJobs

    result = RayJobs(address).stop(job)
    print_json(result) if as_json else show_job(result)


@app.command()
def doctor(
    out: Annotated[
        str | None, typer.Option("--out", help="Run folder whose saved plan (plan --save) must fit on the disk.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: packages, versions, disk, GPUs, Ray."""
    from pipeline.cli.doctor import examine, examine_planned
    from pipeline.cli.show import show_checks

    checks = [*examine(), *(examine_planned(out) if out is not None else ())]
    print_json(checks) if as_json else show_checks(checks)
    if any(check["status"] == "bad" for check in checks):
        raise typer.Exit(4)


def _dry_run(show_plan: Callable[[], None], restart: bool, as_json: bool) -> None:
    """Shows the plan; with `restart` also what would be made again."""
    try:
        show_plan()
    except StaleOutputError as error:
        if not restart:
            raise
        changes = str(error).splitlines()[:-1]
        if as_json:
            print_json({"rebuilt": changes})
        else:
            typer.echo("\n".join([*changes, "--restart would make this again"]))
    if not as_json:
        typer.echo("dry run: nothing was changed")


def _follow(jobs: "RayJobs", job: str, as_json: bool) -> None:
    """Shows the job's output until it ends; exits with its code. Ctrl-C does not stop the job."""
    from pipeline.cli.show import show_job

    try:
        result = jobs.follow(job, lambda text: typer.echo(text, nl=False, err=as_json))
    except KeyboardInterrupt:
        again = f"{job} --address {jobs.address}"
        typer.echo(
            f"the job keeps running; pipeline status {again} --follow shows it, pipeline stop {again} stops it",
            err=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    print_json(result) if as_json else show_job({**result, "last_line": ""})
    raise typer.Exit(int(str(result["exit_code"])))


def _debugging() -> bool:
    return os.environ.get("PIPELINE_DEBUG", "") not in ("", "0")


def _print_any_text() -> None:
    r"""From now on what the terminal's encoding lacks is printed as `\xff` or `\udcff`, instead of ending the command.

    Names of files and keys may hold bytes that are not UTF-8. In JSON it is the escape of the same text.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Entry point of the `pipeline` command; usage errors exit with 2, Ctrl-C with 130."""
    sys.excepthook = _show_traceback
    gc.set_threshold(50_000, 20, 20)  # most objects of the start stay; looking through them took a tenth of it
    atexit.register(gc.freeze)  # or Python looks through all of them at its end, which takes 0.1 to 0.2 s
    from pipeline.storage.disk import disk_errors_explained

    _print_any_text()
    try:
        with disk_errors_explained(Path.cwd()):
            app(prog_name="pipeline")
    except PipelineError as error:
        if _debugging():
            _show_traceback(type(error), error, error.__traceback__)
        typer.echo(f"error: {without_secrets(str(error))}", err=True)
        if "TORCHELASTIC_RUN_ID" in os.environ and error.exit_code != EXIT_FAILED:
            typer.echo(_TORCHRUN.format(error.exit_code), err=True)
        sys.exit(error.exit_code)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In the place of Python's own."""
    typer.echo(without_secrets("".join(traceback.format_exception(kind, error, trace))), err=True, nl=False)


if __name__ == "__main__":
    main()
