"""How many GPUs the models of a run can use at once."""

from collections.abc import Iterable

from stages.arrays.base import ArrayStageConfig
from stages.captioners.base import ModelCaptionerConfig
from stages.encoders.base import FrozenModelConfig
from stages.encoders.tiny import TINY_MODEL


def gpus_of_models(models: Iterable[object]) -> float:
    """GPUs of the model that uses most of them: with its workers, as far as their number is set.

    Args:
        models: configurations of encoders, captioners and stages; others count as none.
    """
    return max((_gpus(model) for model in models), default=0.0)


def _gpus(model: object) -> float:
    if isinstance(model, FrozenModelConfig):
        none = model.model == TINY_MODEL and model.num_gpus is None
        return 0.0 if none else _with_workers(model.num_gpus, model.workers)
    if isinstance(model, ModelCaptionerConfig):
        return _with_workers(model.occupies().num_gpus, model.worker_count())
    if isinstance(model, ArrayStageConfig):
        return _with_workers(model.resources().num_gpus, model.workers())
    return 0.0


def _with_workers(num_gpus: float | None, workers: int | None) -> float:
    return (1.0 if num_gpus is None else num_gpus) * (workers or 1)
