"""`pipeline schedule`: each scheduler's file is valid, and runs exactly the command that was asked for."""

import ast
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.deploy.schedule import KINDS, Schedule, render
from pipeline.errors import ConfigError
from tests.commands import Result, call
from tests.pipeline.deploy.kubernetes import ConfigMap, CronJob, RayJob, Role, read_manifests

HOSTILE = (
    'source.path=/data/it\'s a "test"',
    "a=$(touch pwned) `touch pwned` $HOME ${HOME} $$",
    "b=100%h %% %n \\n \\ \\\\",
    "c=; touch pwned & # | > pwned",
    "d={{ 7 * 7 }} {% x %} : - * ü 😀.sh",
)
"""Values that mean something in a shell, a crontab, systemd, YAML, Jinja or Python."""


@dataclass
class Machine:
    """A folder with a stub `pipeline` that notes its arguments and working folder, and exits as told."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "it's 100% mine"

    def ran(self) -> tuple[list[str], Path]:
        arguments, _, folder = (self.root / "bin" / "pipeline.ran").read_text(encoding="utf-8").rpartition("\0")
        return arguments.split("\0"), Path(folder.strip())

    def shell(self, command: str, code: int = 0) -> int:
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(["sh", "-c", command], cwd=self.root, env={"PATH": path, "CODE": str(code)}, check=False)
        assert not list(self.root.rglob("pwned"))
        return done.returncode


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(tmp_path)
    found.folder.mkdir()
    program = tmp_path / "bin" / "pipeline"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n{ printf "%s\\0" "$@"; pwd; } >"$0.ran"\nexit ${CODE:-0}\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    return found


def hostile(machine: Machine, kind: str, **options: Any) -> Schedule:
    return Schedule(kind, "precompute", None, "/mnt/my data/run 1", HOSTILE, folder=machine.folder, **options)


WANTED = ["run", "precompute", "--out", "/mnt/my data/run 1", *HOSTILE]


def text_of(schedule: Schedule) -> str:
    files = render(schedule)
    assert len(files) == 1
    return next(iter(files.values()))


def test_a_crontab_line_runs_the_command_in_the_folder(machine: Machine) -> None:
    text = text_of(hostile(machine, "cron", at="*/5 2 * * mon", timezone="Europe/Berlin"))
    *settings, line = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert settings == ["SHELL=/bin/sh", "CRON_TZ=Europe/Berlin", "TZ=Europe/Berlin"]
    assert line.split()[:5] == ["*/5", "2", "*", "*", "mon"]
    command = line.split(maxsplit=5)[5]
    assert not re.search(r"(?<!\\)%", command)  # a plain % ends the command
    assert machine.shell(command.replace("\\%", "%")) == 0
    assert machine.ran() == (WANTED, machine.folder)
    assert (machine.folder / "precompute-run-1.log").exists()


def read_unit(text: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#", ";"))
    unit.optionxform = str  # type: ignore[assignment]
    unit.read_string(text)
    return unit


def test_a_systemd_service_runs_the_command_and_goes_on_after_a_preemption(machine: Machine) -> None:
    files = render(hostile(machine, "systemd"))
    assert sorted(files) == ["precompute-run-1.service", "precompute-run-1.timer"]
    service = read_unit(files["precompute-run-1.service"])["Service"]
    assert service["ExecStart"].startswith(":")
    words = [str(machine.root / "bin" / "pipeline"), *WANTED]
    assert shlex.split(service["ExecStart"].removeprefix(":")) == [word.replace("%", "%%") for word in words]
    assert service["WorkingDirectory"] == str(machine.folder).replace("%", "%%")
    assert (service["Type"], service["KillSignal"], service["KillMode"]) == ("oneshot", "SIGTERM", "mixed")
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"].split() == ["1", "2", "3", "4", "130"]  # 75 and kills are not in it
    timer = read_unit(files["precompute-run-1.timer"])["Timer"]
    assert (timer["OnCalendar"], timer["Persistent"]) == ("*-*-* 03:00:00 UTC", "true")
    assert timer["Unit"] == "precompute-run-1.service"


def test_a_private_tmp_would_hide_the_ray_that_is_to_be_joined(machine: Machine) -> None:
    alone, joined = (
        render(hostile(machine, "systemd", address=address))["precompute-run-1.service"]
        for address in (None, "10.0.0.1:6379")
    )
    assert "PrivateTmp=yes" in alone
    assert "PrivateTmp" not in joined
    assert '"--executor" "ray" "--address" "10.0.0.1:6379"' in joined


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_units(machine: Machine) -> None:
    files = render(hostile(machine, "systemd", at="*/15 8-18 1 * MON-FRI", timezone="Europe/Berlin"))
    for name, text in files.items():
        (machine.root / name).write_text(text, encoding="utf-8")
    paths = [str(machine.root / name) for name in files]
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "precompute-run-1" in line]
    assert (done.returncode, ours) == (0, [])


class Failed(Exception):
    """Airflow tries again."""


class FailedForGood(Exception):
    """Airflow does not try again."""


class Skipped(Exception):
    """Airflow takes the task as done."""


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules with the names of Airflow 3 that note what a DAG file asks for."""
    noted: dict[str, Any] = {}

    class BashOperator:
        template_fields: tuple[str, ...] = ("bash_command", "env", "cwd")
        template_ext: tuple[str, ...] = (".sh", ".bash")

        def __init__(
            self, *, task_id: str, bash_command: str, cwd: str, skip_on_exit_code: tuple[int, ...], **task: Any
        ) -> None:
            noted["operator"], noted["task"] = self, {"task_id": task_id, **task}
            self.bash_command, self.cwd, self.skip_on_exit_code = bash_command, cwd, skip_on_exit_code

        def execute(self, context: object) -> str:
            code = subprocess.run(["bash", "-c", self.bash_command], cwd=self.cwd, check=False).returncode
            if code in self.skip_on_exit_code:
                raise Skipped(f"Bash command returned exit code {code}. Skipping.")
            if code:
                raise Failed(code)
            return ""

    class DAG:
        def __init__(self, **options: Any):
            noted["dag"] = options

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    names: dict[str, dict[str, Any]] = {
        "airflow": {},
        "airflow.providers": {},
        "airflow.providers.standard": {},
        "airflow.providers.standard.operators": {},
        "airflow.providers.standard.operators.bash": {"BashOperator": BashOperator},
        "airflow.sdk": {"DAG": DAG},
        "airflow.sdk.exceptions": {"AirflowFailException": FailedForGood, "AirflowSkipException": Skipped},
        "pendulum": {"datetime": lambda *date, tz: (*date, tz)},
    }
    for name, contents in names.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return noted


