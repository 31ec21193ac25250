"""Files of features: one array (n, d), in .npy or .safetensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from imagen_core.evaluation.checks import check_rows
from imagen_core.files import share, sort_metadata
from imagen_core.sealed import SEAL, UNSEALED, DamagedFileError, check_tensors, seal_tensors
from pipeline.errors import ConfigError
from pipeline.storage.files import commit_file, temporary_name
from stages.evaluation.features.base import Extracted, Named
from stages.places import local_file
from stages.sources.arrays.npy import map_file
from stages.sources.files import Damaged

_TENSOR, _LABEL, _COUNTS, _MODEL = "features", "label", "counts", "model"


@dataclass(frozen=True, slots=True)
class FeatureFile:
    """One array with a row per image."""

    rows: np.ndarray
    label: str | None
    """The model, if the file says it."""
    model: Mapping[str, object] | None = None
    """The fingerprint of the model, if the file has it."""


def write_features(path: Path, extracted: Extracted, model: Named) -> None:
    """Writes extracted features as .safetensors; the file appears in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    arrays = {name: np.ascontiguousarray(rows) for name, rows in extracted.arrays.items()}
    counts = json.dumps(dict(extracted.counts), sort_keys=True)
    fingerprint = json.dumps(dict(model.fingerprint()), sort_keys=True)
    save_file(arrays, temporary, metadata={_LABEL: model.label, _MODEL: fingerprint, _COUNTS: counts, SEAL: UNSEALED})
    sort_metadata(temporary)
    seal_tensors(temporary)
    share(temporary)
    commit_file(temporary, path)


def read_extracted(path: Path) -> Extracted:
    """Reads a file of `write_features`.

    Raises:
        DamagedFileError: it cannot be read, or was changed.
    """
    try:
        with safe_open(path, framework="np") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
            counts = json.loads(opened.metadata()[_COUNTS])
        check_tensors(path)
    except DamagedFileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedFileError(f"{path}: cannot be read ({error})") from error
    return Extracted(arrays, counts)


def read_features(path: str | Path, field: str) -> FeatureFile:
    """Reads a file of features; an .npy is mapped into memory.

    Args:
        field: how the user names the file, for messages.
    Raises:
        ConfigError: it cannot be read, or contains something else.
    """
    file = Path(path)
    try:
        file = local_file(str(path))
        if file.suffix == ".npy":
            found = FeatureFile(map_file(file), None)
        elif file.suffix == ".safetensors":
            found = _read_safetensors(file, field)
        else:
            raise ConfigError(f"{field}: {path}: suffix {file.suffix!r} is not supported; give .npy or .safetensors")
    except (OSError, ValueError, Damaged, SafetensorError) as error:
        raise ConfigError(f"{field}: {path} cannot be read ({error}); give an .npy or .safetensors file") from error
    if found.rows.ndim != 2 or found.rows.dtype.kind != "f":
        raise ConfigError(
            f"{field}: {path} holds {found.rows.dtype} {found.rows.shape}; give floats of shape (images, dim)"
        )
    try:
        check_rows(f"{field}: {path}", found.rows)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return found


def _read_safetensors(file: Path, field: str) -> FeatureFile:
    with safe_open(file, framework="np") as opened:
        check_tensors(file)
        names = list(opened.keys())
        name = _TENSOR if _TENSOR in names else names[0] if len(names) == 1 else None
        if name is None:
            raise ConfigError(f"{field}: {file} holds {', '.join(names)}; name the one to read {_TENSOR!r}")
        said = opened.metadata() or {}
        model = json.loads(said[_MODEL]) if _MODEL in said and SEAL in said else None
        return FeatureFile(opened.get_tensor(name), said.get(_LABEL), model)
