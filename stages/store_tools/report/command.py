"""Collects the content of the report and renders the page."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib.resources import files
from itertools import islice
from typing import Any

from imagen_core.store import SAMPLES_GROUP, Store, StoreError
from pipeline.commands import CommandResult
from pipeline.errors import ConfigError
from pipeline.storage.events import read_events
from pipeline.storage.run_folder import SUMMARY, RunFolder
from pipeline.units import human_bytes, human_seconds
from stages.duplicates.find import duplicates_line, read_duplicates
from stages.precompute.caption_losses import caption_losses
from stages.precompute.crops import Crops, crops_line, crops_of
from stages.precompute.quantisation import quantisation_summary
from stages.store_tools.dropped import first_drops
from stages.store_tools.report.comparison import compare_with_plan, comparison_lines
from stages.store_tools.report.images import caption_histogram, caption_tokens, image_grid
from stages.stores import group_bytes, open_store, store_folder

_FOLDER = "report"
_PAGE = f"{_FOLDER}/index.html"
_NUM_IMAGES = 24
_NUM_DROPS = 100


def report_command(path: str) -> CommandResult:
    """Writes RUN/report/index.html (or `report/` beside a bare store) and says where it is."""
    store = open_store(path)
    run = RunFolder(store_folder(path).rpartition("/")[0])
    try:
        content = _content(store, run)
    except StoreError as error:
        raise ConfigError(str(error)) from error
    page = f"{run.url}/{_PAGE}"
    run.storage.clean(_FOLDER)
    run.storage.write_text(_PAGE, _render(content))
    result: dict[str, object] = {"report": page, "bytes": run.storage.size(_PAGE), **_plain(content)}
    found = content["duplicates"]
    lines = [f"report  {page}", *([f"duplicates  {duplicates_line(found)}"] if found else [])]
    lines += [f"crops  {crops_line(Crops(**content['crops']))}"] if content["crops"] else []
    return result, [*lines, *comparison_lines(content["planned"])], 0


def _content(store: Store, run: RunFolder) -> dict[str, Any]:
    sizes = group_bytes(store)
    summary = run.read_engine_file(SUMMARY)
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
        "dropped_rows": first_drops(run, _NUM_DROPS),
        "duplicates": summary.get("duplicates") if summary else None,
        "duplicate_rows": list(islice(read_duplicates(run), _NUM_DROPS)),
        "int8": _of_groups(summary, quantisation_summary),
        "losses": _of_groups(summary, caption_losses),
        "crops": crops.to_json() if (crops := _crops(summary)) else None,
        "throughput": _throughput(run),
        "planned": compare_with_plan(run, sizes),
        "encoders": {name: group.fingerprint for name, group in store.manifest.texts.items()},
        "captions": _caption_tokens(store),
        "images": image_grid(store, _NUM_IMAGES),
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


def _render(content: dict[str, Any]) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(human_bytes=human_bytes, human_seconds=human_seconds)
    template = environment.from_string((files("stages.store_tools.report") / "page.html").read_text("utf-8"))
    charts = {name: caption_histogram(lengths) for name, lengths in content["captions"].items()}
    return template.render(**content, charts=charts)


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """The content without images, for --json."""
    return {key: value for key, value in content.items() if key not in ("images", "captions")}
