"""`pipeline inspect STORE --key K`: what became of one sample, from its URL to each row made of it."""

import json
from collections.abc import Iterator
from typing import Any

from imagen_core.store import (
    IDENTIFIERS,
    SAMPLES_GROUP,
    ArrayGroup,
    EmbeddingGroup,
    Removal,
    SetTextGroup,
    Store,
    StoreError,
    StoreFolder,
    TextGroup,
    load_removals,
    matching_rows,
    value_digest,
)
from imagen_core.store.files.shard import EmbeddingFile
from imagen_core.store.read.reader import OpenShard
from pipeline.commands import CommandResult
from pipeline.errors import EXIT_FAILED, EXIT_OK, ConfigError
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import QUARANTINE, RunFolder
from stages.duplicates.find import read_duplicates
from stages.store_tools.caption_origins import caption_origins, made_line, origin_line
from stages.store_tools.dropped import drops_of_url

_ANNOTATIONS = ("transcription", "safebox", "label")
_FINGERPRINT = ("model", "revision", "weights_sha256", "max_tokens")


def lineage_command(
    store: Store, folder: StoreFolder, run: RunFolder | None, **requested: str | None
) -> CommandResult:
    """All samples with a key, URL or sha256: in the store, removed, or dropped (by key or URL, in a run folder).

    The URL of a dropped row is looked for in the source. Files that were changed, or cannot be read, are named; the
    others are searched.

    Raises:
        ConfigError: more than one identifier is given, the log of removals is damaged, or the source has to be read
            and cannot be.
    """
    identifiers = [(name, value) for name, value in requested.items() if value is not None]
    if len(identifiers) != 1:
        raise ConfigError(f"give one of {', '.join('--' + name for name in IDENTIFIERS)}")
    ((name, value),) = identifiers
    try:
        removals = load_removals(folder, listed=store.manifest.listed_removals)
    except StoreError as error:
        raise ConfigError(str(error)) from error
    problems: list[str] = []
    stored = _stored(store, folder, run, removals, name, value, problems)
    found = list(stored) or list(_removed(removals, name, value))
    if run is not None and found:
        _add_duplicates(run, found)
    if run is not None and name == "key":
        found += _dropped(run, value)
    if run is not None and name == "url" and not found:
        found += [_dropped_entry(drop) for drop in drops_of_url(run, value)]
    result: dict[str, object] = {name: value, "found": found, **({"problems": problems} if problems else {})}
    lines = [line for entry in found for line in _lines(entry)] + [f"bad: {problem}" for problem in problems]
    if not found:
        others = " in the other files" if problems else ""
        lines.insert(0, f"{name} {value}: unknown{others}: no sample, removed or dropped row has it")
    return result, lines, EXIT_OK if found and not problems else EXIT_FAILED


def _add_duplicates(run: RunFolder, found: list[dict[str, Any]]) -> None:
    """Adds to samples in the store which image they are duplicates of."""
    at = {(entry["shard"], entry["row"]): entry for entry in found if "row" in entry}
    for duplicate in read_duplicates(run):
        entry = at.get((duplicate["shard"], duplicate["row"]))
        if entry is not None:
            entry["duplicate"] = {name: duplicate[name] for name in ("reason", "match", "mirrored", "same_as")}


def _stored(
    store: Store,
    folder: StoreFolder,
    run: RunFolder | None,
    removals: list[Removal],
    name: str,
    value: str,
    problems: list[str],
) -> Iterator[dict[str, Any]]:
    """The samples in the store; files that are not as they were written are named in `problems`."""
    for position in range(store.manifest.num_shards):
        if store.manifest.rows[position]:
            try:
                entry = store.manifest.file(SAMPLES_GROUP, position)
                assert entry is not None
                folder.check_bytes(entry)
                yield from list(_stored_in(store, run, position, removals, name, value))
            except StoreError as error:
                problems.append(str(error))


def _stored_in(
    store: Store, run: RunFolder | None, position: int, removals: list[Removal], name: str, value: str
) -> Iterator[dict[str, Any]]:
    samples = store.shard(position).samples
    for row, _ in matching_rows(samples, {name: (value,)}):
        yield stored_row(store, position, row, run) | _removal_of(removals, int(store.manifest.index[position]), row)


