"""The parts of the Kubernetes APIs that our manifests use; any other field is refused.

Written from the API references and what their webhooks check: ray.io/v1 (KubeRay 1.7), kueue.x-k8s.io (Kueue 0.19),
trainer.kubeflow.org/v1alpha1 (Kubeflow Trainer 2.3), batch/v1, rbac.authorization.k8s.io/v1, v1 (Kubernetes 1.34).
"""

import re
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

QUEUE = "kueue.x-k8s.io/queue-name"

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
RayJobName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
RayCronJobName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=36)]
CronJobName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=52)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGT]|[KMGT]i)?$")]
Path = Annotated[str, Field(pattern=r"^/")]


class Api(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Api):
    name: Name
    labels: dict[str, str] = {}


class Labels(Api):
    labels: dict[str, str] = {}


class SecurityContext(Api):
    allowPrivilegeEscalation: bool | None = None
    readOnlyRootFilesystem: bool | None = None
    capabilities: dict[Literal["add", "drop"], list[str]] = {}


class SeccompProfile(Api):
    type: Literal["RuntimeDefault", "Unconfined", "Localhost"]


class PodSecurityContext(Api):
    runAsNonRoot: bool
    runAsUser: int
    runAsGroup: int | None = None
    fsGroup: int | None = None
    seccompProfile: SeccompProfile


class EnvVar(Api):
    name: str
    value: str


class SecretRef(Api):
    name: Name
    optional: bool = False


class EnvFrom(Api):
    secretRef: SecretRef


class Resources(Api):
    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class VolumeMount(Api):
    name: Name
    mountPath: Path
    readOnly: bool = False


class Container(Api):
    name: Name
    image: str
    command: list[str] = []
    args: list[str] = []
    env: list[EnvVar] = []
    envFrom: list[EnvFrom] = []
    resources: Resources
    securityContext: SecurityContext
    volumeMounts: list[VolumeMount] = []


class ConfigMapRef(Api):
    name: Name


class ClaimRef(Api):
    claimName: Name


class Volume(Api):
    name: Name
    configMap: ConfigMapRef | None = None
    persistentVolumeClaim: ClaimRef | None = None
    emptyDir: dict[str, str] | None = None


class PodSpec(Api):
    serviceAccountName: Name | None = None
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    terminationGracePeriodSeconds: int | None = None
    securityContext: PodSecurityContext
    containers: list[Container]
    volumes: list[Volume] = []


class PodTemplate(Api):
    metadata: Labels = Labels()
    spec: PodSpec


class HeadGroup(Api):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(Api):
    groupName: Name
    replicas: int
    minReplicas: int
    maxReplicas: int
    rayStartParams: dict[str, str]
    template: PodTemplate


class AuthOptions(Api):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(Api):
    idleTimeoutSeconds: int
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]


class RayClusterSpec(Api):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Api):
    suspend: bool = False
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: int
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    rayClusterSpec: RayClusterSpec

    @model_validator(mode="after")
    def kuberay_suspends_only_what_it_shuts_down(self) -> Self:
        assert self.shutdownAfterJobFinishes or not (self.suspend or self.ttlSecondsAfterFinished)
        return self


class RayJobMetadata(Metadata):
    name: RayJobName


class RayJob(Api):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: RayJobMetadata
    spec: RayJobSpec

    @model_validator(mode="after")
    def kueue_admits_it(self) -> Self:
        if QUEUE in self.metadata.labels:
            cluster = self.spec.rayClusterSpec
            assert self.spec.shutdownAfterJobFinishes
            assert not cluster.enableInTreeAutoscaling
            assert len(cluster.workerGroupSpecs) <= 17
            assert "head" not in {group.groupName for group in cluster.workerGroupSpecs}
        return self


class RayCronJobSpec(Api):
    schedule: Annotated[str, Field(pattern="^[^TZ]*$")]
    timeZone: Annotated[str, Field(min_length=1)]
    jobTemplate: RayJobSpec


class RayCronJobMetadata(Metadata):
    name: RayCronJobName


class RayCronJob(Api):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCronJob"]
    metadata: RayCronJobMetadata
    spec: RayCronJobSpec


class PodCondition(Api):
    type: str
    status: Literal["True", "False", "Unknown"]


class PodFailureRule(Api):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onPodConditions: list[PodCondition]


class PodFailurePolicy(Api):
    rules: Annotated[list[PodFailureRule], Field(max_length=20)]


class NodeJobSpec(Api):
    backoffLimit: int
    podFailurePolicy: PodFailurePolicy
    template: PodTemplate

    @model_validator(mode="after")
    def kubernetes_takes_a_failure_policy_of_pods_that_do_not_restart(self) -> Self:
        assert self.template.spec.restartPolicy == "Never"
        return self


class NodeJobTemplate(Api):
    metadata: Labels
    spec: NodeJobSpec


class ReplicatedJob(Api):
    name: Name
    template: NodeJobTemplate

    @model_validator(mode="after")
    def the_trainer_finds_its_container(self) -> Self:
        assert self.template.metadata.labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
        assert "node" in {container.name for container in self.template.spec.template.spec.containers}
        return self


