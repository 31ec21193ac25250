"""A trained model as one safetensors file that holds its configuration: to share, to sample, to train on."""

import json
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file

from imagen_core.files import file_digest, share, sort_metadata
from imagen_core.sealed import SEAL, UNSEALED, DamagedFileError, check_tensors, seal_tensors
from imagen_core.train.checkpoints.record import ExportRecord, wrong_fields
from imagen_core.train.errors import CheckpointError

_METADATA_KEY = "imagen"  # the entry of the file's metadata
_FIELDS = ("denoiser", "encoder", "embed_encoders", "step", "weights", "max_tokens")
_SHAPES = "shapes"  # only where they are known
_CONDITION_IMAGES = "condition_images"  # only where it reads some


def write_model(path: Path, model: Any) -> None:
    """Writes a `LoadedDenoiser`: its weights, and in the file's metadata all else that sampling needs, and a digest.

    The same model gives the same bytes. Temporary names, fsync and renames are up to the caller.
    """
    metadata = {field: getattr(model, field) for field in _FIELDS if field != "denoiser"}
    metadata["denoiser"] = model.denoiser.config.model_dump(mode="json")
    if model.shapes:
        metadata[_SHAPES] = [list(shape) for shape in model.shapes]
    if model.condition_images:
        metadata[_CONDITION_IMAGES] = dict(model.condition_images)
    tensors = {name: value.contiguous() for name, value in model.denoiser.state_dict().items()}
    entries = {"format": "pt", _METADATA_KEY: json.dumps(metadata, sort_keys=True), SEAL: UNSEALED}
    save_file(tensors, path, metadata=entries)
    sort_metadata(path)
    seal_tensors(path)
    share(path)


def read_model(path: Path) -> tuple[dict[str, Any], str]:
    """What `write_model` wrote of the model besides its weights, and the SHA-256 of the file.

    Raises:
        CheckpointError: it is not a safetensors file, one without a model's configuration, or a damaged one.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
        metadata = json.loads(entries[_METADATA_KEY]) if _METADATA_KEY in entries else {}
        check_tensors(path)
    except DamagedFileError as error:
        raise CheckpointError(f"{error}; export the model again") from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not safetensors ({error}); give a file of `pipeline export`") from error
    if wrong := wrong_fields(ExportRecord, metadata):
        raise CheckpointError(
            f"{path}: its metadata do not fit: {'; '.join(wrong[:3])}; give a file of `pipeline export`, or a "
            "run folder"
        )
    known = [field for field in (*_FIELDS, _SHAPES, _CONDITION_IMAGES) if field in metadata]
    return {field: metadata[field] for field in known}, file_digest(path)
