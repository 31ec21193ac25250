"""Files with which a scheduler or a cluster runs a workflow: cron, systemd, Airflow, Slurm, Kubernetes, SkyPilot, ...

The templates are in `workflows/deploy/`; each value from the user goes through a filter of `quoting.py`.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from zoneinfo import ZoneInfo

from pipeline.deploy.cron import parse_cron
from pipeline.deploy.quoting import FILTERS
from pipeline.deploy.slurm import SlurmOptions, array_install, slurm_values
from pipeline.errors import (
    EXIT_ENVIRONMENT,
    EXIT_FAILED,
    EXIT_INCOMPLETE,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_USAGE,
    ConfigError,
)
from pipeline.executors.registry import EXECUTORS
from pipeline.resources import Resources
from pipeline.storage.credentials import check_no_credentials

FINAL_EXIT_CODES = (EXIT_FAILED, EXIT_USAGE, EXIT_INCOMPLETE, EXIT_ENVIRONMENT, EXIT_INTERRUPTED)
"""Exit codes after which a retry would end the same way; after any other code the same command resumes."""

_CONFIG_FOLDER = "/etc/pipeline"
_NAME_LENGTH = 40  # KubeRay allows 47
_CRON_NAME_LENGTH = 36  # of a RayCronJob, whose RayJobs are named after it and the time
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
"""Value of a label in Kubernetes."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What to run, and when. `config` is the name of a shipped configuration or an existing file."""

    kind: str
    workflow: str
    config: str | None = None
    out: str | None = None
    """Folder or URL; default runs/WORKFLOW."""
    overrides: tuple[str, ...] = ()
    at: str | None = None
    """Cron expression; default daily at 3:00."""
    timezone: str | None = None
    """IANA name; default UTC."""
    image: str | None = None
    """Container image with this project."""
    address: str | None = None
    """Ray cluster to join."""
    queue: str | None = None
    """Kueue's LocalQueue."""
    folder: Path = Path()
    """The working folder of the command, so that relative paths keep their meaning."""
    executor: str | None = None
    """As of `pipeline run`; default that of the workflow, or ray where it takes that."""
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    needs: Resources = field(default_factory=Resources)
    """What the run can make use of on one machine."""
    paths: tuple[str, ...] = ()
    """Files and folders of this machine that the configuration names."""

    @property
    def name(self) -> str:
        """Name of units, jobs and files: the workflow and the run folder, in lower case, digits and dashes."""
        words = f"{self.workflow}-{self.out.rstrip('/').rpartition('/')[2]}" if self.out else self.workflow
        length = _CRON_NAME_LENGTH if self.kind == "raycronjob" else _NAME_LENGTH
        return re.sub(r"[^a-z0-9]+", "-", words.lower())[:length].strip("-")


@dataclass(frozen=True, slots=True)
class _Kind:
    templates: Mapping[str, str]
    """Templates and the names of their files."""
    install: str
    """The shell command that installs the files."""
    uses: frozenset[str] = frozenset()
    """The options of `_OPTIONS` that it supports."""
    needs: frozenset[str] = frozenset()
    """Required options."""
    on_this_machine: bool = True
    """Whether it runs with the paths and packages of this machine."""
    in_ray: bool = False
    """Whether it is a job of a Ray cluster that is started for it."""
    workflows: frozenset[str] = frozenset()
    """The workflows that it can run; empty for all."""


