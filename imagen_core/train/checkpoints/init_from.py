"""The weights of another training that a new one starts with."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imagen_core.differences import changed_fields
from imagen_core.store import comparable
from imagen_core.text_batch import EncoderRecords, each_encoder
from imagen_core.train.checkpoints.load import LoadCheckpoint
from imagen_core.train.config import TrainConfig
from imagen_core.train.errors import CheckpointError, TrainError
from imagen_core.train.parallel.world import like, local, unsharded

_GIVEN = "given"  # the kind of embeddings that came with the data
_NOT_THE_RECIPE = frozenset(
    (
        *("model", "revision", "weights_sha256", "model_config", "compute_dtype", "max_tokens"),
        *("tokenizer", "tokenizer_sha256", "text_normalisation"),
    )
)
"""Fields of an encoder's fingerprint that name the model, its precision, and where captions are truncated."""


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
def initialize_from(
    model: nn.Module, config: TrainConfig, load: LoadCheckpoint, encoder: EncoderRecords = None
) -> Start:
    """Copies weights of equal name and shape from `init_from.path`, which `load` reads; all processes must call it.

    With mismatch=grow, smaller tensors become a part of the model's, as `_grown` says.

    Args:
        encoder: records of what encodes the captions of a training that begins; None: they are not compared.
    Raises:
        TrainError: there is no such checkpoint, or it is damaged; with mismatch=error a tensor of the model or
            of the checkpoint has no counterpart, or captions are encoded in another way; with skip or grow all tensors
            have none.
    """
    settings = config.init_from
    assert settings is not None
    try:
        loaded = load(settings.path, settings.weights)
    except CheckpointError as error:
        raise TrainError(f"init_from.path: {error}") from error
    if settings.mismatch == "error":
        _refuse_other_recipe(settings.path, loaded.encoder if encoder is not None else None, encoder)
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


def _refuse_other_recipe(path: str, recorded: EncoderRecords, now: EncoderRecords) -> None:
    """TrainError if captions become other rows than those that the checkpoint reads: cleaned, padded, or taken from
    other states. Which model they pass through may be written in several ways, so it is not compared."""
    for old, new in zip(each_encoder(recorded), each_encoder(now), strict=False):
        kinds = {old["fingerprint"].get("kind"), new["fingerprint"].get("kind")}
        if _GIVEN in kinds:  # nobody knows how
            continue
        sides = [
            {name: value for name, value in side.items() if name not in _NOT_THE_RECIPE}
            for side in comparable(old["fingerprint"], new["fingerprint"])
        ]
        if changes := changed_fields(*sides):
            raise TrainError(
                f"init_from.path {path}: captions of {new['name']!r} are encoded in another way than those it was "
                f"trained on: {'; '.join(changes)}; encode them in its way, or set init_from.mismatch=skip to train "
                "it on these"
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
