"""Trains on Ray: one process per GPU, started and watched by Ray Train."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from imagen_core.far import StorageError
from imagen_core.store import StoreError
from imagen_core.train import TrainConfig, TrainError, TrainingStopped
from pipeline.errors import ConfigError, PipelineError, PreemptedError
from pipeline.executors.process import keep_freed_memory
from pipeline.executors.ray_cluster import connect, leave, total
from pipeline.job import Job
from pipeline.storage import LocalStorage
from pipeline.storage.mirror import working_folder
from pipeline.storage.open import open_storage
from stages.checkpoints.load import load_checkpoint_from
from stages.encoders.registry import AnyEncoder
from stages.training.config import WorkersConfig, at_url, errors_at_url
from stages.training.online_encoder import online_encoder

_OWN = (TrainError, StoreError, StorageError, PipelineError)
"""What a worker may raise that says all by itself."""


class RayTrainError(PipelineError):
    """A worker failed."""


def train_on_ray(
    config: TrainConfig, workers: WorkersConfig, job: Job, online: AnyEncoder | None
) -> Mapping[str, object]:
    """Runs `imagen_core.train.train` in processes that Ray Train starts and joins into one process group.

    The run folder must be on a file system that all workers see, or on an object store: then each worker has a local
    copy, and the first one sends the changes back. A worker that dies ends the run; the same command resumes from the
    newest checkpoint.
    """
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    gpus = total(connect(None, job.options.cluster), "GPU")
    storage = job.run.storage
    scratch = (
        job.run.root / "ray" if isinstance(storage, LocalStorage) else storage.new_folder()
    )  # goes with this process
    try:
        use_gpu = gpus > 0 if workers.use_gpu is None else workers.use_gpu
        num_workers = workers.num_workers or max(1, int(gpus))
        if config.batch_size % num_workers:
            raise ConfigError(f"batch_size {config.batch_size} must be a multiple of the {num_workers} workers")
        resources = {"CPU": workers.num_cpus} | ({"GPU": 1.0} if use_gpu else {})
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "online_encoder": None if online is None else online.model_dump(mode="json"),
                "out": job.run.url,
                "lease": job.run.lease,
            },
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources),
            run_config=RunConfig(name="train", storage_path=str(scratch)),
        )
        job.lines.message(f"training on {num_workers} workers; pipeline status {job.run.url} shows how far it is")
        result = trainer.fit()
    except TrainingFailedError as error:
        own = _own_error(error)
        if own is not None:
            raise own from error
        raise RayTrainError(f"a training worker failed: {_cause(error)}; the last checkpoint is good") from error
    finally:
        leave()
    return dict(result.return_value or {})  # of the first worker


def _train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs; the process group exists. Returns the summary of `train`."""
    import ray.train

    from imagen_core.train import train

    keep_freed_memory()
    config, online = TrainConfig.model_validate(settings["config"]), settings["online_encoder"]
    encoder = None
    if online is not None:
        encoder = online_encoder(
            TypeAdapter(AnyEncoder).validate_python(online), next(iter(config.texts.values()), None)
        )
    context = ray.train.get_context()
    first, alone, why = context.get_world_rank() == 0, context.get_world_size() == 1, ""
    try:
        with working_folder(open_storage(settings["out"]), settings["lease"], sends=first, alone=alone) as working:

            def should_stop() -> bool:
                nonlocal why
                why = working.why_stop()
                return bool(why)

            with errors_at_url(working.path, settings["out"]):
                load, path = load_checkpoint_from, working.path
                summary = train(config, path, None, should_stop, encoder, load, check=working.check)
    except TrainingStopped as stopped:
        if not why:
            raise
        raise PreemptedError(f"{why}; {stopped}, and sent it: run the same command again to resume") from stopped
    return at_url(summary, working.path, settings["out"])


def _own_error(error: BaseException) -> BaseException | None:
    """What the trainer raised in a worker, as it would without Ray; None for everything else, such as a death."""
    failures = getattr(error, "worker_failures", {})
    raised = (getattr(failure, "_base_exc", failure) for failure in failures.values())
    return next((found for found in raised if isinstance(found, _OWN)), None)


def _cause(error: BaseException) -> str:
    """The worker's own message, without Ray's frames around it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
