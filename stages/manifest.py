"""Writes the store's manifest from the completion records: what was cached, and the proof of it."""

from collections.abc import Iterator
from pathlib import Path

import imagen_core.store as store_format
from pipeline.files import file_digest
from pipeline.retries import retry_origins
from pipeline.runfolder import Record, RunFolder
from pipeline.state import read_group_fingerprint
from stages.fetch import ORIGINALS, SAMPLES

_WRITER = "imagen-precompute"


def build_manifest(run: RunFolder, input_rows: int) -> dict[str, object]:
    """Writes STORE/manifest.json for all groups that are finished for every shard of `samples`.

    Streams the records, so that memory does not grow with the number of shards. The same records give the
    same bytes.

    Args:
        input_rows: rows of the source, as the driver counted them.
    Returns:
        Facts for the run's summary.
    """
    groups = {SAMPLES: run_group(run, SAMPLES), **_complete_groups(run)}
    run.store.mkdir(parents=True, exist_ok=True)
    totals = {"num_samples": 0}
    header = {
        "schema_version": store_format.SCHEMA_VERSION,
        "writer": _WRITER,
        "input_rows": input_rows,
        "groups": {name: _describe(run, config) for name, config in groups.items()},
    }
    store_format.write_manifest(run.store / "manifest.json", header, _shards(run, list(groups), totals))
    return {"num_samples": totals["num_samples"], "store": str(run.store), "groups_in_store": sorted(groups)}


def run_group(run: RunFolder, name: str) -> dict[str, object]:
    """The configuration a group was made with."""
    fingerprint = read_group_fingerprint(run, name)
    assert fingerprint is not None, name
    config = fingerprint["config"]
    assert isinstance(config, dict)
    return config


def _complete_groups(run: RunFolder) -> dict[str, dict[str, object]]:
    """Groups with a record for every shard, also those of earlier configurations of this run folder."""
    state = run.root / "state"
    shards = set(run.recorded_shards(SAMPLES))
    result = {}
    for path in sorted(state.glob("*.json")):
        if path.stem in (ORIGINALS, SAMPLES):
            continue
        config = run_group(run, path.stem)
        if shards.issubset(run.recorded_shards(path.stem)) and _has_null(run, config):
            result[path.stem] = config
    return result


def _has_null(run: RunFolder, config: dict[str, object]) -> bool:
    return config["kind"] != "text" or (run.store / store_format.null_path(str(config["encoder"]))).is_file()


def _describe(run: RunFolder, config: dict[str, object]) -> dict[str, object]:
    if config["kind"] != "text":
        return config
    path = store_format.null_path(str(config["encoder"]))
    return {**config, "null": _file_entry(run, path)}


def _shards(run: RunFolder, groups: list[str], totals: dict[str, int]) -> Iterator[dict[str, object]]:
    origins = retry_origins(run)
    for samples in run.records(SAMPLES):
        shard = int(str(samples["shard"]))
        files: dict[str, object] = {}
        excluded: dict[int, str] = {}
        for group in groups:
            record = run.read_record(group, f"{shard:05d}")
            assert record is not None
            info = record["info"]
            assert isinstance(info, dict)
            for reason, listed in info.get("excluded_rows", {}).items():
                for row in listed:
                    excluded.setdefault(row, reason)
            files[group] = _record_entry(run, record, info.get("captions"))
        rows = int(str(samples["rows"]))
        totals["num_samples"] += rows - len(excluded)
        by_reason = {reason: sorted(r for r in excluded if excluded[r] == reason) for reason in excluded.values()}
        retry_of = {"retry_of": origins[shard]} if shard in origins else {}
        yield {"index": shard, "rows": rows, "files": files, "excluded": by_reason, **retry_of}


def _record_entry(run: RunFolder, record: Record, captions: object) -> dict[str, object]:
    files = record["files"]
    assert isinstance(files, list)
    file = files[0]
    return {
        "path": Path(file["path"]).relative_to(run.store.relative_to(run.root)).as_posix(),
        "bytes": file["bytes"],
        "sha256": file["sha256"],
        "rows": record["rows"] if captions is None else captions,
    }


def _file_entry(run: RunFolder, relative: str) -> dict[str, object]:
    path = run.store / relative
    return {"path": relative, "bytes": path.stat().st_size, "sha256": file_digest(path)}
