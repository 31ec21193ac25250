"""Writes the store's manifest from the completion records: all files of the store with their checksums."""

import hashlib
from collections.abc import Collection, Iterator

import imagen_core.store as store_format
from pipeline.engine.ledger import read_group_fingerprint
from pipeline.engine.retries import retry_origins
from pipeline.storage.record import Record, shard_name
from pipeline.storage.run_folder import STORE, RunFolder
from stages.precompute.fetch import ORIGINALS, SAMPLES

_WRITER = "imagen-precompute"


def build_manifest(run: RunFolder, input_rows: int, failed_shards: Collection[int] = ()) -> dict[str, object]:
    """Writes STORE/manifest.json for all groups that are finished for every shard of `samples` that did not fail.

    Streams the records, so that memory does not grow with the number of shards. The same records give the
    same bytes.

    Args:
        input_rows: rows of the source, as the driver counted them.
        failed_shards: indices of shards with a group that failed; readers see none of their rows.
    Returns:
        Entries for the run's summary.
    """
    failed = frozenset(failed_shards)
    groups = {SAMPLES: run_group(run, SAMPLES), **_complete_groups(run, failed)}
    totals = {"num_samples": 0}
    header: dict[str, object] = {
        "schema_version": store_format.SCHEMA_VERSION,
        "writer": _WRITER,
        "input_rows": input_rows,
        "groups": {name: _describe(run, config) for name, config in groups.items()},
        **({"failed_shards": sorted(failed)} if failed else {}),
    }
    removals = store_format.load_removals(store_format.StoreFolder(run.store_url))
    if removals:
        header["removals"] = store_format.removal_entries(removals)
    with run.storage.writing(f"{STORE}/manifest.json") as path:
        store_format.write_manifest(path, header, _shards(run, list(groups), failed, removals, totals))
    return {"num_samples": totals["num_samples"], "store": run.store_url, "groups_in_store": sorted(groups)}


def run_group(run: RunFolder, name: str) -> dict[str, object]:
    """The configuration a group was made with."""
    fingerprint = read_group_fingerprint(run, name)
    assert fingerprint is not None, name
    config = fingerprint["config"]
    assert isinstance(config, dict)
    return config


def _complete_groups(run: RunFolder, failed: frozenset[int]) -> dict[str, dict[str, object]]:
    """Groups with a record for every shard that did not fail, also of earlier configurations of the folder."""
    shards = set(run.recorded_shards(SAMPLES)) - failed
    result = {}
    for group in run.started_groups():
        if group in (ORIGINALS, SAMPLES):
            continue
        config = run_group(run, group)
        if shards.issubset(run.recorded_shards(group)) and _has_null(run, config):
            result[group] = config
    return result


def _has_null(run: RunFolder, config: dict[str, object]) -> bool:
    return (
        not _wants_null(config)
        or run.storage.size(f"{STORE}/{store_format.null_path(str(config['encoder']))}") is not None
    )


def _wants_null(config: dict[str, object]) -> bool:
    """Whether the group has the encoding of ""; embeddings that came with the data may have none."""
    return config["kind"] == "text" and config.get("null", "") is not None


def _describe(run: RunFolder, config: dict[str, object]) -> dict[str, object]:
    if not _wants_null(config):
        return config
    encoder = str(config["encoder"])
    described = {**config, "null": _file_entry(run, store_format.null_path(encoder))}
    probe = store_format.probe_path(encoder)
    if run.storage.size(f"{STORE}/{probe}") is not None:  # earlier versions recorded none
        taken_in = run.storage.read_json(f"{STORE}/{probe}")["environment"]
        described[store_format.PROBE] = {**_file_entry(run, probe), "environment": taken_in}
    return described


def _shards(
    run: RunFolder,
    groups: list[str],
    failed: frozenset[int],
    removals: list[store_format.Removal],
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
        excluded = _removed(run, shard, removals) if shard in touched else {}
        for group, record in records.items():
            assert record is not None
            for reason, listed in record.info.get("excluded_rows", {}).items():
                for row in listed:
                    excluded.setdefault(row, reason)
            files[group] = _record_entry(record)
        rows = samples.rows
        totals["num_samples"] += rows - len(excluded)
        by_reason = {reason: sorted(r for r in excluded if excluded[r] == reason) for reason in excluded.values()}
        retry_of = {"retry_of": origins[shard]} if shard in origins else {}
        yield {"index": shard, "rows": rows, "files": files, "excluded": by_reason, **retry_of}


def _removed(run: RunFolder, shard: int, removals: list[store_format.Removal]) -> dict[int, str]:
    name = run.committed_file(SAMPLES, shard_name(shard))
    copy = run.storage.copy(name)
    try:
        removed = store_format.removed_rows(removals, shard, store_format.SamplesFile(str(copy), name))
    finally:
        run.storage.release(copy)
    return {row: entry.excluded for row, entry in removed.items()}


def _record_entry(record: Record) -> dict[str, object]:
    return {
        "path": record.file.path.removeprefix(f"{STORE}/"),
        "bytes": record.file.bytes,
        "sha256": record.file.sha256,
        "rows": record.info.get("captions", record.rows),
    }


def _file_entry(run: RunFolder, relative: str) -> dict[str, object]:
    data = run.storage.read(f"{STORE}/{relative}")
    return {"path": relative, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
