"""Free disk against what a run will write, on the run folder's file system and on that of temporary files.

An estimate may be wrong, so a run is refused only where the least that it can write does not fit: the bytes that
follow from its configuration (raw images, arrays of one shape), for the samples that `max_drop_fraction` leaves, less
a tenth.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import MachineError
from pipeline.executors.base import ExecutionConfig, usable_cpus
from pipeline.plan import Plan
from pipeline.storage import LocalStorage
from pipeline.storage.disk import mount_point
from pipeline.storage.run_folder import RunFolder
from pipeline.units import human_bytes

_CERTAIN = 0.9
"""Part of the estimated bytes that is taken for certain."""
RUN_FOLDER = "run folder"
TEMPORARY = "temporary files (TMPDIR)"


@dataclass(frozen=True, slots=True)
class Room:
    """One file system of this machine, and what a run writes to it."""

    folder: str
    """Where it is mounted."""
    holds: tuple[str, ...]
    """`run folder`, `temporary files (TMPDIR)` or both."""
    free_bytes: int
    expected_bytes: int
    """If all rows become samples, of the groups whose bytes are known."""
    least_bytes: int
    unknown: tuple[str, ...] = ()
    """Groups whose bytes are not known."""

    @property
    def is_too_small(self) -> bool:
        """Whether what is expected does not fit."""
        return self.expected_bytes > self.free_bytes

    @property
    def is_hopeless(self) -> bool:
        """Whether not even the least fits."""
        return self.least_bytes > self.free_bytes

    def __str__(self) -> str:
        unknown = f"{', '.join(self.unknown)} (of unknown size)"
        what = human_bytes(self.expected_bytes)
        if self.unknown:
            what = f"{what}, and {unknown}" if self.expected_bytes else unknown
        return f"{' and '.join(self.holds)} at {self.folder}: {what} to write, {human_bytes(self.free_bytes)} free"


def rooms(
    plan: Plan,
    run: RunFolder,
    expected: Mapping[str, int | None],
    rows: Mapping[str, int],
    certain_rows: Mapping[str, int],
    num_cpus: int | None,
) -> list[Room]:
    """The file systems of this machine that a run writes to.

    On an object store that is the one of temporary files alone: what a stage makes lies there until it is sent.

    Args:
        expected: bytes still to write, by lasting group; None where they are not known.
        rows: rows still to make, by lasting group.
        certain_rows: as many of them as there are at least.
        num_cpus: tasks at a time; None: as many as this machine has CPUs.
    """
    kept = _CERTAIN * (1 - plan.max_drop_fraction)
    unknown = tuple(name for name, size in expected.items() if size is None and rows.get(name))
    least = sum(_known_bytes(plan, name, certain_rows.get(name, 0)) for name in expected)
    total = sum(size or 0 for size in expected.values())
    needs = {RUN_FOLDER: (run.storage.local, total, round(kept * least), unknown)}
    temporary = Path(tempfile.gettempdir())
    if isinstance(run.storage, LocalStorage):
        needs[TEMPORARY] = (temporary, 0, 0, ())
    else:
        shard, least = _shard_bytes(plan, rows), _shard_bytes(plan, certain_rows)
        needs = {TEMPORARY: (temporary, shard * (num_cpus or usable_cpus()), round(kept * least), ())}
    return _merged(needs)


def _merged(needs: Mapping[str, tuple[Path, int, int, tuple[str, ...]]]) -> list[Room]:
    """One entry for each file system."""
    found: dict[int, Room] = {}
    for place, (folder, expected, least, unknown) in needs.items():
        folder = existing(folder)
        usage, device = shutil.disk_usage(folder), _device(folder)
        if not usage.total:  # some network file systems do not say
            continue
        room = Room(str(mount_point(folder)), (place,), usage.free, expected, least, unknown)
        before = found.get(device)
        if before is not None:
            room = replace(
                before,
                holds=(*before.holds, place),
                expected_bytes=before.expected_bytes + expected,
                least_bytes=before.least_bytes + least,
                unknown=(*before.unknown, *unknown),
            )
        found[device] = room
    return list(found.values())


def _device(folder: Path) -> int:
    return os.stat(folder).st_dev


def existing(folder: Path) -> Path:
    """The folder, or the first above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_room(plan: Plan, run: RunFolder, execution: ExecutionConfig, *, here: bool, refuse: bool) -> list[str]:
    """Compares at the start of a run, from what stages know without models; returns warnings.

    Args:
        here: whether this machine does the work; on a cluster the nodes have their own temporary files.
        refuse: False only warns.
    Raises:
        MachineError: not even the least that the run can write fits, and `execution.disk_check` is `refuse`.
    """
    if plan.estimated_shards is None or plan.shard_size is None:
        return []
    left = {name: _shards_to_do(plan, run, name) for name in plan.groups if name not in plan.transient_groups}
    certain = {name: max(0, shards - 1) * plan.shard_size for name, shards in left.items()}
    rows = {name: count + plan.shard_size // 2 if left[name] else 0 for name, count in certain.items()}
    expected = {name: estimated_bytes(plan, name, count) for name, count in rows.items()}
    warnings = []
    for room in rooms(plan, run, expected, rows, certain, execution.num_cpus):
        if TEMPORARY in room.holds and len(room.holds) == 1 and not here:
            continue
        if room.is_hopeless and refuse and execution.disk_check == "refuse":
            raise MachineError(
                f"{room}; it cannot be less than {human_bytes(room.least_bytes)}. Make room, choose another --out or "
                "TMPDIR, store fewer or encoded images (images.sizes_px, images.codec); or execution.disk_check=warn, "
                "where the file system compresses or grows"
            )
        if room.is_too_small:
            warnings.append(f"disk: {room}; if the disk gets full, the run ends, and resumes once there is room")
    return warnings


def _shards_to_do(plan: Plan, run: RunFolder, group: str) -> int:
    """Shards of a group that are still to make. The last one may have few rows; it counts as half a shard."""
    done = sum(1 for _ in run.recorded_shards(group)) if isinstance(run.storage, LocalStorage) else 0
    return max(0, (plan.estimated_shards or 0) - done)


def estimated_bytes(plan: Plan, group: str, rows: int) -> int | None:
    """Bytes of a group for some rows by its stage's own estimate; None if it has none."""
    stage = next(stage for stage in plan.stages if any(made.name == group for made in stage.groups))
    return stage.estimate_bytes(group, rows) if rows else 0


def _known_bytes(plan: Plan, group: str, rows: int) -> int:
    return estimated_bytes(plan, group, rows) or 0


def _shard_bytes(plan: Plan, rows: Mapping[str, int]) -> int:
    """Most bytes that a stage makes of one shard, of the groups that have these rows still to make."""
    size = plan.shard_size or 0
    made = [[group.name for group in stage.groups if group.name in rows] for stage in plan.stages]
    return max(sum(_known_bytes(plan, name, min(size, rows[name])) for name in names) for names in made)
