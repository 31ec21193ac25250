"""Images per second per core of decode and resize, against Pillow and img2dataset, and how exact each is.

    python -m benchmarks.resize --out benchmarks/results/resize.json

Every method makes the 64 and the 256 pixel image of a centre crop on one thread, timed in CPU seconds.
img2dataset makes one size per run and always encodes its output, so it runs twice, and is
compared with a row of ours that also encodes.
"""

import argparse
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import interleaved_rates, median_ratio, report
from stages.images import center_square, decode_rgb, pyramid

SIZES_PX = (64, 256)
EMOJI = Path(__file__).parents[1].parent / "shared/data/noto-emoji/images"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="per method and round")
    args = parser.parse_args()
    use_one_thread()

    results, ratios = [], {}
    for workload, files in workloads().items():
        rates = interleaved_rates(methods(files), args.rounds, args.seconds, clock=time.process_time)
        for method, values in rates.items():
            median = statistics.median(values)
            results.append(
                {"workload": workload, "method": method, "img_per_s_core": round(median, 1), "ms": 1000 / median}
            )
        for ours, other in COMPARISONS:
            ratios[f"{workload}: {ours} / {other}"] = round(median_ratio(rates, ours, other), 2)
    results += quality()
    packages = ["imagen-precompute", "pillow", "torch", "numpy", "img2dataset", "opencv-python-headless"]
    report("resize", results, ratios, args.out, packages)


def use_one_thread() -> None:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # img2dataset imports albumentations, which asks the network
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


# ---- input ----


def workloads() -> dict[str, list[bytes]]:
    files = {"jpeg 1024x768 q90": [jpeg(photo_like(768, 1024, seed)) for seed in range(8)]}
    emoji = sorted(EMOJI.glob("*.png"))[::60][:32]
    if emoji:
        files["png 512x512 rgba"] = [path.read_bytes() for path in emoji]
    return files


def photo_like(height: int, width: int, seed: int) -> np.ndarray:
    """Soft colour shapes, ramps and grain; as JPEG q90 about 3 bits per pixel, like a photo."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    shapes = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    ramp = np.linspace(-40, 40, width)[None, :, None] + np.linspace(-30, 30, height)[:, None, None]
    return np.clip(shapes + ramp + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def zone_plate(size: int) -> np.ndarray:
    """Rings from 0 cycles/pixel in the centre to 0.5 at the edge."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.repeat((127.5 + 127.5 * np.cos(np.pi * (x * x + y * y) / size))[..., None], 3, 2).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# ---- methods ----

COMPARISONS = [
    ("ours", "pillow"),
    ("ours", "img2dataset jpg"),
    ("ours + jpg", "img2dataset jpg"),
    ("ours", "img2dataset png"),
    ("ours: resize only", "pillow: resize only"),
    ("ours: resize only", "cv2 area: resize only"),
]


def methods(files: list[bytes]) -> dict[str, Callable[[], object]]:
    """Each function handles the next image of the workload."""
    squares = [np.ascontiguousarray(center_square(decode_rgb(data, max_pixels=10**8).pixels)) for data in files]
    img2dataset_jpg = [img2dataset_resizer(size, "jpg", 95) for size in SIZES_PX]
    img2dataset_png = [img2dataset_resizer(size, "png", 6) for size in SIZES_PX]
    return {
        "ours": over(files, ours),
        "pillow": over(files, pillow),
        "img2dataset jpg": over(files, lambda data: [run(io.BytesIO(data)) for run in img2dataset_jpg]),
        "img2dataset png": over(files, lambda data: [run(io.BytesIO(data)) for run in img2dataset_png]),
        "ours + jpg": over(files, lambda data: [jpeg(level, 95) for level in ours(data).values()]),
        "ours: decode only": over(files, lambda data: decode_rgb(data, max_pixels=10**8)),
        "ours: resize only": over(squares, lambda pixels: pyramid(pixels, SIZES_PX)),
        "pillow: resize only": over(squares, pillow_levels),
        "cv2 area: resize only": over(squares, area_levels),
    }


def over(inputs: list[Any], fn: Callable[[Any], object]) -> Callable[[], object]:
    endless = itertools.cycle(inputs)
    return lambda: fn(next(endless))


def ours(data: bytes) -> dict[int, np.ndarray]:
    return pyramid(decode_rgb(data, max_pixels=10**8).pixels, SIZES_PX)


def pillow(data: bytes) -> list[np.ndarray]:
    image = Image.open(io.BytesIO(data))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return [np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)) for size in SIZES_PX]


def pillow_levels(square: np.ndarray) -> list[np.ndarray]:
    image = Image.fromarray(square)
    return [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for size in SIZES_PX]


def area_levels(square: np.ndarray) -> list[np.ndarray]:
    import cv2

    return [cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA) for size in SIZES_PX]


def img2dataset_resizer(size_px: int, encode_format: str, encode_quality: int) -> Callable[[io.BytesIO], tuple]:
    from img2dataset.resizer import Resizer

    return Resizer(
        image_size=size_px,
        resize_mode="center_crop",
        resize_only_if_bigger=False,
        encode_format=encode_format,
        encode_quality=encode_quality,
    )


# ---- quality ----


def quality() -> list[dict[str, Any]]:
    """Difference from Pillow's antialiased bicubic, in levels of 255."""
    inputs = {"zone plate": zone_plate, "photo-like": lambda side: photo_like(side, side, seed=0)}
    rows = []
    for (name, make), (side, size) in itertools.product(inputs.items(), [(768, 64), (768, 256), (300, 256)]):
        pixels = make(side)
        reference = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
        encoded = img2dataset_resizer(size, "png", 6)(io.BytesIO(png(pixels)))[0]
        made = {
            "ours": pyramid(pixels, (size,))[size],
            "img2dataset png": np.asarray(Image.open(io.BytesIO(encoded))),
            "no antialiasing": np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)),
        }
        for method, out in made.items():
            difference = np.abs(out.astype(int) - reference)
            rows.append(
                {
                    "workload": f"{name} {side} -> {size}",
                    "method": method,
                    "max_levels": int(difference.max()),
                    "mean_levels": round(float(difference.mean()), 3),
                }
            )
    return rows


if __name__ == "__main__":
    main()