_SLURM = frozenset(SlurmOptions.__dataclass_fields__)
_NAMED = ("at", "timezone", "image", "address", "queue", "config", "out", "executor")
_OPTIONS = ("at", "timezone", "image", "address", "queue", *sorted(_SLURM))
_TIMED = frozenset({"at", "timezone"})
_IMAGE, _ELSEWHERE = frozenset({"image"}), frozenset({"image", "out"})
_TOKEN = "RAY_AUTH_TOKEN=$(openssl rand -hex 32)"
KINDS: Mapping[str, _Kind] = {
    "cron": _Kind({"crontab.j2": "{name}.crontab"}, "(crontab -l; cat {files}) | crontab -", _TIMED | {"address"}),
    "systemd": _Kind(
        {"service.j2": "{name}.service", "timer.j2": "{name}.timer"},
        "sudo cp {files} /etc/systemd/system/ && sudo systemctl daemon-reload && "
        "sudo systemctl enable --now {name}.timer",
        _TIMED | {"address"},
    ),
    "airflow": _Kind({"airflow.py.j2": "{name}.py"}, "cp {files} $AIRFLOW_HOME/dags/", _TIMED | {"address"}),
    "slurm": _Kind({"slurm.sh.j2": "{name}.sh"}, "sbatch {files}", _SLURM | {"image"}),
    "kuberay": _Kind(
        {"rayjob.yaml.j2": "{name}.yaml"},
        "kubectl apply -f {files}",
        _IMAGE,
        _ELSEWHERE,
        on_this_machine=False,
        in_ray=True,
    ),
    "kuberay-cron": _Kind(
        {"cronjob.yaml.j2": "{name}-cron.yaml"},
        "kubectl apply -f {files}",
        _TIMED | _IMAGE,
        _ELSEWHERE,
        on_this_machine=False,
        in_ray=True,
    ),
    "raycronjob": _Kind(
        {"rayjob.yaml.j2": "{name}-cron.yaml"},
        "kubectl apply -f {files}",
        _TIMED | _IMAGE,
        _ELSEWHERE,
        on_this_machine=False,
        in_ray=True,
    ),
    "kueue": _Kind(
        {"rayjob.yaml.j2": "{name}.yaml"},
        "kubectl apply -f {files}",
        _IMAGE | {"queue"},
        _ELSEWHERE | {"queue"},
        on_this_machine=False,
        in_ray=True,
    ),
    "kubeflow": _Kind(
        {"trainjob.yaml.j2": "{name}.yaml"},
        "kubectl apply -f {files}",
        _IMAGE | {"queue"},
        _ELSEWHERE,
        on_this_machine=False,
        workflows=frozenset({"train"}),
    ),
    "skypilot": _Kind(
        {"skypilot.yaml.j2": "{name}.sky.yaml"},
        f"{_TOKEN} sky jobs launch --secret RAY_AUTH_TOKEN {{files}}",
        _IMAGE,
        _ELSEWHERE,
        on_this_machine=False,
    ),
    "dstack": _Kind(
        {"dstack.yaml.j2": "{name}.dstack.yml"},
        f"{_TOKEN} dstack apply -f {{files}}",
        _IMAGE,
        _ELSEWHERE,
        on_this_machine=False,
    ),
    "docker": _Kind(
        {"Dockerfile.j2": "Dockerfile", "dockerignore.j2": ".dockerignore"},
        "cp {files} CHECKOUT/ && docker build --tag {image} CHECKOUT && {docker_run}",
        frozenset({"image"}),
        frozenset({"out"}),
        on_this_machine=False,
    ),
}
_OWN_RAY = frozenset(name for name, kind in KINDS.items() if kind.in_ray) | {"skypilot", "dstack"}
"""Kinds that start a Ray for the run, and have it join."""