def test_an_airflow_dag_runs_the_command_one_at_a_time(machine: Machine, airflow: dict[str, Any]) -> None:
    text = text_of(hostile(machine, "airflow", at="0 4 * * *", timezone="Europe/Berlin"))
    assert ast.get_docstring(ast.parse(text))
    exec(compile(text, "dag.py", "exec"), {})
    assert airflow["dag"] == {
        "dag_id": "precompute-run-1",
        "schedule": "0 4 * * *",
        "start_date": (2026, 1, 1, "Europe/Berlin"),
        "catchup": False,
        "max_active_runs": 1,
        "tags": ["pipeline"],
    }
    assert airflow["task"]["task_id"] == "precompute"
    assert airflow["task"]["retries"] > 0
    operator = airflow["operator"]
    assert (operator.template_fields, operator.template_ext) == ((), ())  # `{{` and `.sh` mean nothing
    operator.execute({})
    assert machine.ran() == (WANTED, machine.folder)


@pytest.mark.parametrize(
    ("code", "raises"), [(1, FailedForGood), (2, FailedForGood), (3, FailedForGood), (75, Failed), (137, Failed)]
)
def test_airflow_tries_again_only_what_was_stopped(
    machine: Machine, airflow: dict[str, Any], monkeypatch: pytest.MonkeyPatch, code: int, raises: type[Exception]
) -> None:
    exec(compile(text_of(hostile(machine, "airflow")), "dag.py", "exec"), {})
    monkeypatch.setenv("CODE", str(code))
    with pytest.raises(raises, match=str(code)):
        airflow["operator"].execute({})


