"""Loads trained stages from local folders and from object stores."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from imagen_core.train import CheckpointError, LoadedDenoiser, load_checkpoint
from imagen_core.train.checkpoints.checkpoint import SHARED
from pipeline.storage import LocalStorage
from pipeline.storage.open import open_storage

_STATE = "state.json"
_ONE_FILE = ".safetensors"
_SETTINGS = "settings"


def load_checkpoint_from(place: str, weights: str | None) -> LoadedDenoiser:
    """A trained stage from a checkpoint, a training's run folder (its newest checkpoint), a file of `export_model`, or
    a folder that `pipeline pull` made of one; a path or a URL.

    Raises:
        CheckpointError: there is none, it is damaged, or has no such weights.
    """
    storage = open_storage(place)
    if isinstance(storage, LocalStorage):
        return load_checkpoint(Path(place.removeprefix("file://")), weights=weights)
    if place.endswith(_ONE_FILE):
        return _of_file(place, weights)
    names = list(storage.walk())
    folder = "" if _STATE in names else _newest(names)
    if folder is None and SHARED in names:
        return _of_file(f"{place.rstrip('/')}/{SHARED}", weights)
    if folder is None:
        raise CheckpointError(
            f"{place}: has no checkpoint; give the --out of a `pipeline run train`, or a step folder"
        )
    local = storage.new_folder()
    try:
        for name in names:
            if name.startswith(folder) and "optimizer" not in name:
                storage.copy(name).replace(local / Path(name).name)
        return _loaded(local, f"{place.rstrip('/')}/{folder}".rstrip("/"), weights)
    finally:
        shutil.rmtree(local)


def origin(loaded: LoadedDenoiser) -> dict[str, object]:
    """All of a trained stage that decides what it generates or measures, for the record of a folder of results."""
    encoders = {"captions": loaded.encoder, **loaded.embed_encoders}
    return {
        "step": loaded.step,
        "weights": loaded.weights,
        "sha256": loaded.sha256,
        _SETTINGS: {
            "denoiser": loaded.denoiser.config.model_dump(mode="json", exclude_defaults=True),
            "max_tokens": loaded.max_tokens,
            "encoders": {name: encoder["fingerprint"] for name, encoder in encoders.items() if encoder is not None},
        },
    }


def comparable_origin(now: object, recorded: object) -> object:
    """An origin without what a record of an earlier version does not have."""
    if isinstance(now, Mapping) and isinstance(recorded, Mapping) and _SETTINGS not in recorded:
        return {name: value for name, value in now.items() if name != _SETTINGS}
    return now


def _loaded(local: Path, place: str, weights: str | None) -> LoadedDenoiser:
    """A checkpoint from its local copy; errors name its place."""
    try:
        return load_checkpoint(local, weights=weights)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(local), place)) from error


def _of_file(place: str, weights: str | None) -> LoadedDenoiser:
    folder, name = place.rsplit("/", 1)
    storage = open_storage(folder)
    if storage.size(name) is None:
        raise CheckpointError(f"{place}: there is no such file")
    local = storage.copy(name)
    try:
        return _loaded(local, place, weights)
    finally:
        storage.release(local)


def _newest(names: list[str]) -> str | None:
    folders = [name.removesuffix(_STATE) for name in names if name.startswith("checkpoints/step-") and _STATE in name]
    return max(folders, key=lambda folder: (len(folder), folder), default=None)
