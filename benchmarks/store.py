"""Bytes per caption and read rates of the store's two formats, against its peers and plain memory.

    python -m benchmarks.store --out benchmarks/results/store.json

Captions are Gaussian float16 (n_tokens, dim) with the lengths of PartiPrompts, or of a similar distribution.
All files were just written, so the page cache is warm: this is the cost of the format, not of the disk.
pickle is read here only because the peer's format consists of it.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import interleaved_rates, median_ratio, report
from benchmarks.store_formats import (
    NPZ_TOKENS,
    Captions,
    Read,
    endless_webdataset,
    size_bytes,
    write_and_map,
    write_hdf5_gzip,
    write_npz,
    write_store,
    write_webdataset,
)
from imagen_core.store import Store

SIZES_PX = (64, 256)
BATCH = 32
MAX_ITEMS = {"npz": 32, "gzip": 320, "batch": 1024}  # of slow or large ones: the rest would only repeat them
TRAINERS = {"demo trainer, 184 samples/s": 184, "500M UNet on an H200, about 250 samples/s": 250}
NOTES = [
    "warm page cache, one thread, files kept open; every reader hands out each caption in an array of its own, and "
    "memcpy does the same from an array in memory",
    "store: the embedding through the reader's public methods; store[i]: the whole sample; loader: batches of "
    f"{BATCH} padded to their longest, against the same batches made by hand from arrays in memory",
    f"npz padded: {NPZ_TOKENS} tokens, deflate, {MAX_ITEMS['npz']} captions; hdf5 gzip: h5py's default level and "
    f"chunks, {MAX_ITEMS['gzip']} captions",
    f"full batch: {BATCH} samples of {SIZES_PX} px and a caption, shuffled, from {MAX_ITEMS['batch']} samples",
    "bytes_per_item counts all files of a format: samples and manifest too; mib_per_s leaves padding out",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/store.json")
    parser.add_argument("--dir", type=Path, help="where to put the temporary files; default: the system's")
    parser.add_argument("--captions", type=int, default=4000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--mean-tokens", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="per reader and round")
    args = parser.parse_args()
    torch.set_num_threads(1)

    data = Captions.make(args.captions, args.dim, args.mean_tokens)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        readers = text_readers(Path(folder), data)
        results, ratios = [], {}
        for order in ("random", "sequential"):
            found, rates = measure(order, readers, args.rounds, args.seconds)
            results += found
            for ours in ("store", "store[i]"):
                ratios |= ratios_of(order, rates, ours, ["memcpy", "raw memmap", "webdataset pickle", "hdf5 gzip"])
            ratios |= ratios_of(order, rates, "loader", [BY_HAND, "memcpy", "raw memmap", "webdataset pickle"])
        found, rates = measure("full batch", batch_readers(Path(folder), data), args.rounds, args.seconds)
        results += found
        ratios |= ratios_of("full batch", rates, "loader", [BY_HAND, f"{BY_HAND}, memmap"])
        for name, needed in TRAINERS.items():
            ratios[f"full batch: loader hdf5 / {name}"] = round(statistics.median(rates["loader hdf5"]) / needed, 1)
    by_name = {reader.name: reader.num_bytes / reader.num_items for reader in readers}
    for peer in ("memcpy", "webdataset pickle", "npz padded"):
        ratios[f"bytes: store parquet / {peer}"] = round(by_name["store parquet"] / by_name[peer], 4)
    packages = ["imagen-precompute", "numpy", "torch", "pyarrow", "h5py", "webdataset"]
    report("store", results, ratios, args.out, packages, NOTES)


@dataclass
class Reader:
    """One way to read. The orders are endless: each `next` reads on and returns how many items it read."""

    name: str
    num_bytes: int
    num_items: int
    payload_bytes: float
    """Mean of an item."""
    orders: dict[str, Iterator[int]]
    items_a_call: int = 256
    """Items of one timed call."""


def measure(
    order: str, readers: list[Reader], rounds: int, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Items per second of each reader, round by round."""
    readers = [reader for reader in readers if order in reader.orders]
    for reader in readers:
        pull(reader.orders[order], reader.num_items)  # touches every page once
    calls = {r.name: (lambda r=r: pull(r.orders[order], r.items_a_call)) for r in readers}
    rates = interleaved_rates(calls, rounds, seconds)
    results = []
    for reader in readers:
        rates[reader.name] = [rate * reader.items_a_call for rate in rates[reader.name]]
        median = statistics.median(rates[reader.name])
        results.append(
            {
                "order": order,
                "reader": reader.name,
                "bytes_per_item": round(reader.num_bytes / reader.num_items),
                "items_per_s": round(median),
                "mib_per_s": round(median * reader.payload_bytes / 2**20),
                "items": reader.num_items,
            }
        )
    return results, rates


def pull(counts: Iterator[int], num_items: int) -> None:
    while num_items > 0:
        num_items -= next(counts)


def ratios_of(order: str, rates: dict[str, list[float]], ours: str, against: list[str]) -> dict[str, float]:
    pairs = itertools.product([f"{ours} parquet", f"{ours} hdf5"], against)
    return {f"{order}: {a} / {b}": round(median_ratio(rates, a, b), 2) for a, b in pairs}


# ---- captions ----


