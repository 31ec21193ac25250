"""The manifests for Kueue, RayCronJob and Kubeflow Trainer: valid, and they run exactly the command asked for."""

import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.deploy.quoting import container_argument, guarded_command
from pipeline.deploy.schedule import KINDS, Schedule, render
from pipeline.errors import ConfigError
from tests.pipeline.deploy.kubernetes import (
    QUEUE,
    RayCronJob,
    RayJob,
    RayJobSpec,
    TrainingRuntime,
    TrainJob,
    expanded,
    read_manifests,
)
from tests.pipeline.deploy.test_schedule import HOSTILE, text_of

DOLLARS = ("e=$$ $$$ $(RAY_ADDRESS) ${{ run.args }} ${{ $", "f=$${{ x }}", "g=!! !$", "'$", "$$'$$")
"""Values with what Kubernetes and dstack expand before a shell reads them."""
EXPANDED = {"RAY_ADDRESS": "pwned", "touch pwned": "pwned"}
OUT = "/mnt/my data/run 1"
VALUES = (*HOSTILE, *DOLLARS)


def manifests(kind: str, workflow: str = "precompute", **options: Any) -> dict[str, Any]:
    schedule = Schedule(kind, workflow, None, OUT, VALUES, image="registry/image:1", **options)
    return read_manifests(text_of(schedule))


@pytest.mark.parametrize("kind", ["kuberay", "kueue", "raycronjob"])
def test_kuberays_submitter_hands_the_shell_the_command_as_it_was_given(kind: str) -> None:
    """It puts the entrypoint into an argument of a container, where Kubernetes expands what it knows."""
    options = {"queue": "team"} if kind == "kueue" else {}
    (job,) = manifests(kind, **options).values()
    entrypoint = (job.spec.jobTemplate if isinstance(job, RayCronJob) else job.spec).entrypoint
    assert expanded(entrypoint, **EXPANDED) == entrypoint
    arguments = ["run", "precompute", "--out", OUT, "--executor", "ray", "--address", "auto", *VALUES]
    assert shlex.split(entrypoint) == ["pipeline", *arguments]


def test_kueue_gets_a_suspended_rayjob_with_its_queue_that_does_not_scale() -> None:
    plain = manifests("kuberay")["RayJob/precompute-run-1"]
    queued = manifests("kueue", queue="team-a.gpu")["RayJob/precompute-run-1"]
    assert isinstance(queued, RayJob)
    assert queued.metadata.labels == plain.metadata.labels | {QUEUE: "team-a.gpu"}
    assert (queued.spec.suspend, plain.spec.suspend) == (True, False)
    assert queued.spec.shutdownAfterJobFinishes
    assert not queued.spec.rayClusterSpec.enableInTreeAutoscaling
    for group in queued.spec.rayClusterSpec.workerGroupSpecs:
        assert group.minReplicas == group.replicas == group.maxReplicas
    assert queued.spec.backoffLimit == plain.spec.backoffLimit > 0


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false"),
        ("authOptions: {mode: token}", "enableInTreeAutoscaling: true\n    authOptions: {mode: token}"),
        ("groupName: cpu", "groupName: head"),
    ],
)
def test_what_kueue_refuses_is_refused_by_the_schema_here(right: str, wrong: str) -> None:
    text = text_of(Schedule("kueue", "precompute", out="s3://b/r", image="i", queue="team"))
    assert right in text
    with pytest.raises(ValidationError):
        read_manifests(text.replace(right, wrong))


def test_a_raycronjob_holds_the_rayjob_and_its_times() -> None:
    cron = manifests("raycronjob", at="0 1 * * 6", timezone="Europe/Berlin")["RayCronJob/precompute-run-1"]
    assert isinstance(cron, RayCronJob)
    assert (cron.spec.schedule, cron.spec.timeZone) == ("0 1 * * 6", "Europe/Berlin")
    job = manifests("kuberay")["RayJob/precompute-run-1"]
    assert isinstance(cron.spec.jobTemplate, RayJobSpec)
    assert cron.spec.jobTemplate == job.spec