def render(schedule: Schedule) -> dict[str, str]:
    """The files of a schedule: name and text.

    Raises:
        ConfigError: an unknown kind, an unsupported or missing option, or a value that the files must not hold.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    kind = _check(schedule)
    environment = Environment(
        loader=FileSystemLoader(Path(str(files("workflows"))) / "deploy"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    values = _values(schedule, kind)
    if schedule.kind == "kuberay-cron":
        values["rayjob"] = environment.get_template("rayjob.yaml.j2").render(values, documents=False)
    return {
        name: environment.get_template(template).render(values)
        for template, name in _templates(schedule, kind).items()
    }


def install_command(schedule: Schedule, paths: Sequence[str]) -> str:
    """The shell command that installs the files at `paths`."""
    image = schedule.image or schedule.name
    mounts = [path for path in (_local_file(schedule.config), _local_folder(schedule.out)) if path]
    docker_run = ["docker", "run", "--rm", "--gpus", "all", *(f"--volume={path}:{path}" for path in mounts), image]
    if schedule.slurm.array:
        return array_install(paths)
    return KINDS[schedule.kind].install.format(
        files=shlex.join(paths), name=schedule.name, image=shlex.quote(image), docker_run=shlex.join(docker_run)
    )


def write_files(texts: Mapping[str, str], folder: Path) -> list[str]:
    """Writes each text under its name into `folder`; returns the paths.

    Raises:
        ConfigError: the folder cannot be written.
    """
    paths = [folder / name for name in texts]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, texts.values(), strict=True):
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--write-to {folder}: cannot be written ({error.strerror}); choose a folder that you can write to"
        ) from error
    return [str(path) for path in paths]


def _templates(schedule: Schedule, kind: _Kind) -> dict[str, str]:
    """Templates and the names of their files."""
    finish = {"slurm_finish.sh.j2": "{name}-finish.sh"} if schedule.slurm.array else {}
    return {template: name.format(name=schedule.name) for template, name in {**kind.templates, **finish}.items()}


def _check(schedule: Schedule) -> _Kind:
    if schedule.kind not in KINDS:
        raise ConfigError(f"--kind {schedule.kind}: there is none of this name; choose from {', '.join(KINDS)}")
    kind = KINDS[schedule.kind]
    given = {**asdict(schedule.slurm), **{name: getattr(schedule, name) for name in _NAMED}}
    options = {name: None if value is None else str(value) for name, value in given.items()}
    named = [(f"--{option}", value) for option, value in options.items() if value is not None]
    named += [("KEY=VALUE", override) for override in schedule.overrides]
    for what, value in named:
        check_no_credentials(value, what)
    for option in _OPTIONS:
        if options[option] is not None and option not in kind.uses:
            raise ConfigError(f"--{option} {options[option]}: --kind {schedule.kind} cannot use it; leave it out")
    if kind.workflows and schedule.workflow not in kind.workflows:
        raise ConfigError(
            f"{schedule.workflow}: --kind {schedule.kind} runs {', '.join(sorted(kind.workflows))} only; choose "
            "another kind, such as kuberay"
        )
    if schedule.queue is not None and not _LABEL.fullmatch(schedule.queue):
        raise ConfigError(f"--queue {schedule.queue!r}: not the name of a LocalQueue; letters, digits, - _ and . only")
    if schedule.executor is not None and schedule.executor not in EXECUTORS:
        raise ConfigError(f"--executor: must be one of {', '.join(EXECUTORS)} (got {schedule.executor!r})")
    if schedule.executor not in (None, "ray") and schedule.kind in _OWN_RAY:
        raise ConfigError(
            f"--executor {schedule.executor}: --kind {schedule.kind} runs in a Ray of its own; leave it out"
        )
    for option in sorted(kind.needs):
        if options[option] is None:
            raise ConfigError(f"--{option}: needed for --kind {schedule.kind}, but not given; give it")
    if not kind.on_this_machine and _is_shallow(schedule.out):
        raise ConfigError(
            f"--out {schedule.out}: --kind {schedule.kind} runs elsewhere; give a URL, or the absolute path of a "
            "folder in shared storage, such as /mnt/shared/run1"
        )
    for what, value in [*named, ("cwd", str(schedule.folder))]:
        if not value.isprintable():
            raise ConfigError(f"{what} {value!r}: has a line break or another control character; leave it out")
    return kind


def _values(schedule: Schedule, kind: _Kind) -> dict[str, object]:
    """The variables of the templates."""
    if schedule.timezone is not None:
        _check_timezone(schedule.timezone)
    timezone = schedule.timezone or "UTC"
    at = " ".join((schedule.at or "0 3 * * *").split())
    folder = schedule.folder.absolute()
    local = _local_folder(schedule.out)
    config = _local_file(schedule.config)
    mounted = config if kind.on_this_machine or schedule.kind == "docker" else f"{_CONFIG_FOLDER}/config.yaml"
    address = "auto" if kind.in_ray else schedule.address
    out = str(folder / local) if local else schedule.out
    slurm: dict[str, object] = {}
    if schedule.kind == "slurm":
        writable = [str(folder), *([out] if out and local else [])]
        paths = [*schedule.paths, *([config] if config else [])]
        slurm = slurm_values(schedule.slurm, schedule.needs, schedule.image, writable=writable, paths=paths)
    options = {
        "--config": mounted if config else schedule.config,
        "--out": out,
        "--executor": "ray" if address else schedule.executor or slurm.get("executor"),
        "--address": address,
    }
    arguments = ["run", schedule.workflow]
    arguments += [word for option, value in options.items() if value is not None for word in (option, value)]
    arguments += schedule.overrides
    bin_folder = Path(sys.executable).parent
    script = bin_folder / "pipeline"
    return {
        "kind": schedule.kind,
        "name": schedule.name,
        "workflow": schedule.workflow,
        "arguments": arguments,
        "program": [str(script)] if script.exists() else [sys.executable, "-m", "pipeline"],
        "bin": str(bin_folder),
        "run_folder": out or f"runs/{schedule.workflow}",
        "folder": str(folder),
        "user": str(os.getuid()),
        "at": at,
        "calendar": parse_cron(at).calendar(timezone),
        "timezone": timezone,
        "address": schedule.address,
        "image": schedule.image,
        "queue": schedule.queue,
        "config": config,
        "mounted": mounted,
        "config_text": Path(config).read_text(encoding="utf-8") if config else None,
        "config_folder": _CONFIG_FOLDER,
        "mount": str(Path(local).parent) if local else None,
        "ray_version": version("ray"),
        "again": EXIT_PREEMPTED,
        "final": FINAL_EXIT_CODES,
        "install": install_command(schedule, list(_templates(schedule, kind).values())),
        "documents": True,
        **slurm,
    }


def _check_timezone(name: str) -> None:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise ConfigError(f"--timezone {name}: no such time zone; for example UTC or Europe/Berlin") from error


def _local_file(config: str | None) -> str | None:
    """The configuration's absolute path if it is a file, None if it is the name of a shipped one."""
    return str(Path(config).absolute()) if config and Path(config).is_file() else None


def _local_folder(out: str | None) -> str | None:
    return out if out and "://" not in out else None


def _is_shallow(out: str | None) -> bool:
    """Whether a local path is relative, or has no parent folder to mount storage at."""
    local = _local_folder(out)
    return local is not None and (not Path(local).is_absolute() or len(Path(local).parts) < 3)