def test_a_rayjob_runs_the_command_on_cpu_and_gpu_workers(machine: Machine) -> None:
    manifests = read_manifests(text_of(hostile(machine, "kuberay", image="registry/image:1")))
    assert list(manifests) == ["RayJob/precompute-run-1"]
    job = manifests["RayJob/precompute-run-1"]
    assert isinstance(job, RayJob)
    assert machine.shell(job.spec.entrypoint) == 0
    joined = ["--executor", "ray", "--address", "auto"]
    assert machine.ran()[0] == [*WANTED[:4], *joined, *HOSTILE]
    cluster = job.spec.rayClusterSpec
    assert cluster.authOptions.mode == "token"
    assert cluster.headGroupSpec.rayStartParams == {"num-cpus": "0"}
    groups = {group.groupName: group for group in cluster.workerGroupSpecs}
    assert sorted(groups) == ["cpu", "gpu"]
    for name, group in groups.items():
        assert group.minReplicas <= group.replicas < group.maxReplicas
        (container,) = group.template.spec.containers
        assert container.image == "registry/image:1"
        assert container.resources.limits.get("nvidia.com/gpu") == {"cpu": None, "gpu": "1"}[name]
        assert [source.secretRef.name for source in container.envFrom] == ["precompute-run-1-env"]
        assert {variable.name: variable.value for variable in container.env} == {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
        }, "nothing secret in the manifest"
        assert [mount.mountPath for mount in container.volumeMounts] == ["/mnt/my data"]
    assert job.spec.shutdownAfterJobFinishes


@pytest.mark.parametrize("text", ["shard_size: 7\n\n# a comment\nsource: {kind: synthetic}\n", "  a: 1 \nb: \t2", "x"])
def test_a_rayjob_brings_the_configuration_file(machine: Machine, text: str) -> None:
    config = machine.root / "my config.yaml"
    config.write_text(text, encoding="utf-8")
    schedule = Schedule("kuberay", "precompute", str(config), "s3://bucket/run1", image="i")
    manifests = read_manifests(text_of(schedule))
    held, job = manifests["ConfigMap/precompute-run1-config"], manifests["RayJob/precompute-run1"]
    assert isinstance(held, ConfigMap)
    assert isinstance(job, RayJob)
    assert held.data == {"config.yaml": text}
    spec = job.spec.rayClusterSpec.headGroupSpec.template.spec
    (volume,), (container,) = spec.volumes, spec.containers
    assert volume.configMap is not None
    assert volume.configMap.name == "precompute-run1-config"
    assert container.volumeMounts[0].mountPath == "/etc/pipeline"
    assert "--config /etc/pipeline/config.yaml --out s3://bucket/run1 " in job.spec.entrypoint


def cron_job(machine: Machine) -> tuple[CronJob, dict[str, Any]]:
    schedule = hostile(machine, "kuberay-cron", image="i", at="0 1 * * 6", timezone="Europe/Berlin")
    manifests = read_manifests(text_of(schedule))
    job = manifests["CronJob/precompute-run-1"]
    assert isinstance(job, CronJob)
    return job, manifests


def test_a_cronjob_holds_the_same_rayjob_and_may_submit_it(machine: Machine) -> None:
    job, manifests = cron_job(machine)
    assert (job.spec.schedule, job.spec.timeZone) == ("0 1 * * 6", "Europe/Berlin")
    assert job.spec.concurrencyPolicy == "Forbid"
    held = manifests["ConfigMap/precompute-run-1-rayjob"].data["rayjob.yaml"]
    assert read_manifests(held) == read_manifests(text_of(hostile(machine, "kuberay", image="i")))
    pod = job.spec.jobTemplate.spec.template.spec
    assert pod.serviceAccountName == "precompute-run-1-submit"
    role = manifests["Role/precompute-run-1-submit"]
    assert isinstance(role, Role)
    assert [(rule.apiGroups, rule.resources) for rule in role.rules] == [(["ray.io"], ["rayjobs"])]
    binding = manifests["RoleBinding/precompute-run-1-submit"]
    assert (binding.subjects[0].name, binding.roleRef.name) == ("precompute-run-1-submit", role.metadata.name)


