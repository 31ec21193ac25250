"""`--retry-dropped`: only the dropped rows are tried again, and finished files stay as they are."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from imagen_core.store import Store
from pipeline.config import load_config
from pipeline.options import RunOptions
from stages.sources.synthetic.scenes import encode_image, scene
from tests.commands import call
from tests.runs import store_bytes
from workflows.precompute import Precompute, PrecomputeConfig


class FlakyServer(ThreadingHTTPServer):
    """Answers 503 for broken indices, and counts requests."""

    broken: set[int]
    requests: Counter[int]


class Handler(BaseHTTPRequestHandler):
    server: FlakyServer

    def do_GET(self) -> None:
        index = int(self.path.strip("/"))
        self.server.requests[index] += 1
        if index in self.server.broken:
            self.send_error(503)
            return
        body = encode_image(scene(0, index))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    server = FlakyServer(("127.0.0.1", 0), Handler)
    server.broken, server.requests = {1, 5, 6}, Counter()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_later_round_fetches_only_what_was_dropped(server: FlakyServer, tmp_path: Path) -> None:
    rows = [f"http://127.0.0.1:{server.server_port}/{i}\tscene {i}" for i in range(8)]
    (tmp_path / "urls.tsv").write_text("url\tcaption\n" + "\n".join([*rows, "ftp://nowhere/x\tno image"]))
    out = tmp_path / "run"
    arguments = [
        "source.kind=urls",
        f"source.path={tmp_path / 'urls.tsv'}",
        "source.download.retries=0",
        "source.download.allow_private_addresses=true",
        "shard_size=4",
        "images.sizes_px=[16]",
        "execution.num_cpus=1",
    ]

    def run(*reasons: str) -> dict[str, object]:
        workflow = Precompute(load_config(PrecomputeConfig, None, arguments))
        summary = workflow.run(out, RunOptions("inline", retry_dropped=reasons, quiet=True))
        tally = summary["tally"]
        return {"samples": summary["num_samples"], "in": tally["input_rows"], **tally["groups"]["samples"]["drops"]}

    assert run() == {"samples": 5, "in": 9, "http_503": 3, "invalid_url": 1}
    first = store_bytes(out)
    server.broken = {6}
    server.requests.clear()
    assert run("http_503") == {"samples": 7, "in": 9, "http_503": 1, "invalid_url": 1}
    assert server.requests == {1: 1, 5: 1, 6: 1}, "only the dropped rows are fetched"
    second = store_bytes(out)
    assert all(second[name] == content for name, content in first.items() if name != "manifest.json")
    server.broken = set()
    server.requests.clear()
    assert run("all") == {"samples": 8, "in": 9, "invalid_url": 1}
    assert server.requests == {6: 1}
    assert run() == {"samples": 8, "in": 9, "invalid_url": 1}, "a plain run keeps what the rounds brought"
    store = Store.open(out / "store")
    assert sorted(sample.captions[0] for sample in store) == [f"scene {i}" for i in range(8)]
    found = json.loads(call("verify", str(out), "--json").out)
    assert found["ok"], found["problems"]
    counts = {name: found[name] for name in ("input_rows", "num_samples", "dropped", "excluded", "unaccounted")}
    assert counts == {
        "input_rows": 9,
        "num_samples": 8,
        "dropped": {"invalid_url": 1},
        "excluded": {},
        "unaccounted": 0,
    }, "a row that was tried three times counts once"
