"""Who wrote the captions of a sample: a model, with its prompt and seed, or the data that they came with."""

from collections.abc import Mapping
from typing import Any

from imagen_core.store import CaptionsGroup, RowCaptions, SampleRow, Store
from pipeline.engine.ledger import read_group_fingerprint
from pipeline.fingerprint import digest
from pipeline.storage.run_folder import RunFolder
from stages.captioners.base import attempt_of
from stages.captioners.prompt import Prompt
from stages.precompute.fetch import ORIGINALS

_PLACES = ("caption_column", "caption_field", "captions", "path", "column")
"""Settings of a source, and of a set that came with data, that say where its captions are."""
_SHOWN_DIGITS = 12


def caption_origins(store: Store, position: int, row: int, run: RunFolder | None) -> dict[str, dict[str, Any]]:
    """Who wrote the captions of a sample, by set.

    Each has its `captions` in their order, each with its `text` and, where a model wrote it, `seed`, `finish_reason`
    and `attempt` (1 is the first; None: another seed than the captioner's); further
    - of a captioner: `captioner`, its `kind`, `model`, `prompt` as it was asked about this sample, all that is known
      about it (`made_by`), and `fingerprint`, the SHA-256 of that;
    - of another set: `kind`, of the first one `source`, and the settings that say where it came from (`place`).

    Args:
        position: of the shard.
        run: the run around the store, which knows the source of the first set.
    Raises:
        StoreError: a file is missing or unreadable.
        ConfigError: the run's record of the source is damaged.
    """
    files = store.shard(position)
    sample, captions = files.samples.row(row), store.manifest.captions
    return {
        name: _of_set(captions[name], files.caption_sets[name].row(row), sample, store)
        if name in captions
        else {**_of_source(run), "captions": [{"text": text} for text in sample.captions]}
        for name in store.caption_sets
    }


def _of_source(run: RunFolder | None) -> dict[str, Any]:
    """The source of the captions of `samples`, as far as the run folder tells."""
    started = None if run is None else read_group_fingerprint(run, ORIGINALS)
    config: Any = {} if started is None else started["config"]
    return {"kind": "source", **({"source": config["source"]} if "source" in config else {}), "place": _place(config)}


def _place(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in _PLACES if config.get(name) is not None}


def _of_set(group: CaptionsGroup, found: RowCaptions, sample: SampleRow, store: Store) -> dict[str, Any]:
    made_by = group.made_by
    captions: list[dict[str, Any]] = [{"text": text} for text in found.captions]
    for caption, seed, finish_reason in zip(captions, found.seeds, found.finish_reasons, strict=False):
        attempt = attempt_of(made_by["seed"], sample.key, seed) if "seed" in made_by else None
        number = None if attempt is None else attempt + 1
        caption |= {"seed": seed, "finish_reason": finish_reason or None, "attempt": number}
    if "prompt" not in made_by:
        return {"kind": made_by.get("kind"), "place": _place(made_by), "captions": captions}
    return {
        "captioner": group.caption_set,
        "kind": made_by.get("kind"),
        "model": made_by.get("model"),
        "prompt": _asked(made_by["prompt"], sample, store),
        "fingerprint": digest(made_by),
        "made_by": made_by,
        "captions": captions,
    }


def _asked(prompt: str, sample: SampleRow, store: Store) -> str:
    """The prompt with the sample's values; as it is where it is not in the language of `Prompt`."""
    try:
        return Prompt(prompt, store.columns).fill(sample)
    except ValueError:
        return prompt


def origin_line(origin: Mapping[str, Any]) -> str:
    """Who wrote the captions of a set, for people; "" if that is not known."""
    if "captioner" not in origin:
        of = origin.get("source", "") if origin["kind"] == "source" else origin["kind"]
        parts = [*([str(of)] if of else []), *(f"{name} {value}" for name, value in origin["place"].items())]
        return f"from {', '.join(parts)}" if parts else ""
    known = origin["made_by"].get("found") or {}
    named = known.get("answers_as")
    answers = f" (answers as {named})" if named not in (None, origin["model"]) else ""
    by = f"by {origin['captioner']}: {origin['kind']}, model {origin['model']}{answers}"
    return f"{by}, fingerprint {origin['fingerprint'][:_SHOWN_DIGITS]}"


def made_line(caption: Mapping[str, Any]) -> str:
    """How a model came to one caption, for people; "" of others."""
    if "seed" not in caption:
        return ""
    attempt = "attempt not known" if caption["attempt"] is None else f"attempt {caption['attempt']}"
    return f"{attempt}, seed {caption['seed']}, finish reason {caption['finish_reason'] or 'not known'}"
