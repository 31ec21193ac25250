"""What the report of a run or a store shows."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from imagen_core.store import SAMPLES_GROUP, Store
from pipeline.storage.events import read_events
from pipeline.storage.run_folder import SUMMARY, RunFolder
from stages.browse.report.captioners import captioner_sections
from stages.browse.report.histograms import count_chart, image_shapes, shape_charts
from stages.browse.report.images import caption_tokens, dropped_images, image_grid
from stages.browse.web import part
from stages.duplicates.find import duplicates_line, read_duplicates
from stages.precompute.caption_losses import caption_losses
from stages.precompute.crops import Crops, crops_line, crops_of
from stages.precompute.quantisation import quantisation_summary
from stages.store_tools.comparison import compare_with_plan, comparison_lines
from stages.store_tools.dropped import first_drops
from stages.stores import group_bytes

_NUM_IMAGES = 24
_NUM_DROPS = 100
_NUM_EXAMPLES = 6


def store_content(store: Store, run: RunFolder) -> dict[str, Any]:
    """Collects it.

    Args:
        run: the folder around the store; one without the files of a run where the store lies by itself.
    Raises:
        StoreError, PipelineError, OSError: a file cannot be read.
    """
    sizes = group_bytes(store)
    summary = run.read_engine_file(SUMMARY)
    dropped = first_drops(run, _NUM_DROPS)
    shapes = image_shapes(store)
    images = image_grid(store, _NUM_IMAGES)
    return {
        "title": run.url.rpartition("/")[2],
        "num_samples": len(store),
        "num_shards": store.manifest.num_shards,
        "input_rows": summary["tally"]["input_rows"] if summary else None,
        "filtered": store.manifest.filtered,
        "seconds": summary["seconds"] if summary else None,
        "outcome": summary["outcome"] if summary else None,
        "groups": [
            {"name": name, "bytes": size, "per_sample": size / max(1, len(store))} for name, size in sizes.items()
        ],
        "total_bytes": sum(sizes.values()),
        "drops": _drops(summary),
        "dropped_rows": dropped,
        "dropped_images": part(lambda: dropped_images(run, dropped)),
        "duplicates": summary.get("duplicates") if summary else None,
        "duplicate_rows": list(islice(read_duplicates(run), _NUM_DROPS)),
        "int8": _of_groups(summary, quantisation_summary),
        "losses": _of_groups(summary, caption_losses),
        "crops": crops.to_json() if (crops := _crops(summary)) else None,
        "first_set": next(iter(store.caption_sets)),
        "captioners": captioner_sections(store, run, summary),
        "examples": {
            name: [image for image in images if image["caption_sets"][name]][:_NUM_EXAMPLES]
            for name in store.manifest.captions
        },
        "throughput": _throughput(run),
        "planned": compare_with_plan(run, sizes),
        "encoders": {name: group.fingerprint for name, group in store.manifest.texts.items()},
        "captions": {
            name: (len(counts), count_chart(f"tokens per caption of {name}, end of sequence included", counts))
            for name, counts in _caption_tokens(store).items()
        },
        "images": images,
        "num_shapes": len(shapes),
        "shape_charts": shape_charts(shapes),
    }


def _caption_tokens(store: Store) -> dict[str, list[int]]:
    """Token counts by encoder, and by encoder and further set of captions."""
    first = next(iter(store.caption_sets))
    counts = {name: caption_tokens(store, name, first) for name in store.encoders}
    sets = store.manifest.set_texts
    return counts | {f"{name}, {of}": caption_tokens(store, name, of) for name, of in sets if name in counts}


def _drops(summary: dict[str, Any] | None) -> list[dict[str, object]]:
    if summary is None:
        return []
    return [
        {"group": name, "reason": reason, "count": count}
        for name, group in summary["tally"]["groups"].items()
        for reason, count in sorted(group["drops"].items(), key=lambda item: -item[1])
    ]


def _of_groups(
    summary: dict[str, Any] | None, part: Callable[[Mapping[str, float]], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """What `part` makes of the counters of each group, where it makes something."""
    groups = summary["tally"]["groups"] if summary else {}
    content = {name: part(group["counters"]) for name, group in groups.items()}
    return {name: part for name, part in content.items() if part}


def _crops(summary: dict[str, Any] | None) -> Crops | None:
    samples = summary["tally"]["groups"].get(SAMPLES_GROUP) if summary else None
    return crops_of(samples["counters"]) if samples else None


def _throughput(run: RunFolder) -> list[dict[str, object]]:
    """Rows and busy seconds of each stage over the whole life of the run folder, from its events.

    The start of a worker, which loads its packages and model, does not count.
    """
    rows: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    shards: dict[str, int] = defaultdict(int)
    for event in read_events(run.storage):
        if event.get("event") == "task":
            rows[event["stage"]] += max((g["rows"] for g in event["groups"].values()), default=0)
            seconds[event["stage"]] += event["seconds"] - event.get("setup_s", 0.0)
            shards[event["stage"]] += 1
    return [
        {
            "stage": stage,
            "shards": shards[stage],
            "rows": rows[stage],
            "busy_s": round(seconds[stage], 2),
            "rows_per_busy_s": round(rows[stage] / seconds[stage], 1) if seconds[stage] else None,
        }
        for stage in rows
    ]


def plain_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content without images and charts, for --json."""
    shown = ("images", "captions", "dropped_images", "num_shapes", "shape_charts", "examples", "first_set")
    return {key: value for key, value in content.items() if key not in shown}


def report_lines(content: Mapping[str, Any]) -> list[str]:
    """For people, on the command line."""
    found = content["duplicates"]
    lines = [f"duplicates  {duplicates_line(found)}"] if found else []
    lines += [f"crops  {crops_line(Crops(**content['crops']))}"] if content["crops"] else []
    return [*lines, *comparison_lines(content["planned"])]
