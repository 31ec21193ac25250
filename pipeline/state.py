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


def check_groups(plan: Plan, run: RunFolder, *, restart: bool, write: bool = True) -> None:
    """Compares each group's fingerprint with the one it was begun with.

    Args:
        restart: instead of refusing, removes the changed groups and all that was made from them.
        write: notes the fingerprints of new groups (False for a dry run).

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
    if downstream and plan.final_file is not None:
        (run.root / plan.final_file).unlink(missing_ok=True)
    for name, fingerprint in fingerprints.items():
        if name in downstream:
            run.forget_group(name)
        if write and read_group_fingerprint(run, name) != fingerprint:
            write_json(_group_file(run, name), fingerprint)


def read_group_fingerprint(run: RunFolder, group: str) -> dict[str, object] | None:
    """The fingerprint the group was begun with, or None if it was never begun."""
    try:
        return json.loads(_group_file(run, group).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


class Ledger:
    """Says, shard by shard, which groups are finished."""

    def __init__(self, plan: Plan, run: RunFolder, *, restart: bool = False, read_only: bool = False):
        self.run = run
        self.restart = restart
        self.read_only = read_only
        self.dependencies = plan.dependencies()
        self.transient = plan.transient_groups
        self.fingerprints = {name: digest(value) for name, value in plan.fingerprints().items()}
        self.shared_files = {
            name: [run.group_folder(name) / file for file in group.shared_files] for name, group in plan.groups.items()
        }

    def finished(self, shard: Shard) -> dict[str, Record]:
        """Records of the groups whose files of this shard are present and still fit.

        What is no longer whole (a file is missing or cut, or what it was made from is gone) is forgotten, so
        that it is made anew.

        Raises:
            StaleOutputError: the shard was committed from other input rows, and `restart` is off.
        """
        result: dict[str, Record] = {}
        shard_digest = shard.digest
        for group, fingerprint in self.fingerprints.items():
            record = self.run.read_record(group, shard.name)
            if record is None:
                continue
            fits = record["input"] == shard_digest and record["fingerprint"] == fingerprint
            if not fits and group not in self.transient and not self.restart:
                raise StaleOutputError(self._changed_input(shard, group, record))
            whole = fits and _files_present(self.run.root, record)
            # Without a shared file the next shard is made anew, for its stage's `setup` to write the file.
            whole = whole and all(path.exists() for path in self.shared_files[group])
            if whole and all(name in result for name in self.dependencies[group]):
                result[group] = record
            elif not self.read_only:
                self.run.forget(group, shard.name)
        return result

    def _changed_input(self, shard: Shard, group: str, record: Mapping[str, object]) -> str:
        return (
            f"{self.run.root}: shard {shard.name} of {group} was made from other input rows "
            f"({record['input_rows']} rows then, {shard.num_rows} now): the source or shard_size changed.\n"
            "Restore the source, choose another --out, or rebuild the changed shards with --restart."
        )


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
