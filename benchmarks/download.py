"""How many images per second does one task download from this machine, against img2dataset alone, without limits?

    python -m benchmarks.download --out benchmarks/results/download.json

The server runs in its own process. Ours has the defaults, except for `max_per_host` = `threads` where there is one
host; the other row has a host for every 10 images. No network is measured, only the processor time around it.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import interleaved_rates, median_ratio, report
from stages.sources.download import downloader as ours
from stages.sources.download.config import DownloadConfig

OURS, PLAIN = "ours", "img2dataset"


class Handler(BaseHTTPRequestHandler):
    image = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.image)))
        self.end_headers()
        self.wfile.write(self.image)

    def log_message(self, format: str, *arguments: object) -> None: ...


class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


def serve(image: bytes, port: Connection) -> None:
    Handler.image = image
    with Server(("0.0.0.0", 0), Handler) as server:
        port.send(server.server_port)
        server.serve_forever()


class Unlimited(ours._Fetcher):
    """What img2dataset does by itself: each thread opens the row it receives with urllib."""

    def __call__(self, row: Any, **options: Any) -> Any:
        self.answered.add(row[0])
        return self._downloader.download_image_with_retry(row, **options)


def run(fetcher: type[ours._Fetcher], urls: list[str], config: DownloadConfig, folder: Path) -> None:
    kept: list[int] = []

    def result(row: int, data: bytes | None, reason: str | None, detail: str) -> None:
        assert data, (reason, detail)
        kept.append(row)

    folder.mkdir()
    ours._run_downloader(dict(enumerate(urls)), folder, fetcher(urls, config, None), result)
    shutil.rmtree(folder)
    assert len(kept) == len(urls)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/download.json")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--image-bytes", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["no_proxy"] = "*"
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(os.urandom(args.image_bytes), send), daemon=True
    )
    process.start()
    port = receive.recv()
    config = DownloadConfig(allow_private_addresses=True)
    results: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for hosts in (1, args.images // 10):
            urls = [f"http://127.0.{i % hosts // 250}.{i % hosts % 250 + 1}:{port}/{i}" for i in range(args.images)]
            limits = config if hosts > 1 else config.model_copy(update={"max_per_host": config.threads})
            fns: dict[str, Callable[[], object]] = {
                OURS: partial(run, ours._Fetcher, urls, limits, Path(folder) / "shard"),
                PLAIN: partial(run, Unlimited, urls, limits, Path(folder) / "shard"),
            }
            rates = interleaved_rates(fns, args.rounds, 0.0)
            for name in fns:
                best = max(rates[name])
                results.append({"hosts": hosts, "downloader": name, "img/s": best * args.images})
            ratios[f"ours / img2dataset, {hosts} host{'s' * (hosts > 1)}"] = median_ratio(rates, OURS, PLAIN)
    process.terminate()
    notes = [
        f"{args.images} images of {args.image_bytes / 1000:g} kB over loopback, {config.threads} threads; the "
        "server is another process on the same cores"
    ]
    report("download", results, ratios, args.out, ["imagen-precompute", "img2dataset"], notes)


if __name__ == "__main__":
    main()
