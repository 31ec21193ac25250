"""The weights of another training that a new one starts with."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imagen_core.train.checkpoints.load import LoadCheckpoint
from imagen_core.train.config import TrainConfig
from imagen_core.train.errors import CheckpointError, TrainError
from imagen_core.train.parallel.world import like, local, unsharded


@dataclass(frozen=True, slots=True)
class Start:
    """What was taken from a checkpoint.

    Attributes:
        step, weights: of the checkpoint: how far it was, and which of its weights were taken.
        loaded: number of the model's tensors that were.
        grown: names of those that are larger than the checkpoint's.
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
    grown: tuple[str, ...] = ()


@torch.no_grad()
def initialize_from(model: nn.Module, config: TrainConfig, load: LoadCheckpoint) -> Start:
    """Copies weights of equal name and shape from `init_from.path`, which `load` reads; all processes must call it.

    With mismatch=grow, smaller tensors become a part of the model's, as `_grown` says.

    Raises:
        TrainError: there is no such checkpoint, or it is damaged; with mismatch=error a tensor of the model or
            of the checkpoint has no counterpart; with skip or grow all have none.
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
    grown = {
        name
        for name in parameters.keys() & source.keys() - fits
        if settings.mismatch == "grow" and _fits_into(source[name], parameters[name])
    }
    left, unused = sorted(parameters.keys() - fits - grown), sorted(source.keys() - parameters.keys())
    if not fits | grown or (settings.mismatch == "error" and (left or unused)):
        shapes = [f"{name}: {_shape(parameters, name)} here, {_shape(source, name)} there" for name in left + unused]
        remedy = (
            "check the path"
            if not fits | grown
            else "use init_from.mismatch=skip to leave them random, grow to take smaller ones too, or the same model"
        )
        raise TrainError(
            f"init_from.path {settings.path}: {len(shapes)} tensors do not fit ({'; '.join(shapes[:5])}); {remedy}"
        )
    for name in sorted(fits):
        local(parameters[name]).copy_(local(like(source[name], parameters[name])))
    for name in sorted(grown):
        owner = model.get_submodule(name.rpartition(".")[0])
        output_axis = int(isinstance(owner, nn.ConvTranspose2d))
        values = _grown(source[name], unsharded(parameters[name]), output_axis)
        local(parameters[name]).copy_(local(like(values, parameters[name])))
    return Start(
        settings.path,
        loaded.step,
        loaded.weights,
        len(fits) + len(grown),
        tuple(left),
        tuple(unused),
        loaded.place,
        loaded.sha256,
        tuple(sorted(grown)),
    )


def _fits_into(smaller: Tensor, larger: Tensor) -> bool:
    """Whether no axis is longer, and the sides of kernels differ by an even number, so that they have one middle."""
    pairs = list(zip(smaller.shape, larger.shape, strict=False))
    return (
        smaller.ndim == larger.ndim
        and all(before <= now for before, now in pairs)
        and all((now - before) % 2 == 0 for before, now in pairs[2:])
    )


def _grown(smaller: Tensor, fresh: Tensor, output_axis: int) -> Tensor:
    """The tensor of a larger model that computes what the smaller one did, and something new besides.

    The first outputs read the first inputs through the smaller tensor, kernels through its middle, and nothing else:
    zeros. New outputs, and new entries of vectors and tables, are as they were initialised.
    """
    values = fresh.to(smaller.device, smaller.dtype, copy=True)
    if smaller.ndim > 1:
        values.transpose(0, output_axis)[: smaller.shape[output_axis]] = 0
    block = [slice(0, size) for size in smaller.shape[:2]]
    for before, now in zip(smaller.shape[2:], fresh.shape[2:], strict=True):
        block.append(slice((now - before) // 2, (now - before) // 2 + before))
    values[tuple(block)] = smaller
    return values


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"
