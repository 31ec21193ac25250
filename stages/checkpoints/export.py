"""`pipeline export`: a trained model and its configuration as one file."""

from pathlib import Path

from imagen_core.train import CheckpointError
from imagen_core.train.checkpoints.single_file import write_model
from pipeline.commands import CommandResult
from pipeline.errors import EXIT_OK, ConfigError
from pipeline.storage.files import TEMPORARY_MARK, commit_file, file_digest, make_folder, remove_if_present
from pipeline.units import human_bytes
from stages.checkpoints.imported import check_above
from stages.checkpoints.load import _ONE_FILE, load_checkpoint_from


def export_model(place: str, *, out: str, weights: str | None = None) -> CommandResult:
    """Writes the weights of a training, or one of their averages, with the model's configuration as one file.

    Raises:
        ConfigError: there is no such checkpoint, or `out` is not a new .safetensors file. A file of the same export
            is no error: a killed export may be started again, whatever it had done.
    """
    target = Path(out)
    if target.suffix != _ONE_FILE or target.is_dir():
        raise ConfigError(f"--out {out}: must end in {_ONE_FILE}; give a new file")
    check_above(target, out)
    try:
        model = load_checkpoint_from(place, weights)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    make_folder(target.parent)
    temporary = target.with_name(f"{TEMPORARY_MARK}{target.name}")  # always the same: no kill leaves it
    try:
        write_model(temporary, model)
        if target.exists() and file_digest(target) != file_digest(temporary):
            raise ConfigError(f"--out {out}: exists, and is another model or file; give a new file")
        commit_file(temporary, target)
    finally:
        remove_if_present(temporary)
    size = target.stat().st_size
    result = {"file": str(target), "bytes": size, "step": model.step, "weights": model.weights}
    lines = [f"{model.weights} of step {model.step} -> {target} ({human_bytes(size)})"]
    lines.append(f"sample: pipeline run sample 'stages=[{{checkpoint: {target}}}]' 'prompts=[...]'")
    return result, lines, EXIT_OK
