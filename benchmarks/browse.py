"""How fast does `pipeline browse` show and search a store of 100,000 rows, and in how much memory?

    python -m benchmarks.browse --out benchmarks/results/browse.json

The server is a process of its own that has read nothing when a round begins. Its peers load the same files of samples
and images into `datasets` and pandas, each in a process of its own, and do the same by the code a user would write.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin
from urllib.request import urlopen

import numpy as np

from benchmarks.browse_peers import MIN_WIDTHS, PEERS, SIZE_PX, WORDS, peak_mib, timed
from benchmarks.common import report
from benchmarks.store_formats import file_entry, prompts
from imagen_core import store as st

DIM, SHARD_ROWS = 64, 1000
SCENE = (
    ("red", "green", "blue", "yellow", "black", "white", "silver", "Golden"),
    ("fox", "zebra", "bicycle", "teapot", "lighthouse", "robot", "cello", "balloon", "tram", "kite"),
    ("castle", "river", "station", "market", "glacier", "library"),
)
SOURCES = ("photos", "drawings", "maps", "charts", "scans")
AT_ONCE = 6  # connections of a browser to one host
TARGETS = {"first page": 1.0, "search": 1.0, "filter": 1.0}
TARGET_MIB = 400.0
READING = "The samples are being read"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keeps the store, for another time; default: temporary")
    parser.add_argument("--out", type=Path, help="JSON report")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        store = (arguments.work or Path(temporary)) / f"store-{arguments.rows}"
        if not (store / st.MANIFEST_NAME).exists():
            write_store(store, arguments.rows)
        found: dict[str, list[dict[str, Any]]] = {"browse": [], **{name: [] for name in PEERS}}
        for _ in range(arguments.rounds):
            found["browse"].append(browse_round(store))
            for name in PEERS:
                found[name].append(in_process(name, store))
        check_counts({name: rounds[0] for name, rounds in found.items()})
    results = [row for name, rounds in found.items() for row in medians(name, rounds)]
    notes = [
        f"{arguments.rows:,} rows in shards of {SHARD_ROWS:,}, images of {SIZE_PX} px, embeddings cut from one array; "
        "warm page cache",
        "first page: a server or process that has read nothing until its first page is there with all its images; "
        "search and filter, once all rows are read: the median of five different ones, with the images of the page",
        f"images by {AT_ONCE} connections, as a browser asks; nothing is drawn",
        "peers: all columns of the samples files and the pixels in one table, the first rows as PNG; search in lower "
        "case; all find the same number",
        "mib: the process's greatest resident memory",
    ]
    packages = ["imagen-precompute", "starlette", "uvicorn", "duckdb", "datasets", "pandas", "pyarrow"]
    report("browse", results, ratios(results), arguments.out, packages, notes)


def check_counts(rounds: dict[str, dict[str, Any]]) -> None:
    """All find the same number of samples."""
    for action in ("search found", "filter found"):
        counts = {name: each[action] for name, each in rounds.items()}
        if len({tuple(each) for each in counts.values()}) != 1:
            sys.exit(f"{action}: {counts}")


def medians(name: str, rounds: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each thing that was done, and one for the memory."""
    for action in TARGETS:
        seconds = [time for each in rounds for time in each[action]]
        yield {
            "who": name,
            "what": action,
            "median_s": statistics.median(seconds),
            "worst_s": max(seconds),
            "target_s": TARGETS[action],
        }
    most = [each["mib"] for each in rounds]
    yield {
        "who": name,
        "what": "memory",
        "mib": statistics.median(most),
        "worst_mib": max(most),
        "target_mib": TARGET_MIB,
    }
    yield {"who": name, "what": "start", "median_s": statistics.median(each["start_s"] for each in rounds)}
    yield {"who": name, "what": "all rows read", "median_s": statistics.median(each["read_s"] for each in rounds)}


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """Times and memory of the peers by those of `browse`; more than 1 is better."""
    by = {(row["who"], row["what"]): row["mib" if "mib" in row else "median_s"] for row in results}
    whats = (*TARGETS, "memory")
    return {f"{what}: {peer} / browse": by[peer, what] / by["browse", what] for peer in PEERS for what in whats}


# ---- the store ----


