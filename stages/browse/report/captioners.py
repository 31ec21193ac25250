"""What the report says of each captioner: who it is, what it took, how often it was asked, and what was wrong."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from imagen_core.store import CaptionsGroup, Store
from pipeline.fingerprint import digest
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import CONFIG, RunFolder
from stages.browse.report.histograms import spread_shards
from stages.captioners.base import attempt_of
from stages.captioners.budget import Price
from stages.precompute.captioning.make import TRIED, USED

_COUNTED = ("captions", "samples_without", *USED)


def captioner_sections(store: Store, run: RunFolder, summary: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Of each set of captions that a model wrote: `name`, `kind`, `model`, `prompt`, `fingerprint`; from the summary
    `counts` of captions, samples without one, requests and tokens, `reasons` of samples without a caption, and `cost`
    where the configuration has a price; from up to 64 shards `attempts`, see `_attempts`.

    Raises:
        StoreError: a file of captions is missing or unreadable.
    """
    groups = summary["tally"]["groups"] if summary else {}
    made = [group for group in store.manifest.captions.values() if "prompt" in group.made_by]
    prices = _prices(run) if made else {}
    return [_section(store, run, group, groups.get(group.name), prices.get(group.caption_set)) for group in made]


def _section(
    store: Store, run: RunFolder, group: CaptionsGroup, tally: Mapping[str, Any] | None, price: Price | None
) -> dict[str, Any]:
    made_by = group.made_by
    counters = tally["counters"] if tally else {}
    counts = {name: int(counters[name]) for name in _COUNTED if name in counters}
    has_tokens = price is not None and "tokens_in" in counts
    return {
        "name": group.caption_set,
        **{name: made_by.get(name) for name in ("kind", "model", "prompt")},
        "fingerprint": digest(made_by),
        "counts": counts,
        "cost": price.of(counts["tokens_in"], counts["tokens_out"]) if price is not None and has_tokens else None,
        "reasons": dict(sorted(tally["drops"].items(), key=lambda item: -item[1])) if tally else {},
        "attempts": _attempts(store, run, group),
    }


def _attempts(store: Store, run: RunFolder, group: CaptionsGroup) -> dict[str, Any]:
    """How often it was asked about the samples of up to 64 shards that are spread over the store.

    Returns:
        `captions`: captions by the attempt that made them, 1 is the first; `without`: samples without a caption by the
        number of attempts, as far as the run folder tells; `all_shards`: whether these are all.
    """
    seed = group.made_by.get("seed")
    captions, without, positions = Counter[int](), Counter[int](), spread_shards(store)
    for position in positions:
        files, name = store.shard(position), shard_name(int(store.manifest.index[position]))
        for row, found in enumerate(files.caption_sets[group.caption_set].rows()):
            if seed is not None and found.seeds:
                attempt = attempt_of(seed, files.samples.key(row), found.seeds[0])
                captions.update([] if attempt is None else [attempt + 1])
        record = run.read_record(group.name, name)
        without.update(record.info.get(TRIED, {}).values() if record is not None else ())
    is_all = len(positions) == len([rows for rows in store.manifest.rows.tolist() if rows])
    return {"captions": dict(sorted(captions.items())), "without": dict(sorted(without.items())), "all_shards": is_all}


def _prices(run: RunFolder) -> dict[str, Price]:
    """The prices in the run's configuration by captioner; those of one that cannot be read are left out."""
    if run.storage.size(CONFIG) is None:
        return {}
    try:
        tree: Any = yaml.safe_load(run.storage.read(CONFIG))
        given = {each["name"]: each.get("price_per_million") for each in tree.get("captioners", ())}
        return {n: TypeAdapter[Price](Price).validate_python(price) for n, price in given.items() if price is not None}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValidationError):
        return {}
