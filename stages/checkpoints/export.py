"""`pipeline export`: a trained model and its configuration as one file."""

from pathlib import Path

from imagen_core.train import CheckpointError
from imagen_core.train.checkpoints.single_file import write_model
from pipeline.commands import CommandResult
from pipeline.errors import EXIT_OK, ConfigError
from pipeline.storage.out_folder import check_place
from pipeline.units import human_bytes
from stages.checkpoints.load import _ONE_FILE, load_checkpoint_from


def export_model(place: str, *, out: str, weights: str | None = None) -> CommandResult:
    """Writes the weights of a training, or one of their averages, with the model's configuration as one file.

    Raises:
        ConfigError: there is no such checkpoint, or `out` is not a new .safetensors file.
    """
    target = Path(out)
    if target.suffix != _ONE_FILE or target.exists():
        wrong = "exists" if target.exists() else f"must end in {_ONE_FILE}"
        raise ConfigError(f"--out {out}: {wrong}; give a new file")
    check_place("--out", out)
    try:
        model = load_checkpoint_from(place, weights)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    write_model(target, model)
    size = target.stat().st_size
    result = {"file": str(target), "bytes": size, "step": model.step, "weights": model.weights}
    lines = [f"{model.weights} of step {model.step} -> {target} ({human_bytes(size)})"]
    lines.append(f"sample: pipeline run sample 'stages=[{{checkpoint: {target}}}]' 'prompts=[...]'")
    return result, lines, EXIT_OK
