"""The benchmark `far.py` in short, and that its proxy and its counts are right."""

import argparse
import hashlib
import http.client
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks import far, far_process, far_proxy
from benchmarks.far_place import Prepared
from benchmarks.far_proxy import Proxy, Request
from benchmarks.far_scenarios import Scenario, scenarios
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


def test_half_a_request_is_not_passed_on(upstream: int) -> None:
    """Or a client that is killed while it sends would leave half an object, which no server makes of it."""
    Echo.came = []
    with Proxy(upstream) as proxy:
        for head, body in (("Content-Length: 10", b"half"), ("Transfer-Encoding: chunked", b"a\r\nhalf")):
            with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
                connection.sendall(f"PUT /bucket/a HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n".encode() + body)
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(100) == b""
        assert proxy.requests == []
    assert Echo.came == []


def test_a_proxy_that_refused_takes_connections_again(upstream: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_proxy, "REFUSE_S", 0.1)
    Echo.came = []
    with Proxy(upstream, lambda request: "refuse" if request.number == 0 else "") as proxy:
        answers = [ask(proxy)]
        while answers[-1] != (200, BODY):
            answers.append(ask(proxy))
        assert ask(proxy, "HEAD") == (200, b"")
    assert answers[0] == "broken"


def test_hooks_are_called_around_what_is_passed_on_and_can_hold_it_back(upstream: int) -> None:
    Echo.came = []
    seen: list[tuple[str, int]] = []

    def note(name: str, fault: str = "") -> str:
        seen.append((name, len(Echo.came)))
        return fault

    with Proxy(upstream) as proxy:
        proxy.before, proxy.after = lambda request: note("before"), lambda request: note("after")
        assert ask(proxy) == (200, BODY)
        proxy.before = lambda request: note("held back", "reset")
        assert ask(proxy) == "broken"
    assert seen == [("before", 0), ("after", 1), ("held back", 1)]


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
    assert far.writes_after_loss(first, second, "run", 0) == ([], []), "it did not have the folder yet"
    first.insert(0, request("run/.lease.json", 5.0))
    assert far.writes_after_loss(first, second, "run", 0) == (["PUT run/b"], ["PUT run/c"])
    never_looked = [first[0], request("run/b", 10.1), request("run/c", 11.5, "DELETE")]
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


TOY = """
import http.client, sys, time
def put(key):
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
    connection.request("PUT", "/bucket/run/" + key, b"sent")
    connection.getresponse().read()
    connection.close()
put(".lease.json")
for number in range(5):
    put(str(number))
print("options", sys.argv[2:])
"""
"""Writes a lease and five files, and never looks whether it has lost the folder."""


class ToyProcess:
    def __init__(self, options: list[str], port: int, output: Path) -> None:
        self._output = output
        with output.open("w") as file:
            command = [sys.executable, "-S", "-c", TOY, str(port), *options]
            self._process = subprocess.Popen(command, stdout=file, stderr=file)
        self.pid = self._process.pid
        self.send = self._process.send_signal

    @property
    def output(self) -> str:
        return self._output.read_text()

    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, limit_s: float) -> int:
        return self._process.wait(limit_s)


class ToyPlace:
    """A place whose server keeps what is put, and whose commands are toys."""

    def __init__(self, folder: Path, upstream_port: int) -> None:
        self.folder, self.upstream_port = folder, upstream_port

    def reset(self, objects: object, local: object) -> None:
        Echo.came = []

    def objects(self) -> dict[str, bytes]:
        return {path: body for _, path, body in Echo.came}

    snapshot = objects

    def left_behind(self, told: str) -> list[str]:
        return []

    def start(self, commands: list[list[str]], proxy: Proxy, name: str = "output") -> ToyProcess:
        return ToyProcess(commands[0][1:], proxy.port, self.folder / f"{name}.txt")


def attempt(kind: str, folder: Path, upstream: int) -> far.Try:
    """A try with toys, disturbed at the first file after the lease."""
    expected = {f"/bucket/run/{name}": b"sent" for name in (".lease.json", *"01234")}
    scenario = Scenario(["toy"], folder="run", takes_over=True)
    prepared = Prepared("toy", scenario, {}, folder, expected, [request("run/x", 0.0)] * 4)
    place: Any = ToyPlace(folder, upstream)
    return far.Attempt(place, prepared, far.Try("toy", kind, 0, seed=2)).make()


def test_a_kill_at_a_request_is_made_good_by_the_same_command(tmp_path: Path, upstream: int) -> None:
    one = attempt("kill", tmp_path, upstream)
    assert (one.kills, one.codes, one.good) == (1, [-9, 0], True), one


@pytest.mark.parametrize("kind", ["take-over", "stopped"])
def test_writes_of_a_process_that_was_taken_over_are_found(
    kind: str, tmp_path: Path, upstream: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far, "_KNOWS_S", -1.0)
    monkeypatch.setattr(far, "_TAKES_S", 50.0)
    monkeypatch.setattr(far, "_SLOW_S", 0.05)
    monkeypatch.setattr(far, "SHORT_S", {"EXPIRE_S": 0.0})
    one = attempt(kind, tmp_path, upstream)
    assert one.codes == [0, 0, 0], "the first, the second, and the same command again"
    assert one.late
    assert not one.good
    assert (one.differences, one.leftovers, one.tracebacks, one.wrong) == ([], [], [], [])


@pytest.mark.slow
def test_precompute_ends_as_undisturbed_after_faults_and_kills(tmp_path: Path) -> None:
    out, work = tmp_path / "far.json", tmp_path / "work"
    command = [sys.executable, "-m", "benchmarks.far", "--work", str(work), "--scenarios", "precompute", "--most", "4"]
    command += ["--kinds", "fault", "kill", "faults", "--out", str(out)]
    for _ in range(2):  # the second goes on where the first has ended
        done = subprocess.run(command, cwd=REPOSITORY, check=False, timeout=1000, capture_output=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert b"precompute: known, 4 of 4 as uninterrupted" in done.stdout
    (file,) = work.glob("tries-*.jsonl")
    assert [json.loads(line)["number"] for line in file.read_text().splitlines()] == list(range(4))
    document = json.loads(out.read_text())
    assert list(document["ratios"].values()) == [1]
    assert {row["kind"] for row in document["results"]} == {"fault", "kill", "faults"}
