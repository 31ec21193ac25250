"""Which checkpoints a training keeps: the newest, and those of least validation loss."""

import logging
import shutil
from pathlib import Path

from imagen_core.files import fsync_path
from imagen_core.sealed import DamagedFileError, read_sealed, write_sealed
from imagen_core.train.checkpoints.checkpoint import FOLDER, STATE, checkpoints
from imagen_core.train.logs import METRICS, read_metrics

log = logging.getLogger(__name__)
_VALIDATION = "validation.json"


def remove_old(folder: Path, keep: int, keep_best: int = 0) -> None:
    """Leaves the newest `keep` checkpoints, the `keep_best` of least validation loss, and nothing half-written."""
    found = checkpoints(folder)
    best = best_checkpoints(folder)[:keep_best] if keep_best else []
    stay = {*found[-keep:], *best}
    for path in found:
        if path not in stay:
            (path / STATE).unlink()  # first, so that a kill leaves no checkpoint that looks complete
            fsync_path(path)
            shutil.rmtree(path)
    remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Removes what a kill left of checkpoints that were being written or removed."""
    for path in folder.glob(".tmp-step-*"):
        shutil.rmtree(path)
    for path in folder.glob("step-*"):
        if FOLDER.fullmatch(path.name) and not (path / STATE).exists():
            log.warning("%s: has no %s, as a kill while it was written or removed leaves it; removed", path, STATE)
            shutil.rmtree(path)


def record_validation(folder: Path, step: int, loss: float) -> None:
    """Records the validation loss of a step's checkpoint, if there is one, in a file next to the folder."""
    path = folder / f"step-{step:08d}"
    if (path / STATE).exists():
        write_sealed(folder.parent / _VALIDATION, {**validation_losses(folder), path.name: loss})


def best_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints whose validation loss is known, the least first; of equal ones the later."""
    losses = validation_losses(folder)
    known = [path for path in reversed(checkpoints(folder)) if path.name in losses]
    return sorted(known, key=lambda path: losses[path.name])


def validation_losses(folder: Path) -> dict[str, float]:
    """The validation loss of each checkpoint whose loss is known, by name.

    A file that is lost or damaged is made up for by the metrics.
    """
    path = folder.parent / _VALIDATION
    try:
        recorded = read_sealed(path)
        if not all(isinstance(loss, int | float) for loss in recorded.values()):
            raise DamagedFileError(f"{path}: has values that are no numbers")
    except FileNotFoundError:
        recorded = _logged(folder)
    except DamagedFileError as error:
        log.warning("%s; the losses are taken from %s", error, METRICS)
        recorded = _logged(folder)
    return {path.name: recorded[path.name] for path in checkpoints(folder) if path.name in recorded}


def _logged(folder: Path) -> dict[str, float]:
    lines = read_metrics(folder.parent / METRICS)
    return {f"step-{line['step']:08d}": line["validation_loss"] for line in lines if "validation_loss" in line}
