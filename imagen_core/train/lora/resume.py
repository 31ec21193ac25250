"""Whether the adapter that is trained now is the one of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagen_core.differences import changed_fields
from imagen_core.train.errors import CheckpointMismatchError


def refuse_other_adapter(path: Path, saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Refuses to resume an adapter from a checkpoint of another one, or on another base.

    Args:
        saved, now: the adapter as state.json describes it; None means that all weights are trained.
    Raises:
        CheckpointMismatchError: says what differs.
    """
    if saved is None and now is None:
        return
    if saved is None or now is None:
        raise CheckpointMismatchError(
            f"{path}: trains {'all weights' if saved is None else 'an adapter'}; "
            f"{'leave lora out' if saved is None else 'restore lora'}, or start in another --out"
        )
    changes = changed_fields(*({**record, "base": None} for record in (saved, now)))
    if changes:
        raise CheckpointMismatchError(
            f"{path}: was trained with another lora: {'; '.join(changes)}; restore it, or start in another --out"
        )
    then, other = saved["base"], now["base"]
    if then["sha256"] != other["sha256"]:
        raise CheckpointMismatchError(
            f"{path}: its adapter was trained on {then['weights']} of step {then['step']} of {then['path']}; "
            f"{other['path']} has other weights (step {other['step']}, sha256 {other['sha256']}); name the first one "
            "as init_from.path, or start in another --out"
        )
