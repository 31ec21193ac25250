"""Loads trained stages from local folders and from object stores."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from imagen_core.text_batch import each_encoder
from imagen_core.train import CheckpointError, LoadedDenoiser, LoraUseConfig, load_checkpoint
from imagen_core.train.averages.power import POWER
from imagen_core.train.checkpoints.load import SHARED
from imagen_core.train.checkpoints.rebuild import SNAPSHOTS
from pipeline.storage import LocalStorage
from pipeline.storage.open import open_storage

_STATE = "state.json"
_ONE_FILE = ".safetensors"
_SETTINGS = "settings"


def load_checkpoint_from(place: str, weights: str | None, lora: LoraUseConfig | None = None) -> LoadedDenoiser:
    """A trained stage from a checkpoint, a training's run folder (its newest checkpoint), a file of `export_model`, or
    a folder that `pipeline pull` made of one; a path or a URL.

    Args:
        lora: how an adapter is added to its base, which is read too; None: merged.
    Raises:
        CheckpointError: there is none, it is damaged, or has no such weights.
        TrainError: it is an adapter, and peft is not installed.
    """
    storage = open_storage(place)
    if isinstance(storage, LocalStorage):
        return load_checkpoint(Path(place.removeprefix("file://")), weights, lora, load_checkpoint_from)
    if place.endswith(_ONE_FILE):
        return _of_file(place, weights, lora)
    names = list(storage.walk())
    folder = "" if _STATE in names else _newest(names)
    if folder is None and SHARED in names:
        return _of_file(f"{place.rstrip('/')}/{SHARED}", weights, lora)
    if folder is None:
        raise CheckpointError(
            f"{place}: has no checkpoint; give the --out of a `pipeline run train`, or a step folder"
        )
    if weights is not None and weights.startswith(POWER):
        return _with_snapshots(place.rstrip("/"), folder, weights, lora)
    local = storage.new_folder()
    try:
        for name in names:
            if name.startswith(folder) and "optimizer" not in name:
                storage.copy(name).replace(local / Path(name).name)
        return _loaded(local, f"{place.rstrip('/')}/{folder}".rstrip("/"), weights, lora)
    finally:
        shutil.rmtree(local)


def _with_snapshots(root: str, folder: str, weights: str, lora: LoraUseConfig | None) -> LoadedDenoiser:
    """A checkpoint whose average may have to be rebuilt: it and the snapshots are copied as they lie in the run.

    Args:
        root: the run, or the checkpoint's folder, which is two levels below the run.
        folder: the checkpoint in the run; empty if it is `root`.
    """
    if not folder:
        root, kind, step = root.rsplit("/", 2)
        folder = f"{kind}/{step}/"
    storage = open_storage(root)
    local = storage.new_folder()
    try:
        for name in storage.walk():
            needed = PurePosixPath(name).name.startswith((POWER, _STATE))
            if needed and name.startswith((folder, f"{SNAPSHOTS}/step-")):
                target = local / name
                target.parent.mkdir(parents=True, exist_ok=True)
                storage.copy(name).replace(target)
        try:
            loaded = load_checkpoint(local / folder, weights, lora, load_checkpoint_from)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(local), root)) from error
        return replace(loaded, place=f"{root}/{folder}".rstrip("/"))
    finally:
        shutil.rmtree(local)


def origin(loaded: LoadedDenoiser) -> dict[str, object]:
    """All of a trained stage that decides what it generates or measures, for the record of a folder of results."""
    tokens = each_encoder(loaded.encoder)
    several = isinstance(loaded.encoder, list)
    encoders = {f"captions.{one['name']}" if several else "captions": one for one in tokens} | loaded.embed_encoders
    further = {"condition_images": dict(loaded.condition_images)} if loaded.condition_images else {}
    return {
        "step": loaded.step,
        "weights": loaded.weights,
        "sha256": loaded.sha256,
        _SETTINGS: {
            "denoiser": loaded.denoiser.config.model_dump(mode="json", exclude_defaults=True),
            "max_tokens": loaded.max_tokens,
            "encoders": {name: encoder["fingerprint"] for name, encoder in encoders.items()},
            **further,
        },
    }


def comparable_origin(now: object, recorded: object) -> object:
    """An origin without what a record of an earlier version does not have."""
    if isinstance(now, Mapping) and isinstance(recorded, Mapping) and _SETTINGS not in recorded:
        return {name: value for name, value in now.items() if name != _SETTINGS}
    return now


def _loaded(local: Path, place: str, weights: str | None, lora: LoraUseConfig | None) -> LoadedDenoiser:
    """A checkpoint from its local copy; errors name its place."""
    try:
        return replace(load_checkpoint(local, weights, lora, load_checkpoint_from), place=place)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(local), place)) from error


def _of_file(place: str, weights: str | None, lora: LoraUseConfig | None) -> LoadedDenoiser:
    folder, name = place.rsplit("/", 1)
    storage = open_storage(folder)
    if storage.size(name) is None:
        raise CheckpointError(f"{place}: there is no such file")
    local = storage.copy(name)
    try:
        return _loaded(local, place, weights, lora)
    finally:
        storage.release(local)


def _newest(names: list[str]) -> str | None:
    folders = [name.removesuffix(_STATE) for name in names if name.startswith("checkpoints/step-") and _STATE in name]
    return max(folders, key=lambda folder: (len(folder), folder), default=None)
