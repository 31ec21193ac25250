"""`pipeline browse` as its own process."""

import os
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.commands import call
from tests.runs import REPOSITORY, command


@pytest.mark.slow
def test_the_command_prints_its_address_and_ends_at_ctrl_c(small_run: Path) -> None:
    server = subprocess.Popen(
        command("browse", os.fspath(small_run), "--no-open"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]
        with urllib.request.urlopen(url) as answer:
            assert b"19 samples in 3 shards" in answer.read()
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    finally:
        server.kill()
    assert (server.returncode, errors) == (0, "ended\n")


def test_a_path_that_cannot_be_shown_is_one_line(tmp_path: Path) -> None:
    result = call("browse", str(tmp_path / "missing"), "--no-open")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: PATH ")
    assert result.err.count("\n") == 1


def test_a_missing_package_says_what_to_install(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "duckdb" else object())
    result = call("browse", str(small_run), "--no-open")
    assert (result.code, result.out) == (4, "")
    assert result.err == (
        "error: browse: duckdb is not installed; pip install '.[browse]' in the checkout, or pip install starlette "
        "uvicorn duckdb\n"
    )


def test_a_port_that_is_taken_is_one_line(small_run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = call("browse", str(small_run), "--no-open", "--port", str(port))
    assert result.code == 2
    assert result.err == f"error: --host 127.0.0.1 --port {port}: Address already in use; give others\n"
