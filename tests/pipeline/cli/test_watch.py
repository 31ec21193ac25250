"""`pipeline status RUN --watch`, and what a run shows, on a terminal of 80 columns and elsewhere."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
import threading
import time
from pathlib import Path

import pytest

from pipeline.cli import watch as watch_module
from pipeline.storage.lock import RunLock
from pipeline.storage.run_folder import RunFolder
from tests.commands import call
from tests.pipeline.engine.test_watch import PLAN, resized, task, write_event
from tests.runs import REPOSITORY, command

COLUMNS = 80


def on_terminal(*arguments: str) -> list[str]:
    """What the command line shows on a terminal of 80 columns: every line that it has written, without colors."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        command(*arguments),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=REPOSITORY,
        env={**environment, "TERM": "screen-256color"},
    )
    os.close(slave)
    data = bytearray()
    try:
        while chunk := _read(master):
            data += chunk
        assert process.wait(timeout=60) == 0, data.decode()
    finally:
        process.kill()
        os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", data.decode())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # the process has ended
        return b""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.storage.write_json("plan.json", PLAN)
    return run


@pytest.mark.slow
def test_a_run_fits_80_columns_with_a_line_per_stage_and_says_what_to_do_next(tmp_path: Path) -> None:
    out = tmp_path / "r"
    settings = ["source.num_samples=20", "shard_size=2", "images.sizes_px=[16]", "--executor", "inline"]
    lines = on_terminal("run", "precompute", "--out", str(out), *settings)
    stages = [line for line in lines if re.match(r"(fetch|resize|encode-t5) ", line)]
    assert {line.split()[0] for line in stages} == {"fetch", "resize", "encode-t5"}
    assert max(map(len, stages)) <= COLUMNS
    assert "…" not in "".join(lines)
    for line in stages[-3:]:
        assert re.search(r"\[#+\] +10/10 shards +[\d,]+ rows/s +\d drops?$", line), line
    assert any(re.search(r"ETA \d+:\d\d$", line) for line in stages)
    steps = {line.split()[0]: line for line in lines[-6:]}
    assert f"--out {out} --retry-dropped http_404" in " ".join(lines[-6:])
    assert {"dropped", "store", "report", "browse", "train"} <= steps.keys()


@pytest.mark.slow
def test_on_a_terminal_the_lines_of_a_watched_run_are_rewritten_in_place(run: RunFolder) -> None:
    with RunLock(run.storage):
        now = time.time()
        write_event(run, "run_started", now - 10, workflow="precompute", executor="local", shards=10)
        task(run, "fetch", 0, now - 5, originals={"rows": 9, "drops": {}})
        resized(run, 0, now - 4, {"too_small": 2})

        ender = threading.Timer(6.0, lambda: write_event(run, "run_ended", time.time(), outcome="finished"))
        ender.start()
        reader: list[list[str]] = []
        watcher = threading.Thread(target=lambda: reader.append(on_terminal("status", run.url, "--watch")))
        watcher.start()
        ender.join()
    watcher.join(60)
    (lines,) = reader
    shown = [line for line in lines if line.startswith("resize")]
    assert any(re.search(r"\[#+\.+\] +1/10 shards +1 rows/s +2 drops +ETA ", line) for line in shown), lines
    assert max(map(len, lines)) <= COLUMNS
    assert any(line.startswith("precompute  running") for line in lines)
    assert lines[-1].startswith("precompute: ")


def test_elsewhere_a_line_is_printed_at_each_change_until_the_run_ends(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(run.storage)
    lock.__enter__()
    write_event(run, "run_started", 100.0, executor="local", shards=3)
    steps = iter(range(4))

    def sleep(seconds: float) -> None:
        step = next(steps)
        if step == 1:
            return  # nothing has changed
        if step == 3:
            lock.__exit__(None, None, None)
            return
        resized(run, step, 101.0 + step, {"too_small": 1})

    monkeypatch.setattr(watch_module.time, "sleep", sleep)
    result = call("status", run.url, "--watch")
    assert (result.code, result.err) == (0, "")
    watched = [line for line in result.out.splitlines() if line.startswith("precompute running")]
    assert watched == [
        "precompute running 0.0 s; fetch 0/3 shards 0 drops; resize 0/3 shards 0 drops",
        "precompute running 1.0 s ETA 0:02; fetch 1/3 shards 0 drops; resize 1/3 shards 8 rows/s 1 drop ETA 0:02",
        "precompute running 3.0 s ETA 0:02; fetch 2/3 shards 0 drops; resize 2/3 shards 5 rows/s 2 drops ETA 0:02",
    ]
    assert result.out.splitlines()[-1] == "precompute: not finished; run the same command again"


def test_as_json_each_change_is_an_object_and_the_end_is_the_status(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(run.storage)
    lock.__enter__()
    write_event(run, "run_started", 100.0, shards=3)
    monkeypatch.setattr(watch_module.time, "sleep", lambda seconds: lock.__exit__(None, None, None))
    first, _, rest = call("status", run.url, "--watch", "--json").out.partition("\n")
    assert json.loads(first)["stages"][1] == {
        "stage": "resize",
        "shards": 0,
        "total": 3,
        "rows_per_s": None,
        "drops": 0,
    }
    assert json.loads(rest)["running"] is False


def test_a_run_that_has_ended_is_shown_once(small_run: Path) -> None:
    assert call("status", str(small_run), "--watch") == call("status", str(small_run))


def test_a_run_that_cannot_be_read_for_a_moment_is_watched_on(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RunLock(run.storage)
    lock.__enter__()
    plan = run.root / "plan.json"
    steps = iter(range(3))

    def sleep(seconds: float) -> None:
        step = next(steps)
        if step == 0:
            plan.rename(run.root / "away")
        elif step == 1:
            (run.root / "away").rename(plan)
        else:
            lock.__exit__(None, None, None)

    monkeypatch.setattr(watch_module.time, "sleep", sleep)
    result = call("status", run.url, "--watch")
    assert result.code == 0
    assert result.err.startswith(f"{run.url}: not a run folder")
    assert result.err.count("\n") == 1


def test_jobs_are_followed_and_folders_watched(small_run: Path) -> None:
    refused = call("status", "job", "--address", "http://127.0.0.1:1", "--watch")
    assert (refused.code, "--follow" in refused.err) == (2, True)
    assert "--watch" in call("status", str(small_run), "--follow").err