def stored_row(store: Store, position: int, row: int, run: RunFolder | None = None) -> dict[str, Any]:
    """What became of one row of a store: its source, its captions, who wrote them and, by group, its files, rows,
    shapes and encoder.

    Args:
        run: the run around the store, if there is one.
    Raises:
        StoreError: a file of the row is missing or unreadable.
        ConfigError: like `caption_origins`.
    """
    manifest, sample = store.manifest, store.shard(position).samples.row(row)
    origins = caption_origins(store, position, row, run)
    sets = {name: [caption["text"] for caption in origins[name]["captions"]] for name in manifest.captions}
    reason = manifest.excluded.get(position, {}).get(row)
    return {
        "fate": "stored" if reason is None else "excluded",
        **({} if reason is None else {"reason": reason}),
        "shard": int(manifest.index[position]),
        "row": row,
        "key": sample.key,
        "url": sample.url,
        "sha256": sample.sha256,
        "width": sample.width,
        "height": sample.height,
        "input_row": sample.input_row,
        "retry_of": _retry_of(store, position, sample.input_row),
        **{name: value for name in _ANNOTATIONS if (value := getattr(sample, name)) is not None},
        **({"columns": dict(sample.columns)} if sample.columns else {}),
        "captions": [{"id": i, "text": c} for i, c in zip(sample.caption_ids, sample.captions, strict=True)],
        **({"caption_sets": sets} if sets else {}),
        "written_by": origins,
        "groups": _groups(store, position, row, sample.caption_ids),
    }


def _retry_of(store: Store, position: int, input_row: int) -> dict[str, int] | None:
    """Where the row was tried before."""
    retries = store.manifest.retries.get(position)
    if retries is None:
        return None
    shard, row = retries[input_row].tolist()
    return {"shard": shard, "input_row": row}


def _groups(store: Store, position: int, row: int, caption_ids: tuple[int, ...]) -> dict[str, object]:
    """In each group: the file, the rows in it and, of embeddings, their shapes and who made them."""
    result: dict[str, object] = {}
    files = store.shard(position)
    for name, group in store.manifest.groups.items():
        entry = store.manifest.file(name, position)
        assert entry is not None
        rows = list(caption_ids) if isinstance(group, TextGroup) else [row]
        if isinstance(group, SetTextGroup):
            rows = files.caption_sets[group.caption_set].caption_ids(row)
        details: dict[str, object] = {"file": entry.path, "rows": rows}
        if isinstance(group, EmbeddingGroup):
            opened = _opened(files, group)
            details |= {
                "shapes": [[int(opened.num_tokens[i]), *group.token_shape] for i in rows],
                "dtype": group.dtype,
                "encoder": {key: group.fingerprint[key] for key in _FINGERPRINT if key in group.fingerprint},
            }
        elif isinstance(group, ArrayGroup):
            shape = files.arrays[group.array].shape(row)
            details |= {"shapes": [list(shape)], "dtype": group.spec.dtype, "made_by": group.fingerprint.get("kind")}
        result[name] = details
    return result


def _opened(files: OpenShard, group: EmbeddingGroup) -> EmbeddingFile:
    if isinstance(group, SetTextGroup):
        return files.set_texts[group.encoder, group.caption_set]
    return (files.text if isinstance(group, TextGroup) else files.image_embeds)[group.encoder]


def _removal_of(removals: list[Removal], shard: int, row: int) -> dict[str, object]:
    for number, removal in enumerate(removals, start=1):
        if any(removed.row == row for removed in removal.rows.get(shard, ())):
            return {"fate": "removed", "removal": _removal_entry(number, removal)}
    return {}


def _removed(removals: list[Removal], name: str, value: str) -> Iterator[dict[str, Any]]:
    """Rows that are erased, and requested values that never were in the store."""
    digest = value_digest(name, value)
    numbered = [(removal, _removal_entry(number, removal)) for number, removal in enumerate(removals, start=1)]
    erased = [
        {"fate": "removed", "shard": shard, "row": row.row, "removal": shown}
        for removal, shown in numbered
        for shard, rows in removal.rows.items()
        for row in rows
        if getattr(row, name) == digest
    ]
    blocked = [{"fate": "blocked", "removal": shown} for removal, shown in numbered if digest in removal.blocked[name]]
    yield from erased or blocked[:1]


