"""The benchmark `far.py` in short, and that its proxy and its counts are right."""

import argparse
import hashlib
import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks import far, far_process, far_proxy
from benchmarks.far_proxy import Proxy, Request
from benchmarks.far_scenarios import scenarios
from tests.runs import REPOSITORY

BODY = b"0123456789"


class Echo(BaseHTTPRequestHandler):
    """Answers with ten bytes, and keeps what came."""

    protocol_version = "HTTP/1.1"
    came: list[tuple[str, str, bytes]]

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.came.append((self.command, self.path, body))
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(BODY)

    do_GET = do_PUT = do_HEAD = _answer


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def ask(proxy: Proxy, method: str = "PUT") -> tuple[int, bytes] | str:
    """Status and body of a request for /bucket/run/a, or "broken"."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    try:
        connection.request(method, "/bucket/run/a?x=1", b"sent")
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (ConnectionError, http.client.IncompleteRead):
        return "broken"
    finally:
        connection.close()


def refusal(status: int, code: str) -> tuple[int, bytes]:
    return status, far_proxy.error_body(code)


@pytest.mark.parametrize(
    ("fault", "passed", "answer"),
    [
        ("", True, (200, BODY)),
        ("reset", False, "broken"),
        ("reset after", True, "broken"),
        ("half", True, "broken"),
        ("delay", True, (200, BODY)),
        ("silence", True, (200, BODY)),
        ("refuse", False, "broken"),
        ("403", False, refusal(403, "AccessDenied")),
        ("500", False, refusal(500, "InternalError")),
        ("500 after", True, refusal(500, "InternalError")),
        ("503", False, refusal(503, "SlowDown")),
        ("503 after", True, refusal(503, "SlowDown")),
    ],
)
def test_a_fault_passes_the_request_on_or_not_and_answers_as_its_name_says(
    upstream: int, fault: str, passed: bool, answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fault in ("", *far_proxy.KINDS)
    for name in ("DELAY_S", "SILENCE_S", "REFUSE_S"):
        monkeypatch.setattr(far_proxy, name, 0.05)
    Echo.came = []
    with Proxy(upstream, lambda request: fault) as proxy:
        assert ask(proxy) == answer
        (request,) = proxy.requests
    assert Echo.came == ([("PUT", "/bucket/run/a?x=1", b"sent")] if passed else [])
    assert (request.key, request.fault, request.changed) == ("run/a", fault, passed)


def test_a_proxy_that_refused_takes_connections_again(upstream: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_proxy, "REFUSE_S", 0.1)
    Echo.came = []
    with Proxy(upstream, lambda request: "refuse" if request.number == 0 else "") as proxy:
        answers = [ask(proxy)]
        while answers[-1] != (200, BODY):
            answers.append(ask(proxy))
        assert ask(proxy, "HEAD") == (200, b"")
    assert answers[0] == "broken"


def test_hooks_are_called_around_what_is_passed_on(upstream: int) -> None:
    Echo.came = []
    seen: list[tuple[str, int]] = []
    with Proxy(upstream) as proxy:
        proxy.before = lambda request: seen.append(("before", len(Echo.came)))
        proxy.after = lambda request: seen.append(("after", len(Echo.came)))
        ask(proxy)
    assert seen == [("before", 0), ("after", 1)]


def request(key: str, at: float, method: str = "PUT", status: int = 200) -> Request:
    return Request(0, method, f"/bucket/{key}", at, passed=at, status=status, answered=at + 0.01)


def test_writes_after_a_loss_are_told_from_those_that_could_not_know() -> None:
    second = [request("run/.lease.json", 9.0, "DELETE"), request("run/.lease.json", 10.0), request("run/a", 10.5)]
    first = [
        request("run/a", 9.9),  # before
        request("run/b", 10.1),  # it could not know
        request("run/.lease.json", 10.2, "GET"),
        request("run/c", 10.3),  # it could
        request("run/d", 10.4, status=412),  # refused: no change
        request("run/events/e", 10.5),
        request("other/f", 10.6),
    ]
    assert far.writes_after_loss(first, second, "run", 0) == (["PUT run/b"], ["PUT run/c"])
    never_looked = [request("run/b", 10.1), request("run/c", 11.5, "DELETE")]
    assert far.writes_after_loss(never_looked, second, "run", 0) == (["PUT run/b"], ["DELETE run/c"])
    stopped_meanwhile = far.writes_after_loss(never_looked, second, "run", 11.4)
    assert stopped_meanwhile == (["PUT run/b", "DELETE run/c"], [])
    assert far.writes_after_loss(first, second[2:], "run", 0) == ([], []), "it was not taken over"


def test_the_newest_whole_checkpoint_is_the_last_with_all_files() -> None:
    def checkpoint(step: int, data: bytes, recorded: bytes) -> dict[str, bytes]:
        files = {"model.safetensors": {"sha256": hashlib.sha256(recorded).hexdigest()}}
        folder = f"trained/checkpoints/step-{step:08d}"
        return {f"{folder}/state.json": json.dumps({"files": files}).encode(), f"{folder}/model.safetensors": data}

    objects = checkpoint(2, b"a", b"a") | checkpoint(3, b"a", b"b")
    assert far.newest_whole(objects) == 2
    assert far.newest_whole({}) == 0


def test_each_kind_is_tried_where_it_can_be() -> None:
    found = {
        name: {one.kind for one in far.tries_of(name, scenario, argparse.Namespace(most=40, seed=0, kinds=far.KINDS))}
        for name, scenario in scenarios("s3://bucket").items()
    }
    assert found["precompute with workers"] == set(far.KINDS)
    assert found["verify"] == {"fault", "faults", "outage", "kill"}
    assert "take-over" not in found["remove"]
    assert "stopped" in found["remove"]


def test_the_constants_that_are_shortened_exist() -> None:
    import pipeline.storage.mirror
    import pipeline.storage.objects  # noqa: F401

    names = {name.rpartition(".")[2].lstrip("_") for name in far_process.constants()}
    assert names >= far_process.SHORT_S.keys()


@pytest.mark.slow
def test_precompute_ends_as_undisturbed_after_faults_kills_and_take_overs(tmp_path: Path) -> None:
    out, work = tmp_path / "far.json", tmp_path / "work"
    command = [sys.executable, "-m", "benchmarks.far", "--work", str(work), "--scenarios", "precompute", "--most", "6"]
    for _ in range(2):  # the second goes on where the first has ended
        done = subprocess.run(
            [*command, "--out", str(out)], cwd=REPOSITORY, check=False, timeout=1000, capture_output=True
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert b"precompute: known, 6 of 6 as uninterrupted" in done.stdout
    (file,) = work.glob("tries-*.jsonl")
    assert [json.loads(line)["number"] for line in file.read_text().splitlines()] == list(range(6))
    document = json.loads(out.read_text())
    assert list(document["ratios"].values()) == [1]
    assert {row["kind"] for row in document["results"]} == {"fault", "kill", "faults", "take-over", "stopped"}
