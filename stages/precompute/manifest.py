"""Writes the store's manifest from the completion records: all files of the store with their checksums."""

from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import imagen_core.store as store_format
from pipeline.engine.ledger import damaged_fingerprint, read_group_fingerprint
from pipeline.engine.retries import retry_origins
from pipeline.errors import ConfigError
from pipeline.plan import Show
from pipeline.stage import Group
from pipeline.storage.record import Record, shard_name
from pipeline.storage.run_folder import STORE, RunFolder
from stages.captioners.base import CaptionerConfig
from stages.duplicates.config import DuplicatesConfig
from stages.duplicates.find import Duplicates, find_duplicates
from stages.precompute.captioning.make import identity_file
from stages.precompute.embedding_files import SharedFiles
from stages.precompute.fetch import NUM_REMOVALS, ORIGINALS, SAMPLES
from stages.sources.annotations import CaptionColumn
from stages.stores import previous_header, run_removals

_WRITER = "imagen-precompute"
_COMPARED = "state/removals/compared.json"
"""How many removals all finished samples were compared with."""


def build_manifest(
    run: RunFolder,
    input_rows: int,
    failed_shards: Collection[int] = (),
    duplicates: DuplicatesConfig | None = None,
    filtered: int = 0,
    show: Show = lambda _: None,
    captions: Sequence[CaptionColumn | CaptionerConfig] = (),
) -> dict[str, object]:
    """Writes STORE/manifest.json for all groups that are finished for every shard of `samples` that did not fail.

    Streams the records, so that memory does not grow with the number of shards. The same records give the
    same bytes. Nothing is listed by its bytes alone: each file has the digest that was recorded when it was written.

    Args:
        input_rows: rows of the source, as the driver counted them.
        filtered: rows that `source.where` left out; they are none of `input_rows`.
        failed_shards: indices of shards with a group that failed; readers see none of their rows.
        duplicates: what is done about them; None does not look for any.
        show: shows how far the search for duplicates is.
        captions: the sets of captions, if they have names.
    Returns:
        Entries for the run's summary.
    Raises:
        MachineError: the log of removals, a file of hashes, or one that belongs to no shard was changed since it was
            written.
        ConfigError: an image of `duplicates.exclude` cannot be read.
    """
    failed = frozenset(failed_shards)
    started = run.started_groups()
    groups = {SAMPLES: run_group(run, SAMPLES), **_complete_groups(run, started, failed)}
    totals = {"num_samples": 0}
    previous = previous_header(run)
    header: dict[str, object] = {
        "writer": _WRITER,
        "input_rows": input_rows,
        "groups": {name: _describe(run, name, config) for name, config in groups.items()},
        **({"failed_shards": sorted(failed)} if failed else {}),
        **({"filtered": filtered} if filtered else {}),
        **({"captions": [{"name": each.called, "weight": each.weight} for each in captions]} if captions else {}),
    }
    removals = _all_removals(run, previous)
    if removals:
        header["removals"] = store_format.removal_entries(removals)
    found = Duplicates()
    if store_format.HASHES_GROUP in started:
        found = _duplicates(run, duplicates, list(groups), failed, removals, show)
    with run.storage.writing(f"{STORE}/manifest.json") as path:
        store_format.write_manifest(path, header, _shards(run, list(groups), failed, removals, found, totals))
    return {
        "num_samples": totals["num_samples"],
        **({"filtered": filtered} if filtered else {}),
        "store": run.store_url,
        "groups_in_store": sorted(groups),
        **({"duplicates": dict(found.summary)} if duplicates is not None else {}),
    }


def _duplicates(
    run: RunFolder,
    config: DuplicatesConfig | None,
    groups: list[str],
    failed: frozenset[int],
    removals: list[store_format.Removal],
    show: Show,
) -> Duplicates:
    """The duplicates among the rows that readers see otherwise."""
    if config is None:
        return find_duplicates(run, None, (), {}, show)
    gone: dict[int, set[int]] = {}
    for group in groups:
        for record in run.records(group):
            for rows in record.info.get("excluded_rows", {}).values():
                gone.setdefault(record.shard, set()).update(rows)
    for shard in {shard for removal in removals for shard in removal.rows}:
        samples = run.read_record(SAMPLES, shard_name(shard))
        if samples is not None:
            gone.setdefault(shard, set()).update(_removed(run, samples, removals))
    shards = sorted(set(run.recorded_shards(SAMPLES)) - failed)
    return find_duplicates(run, config, shards, gone, show)


def run_group(run: RunFolder, name: str) -> dict[str, object]:
    """The configuration a group was made with.

    Raises:
        ConfigError: its file is damaged.
    """
    fingerprint = read_group_fingerprint(run, name)
    assert fingerprint is not None, name
    config = fingerprint["config"]
    assert isinstance(config, dict)
    try:
        store_format.parse_group(name, config)
    except ValueError as error:
        raise damaged_fingerprint(run, name, error) from error
    return config


def check_store_group(group: Group) -> None:
    """Refuses a group that no manifest could describe, before anything of it is made.

    Raises:
        ConfigError: its configuration is not that of a kind of group.
    """
    try:
        parsed = store_format.parse_group(group.name, dict(group.config))
        if isinstance(parsed, store_format.OtherGroup):
            raise ValueError(f"group {group.name!r}: unknown kind {parsed.kind!r}")
    except ValueError as error:
        raise ConfigError(
            f"{error}, so the store cannot hold it; derive the stage from "
            "stages.arrays.base.ArrayStageConfig (docs/how-to/add-a-stage.md)"
        ) from error