def write_store(root: Path, num_rows: int) -> None:
    """A store of captions and small images, with sizes, labels and two kept columns, by the store's own writers."""
    random = np.random.default_rng(0)
    captions = caption_texts(num_rows, random)
    tokens = random.standard_normal((128, DIM)).astype(np.float16)
    groups: dict[str, dict[str, Any]] = {
        "samples": {"kind": "samples", "columns": {"source": "text", "score": "float"}},
        st.image_group(SIZE_PX): {"kind": "images", "size_px": SIZE_PX, "format": "parquet", "codec": "raw"},
        st.text_group("t5"): {"kind": "text", "encoder": "t5", "dim": DIM, "dtype": "float16", "format": "parquet"},
    }
    for group in groups:
        (root / group).mkdir(parents=True, exist_ok=True)
    shards = []
    for index, first in enumerate(range(0, num_rows, SHARD_ROWS)):
        paths = {name: st.shard_path(name, index, group.get("format", "parquet")) for name, group in groups.items()}
        rows = [sample(i, captions[i], i - first, random) for i in range(first, min(first + SHARD_ROWS, num_rows))]
        st.write_samples(root / paths["samples"], rows, columns={"source": "text", "score": "float"})
        pixels = random.integers(0, 256, (len(rows), SIZE_PX, SIZE_PX, 3), np.uint8)
        with st.open_image_writer(root / paths[st.image_group(SIZE_PX)], SIZE_PX, "parquet") as writer:
            for image, row in zip(pixels, rows, strict=True):
                writer.append(image, row.key, row.sha256)
        texts = [row.captions[0] for row in rows]
        embeddings = [tokens[: min(len(tokens), 1 + len(text.split()))] for text in texts]
        st.write_embedding_shard(
            root / paths[st.text_group("t5")],
            st.cast_embeddings(embeddings, DIM, "float16"),
            [len(each) for each in embeddings],
            DIM,
            "float16",
            "parquet",
            captions=texts,
            fingerprint={},
        )
        files = {name: file_entry(root, path, len(rows)) for name, path in paths.items()}
        shards.append({"index": index, "rows": len(rows), "files": files})
    st.write_manifest(root / st.MANIFEST_NAME, {"writer": "benchmark", "groups": groups}, shards)


def caption_texts(count: int, random: np.random.Generator) -> list[str]:
    """Distinct captions: a prompt, a scene and a number."""
    texts = prompts()
    chosen = random.integers(0, (len(texts), *map(len, SCENE)), (count, 1 + len(SCENE))).tolist()
    return [
        f"{texts[text]}, a {SCENE[0][color]} {SCENE[1][thing]} near the {SCENE[2][place]}, number {i}"
        for i, (text, color, thing, place) in enumerate(chosen)
    ]


def sample(number: int, caption: str, row: int, random: np.random.Generator) -> st.SampleRow:
    width, height = (int(value) for value in random.integers(256, 2048, 2))
    return st.SampleRow(
        f"{number:08d}",
        (caption,),
        (row,),
        f"https://example.com/{number:08d}.jpg",
        f"{number:064x}",
        width,
        height,
        row,
        label=number % 1000,
        columns={"source": SOURCES[int(random.integers(len(SOURCES)))], "score": float(random.random())},
    )


# ---- the server ----


def browse_round(store: Path) -> dict[str, Any]:
    """Seconds of each page from a new server, its memory at the end, and how many samples it found."""
    with server(store) as (address, process, start_s):
        page, started = urljoin(address, "/p/1/"), time.perf_counter()
        load(page)
        result: dict[str, Any] = {"start_s": start_s, "first page": [time.perf_counter() - started]}
        while READING in urlopen(page, timeout=60).read().decode():
            time.sleep(0.1)
        result["read_s"] = time.perf_counter() - started
        for action, queries in (("search", searches(page)), ("filter", filters(page))):
            done = [timed(lambda query=query: load(query)) for query in queries]
            result[action] = [seconds for seconds, _ in done]
            result[f"{action} found"] = [count for _, count in done]
        result["mib"] = peak_mib(str(process.pid))
    return result


def searches(page: str) -> list[str]:
    return [f"{page}?{urlencode({'q': word})}" for word in WORDS]


def filters(page: str) -> list[str]:
    return [f"{page}?{urlencode({'width_min': width})}" for width in MIN_WIDTHS]


@contextmanager
def server(store: Path) -> Iterator[tuple[str, subprocess.Popen, float]]:
    """`pipeline browse` of a store: its address, its process, and the seconds until it listened."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pipeline", "browse", str(store), "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()
            if not address:
                sys.exit("pipeline browse has not started")
            yield address[0], process, time.perf_counter() - started
        finally:
            process.terminate()
            process.wait(20)


def load(address: str) -> int:
    """Gets a page and its images; returns how many samples it says there are."""
    text = urlopen(address, timeout=60).read().decode()
    images = [urljoin(address, unescape(source)) for source in re.findall(r'<img[^>]* src="([^"]+)"', text)]
    if not images:
        sys.exit(f"{address}: the page shows no image")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert all(pool.map(lambda source: len(urlopen(source, timeout=60).read()), images))
    count = re.search(r"<strong>([0-9,]+)</strong> samples", text)
    assert count is not None
    return int(count[1].replace(",", ""))


# ---- the peers ----


def in_process(name: str, store: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.browse_peers", name, str(store)]
    started = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return {**result, "start_s": result["ready"] - started}


if __name__ == "__main__":
    main()
