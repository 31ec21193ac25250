"""What is already done: compares records on disk with the plan, and refuses what no longer fits."""

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import StaleOutputError
from pipeline.files import write_json
from pipeline.fingerprint import differences, digest
from pipeline.plan import Plan
from pipeline.runfolder import Record, RunFolder
from pipeline.stage import Shard


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
            f"{run.root}: the finished work was made with another configuration:\n  "
            + "\n  ".join(lines)
            + "\nGive the old values, choose another --out, or rebuild what changed with --restart."
        )
    if downstream:
        remove_final_file(plan, run)
        for name, inputs in unplanned_groups(plan, run).items():
            if downstream.intersection(inputs):
                run.forget_group(name)
                _group_file(run, name).unlink()
    for name, fingerprint in fingerprints.items():
        if name in downstream:
            run.forget_group(name)
        if write and read_group_fingerprint(run, name) != fingerprint:
            write_json(_group_file(run, name), fingerprint)
    return downstream


def refuse_changed_input(plan: Plan, run: RunFolder, *, restart: bool) -> None:
    """Looks at the first shard before anything is written: another shard_size or source shows there already.

    Raises:
        StaleOutputError: it was committed from other input rows, and `restart` is off.
    """
    shard = next(plan.shards(), None)
    if shard is None or restart:
        return
    for name in plan.dependencies():
        record = run.read_record(name, shard.name)
        if record is not None and name not in plan.transient_groups and record["input"] != shard.digest:
            raise StaleOutputError(changed_input(run, shard, name, record))


def remove_final_file(plan: Plan, run: RunFolder) -> None:
    """Removes the manifest, before the first file it lists is removed or replaced."""
    if plan.final_file is not None:
        (run.root / plan.final_file).unlink(missing_ok=True)


def unplanned_groups(plan: Plan, run: RunFolder) -> dict[str, tuple[str, ...]]:
    """Groups of earlier configurations that the plan does not make, and the lasting groups each was made from."""
    result: dict[str, tuple[str, ...]] = {}
    for path in sorted((run.root / "state").glob("*.json")):
        fingerprint = read_group_fingerprint(run, path.stem)
        if path.stem not in plan.groups and fingerprint is not None:
            inputs = fingerprint["inputs"]
            assert isinstance(inputs, dict)
            result[path.stem] = tuple(name for name in inputs if name not in plan.transient_groups)
    return result


def read_group_fingerprint(run: RunFolder, group: str) -> dict[str, object] | None:
    """The fingerprint the group was begun with, or None if it was never begun."""
    try:
        return json.loads(_group_file(run, group).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


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
        self.shared_files = {
            name: [run.group_folder(name) / file for file in group.shared_files] for name, group in plan.groups.items()
        }
        self._seen: list[list[int]] = []  # [first, last] of each run of shard indices

    def finished(self, shard: Shard) -> dict[str, Record]:
        """Records of the groups whose files of this shard are present and still fit.

        What is no longer whole (a file is missing or cut, or what it was made from is gone) is forgotten, so
        that it is made anew.

        Raises:
            StaleOutputError: the shard was committed from other input rows, and `restart` is off.
        """
        self._note(shard.index)
        result: dict[str, Record] = {}
        stale: list[str] = []
        shard_digest = shard.digest
        for group, fingerprint in self.fingerprints.items():
            record = self.run.read_record(group, shard.name)
            if record is None:
                continue
            fits = record["input"] == shard_digest and record["fingerprint"] == fingerprint
            if not fits and group not in self.transient and not self.restart:
                raise StaleOutputError(changed_input(self.run, shard, group, record))
            whole = fits and _files_present(self.run.root, record)
            # Without a shared file the next shard is made anew, for its stage's `setup` to write the file.
            whole = whole and all(path.exists() for path in self.shared_files[group])
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
        for group in stale:
            self._forget(group, shard.name)
        return result

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
                        f"{self.run.root}: shard {index:05d} of {group} is finished, but the source no longer has "
                        "it: rows were taken away, or shard_size changed.\n"
                        "Restore the source, choose another --out, or remove such shards with --restart."
                    )
                self._forget(group, f"{index:05d}")

    def _forget(self, group: str, shard: str) -> None:
        if self.read_only:
            return
        if group not in self.transient:
            remove_final_file(self.plan, self.run)
        self.run.forget(group, shard)

    def _note(self, index: int) -> None:
        if self._seen and self._seen[-1][1] == index - 1:
            self._seen[-1][1] = index
        else:
            self._seen.append([index, index])


def changed_input(run: RunFolder, shard: Shard, group: str, record: Mapping[str, object]) -> str:
    """The message for a shard whose input rows are no longer those it was made from."""
    return (
        f"{run.root}: shard {shard.name} of {group} was made from other input rows "
        f"({record['input_rows']} rows then, {shard.num_rows} now): the source or shard_size changed.\n"
        "Restore the source, choose another --out, or rebuild the changed shards with --restart."
    )


def _is_partial(record: Record) -> bool:
    info = record["info"]
    return isinstance(info, dict) and bool(info.get("partial"))


def _files_present(root: Path, record: Record) -> bool:
    files = record["files"]
    assert isinstance(files, list)
    for file in files:
        try:
            if (root / file["path"]).stat().st_size != file["bytes"]:
                return False
        except FileNotFoundError:
            return False
    return True


def _group_file(run: RunFolder, group: str) -> Path:
    return run.root / "state" / f"{group}.json"


def _without_inputs(fingerprint: Mapping[str, object]) -> dict[str, object]:
    flat = {key: value for key, value in fingerprint.items() if key not in ("inputs", "config")}
    config = fingerprint.get("config")
    return {**(config if isinstance(config, Mapping) else {}), **flat}
