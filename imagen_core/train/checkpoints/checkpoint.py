"""Checkpoints: a folder of safetensors and one JSON, written completely or not at all; never pickled.

    step-00001000/  state.json  model.safetensors  ema-0.9999.safetensors  optimizer.safetensors
                    noise_levels.safetensors, where the noise levels depend on the losses
                    projector.safetensors, with alignment
                    power-0.05.safetensors, power-0.1.safetensors ..., with ema.profiles

Tensors are unsharded and named by parameter, so a checkpoint of any number of processes, sharded or not, loads in any
other. state.json has each file's SHA-256, and ends with its own; checkpoints of earlier versions lack the latter.
Where an adapter is trained, the tensors are the adapter's alone, and state.json names the base.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import safetensors
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from imagen_core.differences import changed_fields
from imagen_core.diffusion import AnyDenoiserConfig, DenoiserConfig, PriorConfig
from imagen_core.files import file_digest, fsync_path, make_folder, share
from imagen_core.sealed import DamagedFileError, read_sealed, write_sealed
from imagen_core.store import comparable_records, record_probe_differences
from imagen_core.text_batch import each_encoder
from imagen_core.train.checkpoints.record import StateRecord, wrong_fields
from imagen_core.train.errors import CheckpointError, CheckpointMismatchError
from imagen_core.train.lora.resume import refuse_other_adapter

_FORMAT = 1
FOLDER = re.compile(r"step-(\d{8,})")
STATE = "state.json"
"""Written last into a checkpoint's folder, and removed first: a folder without it is no checkpoint."""
_DENOISER: TypeAdapter[DenoiserConfig | PriorConfig] = TypeAdapter(AnyDenoiserConfig)
_MAY_CHANGE = ("unet.activation_checkpointing:", "unet.checkpointed_parts:")  # memory and time, not results


