"""What do hostile servers cost a run? A list of URLs, a tenth of its hosts bad, against the good ones alone.

    python -m benchmarks.hostile --work FOLDER --out benchmarks/results/hostile.json

Each host is an address of its own in 127.0.0.0/8, all served by this process. Good hosts send an image steadily over
some seconds, as slow servers do. Bad hosts are of four kinds: they drip (a byte every half second), are silent, send
without end, or reset the connection. All settings of downloads are the defaults. Runs: the good URLs alone, all kinds
of bad ones among them, and each kind alone; every good URL has to become a sample in each, and every bad one a drop.
"""

import argparse
import json
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import report

_STEPS = 40  # in which a good host sends its image
_DRIP_S = 0.5


class Handler(BaseHTTPRequestHandler):
    """Answers /KIND/NUMBER as a server of this kind does."""

    server: "Server"

    def do_GET(self) -> None:
        _, kind, number = self.path.split("/")
        try:
            ANSWERS[kind](self, int(number))
        except OSError:
            self.close_connection = True  # the client has hung up, as it should

    def log_message(self, format: str, *arguments: object) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: str, images: list[bytes], arguments: argparse.Namespace, closing: threading.Event):
        super().__init__((address, 0), Handler)
        self.images = images
        self.good_s: float = arguments.good_seconds
        self.seed: int = arguments.seed
        self.closing = closing

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        with self:
            super().serve_forever(poll_interval)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on bad servers."""


def _noise(chance: random.Random) -> bytes:
    file = BytesIO()
    Image.frombytes("RGB", (128, 128), chance.randbytes(3 * 128 * 128)).save(file, "PNG")
    return file.getvalue()


def good(handler: Handler, number: int) -> None:
    server = handler.server
    image = server.images[number % len(server.images)]
    pause_s = random.Random(f"{server.seed}/{number}").uniform(0.6, 1.4) * server.good_s / _STEPS
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(image)))
    handler.end_headers()
    size = -(-len(image) // _STEPS)
    for start in range(0, len(image), size):
        handler.wfile.write(image[start : start + size])
        if server.closing.wait(pause_s):
            return


def drip(handler: Handler, number: int) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.closing.wait(_DRIP_S):
        handler.wfile.write(b"x")


def silent(handler: Handler, number: int) -> None:
    handler.server.closing.wait(600)


def endless(handler: Handler, number: int) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.closing.is_set():
        handler.wfile.write(bytes(1 << 20))


def resetting(handler: Handler, number: int) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()  # with RST


BAD: dict[str, Callable[[Handler, int], None]] = {
    "drip": drip,
    "silent": silent,
    "endless": endless,
    "resetting": resetting,
}
ANSWERS = {"good": good, **BAD}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", type=int, default=200)
    parser.add_argument("--hosts", type=int, default=40)
    parser.add_argument(
        "--good-seconds", type=float, default=10.0, help="mean time in which a good host sends an image"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, kinds in {"good alone": (), "all kinds": tuple(BAD), **{kind: (kind,) for kind in BAD}}.items():
        urls = url_list(arguments.urls, arguments.hosts, kinds, arguments.seed)
        rows.append(measure(name, urls, arguments))
        write(rows, arguments)  # after each run, so that finished ones count if this ends early


def url_list(urls: int, hosts: int, kinds: tuple[str, ...], seed: int) -> list[tuple[str, int, str]]:
    """Kind, number and address of each URL, shuffled; a tenth of the hosts is bad, or left out without kinds."""
    bad_hosts = hosts // 10
    made = []
    for number in range(urls):
        host = number % hosts
        if host >= bad_hosts or kinds:
            kind = kinds[host % len(kinds)] if host < bad_hosts else "good"
            made.append((kind, number, f"127.1.{host // 250}.{host % 250 + 1}"))
    random.Random(seed).shuffle(made)
    return made


def measure(name: str, urls: list[tuple[str, int, str]], arguments: argparse.Namespace) -> dict[str, Any]:
    """One run over these URLs."""
    folder = arguments.work / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chance, closing = random.Random(arguments.seed), threading.Event()
    images = [_noise(chance) for _ in range(8)]
    servers = {address: Server(address, images, arguments, closing) for address in {address for *_, address in urls}}
    for server in servers.values():
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        lines = [f"http://{address}:{servers[address].server_port}/{kind}/{number}" for kind, number, address in urls]
        (folder / "urls.txt").write_text("\n".join(lines) + "\n")
        seconds = run(folder, -(-arguments.urls // 2))
    finally:
        closing.set()
        for server in servers.values():
            server.shutdown()
    summary = json.loads((folder / "run" / "summary.json").read_text())
    num_good = sum(kind == "good" for kind, *_ in urls)
    row = {
        "run": name,
        "seconds": round(seconds, 1),
        "good": num_good,
        "samples": summary["num_samples"],
        "bad": len(urls) - num_good,
        "drops": " ".join(
            f"{reason} {count}" for reason, count in sorted(summary["tally"]["groups"]["samples"]["drops"].items())
        ),
    }
    print(row, flush=True)
    if row["samples"] != num_good:
        sys.exit(f"{name}: {row['samples']} samples of {num_good} good URLs; see {folder}")
    shutil.rmtree(folder)
    return row


def run(folder: Path, shard_size: int) -> float:
    """Seconds of a run of precompute in two shards, one after the other."""
    command = [sys.executable, "-m", "pipeline", "run", "precompute", "--quiet", "--executor", "local"]
    command += ["--out", str(folder / "run"), "source.kind=urls", f"source.path={folder / 'urls.txt'}"]
    command += ["source.download.allow_private_addresses=true", f"shard_size={shard_size}", "images.sizes_px=[64]"]
    began = time.perf_counter()
    subprocess.run([*command, "execution.num_cpus=1"], check=True)
    return time.perf_counter() - began


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    alone = rows[0]["seconds"]
    report(
        "hostile",
        rows,
        {
            f"time of a run with bad hosts / the good ones alone, {row['run']}": row["seconds"] / alone
            for row in rows[1:]
        },
        arguments.out,
        packages=["imagen-precompute", "img2dataset"],
        notes=[
            f"{arguments.urls} URLs on {arguments.hosts} hosts, a tenth of them bad, in two shards in turn",
            f"a good host sends an image in {0.6 * arguments.good_seconds:g} to {1.4 * arguments.good_seconds:g} s; "
            "all settings of downloads are the defaults",
        ],
    )


if __name__ == "__main__":
    main()
