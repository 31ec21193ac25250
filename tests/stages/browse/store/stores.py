"""A small store with all that the pages can filter by, made row by row."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imagen_core import store as st
from imagen_core.store.layout import ColumnType, ColumnValue
from tests.imagen_core.store.handmade_store import file_entry

DIM, SIZE_PX = 4, 8


@dataclass(frozen=True)
class Given:
    """A sample; its embedding is `vector` at each of as many tokens as its caption has words."""

    caption: str
    width: int = 100
    height: int = 100
    url: str | None = None
    sha256: str | None = None
    label: int | None = None
    columns: Mapping[str, ColumnValue] = field(default_factory=dict)
    vector: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0)


def write_store(
    root: Path,
    shards: Sequence[Sequence[Given]],
    columns: Mapping[str, ColumnType] | None = None,
    store_format: st.StoreFormat = "parquet",
    codec: st.Codec = "raw",
) -> Path:
    """Writes the store; keys are `SHARD-ROW`, and an image is of one color: red is its shard, green its row."""
    image, text, embed = st.image_group(SIZE_PX), st.text_group("t5"), st.image_embed_group("clip")
    for group in ("samples", image, text, embed):
        (root / group).mkdir(parents=True)
    entries = []
    for index, given in enumerate(shards):
        paths = {"samples": st.shard_path("samples", index)}
        paths |= {group: st.shard_path(group, index, store_format) for group in (image, text, embed)}
        rows = [sample(index, row, each) for row, each in enumerate(given)]
        st.write_samples(root / paths["samples"], rows, columns=columns)
        with st.open_image_writer(root / paths[image], SIZE_PX, store_format, codec) as writer:
            for row in rows:
                color = np.array([index, row.input_row % 256, 200], np.uint8)
                writer.append(np.broadcast_to(color, (SIZE_PX, SIZE_PX, 3)).copy(), row.key, row.sha256)
        vectors = [np.array([each.vector], np.float32) for each in given]
        tokens = [np.repeat(v, len(each.caption.split()), axis=0) for v, each in zip(vectors, given, strict=True)]
        write_embeddings(root / paths[text], tokens, [row.captions[0] for row in rows], store_format)
        write_embeddings(root / paths[embed], vectors, [row.key for row in rows], store_format)
        entries.append(
            {
                "index": index,
                "rows": len(rows),
                "files": {name: file_entry(root, path, len(rows)) for name, path in paths.items()},
            }
        )
    both = {"dim": DIM, "dtype": "float32", "format": store_format, "fingerprint": {"model": "somebody/unknown"}}
    samples = {"kind": "samples", **({"columns": dict(columns)} if columns else {})}
    images = {
        "kind": "images",
        "size_px": SIZE_PX,
        "format": store_format,
        "codec": codec,
        "config": st.codec_settings(codec),
    }
    groups = {
        "samples": samples,
        image: images,
        text: {"kind": "text", "encoder": "t5", **both},
        embed: {"kind": "image_embeds", "encoder": "clip", **both},
    }
    header = {"writer": "test", "input_rows": sum(map(len, shards)), "groups": groups}
    st.write_manifest(root / st.MANIFEST_NAME, header, entries)
    return root


def sample(shard: int, row: int, given: Given) -> st.SampleRow:
    return st.SampleRow(
        f"{shard}-{row}",
        (given.caption,),
        (row,),
        given.url,
        given.sha256 or hashlib.sha256(f"{shard} {row}".encode()).hexdigest(),
        given.width,
        given.height,
        row,
        label=given.label,
        columns=dict(given.columns),
    )


def write_embeddings(path: Path, values: list[np.ndarray], captions: list[str], store_format: st.StoreFormat) -> None:
    st.write_embedding_shard(
        path,
        st.cast_embeddings(values, DIM, "float32"),
        [len(each) for each in values],
        DIM,
        "float32",
        store_format,
        captions=captions,
        fingerprint={"model": "somebody/unknown"},
    )
