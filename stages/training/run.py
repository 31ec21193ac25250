"""Trains one stage of a cascade: starts `imagen_core.train` here, under torchrun, or on Ray Train."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from imagen_core.store import StoreError
from imagen_core.store.errors import ADVICE
from imagen_core.train import (
    CheckpointError,
    CheckpointMismatchError,
    NonFiniteLossError,
    StoreLostError,
    TrainConfig,
    TrainError,
    TrainingProgress,
    TrainingStart,
    TrainingStopped,
    train,
)
from pipeline.errors import ConfigError, MachineError, PreemptedError, StaleOutputError
from pipeline.executors.registry import EXECUTORS
from pipeline.job import Job
from pipeline.units import human_seconds
from stages.checkpoints.load import load_checkpoint_from
from stages.encoders.registry import AnyEncoder
from stages.training.config import TrainingFailedError, WorkersConfig, at_url, errors_at_url
from stages.training.online_encoder import online_encoder


def run_training(
    config: TrainConfig, workers: WorkersConfig, job: Job, online: AnyEncoder | None = None
) -> Mapping[str, object]:
    """Trains to the end, or until the job must stop; returns the summary of the training.

    Args:
        online: encodes captions in the training loop.
    Raises:
        ConfigError: the store, the model and the settings do not fit together.
        StaleOutputError: the folder holds a training of another model or on other embeddings.
        TrainingFailedError: a loss that is not finite, or a damaged checkpoint.
        MachineError: the store cannot be read any more; the checkpoint is saved.
        PreemptedError: likewise, and it may be readable later.
    """
    if job.options.executor not in EXECUTORS:
        raise ConfigError(f"--executor: must be one of {', '.join(EXECUTORS)} (got {job.options.executor!r})")
    if job.options.restart:
        raise ConfigError("--restart: a training is never deleted; use another --out, or remove the folder")
    try:
        with _translated():
            if job.options.executor == "ray":
                from stages.training.ray import train_on_ray

                return train_on_ray(config, workers, job, online)
            encoder = None if online is None else online_encoder(online, next(iter(config.texts.values()), None))
            with job.working_folder() as folder, errors_at_url(folder, job.run.url):
                summary = train(
                    config,
                    folder,
                    _shown(job),
                    job.should_stop,
                    encoder,
                    load_checkpoint_from,
                    _start_shown(job),
                    job.check,
                )
            return at_url(summary, folder, job.run.url)
    except TrainingStopped as stopped:
        job.lines.message(str(stopped))
        job.signals.received = job.signals.received or signal.SIGTERM  # another process received the signal
        return {}


def _shown(job: Job) -> Callable[[TrainingProgress], None]:
    return lambda progress: job.lines.show(describe(progress), final=progress.step == progress.num_steps)


def _start_shown(job: Job) -> Callable[[TrainingStart], None]:
    def show(start: TrainingStart) -> None:
        for line in start.lines():
            job.lines.message(line)

    return show


def describe(progress: TrainingProgress) -> str:
    """One line for people."""
    return (
        f"step {progress.step:,}/{progress.num_steps:,}  loss {progress.loss:.4f}  "
        f"{progress.images_per_s:,.1f} img/s"
        + (f"  {human_seconds(progress.remaining_s)} left" if progress.remaining_s else "")
        + f"  waiting for data {progress.loader_wait:.1%}"
    )


@contextmanager
def _translated() -> Iterator[None]:
    """Turns the library's errors into the command line's."""
    try:
        yield
    except CheckpointMismatchError as error:
        raise StaleOutputError(str(error)) from error
    except (CheckpointError, NonFiniteLossError) as error:
        raise TrainingFailedError(str(error)) from error
    except TrainingStopped:
        raise
    except StoreLostError as error:
        raise (PreemptedError if error.again else MachineError)(str(error)) from error
    except StoreError as error:
        text = str(error)
        if text.endswith(ADVICE):  # to make the store again is not a training's advice
            text = text.removesuffix(ADVICE) + "check it with `pipeline verify`, and put back what is damaged"
        raise ConfigError(text) from error
    except TrainError as error:
        raise ConfigError(str(error)) from error
