"""Captions by an image-text model of transformers, in workers of our own."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from pipeline.errors import ConfigError, MachineError
from pipeline.executors.base import usable_cpus
from pipeline.fingerprint import digest
from pipeline.resources import Resources
from pipeline.storage.files import file_digest
from stages.captioners.base import Captioner, ModelCaptionerConfig
from stages.captioners.budget import Used
from stages.encoders.identity import acting_settings
from stages.encoders.model_files import ModelFiles, check_headers, find_model

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json")
_GENERATION = "generation_config.json"


class TransformersCaptionerConfig(ModelCaptionerConfig):
    """An `AutoModelForImageTextToText` with a chat template."""

    machine_fields = ModelCaptionerConfig.machine_fields | {
        "model",
        "revision",
        "batch_size",
        "num_gpus",
        "num_cpus",
        "workers",
        "resources",
        "cpu_threads",
    }

    kind: Literal["transformers"] = "transformers"
    model: str = Field(min_length=1)
    """Hub id, or local folder."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of weights and activations."""
    batch_size: int = Field(default=8, ge=1)
    """Images in one batch of the model; halved where they do not fit into memory. With a temperature above 0 each
    image is a batch of its own."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs of one worker, also a fraction. null: one if there are any; 0: run on the CPU."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs reserved for a GPU worker."""
    workers: int | None = Field(default=None, ge=1)
    """Workers that hold the model; null: one for each GPU, or one."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Ray resources of the cluster that a worker requests in addition to CPU and GPU, as
    `{"accelerator_type:H100": 0.001}`. Ignored without --address."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads of a worker that runs on the CPU; null: the number of CPUs divided by the number of workers."""

    def files(self) -> ModelFiles:
        """The model's files.

        Raises:
            ConfigError: it is no single model.
            MachineError: it cannot be found, or is damaged.
        """
        try:
            files = find_model(self.model, self.revision)
            check_headers(files)
        except (ConfigError, MachineError) as error:
            raise self.named(error) from error
        return files

    def named(self, error: ConfigError | MachineError) -> ConfigError | MachineError:
        """An error about the model of an encoder, as one about this model."""
        return type(error)(str(error).replace("encoders.model", f"captioners.{self.name}.model"))

    def made_by(self) -> dict[str, Any]:
        files = self.files()
        processor = [name for name in _PROCESSOR_FILES if (files.folder / name).is_file()]
        generation = files.folder / _GENERATION
        return {
            **super().made_by(),
            **files.identity,
            "tokenizer_sha256": files.tokenizer_sha256,
            "processor_sha256": digest({name: file_digest(files.folder / name) for name in processor}),
            "generation_sha256": file_digest(generation) if generation.is_file() else None,
            "model_config": acting_settings(files.config),
        }

    def pinned(self) -> Self:
        if Path(self.model).is_dir():
            return self.model_copy(update={"model": str(Path(self.model).absolute())})
        return self.model_copy(update={"revision": self.files().revision})

    def start(self, usage: Callable[[], Used]) -> Captioner:
        from stages.captioners.generate import GeneratingCaptioner

        return GeneratingCaptioner(self)

    @property
    def is_repeatable(self) -> bool:
        return self.temperature == 0

    def worker_count(self) -> int:
        return self.workers or 0

    def threads(self) -> int:
        """CPU threads of one worker."""
        return self.cpu_threads or max(1, usable_cpus() // (self.workers or 1))

    def occupies(self) -> Resources:
        return Resources(self.num_cpus, self.num_gpus, self.resources)

    def modules(self) -> tuple[str, ...]:
        return ("torch", "transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto")
