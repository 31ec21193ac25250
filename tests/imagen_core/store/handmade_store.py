"""A small store made by hand, with the values it was made from."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from imagen_core import store as st

DIM = 16
FINGERPRINT = {"model": "tiny"}
ORIGINALS = ((640, 400), (400, 640), (500, 510))
"""Width and height of originals that are in the last, the first and the middle one of the buckets."""
REMOVED_AT = "2026-01-02T03:04:05+00:00"


@dataclass
class Made:
    """A written store and what a reader must find in it, excluded rows left out."""

    path: Path
    keys: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    images: dict[int, list[np.ndarray]] = field(default_factory=dict)
    text: list[list[np.ndarray]] = field(default_factory=list)  # float32, before the cast
    null: np.ndarray = field(default_factory=lambda: np.zeros((0, DIM), np.float32))


def write_text(
    path: Path, embeddings: list[np.ndarray], dim: int, dtype: st.StoreDtype, store_format: st.StoreFormat
) -> None:
    """Embeddings of captions named by number."""
    captions = [f"caption {i}" for i in range(len(embeddings))]
    cast, num_tokens = st.cast_embeddings(embeddings, dim, dtype), [len(x) for x in embeddings]
    st.write_embedding_shard(
        path, cast, num_tokens, dim, dtype, store_format, captions=captions, fingerprint=FINGERPRINT
    )


def bucket_list(size_px: int) -> tuple[tuple[int, int], ...]:
    """Three shapes for a size that is a multiple of 4: tall, square and wide."""
    long, short = size_px * 5 // 4, size_px * 3 // 4
    return (long, short), (size_px, size_px), (short, long)


def file_entry(root: Path, path: str, rows: int) -> dict:
    data = (root / path).read_bytes()
    return {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": rows}


def rewrite_manifest(
    root: Path, change: Callable[[list[dict[str, Any]]], None] = lambda shards: None, **header: object
) -> None:
    """Seal the store again after its files were changed, so that only contents are wrong."""
    raw = json.loads((root / "manifest.json").read_bytes())
    for shard in raw["shards"]:
        for entry in shard["files"].values():
            entry.update(file_entry(root, entry["path"], entry["rows"]))
    change(raw["shards"])
    kept = {name: raw[name] for name in ("writer", "input_rows", "groups") if name in raw}
    st.write_manifest(root / "manifest.json", kept | header, raw["shards"])


def make_store(
    root: Path,
    *,
    shard_rows: tuple[int, ...] = (5, 3, 4),
    store_format: st.StoreFormat = "parquet",
    dtype: st.StoreDtype = "float16",
    sizes: tuple[int, ...] = (8, 4),
    excluded: dict[int, list[int]] | None = None,
    num_captions: int = 2,
    codec: st.Codec = "raw",
    seed: int = 0,
    buckets: bool = False,
    key_prefix: str = "",
    fingerprint: dict[str, Any] = FINGERPRINT,
    layers: tuple[int, ...] = (),
    num_scales: int = 1,
) -> Made:
    """Write a store with `num_captions` captions a sample, the first shared by pairs of samples.

    `buckets`: images are wide, tall and square in turn, instead of all square. `layers`: of the embeddings, stored
    apart, each ten times as large as the one before it.
    """
    token = (len(layers), DIM) if layers else (DIM,)
    size_of = 10.0 ** np.arange(len(layers))[:, None] if layers else 1.0
    apart: dict[str, Any] = {"layers": layers} if layers else {}
    apart |= {"num_scales": num_scales} if num_scales > 1 else {}
    rng = np.random.default_rng(seed)
    excluded = excluded or {}
    made = Made(root, images={size: [] for size in sizes})
    groups = ["samples", *(st.image_group(size) for size in sizes), st.text_group("t5")]
    for group in groups:
        (root / group).mkdir(parents=True)
    shards = []
    for shard, rows in enumerate(shard_rows):
        captions: list[str] = []
        samples = []
        for row in range(rows):
            own = [
                f"caption {shard} {row // 2} é",
                *(f"caption {shard} {row} {k}" for k in range(1, num_captions)),
            ]
            captions += [caption for caption in own if caption not in captions]
            ids = tuple(captions.index(caption) for caption in own)
            url = None if row % 2 else f"https://example.com/{shard}/{row}.jpg"
            digest = hashlib.sha256(bytes([shard, row])).hexdigest()
            width, height = ORIGINALS[row % 3] if buckets else (640, 480 + row)
            key = f"{key_prefix}{shard:03d}-{row:03d}"
            samples.append(st.SampleRow(key, tuple(own), ids, url, digest, width, height, row))
        lengths = [1 + i % 7 for i in range(len(captions))]
        embeddings = [(rng.normal(size=(length, *token)) * size_of).astype(np.float32) for length in lengths]
        files = {"samples": st.shard_path("samples", shard)}
        st.write_samples(root / files["samples"], samples)
        for size in sizes:
            name = st.image_group(size)
            files[name] = st.shard_path(name, shard, store_format)
            shapes = bucket_list(size) if buckets else ()
            with st.open_image_writer(root / files[name], size, store_format, codec, shapes) as writer:
                for row, sample in enumerate(samples):
                    shape = shapes[(2, 0, 1)[row % 3]] if buckets else (size, size)
                    pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
                    writer.append(pixels, sample.key, sample.sha256)
                    if row not in excluded.get(shard, []):
                        made.images[size].append(pixels)
        files["text-t5"] = st.shard_path("text-t5", shard, store_format)
        st.write_embedding_shard(
            root / files["text-t5"],
            st.cast_embeddings(embeddings, DIM, dtype, num_layers=len(layers) or None, num_scales=num_scales),
            lengths,
            DIM,
            dtype,
            store_format,
            captions=captions,
            fingerprint=fingerprint,
            **apart,
        )
        num_rows = dict.fromkeys(groups, rows) | {"text-t5": len(captions)}
        shards.append(
            {
                "index": shard,
                "rows": rows,
                "excluded": {"made_up": excluded.get(shard, [])},
                "files": {name: file_entry(root, path, num_rows[name]) for name, path in files.items()},
            }
        )
        for row, sample in enumerate(samples):
            if row not in excluded.get(shard, []):
                made.keys.append(sample.key)
                made.captions.append(list(sample.captions))
                made.text.append([embeddings[i] for i in sample.caption_ids])
    made.null = rng.normal(size=(1, *token)).astype(np.float32)
    (root / st.null_path("t5")).write_bytes(st.dump_null(made.null, dtype))
    null = file_entry(root, st.null_path("t5"), 1)
    header_groups: dict[str, dict] = {"samples": {"kind": "samples"}}
    for size in sizes:
        header_groups[st.image_group(size)] = {
            "kind": "images",
            "size_px": size,
            "format": store_format,
            "codec": codec,
            "config": st.codec_settings(codec) | ({"shapes": [list(s) for s in bucket_list(size)]} if buckets else {}),
        }
    header_groups["text-t5"] = {
        "kind": "text",
        "encoder": "t5",
        "dim": DIM,
        "dtype": dtype,
        "format": store_format,
        "fingerprint": fingerprint,
        "null": null,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in apart.items()},
    }
    header = {"writer": "test", "input_rows": sum(shard_rows), "groups": header_groups}
    st.write_manifest(root / "manifest.json", header, shards)
    return made


def samples_files(folder: st.StoreFolder) -> list[tuple[int, st.SamplesFile, dict[int, str]]]:
    manifest = st.load_manifest(folder)
    return [
        (int(manifest.index[i]), st.SamplesFile(folder.source(entry.path), entry.path), manifest.excluded.get(i, {}))
        for i in range(manifest.num_shards)
        if (entry := manifest.file("samples", i))
    ]


def remove(store: Path | str, *, listed: bool = True, **values: list[str]) -> st.StoreFolder:
    """Removes by key, url or sha256; `listed`: the manifest is written again."""
    folder = st.StoreFolder(store)
    removals = st.load_removals(folder)
    found = st.find_rows(samples_files(folder), removals, values)
    st.add_removal(folder, removals, found, values, REMOVED_AT, "asked for")
    if listed:
        st.rewrite_manifest(folder)
    return folder
