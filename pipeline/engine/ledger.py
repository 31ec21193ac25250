"""The finished work: compares records on disk with the plan, and refuses what no longer fits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pipeline.errors import ConfigError, StaleOutputError
from pipeline.executors.task import write_drops
from pipeline.fingerprint import differences, digest
from pipeline.plan import Plan
from pipeline.stage import Shard
from pipeline.storage.files import damaged
from pipeline.storage.record import Record, shard_name, shard_of
from pipeline.storage.run_folder import QUARANTINE, RunFolder


def read_group_fingerprint(run: RunFolder, group: str) -> dict[str, object] | None:
    """The fingerprint that the group was started with, or None if it was never started.

    Raises:
        ConfigError: its file is damaged.
    """
    fingerprint = run.storage.read_json(_group_name(group), _remedy(run, group))
    if fingerprint is not None and not (
        isinstance(fingerprint, dict) and all(isinstance(fingerprint.get(part), dict) for part in ("config", "inputs"))
    ):
        raise damaged_fingerprint(run, group, "not a fingerprint")
    return fingerprint


def damaged_fingerprint(run: RunFolder, group: str, what: object) -> ConfigError:
    """The error for the file of `read_group_fingerprint` that does not hold what it should."""
    return damaged(f"{run.url}/{_group_name(group)}", what, _remedy(run, group))


def _remedy(run: RunFolder, group: str) -> str:
    return f"restore it from a copy; or delete it with state/{group} and {run.group_folder(group)}, to make it again"


def changed_input(run: RunFolder, shard: Shard, record: Record, column: str | None = None) -> str:
    """The message for a shard whose input rows differ from the rows that it was made from.

    Args:
        column: the one column that it was made from, if it was.
    """
    what = "input rows" if column is None else f"cells of the column {column!r}"
    return (
        f"{run.url}: shard {shard.name} of {record.group} was made from other {what} "
        f"({record.input_rows} rows then, {shard.num_rows} now): the source or shard_size changed.\n"
        "Restore the source, choose another --out, or rebuild the changed shards with --restart."
    )


@dataclass(slots=True)
class _Found:
    """What the run folder has of a shard."""

    shard: Shard
    finished: dict[str, Record]
    """Records of the groups that are complete and still fit."""
    stale: list[str]
    """Groups to delete, so that they are made again."""
    refused: str | None = None
    """Why the run cannot continue from this shard."""
    unlisted: list[str] = field(default_factory=list)
    """Groups with drops whose list is gone."""


class Ledger:
    """Says, shard by shard, which groups are finished; deletes what no longer fits.

    Args:
        restart: deletes changed work, instead of refusing it.
    """

    def __init__(self, plan: Plan, run: RunFolder, *, restart: bool = False):
        self.plan = plan
        self.run = run
        self.restart = restart
        self.dependencies = plan.dependencies()
        self.transient = plan.transient_groups
        self._complete: set[str] = set()  # groups whose shared files exist
        self._seen: list[list[int]] = []  # [first, last] of each run of shard indices
        self._begun: set[str] = set()  # groups with records when `finished` began
        self.within: Sequence[range] | None = None
        """Indices of the shards that this process has to do with; None means all."""

    def refuse_changed_input(self) -> None:
        """Checks the first shard before anything is written: another shard_size or source shows there already.

        Raises:
            StaleOutputError: it was committed from other input rows, and `restart` is off.
        """
        shard = None if self.restart else next(self.plan.shards(), None)
        if shard is None:
            return
        for group in self.dependencies:
            record = self.run.read_record(group, shard.name)
            column = self.plan.groups[group].cells
            if record is not None and group not in self.transient and record.input != shard.digest_of(column):
                raise StaleOutputError(changed_input(self.run, shard, record, column))

    def check_groups(self, *, write: bool = True) -> set[str]:
        """Compares each group's fingerprint with the one it was started with.

        With `restart`, deletes the changed groups and everything that was made from them, instead of refusing.

        Args:
            write: record the fingerprints of new groups (False for a dry run).

        Returns:
            The groups that were deleted.

        Raises:
            StaleOutputError: a group was made with another configuration; lists every difference.
        """
        started = {group: self._started(group) for group in self.plan.fingerprints}
        changed: dict[str, list[str]] = {}
        stale: set[str] = set()
        for group, old in started.items():
            if old is None or digest(old) == self.plan.digests[group]:
                continue
            own = differences(_without_inputs(old), _without_inputs(self.plan.fingerprints[group]), group)
            if own:
                changed[group] = own
            stale.add(group)
        if stale and not self.restart:
            raise StaleOutputError(self._changed_configuration(changed, stale))
        if stale:
            self._delete_groups(stale)
        for group, fingerprint in self.plan.fingerprints.items():
            if write and started[group] != fingerprint:
                self.run.storage.write_json(_group_name(group), fingerprint)
        return stale

    def _started(self, group: str) -> dict[str, object] | None:
        """The fingerprint that a planned group was started with; the planned one if its file is damaged and its
        records were made with it."""
        try:
            found = read_group_fingerprint(self.run, group)
        except ConfigError:
            if self._is_planned(group):
                return None  # as of a new group: written again
            raise
        if found is None or digest(found) == self.plan.digests[group] or not self._is_planned(group):
            return found
        return None

    def _is_planned(self, group: str) -> bool:
        """Whether the first record of a group says that it was made as planned now; True if it has none."""
        first = min(self.run.recorded_shards(group), default=None)
        record = None if first is None else self.run.read_record(group, shard_name(first))
        return record is not None and record.fingerprint == self.plan.digests[group]

    def _changed_configuration(self, changed: Mapping[str, list[str]], stale: set[str]) -> str:
        lines = [line for own in changed.values() for line in own]
        implied = sorted(stale - changed.keys())
        if implied:
            lines.append(f"and therefore: {', '.join(implied)}")
        return (
            f"{self.run.url}: the finished work was made with another configuration:\n  "
            + "\n  ".join(lines)
            + "\nGive the old values, choose another --out, or rebuild what changed with --restart."
        )

    def _delete_groups(self, stale: set[str]) -> None:
        self._delete_final_file()
        for group in self._unplanned_without(set(self.unplanned).union(self.plan.groups) - stale):
            self.run.delete_group(group)
            self.run.storage.delete(_group_name(group))
        for group in stale:
            self.run.delete_group(group)
        del self.unplanned

    @cached_property
    def unplanned(self) -> dict[str, tuple[str, ...]]:
        """Groups that only earlier configurations made, with the lasting groups that they depend on."""
        result: dict[str, tuple[str, ...]] = {}
        for group in self.run.started_groups():
            fingerprint = read_group_fingerprint(self.run, group)
            if group not in self.plan.groups and fingerprint is not None:
                inputs = fingerprint["inputs"]
                assert isinstance(inputs, dict)
                result[group] = tuple(name for name in inputs if name not in self.transient)
        return result

    def finished(
        self, shards: Iterable[Shard], *, read_only: bool = False
    ) -> Iterator[tuple[Shard, dict[str, Record]]]:
        """Each shard with the records of the groups whose files are present and still fit.

        What is no longer complete (a file is missing or truncated, or its inputs are missing) is deleted, so that it
        is made again; not so with `read_only`.

        Raises:
            StaleOutputError: a shard was committed from other input rows, and `restart` is off.
        """
        self._seen = []
        self._begun = {group for group in self.plan.groups if next(self.run.recorded_shards(group), None) is not None}
        for found in self.run.storage.map(self._find, shards):
            self._record(found.shard.index)
            if found.refused is not None:
                raise StaleOutputError(found.refused)
            for group in () if read_only else found.stale:
                self._delete_shard(group, found.shard.name)
            for group in () if read_only else found.unlisted:
                assert self.plan.lost_drops is not None
                drops = self.plan.lost_drops(self.run, found.shard, found.finished[group])
                write_drops(self.run, found.shard.name, group, drops)
            yield found.shard, found.finished

    def _find(self, shard: Shard) -> _Found:
        found = _Found(shard, {}, [])
        finished, stale = found.finished, found.stale
        for group, fingerprint in self.plan.digests.items():
            record = self.run.read_record(group, shard.name) if group in self._begun else None
            if record is None:
                continue
            column = self.plan.groups[group].cells
            fits = record.input == shard.digest_of(column) and record.fingerprint == fingerprint
            if not fits and group not in self.transient and not self.restart:
                found.refused = changed_input(self.run, shard, record, column)
                return found
            # Without a shared file the next shard is made again, for its stage's `setup` to write the file.
            complete = fits and self._has_shared_files(group) and self._has_files(record)
            if complete and all(name in finished for name in self.dependencies[group]):
                finished[group] = record
                if record.drops and self._has_lost_list(group, shard):
                    found.unlisted.append(group)
            else:
                stale.append(group)
        for group in self.transient & finished.keys():
            if finished[group].info.get("partial") and self.plan.row_group not in finished:
                del finished[group]
                stale.append(group)
        for group in self._unplanned_without(finished):
            if self.run.read_record(group, shard.name) is not None:
                stale.append(group)
        return found

    def _unplanned_without(self, present: Iterable[str]) -> list[str]:
        """The unplanned groups that were made from others than those present and unplanned ones made from these."""
        kept, left = set(present) - self.unplanned.keys(), dict(self.unplanned)
        while followed := [group for group, inputs in left.items() if kept.issuperset(inputs)]:
            kept.update(followed)
            for group in followed:
                del left[group]
        return list(left)

    def _has_shared_files(self, group: str) -> bool:
        if group not in self._complete:
            folder, files = self.run.group_folder(group), self.plan.groups[group].shared_files
            paths = [f"{folder}/{file}" for file in files]
            missing = [path for path in paths if self.run.size(path) is None]
            if any(self.run.storage.size(path) is None for path in missing):  # a worker may have written it since
                return False
            self._complete.add(group)
        return True

    def _has_lost_list(self, group: str, shard: Shard) -> bool:
        if self.plan.lost_drops is None or group in self.transient:
            return False
        return self.run.size(self.run.drops_name(group, shard.name)) is None

    def listed_drops(self, shard: Shard, groups: Iterable[str]) -> frozenset[str] | None:
        """The groups that may have a list of drops of this shard, which an interrupted run left; None if any may."""
        if self.run.index is None:
            return None
        return frozenset(g for g in groups if self.run.size(self.run.drops_name(g, shard.name)) is not None)

    def _has_files(self, record: Record) -> bool:
        return all(self.run.size(file.path) == file.bytes for file in record.files)

    def check_leftovers(self) -> None:
        """Compares the committed shards with those that `finished` has seen, once the source has ended.

        Raises:
            StaleOutputError: the source has fewer shards than are committed, and `restart` is off.
        """
        for group in [*self.plan.groups, *self.unplanned]:
            for index in list(self.run.recorded_shards(group)):
                if any(first <= index <= last for first, last in self._seen):
                    continue
                if self.within is not None and not any(index in those for those in self.within):
                    continue
                if not self.restart:
                    raise StaleOutputError(
                        f"{self.run.url}: shard {shard_name(index)} of {group} is finished, but the source no longer "
                        "has it: rows were removed, or shard_size changed.\n"
                        "Restore the source, choose another --out, or remove such shards with --restart."
                    )
                self._delete_shard(group, shard_name(index))

    def sweep(self) -> int:
        """Deletes what no record has of the groups that this folder's runs made: files under their real names whose
        record a killed run deleted, or had not written yet.

        Returns:
            The number of files.
        """
        count = 0
        for group in sorted({*self.plan.groups, *self.run.started_groups()}):
            shards = set(self.run.recorded_shards(group))
            for folder in (self.run.group_folder(group), f"{QUARANTINE}/{group}"):
                names: dict[int, list[str]] = {}
                for name in self.run.names(folder):
                    if (index := shard_of(name)) is not None:
                        names.setdefault(index, []).append(f"{folder}/{name}")
                for index, paths in names.items():
                    if index not in shards or (len(paths) > 1 and folder == self.run.group_folder(group)):
                        count += self._delete_unrecorded(group, index, paths)
        return count

    def _delete_unrecorded(self, group: str, index: int, paths: list[str]) -> int:
        record = self.run.read_record(group, shard_name(index))
        known = {file.path for file in record.files} if record is not None else set()
        unknown = [path for path in paths if path not in known]
        for path in unknown:
            self.run.storage.delete(path)
        return len(unknown)

    def _delete_shard(self, group: str, shard: str) -> None:
        if group not in self.transient:
            self._delete_final_file()
        self.run.delete_shard(group, shard)

    def _delete_final_file(self) -> None:
        """Deletes the manifest, before the first file that it lists is deleted or replaced."""
        if self.plan.final_file is not None:
            self.run.storage.delete(self.plan.final_file, durably=True)

    def note_seen(self, shards: range) -> None:
        """Tells that the source has these shards, in place of a pass by `finished`."""
        self._seen = [[shards.start, shards.stop - 1]]

    def _record(self, index: int) -> None:
        if self._seen and self._seen[-1][1] == index - 1:
            self._seen[-1][1] = index
        else:
            self._seen.append([index, index])


def _group_name(group: str) -> str:
    return f"state/{group}.json"


def _without_inputs(fingerprint: Mapping[str, object]) -> dict[str, object]:
    flat = {key: value for key, value in fingerprint.items() if key not in ("inputs", "config")}
    config = fingerprint.get("config")
    return {**(config if isinstance(config, Mapping) else {}), **flat}
