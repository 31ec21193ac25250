"""A run that receives a signal stops with the right exit code, and the same command resumes it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes import descendants, wait_until_gone
from tests.runs import events, pipeline
from tests.workflows.test_kill import CONFIG, records, start

pytestmark = pytest.mark.slow


def on_ray(how: signal.Signals, code: int, whole_group: bool) -> Any:
    return pytest.param("ray", how, code, whole_group, marks=pytest.mark.ray)


@pytest.mark.parametrize(
    ("executor", "how", "code", "whole_group"),
    [
        ("inline", signal.SIGINT, 130, False),
        ("local", signal.SIGINT, 130, True),  # a terminal's Ctrl-C
        ("local", signal.SIGTERM, 75, False),
        ("local", signal.SIGTERM, 75, True),
        ("local", signal.SIGHUP, 75, True),  # a terminal that is closed
        on_ray(signal.SIGINT, 130, True),
        on_ray(signal.SIGTERM, 75, False),
    ],
)
def test_signals_end_the_run_with_their_codes_and_leave_nothing_behind(
    executor: str, how: signal.Signals, code: int, whole_group: bool, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(out, executor)
    while records(out) < 2 and process.poll() is None:
        time.sleep(0.05)
    children = list(descendants(process.pid))
    if whole_group:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors.decode()
    assert b"Traceback" not in errors
    assert not wait_until_gone(children, timeout_s=150)
    assert not list(out.rglob(".tmp-*"))
    if executor == "local":
        assert {event["event"] for event in events(out)} == {"run_started", "task", "run_ended"}, "no worker died"
        pipeline("run", "precompute", "--out", str(out), "--executor", executor, "--quiet", *CONFIG)