def test_kubeflow_trains_with_the_arguments_as_they_were_given() -> None:
    found = manifests("kubeflow", "train")
    assert list(found) == ["TrainingRuntime/train-run-1", "TrainJob/train-run-1"]
    job, runtime = found["TrainJob/train-run-1"], found["TrainingRuntime/train-run-1"]
    assert isinstance(job, TrainJob)
    assert isinstance(runtime, TrainingRuntime)
    assert job.spec.trainer.command == ["torchrun", "-m", "pipeline"]
    assert [expanded(word, **EXPANDED) for word in job.spec.trainer.args] == ["run", "train", "--out", OUT, *VALUES]
    assert (job.spec.runtimeRef.kind, job.spec.runtimeRef.name) == ("TrainingRuntime", runtime.metadata.name)
    assert runtime.metadata.labels["trainer.kubeflow.org/framework"] == "torch"
    assert not job.spec.suspend
    (node,) = runtime.spec.template.spec.replicatedJobs
    (container,) = node.template.spec.template.spec.containers
    assert container.resources.limits["nvidia.com/gpu"] == "1"
    assert {mount.mountPath for mount in container.volumeMounts} == {"/mnt/my data", "/dev/shm"}
    assert [source.secretRef.name for source in container.envFrom] == ["train-run-1-env"]
    assert container.env == []


def test_kubeflow_starts_all_nodes_again_and_does_not_count_preemptions() -> None:
    spec = manifests("kubeflow", "train")["TrainingRuntime/train-run-1"].spec.template.spec
    (rule,), (node,) = spec.failurePolicy.rules, spec.replicatedJobs
    assert (rule.action, rule.onJobFailureReasons) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    assert spec.failurePolicy.maxRestarts > 0
    job = node.template.spec
    assert job.backoffLimit == 0  # the nodes of a training start and end together
    assert [(rule.action, rule.onPodConditions[0].type) for rule in job.podFailurePolicy.rules] == [
        ("FailJob", "DisruptionTarget")
    ]


def test_kubeflow_waits_for_kueue_where_a_queue_is_given() -> None:
    job = manifests("kubeflow", "train", queue="team")["TrainJob/train-run-1"]
    assert (job.metadata.labels[QUEUE], job.spec.suspend) == ("team", True)


@pytest.mark.parametrize("kind", [kind for kind, known in KINDS.items() if known.workflows])
def test_a_kind_for_some_workflows_refuses_the_others(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"sample: --kind {kind} runs train only"):
        render(Schedule(kind, "sample", out="s3://b/r", image="i"))


WORDS = st.lists(st.text(st.sampled_from("$(){}'\"\\ aA!~#;&|`=😀")), max_size=4)


@given(WORDS)
def test_no_words_make_a_command_that_is_expanded_before_a_shell_reads_it(words: list[str]) -> None:
    command = guarded_command(words)
    assert shlex.split(command) == words
    assert not any(expanded in command for expanded in ("$$", "$(", "${"))


@given(WORDS)
def test_any_argument_of_a_container_arrives_as_it_was_given(words: list[str]) -> None:
    assert [expanded(container_argument(word), a="pwned") for word in words] == words


GIVEN = [
    (kind, option)
    for kind, known in KINDS.items()
    for option in ("out", "overrides", "config", *sorted(known.uses.intersection(Schedule.__dataclass_fields__)))
    if option not in ("at", "timezone")
]


@pytest.mark.parametrize(("kind", "option"), GIVEN)
def test_control_characters_reach_no_file_of_a_scheduler(kind: str, option: str) -> None:
    known = KINDS[kind]
    needed = dict.fromkeys(known.needs - {"out"}, "name")
    workflow = "train" if known.workflows else "precompute"
    value = {"out": "s3://b/r\x1b[2Jrun", "overrides": ("a=1\n",)}.get(option, "a\nb")
    with pytest.raises(ConfigError, match=r"control character|not the name of a LocalQueue"):
        render(Schedule(kind, workflow, **{"out": "s3://b/r", **needed, option: value}))


@pytest.mark.parametrize("kind", ["skypilot", "dstack", "kueue", "raycronjob"])
def test_a_place_with_a_ray_of_its_own_takes_no_other_executor(kind: str) -> None:
    needed = dict.fromkeys(KINDS[kind].needs - {"out"}, "name")
    with pytest.raises(ConfigError, match=f"--executor local: --kind {kind} runs in a Ray of its own"):
        render(Schedule(kind, "precompute", out="s3://b/r", executor="local", **needed))
