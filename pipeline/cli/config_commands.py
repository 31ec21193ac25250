"""The configuration on the command line: how commands take one, and the commands that show and check it."""

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.stage_commands import AsJson, print_json
from pipeline.errors import RunError
from pipeline.signals import raise_when_preempted

if TYPE_CHECKING:
    from pipeline.options import RunOptions
    from pipeline.workflow import Workflow

_WORKFLOWS = ", ".join(sorted({entry.name for entry in entry_points(group="pipeline.workflows")}))
config_app = typer.Typer(no_args_is_help=True, help="List, show, describe and check configurations.")
WorkflowArg = Annotated[str, typer.Argument(help=f"Name of the workflow: {_WORKFLOWS}.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Config overrides; values are YAML, e.g. shard_size=500; KEY+=VALUE adds to a list. With neither these "
        "nor -c, a run goes on with its own configuration.",
    ),
]
ConfigFile = Annotated[
    str | None, typer.Option("-c", "--config", help="YAML file, or the name of a shipped one (see config ls).")
]


def build(name: str, config: str | None, overrides: list[str] | None, out: str | None = None):
    """The workflow with its configuration: of the file, or else of the run in `out`, with the overrides.

    The run's own configuration is used if nothing else is given, or if an override adds to it.
    """
    from pipeline.cli.presets import configuration_of_run, find_config
    from pipeline.config import is_addition, load_config
    from pipeline.workflow import load_workflow

    workflow_class = load_workflow(name)
    source = find_config(name, config) if config else None
    if source is None and out is not None and (not overrides or any(map(is_addition, overrides))):
        source = configuration_of_run(name, out)
        if source is not None:
            typer.echo(f"configuration: {out}/config.yaml", err=True)
    return workflow_class(load_config(workflow_class.config_class, source, overrides or ()))


def run_and_show(workflow: "Workflow", out: str, options: "RunOptions", *, as_json: bool) -> None:
    """Runs a workflow, and prints its summary; also that of a run that ended otherwise than requested.

    Raises:
        RunError: it did.
    """
    show_end(workflow, out, lambda: workflow.run(out, options), as_json=as_json)


def show_end(workflow: "Workflow", out: str, run: Callable[[], Mapping[str, object]], *, as_json: bool) -> None:
    """Calls what returns the summary of a run, or of a part of it, and prints it; as `run_and_show`."""
    from pipeline.cli.show import show_summary
    from pipeline.storage.run_folder import RunFolder

    raise_when_preempted()
    failure: RunError | None = None
    try:
        summary = run()
    except RunError as error:
        failure, summary = error, error.summary
    except KeyboardInterrupt:
        typer.echo("stopped by Ctrl-C; run the same command again to resume", err=True)
        raise
    if as_json:
        print_json(summary)
    else:
        show_summary(summary, _next_of_part(summary, out) or workflow.next_steps(RunFolder(out)))
    if failure is not None:
        raise failure


def _next_of_part(summary: Mapping[str, object], out: str) -> list[tuple[str, str]]:
    """What is left to do after a part of a run; nothing after a run."""
    if "part" not in summary:
        return []
    missing = summary.get("missing")
    steps = [("part", str(summary["part"])), *([("missing", f"parts {missing}")] if missing else [])]
    return [*steps, ("finish", f"the last part does it, or pipeline finish {quote(out)}")]


@config_app.command("ls")
def config_ls(as_json: AsJson = False) -> None:
    """List the shipped configurations, the model presets with their exact parameter counts, and encoder recipes."""
    from pipeline.cli.presets import list_models, list_presets, list_recipes
    from pipeline.cli.show import show_table

    presets, models, recipes = list_presets(), list_models(), list_recipes()
    if as_json:
        print_json([*presets, *models, *recipes])
    else:
        show_table(["workflow", "name", "description"], [[p["workflow"], p["name"], p["summary"]] for p in presets])
        show_table(
            ["model", "parameters", "description"], [[m["name"], f"{m['parameters']:,}", m["summary"]] for m in models]
        )
        show_table(
            ["encoder recipe", "model", "licence", "description"],
            [[r["name"], r["model"], r["licence"], f"{r['summary']} ({r['source']})"] for r in recipes],
        )


@config_app.command("show")
def config_show(
    workflow: WorkflowArg, overrides: Overrides = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Print the resolved configuration: defaults, file and overrides together."""
    from pipeline.config import dump_yaml

    resolved = build(workflow, config, overrides).config
    print_json(resolved.model_dump(mode="json")) if as_json else typer.echo(dump_yaml(resolved), nl=False)


@config_app.command("schema")
def config_schema(workflow: WorkflowArg) -> None:
    """Print the JSON schema of a workflow's configuration, with a description of each field."""
    from pipeline.workflow import load_workflow

    print_json(load_workflow(workflow).config_class.model_json_schema())


@config_app.command("validate")
def config_validate(
    workflow: WorkflowArg, overrides: Overrides = None, config: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Check a configuration. Exits with 2 and prints one line per problem if it is invalid."""
    build(workflow, config, overrides)
    print_json({"valid": True}) if as_json else typer.echo("valid")
