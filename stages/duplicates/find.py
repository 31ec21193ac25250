"""Finds the duplicates of a whole run, and lists them in RUN/duplicates.jsonl."""

import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imagen_core.store import HASHES_GROUP
from pipeline.fingerprint import digest
from pipeline.plan import Show
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import RunFolder
from stages.duplicates.config import DuplicatesConfig
from stages.duplicates.excluded import ExcludedSets
from stages.duplicates.images import DUPLICATE, EXCLUDED, NEAR, Images
from stages.duplicates.match import match

DUPLICATES = "duplicates.jsonl"
"""The list, relative to the run folder."""
_NAMES = {DUPLICATE: "equal", NEAR: "nearly equal", EXCLUDED: "of the sets of duplicates.exclude"}
_FOUND = "state/duplicates/found.json"
_VERSION = 1
"""Raised when the same images give another list."""
_AGAIN = "delete it: the same `pipeline run` again makes a new one"


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Attributes:
        rows: by shard, the reason for each row that is a duplicate.
        summary: for the summary of the run.
        dropped: whether these rows are no samples.
    """

    rows: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    dropped: bool = False

    def excluded(self, shard: int) -> Mapping[int, str]:
        """The rows of a shard that are no samples, with the reason of each."""
        return self.rows.get(shard, {}) if self.dropped else {}


def find_duplicates(
    run: RunFolder,
    config: DuplicatesConfig | None,
    shards: Sequence[int],
    gone: Mapping[int, Collection[int]],
    show: Show,
) -> Duplicates:
    """Compares the images of these shards, and writes the list; a list of the same images is used again.

    Nothing depends on the order in which shards were made, on earlier runs, or on where one was killed.

    Args:
        config: None deletes the list of an earlier run.
        shards: indices, rising.
        gone: by shard, the rows that readers do not see: nothing is a duplicate of them.
        show: shows how far the search is.
    Raises:
        ConfigError: an image of `duplicates.exclude` cannot be read.
        MachineError: a file of hashes was changed since it was written.
    """
    if config is None:
        run.storage.delete(_FOUND)
        run.storage.delete(DUPLICATES)
        return Duplicates()
    sets = ExcludedSets(config.exclude)
    made_of = digest(
        {
            "version": _VERSION,
            "config": config.model_dump(mode="json"),
            "exclude": sets.identity(),
            "files": [[shard, run.committed_file(HASHES_GROUP, shard_name(shard)).sha256] for shard in shards],
            "gone": sorted((shard, sorted(rows)) for shard, rows in gone.items() if rows),
        }
    )
    known = run.storage.read_json_if_whole(_FOUND)
    if not (isinstance(known, dict) and known.get("made_of") == made_of and run.storage.size(DUPLICATES) is not None):
        run.storage.delete(_FOUND)
        known = {"made_of": made_of, **_write_list(run, config, shards, gone, sets, show)}
        run.storage.write_json(_FOUND, known)
    rows: dict[int, dict[int, str]] = {}
    for entry in read_duplicates(run):
        rows.setdefault(entry["shard"], {})[entry["row"]] = entry["reason"]
    summary = {
        "action": config.action,
        "compared": known["compared"],
        "not_compared": known["not_compared"],
        **{reason: known["found"].get(reason, 0) for reason in (DUPLICATE, NEAR, EXCLUDED)},
        "list": f"{run.url}/{DUPLICATES}",
    }
    return Duplicates(rows, summary, config.action == "drop")


def duplicates_line(summary: Mapping[str, Any]) -> str:
    """The summary of a run's duplicates as text."""
    counts = {name: summary[reason] for reason, name in _NAMES.items()}
    found = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "none"
    done = "dropped" if summary["action"] == "drop" else "kept (duplicates=drop drops them)"
    return f"{found}, of {summary['compared']:,} images" + (
        f"; {done}; see {summary['list']}" if found != "none" else ""
    )


def _write_list(
    run: RunFolder,
    config: DuplicatesConfig,
    shards: Sequence[int],
    gone: Mapping[int, Collection[int]],
    sets: ExcludedSets,
    show: Show,
) -> dict[str, object]:
    """Compares the images and writes the list; returns what the summary says of it."""
    scratch, named = run.storage.new_folder(), lambda text: show(f"duplicates: {text}")
    try:
        images = Images(run, shards, gone, sets, scratch, named)
        thumbnails = images.thumbnails if config.near else None
        found = match(images.pixels, images.perceptual, len(images.excluded), thumbnails, named)
        entries = list(images.entries(found, dropped=config.action == "drop"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    run.storage.write_json_lines(DUPLICATES, entries)
    counts = Counter(entry["reason"] for entry in entries)
    return {"compared": images.compared, "not_compared": images.not_compared, "found": dict(counts)}


def read_duplicates(run: RunFolder) -> Iterator[dict[str, Any]]:
    """The entries of the list, by shard and row: key, shard, row, reason, whether it is dropped, and the image that it
    is a duplicate of (`same_as`: key, shard and row; or the set of `duplicates.exclude` and the name there).

    Raises:
        ConfigError: the list is damaged.
    """
    if run.storage.size(DUPLICATES) is not None:
        yield from run.storage.read_json_lines(DUPLICATES, _AGAIN)
