"""`pipeline doctor`: checks this machine, or every node of a Ray cluster."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.config_commands import ConfigFile, Overrides, build
from pipeline.cli.stage_commands import AsJson, print_json
from pipeline.errors import EXIT_ENVIRONMENT, ConfigError, MachineError

if TYPE_CHECKING:
    from pipeline.executors.ray_cluster import ClusterNode, Demand
    from pipeline.workflow import Workflow

_WILDCARDS = "*?[{%"


def doctor(
    overrides: Overrides = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Check every node of a Ray cluster instead of this machine alone.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(help="With --cluster: HOST:PORT of the head. Default: the cluster in which this process runs."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="Run folder whose saved plan (plan --save) must fit on the disk; with --cluster the run folder that "
            "every node must see and be able to write.",
        ),
    ] = None,
    config: ConfigFile = None,
    workflow: Annotated[str, typer.Option(help="With --cluster: the workflow that -c and KEY=VALUE configure.")] = (
        "precompute"
    ),
    as_json: AsJson = False,
) -> None:
    """Check this machine: packages, versions, disk, GPUs, Ray. With --cluster all of them, node by node.

    Exits with 4 if something will not work.
    """
    from pipeline.cli.show import show_checks

    if cluster:
        chosen = build(workflow, config, overrides, out) if config or overrides else None
        fit = _examine_cluster(address, out, chosen, as_json=as_json)
    else:
        if address is not None or config is not None or overrides:
            raise ConfigError("--address, -c, KEY=VALUE: only --cluster looks at them; give it as well")
        from pipeline.cli.doctor import examine, examine_planned

        checks = [*examine(), *(examine_planned(out) if out is not None else ())]
        print_json(checks) if as_json else show_checks(checks)
        fit = all(check["status"] != "bad" for check in checks)
    if not fit:
        raise typer.Exit(EXIT_ENVIRONMENT)


def _examine_cluster(address: str | None, out: str | None, workflow: "Workflow | None", *, as_json: bool) -> bool:
    """Prints what every node is and has; True if a run will work."""
    import ray

    from pipeline.cli.show import show_cluster
    from pipeline.deploy.submit import check_shared
    from pipeline.executors.nodes.examine import examine_demands, examine_nodes, joined, report
    from pipeline.storage.run_folder import RunFolder

    if out is not None:
        check_shared(out)
    run = RunFolder(out) if out is not None else None
    places = {} if workflow is None else dict(local_places(workflow.config.model_dump(mode="json")))
    with joined(address) as nodes:
        head = ray.get_runtime_context().gcs_address
        answers, findings = examine_nodes(nodes, run, places)
        if workflow is not None:
            try:
                findings += examine_demands(nodes, _demands(workflow, out, head, nodes))
            except MachineError as error:
                findings.append({"node": "", "name": workflow.name, "status": "bad", "message": str(error)})
    result = report(head, nodes, answers, findings)
    print_json(result) if as_json else show_cluster(result)
    return bool(result["fit"])


def local_places(config: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Key and path of each file or folder of this machine that a configuration names.

    A text is a path if it is absolute, begins with a dot, or has a slash and leads to something here: of the others
    the names of models on a hub look alike. Of a pattern, the folder before it counts.
    """
    if isinstance(config, Mapping | list | tuple):
        items = config.items() if isinstance(config, Mapping) else enumerate(config)
        for name, value in items:
            yield from local_places(value, f"{key}.{name}" if key else str(name))
    elif isinstance(config, str) and "://" not in config and "\n" not in config:
        place = config
        first = min((place.find(mark) for mark in _WILDCARDS if mark in place), default=-1)
        if first >= 0:
            place = place[:first].rpartition("/")[0]
        if place.startswith(("/", "./", "../")) or ("/" in place and os.path.exists(place)):
            yield key, place


def _demands(
    workflow: "Workflow", out: str | None, address: str, nodes: Sequence["ClusterNode"]
) -> Mapping[str, "Demand"]:
    """What the stages of a workflow request on this cluster; nothing of one without stages.

    Raises:
        ConfigError, MachineError: the run would not begin.
    """
    from pipeline.executors.ray import RayExecutor
    from pipeline.storage.run_folder import RunFolder
    from pipeline.workflow import ShardedWorkflow

    if not isinstance(workflow, ShardedWorkflow):
        return {}
    run = RunFolder(out or f"runs/{workflow.name}")
    stages: Sequence[Any] = workflow.plan(run).stages
    executor = RayExecutor(stages, run, workflow.config.execution, address)
    return {stage.name: executor.demand(stage, list(nodes)) for stage in stages}
