"""A trained model from a checkpoint, a run folder or a file of one model, ready to sample."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from imagen_core.diffusion import AnyDenoiserConfig, Denoiser, DenoiserConfig, PriorConfig
from imagen_core.train.checkpoints.checkpoint import (
    FOLDER,
    STATE,
    check_names,
    checkpoints,
    read_state,
    remedy,
)
from imagen_core.train.checkpoints.rebuild import read_weights
from imagen_core.train.checkpoints.single_file import read_model
from imagen_core.train.errors import CheckpointError
from imagen_core.train.lora.adapter import adapter_layers, add_adapter, load_adapter, merge_adapter, saved_parameters
from imagen_core.train.lora.config import LoraUseConfig

SHARED = "model.safetensors"
"""The file of `write_model` in a folder without checkpoints. A checkpoint's own file of this name has no
configuration."""
_DENOISER: TypeAdapter[DenoiserConfig | PriorConfig] = TypeAdapter(AnyDenoiserConfig)


@dataclass(frozen=True, slots=True)
class LoadedDenoiser:
    """A trained stage, ready to sample.

    Attributes:
        encoder: name, dim, dtype and fingerprint of the embeddings it was trained on; a list of these, if it reads the
            tokens of several encoders; None without captions.
        embed_encoders: the same for `text_embed` and `image_embed`, where the model reads them.
        weights: which weights these are: model, ema-RATE or power-SIGMA_REL.
        sha256: of their file; of all files it was rebuilt from; with an adapter, of the base's and its own.
        max_tokens: captions were truncated to it in training.
        shapes: height and width of the images it was trained on, one for each aspect-ratio bucket; none where they are
            not known (checkpoints of earlier versions, imports) or it is a prior.
        place: the checkpoint's folder, or the file; a path or a URL.
        condition_images: channels of each further image that it reads, by name.
    """

    denoiser: Denoiser
    encoder: dict[str, Any] | list[dict[str, Any]] | None
    embed_encoders: dict[str, dict[str, Any]]
    step: int
    weights: str
    sha256: str
    max_tokens: int
    shapes: tuple[tuple[int, int], ...] = ()
    place: str = ""
    condition_images: Mapping[str, int] = field(default_factory=dict)

    @property
    def stage(self) -> DenoiserConfig:
        """The configuration of a model that generates images; CheckpointError for a prior."""
        if not isinstance(self.denoiser.config, DenoiserConfig):
            raise CheckpointError("it is a prior, which generates embeddings; give a model that generates images")
        return self.denoiser.config


LoadCheckpoint = Callable[[str, str | None], LoadedDenoiser]
"""(place of a checkpoint, which of its weights) -> the model."""


def load_local(place: str, weights: str | None) -> LoadedDenoiser:
    """`load_checkpoint` of a path."""
    return load_checkpoint(Path(place), weights)


def load_checkpoint(
    path: Path,
    weights: str | None = None,
    lora: LoraUseConfig | None = None,
    load_base: LoadCheckpoint = load_local,
) -> LoadedDenoiser:
    """A trained stage.

    Args:
        path: a checkpoint, a training's run folder (its newest checkpoint is loaded), a file of `write_model`, or a
            folder with such a file `model.safetensors`, as `pipeline pull` makes it.
        weights: "model", an average such as "ema-0.9999", or "power-SIGMA_REL", which is rebuilt from the training's
            snapshots if need be; None: the slowest average.
        lora: how the adapter is added to its base, where the checkpoint is one of an adapter; None: merged.
        load_base: reads that base; the default reads local paths only.
    Raises:
        CheckpointError: there is none, it is damaged, or has no such weights; or `lora` is given for a model without
            an adapter.
        TrainError: peft is needed, and not installed.
    """
    if path.is_file():
        if lora is not None:
            raise CheckpointError(f"{path}: has no adapter; leave lora out")
        return _load_file(path, weights)
    if not (path / STATE).exists():
        found = checkpoints(path / "checkpoints")
        if not found and (path / SHARED).is_file() and not FOLDER.fullmatch(path.name):
            return _load_file(path / SHARED, weights)
        if not found:
            raise CheckpointError(
                f"{path}: has no checkpoint; give the --out of a `pipeline run train`, or a step-... folder"
            )
        path = found[-1]
    state = read_state(path)
    chosen, tensors, sha256 = read_weights(path, state, weights)
    adapter, max_tokens = state.get("lora"), state["config"]["max_tokens"]
    if adapter is None:
        if lora is not None:
            raise CheckpointError(f"{path}: has no adapter; leave lora out")
        denoiser = _built(path / STATE, state["denoiser"], tensors)
    else:
        base = _load_base(path, adapter["base"], lora, load_base)
        denoiser = _with_adapter(path, base.denoiser, tensors, adapter, lora or LoraUseConfig())
        sha256 = hashlib.sha256(f"{base.sha256} {sha256}".encode()).hexdigest()
    encoders = state["encoder"], state.get("embed_encoders", {})
    shapes = _shapes(state.get("shapes"))
    place = os.path.abspath(path)
    further = state["config"].get("condition_images", {})
    return LoadedDenoiser(denoiser, *encoders, state["step"], chosen, sha256, max_tokens, shapes, place, further)


def _load_base(
    path: Path, record: Mapping[str, Any], lora: LoraUseConfig | None, load: LoadCheckpoint
) -> LoadedDenoiser:
    """The model that the adapter in `path` was trained on.

    Raises:
        CheckpointError: it is not where it was, or another model is there.
    """
    place = record["path"] if lora is None or lora.base is None else lora.base
    remedy = (
        f"give the place of the model of sha256 {record['sha256']} as lora.base (for `pipeline export`: --lora-base)"
    )
    try:
        base = load(place, record["weights"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: the base of its adapter cannot be loaded: {error}; {remedy}") from error
    if base.sha256 != record["sha256"]:
        raise CheckpointError(
            f"{path}: its adapter was trained on step {record['step']} of {record['path']}; {base.place} is another "
            f"model, of sha256 {base.sha256}; {remedy}"
        )
    return base


def _with_adapter(
    path: Path, denoiser: Denoiser, tensors: Mapping[str, Tensor], record: Mapping[str, Any], use: LoraUseConfig
) -> Denoiser:
    """The base with the adapter of these tensors, for sampling."""
    layers = adapter_layers(tensors)
    if unknown := sorted({*layers} - {name for name, _ in denoiser.named_modules()}):
        raise CheckpointError(f"{path}: its adapter has a layer {unknown[0]}, which its base has not; {remedy(path)}")
    add_adapter(denoiser, layers, rank=record["rank"], alpha=record["alpha"])
    check_names(path, saved_parameters(denoiser), tensors)
    load_adapter(denoiser, tensors, scale=use.scale)
    if use.merge:
        merge_adapter(denoiser)
    return denoiser.eval().requires_grad_(False)


def _load_file(path: Path, weights: str | None) -> LoadedDenoiser:
    metadata, sha256 = read_model(path)
    if weights not in (None, metadata["weights"]):
        raise CheckpointError(
            f"{path}: has no weights {weights!r}, but {metadata['weights']!r} alone; leave weights out"
        )
    denoiser = _built(path, metadata.pop("denoiser"), load_file(path))
    shapes = _shapes(metadata.pop("shapes", None))
    return LoadedDenoiser(denoiser, **metadata, sha256=sha256, shapes=shapes, place=os.path.abspath(path))


def _shapes(recorded: Sequence[Sequence[int]] | None) -> tuple[tuple[int, int], ...]:
    return tuple((height, width) for height, width in recorded or ())


def _built(path: Path, config: Any, tensors: Mapping[str, Tensor]) -> Denoiser:
    """A denoiser with these weights, for sampling; `path` is the file of its configuration."""
    try:
        settings = _DENOISER.validate_python(config)
    except ValidationError as error:
        raise CheckpointError(f"{path}: the model's configuration is not valid: {error}") from error
    with torch.device("meta"):
        denoiser = Denoiser(settings)
    check_names(path, denoiser.state_dict(), tensors)
    denoiser.load_state_dict(tensors, assign=True)
    return denoiser.eval().requires_grad_(False)
