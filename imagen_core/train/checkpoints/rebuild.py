"""The weights of a checkpoint by their name, of which a power-function average can be rebuilt from snapshots.

    RUN/snapshots/step-00001000/  state.json  power-0.05.safetensors  power-0.1.safetensors

A snapshot is laid out as a checkpoint, with the averages alone, and `checkpoints.keep` leaves it alone. Its values are
float16; a tensor whose values float16 does not hold to within 0.1 % is float32.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_core.train.averages.power import POWER, Profile, coefficients, exponent_of, power_name
from imagen_core.train.checkpoints.checkpoint import checkpoints, read_state, read_tensors
from imagen_core.train.errors import CheckpointError

SNAPSHOTS = "snapshots"
_TENSORS = ".safetensors"
_WELL_ROUNDED = 1e-3
_MOST_LEFT = 0.1
"""Largest part of a profile that may be missing in the combination that stands for it."""


def rounded(values: Tensor) -> Tensor:
    """Values as a snapshot keeps them: float16, or float32 where float16 does not hold them."""
    half = values.half()
    error = torch.linalg.vector_norm(half.float() - values.float())
    return half if bool(error <= _WELL_ROUNDED * torch.linalg.vector_norm(values.float())) else values.float()


def read_weights(path: Path, state: Mapping[str, Any], weights: str | None) -> tuple[str, dict[str, Tensor], str]:
    """Name, tensors and SHA-256 of a checkpoint's weights; the latter of every file that they come from.

    Args:
        path: folder of the checkpoint, or of a snapshot.
        weights: "model", "ema-RATE" or "power-SIGMA_REL"; None: the slowest average.
    Raises:
        CheckpointError: there are no such weights, and they cannot be rebuilt; or a file is damaged.
    """
    names = [name.removesuffix(_TENSORS) for name in state["files"] if name.startswith(("model", "ema-", POWER))]
    slowest = [
        max((name for name in names if name.startswith(kind)), key=lambda name: float(name.rpartition("-")[2]))
        for kind in ("ema-", POWER)
        if any(name.startswith(kind) for name in names)
    ]
    chosen = weights or (*slowest, "model")[0]
    sigma_rel = _sigma_rel(chosen) if chosen.startswith(POWER) else None
    if sigma_rel is not None:
        chosen = power_name(sigma_rel)
    if chosen in names:
        tensors = read_tensors(path, state, chosen)
        tensors = {name: v.float() if v.dtype == torch.float16 else v for name, v in tensors.items()}
        return chosen, tensors, state["files"][f"{chosen}{_TENSORS}"]["sha256"]
    if sigma_rel is None:
        raise CheckpointError(f"{path}: has no weights {chosen!r}; choose from {', '.join(sorted(names))}")
    return chosen, *_rebuilt(path, state, sigma_rel)


def _sigma_rel(weights: str) -> float:
    try:
        sigma_rel = float(weights.removeprefix(POWER))
        exponent_of(sigma_rel)
    except ValueError as error:
        raise CheckpointError(f"weights {weights!r}: {error}; give {POWER}SIGMA_REL such as {POWER}0.07") from error
    return sigma_rel


def _rebuilt(path: Path, state: Mapping[str, Any], sigma_rel: float) -> tuple[dict[str, Tensor], str]:
    """The tensors, float32, of the average of this length at the checkpoint's step; and their SHA-256."""
    snapshots = path.absolute().parent.parent / SNAPSHOTS
    kept, wanted = _kept(path, state, snapshots), power_name(sigma_rel)
    if not kept:
        raise CheckpointError(
            f"{path}: has no weights {wanted!r}, and there are no snapshots up to its step in {snapshots} to "
            "rebuild them from; train with ema.profiles"
        )
    profiles = [profile for profile, *_ in kept]
    found, left = coefficients(profiles, (state["ema_updates"], sigma_rel))
    if left > _MOST_LEFT:
        lengths = sorted({of for _, of in profiles})
        raise CheckpointError(
            f"{path}: weights {wanted!r} cannot be rebuilt from {len(kept)} averages of sigma_rel "
            f"{', '.join(map(str, lengths))}: {left:.0%} of its profile would be missing; take one nearer to "
            "these, or a step with a snapshot, and train with more snapshots"
        )
    hasher = hashlib.sha256(f"{wanted} {state['ema_updates']}".encode())
    total: dict[str, Tensor] = {}
    for factor, (_, folder, record, name) in zip(found.tolist(), kept, strict=True):
        hasher.update(record["files"][f"{name}{_TENSORS}"]["sha256"].encode())
        for key, values in read_tensors(folder, record, name).items():
            exact = torch.promote_types(values.dtype, torch.float32)
            added = values.to(exact).mul_(factor) if exact != values.dtype else values * factor
            total[key] = added if key not in total else total[key].add_(added)
    return total, hasher.hexdigest()


def _kept(path: Path, state: Mapping[str, Any], snapshots: Path) -> list[tuple[Profile, Path, Mapping[str, Any], str]]:
    """The averages that one at the checkpoint's step may be made of: profile, folder, its record, and name. The
    checkpoint's own, which are exact, come before those of its step's snapshot."""
    records = {snapshot: read_state(snapshot) for snapshot in checkpoints(snapshots)}
    if any(name.startswith(POWER) for name in state["files"]):
        records = {snapshot: record for snapshot, record in records.items() if record["step"] != state["step"]}
        records[path] = dict(state)
    found = []
    for folder, record in records.items():
        if record["step"] > state["step"] or not record["ema_updates"]:
            continue
        if record.get("power_since", 0) != state.get("power_since", 0):
            continue  # of an earlier series, which began with other weights
        for file in record["files"]:
            if file.startswith(POWER):
                name = file.removesuffix(_TENSORS)
                found.append(((record["ema_updates"], _sigma_rel(name)), folder, record, name))
    return found