def write_checkpoint(
    folder: Path,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `folder/step-STEP` from CPU tensors by file and name; atomic and durable.

    Args:
        check: called before the checkpoint appears; what it raises leaves the folder without it.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-step-{step:08d}"
    make_folder(folder)
    for left in folder.glob(f"{temporary.name}*"):
        shutil.rmtree(left)
    temporary.mkdir()
    entries = {}
    for name, tensors in files.items():
        path = temporary / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"})
        share(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        fsync_path(path)
    write_sealed(temporary / STATE, {"format": _FORMAT, "step": step, "files": entries, **state})
    check()
    if final.exists():  # moved away as a whole: a half-removed one would look complete
        os.replace(final, folder / f".tmp-step-{step:08d}-before")
    os.replace(temporary, final)
    fsync_path(folder)
    shutil.rmtree(folder / f".tmp-step-{step:08d}-before", ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if FOLDER.fullmatch(p.name) and (p / STATE).exists()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    try:
        return _state(path)
    except DamagedFileError as error:
        raise CheckpointError(f"{error}; {remedy(path)}") from error


def _state(path: Path) -> dict[str, Any]:
    """Raises DamagedFileError where the file is damaged, and CheckpointError where it is of a newer format."""
    try:
        state = read_sealed(path / STATE)
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path / STATE}: is missing") from error
    if isinstance(state.get("format"), int) and state["format"] > _FORMAT:
        raise CheckpointError(
            f"{path}: has format {state['format']}, this version reads {_FORMAT}; install a newer one"
        )
    if wrong := wrong_fields(StateRecord, state):
        raise DamagedFileError(f"{path / STATE}: {'; '.join(wrong[:3])}")
    named = FOLDER.fullmatch(path.name)
    if named and int(named[1]) != state["step"]:
        raise DamagedFileError(f"{path / STATE}: is of step {state['step']}, and so of another checkpoint")
    return state


def remedy(path: Path) -> str:
    """What to do about a damaged checkpoint: names the newest one before it that is intact."""
    named = FOLDER.fullmatch(path.name)
    if named is None:
        return "restore the file, or take another checkpoint"
    before = [p for p in checkpoints(path.parent) if _step(p) < int(named[1])]
    intact = next((p for p in reversed(before) if _is_intact(p)), None)
    if intact is None:
        return "no checkpoint before it is intact; restore the file, or start again in another --out"
    return f"{intact} is intact: remove {path} to resume from it, or give it as the checkpoint"


def _is_intact(path: Path) -> bool:
    """Whether every byte of a checkpoint is as it was written."""
    try:
        for name, entry in _state(path)["files"].items():
            _check_file(path / name, entry)
    except (DamagedFileError, CheckpointError):
        return False
    return True


def _check_file(file: Path, entry: Mapping[str, Any]) -> None:
    """Raises DamagedFileError unless the file is the one of its entry in state.json."""
    try:
        digest = file_digest(file)
    except FileNotFoundError as error:
        raise DamagedFileError(f"{file}: is missing") from error
    except OSError as error:
        raise DamagedFileError(f"{file}: cannot be read ({error})") from error
    if digest != entry["sha256"]:
        raise DamagedFileError(f"{file}: its checksum is not the one of {STATE}")


def read_tensors(path: Path, state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors, after checking its checksum.

    Raises:
        CheckpointError: the file is missing or was changed.
    """
    file = path / f"{name}.safetensors"
    try:
        if file.name not in state["files"]:
            raise DamagedFileError(f"{file}: is missing, also in {STATE}")
        _check_file(file, state["files"][file.name])
        return load_file(file)
    except DamagedFileError as error:
        raise CheckpointError(f"{error}; {remedy(path)}") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file}: is not safetensors ({error}); {remedy(path)}") from error


def refuse_other(
    state: Mapping[str, Any],
    path: Path,
    *,
    denoiser: dict[str, Any],
    encoder: dict[str, Any] | list[dict[str, Any]] | None,
    embed_encoders: dict[str, dict[str, Any]],
    lora: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
) -> None:
    """Refuses to resume from a checkpoint of another model, adapter or base, other embeddings or features. An
    alignment may begin or end.

    Settings of the model that did not exist when the checkpoint was written count as their defaults; of encoders, what
    was not recorded then is not compared.

    Raises:
        CheckpointMismatchError: names each field with both values.
    """
    try:
        saved = _DENOISER.validate_python(state["denoiser"]).model_dump(mode="json")
    except ValidationError:
        saved = state["denoiser"]  # of another version: the error names the fields that differ
    same_store = "train on the store it started with, or start again in another --out"
    compared: list[tuple[str, Any, Any, str]] = [
        ("denoiser", saved, denoiser, "train it in another --out, or restore the model's settings")
    ]
    refuse_other_adapter(path, state.get("lora"), lora)
    embeds = state.get("embed_encoders", {})
    encoders = [*zip_longest(each_encoder(state["encoder"]), each_encoder(encoder))] or [(None, None)]
    encoders += [(embeds.get(name), embed_encoders.get(name)) for name in sorted({*embeds, *embed_encoders})]
    compared += [("encoder", *comparable_records(*pair), same_store) for pair in encoders]
    if teacher is not None and state.get("teacher") is not None:
        compared.append(("image encoder of its alignment", state["teacher"], teacher, same_store))
    for what, theirs, mine, remedy in compared:
        changes = [change for change in changed_fields(theirs, mine) if not change.startswith(_MAY_CHANGE)]
        if changes:
            raise CheckpointMismatchError(
                f"{path}: was trained with another {what}: {'; '.join(changes[:5])}; {remedy}"
            )
    for theirs, mine in encoders:
        if changes := record_probe_differences(theirs, mine):
            raise CheckpointMismatchError(
                f"{path}: was trained with an encoder that gave other numbers: {'; '.join(changes[:5])}; {same_store}"
            )


def check_names(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless both have the same names and shapes."""
    for name in sorted({*wanted, *found}):
        have = [tuple(side[name].shape) if name in side else None for side in (wanted, found)]
        if have[0] != have[1]:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {have[1]}, the model has {have[0]}; {remedy(path)}"
            )
