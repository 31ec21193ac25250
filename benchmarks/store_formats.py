"""The captions of the store benchmark, and the formats they are written in."""

import csv
import hashlib
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import webdataset

from imagen_core import store as st

PROMPTS = Path(__file__).parents[1].parent / "shared/data/parti-prompts/PartiPrompts.tsv"
SHARD_ROWS = 1000
NPZ_TOKENS = 300
Read = Callable[[int], np.ndarray]


def prompts() -> list[str]:
    """The 1,632 captions of PartiPrompts; without them, as many of similar lengths, of random words."""
    if PROMPTS.exists():
        with PROMPTS.open(encoding="utf-8") as file:
            return [row["Prompt"] for row in csv.DictReader(file, delimiter="\t")]
    rng = np.random.default_rng(0)
    counts = rng.lognormal(1.9, 0.75, 1632).clip(1, 60).astype(int)
    return [" ".join(f"word{word}" for word in rng.zipf(1.3, count).clip(max=5000)) for count in counts]


@dataclass
class Captions:
    tokens: np.ndarray  # float16 (total, dim)
    offsets: np.ndarray  # int64 (n + 1,)

    @classmethod
    def make(cls, num_captions: int, dim: int, mean_tokens: float) -> "Captions":
        rng = np.random.default_rng(0)
        words = rng.choice([len(prompt.split()) for prompt in prompts()], num_captions)
        lengths = np.maximum(2, np.rint(words * mean_tokens / words.mean())).astype(np.int64)
        tokens = np.empty((lengths.sum(), dim), np.float16)
        for start in range(0, len(tokens), 4096):
            block = tokens[start : start + 4096]
            block[:] = rng.standard_normal(block.shape, np.float32)
        return cls(tokens, np.concatenate([[0], np.cumsum(lengths)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @property
    def num_bytes(self) -> int:
        return self.tokens.nbytes + self.offsets.nbytes

    def head(self, num_captions: int) -> "Captions":
        offsets = self.offsets[: num_captions + 1]
        return Captions(self.tokens[: offsets[-1]], offsets)


# ---- the store ----


def write_store(
    root: Path,
    data: Captions,
    images: dict[int, np.ndarray],
    store_format: st.StoreFormat,
    codec: st.Codec = "raw",
) -> st.Store:
    """A store with one caption per sample, written as the pipeline does it."""
    groups: dict[str, dict[str, Any]] = {"samples": {"kind": "samples"}}
    for size in images:
        groups[st.image_group(size)] = {"kind": "images", "size_px": size, "format": store_format, "codec": codec}
    dim = data.tokens.shape[1]
    text = {"kind": "text", "encoder": "t5", "dim": dim, "dtype": "float16", "format": store_format}
    groups[st.text_group("t5")] = text
    for group in groups:
        (root / group).mkdir(parents=True)
    shards = []
    for index, first in enumerate(range(0, len(data), SHARD_ROWS)):
        ids = range(first, min(first + SHARD_ROWS, len(data)))
        paths = {name: st.shard_path(name, index, group.get("format", "parquet")) for name, group in groups.items()}
        rows = [
            st.SampleRow(f"{i:08d}", (f"caption {i}",), (i - first,), None, "0" * 64, 256, 256, i - first) for i in ids
        ]
        st.write_samples(root / paths["samples"], rows)
        for size, pixels in images.items():
            with st.open_image_writer(root / paths[st.image_group(size)], size, store_format, codec) as writer:
                for i, row in zip(ids, rows, strict=True):
                    writer.append(pixels[i], row.key, row.sha256)
        embeddings = [data[i] for i in ids]
        path, captions = root / paths[st.text_group("t5")], [row.captions[0] for row in rows]
        cast, num_tokens = st.cast_embeddings(embeddings, dim, "float16"), [len(x) for x in embeddings]
        st.write_embedding_shard(
            path, cast, num_tokens, dim, "float16", store_format, captions=captions, fingerprint={}
        )
        files = {name: file_entry(root, path, len(ids)) for name, path in paths.items()}
        shards.append({"index": index, "rows": len(ids), "files": files})
    st.write_manifest(root / st.MANIFEST_NAME, {"writer": "benchmark", "groups": groups}, shards)
    return st.Store.open(root)


def file_entry(root: Path, path: str, rows: int) -> dict[str, Any]:
    data = (root / path).read_bytes()
    return {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": rows}


# ---- peers ----


def write_and_map(path: Path, data: Captions) -> Captions:
    data.tokens.tofile(path)
    tokens = np.memmap(path, data.tokens.dtype, "r", shape=data.tokens.shape).view(np.ndarray)
    return Captions(tokens, data.offsets)


def write_webdataset(folder: Path, data: Captions) -> Read:
    """Pickled arrays in tar files; returns random access by an index of the members, which webdataset lacks."""
    folder.mkdir()
    members: list[tuple[int, int, int]] = []
    for first in range(0, len(data), SHARD_ROWS):
        path = folder / f"{first // SHARD_ROWS:05d}.tar"
        with webdataset.TarWriter(str(path)) as writer:
            for i in range(first, min(first + SHARD_ROWS, len(data))):
                writer.write({"__key__": f"{i:08d}", "emb.pyd": np.array(data[i])})
        with tarfile.open(path) as tar:
            file = os.open(path, os.O_RDONLY)
            members += [(file, member.size, member.offset_data) for member in tar]
    return lambda i: pickle.loads(os.pread(*members[i]))


def endless_webdataset(folder: Path) -> Iterator[int]:
    """webdataset's own reader, one epoch after another."""
    paths = sorted(map(str, folder.iterdir()))
    while True:
        for sample in webdataset.WebDataset(paths, shardshuffle=False).decode():
            assert sample["emb.pyd"].size
            yield 1


def write_hdf5_gzip(path: Path, data: Captions) -> tuple[int, Read]:
    with h5py.File(path, "w") as file:
        file.create_dataset("tokens", data=data.tokens, compression="gzip")
    tokens = h5py.File(path)["tokens"]
    return size_bytes(path) + data.offsets.nbytes, lambda i: tokens[data.offsets[i] : data.offsets[i + 1]]


def write_npz(folder: Path, data: Captions, num_items: int) -> tuple[int, Read]:
    """One file per image, as in PixArt-sigma; the padding is what the encoder made of it, so not zeros."""
    folder.mkdir()
    rng = np.random.default_rng(2)
    for i in range(num_items):
        padded = rng.standard_normal((NPZ_TOKENS, data.tokens.shape[1]), np.float32).astype(np.float16)
        padded[: len(data[i])] = data[i]
        mask = (np.arange(NPZ_TOKENS) < len(data[i])).astype(np.int16)
        np.savez_compressed(folder / f"{i}.npz", caption_feature=padded, attention_mask=mask)

    def read(i: int) -> np.ndarray:
        with np.load(folder / f"{i}.npz") as file:
            return file["caption_feature"][: file["attention_mask"].sum()]

    return size_bytes(folder), read


def size_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())
