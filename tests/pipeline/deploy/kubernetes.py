"""The parts of the Kubernetes and KubeRay APIs that our manifests use; any other field is refused.

Written from the API references: ray.io/v1 (KubeRay 1.6), batch/v1, rbac.authorization.k8s.io/v1, v1 (Kubernetes 1.34).
"""

from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
RayJobName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
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
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Api):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: int
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    rayClusterSpec: RayClusterSpec


class RayJobMetadata(Metadata):
    name: RayJobName


class RayJob(Api):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: RayJobMetadata
    spec: RayJobSpec


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


Manifest = Annotated[RayJob | ConfigMap | ServiceAccount | Role | RoleBinding | CronJob, Field(discriminator="kind")]


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
    if isinstance(manifest, RayJob):
        cluster = manifest.spec.rayClusterSpec
        return [cluster.headGroupSpec.template.spec, *(group.template.spec for group in cluster.workerGroupSpecs)]
    return []
