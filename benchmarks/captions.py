"""How much of what a server can serve does a captioner get out of it, and does its memory stay flat?

    python -m benchmarks.captions --out benchmarks/results/captions.json

The server, in a process of its own, takes 200 ms for a request and serves 64 at a time, so 320 a second. A finished
run with its originals gets a captioner; the rate is that between the first and the last answer, as the server counts.
In turns with it a bare client sends as many requests, made beforehand, as many at a time and nothing else. Then a
run with two captioners makes 100,000 requests that are answered at once, and its processes' memory is read meanwhile.
"""

import argparse
import asyncio
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.caption_server import AT_ONCE, MODEL, SECONDS
from benchmarks.common import report
from tests.processes import descendants

IN_FLIGHT = 80
"""Requests that a client sends at once: a few more than are served, so that a place is filled once it is free."""
LIMIT = AT_ONCE / SECONDS
PX, SMALL_PX = 64, 16
DISTINCT = 1000
"""Images; further samples have the same ones."""
SAMPLES, SHARD, ROUNDS = 4000, 500, 2
REQUESTS, EARLY = 100_000, 10_000
NOTES = [
    "requests/s: between the first and the last answer, as the server counts, without the first 64; median of rounds",
    "MiB: resident memory of the process that the command is, and of it and its workers together, where pages that "
    "several share count in each",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/captions.json")
    parser.add_argument("--dir", type=Path, help="where to put the temporary files; default: the system's")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--px", type=int, default=PX, help="side of the images")
    parser.add_argument("--shard-size", type=int, default=SHARD)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="while memory is read; 0: leave it out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder, server() as url:
        rates = throughput(Path(folder) / "rate", url, args)
        sizes = memory(Path(folder) / "memory", url, args.requests) if args.requests else []
    rows = [
        {
            "client": name,
            "requests/s": round(statistics.median(found), 1),
            "of the limit": round(statistics.median(found) / LIMIT, 3),
        }
        for name, found in rates.items()
    ]
    pairs = zip(rates["captioner"], rates["bare"], strict=True)
    ratios = {
        f"captioner / {LIMIT:g} requests a second (at least 0.9)": round(
            statistics.median(rates["captioner"]) / LIMIT, 3
        ),
        "captioner / bare client": round(statistics.median(ours / theirs for ours, theirs in pairs), 3),
    }
    if sizes:
        first, last = sizes[0], sizes[-1]
        what = f"after {last['requests']:,} requests / after {first['requests']:,}"
        ratios |= {f"{name} {what}": round(last[name] / first[name], 3) for name in ("driver MiB", "all MiB")}
    report("captions", [*rows, *sizes], ratios, args.out, ["aiohttp", "pillow"], NOTES)


@contextmanager
def server() -> Iterator[str]:
    """The address of a server that runs while the block does."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.caption_server"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


def throughput(folder: Path, url: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Requests per second of the captioner and of the bare client, one value a round."""
    base = finished_run(folder, args.samples, args.px, args.shard_size)
    rates: dict[str, list[float]] = {"captioner": [], "bare": []}
    for number in range(args.rounds):
        _get(f"{url}/times")
        subprocess.run([*base, captioners(f"{url}/paced/v1", f"c{number}")], check=True, stdout=subprocess.DEVNULL)
        rates["captioner"].append(_rate(_get(f"{url}/times")))
        asyncio.run(bare(f"{url}/paced/v1", args.samples, args.px))
        rates["bare"].append(_rate(_get(f"{url}/times")))
    return rates


def finished_run(folder: Path, samples: int, px: int, shard_size: int) -> list[str]:
    """Makes a run with its originals; returns the command, which a captioner may be added to."""
    folder.mkdir()
    write_images(folder / "images.parquet", samples, px)
    run = ["run", "precompute", "--executor", "local", "--quiet", "--out", str(folder / "run")]
    source = ["source.kind=parquet", f"source.path={folder / 'images.parquet'}", f"shard_size={shard_size}"]
    made = ["images.sizes_px=[]", "encoders=[]", "keep_originals=true"]
    command = [sys.executable, "-m", "pipeline", *run, *source, *made]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return command


def captioners(base_url: str, *names: str) -> str:
    settings = {"kind": "openai", "model": MODEL, "prompt": "Describe it.", "max_in_flight": IN_FLIGHT}
    return f"captioners={json.dumps([{'name': name, 'base_url': base_url, **settings} for name in names])}"


def write_images(path: Path, count: int, px: int) -> None:
    """A table of captions and square images."""
    images: list[bytes] = []
    for number in range(min(count, DISTINCT)):
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((px, px)).save(file, "PNG", compress_level=1)
        images.append(file.getvalue())
    columns = {
        "image": [images[number % DISTINCT] for number in range(count)],
        "caption": [f"image {number}" for number in range(count)],
    }
    pq.write_table(pa.table(columns), path, row_group_size=1000)


def _rate(times: list[float]) -> float:
    """Answers per second, without the first ones, which tell the model."""
    times = sorted(times)[AT_ONCE:]
    return (len(times) - 1) / (times[-1] - times[0])


def _get(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


async def bare(url: str, count: int, px: int) -> None:
    """Sends the same request again and again."""
    import aiohttp

    from stages.captioners.openai import OpenaiCaptionerConfig
    from stages.captioners.server import data_url

    config = OpenaiCaptionerConfig(name="a", model=MODEL, prompt="Describe it.", base_url=url)
    image = data_url(Image.fromarray(np.random.default_rng(0).integers(0, 255, (px, px, 3), np.uint8)))
    body = json.dumps(config.body("Describe it.", image, 0, 0.0, 256)).encode()
    left = iter(range(count))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work() -> None:
            for _ in left:
                async with session.post(f"{url}/chat/completions", data=body) as answer:
                    await answer.read()

        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


def memory(folder: Path, url: str, requests: int) -> list[dict[str, Any]]:
    """The memory of a run's processes after 10,000 requests, half of all, and all but the last hundredth.
    Two captioners make half of them each."""
    command = finished_run(folder, requests // 2, SMALL_PX, 1000)
    before = _get(f"{url}/answered")
    run = subprocess.Popen([*command, captioners(f"{url}/instant/v1", "long", "short")], stdout=subprocess.DEVNULL)
    found: list[dict[str, Any]] = []
    for wanted in sorted({min(EARLY, requests // 2), requests // 2, requests - requests // 100}):
        while run.poll() is None and (answered := _get(f"{url}/answered") - before) < wanted:
            time.sleep(0.1)
        if run.poll() is not None:
            break
        driver, *workers = (resident_mib(pid) for pid in [run.pid, *descendants(run.pid)])
        found.append(
            {"requests": answered, "driver MiB": round(driver, 1), "all MiB": round(driver + sum(workers), 1)}
        )
    if run.wait() != 0:
        sys.exit(f"the run ended with {run.returncode}")
    return found


def resident_mib(pid: int) -> float:
    """Of a process, on Linux."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


if __name__ == "__main__":
    main()
