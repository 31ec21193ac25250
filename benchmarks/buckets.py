"""How much of the images do aspect-ratio buckets keep, and do their pixels equal Pillow's?

Images of noise and soft colours have the widths and heights of COCO 2017's validation set (5,000 photographs;
`coco_val2017_sizes.csv` counts each size in its published annotations). They are precomputed in squares and in buckets
at 64 and 256 px. Then

- crops: the part of an image that is cut off, on average: of the stored images and, by their sizes, of the whole set;
- pixels: the greatest difference to Pillow's crop and resize, over all images and sizes;
- pair: whether both sizes show the same part of the original, by the box that each is cut from;
- read: images a second out of the store, in buckets against squares, in processor time;
- loader: shuffled batches of both sizes, in buckets against squares, in processor time: full batches, in bytes a
  second, which is batches a second at equal pixels a batch; and complete epochs, whose last batches are smaller.

    python -m benchmarks.buckets --work evidence-run/buckets --out benchmarks/results/buckets.json
"""

import argparse
import csv
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import interleaved_rates, median_ratio, report
from imagen_core.store import Store, bucket_shapes, choose_shape, crop_box, verify_store
from imagen_core.store.buckets import scaled
from imagen_core.store.read.loader import Loader
from pipeline.config import load_config
from pipeline.options import RunOptions
from stages.precompute.crops import Crops, crops_line, crops_of, measured
from workflows.precompute import Precompute, PrecomputeConfig

_SIZES = Path(__file__).parent / "coco_val2017_sizes.csv"
_SIZES_PX = (64, 256)
_ASPECTS = ("square", "buckets")
_READ_IMAGES = 256
_BATCH = 32