def text_readers(folder: Path, data: Captions) -> list[Reader]:
    payload = data.tokens.nbytes / len(data)

    def one_by_one(name: str, num_bytes: int, read: Read, n: int = len(data), items_a_call: int = 256) -> Reader:
        for i in (0, n // 2, n - 1):
            assert np.array_equal(read(i), data[i]), f"{name}: caption {i} differs"
        orders = {"random": each(read, shuffled(n)), "sequential": each(read, range(n))}
        return Reader(name, num_bytes, n, payload, orders, items_a_call)

    def batched(name: str, num_bytes: int, random: Iterator[int], sequential: Iterator[int]) -> Reader:
        return Reader(name, num_bytes, len(data), payload, {"random": random, "sequential": sequential})

    gzip = data.head(MAX_ITEMS["gzip"])
    mapped, tar = write_and_map(folder / "flat.bin", data), write_webdataset(folder / "tar", data)
    readers = [
        one_by_one("memcpy", data.num_bytes, lambda i: np.array(data[i])),
        one_by_one("raw memmap", data.num_bytes, lambda i: np.array(mapped[i])),
        one_by_one("webdataset pickle", size_bytes(folder / "tar"), tar),
        one_by_one("hdf5 gzip", *write_hdf5_gzip(folder / "gzip.h5", gzip), len(gzip), items_a_call=16),
        one_by_one("npz padded", *write_npz(folder / "npz", data, MAX_ITEMS["npz"]), MAX_ITEMS["npz"], items_a_call=4),
        batched(BY_HAND, data.num_bytes, batches_by_hand(data, {}, True), batches_by_hand(data, {}, False)),
    ]
    readers[2].orders["sequential"] = endless_webdataset(folder / "tar")
    for store_format in ("parquet", "hdf5"):
        root = folder / f"store-{store_format}"
        store, num_bytes = write_store(root, data, {}, store_format), size_bytes(root)
        readers.append(one_by_one(f"store {store_format}", num_bytes, text_of(store)))
        readers.append(one_by_one(f"store[i] {store_format}", num_bytes, lambda i, s=store: s[i].text["t5"][0]))
        orders = batches(store, (), True), batches(store, (), False)
        readers.append(batched(f"loader {store_format}", num_bytes, *orders))
    return readers


def text_of(store: Store) -> Read:
    """Only the embedding, as the loader reads it; `store[i]` is the complete sample: key, captions, url, sha256 ..."""

    def read(i: int) -> np.ndarray:
        shard, row = store.locate(i)
        files = store.shard(shard)
        return np.array(files.text["t5"].stored(files.samples.caption_ids(row)[0]).values)

    return read


def each(read: Read, order: Iterable[int]) -> Iterator[int]:
    for i in itertools.cycle(order):
        read(i)
        yield 1


def shuffled(n: int) -> list[int]:
    return np.random.default_rng(1).permutation(n).tolist()


# ---- batches ----

BY_HAND = "batches by hand"


def batches(store: Store, sizes: Iterable[int], shuffle: bool) -> Iterator[int]:
    loader = store.loader(BATCH, images=list(sizes), text="t5", shuffle=shuffle)
    while True:
        for batch in loader:
            yield len(batch["keys"])


def batches_by_hand(data: Captions, images: dict[int, np.ndarray], shuffle: bool) -> Iterator[int]:
    """The least that a loader must do: the same batches straight from arrays."""
    order = np.array(shuffled(len(data)) if shuffle else range(len(data)))
    while True:
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch: dict[Any, torch.Tensor] = {}
            for size, pixels in images.items():
                batch[size] = torch.from_numpy(pixels[chosen]).permute(0, 3, 1, 2)
            lengths = data.offsets[chosen + 1] - data.offsets[chosen]
            padded = np.zeros((len(chosen), lengths.max(), data.tokens.shape[1]), np.float16)  # (b, l, dim)
            for k, i in enumerate(chosen):
                padded[k, : lengths[k]] = data[i]
            batch["text"] = torch.from_numpy(padded)
            batch["text_mask"] = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
            yield len(chosen)


def batch_readers(folder: Path, data: Captions) -> list[Reader]:
    data = data.head(MAX_ITEMS["batch"])
    rng = np.random.default_rng(3)
    images = {size: rng.integers(0, 256, (len(data), size, size, 3), np.uint8) for size in SIZES_PX}
    mapped = {}
    for size, pixels in images.items():
        path = folder / f"pixels-{size}.bin"
        pixels.tofile(path)
        mapped[size] = np.memmap(path, np.uint8, "r", shape=pixels.shape).view(np.ndarray)
    num_bytes = data.num_bytes + sum(pixels.nbytes for pixels in images.values())
    mapped_data = write_and_map(folder / "flat-batch.bin", data)
    made = [
        (BY_HAND, num_bytes, batches_by_hand(data, images, True)),
        (f"{BY_HAND}, memmap", num_bytes, batches_by_hand(mapped_data, mapped, True)),
    ]
    for store_format in ("parquet", "hdf5"):
        root = folder / f"batch-{store_format}"
        store = write_store(root, data, images, store_format)
        made.append((f"loader {store_format}", size_bytes(root), batches(store, SIZES_PX, True)))
    payload = num_bytes / len(data)
    return [Reader(name, size, len(data), payload, {"full batch": order}) for name, size, order in made]


if __name__ == "__main__":
    main()
