"""How many bytes does a caption take, in the store and as other projects write it?

The same Gaussian embeddings (PartiPrompts' lengths, scaled to 20 tokens on average, and T5-XXL's width) are written
in every format, with that project's type and padding. What an encoder makes of padding is not zero, so padding is
Gaussian too. torch.save and pickle are written here only because the peers' formats consist of them.

    python -m benchmarks.store_size --out benchmarks/results/store_size.json
"""

import argparse
import io
import pickle
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import report
from benchmarks.store_dtype import compare
from benchmarks.store_formats import Captions, size_bytes
from imagen_core.store import (
    StoreDtype,
    StoreFormat,
    cast_embedding,
    cast_embeddings,
    restore,
    write_embedding_shard,
)

DIM, MEAN_TOKENS = 4096, 20.0
FEW = 8  # of padded formats: every caption takes the same
Write = Callable[[Path, np.ndarray], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON report")
    parser.add_argument("--captions", type=int, default=1000)
    arguments = parser.parse_args()
    data = Captions.make(arguments.captions, DIM, MEAN_TOKENS)
    embeddings = [data[i].astype(np.float32) for i in range(len(data))]
    captions = [f"caption {i}" for i in range(len(data))]
    payload = len(data.tokens) * DIM * 2 / len(data)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype, store_format in OURS:
            path = Path(folder) / name.replace(" ", "-")
            cast, num_tokens = cast_embeddings(embeddings, DIM, dtype), [len(x) for x in embeddings]
            write_embedding_shard(path, cast, num_tokens, DIM, dtype, store_format, captions=captions, fingerprint={})
            rows.append({"format": name, "bytes_per_caption": path.stat().st_size / len(data)})
        for name, (write, padded_to) in PEERS.items():
            path = Path(folder) / name.split()[0]
            path.mkdir(exist_ok=True)
            chosen = range(len(data)) if padded_to is None else range(FEW)
            for i in chosen:
                write(path / str(i), embeddings[i] if padded_to is None else padded(embeddings[i], padded_to))
            rows.append({"format": name, "bytes_per_caption": folder_bytes(path) / len(chosen)})
    size = {row["format"]: row["bytes_per_caption"] for row in rows}
    tokens = np.concatenate(embeddings)
    quality = compare(tokens, restore(cast_embedding(tokens, "int8"), "int8"))
    report(
        "store_size",
        rows,
        {
            **{f"bytes: {name} / tokens x dim x 2": size[name] / payload for name, _, _ in OURS},
            "bytes: int8 parquet / float16 parquet": size["store int8 parquet"] / size["store float16 parquet"],
            "int8: mean cosine of a token": quality["mean_cosine"],
            **{f"bytes: {name} / store float16 parquet": size[name] / size["store float16 parquet"] for name in PEERS},
        },
        arguments.out,
        packages=["imagen-precompute", "numpy", "torch"],
        notes=[f"{len(data)} captions, {len(data.tokens) / len(data):.1f} tokens on average, width {DIM}"],
    )


OURS: list[tuple[str, StoreDtype, StoreFormat]] = [
    ("store float16 parquet", "float16", "parquet"),
    ("store float16 hdf5", "float16", "hdf5"),
    ("store bfloat16 parquet", "bfloat16", "parquet"),
    ("store int8 parquet", "int8", "parquet"),
    ("store int8 hdf5", "int8", "hdf5"),
]


def padded(embedding: np.ndarray, length: int) -> np.ndarray:
    rng = np.random.default_rng(len(embedding))
    return np.concatenate([embedding, rng.standard_normal((length - len(embedding), DIM), np.float32)])


def folder_bytes(folder: Path) -> int:
    """Bytes of the files alone."""
    return size_bytes(folder) - folder.stat().st_size


def tar_pickle(path: Path, x: np.ndarray) -> None:
    """NeMo: a pickled array in a tar; the tar's end is left out."""
    data = pickle.dumps({"embeddings": x.astype(np.float16)})
    info = tarfile.TarInfo("00000000.emb.pkl")
    info.size = len(data)
    path.write_bytes(info.tobuf() + data + bytes(-len(data) % tarfile.BLOCKSIZE))


def npz(dtype: type, *, compressed: bool) -> Write:
    save = np.savez_compressed if compressed else np.savez
    return lambda path, x: save(path, x=x.astype(dtype), attention_mask=np.ones(len(x), np.int16))


def torch_save(path: Path, x: np.ndarray) -> None:
    buffer = io.BytesIO()
    torch.save({"prompt_embeds": torch.from_numpy(x).bfloat16(), "mask": torch.ones(len(x), dtype=torch.bool)}, buffer)
    path.write_bytes(buffer.getvalue())


def raw_float32(path: Path, x: np.ndarray) -> None:
    """mosaicml/diffusion: bytes of an MDS column, before its compression, with a mask."""
    path.write_bytes(x.tobytes() + bytes(len(x)))


PEERS: dict[str, tuple[Write, int | None]] = {
    "nemo: pickled float16 in tar": (tar_pickle, None),
    "pixart-sigma: float16 npz, deflate, padded to 300": (npz(np.float16, compressed=True), 300),
    "pixart-alpha: float32 npz, deflate, padded to 120": (npz(np.float32, compressed=True), 120),
    "simpletuner: bfloat16 torch.save, padded to 512": (torch_save, 512),
    "mosaicml: float32 MDS, padded to 512": (raw_float32, 512),
    "kohya: float32 npz, padded to 512": (npz(np.float32, compressed=False), 512),
}


if __name__ == "__main__":
    main()
