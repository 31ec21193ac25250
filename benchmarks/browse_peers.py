"""What a user of pandas or `datasets` writes to see and search the samples of a store; see `benchmarks.browse`.

    python -m benchmarks.browse_peers pandas STORE

Imports no more than it needs: its memory is measured.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
SIZE_PX, PAGE_ROWS = 16, 60
WORDS = ("the", "a red", "golden zebra", "lighthouse near the glacier", "number 4242")
"""What is searched for: in all captions, in many, in few."""
MIN_WIDTHS = (600, 900, 1200, 1500, 1900)


@dataclass(frozen=True)
class Peer:
    """What a user writes: a table, and functions of it."""

    load: Callable[[list[str], list[str]], Any]
    """Of the files of samples and of images."""
    page: Callable[[Any], list[bytes]]
    """The pixels of the first rows."""
    search: Callable[[Any, Any], Any]
    filter: Callable[[Any, Any], Any]


def peer_round(peer: Peer, store: Path) -> dict[str, Any]:
    """Seconds of loading and the first page, of each search and each filter, with the page's images as PNG."""
    ready, started = time.time(), time.perf_counter()
    files = [sorted(map(str, (store / group).glob("*.parquet"))) for group in ("samples", f"images-{SIZE_PX}")]
    table = peer.load(files[0], files[1])
    as_png(peer.page(table))
    first = time.perf_counter() - started
    result: dict[str, Any] = {"ready": ready, "first page": [first], "read_s": first}
    for action, choose, values in (("search", peer.search, WORDS), ("filter", peer.filter, MIN_WIDTHS)):
        done = [timed(lambda value=value: shown(peer, choose(table, value))) for value in values]  # noqa: B023
        result[action] = [seconds for seconds, _ in done]
        result[f"{action} found"] = [count for _, count in done]
    return {**result, "mib": peak_mib("self")}


def shown(peer: Peer, rows: Any) -> int:
    as_png(peer.page(rows))
    return len(rows)


def peak_mib(pid: str) -> float:
    """The greatest resident memory of a process, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, and what it returned."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def as_png(pixels: list[bytes]) -> None:
    from PIL import Image

    for each in pixels:
        Image.frombytes("RGB", (SIZE_PX, SIZE_PX), each).save(BytesIO(), "PNG")


def pandas_peer() -> Peer:
    import pandas as pd

    def load(samples: list[str], images: list[str]) -> Any:
        table = pd.concat([pd.read_parquet(name) for name in samples], ignore_index=True)
        table["pixels"] = pd.concat([pd.read_parquet(name)["pixels"] for name in images], ignore_index=True)
        return table

    def search(table: Any, word: str) -> Any:
        found = [any(word in caption.lower() for caption in captions) for captions in table["captions"]]
        return table[found]

    return Peer(
        load,
        lambda table: table["pixels"].head(PAGE_ROWS).tolist(),
        search,
        lambda table, width: table[table["width"] >= width],
    )


def datasets_peer() -> Peer:
    import datasets

    datasets.disable_progress_bars()
    folder = tempfile.TemporaryDirectory()  # goes with the process

    def load(samples: list[str], images: list[str]) -> Any:
        parts = [
            datasets.Dataset.from_parquet([*files], cache_dir=folder.name, columns=columns)
            for files, columns in ((samples, None), (images, ["pixels"]))
        ]
        return datasets.concatenate_datasets(parts, axis=1)  # pyright: ignore[reportArgumentType]

    def search(table: Any, word: str) -> Any:
        keep = lambda rows: [any(word in caption.lower() for caption in captions) for captions in rows]  # noqa: E731
        return table.filter(keep, input_columns="captions", batched=True)

    def filtered(table: Any, width: int) -> Any:
        return table.filter(lambda widths: [each >= width for each in widths], input_columns="width", batched=True)

    return Peer(load, lambda table: table[:PAGE_ROWS]["pixels"], search, filtered)


PEERS: dict[str, Callable[[], Peer]] = {"pandas": pandas_peer, "datasets": datasets_peer}

if __name__ == "__main__":
    print(json.dumps(peer_round(PEERS[sys.argv[1]](), Path(sys.argv[2]))))
