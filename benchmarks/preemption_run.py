"""The run that `preemption.py` kills: its images, its driver, its store, and the work that was done again."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import yaml
from PIL import Image

from pipeline.storage.events import read_events
from pipeline.storage.run_folder import RunFolder

_SIDE_PX = 32


class Images:
    """Serves small images on the loopback interface, each `delay_s` after it was asked for, and notes each request."""

    def __init__(self, folder: Path, count: int, delay_s: float):
        self.count, self.delay_s = count, delay_s
        self.requests: list[tuple[float, int]] = []
        """Unix time and number of the image."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.table = folder / f"urls-{count}.csv"
        port = self._server.server_port
        rows = [f"http://127.0.0.1:{port}/{index}.png,image number {index}\n" for index in range(count)]
        self.table.write_text("url,caption\n" + "".join(rows))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def forget(self) -> None:
        """Begins a new list of requests."""
        self.requests = []

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        images = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index = int(self.path.strip("/").partition(".")[0])
                images.requests.append((time.time(), index))
                time.sleep(images.delay_s)
                data = _png(index)
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *arguments: object) -> None:
                """Stays quiet."""

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:  # of a process that was killed
                    self.close_connection = True

        return Handler


def _png(index: int) -> bytes:
    pixels = np.random.default_rng(index).integers(0, 256, (_SIDE_PX, _SIDE_PX, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def config_of(folder: Path, images: Images, shard_size: int, workers: int, **execution: object) -> Path:
    """The configuration of the run: a shard is fetched image by image."""
    download = {
        "threads": 1,
        "max_per_host": 1,
        "allow_private_addresses": True,
        "timeout_s": 300,
        "deadline_s": 3000,
        "max_host_failures": 1000,
    }
    config = {
        "source": {"kind": "urls", "path": str(images.table), "download": download},
        "shard_size": shard_size,
        "images": {"sizes_px": [16]},
        "encoders": [{"name": "t5", "model": "tiny-random-t5", "workers": workers, "resources": {"work": 1}}],
        "execution": {"resources": {"work": 0.001}, "retry_delay_s": 0.5, **execution},
    }
    path = folder / f"config-{images.count}-{shard_size}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Driver:
    """`pipeline run precompute` in a process of its own."""

    def __init__(self, run: Path, config: Path, address: str, environment: Mapping[str, str], executor: str = "ray"):
        self.run = run
        self.log = run.with_name(f"{run.name}.log")
        command = [sys.executable, "-m", "pipeline", "run", "precompute", "-c", str(config), "--out", str(run)]
        command += ["--executor", executor, *(["--address", address] if address else []), "--quiet"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=dict(environment), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def poll(self) -> int | None:
        return self.process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """The exit code; None if it did not end in time."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Kills it, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text()[-3000:]

    def finished(self) -> int:
        """Tasks that have succeeded."""
        return sum(event.get("event") == "task" for event in read_events(RunFolder(str(self.run)).storage))


def uninterrupted(run: Path, config: Path) -> dict[str, bytes]:
    """The bytes of a store that nothing befell."""
    driver = Driver(run, config, "", os.environ, "inline")
    assert driver.wait(3600.0) == 0, driver.said()
    return store_bytes(run)


def store_bytes(run: Path) -> dict[str, bytes]:
    """Every file of the store, by name."""
    store = run / "store"
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def lost_work(run: Path, images: Images, ends: Sequence[float]) -> dict[str, int]:
    """What was done more than once in a run, from its events and from the requests for images.

    The fetch of a shard was under way when a driver ended if it had begun, or began before the next driver: a worker
    may still have been loading packages, and does not learn at once that its driver is gone.

    Args:
        ends: Unix times at which a driver of the run ended before the run was done.
    """
    shard_size = yaml.safe_load((run / "config.yaml").read_text())["shard_size"]
    events = list(read_events(RunFolder(str(run)).storage))
    done = Counter((e["stage"], e["shard"]) for e in events if e.get("event") == "task")
    fetched = {e["shard"]: e["time"] for e in events if e.get("event") == "task" and e["stage"] == "fetch"}
    begun = [*sorted(e["time"] for e in events if e.get("event") == "run_started"), math.inf]
    until = {end: next(time for time in begun if time > end) for end in ends}
    failed = [e for e in events if e.get("event") == "task_failed"]
    lost = [e for e in failed if e.get("lost") == "node"]
    run.with_name(f"{run.name}-requests.json").write_text(
        json.dumps({"ends": list(ends), "requests": images.requests})
    )
    asked: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for when, index in images.requests:
        asked[index // shard_size][index].append(when)
    again = unexplained = allowed = 0
    for shard, by_image in asked.items():
        interrupted = sum(e["stage"] == "fetch" and e["shard"] == shard for e in failed)
        began = min(min(times) for times in by_image.values())
        interrupted += sum(began < until[end] and fetched.get(shard, end) >= end for end in ends)
        allowed += interrupted * len(by_image)
        for times in by_image.values():
            again += len(times) - 1
            unexplained += max(0, len(times) - 1 - interrupted)
    return {
        "tasks": sum(done.values()),
        "tasks_lost_with_nodes": len(lost),
        "tasks_failed_otherwise": len(failed) - len(lost),
        "finished_again": sum(count - 1 for count in done.values()),
        "requests_again": again,
        "allowed_again": allowed,
        "unexplained_again": unexplained,
        "set_aside": len(list((run / "quarantine" / "failed").glob("*"))),
        "half_written": len(list(run.rglob(".tmp-*"))),
    }
