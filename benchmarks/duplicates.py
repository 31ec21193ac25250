"""How well and how fast are duplicates found?

Two parts. Among a million hashes, a tenth of which are those of altered copies: how many copies are found, in which
processor time and memory? And of emoji that were compressed, resized, cropped and mirrored: how many are found
(recall), and how many of those that are found are right (precision)?

Some emoji are others, mirrored or nearly so ("facing right"). Precision is given strictly, where each match with
another emoji is wrong, and where it is right if the unaltered emoji differ by less than 2 levels on average.

python -m benchmarks.duplicates --work evidence-run/duplicates --out benchmarks/results/duplicates.json
"""

import argparse
import io
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks.common import report
from stages.duplicates.hashing import HASHES, hash_image
from stages.duplicates.match import match
from stages.images import read_image

EMOJI = Path(__file__).resolve().parents[2] / "shared" / "data" / "noto-emoji" / "images"
_COPIES = 0.1
_CROWDS, _IN_A_CROWD = 10, 200
_SAME_LEVELS = 2.0


def altered(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """The copies whose originals are to be found."""
    side = image.width
    for quality in (30, 60, 90):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        yield f"jpeg {quality}", Image.open(buffer).convert("RGB")
    for factor in (0.5, 0.75, 2.0):
        yield f"resize {factor:g}x", image.resize((round(side * factor),) * 2, Image.Resampling.BICUBIC)
    edge = round(side * 0.05)
    yield "crop 5 %, middle", image.crop((edge // 2, edge // 2, side - (edge - edge // 2), side - (edge - edge // 2)))
    yield "crop 5 %, corner", image.crop((edge, edge, side, side))
    yield "mirror", ImageOps.mirror(image)


def search(count: int, seed: int) -> dict[str, Any]:
    """Finds planted copies among so many hashes."""
    random = np.random.default_rng(seed)
    perceptual = random.integers(0, 2**64, (count, HASHES.num_perceptual), dtype=np.uint64)
    copies = np.sort(random.choice(np.arange(count // 2, count), int(count * _COPIES), replace=False))
    originals = random.integers(0, count // 2, len(copies))
    variants = random.integers(0, HASHES.num_perceptual, len(copies))
    perceptual[copies, 0] = perceptual[originals, variants]
    for _ in range(4):  # 0 to 4 other bits
        flips = np.uint64(1) << random.integers(0, 64, len(copies), dtype=np.uint64)
        perceptual[copies, 0] ^= np.where(random.random(len(copies)) < 0.5, flips, np.uint64(0))
    crowd = random.choice(count // 2, (_CROWDS, min(_IN_A_CROWD, count // 40)), replace=False)
    crowd = crowd[:, ~np.isin(crowd, originals).any(axis=0)]
    perceptual[crowd, 0] = perceptual[crowd[:, :1], 0]  # the same hash, but other images
    shown = np.arange(count)
    shown[copies] = originals
    mirrored = np.zeros(count, bool)
    mirrored[copies] = variants % 2
    patterns = random.integers(0, 256, (4096, 4, 4, 3), dtype=np.uint8)

    def thumbnails(numbers: np.ndarray) -> np.ndarray:
        side = HASHES.thumbnail_px // 4
        found = patterns[shown[numbers] % len(patterns)].repeat(side, axis=1).repeat(side, axis=2)
        flipped = mirrored[numbers]
        found[flipped] = found[flipped][:, :, ::-1]
        return found

    pixels = random.integers(0, 256, (count, 32), dtype=np.uint8)
    before_mib, started = peak_mib(), time.process_time()
    found = match(pixels, perceptual, 0, thumbnails)
    return {
        "what": f"{count:,} hashes",
        "processor_s": round(time.process_time() - started, 1),
        "peak_mib": round(peak_mib()),
        "of_it_before_mib": round(before_mib),
        "recall": float(np.isin(found.kept[copies], originals).mean()) if len(copies) else 1.0,
        "found": int((found.kept != np.arange(count)).sum()),
        "planted": len(copies),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def hashes_of(path: Path, work: Path) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, float]:
    """Names, pixel digests, perceptual hashes, thumbnails and milliseconds of an emoji and its copies; kept in the
    work folder, so that a run that was ended goes on."""
    kept = work / f"{path.stem}.npz"
    if not kept.exists():
        image = Image.fromarray(read_image(path))
        named = [("original", image), *altered(image)]
        started = time.process_time()
        hashes = [hash_image(np.asarray(copy)) for _, copy in named]
        seconds = time.process_time() - started
        temporary = kept.with_suffix(".tmp.npz")
        np.savez(
            temporary,
            names=np.array([name for name, _ in named]),
            pixels=np.stack([np.frombuffer(h.pixels, np.uint8) for h in hashes]),
            perceptual=np.stack([h.perceptual for h in hashes]),
            thumbnails=np.stack([h.thumbnail for h in hashes]),
            seconds=seconds / len(hashes),
        )
        temporary.replace(kept)
    with np.load(kept) as saved:
        names = saved["names"].tolist()
        return names, saved["pixels"], saved["perceptual"], saved["thumbnails"], float(saved["seconds"])


def quality(count: int, work: Path) -> Iterator[dict[str, Any]]:
    """Recall and precision for each kind of copy, and of all."""
    work.mkdir(parents=True, exist_ok=True)
    files = sorted(EMOJI.glob("*.png"))[:count]
    made = []
    for number, file in enumerate(files, start=1):
        made.append(hashes_of(file, work))
        if number % 100 == 0:
            print(f"{number} of {len(files)} emoji hashed", flush=True)
    names = made[0][0]
    each = len(names)
    order = [(emoji, 0) for emoji in range(len(made))]
    order += [(emoji, copy) for copy in range(1, each) for emoji in range(len(made))]
    emoji_of, copy_of = np.array(order).T
    pixels, perceptual, thumbnails = (np.stack([made[e][part][c] for e, c in order]) for part in (1, 2, 3))
    found = match(pixels, perceptual, len(made), thumbnails.__getitem__)
    is_found = found.kept < len(made)
    right = is_found & (emoji_of[found.kept] == emoji_of)
    alike = right.copy()
    for place in np.flatnonzero(is_found & ~right):
        alike[place] = same_design(files[emoji_of[place]], files[emoji_of[found.kept[place]]])
    for what, these in [(name, copy_of == copy) for copy, name in enumerate(names) if copy] + [("all", copy_of > 0)]:
        yield {
            "what": what,
            "images": int(these.sum()),
            "recall": float(alike[these].mean()),
            "precision": float(alike[these].sum() / max(1, is_found[these].sum())),
            "precision_strict": float(right[these].sum() / max(1, is_found[these].sum())),
        }
    yield {"what": "hashes of an image", "processor_ms": 1000 * float(np.mean([each[4] for each in made]))}


def same_design(first: Path, second: Path) -> bool:
    """Whether two unaltered emoji are the same, or mirrored."""
    one, two = (read_image(path, 256).astype(np.float32) for path in (first, second))
    return min(np.abs(one - two).mean(), np.abs(one - two[:, ::-1]).mean()) < _SAME_LEVELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hashes", type=int, default=1_000_000, help="for the search")
    parser.add_argument("--emoji", type=int, default=2000, help="for recall and precision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for hashes that are made already")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    results = []
    print(f"searching {options.hashes:,} hashes ...", flush=True)
    results.append(search(options.hashes, options.seed))
    print(json.dumps(results[-1]), flush=True)
    if EMOJI.is_dir():
        results += quality(options.emoji, options.work)
    notes = [] if EMOJI.is_dir() else [f"no recall and precision: {EMOJI} is missing"]
    report("duplicates", results, {}, options.out, ["numpy", "ImageHash", "opencv-python-headless", "Pillow"], notes)


if __name__ == "__main__":
    main()
