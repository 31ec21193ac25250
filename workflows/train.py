"""train: store -> one stage of a cascade."""

from collections.abc import Mapping

from pydantic import model_validator

from imagen_core.train import TrainConfig
from pipeline.config import Config
from pipeline.job import Job, JobWorkflow
from pipeline.resources import Resources
from pipeline.storage.run_folder import RunFolder
from stages.encoders.registry import AnyEncoder
from stages.training.config import WorkersConfig
from stages.training.dry_run import dry_run_summary
from stages.training.run import run_training


class TrainWorkflowConfig(Config, TrainConfig):
    """Everything of a training run: the library's settings, and how Ray Train launches it."""

    workers: WorkersConfig = WorkersConfig()
    """Processes of `--executor ray`."""
    online_encoder: AnyEncoder | None = None
    """Encode captions with it in the training loop, instead of reading `text` from the store: slower, and done
    again in each epoch; for comparison. It must have the name of `text`."""

    @model_validator(mode="after")
    def _check_online_encoder(self) -> "TrainWorkflowConfig":
        if self.online_encoder is not None and isinstance(self.text, tuple):
            raise ValueError(
                f"online_encoder: encodes the captions for one encoder, but text is {list(self.text)}; read several "
                "from the store, and leave online_encoder out"
            )
        return self

    def training(self) -> TrainConfig:
        """The library's part."""
        return TrainConfig(**{name: getattr(self, name) for name in TrainConfig.model_fields})


class Train(JobWorkflow):
    """Trains any stage of a cascade from a store."""

    name = "train"
    summary = "train one stage of a text-to-image cascade from a store"
    config_class = TrainWorkflowConfig
    config: TrainWorkflowConfig

    def work(self, job: Job) -> Mapping[str, object]:
        return run_training(self.config.training(), self.config.workers, job, self.config.online_encoder)

    def resources(self) -> Resources:
        workers = self.config.workers
        return Resources(num_cpus=8.0, num_gpus=0.0 if workers.use_gpu is False else workers.num_workers or 1.0)

    def dry_run(self) -> Mapping[str, object]:
        return dry_run_summary(self.config.training(), online=self.config.online_encoder is not None)

    def steps(self) -> tuple[int, int]:
        return self.config.num_steps, self.config.checkpoints.every_steps

    def next_steps(self, run: RunFolder) -> list[tuple[str, str]]:
        return [("checkpoints", f"{run.url}/checkpoints"), ("metrics", f"{run.url}/metrics.jsonl")]
