"""The weights of another training that a new one starts with."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imagen_core.train.checkpoints.checkpoint import LoadCheckpoint
from imagen_core.train.config import TrainConfig
from imagen_core.train.errors import CheckpointError, TrainError
from imagen_core.train.parallel.world import like, local


@dataclass(frozen=True, slots=True)
class Start:
    """What was taken from a checkpoint.

    Attributes:
        step, weights: of the checkpoint: how far it was, and which of its weights were taken.
        loaded: number of the model's tensors that were.
        left_random: names of the model's tensors that the checkpoint does not have, or has in another shape.
        not_used: names of the checkpoint's tensors that the model does not have.
        checkpoint: its own folder or file, where `source` may be a run folder.
        sha256: of these weights.
    """

    source: str
    step: int
    weights: str
    loaded: int
    left_random: tuple[str, ...]
    not_used: tuple[str, ...]
    checkpoint: str
    sha256: str


@torch.no_grad()
def initialize_from(model: nn.Module, config: TrainConfig, load: LoadCheckpoint) -> Start:
    """Copies weights of equal name and shape from `init_from.path`, which `load` reads; all processes must call it.

    Raises:
        TrainError: there is no such checkpoint, or it is damaged; with mismatch=error a tensor of the model or
            of the checkpoint has no counterpart; with skip none has.
    """
    settings = config.init_from
    assert settings is not None
    try:
        loaded = load(settings.path, settings.weights)
    except CheckpointError as error:
        raise TrainError(f"init_from.path: {error}") from error
    source = loaded.denoiser.state_dict()
    parameters = dict(model.named_parameters())
    fits = {name for name, p in parameters.items() if name in source and source[name].shape == p.shape}
    left, unused = sorted(parameters.keys() - fits), sorted(source.keys() - parameters.keys())
    if not fits or (settings.mismatch == "error" and (left or unused)):
        shapes = [f"{name}: {_shape(parameters, name)} here, {_shape(source, name)} there" for name in left + unused]
        remedy = (
            "check the path" if not fits else "use init_from.mismatch=skip to leave them random, or the same model"
        )
        raise TrainError(
            f"init_from.path {settings.path}: {len(shapes)} tensors do not fit ({'; '.join(shapes[:5])}); {remedy}"
        )
    for name in sorted(fits):
        local(parameters[name]).copy_(local(like(source[name], parameters[name])))
    return Start(
        settings.path, loaded.step, loaded.weights, len(fits), tuple(left), tuple(unused), loaded.place, loaded.sha256
    )


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"
