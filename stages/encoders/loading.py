"""Loads the weights of a model through transformers, and refuses a model with missing weights."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import MachineError
from pipeline.executors.base import usable_cpus
from stages.encoders.model_files import ModelFiles

if TYPE_CHECKING:
    import torch

_UNUSED = ("pooler.",)  # never used here, and absent from many checkpoints


class Placed(Protocol):
    """What `place` reads of a configuration."""

    @property
    def num_gpus(self) -> float | None: ...

    @property
    def compute_dtype(self) -> str: ...


def place(config: Placed, num_threads: int) -> "tuple[torch.device, torch.dtype]":
    """The device the model runs on, the GPU if there is one, and its dtype; silences transformers."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    use_gpu = config.num_gpus != 0 and torch.cuda.is_available()
    if not use_gpu:
        torch.set_num_threads(num_threads)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.compute_dtype]
    return torch.device("cuda" if use_gpu else "cpu"), dtype


def threads_of_process() -> int:
    """Threads for a model that shares this process with others: torch's own number, which respects OMP_NUM_THREADS,
    but not more than the CPUs that may be used.
    """
    import torch

    return min(torch.get_num_threads(), usable_cpus())


def load_weights(model_class: Any, files: ModelFiles, dtype: Any, device: Any, **settings: object) -> Any:
    """`model_class.from_pretrained`, ready for inference; `settings` take the place of those in config.json.

    With accelerate installed the weights are read straight to a device that is not the CPU (`device_map`); without it
    they are all in main memory first.

    Raises:
        MachineError: weights are missing; transformers would continue with random numbers in their place.
    """
    model, report = model_class.from_pretrained(
        files.model,
        revision=files.revision or "main",
        dtype=dtype,
        output_loading_info=True,
        weights_only=True,  # only the tensors of a pickled checkpoint
        trust_remote_code=False,
        **_straight_to(device),
        **settings,
    )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(_UNUSED))
    if missing:
        raise MachineError(
            f"encoders.model: {files.model} lacks {len(missing)} weights of a {type(model).__name__} "
            f"({', '.join(missing[:3])} ...); give a folder with the complete encoder"
        )
    return model.to(device).eval().requires_grad_(False)


def _straight_to(device: "torch.device") -> dict[str, object]:
    """The option of transformers that loads weights to a device; it needs accelerate."""
    if device.type == "cpu" or find_spec("accelerate") is None:
        return {}
    return {"device_map": {"": device}}
