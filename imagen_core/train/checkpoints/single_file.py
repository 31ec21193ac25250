"""A trained model as one safetensors file that holds its configuration: to share, to sample, to train on."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file

from imagen_core.files import file_digest, share, sort_metadata
from imagen_core.train.errors import CheckpointError

_METADATA_KEY = "imagen"  # the entry of the file's metadata
_DIGEST_KEY = "sha256"  # another one: of the file with zeros in its place
_NO_DIGEST = "0" * 64
_FIELDS = ("denoiser", "encoder", "embed_encoders", "step", "weights", "max_tokens")


def write_model(path: Path, model: Any) -> None:
    """Writes a `LoadedDenoiser`: its weights, and in the file's metadata everything else sampling needs; atomic."""
    metadata = {field: getattr(model, field) for field in _FIELDS if field != "denoiser"}
    metadata["denoiser"] = model.denoiser.config.model_dump(mode="json")
    tensors = {name: value.contiguous() for name, value in model.denoiser.state_dict().items()}
    temporary = path.with_name(f".tmp-{path.name}")
    entries = {"format": "pt", _METADATA_KEY: json.dumps(metadata, sort_keys=True), _DIGEST_KEY: _NO_DIGEST}
    save_file(tensors, temporary, metadata=entries)
    sort_metadata(temporary)
    _write_digest(temporary)
    share(temporary)
    os.replace(temporary, path)


def read_model(path: Path) -> tuple[dict[str, Any], str]:
    """What `write_model` wrote of the model besides its weights, and the SHA-256 of the file.

    Raises:
        CheckpointError: it is not a safetensors file, one without a model's configuration, or it was changed.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
        metadata = json.loads(entries[_METADATA_KEY]) if _METADATA_KEY in entries else {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: is not safetensors ({error}); give a file of `pipeline export`") from error
    if missing := [field for field in _FIELDS if field not in metadata]:
        raise CheckpointError(
            f"{path}: its metadata lacks {', '.join(missing)}; give a file of `pipeline export`, or a run folder"
        )
    recorded = entries.get(_DIGEST_KEY)  # earlier versions wrote none
    if recorded is not None and _digest(path, recorded) != recorded:
        raise CheckpointError(
            f"{path}: its content is not that of its own checksum, so it was changed since it was written; restore it "
            "from a copy, or export the model again"
        )
    return {field: metadata[field] for field in _FIELDS}, file_digest(path)


def _write_digest(path: Path) -> None:
    """Puts the digest of a file into its header, where so many zeros are."""
    digest = _digest(path, _NO_DIGEST)
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        place = file.read(length).index(_entry(_NO_DIGEST))
        file.seek(8 + place)
        file.write(_entry(digest))


def _digest(path: Path, recorded: str) -> str:
    """SHA-256 of the file as it was before its digest was put in."""
    with path.open("rb") as file:
        start = file.read(8)
        header = file.read(struct.unpack("<Q", start)[0])
        digest = hashlib.sha256(start + header.replace(_entry(recorded), _entry(_NO_DIGEST), 1))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _entry(digest: str) -> bytes:
    return f'"{_DIGEST_KEY}":"{digest}"'.encode()
