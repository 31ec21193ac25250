"""`pipeline finish`: puts together what the drivers of a run's parts have made."""

from typing import Annotated

import typer

from pipeline.cli.config_commands import build, show_end
from pipeline.cli.stage_commands import AsJson, Quiet, TakeOver
from pipeline.errors import ConfigError


def finish(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    take_over: TakeOver = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Put together what the drivers of a run's parts have made (`run --part`): writes the manifest. Exits with 3, and
    names them, if parts are missing; does nothing if it was done."""
    from pipeline.options import RunOptions
    from pipeline.storage.run_folder import PLAN, RunFolder
    from pipeline.workflow import ShardedWorkflow

    plan = RunFolder(run_folder).read_engine_file(PLAN)
    if plan is None:
        raise ConfigError(f"{run_folder}: not a run folder (no plan.json); give the --out of a `pipeline run --part`")
    workflow = build(str(plan["workflow"]), None, None, run_folder)
    if not isinstance(workflow, ShardedWorkflow):
        raise ConfigError(f"{run_folder}: {workflow.name} has no parts, so nothing is to be put together")
    options = RunOptions(workflow.default_executor, quiet=quiet, take_over=take_over)
    show_end(workflow, run_folder, lambda: workflow.finish(run_folder, options), as_json=as_json)