@pytest.mark.parametrize(("status", "submits"), [("", True), ("Complete", True), ("Failed", True), ("Running", False)])
def test_a_cronjob_submits_nothing_while_the_last_job_runs(machine: Machine, status: str, submits: bool) -> None:
    (container,) = cron_job(machine)[0].spec.jobTemplate.spec.template.spec.containers
    kubectl = machine.root / "bin" / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" >>{machine.root}/calls\n[ "$1" != get ] || echo "{status}"\n')
    kubectl.chmod(0o755)
    assert container.command[:1] == ["/bin/sh"]
    assert machine.shell(shlex.join([*container.command, *container.args])) == 0
    verbs = [line.split()[0] for line in (machine.root / "calls").read_text().splitlines()]
    assert verbs == (["get", "delete", "create"] if submits else ["get"])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("shutDownAfterJobFinishes", "shutdownAfterJobFinishes"),
        ("rayStartParam:", "rayStartParams:"),
        ('cpu: "2x"', 'cpu: "2"'),
    ],
)
def test_the_schema_refuses_a_slip(machine: Machine, wrong: str, right: str) -> None:
    text = text_of(hostile(machine, "kuberay", image="i"))
    assert right in text
    with pytest.raises(ValidationError):
        read_manifests(text.replace(right, wrong))


