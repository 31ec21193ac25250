"""Batches a second of a loader: a store of aspect-ratio buckets against a square one of the same images.

Both stores have as many images, of about as many pixels, in as many shards, raw as they are by default, of noise.
Used by benchmarks/buckets.py; by itself:

    python -m benchmarks.buckets_loader --images 2000
"""

import argparse
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import interleaved_rates, median_ratio, report
from imagen_core import store as st
from imagen_core.store.buckets import Shape, bucket_shapes, scaled

SIZES = (64, 256)
SHARD_ROWS, BATCH = 500, 32
USUAL_SIZES = ((1024, 683), (683, 1024), (1024, 768), (768, 1024), (1024, 1024), (1280, 720), (800, 1000))
"""Width and height of the originals, in turn, where none are given."""


def loader_rates(
    work: Path, originals: Sequence[tuple[int, int]], rounds: int = 5, seconds: float = 3.0, seed: int = 0
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and ratios for a report: complete epochs of shuffled batches of 32, of both sizes, in interleaved rounds.

    Args:
        work: folder for the two stores; written once.
        originals: width and height of each image's original.
        rounds, seconds: rounds of each loader, and the least time of each.
    """
    loaders = {}
    for name in ("square", "buckets"):
        write_store(work / name, originals, buckets=name == "buckets", seed=seed)
        store = st.Store.open(work / name)
        loaders[name] = store.loader(BATCH, images=list(SIZES), seed=seed)
    samples = len(originals)
    batches = {name: len(loader) for name, loader in loaders.items()}

    def epoch_of(name: str) -> Callable[[], None]:
        def epoch() -> None:
            seen = sum(len(batch["keys"]) for batch in loaders[name])
            assert seen == samples, f"{name}: {seen} samples in an epoch of {samples}"

        return epoch

    rates = interleaved_rates({name: epoch_of(name) for name in loaders}, rounds, seconds)
    rows = [
        {
            "loader": name,
            "images": samples,
            "batches_per_epoch": batches[name],
            "batches_per_s": sorted(found)[len(found) // 2] * batches[name],
            "images_per_s": sorted(found)[len(found) // 2] * samples,
        }
        for name, found in rates.items()
    ]
    of_images = median_ratio(rates, "buckets", "square")
    ratios = {
        "loader, images a second: buckets / square": of_images,
        "loader, batches a second: buckets / square": of_images * batches["buckets"] / batches["square"],
    }
    return rows, ratios


def write_store(root: Path, originals: Sequence[tuple[int, int]], *, buckets: bool, seed: int = 0) -> None:
    """A store of raw images of noise, as precompute writes it, without captions' embeddings."""
    if (root / "manifest.json").exists():
        return
    shapes = {size: scaled(bucket_shapes(min(SIZES)), min(SIZES), size) if buckets else () for size in SIZES}
    groups: dict[str, dict[str, Any]] = {"samples": {"kind": "samples"}}
    for size in SIZES:
        config = {"shapes": [list(shape) for shape in shapes[size]]} if buckets else {}
        base = {"kind": "images", "size_px": size, "format": "parquet", "codec": "raw"}
        groups[st.image_group(size)] = {**base, "config": config}
    for name in groups:
        (root / name).mkdir(parents=True, exist_ok=True)
    dice, shards = np.random.default_rng(seed), []
    for index, first in enumerate(range(0, len(originals), SHARD_ROWS)):
        rows = originals[first : first + SHARD_ROWS]
        samples = [
            st.SampleRow(f"{first + row:08d}", ("",), (0,), None, "0" * 64, width, height, row)
            for row, (width, height) in enumerate(rows)
        ]
        paths = {name: st.shard_path(name, index, "parquet") for name in groups}
        st.write_samples(root / paths["samples"], samples)
        for size in SIZES:
            group = st.parse_group(st.image_group(size), groups[st.image_group(size)])
            assert isinstance(group, st.ImagesGroup)
            with st.open_image_writer(root / paths[group.name], size, "parquet", "raw", shapes[size]) as writer:
                for sample in samples:
                    pixels = noise(dice, group.shape_of(sample.width, sample.height))
                    writer.append(pixels, sample.key, sample.sha256)
        files = {name: file_entry(root, path, len(rows)) for name, path in paths.items()}
        shards.append({"index": index, "rows": len(rows), "files": files})
    st.write_manifest(root / "manifest.json", {"writer": "benchmark", "groups": groups}, shards)


def noise(dice: np.random.Generator, shape: Shape) -> np.ndarray:
    return dice.integers(0, 256, (*shape, 3), dtype=np.uint8)


def file_entry(root: Path, path: str, rows: int) -> dict[str, Any]:
    data = (root / path).read_bytes()
    return {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="least seconds of each loader in a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for the stores, kept; without it a temporary one")
    parser.add_argument("--out", type=Path, help="JSON report")
    arguments = parser.parse_args()
    originals = [USUAL_SIZES[index % len(USUAL_SIZES)] for index in range(arguments.images)]
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        rows, ratios = loader_rates(work, originals, arguments.rounds, arguments.seconds, arguments.seed)
    report("buckets_loader", rows, ratios, arguments.out, packages=["imagen-precompute", "numpy", "pyarrow", "torch"])


if __name__ == "__main__":
    main()
