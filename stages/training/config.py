"""Configuration of a training as a workflow: processes, and where its files lie."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config import Config
from pipeline.errors import PipelineError


class WorkersConfig(Config):
    """Processes of `--executor ray`; alone or under torchrun nothing of this is read."""

    num_workers: int | None = Field(default=None, ge=1)
    """Training processes; null: one for each GPU of the cluster, or one."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs reserved for each."""
    use_gpu: bool | None = None
    """One GPU each; null: if the cluster has any."""


class TrainingFailedError(PipelineError):
    """The training itself failed; the last checkpoint is good."""


def at_url(facts: Mapping[str, Any], folder: Path, url: str) -> dict[str, Any]:
    """What a training in `folder` says, with paths as they are below the run's URL, and without what is not known."""
    known = {name: value for name, value in facts.items() if value is not None}
    paths = {name: str(known[name]).replace(str(folder), url) for name in known if name.endswith("checkpoint")}
    return {**known, **paths}