def _complete_groups(run: RunFolder, started: list[str], failed: frozenset[int]) -> dict[str, dict[str, object]]:
    """Groups with a record for every shard that did not fail, also of earlier configurations of the folder."""
    shards = set(run.recorded_shards(SAMPLES)) - failed
    result = {}
    for group in started:
        if group in (ORIGINALS, SAMPLES):
            continue
        config = run_group(run, group)
        if shards.issubset(run.recorded_shards(group)) and _has_null(run, config):
            result[group] = config
    of_sets = {
        group: store_format.captions_group(str(c["set"])) for group, c in result.items() if c["kind"] == "set_text"
    }
    return {group: config for group, config in result.items() if of_sets.get(group, group) in result}


def _has_null(run: RunFolder, config: dict[str, object]) -> bool:
    return (
        not _wants_null(config)
        or run.storage.size(f"{STORE}/{store_format.null_path(str(config['encoder']))}") is not None
    )


def _wants_null(config: dict[str, object]) -> bool:
    """Whether the group has the encoding of ""; embeddings that came with the data may have none."""
    return config["kind"] == "text" and config.get("null", "") is not None


def _describe(run: RunFolder, group: str, config: dict[str, object]) -> dict[str, object]:
    if config["kind"] == "captions":
        return _with_model(run, config)
    if not _wants_null(config):
        return config
    shared = SharedFiles(run, group)
    encoder = str(config["encoder"])
    described = {**config, "null": shared.entry(store_format.null_path(encoder))}
    probe = store_format.probe_path(encoder)
    if run.storage.size(f"{STORE}/{probe}") is not None:  # earlier versions recorded none
        entry = shared.entry(probe)
        taken_in = run.storage.read_json(f"{STORE}/{probe}")["environment"]
        described[store_format.PROBE] = {**entry, "environment": taken_in}
    return described


def _with_model(run: RunFolder, config: dict[str, object]) -> dict[str, object]:
    """A set of captions with what was found out about the model that wrote them."""
    kept = run.storage.read_json(identity_file(str(config["set"])))
    made_by = config.get("made_by")
    if kept is None or not isinstance(made_by, dict):
        return config
    return {**config, "made_by": {**made_by, "found": kept["model"]}}


def _all_removals(run: RunFolder, previous: dict[str, Any]) -> list[store_format.Removal]:
    """The log of removals, once the samples that came while the run was at work are in it too.

    A removal that is logged while a run is at work has the rows of the shards that were finished then, and the run
    drops what it meets later. What it had in its hands at that moment is found here.
    """
    removals = run_removals(run, previous)
    compared = run.storage.read_json(_COMPARED) or 0
    while any(removal.at_work for removal in removals[compared:]):
        found = store_format.find_blocked(_behind(run, len(removals)), removals)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        reason = "requested before, while the run was at work"
        try:
            store_format.add_removal(store_format.StoreFolder(run.store_url), removals, found, {}, time, reason)
        except store_format.RemovalRaceError:
            removals = run_removals(run, previous)
            continue
        compared = len(removals)
        run.storage.write_json(_COMPARED, compared)
        removals = run_removals(run, previous)
    return removals


def _behind(run: RunFolder, num_removals: int) -> Iterator[tuple[int, store_format.SamplesFile, dict[int, str]]]:
    """The samples that were compared with fewer removals; of earlier versions' records none, as nobody could remove
    samples while they ran."""
    for record in run.records(SAMPLES):
        if record.info.get(NUM_REMOVALS, num_removals) < num_removals:
            yield record.shard, _samples(run, record), {}


def _samples(run: RunFolder, record: Record) -> store_format.SamplesFile:
    copy = run.proven_copy(record.file)
    try:
        return store_format.SamplesFile(str(copy), record.file.path)
    finally:
        run.storage.release(copy)


def _shards(
    run: RunFolder,
    groups: list[str],
    failed: frozenset[int],
    removals: list[store_format.Removal],
    duplicates: Duplicates,
    totals: dict[str, int],
) -> Iterator[dict[str, object]]:
    origins = retry_origins(run)
    touched = {shard for removal in removals for shard in removal.rows}
    read = lambda shard: {group: run.read_record(group, shard_name(shard)) for group in groups}  # noqa: E731
    for records in run.storage.map(read, sorted(set(run.recorded_shards(SAMPLES)) - failed)):
        samples = records[SAMPLES]
        assert samples is not None
        shard = samples.shard
        files: dict[str, object] = {}
        excluded = _removed(run, samples, removals) if shard in touched else {}
        for group, record in records.items():
            assert record is not None
            for reason, listed in record.info.get("excluded_rows", {}).items():
                for row in listed:
                    excluded.setdefault(row, reason)
            files[group] = _record_entry(record)
        excluded |= duplicates.excluded(shard)
        rows = samples.rows
        totals["num_samples"] += rows - len(excluded)
        by_reason = {reason: sorted(r for r in excluded if excluded[r] == reason) for reason in excluded.values()}
        retry_of = {"retry_of": origins[shard]} if shard in origins else {}
        yield {"index": shard, "rows": rows, "files": files, "excluded": by_reason, **retry_of}


def _removed(run: RunFolder, record: Record, removals: list[store_format.Removal]) -> dict[int, str]:
    removed = store_format.removed_rows(removals, record.shard, _samples(run, record))
    return {row: entry.excluded for row, entry in removed.items()}


def _record_entry(record: Record) -> dict[str, object]:
    return {
        "path": record.file.path.removeprefix(f"{STORE}/"),
        "bytes": record.file.bytes,
        "sha256": record.file.sha256,
        "rows": record.info.get("captions", record.rows),
    }
