"""`pipeline schedule`: files with which a scheduler runs a workflow."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.config_commands import ConfigFile, Overrides, WorkflowArg, build
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.deploy.schedule import Schedule

_SLURM = "Options of --kind slurm; by default what the run needs"

Nodes = Annotated[int | None, typer.Option(help="Nodes.", rich_help_panel=_SLURM)]
Cpus = Annotated[int | None, typer.Option(help="CPUs per node.", rich_help_panel=_SLURM)]
Gpus = Annotated[str | None, typer.Option(help="GPUs per node: 4, a100:4, or 0.", rich_help_panel=_SLURM)]
Memory = Annotated[str | None, typer.Option(help="Memory per node: 64G.", rich_help_panel=_SLURM)]
Time = Annotated[
    str | None, typer.Option(help="Time limit: 90 (minutes), 12:00:00, 2-00:00:00.", rich_help_panel=_SLURM)
]
Partition = Annotated[str | None, typer.Option(help="Partition.", rich_help_panel=_SLURM)]
Account = Annotated[str | None, typer.Option(help="Account.", rich_help_panel=_SLURM)]
Qos = Annotated[str | None, typer.Option(help="Quality of service.", rich_help_panel=_SLURM)]
Array = Annotated[
    int | None, typer.Option(metavar="N", help="A job array that makes the run in N parts.", rich_help_panel=_SLURM)
]


def schedule(
    workflow: WorkflowArg,
    kind: Annotated[
        str,
        typer.Option(
            help="cron, systemd, airflow, slurm, kuberay, kuberay-cron, raycronjob, kueue, kubeflow, skypilot, dstack "
            "or docker.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    config: ConfigFile = None,
    out: Annotated[str | None, typer.Option("--out", help="Run folder. Default: runs/WORKFLOW.")] = None,
    executor: Annotated[str | None, typer.Option(help="As of `pipeline run`: ray, local or inline.")] = None,
    at: Annotated[
        str | None, typer.Option(metavar="CRON", help="When: minute hour day month weekday. Default: '0 3 * * *'.")
    ] = None,
    timezone: Annotated[str | None, typer.Option(metavar="ZONE", help="Time zone of --at. Default: UTC.")] = None,
    image: Annotated[
        str | None, typer.Option("--image", "--container-image", help="Container image with this project.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting one.")] = None,
    queue: Annotated[str | None, typer.Option(metavar="NAME", help="Kueue's LocalQueue.")] = None,
    nodes: Nodes = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    memory: Memory = None,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    array: Array = None,
    write_to: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write the files here, and print how to install them.")
    ] = None,
) -> None:
    """Print the files with which a scheduler runs a workflow: cron, Slurm, Kubernetes, SkyPilot and others."""
    from pipeline.deploy.schedule import Schedule
    from pipeline.deploy.slurm import SlurmOptions, local_paths

    chosen = build(workflow, config, overrides)
    if array is not None and not getattr(chosen, "has_parts", False):
        raise ConfigError(f"--array {array}: {workflow} has no parts; leave it out")
    wanted = Schedule(
        *(kind, workflow, config, out, tuple(overrides or ()), at, timezone, image, address, queue),
        folder=Path.cwd(),
        executor=executor,
        slurm=SlurmOptions(nodes, cpus, gpus, memory, time, partition, account, qos, array),
        needs=chosen.resources(),
        paths=tuple(local_paths(chosen.config.model_dump(mode="json"))),
    )
    _show(wanted, write_to)


def _show(wanted: "Schedule", write_to: str | None) -> None:
    from pipeline.config import local_path
    from pipeline.deploy.schedule import install_command, render, write_files

    files = render(wanted)
    if write_to is not None:
        paths = write_files(files, local_path(write_to, "--write-to"))
        typer.echo("\n".join([*paths, f"install: {install_command(wanted, paths)}"]))
    elif len(files) == 1:
        typer.echo(next(iter(files.values())), nl=False)
    else:
        typer.echo("\n".join(f"# {name}\n{text}" for name, text in files.items()), nl=False)
