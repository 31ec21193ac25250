"""Configuration of a training as a workflow: its processes, and the paths of its files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from imagen_core.train import TrainError
from pipeline.config import Config
from pipeline.errors import PipelineError


class WorkersConfig(Config):
    """Processes of `--executor ray`; not read by a single process or under torchrun."""

    num_workers: int | None = Field(default=None, ge=1)
    """Training processes; null: one per GPU of the cluster, or one."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs reserved for each."""
    use_gpu: bool | None = None
    """One GPU for each process; null: if the cluster has any."""


class TrainingFailedError(PipelineError):
    """The training itself failed; the last checkpoint can be resumed."""


def at_url(summary: Mapping[str, Any], folder: Path, url: str) -> dict[str, Any]:
    """The summary of a training in `folder`, with its paths below the run's URL, and without unknown values."""
    known = {name: value for name, value in summary.items() if value is not None}
    paths = {name: str(known[name]).replace(str(folder), url) for name in known if name.endswith("checkpoint")}
    return {**known, **paths}


@contextmanager
def errors_at_url(folder: Path, url: str) -> Iterator[None]:
    """Messages of the trainer name the run's URL in place of the folder that it works in."""
    try:
        yield
    except TrainError as error:
        error.args = (str(error).replace(str(folder), url), *error.args[1:])
        raise
