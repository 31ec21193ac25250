"""What is already done: compares records on disk with the plan, and refuses what no longer fits."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.errors import StaleOutputError
from pipeline.fingerprint import differences, digest
from pipeline.plan import Plan
from pipeline.stage import Shard
from pipeline.storage.run_folder import Record, RunFolder


def check_groups(plan: Plan, run: RunFolder, *, restart: bool, write: bool = True) -> set[str]:
    """Compares each group's fingerprint with the one it was begun with.

    Args:
        restart: instead of refusing, removes the changed groups and all that was made from them.
        write: notes the fingerprints of new groups (False for a dry run).

    Returns:
        The groups that were removed.

    Raises:
        StaleOutputError: a group was made with another configuration; lists every difference.
    """
    changed: dict[str, list[str]] = {}
    downstream: set[str] = set()
    fingerprints = plan.fingerprints()
    for name, fingerprint in fingerprints.items():
        old = read_group_fingerprint(run, name)
        if old is None or digest(old) == digest(fingerprint):
            continue
        own = differences(_without_inputs(old), _without_inputs(fingerprint), name)
        if own:
            changed[name] = own
        downstream.add(name)
    if downstream and not restart:
        lines = [line for own in changed.values() for line in own]
        implied = sorted(downstream - changed.keys())
        if implied:
            lines.append(f"and therefore: {', '.join(implied)}")
        raise StaleOutputError(
            f"{run.url}: the finished work was made with another configuration:\n  "
            + "\n  ".join(lines)
            + "\nGive the old values, choose another --out, or rebuild what changed with --restart."
        )
    if downstream:
        remove_final_file(plan, run)
        for name, inputs in unplanned_groups(plan, run).items():
            if downstream.intersection(inputs):
                run.delete_group(name)
                run.storage.delete(_group_name(name))
    for name, fingerprint in fingerprints.items():
        if name in downstream:
            run.delete_group(name)
        if write and read_group_fingerprint(run, name) != fingerprint:
            run.storage.write_json(_group_name(name), fingerprint)
    return downstream


def refuse_changed_input(plan: Plan, run: RunFolder, *, restart: bool) -> None:
    """Looks at the first shard before anything is written: another shard_size or source shows there already.

    Raises:
        StaleOutputError: it was committed from other input rows, and `restart` is off.
    """
    shard = None if restart else next(plan.shards(), None)
    if shard is None:
        return
    for name in plan.dependencies():
        record = run.read_record(name, shard.name)
        if record is not None and name not in plan.transient_groups and record["input"] != shard.digest:
            raise StaleOutputError(changed_input(run, shard, name, record))


def remove_final_file(plan: Plan, run: RunFolder) -> None:
    """Removes the manifest, before the first file it lists is removed or replaced."""
    if plan.final_file is not None:
        run.storage.delete(plan.final_file)


def unplanned_groups(plan: Plan, run: RunFolder) -> dict[str, tuple[str, ...]]:
    """Groups of earlier configurations that the plan does not make, and the lasting groups each was made from."""
    result: dict[str, tuple[str, ...]] = {}
    for group in run.started_groups():
        fingerprint = read_group_fingerprint(run, group)
        if group not in plan.groups and fingerprint is not None:
            inputs = fingerprint["inputs"]
            assert isinstance(inputs, dict)
            result[group] = tuple(name for name in inputs if name not in plan.transient_groups)
    return result


def read_group_fingerprint(run: RunFolder, group: str) -> dict[str, object] | None:
    """The fingerprint the group was begun with, or None if it was never begun."""
    return run.storage.read_json(_group_name(group))


@dataclass(slots=True)
class _Found:
    """What the run folder has of a shard."""

    shard: Shard
    whole: dict[str, Record]
    """Records of the groups that are finished and still fit."""
    stale: list[str]
    """Groups to forget, so that they are made anew."""
    refused: str | None = None
    """Why the shard cannot be gone on with."""


class Ledger:
    """Says, shard by shard, which groups are finished; forgets what no longer fits."""

    def __init__(self, plan: Plan, run: RunFolder, *, restart: bool = False, read_only: bool = False):
        self.plan = plan
        self.run = run
        self.restart = restart
        self.read_only = read_only
        self.dependencies = plan.dependencies()
        self.transient = plan.transient_groups
        self.unplanned = unplanned_groups(plan, run)
        self.fingerprints = {name: digest(value) for name, value in plan.fingerprints().items()}
        self._complete: set[str] = set()  # groups whose shared files were seen
        self._seen: list[list[int]] = []  # [first, last] of each run of shard indices

    def _has_shared_files(self, group: str) -> bool:
        if group not in self._complete:
            folder, files = self.run.group_folder(group), self.plan.groups[group].shared_files
            if any(self.run.storage.size(f"{folder}/{file}") is None for file in files):
                return False
            self._complete.add(group)
        return True

    def finished(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, dict[str, Record]]]:
        """Each shard with the records of the groups whose files are present and still fit.

        What is no longer whole (a file is missing or cut, or what it was made from is gone) is forgotten, so
        that it is made anew.

        Raises:
            StaleOutputError: a shard was committed from other input rows, and `restart` is off.
        """
        for found in self.run.storage.map(self._look, shards):
            self._record(found.shard.index)
            if found.refused is not None:
                raise StaleOutputError(found.refused)
            for group in found.stale:
                self._delete_shard(group, found.shard.name)
            yield found.shard, found.whole

    def _look(self, shard: Shard) -> _Found:
        found = _Found(shard, {}, [])
        result, stale = found.whole, found.stale
        shard_digest = shard.digest
        for group, fingerprint in self.fingerprints.items():
            record = self.run.read_record(group, shard.name)
            if record is None:
                continue
            fits = record["input"] == shard_digest and record["fingerprint"] == fingerprint
            if not fits and group not in self.transient and not self.restart:
                found.refused = changed_input(self.run, shard, group, record)
                return found
            # Without a shared file the next shard is made anew, for its stage's `setup` to write the file.
            whole = fits and self._has_shared_files(group) and _files_present(self.run, record)
            if whole and all(name in result for name in self.dependencies[group]):
                result[group] = record
            else:
                stale.append(group)
        for group in self.transient & result.keys():
            if _is_partial(result[group]) and self.plan.row_group not in result:
                del result[group]
                stale.append(group)
        for group, inputs in self.unplanned.items():
            if not all(name in result for name in inputs) and self.run.read_record(group, shard.name) is not None:
                stale.append(group)
        return found

    def check_leftovers(self) -> None:
        """Compares what is committed with the shards seen, once the source has ended.

        Raises:
            StaleOutputError: the source has fewer shards than are committed, and `restart` is off.
        """
        for group in [*self.fingerprints, *self.unplanned]:
            for index in list(self.run.recorded_shards(group)):
                if any(first <= index <= last for first, last in self._seen):
                    continue
                if not self.restart:
                    raise StaleOutputError(
                        f"{self.run.url}: shard {index:05d} of {group} is finished, but the source no longer has "
                        "it: rows were taken away, or shard_size changed.\n"
                        "Restore the source, choose another --out, or remove such shards with --restart."
                    )
                self._delete_shard(group, f"{index:05d}")

    def _delete_shard(self, group: str, shard: str) -> None:
        if self.read_only:
            return
        if group not in self.transient:
            remove_final_file(self.plan, self.run)
        self.run.delete_shard(group, shard)

    def _record(self, index: int) -> None:
        if self._seen and self._seen[-1][1] == index - 1:
            self._seen[-1][1] = index
        else:
            self._seen.append([index, index])


def changed_input(run: RunFolder, shard: Shard, group: str, record: Mapping[str, object]) -> str:
    """The message for a shard whose input rows are no longer those it was made from."""
    return (
        f"{run.url}: shard {shard.name} of {group} was made from other input rows "
        f"({record['input_rows']} rows then, {shard.num_rows} now): the source or shard_size changed.\n"
        "Restore the source, choose another --out, or rebuild the changed shards with --restart."
    )


def _is_partial(record: Record) -> bool:
    info = record["info"]
    return isinstance(info, dict) and bool(info.get("partial"))


def _files_present(run: RunFolder, record: Record) -> bool:
    files = record["files"]
    assert isinstance(files, list)
    return all(run.storage.size(file["path"]) == file["bytes"] for file in files)


def _group_name(group: str) -> str:
    return f"state/{group}.json"


def _without_inputs(fingerprint: Mapping[str, object]) -> dict[str, object]:
    flat = {key: value for key, value in fingerprint.items() if key not in ("inputs", "config")}
    config = fingerprint.get("config")
    return {**(config if isinstance(config, Mapping) else {}), **flat}
