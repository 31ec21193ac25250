"""`pipeline inspect`: what a store holds, or what became of one sample."""

from collections import Counter

import numpy as np

from imagen_core.store import (
    REMOVED,
    ArrayGroup,
    CaptionsGroup,
    EmbeddingGroup,
    ImagesGroup,
    SetTextGroup,
    Store,
)
from pipeline.commands import CommandResult
from pipeline.units import human_bytes
from stages.precompute.crops import Crops, crops_line, measured
from stages.store_tools.lineage import lineage_command
from stages.stores import group_bytes, open_place, open_store


def inspect_command(
    path: str, *, key: str | None = None, url: str | None = None, sha256: str | None = None
) -> CommandResult:
    """Counts, groups, bytes and encoder fingerprints; or all about the samples with a key, URL or sha256."""
    store = open_store(path)
    if (key, url, sha256) != (None, None, None):
        folder, run = open_place(path)
        return lineage_command(store, folder, run, key=key, url=url, sha256=sha256)
    sizes = group_bytes(store)
    groups: dict[str, object] = {}
    lines = [f"{len(store)} samples in {store.manifest.num_shards} shards, {human_bytes(sum(sizes.values()))}"]
    if store.manifest.failed_shards:
        lines.append(f"  without {len(store.manifest.failed_shards)} shards that failed: run the same command again")
    excluded = Counter(reason for rows in store.manifest.excluded.values() for reason in rows.values())
    if store.manifest.filtered:
        lines.append(f"  {store.manifest.filtered:,} rows of the source were filtered by source.where")
    if store.columns:
        lines.append(f"  kept columns: {', '.join(f'{name} ({kind})' for name, kind in store.columns.items())}")
    if len(store.caption_sets) > 1 or "captions" in store.manifest.header:
        lines.append(f"  sets of captions: {', '.join(f'{name} {w:g}' for name, w in store.caption_sets.items())}")
    if removed := excluded[REMOVED]:
        lines.append(f"  {removed} samples removed, in {store.manifest.num_removals} removals")
    for name, group in store.manifest.groups.items():
        entry: dict[str, object] = {"bytes": sizes[name], "format": group.format}
        text, details = "", {}
        if isinstance(group, ImagesGroup):
            entry.update(size_px=group.size_px, codec=group.codec, **group.config)
            text, details = f"{group.size_px} px, {group.codec}, {group.format}", {**group.config}
            if group.shapes:
                text += f", {len(group.shapes)} buckets"
                details["shapes"] = ", ".join(f"{width}x{height}" for height, width in group.shapes)
        elif isinstance(group, EmbeddingGroup):
            entry.update(encoder=group.encoder, dim=group.dim, dtype=group.dtype, fingerprint=group.fingerprint)
            text = f"{group.fingerprint.get('model')}, dim {group.dim}, {group.dtype}, {group.format}"
            if group.layers:
                entry["layers"] = list(group.layers)
                text = text.replace(", dim", f", {len(group.layers)} layers of dim", 1)
            details = group.fingerprint
            if isinstance(group, SetTextGroup):
                entry.update(caption_set=group.caption_set)
        elif isinstance(group, CaptionsGroup):
            entry.update(caption_set=group.caption_set, made_by=group.made_by)
            text, details = f"captions, {group.format}", group.made_by
        elif isinstance(group, ArrayGroup):
            spec = group.spec
            entry.update(array=group.array, dtype=spec.dtype, shape=list(spec.shape), fingerprint=group.fingerprint)
            text, details = f"{spec}, {group.format}", group.fingerprint
        groups[name] = entry
        lines.append(f"  {name:<14} {human_bytes(sizes[name]):>10}  {text}")
        lines += [f"      {key}: {value}" for key, value in sorted(details.items())]
    crops = _crops(store)
    if crops:
        lines.append(f"  crops: {crops_line(crops)}")
    result: dict[str, object] = {
        "input_rows": store.manifest.input_rows,
        **({"filtered": store.manifest.filtered} if store.manifest.filtered else {}),
        "num_samples": len(store),
        "num_removed": removed,
        "removals": store.manifest.listed_removals,
        "num_shards": store.manifest.num_shards,
        "failed_shards": list(store.manifest.failed_shards),
        "image_sizes": store.image_sizes,
        "encoders": store.encoders,
        "image_encoders": store.image_encoders,
        "arrays": store.arrays,
        **({"columns": store.columns} if store.columns else {}),
        "caption_sets": store.caption_sets,
        "schema_version": store.manifest.schema_version,
        "groups": groups,
        **({"crops": crops.to_json()} if crops else {}),
    }
    return result, lines, 0


def _crops(store: Store) -> Crops | None:
    """How many samples each bucket has, and what is cut off, from all `samples`; of a store with buckets only."""
    bucketed = [group for group in store.manifest.images.values() if group.shapes]
    if not bucketed:
        return None
    table = store.sample_columns(["width", "height"])
    manifest = store.manifest
    firsts = np.concatenate([[0], np.cumsum(manifest.rows)])
    excluded = [int(firsts[position]) + row for position, rows in manifest.excluded.items() for row in rows]
    kept = np.ones(table.num_rows, bool)
    kept[excluded] = False
    sizes = np.stack([table[name].to_numpy() for name in ("width", "height")], axis=1)[kept]
    return measured(((width, height) for width, height in sizes.tolist()), bucketed[0].shapes, stored=True)
