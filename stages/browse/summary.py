"""What a place holds, in a few words, for the index page."""

import json
from contextlib import suppress

from imagen_core.store import StoreFolder, load_manifest
from pipeline.storage.open import open_storage
from pipeline.storage.run_folder import METRICS, PLAN, SUMMARY, RunFolder
from stages.browse.places import Place

_LAST_BYTES = 64 * 2**10


def summary_of(place: Place) -> str:
    """Counts of samples, shards, steps, images or rows of results.

    Raises:
        StoreError, PipelineError, OSError: it cannot be read.
    """
    return {
        "store": _store,
        "run": _run,
        "training": _training,
        "sampling": _sampling,
        "evaluation": _evaluation,
    }[place.kind](place.url)


def _store(url: str) -> str:
    folder = StoreFolder(url)
    if not folder.exists("manifest.json"):
        return "not finished: no manifest yet"
    manifest = load_manifest(folder)
    return f"{manifest.num_samples:,} samples in {manifest.num_shards:,} shards"


def _run(url: str) -> str:
    run = RunFolder(url)
    plan, summary = run.read_engine_file(PLAN) or {}, run.read_engine_file(SUMMARY) or {}
    groups = [name for stage in plan.get("stages", ()) for name in stage["groups"]]
    kept = [name for name in groups if name not in plan.get("transient_groups", ())]
    shards = {name: sum(1 for _ in run.recorded_shards(name)) for name in kept}
    counts = ", ".join(f"{name} {count:,}" for name, count in shards.items())
    return f"{summary.get('outcome', 'not finished')}; shards: {counts or 'none'}"


def _training(url: str) -> str:
    storage = open_storage(url)
    size = storage.size(METRICS) or 0
    last = storage.read_part(METRICS, max(0, size - _LAST_BYTES), _LAST_BYTES) if size else b""
    for line in reversed(last.splitlines()):  # a kill may have cut the last one
        with suppress(ValueError, KeyError, TypeError):
            return f"step {int(json.loads(line)['step']):,}"
    return "no step yet"


def _sampling(url: str) -> str:
    storage = open_storage(url)
    folders = [name for name, is_folder in storage.entries() if is_folder and name.startswith("images-")]
    counts = {name: sum(each.endswith(".png") for each in storage.names(name)) for name in folders}
    return ", ".join(f"{count:,} images of {name.partition('-')[2]} px" for name, count in sorted(counts.items())) or (
        "no images yet"
    )


def _evaluation(url: str) -> str:
    results = open_storage(url).read_json("results.json") or {}
    return f"{len(results.get('rows', ())):,} rows of results"