class FailureRule(Api):
    name: Annotated[str, Field(pattern=r"^[A-Za-z]([-_,:A-Za-z0-9]*[A-Za-z0-9_])?$", max_length=128)]
    action: Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    onJobFailureReasons: list[Literal["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]]


class FailurePolicy(Api):
    maxRestarts: int
    rules: list[FailureRule]


class JobSetSpec(Api):
    failurePolicy: FailurePolicy
    replicatedJobs: list[ReplicatedJob]


class JobSetTemplate(Api):
    spec: JobSetSpec


class MLPolicy(Api):
    numNodes: Annotated[int, Field(ge=1)]
    torch: dict[str, str]


class TrainingRuntimeSpec(Api):
    mlPolicy: MLPolicy
    template: JobSetTemplate


class TrainingRuntime(Api):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainingRuntime"]
    metadata: Metadata
    spec: TrainingRuntimeSpec


class RuntimeRef(Api):
    kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"]
    name: Name


class Trainer(Api):
    numNodes: int
    image: Annotated[str, Field(max_length=500)]
    command: Annotated[list[str], Field(max_length=128)]
    args: Annotated[list[str], Field(max_length=128)]


class TrainJobSpec(Api):
    suspend: bool = False
    runtimeRef: RuntimeRef
    trainer: Trainer


class TrainJobMetadata(Metadata):
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]


class TrainJob(Api):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainJob"]
    metadata: TrainJobMetadata
    spec: TrainJobSpec


class ConfigMap(Api):
    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]


class ServiceAccount(Api):
    apiVersion: Literal["v1"]
    kind: Literal["ServiceAccount"]
    metadata: Metadata


class Rule(Api):
    apiGroups: list[str]
    resources: list[str]
    verbs: list[Literal["get", "list", "watch", "create", "update", "patch", "delete"]]


class Role(Api):
    apiVersion: Literal["rbac.authorization.k8s.io/v1"]
    kind: Literal["Role"]
    metadata: Metadata
    rules: list[Rule]


class Subject(Api):
    kind: Literal["ServiceAccount"]
    name: Name


class RoleRef(Api):
    apiGroup: Literal["rbac.authorization.k8s.io"]
    kind: Literal["Role"]
    name: Name


class RoleBinding(Api):
    apiVersion: Literal["rbac.authorization.k8s.io/v1"]
    kind: Literal["RoleBinding"]
    metadata: Metadata
    subjects: list[Subject]
    roleRef: RoleRef


class JobSpec(Api):
    backoffLimit: int
    template: PodTemplate


class JobTemplate(Api):
    spec: JobSpec


class CronJobSpec(Api):
    schedule: str
    timeZone: str
    concurrencyPolicy: Literal["Allow", "Forbid", "Replace"]
    startingDeadlineSeconds: int
    successfulJobsHistoryLimit: int
    failedJobsHistoryLimit: int
    jobTemplate: JobTemplate


class CronJobMetadata(Metadata):
    name: CronJobName


class CronJob(Api):
    apiVersion: Literal["batch/v1"]
    kind: Literal["CronJob"]
    metadata: CronJobMetadata
    spec: CronJobSpec


Manifest = Annotated[
    RayJob | RayCronJob | TrainingRuntime | TrainJob | ConfigMap | ServiceAccount | Role | RoleBinding | CronJob,
    Field(discriminator="kind"),
]


def expanded(argument: str, **variables: str) -> str:
    """An argument as its process gets it: Kubernetes takes `$$` for `$`, and `$(NAME)` for one of the variables."""
    return re.sub(r"\$(\$|\(([^)]*)\))", lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]), argument)


def read_manifests(text: str) -> dict[str, Manifest]:
    """The objects of a manifest by `Kind/name`, each checked, and the names they refer to within a pod checked too."""
    adapter: TypeAdapter[Manifest] = TypeAdapter(Manifest)
    found = [adapter.validate_python(tree) for tree in yaml.safe_load_all(text)]
    for pod in (pod for manifest in found for pod in _pods(manifest)):
        volumes = {volume.name for volume in pod.volumes}
        for container in pod.containers:
            assert {mount.name for mount in container.volumeMounts} == volumes
    return {f"{manifest.kind}/{manifest.metadata.name}": manifest for manifest in found}


def _pods(manifest: Manifest) -> list[PodSpec]:
    if isinstance(manifest, CronJob):
        return [manifest.spec.jobTemplate.spec.template.spec]
    if isinstance(manifest, TrainingRuntime):
        return [job.template.spec.template.spec for job in manifest.spec.template.spec.replicatedJobs]
    if isinstance(manifest, RayJob | RayCronJob):
        spec = manifest.spec if isinstance(manifest, RayJob) else manifest.spec.jobTemplate
        cluster = spec.rayClusterSpec
        return [cluster.headGroupSpec.template.spec, *(group.template.spec for group in cluster.workerGroupSpecs)]
    return []
