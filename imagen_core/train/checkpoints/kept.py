"""Which checkpoint a training resumes from, and which it keeps: the newest, and those of least validation loss."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from imagen_core.files import fsync_path
from imagen_core.sealed import DamagedFileError, read_sealed, write_sealed
from imagen_core.train.checkpoints.checkpoint import FOLDER, STATE, checkpoints
from imagen_core.train.errors import TrainError
from imagen_core.train.logs import METRICS, read_metrics
from imagen_core.train.parallel.world import World

log = logging.getLogger(__name__)
_VALIDATION = "validation.json"


def newest_checkpoint(folder: Path, world: World) -> Path | None:
    """The checkpoint to resume from, if there is one; leftovers of a kill are removed. All processes must call it.

    Raises:
        TrainError: the processes see different ones.
    """
    if world.is_main:
        remove_unfinished(folder)
    newest = next(reversed(checkpoints(folder)), None)
    seen = sorted({str(path and path.name) for path in world.gather(newest)})
    if len(seen) > 1:
        raise TrainError(
            f"{folder.parent}: the processes see different checkpoints ({', '.join(seen)}); use a folder that all "
            "machines share"
        )
    return newest


def remove_old(
    folder: Path,
    keep: int,
    keep_best: int = 0,
    losses: Mapping[str, float] | None = None,
    keep_step: int | None = None,
) -> None:
    """Leaves the newest `keep` checkpoints, the `keep_best` of least validation loss, that of `keep_step`, and nothing
    half-written.

    Args:
        losses: by name of the checkpoint; default: the recorded ones.
    """
    found = checkpoints(folder)
    best = best_checkpoints(folder, losses)[:keep_best] if keep_best else []
    stay = {*found[-keep:], *best, *(path for path in found if _step(path) == keep_step)}
    for path in found:
        if path not in stay:
            _remove(path)
    remove_unfinished(folder)


def remove_later(folder: Path, step: int) -> None:
    """Removes the snapshots after a step, which a training that resumes there makes again, and half-written ones."""
    for path in checkpoints(folder):
        if _step(path) > step:
            _remove(path)
    remove_unfinished(folder)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove(path: Path) -> None:
    (path / STATE).unlink()  # first, so that a kill leaves no checkpoint that looks complete
    fsync_path(path)
    shutil.rmtree(path)


def remove_unfinished(folder: Path) -> None:
    """Removes what a kill left of checkpoints that were being written or removed."""
    for path in folder.glob(".tmp-step-*"):
        shutil.rmtree(path)
    for path in folder.glob("step-*"):
        if FOLDER.fullmatch(path.name) and not (path / STATE).exists():
            log.warning("%s: has no %s, as a kill while it was written or removed leaves it; removed", path, STATE)
            shutil.rmtree(path)


def record_validation(
    folder: Path, step: int, loss: float, keep: int, keep_best: int = 0, keep_step: int | None = None
) -> None:
    """Records the validation loss of a step's checkpoint, if there is one, in a file next to the folder.

    Before that it removes the checkpoints that are not to be kept, now that the loss is known: a kill between the two
    leaves the validation to be done again, and no loss of a checkpoint that is gone.
    """
    path = folder / f"step-{step:08d}"
    if (path / STATE).exists():
        losses = {**validation_losses(folder), path.name: loss}
        remove_old(folder, keep, keep_best, losses, keep_step)
        left = {path.name for path in checkpoints(folder)}
        write_sealed(folder.parent / _VALIDATION, {name: loss for name, loss in losses.items() if name in left})


def best_checkpoints(folder: Path, losses: Mapping[str, float] | None = None) -> list[Path]:
    """Checkpoints whose validation loss is known, the least first; of equal ones the later.

    Args:
        losses: by name of the checkpoint; default: the recorded ones.
    """
    known_losses = validation_losses(folder) if losses is None else losses
    known = [path for path in reversed(checkpoints(folder)) if path.name in known_losses]
    return sorted(known, key=lambda path: known_losses[path.name])


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
