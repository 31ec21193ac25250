"""How much of what a server can serve does a captioner get out of it?

    python -m benchmarks.captions --out benchmarks/results/captions.json

The server, in a process of its own, takes 200 ms for a request and serves 64 at a time, so 320 a second. A finished
run with its originals gets a captioner; the rate is that between the first and the last answer, as the server counts.
In turns with it a bare client sends as many requests, made beforehand, as many at a time and nothing else.
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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common import report

AT_ONCE, SECONDS = 64, 0.2
IN_FLIGHT = 80
"""Requests that a client sends at once: a few more than are served, so that a place is filled once it is free."""
MODEL = "tiny/describer"
_PORT = 18430
NOTES = ["requests/s: between the first and the last answer, as the server counts, without the first 64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/captions.json")
    parser.add_argument("--dir", type=Path, help="where to put the temporary files; default: the system's")
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--shard-size", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve)
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        rates = measure(Path(folder), args.samples, args.shard_size, args.rounds)
    limit = AT_ONCE / SECONDS
    rows = [
        {
            "client": name,
            "requests/s": round(statistics.median(found), 1),
            "of the limit": round(statistics.median(found) / limit, 3),
        }
        for name, found in rates.items()
    ]
    pairs = zip(rates["captioner"], rates["bare"], strict=True)
    ratios = {
        f"captioner / {limit:g} requests a second (at least 0.9)": round(
            statistics.median(rates["captioner"]) / limit, 3
        ),
        "captioner / bare client": round(statistics.median(ours / theirs for ours, theirs in pairs), 3),
    }
    report("captions", rows, ratios, args.out, ["aiohttp", "uvicorn", "pillow"], NOTES)


def measure(folder: Path, samples: int, shard_size: int, rounds: int) -> dict[str, list[float]]:
    """Requests per second of the captioner and of the bare client, one value a round."""
    write_images(folder / "images.parquet", samples)
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.captions", "--serve", str(_PORT)])
    url = f"http://127.0.0.1:{_PORT}"
    run = ["run", "precompute", "--executor", "local", "--quiet", "--out", str(folder / "run")]
    source = ["source.kind=parquet", f"source.path={folder / 'images.parquet'}", f"shard_size={shard_size}"]
    base = [
        sys.executable,
        "-m",
        "pipeline",
        *run,
        *source,
        "images.sizes_px=[]",
        "encoders=[]",
        "keep_originals=true",
    ]
    rates: dict[str, list[float]] = {"captioner": [], "bare": []}
    try:
        subprocess.run(base, check=True)
        _wait_for(f"{url}/counts")
        for number in range(rounds):
            settings = {"name": f"c{number}", "kind": "openai", "model": MODEL, "prompt": "Describe it."}
            captioners = json.dumps([{**settings, "base_url": f"{url}/v1", "max_in_flight": IN_FLIGHT}])
            _counts(url)
            subprocess.run([*base, f"captioners={captioners}"], check=True)
            rates["captioner"].append(_rate(_counts(url)))
            asyncio.run(_bare(url, samples))
            rates["bare"].append(_rate(_counts(url)))
    finally:
        server.terminate()
        server.wait()
    return rates


def write_images(path: Path, count: int) -> None:
    """A table of captions and images of 64 x 64 px."""
    images = []
    for number in range(count):
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(file, "PNG")
        images.append(file.getvalue())
    pq.write_table(pa.table({"image": images, "caption": [f"image {number}" for number in range(count)]}), path)


def _rate(times: list[float]) -> float:
    """Answers per second, without the first ones, which tell the model."""
    times = sorted(times)[AT_ONCE:]
    return (len(times) - 1) / (times[-1] - times[0])


def _counts(url: str) -> list[float]:
    """When each answer since the last call was sent."""
    with urllib.request.urlopen(f"{url}/counts") as answer:
        return json.load(answer)


def _wait_for(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


async def _bare(url: str, count: int) -> None:
    """Sends the same request again and again."""
    import aiohttp

    from stages.captioners.openai import OpenaiCaptionerConfig
    from stages.captioners.server import data_url

    config = OpenaiCaptionerConfig(name="a", model=MODEL, prompt="Describe it.", base_url=f"{url}/v1")
    image = data_url(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    body = json.dumps(config.body("Describe it.", image, 0, 0.0, 256)).encode()
    left = iter(range(count))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work() -> None:
            for _ in left:
                try:
                    async with session.post(f"{url}/v1/chat/completions", data=body) as answer:
                        await answer.read()
                except aiohttp.ClientConnectionError:
                    continue

        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


def serve(port: int) -> None:
    """The server: 200 ms for a request, 64 at a time."""
    import uvicorn

    places = asyncio.Semaphore(AT_ONCE)
    times: list[float] = []
    message = {"role": "assistant", "content": "A disc on a plain ground."}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    answer = json.dumps({"model": MODEL, "choices": [choice], "usage": usage}).encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body", False):
            pass
        data = b"{}"
        if scope["path"] == "/counts":
            data = json.dumps(times).encode()
            times.clear()
        elif scope["path"].endswith("/chat/completions"):
            async with places:
                await asyncio.sleep(SECONDS)
            times.append(time.monotonic())
            data = answer
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    uvicorn.run(app, port=port, log_level="critical", access_log=False, lifespan="off")


if __name__ == "__main__":
    main()