def test_the_dockerfile_installs_the_project_and_runs_it_as_nobody_special(machine: Machine) -> None:
    files = render(hostile(machine, "docker"))
    assert sorted(files) == [".dockerignore", "Dockerfile"]
    lines = [line for line in files["Dockerfile"].splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    steps = [(words[0], words[1]) for line in text.splitlines() if (words := line.split(maxsplit=1))]
    named = dict(steps)
    assert steps[0] == ("FROM", "python:3.11-slim")
    known = {"FROM", "ARG", "RUN", "COPY", "ENV", "USER", "WORKDIR", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in steps} <= known
    assert named["USER"] not in ("root", "0")
    assert [argument for name, argument in steps if name == "ARG"] == [
        "TORCH_INDEX=https://download.pytorch.org/whl/cu130"
    ]
    assert json.loads(named["ENTRYPOINT"]) == ["pipeline"]
    assert json.loads(named["CMD"]) == WANTED
    assert [name for name, _ in steps].index("USER") > max(i for i, (name, _) in enumerate(steps) if name == "RUN")
    ignored = [line for line in files[".dockerignore"].splitlines() if not line.startswith("#")]
    assert ignored[0] == "*"  # so only what is named gets in: no weights, data or keys
    assert "!pyproject.toml" in ignored


def schedule(*arguments: str) -> Result:
    return call("schedule", "precompute", *arguments)


def test_each_kind_is_printed_with_the_command_it_runs() -> None:
    for kind, known in KINDS.items():
        workflow, config, setting = ("precompute", "demo", "shard_size=9")
        if known.workflows:
            workflow, config, setting = ("train", "demo-base", "batch_size=9")
        options = [word for option in sorted(known.needs - {"out"}) for word in (f"--{option}", "name")]
        arguments = ["-c", config, "--out", "/mnt/shared/run1", *options, setting]
        found = call("schedule", workflow, "--kind", kind, *arguments)
        assert found.code == 0, found.err
        words = re.sub(r"[\", ]+", " ", found.out)
        assert f" run {workflow} --config {config} --out /mnt/shared/run1 " in words, kind
        assert f" {setting}" in words


def test_the_folder_of_the_command_line_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("shard_size: 9\n")
    found = schedule("--kind", "cron", "-c", "my.yaml", "--out", "run")
    assert f"cd {tmp_path} && " in found.out
    assert f"--config {tmp_path}/my.yaml --out {tmp_path}/run " in found.out


def test_the_files_are_written_with_a_word_on_how_to_install_them(tmp_path: Path) -> None:
    found = schedule("--kind", "systemd", "--out", "/data/run1", "--write-to", str(tmp_path / "new"))
    service, timer = (tmp_path / "new" / f"precompute-run1.{suffix}" for suffix in ("service", "timer"))
    install = f"sudo cp {service} {timer} /etc/systemd/system/ && sudo systemctl daemon-reload"
    assert found.out.splitlines()[:2] == [str(service), str(timer)]
    assert found.out.splitlines()[2].startswith(f"install: {install} && ")
    assert read_unit(timer.read_text())["Timer"]["Unit"] == service.name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kind", "anacron"], "--kind anacron: there is none of this name; choose from cron, systemd,"),
        (["--kind", "cron", "shard_size=0"], "shard_size: input should be greater than or equal to 1 (got 0)"),
        (["--kind", "cron", "--image", "x"], "--image x: --kind cron cannot use it; leave it out"),
        (["--kind", "slurm", "--at", "0 3 * * *"], "--at 0 3 * * *: --kind slurm cannot use it; leave it out"),
        (["--kind", "kuberay", "--image", "x"], "--out: needed for --kind kuberay, but not given; give it"),
        (["--kind", "kuberay", "--out", "s3://b/r"], "--image: needed for --kind kuberay, but not given; give it"),
        (["--kind", "kueue", "--out", "s3://b/r", "--image", "x"], "--queue: needed for --kind kueue, but not given"),
        (["--kind", "kuberay", "--queue", "x"], "--queue x: --kind kuberay cannot use it; leave it out"),
        (["--kind", "kueue", "--queue", "my queue"], "--queue 'my queue': not the name of a LocalQueue; letters,"),
        (["--kind", "kubeflow", "--image", "x"], "precompute: --kind kubeflow runs train only; choose another kind"),
        (["--kind", "skypilot", "--image", "x", "--out", "run1"], "--out run1: --kind skypilot runs elsewhere"),
        (["--kind", "dstack", "--out", "s3://b/r"], "--image: needed for --kind dstack, but not given; give it"),
        (["--kind", "docker", "--out", "run1"], "--out run1: --kind docker runs elsewhere; give a URL, or the"),
        (["--kind", "docker", "--out", "/run1"], "--out /run1: --kind docker runs elsewhere"),
        (["--kind", "cron", "--at", "hourly"], "--at 'hourly': needs five fields"),
        (["--kind", "cron", "--timezone", "Mars"], "--timezone Mars: no such time zone; for example UTC"),
        (["--kind", "cron", "--out", "a\nb"], "--out 'a\\nb': has a line break or another control character"),
        (["--kind", "cron", "source.seed=1\n"], "KEY=VALUE 'source.seed=1\\n': has a line break"),
        (["--kind", "cron", "--write-to", "/dev/null/x"], "--write-to /dev/null/x: cannot be written"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    options = [] if "--write-to" in arguments else ["--write-to", str(tmp_path / "new")]
    found = schedule(*arguments, *options)
    assert found.code == 2
    assert says in found.err
    assert not list(tmp_path.iterdir())


def test_the_name_tells_run_folders_apart() -> None:
    names = [replace(Schedule("cron", "precompute"), out=out).name for out in (None, "/a/Run_1/", "s3://b/x.y")]
    assert names == ["precompute", "precompute-run-1", "precompute-x-y"]
    assert len(Schedule("cron", "precompute", out="a" * 99).name) == 40
    assert len(Schedule("raycronjob", "precompute", out="a" * 99).name) == 36  # 11 more for the time


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    "options",
    [
        {"out": "s3://KEY:secret/word@bucket/run"},
        {"out": "simplecache::s3://key:secret-word@bucket/run"},
        {"address": "ray://me:secret-word@head:10001"},
        {"overrides": ("source.path=https://h/list.csv?sig=secret-word",)},
        {"image": "https://me:secret-word@registry/image"},
        {"queue": "https://me:secret-word@host/queue"},
    ],
    ids=["out", "chain", "address", "signed", "image", "queue"],
)
def test_credentials_reach_no_file_of_a_scheduler(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="holds a ") as caught:
        render(Schedule(kind, "precompute", **{"out": "/mnt/a/b", **options}))
    assert "secret" not in str(caught.value)
