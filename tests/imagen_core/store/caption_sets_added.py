"""Further sets of captions for a store that is made by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from imagen_core import store as st
from tests.imagen_core.store.handmade_store import file_entry

Captions = Callable[[int, int], list[str]]
"""The captions of a sample by the shard's index and the row."""


def add_caption_sets(
    root: Path, sets: dict[str, Captions], weights: dict[str, float], *, encoded: bool = True
) -> None:
    """Adds sets with embeddings by `t5`, whose values are their number of characters; that of "empty" has no tokens.

    Args:
        weights: of all sets, that of `samples` first.
        encoded: False adds no embeddings.
    """
    raw = json.loads((root / "manifest.json").read_bytes())
    encoder = raw["groups"]["text-t5"]
    dim, dtype, fingerprint = (encoder[name] for name in ("dim", "dtype", "fingerprint"))
    for name, captions_of in sets.items():
        groups = captions_group, text_group = st.captions_group(name), st.text_group("t5", name)
        raw["groups"][captions_group] = {"kind": "captions", "set": name, "format": "parquet"}
        raw["groups"][text_group] = {**encoder, "kind": "set_text", "set": name, "format": "parquet"}
        raw["groups"][text_group].pop("null", None)
        for group in groups:
            (root / group).mkdir()
        for shard in raw["shards"]:
            samples = st.read_samples(root / shard["files"]["samples"]["path"])
            rows = st.number_captions(captions_of(shard["index"], row) for row in range(len(samples)))
            captions = st.distinct_captions(rows)
            paths = [st.shard_path(group, shard["index"]) for group in groups]
            st.write_captions(root / paths[0], [sample.key for sample in samples], rows)
            found = [np.full((0 if c == "empty" else 2, dim), len(c), np.float32) for c in captions]
            st.write_embedding_shard(
                root / paths[1],
                st.cast_embeddings(found, dim, dtype),
                [len(array) for array in found],
                dim,
                dtype,
                "parquet",
                captions=captions,
                fingerprint=fingerprint,
            )
            numbers = (len(samples), len(captions))
            for group, path, number in zip(groups, paths, numbers, strict=True):
                shard["files"][group] = file_entry(root, path, number)
        if not encoded:
            del raw["groups"][text_group]
            for shard in raw["shards"]:
                del shard["files"][text_group]
    header = {name: raw[name] for name in ("writer", "input_rows", "groups") if name in raw}
    header["captions"] = [{"name": name, "weight": weight} for name, weight in weights.items()]
    st.write_manifest(root / "manifest.json", header, raw["shards"])