def _removal_entry(number: int, removal: Removal) -> dict[str, object]:
    return {"number": number, "time": removal.time, "reason": removal.reason}


def _dropped(run: RunFolder, key: str) -> Iterator[dict[str, Any]]:
    """Every list of drops that has the key."""
    for group in run.started_groups():
        for shard in sorted(run.storage.names(f"{QUARANTINE}/{group}")):
            for line in map(json.loads, run.storage.read_lines(f"{QUARANTINE}/{group}/{shard}")):
                if line["key"] == key:
                    yield _dropped_entry({"shard": int(shard.removesuffix(".jsonl")), "group": group, **line})


def _dropped_entry(drop: dict[str, Any]) -> dict[str, Any]:
    place = {"shard": drop["shard"], "group": drop["group"], "input_row": drop["row"]}
    return {"fate": "dropped", **place, "key": drop["key"], "reason": drop["reason"], "detail": drop["detail"]}


def _lines(entry: dict[str, Any]) -> list[str]:
    where = f"shard {shard_name(entry['shard'])}" if "shard" in entry else ""
    if "removal" in entry:
        removal = entry["removal"]
        because = f": {removal['reason']}" if removal["reason"] else ""
        what = "blocked" if entry["fate"] == "blocked" else f"removed from {where} row {entry['row']}"
        lines = [f"{what} on {removal['time']} (removal {removal['number']}){because}"]
        if "key" not in entry:
            return lines
    elif entry["fate"] == "dropped":
        detail = f" ({entry['detail']})" if entry["detail"] else ""
        return [f"dropped from {entry['group']} of {where}, row {entry['input_row']}: {entry['reason']}{detail}"]
    else:
        reason = f", excluded: {entry['reason']}" if "reason" in entry else ""
        lines = [f"sample in {where} row {entry['row']}{reason}"]
    lines += [f"  {name:<10} {entry[name]}" for name in IDENTIFIERS]
    lines.append(f"  original   {entry['width']} x {entry['height']} px, input row {entry['input_row']}")
    if entry["retry_of"]:
        lines.append(
            f"  tried      before in shard {shard_name(entry['retry_of']['shard'])}, input row "
            f"{entry['retry_of']['input_row']}"
        )
    if duplicate := entry.get("duplicate"):
        same_as = duplicate["same_as"]
        of = same_as["key"] if "key" in same_as else f"{same_as['name']} of {same_as['place']}"
        lines.append(f"  duplicate  {duplicate['reason']} of {of}")
    lines += [f"  {name:<10} {entry[name]!r}" for name in _ANNOTATIONS if name in entry]
    lines += _caption_lines(entry)
    for name, group in entry["groups"].items():
        rows = ", ".join(map(str, group["rows"]))
        text = f"  {name:<10} {group['file']} row {rows}"
        if "shapes" in group:
            shapes = ", ".join(" x ".join(map(str, shape)) or "one" for shape in group["shapes"])
            encoder = group.get("encoder", {})
            by = group.get("made_by") or f"{encoder.get('model')}, revision {encoder.get('revision')}"
            text += f": {shapes} {group['dtype']} by {by}"
        lines.append(text)
    return lines


def _caption_lines(entry: dict[str, Any]) -> list[str]:
    """The captions of all sets, each set with who wrote it."""
    lines: list[str] = []
    further = entry.get("caption_sets", {})
    for name, origin in entry["written_by"].items():
        if name not in further:
            lines += [f"  caption {caption['id']}  {caption['text']!r}" for caption in entry["captions"]]
        elif not origin["captions"]:
            lines.append(f"  no caption of {name}")
        for caption in origin["captions"] if name in further else ():
            lines.append(f"  caption of {name}  {caption['text']!r}")
            lines += [f"      {line}" for line in [made_line(caption)] if line]
        lines += [f"      {line}" for line in [origin_line(origin)] if line]
        lines += [f"      prompt {origin['prompt']!r}"] if "prompt" in origin else []
    return lines
