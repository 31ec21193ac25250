"""Calls the command line, in this process or in its own, and reads what a run left."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from pipeline.cli import main as cli


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def call(*arguments: str) -> Result:
    """The command line in this process: what `pipeline ARGUMENTS` prints, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["pipeline", *arguments]),
        mock.patch("signal.signal"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


def call_process(*arguments: str, cwd: Path, timeout_s: float = 280, **environment: str) -> Result:
    """The console script in its own process; `environment` overrides this one's."""
    script = Path(sys.executable).with_name("pipeline")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "pipeline"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env={**os.environ, "PIPELINE_DEBUG": "", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def precompute(out: Path, *overrides: str) -> Result:
    """`pipeline run precompute` in this process."""
    return call("run", "precompute", "--out", str(out), "--executor", "inline", "--quiet", *overrides)


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def drops(run: Path) -> list[tuple[str, str]]:
    """Key and reason of each dropped row, in the order of the input."""
    lines = [
        json.loads(line)
        for path in sorted((run / "quarantine" / "samples").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [(line["key"], line["reason"]) for line in lines]


def tree(folder: Path) -> set[str]:
    """Every file below a folder, by relative name."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
