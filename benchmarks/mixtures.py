"""Are the shares of a mixture exact, and is it as fast as one store?

Two parts. Over a million positions, for several sets of weights: by how much does the share of a store differ from
what its weight says, at worst in any 10,000 samples? And how many batches a second do mixtures of 1, 2 and 8 stores
give, against one store with as many samples, in turns, in processor time?

python -m benchmarks.mixtures --out benchmarks/results/mixtures.json
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import interleaved_rates, median_ratio, report
from benchmarks.store_formats import Captions, write_store
from imagen_core.store import Mixture, Store
from imagen_core.store.read.quota import Quota

WEIGHTS = {
    "0.7, 0.3": (0.7, 0.3),
    "1, 1, 1": (1.0, 1.0, 1.0),
    "0.999, 0.001": (0.999, 0.001),
    "0.5, 0.3, 0.15, 0.05": (0.5, 0.3, 0.15, 0.05),
    "64 stores, 1 to 64": tuple(float(weight) for weight in range(1, 65)),
}
WINDOW = 10_000
BLOCK = 1 << 16
SIZE_PX, BATCH, DIM = 64, 32, 1024


def shares(name: str, weights: tuple[float, ...], positions: int, seed: int) -> dict[str, Any]:
    """The worst error of any store in any window, in samples and as a part of the window."""
    quota = Quota(weights)
    started = time.process_time()
    turns = np.concatenate(
        [quota.turns(start, min(start + BLOCK, positions))[0] for start in range(0, positions, BLOCK)]
    )
    seconds = time.process_time() - started
    window = min(WINDOW, positions)
    worst, worst_of_share = 0.0, 0.0
    for store, share in enumerate(quota.weights / quota.weights.sum()):
        had = np.concatenate([[0], np.cumsum(turns == store, dtype=np.int64)])
        error = float(np.abs(had[window:] - had[:-window] - window * share).max())
        worst, worst_of_share = max(worst, error), max(worst_of_share, error / (window * share))
    places = np.random.default_rng(seed).integers(0, positions, 100)
    exact = all(
        np.array_equal(quota.counts(int(place)), np.bincount(turns[:place], minlength=len(weights)))
        for place in places
    )
    return {
        "what": f"shares of {name}",
        "positions": positions,
        "worst_samples": worst,
        "worst_part_of_window": worst / window,
        "worst_part_of_the_stores_share": worst_of_share,
        "counts_at_100_places_are_right": exact,
        "ns_per_sample": 1e9 * seconds / positions,
    }


def batches(loader: Any) -> Callable[[], None]:
    """Reads one batch per call."""

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    stream = endless()
    return lambda: next(stream) and None


def speed(folder: Path, samples: int, rounds: int, seconds: float, seed: int) -> tuple[list[dict[str, Any]], dict]:
    """Batches per second of processor time of one store and of mixtures with as many samples in all."""
    random = np.random.default_rng(seed)
    captions = Captions.make(samples, DIM, 20.0)
    pixels = random.integers(0, 256, (samples, SIZE_PX, SIZE_PX, 3), np.uint8)
    options: dict[str, Any] = {"images": [SIZE_PX], "text": "t5", "seed": seed}
    loaders = {}
    for count in (1, 2, 8):
        stores = {}
        for number in range(count):
            part = slice(number * samples // count, (number + 1) * samples // count)
            of_part = Captions(
                captions.tokens[captions.offsets[part.start] : captions.offsets[part.stop]],
                captions.offsets[part.start : part.stop + 1] - captions.offsets[part.start],
            )
            root = folder / f"{count}-{number}"
            write_store(root, of_part, {SIZE_PX: pixels[part]}, "parquet")
            stores[f"store-{number}"] = Store.open(root)
        if count == 1:
            loaders["one store"] = stores["store-0"].loader(BATCH, **options)
        weights = {name: 1.0 + number for number, name in enumerate(stores)}
        loaders[f"mixture of {count}"] = Mixture(stores, weights).loader(BATCH, **options)
        print(f"{count} stores written", flush=True)
    rates = interleaved_rates({n: batches(one) for n, one in loaders.items()}, rounds, seconds, time.process_time)
    results = [{"what": name, "batches_per_s": float(np.median(values))} for name, values in rates.items()]
    ratios = {f"{name} / one store": median_ratio(rates, name, "one store") for name in rates if name != "one store"}
    return results, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1_000_000, help="of the shares")
    parser.add_argument("--samples", type=int, default=4000, help="of the stores that are read")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="per loader and round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where to put the temporary stores; default: the system's")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for name, weights in WEIGHTS.items():
        results.append(shares(name, weights, options.positions, options.seed))
        print(json.dumps(results[-1]), flush=True)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        found, ratios = speed(Path(folder), options.samples, options.rounds, options.seconds, options.seed)
    worst = max(row["worst_part_of_window"] for row in results)
    ratios = {f"worst error of a share in any {WINDOW:,} samples (at most 0.01)": worst, **ratios}
    notes = [
        f"worst_part_of_window: largest |samples of a store - share x {WINDOW:,}| / {WINDOW:,} in any stretch of that "
        "length; worst_part_of_the_stores_share: the same, divided by the store's share",
        f"batches of {BATCH} samples of {SIZE_PX} px and a caption of 20 x {DIM} float16; {options.samples:,} samples "
        "in all; weights 1, 2, 3 ...; processor time, warm page cache",
    ]
    report("mixtures", [*results, *found], ratios, options.out, ["numpy", "torch", "imagen-precompute"], notes)


if __name__ == "__main__":
    main()