def coco_sizes() -> list[tuple[int, int]]:
    """Width and height of each image of the set."""
    with _SIZES.open(newline="") as file:
        rows = [{name: int(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [(row["width"], row["height"]) for row in rows for _ in range(row["images"])]


def draw(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """Colour ramps, waves and grain: uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width].astype(np.float32) / max(width, height)
    a, b, c = random.uniform(2, 20, (3, 3)).astype(np.float32)
    waves = np.stack([np.sin(p * x + q * y + r) for p, q, r in zip(a, b, c, strict=True)], axis=-1)
    grain = random.normal(0, 12, (height, width, 1)).astype(np.float32)
    return (128 + 90 * waves + grain).clip(0, 255).astype(np.uint8)


def write_images(folder: Path, sizes: Sequence[tuple[int, int]], seed: int) -> None:
    """PNG files with a caption each; files that are there already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        path = folder / f"{number:05d}.png"
        if not path.with_suffix(".txt").exists():
            pixels = draw(width, height, np.random.default_rng((seed, number)))
            Image.fromarray(pixels).save(path, compress_level=1)
            path.with_suffix(".txt").write_text(f"image {number}")
        if number % 200 == 199:
            print(f"drawn  {number + 1}/{len(sizes)}", flush=True)


def run(work: Path, images: Path, aspect: str) -> dict[str, Any]:
    """Precomputes the folder; goes on where it was ended."""
    settings = [
        "source.kind=folder",
        f"source.path={images}",
        f"images.sizes_px={list(_SIZES_PX)}",
        f"images.aspect={aspect}",
        "encoders=[]",
        "shard_size=100",
        "filters=[{kind: too_small, action: upscale}]",
    ]
    workflow = Precompute(load_config(PrecomputeConfig, None, settings))
    summary: Any = workflow.run(str(work / aspect), RunOptions("inline", quiet=True))
    crops = crops_of(summary["tally"]["groups"]["samples"]["counters"])
    assert crops is not None
    print(f"{aspect}  {summary['num_samples']} samples; {crops_line(crops)}", flush=True)
    return {"aspect": aspect, "samples": summary["num_samples"], **_flat(crops)}


def _flat(crops: Crops) -> dict[str, Any]:
    return {"cropped_by_squares": crops.square, "cropped_by_buckets": crops.buckets}


def pixels(store: Store, images: Path) -> Iterator[tuple[str, int, int]]:
    """Key, size and greatest difference to Pillow's crop and resize, of each image."""
    shapes = bucket_shapes(_SIZES_PX[0])
    for number, sample in enumerate(store):
        with Image.open(images / sample.key) as original:
            for size in _SIZES_PX:
                height, width = choose_shape(sample.width, sample.height, scaled(shapes, _SIZES_PX[0], size))
                crop = original.crop(crop_box(sample.width, sample.height, (height, width)))
                expected = np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC), np.int16)
                assert sample.images[size].shape == expected.shape, sample.key
                yield sample.key, size, int(np.abs(sample.images[size] - expected).max())
        if number % 200 == 199:
            print(f"compared  {number + 1}/{len(store)}", flush=True)


def same_part(sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether the images of all sizes are cut from the same box of each original."""
    shapes = {size: scaled(bucket_shapes(_SIZES_PX[0]), _SIZES_PX[0], size) for size in _SIZES_PX}
    boxes = [{crop_box(*wh, choose_shape(*wh, listed)) for listed in shapes.values()} for wh in dict.fromkeys(sizes)]
    return all(len(found) == 1 for found in boxes)


def reading(store: Store, size_px: int, seed: int) -> Callable[[], None]:
    """Reads images at random places into memory of their own."""
    chosen = np.random.default_rng(seed).integers(0, len(store), _READ_IMAGES).tolist()
    places = [store.locate(index) for index in chosen]

    def read() -> None:
        for shard, row in places:
            np.array(store.shard(shard).images[size_px].pixels(row))

    return read


def epoch_rates(loader: Loader, samples: int) -> dict[str, float]:
    """Reads the loader's next epoch; images and batches a second of processor time, and bytes of the full batches."""
    batches, seen, full_bytes, seconds, full_seconds = iter(loader), 0, 0, 0.0, 0.0
    while True:
        began = time.process_time()
        batch = next(batches, None)
        took = time.process_time() - began
        if batch is None:
            break
        count = len(batch["keys"])
        seen, seconds = seen + count, seconds + took
        if count == _BATCH:
            full_bytes += sum(images.numel() for images in batch["images"].values())
            full_seconds += took
    assert seen == samples, f"{seen} samples in an epoch of {samples}"
    return {"images": seen / seconds, "batches": len(loader) / seconds, "bytes": full_bytes / full_seconds}


def loading(stores: Mapping[str, Store], epochs: int, seed: int) -> dict[str, list[dict[str, float]]]:
    """The rates of a loader of each store, one epoch of each in turn."""
    loaders = {name: each.loader(_BATCH, images=list(_SIZES_PX), seed=seed) for name, each in stores.items()}
    rounds = [
        {name: epoch_rates(loader, len(stores[name])) for name, loader in loaders.items()} for _ in range(epochs + 1)
    ]
    return {name: [rates[name] for rates in rounds[1:]] for name in stores}  # the first one opens the files


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    every = coco_sizes()
    chosen = np.random.default_rng(args.seed).permutation(len(every))[: args.images].tolist()
    sizes, images = [every[index] for index in chosen], args.work / "images"
    write_images(images, sizes, args.seed)
    results = [run(args.work, images, aspect) for aspect in _ASPECTS]
    stores = {aspect: Store.open(args.work / aspect / "store") for aspect in _ASPECTS}
    for aspect in _ASPECTS:
        assert verify_store(args.work / aspect / "store").ok
    differences = [difference for *_, difference in pixels(stores["buckets"], images)]
    whole = measured(every, bucket_shapes(_SIZES_PX[0]), stored=True)
    assert whole is not None
    results.append({"aspect": "buckets, the whole set by its sizes", "samples": whole.images, **_flat(whole)})
    results += _histogram(whole.histogram or {}, whole.images)
    ratios: dict[str, float] = {
        "cropped by buckets": results[1]["cropped_by_buckets"],
        "cropped by squares": results[1]["cropped_by_squares"],
        "greatest difference to Pillow, levels": float(max(differences)),
        "images of which both sizes show the same part": float(same_part(every)),
        "bytes of images, buckets / square": _bytes(stores["buckets"]) / _bytes(stores["square"]),
    }
    for size in _SIZES_PX:
        reads = {aspect: reading(store, size, args.seed) for aspect, store in stores.items()}
        rates = interleaved_rates(reads, args.rounds, args.seconds, time.process_time)
        ratios[f"read {size} px, buckets / square, rate"] = median_ratio(rates, "buckets", "square")
    epochs = loading(stores, args.epochs, args.seed)
    for what, name in (
        ("bytes", "full batches a second at equal pixels a batch"),
        ("images", "images a second, complete epochs"),
        ("batches", "batches a second, complete epochs"),
    ):
        rates = {aspect: [each[what] for each in rounds] for aspect, rounds in epochs.items()}
        ratios[f"loader, {name}, buckets / square"] = median_ratio(rates, "buckets", "square")
    return results, ratios


def _histogram(histogram: Mapping[str, int], images: int) -> list[dict[str, Any]]:
    return [
        {"aspect": f"bucket {shape}", "samples": number, "share": number / images}
        for shape, number in histogram.items()
    ]


def _bytes(store: Store) -> int:
    manifest = store.manifest
    names = [group.name for group in manifest.images.values()]
    return sum(shard.files[name].bytes for shard in manifest.shards() for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="for images and run folders; goes on with what is there"
    )
    parser.add_argument("--out", type=Path, help="where to write the JSON; default: nowhere")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="per reading and round")
    parser.add_argument("--epochs", type=int, default=9, help="of each loader, in turn")
    parser.add_argument("--fresh", action="store_true", help="delete what is in --work first")
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.work, ignore_errors=True)
    results, ratios = measure(args)
    notes = [
        f"{args.images} images with sizes drawn from the 5,000 of COCO 2017's validation set, at {_SIZES_PX} px",
        "cropped: the part of an image that is cut off, mean over images; squares of the same images beside it",
        "read: raw images at random places, in processor time; warm page cache",
        f"loader: {args.epochs} epochs of shuffled batches of {_BATCH} of both sizes, in turn, processor time; warm "
        "page cache. At equal pixels a batch: bytes of images a second of the full batches",
    ]
    report("buckets", results, ratios, args.out, ["imagen-precompute", "pillow", "torch", "numpy"], notes)


if __name__ == "__main__":
    main()
