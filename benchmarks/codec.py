"""What does an image cost in each codec of the store: bytes, encoding, reading all of it, reading a quarter-side crop?

    python -m benchmarks.codec --out benchmarks/results/codec.json

Images are the emoji of the shared data on white, or synthetic scenes where they are absent, and a "grainy" copy of
each with the noise of a camera, which is what photographs look like to a lossless codec. Images of 1024 px are
upsampled.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import interleaved_rates, median_ratio, report
from imagen_core import store as st
from imagen_core.store.codec import Codec, encode
from imagen_core.store.files.images import ImageFile, open_images
from stages.images import center_square, decode_rgb, pyramid
from stages.sources.synthetic.scenes import render, scene

EMOJI = Path(__file__).parents[1].parent / "shared/data/noto-emoji/images"
SIZES_PX = {64: 64, 256: 32, 1024: 6}  # and how many images
CODECS: list[Codec] = ["raw", "png", "webp", "jpeg"]
GRAIN_LEVELS = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/codec.json")
    parser.add_argument("--dir", type=Path, help="where to put the temporary files; default: the system's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="per codec and round")
    args = parser.parse_args()
    originals = originals_of(max(SIZES_PX.values()))
    results: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for size_px, count in SIZES_PX.items():
            flat = np.stack([resized(square, size_px) for square in originals[:count]])
            grain = np.random.default_rng(0).normal(0, GRAIN_LEVELS, flat.shape)
            grainy = (flat + grain).clip(0, 255).round().astype(np.uint8)
            for kind, images in (("flat", flat), ("grainy", grainy)):
                found, more = measure(Path(folder), kind, images, args.rounds, args.seconds)
                results += found
                ratios |= more
    notes = [
        f"flat: {'emoji on white' if EMOJI.is_dir() else 'drawn scenes'}; grainy: the same with Gaussian noise of "
        f"{GRAIN_LEVELS:g} levels",
        "one thread, warm page cache; read: out of a parquet file of the store into an array of its own; "
        "crop: a square of a quarter of the side",
        f"images: {', '.join(f'{count} of {size} px' for size, count in SIZES_PX.items())}",
    ]
    report("codec", results, ratios, args.out, ["imagen-precompute", "pillow", "numpy"], notes)


def originals_of(count: int) -> list[np.ndarray]:
    """uint8 squares of 512 px."""
    if EMOJI.is_dir():
        paths = sorted(EMOJI.iterdir())
        chosen = paths[:: len(paths) // count][:count]
        return [
            np.ascontiguousarray(center_square(decode_rgb(p.read_bytes(), max_pixels=10**8).pixels)) for p in chosen
        ]
    return [render(scene(0, index), 512) for index in range(count)]


def resized(square: np.ndarray, size_px: int) -> np.ndarray:
    if size_px > len(square):
        return np.asarray(Image.fromarray(square).resize((size_px, size_px), Image.Resampling.BICUBIC))
    return pyramid(square, (size_px,), "bicubic")[size_px]


def measure(
    folder: Path, kind: str, images: np.ndarray, rounds: int, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    size_px = images.shape[1]
    files: dict[str, ImageFile] = {}
    rows: list[dict[str, Any]] = []
    for codec in CODECS:
        began = time.process_time()
        encoded = [encode(image, codec) for image in images]
        encode_ms = (time.process_time() - began) / len(images) * 1000
        path = folder / f"{kind}-{size_px}-{codec}"
        with st.open_image_writer(path, size_px, "parquet", codec) as writer:
            for image in images:
                writer.append(image, "key", "sha256")
        files[codec] = open_images(
            str(path), path.name, st.ImagesGroup(f"images-{size_px}", size_px, "parquet", codec)
        )
        errors = [np.abs(files[codec].pixels(k).astype(int) - image) for k, image in enumerate(images)]
        rows.append(
            {
                "images": kind,
                "px": size_px,
                "codec": codec,
                "bytes": round(statistics.mean(map(len, encoded))),
                "encode_ms": encode_ms,
                "mean_error_levels": float(np.mean(errors)),
                "max_error_levels": int(np.max(errors)),
            }
        )
    whole = {codec: reader(file, slice(None)) for codec, file in files.items()}
    crop = {f"{codec} crop": reader(file, slice(size_px // 2, size_px // 4 * 3)) for codec, file in files.items()}
    rates = interleaved_rates(whole | crop, rounds, seconds)
    raw_bytes = rows[0]["bytes"]
    ratios: dict[str, float] = {}
    for row in rows:
        codec, name = row["codec"], f"{kind} {size_px} px: {row['codec']} / raw"
        row["read_ms"] = 1000 / statistics.median(rates[codec]) / len(images)
        row["crop_ms"] = 1000 / statistics.median(rates[f"{codec} crop"]) / len(images)
        row["read_mb_per_s"] = raw_bytes / row["read_ms"] / 1000
        if codec == "raw":
            ratios[f"{kind} {size_px} px: raw crop / raw whole, rate"] = median_ratio(rates, "raw crop", "raw")
        else:
            ratios[f"{name}, bytes"] = row["bytes"] / raw_bytes
            ratios[f"{name}, read rate"] = median_ratio(rates, codec, "raw")
    return rows, ratios


def reader(file: ImageFile, part: slice) -> Callable[[], None]:
    """Returns a function that reads all images, or a square of each."""

    def read() -> None:
        for row in range(file.num_rows):
            np.array(file.pixels(row)[part, part])

    return read


if __name__ == "__main__":
    main()
