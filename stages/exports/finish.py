"""What an export has beside the files of its shards: `store.json`, null embeddings, and the index of MDS."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from imagen_core.store import EmbeddingGroup, ImagesGroup, Store
from pipeline.storage import Storage
from pipeline.storage.record import shard_name
from pipeline.storage.run_folder import RunFolder
from stages.exports.mds_files import INDEX, merge_indices
from stages.exports.selection import Selection
from stages.exports.stage import DATA, GROUP, index_name
from stages.exports.webdataset import npy_parts

DESCRIPTION = f"{DATA}/store.json"


def finish(run: RunFolder, store: Store, selection: Selection) -> dict[str, object]:
    """Writes these files, `store.json` last; files that are there with the same bytes stay.

    Returns:
        Entries for the run's summary.
    """
    num_files = num_bytes = num_samples = 0
    for record in run.records(GROUP):
        num_files += len(record.files)
        num_bytes += record.bytes
        num_samples += record.rows
    totals: dict[str, object] = {"num_samples": num_samples, "num_files": num_files, "num_bytes": num_bytes}
    for name, group in selection.texts.items():
        if group.null is not None:
            _write(
                run.storage,
                f"{DATA}/null-{group.name}.npy",
                b"".join(npy_parts(store.null(name).astype(selection.float_dtype(group)))),
            )
    if selection.to == "mds":
        _write(run.storage, f"{DATA}/{INDEX}", merge_indices(_indices(run)))
    text = json.dumps({**_describe(store, selection), **totals}, indent=1, ensure_ascii=False, sort_keys=True)
    _write(run.storage, DESCRIPTION, text.encode() + b"\n")
    return {**totals, "data": f"{run.url}/{DATA}"}


def _describe(store: Store, selection: Selection) -> dict[str, Any]:
    """Where an export comes from: the store's identity, and all that made it."""
    manifest = store.manifest
    lineage = {name: value for name, value in manifest.header.items() if name not in ("groups", "removals")}
    return {
        "format": selection.to,
        "store": {
            **lineage,
            "sha256": manifest.sha256,
            "num_samples": manifest.num_samples,
            "num_shards": manifest.num_shards,
            "num_removals": manifest.num_removals,
        },
        "images": [_images(group, selection) for group in selection.images.values()],
        "encoders": [_encoder(group, selection) for group in selection.texts.values()],
        **({"caption_sets": _caption_sets(store, selection)} if selection.caption_sets else {}),
        "image_encoders": [_encoder(group, selection) for group in selection.image_embeds.values()],
        "arrays": [
            {"name": name, "dtype": group.spec.dtype, "shape": group.spec.shape, "fingerprint": group.fingerprint}
            for name, group in selection.arrays.items()
        ],
        "columns": selection.columns,
    }


def _caption_sets(store: Store, selection: Selection) -> list[dict[str, Any]]:
    """All sets with their weights, the first one included, and the embeddings of the further ones."""
    texts = selection.set_texts
    return [
        {
            "name": name,
            "weight": weight,
            **(
                {"encoders": [_encoder(group, selection) for (_, of), group in texts.items() if of == name]}
                if at
                else {}
            ),
        }
        for at, (name, weight) in enumerate(store.caption_sets.items())
    ]


def _images(group: ImagesGroup, selection: Selection) -> Mapping[str, Any]:
    codecs = {"codec": selection.image_codec(group), "codec_in_store": group.codec}
    return {"size_px": group.size_px, **codecs, "config": group.config}


def _encoder(group: EmbeddingGroup, selection: Selection) -> Mapping[str, Any]:
    dtypes = {"dtype": selection.float_dtype(group), "dtype_in_store": group.dtype}
    return {"name": group.encoder, "dim": group.dim, **dtypes, "fingerprint": group.fingerprint}


def _indices(run: RunFolder) -> Iterator[tuple[str, bytes]]:
    names = [shard_name(record.shard) for record in run.records(GROUP) if record.files]
    return zip(names, run.storage.map(lambda name: run.storage.read(index_name(name)), names), strict=True)


def _write(storage: Storage, name: str, data: bytes) -> None:
    if storage.size(name) != len(data) or storage.read(name) != data:
        storage.write(name, data)
