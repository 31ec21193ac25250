"""`pipeline export`: a trained model and its configuration, or an adapter, as one file."""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from imagen_core.train import LoadedDenoiser, LoraUseConfig, TrainError
from imagen_core.train.checkpoints.single_file import write_model
from imagen_core.train.lora.file import write_adapter
from pipeline.commands import CommandResult
from pipeline.errors import EXIT_OK, ConfigError
from pipeline.storage import LocalStorage, Storage
from pipeline.storage.files import file_digest, unfinished_folder
from pipeline.units import human_bytes
from stages.checkpoints.imported import check_above
from stages.checkpoints.load import _ONE_FILE, load_checkpoint_from
from stages.places import split_place


def export_model(
    place: str, *, out: str, weights: str | None = None, adapter: bool = False, lora_base: str | None = None
) -> CommandResult:
    """Writes the weights of a training, or one of their averages, with the model's configuration as one file.

    Args:
        adapter: write the adapter of a training with `lora` alone; otherwise it is merged into its base.
        lora_base: where the base of an adapter is, if it was moved.
    Raises:
        ConfigError: there is no such checkpoint, or `out` is not a new .safetensors file. A file of the same export
            is no error: a killed export may be started again, whatever it had done.
    """
    if PurePosixPath(out).suffix != _ONE_FILE:
        raise ConfigError(f"--out {out}: must end in {_ONE_FILE}; give a new file")
    storage, name = split_place(out)
    _check_target(storage, name, out)
    use = LoraUseConfig(merge=not adapter, base=lora_base) if adapter or lora_base else None
    try:
        model = load_checkpoint_from(place, weights, use)
    except TrainError as error:
        raise ConfigError(str(error)) from error
    size = _publish(storage, name, out, lambda path: _write(path, model, adapter=adapter))
    result = {"file": out, "bytes": size, "step": model.step, "weights": model.weights}
    lines = [f"{model.weights} of step {model.step} -> {out} ({human_bytes(size)})"]
    if not adapter:
        lines.append(f"sample: pipeline run sample 'stages=[{{checkpoint: {out}}}]' 'prompts=[...]'")
    return result, lines, EXIT_OK


def _write(path: Path, model: LoadedDenoiser, *, adapter: bool) -> None:
    if adapter:
        write_adapter(path, model.denoiser, {"step": str(model.step), "weights": model.weights})
    else:
        write_model(path, model)


def _publish(storage: Storage, name: str, out: str, write: Callable[[Path], None]) -> int:
    """Has a file written and puts it in its place, which has no other file; returns its bytes.

    Raises:
        ConfigError: another file is there.
    """
    with unfinished_folder(storage.local / name) as folder:
        temporary = folder / name
        write(temporary)
        size = temporary.stat().st_size
        if (before := _digest(storage, name)) is None:
            storage.publish(temporary, name)
        elif before != file_digest(temporary):
            raise ConfigError(f"--out {out}: exists, and is another model or file; give a new file")
    return size


def _check_target(storage: Storage, name: str, out: str) -> None:
    """Finds what can be known before the model is read: whether the file can be written at all.

    Raises:
        ConfigError: a folder is there, or a file where a folder would have to be, or the folder may not be written.
        MachineError: the object store cannot be reached.
    """
    if not isinstance(storage, LocalStorage):
        storage.size(name)
        return
    target = storage.root / name
    if target.is_dir():
        raise ConfigError(f"--out {out}: is a folder; give a new file")
    check_above(target, out)
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: {above} may not be written by this user; give another place")


def _digest(storage: Storage, name: str) -> str | None:
    """SHA-256 of a file; None if there is none."""
    try:
        copy = storage.copy(name)
    except FileNotFoundError:
        return None
    try:
        return file_digest(copy) if copy.exists() else None
    finally:
        storage.release(copy)
