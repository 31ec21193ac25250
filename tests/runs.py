"""Helpers to run the precompute workflow as a user does, and to inspect what it made."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.options import RunOptions
from workflows.precompute import Precompute, PrecomputeConfig

REPOSITORY = Path(__file__).resolve().parents[1]
EMOJI = REPOSITORY.parent / "shared" / "data" / "noto-emoji"

SMALL = ["source.num_samples=20", "shard_size=8", "images.sizes_px=[16,48]"]
"""A synthetic source of 3 shards; scene 2 is the dead link."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", *arguments]


def pipeline(*arguments: str, check: int | None = 0, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs the command line in its own process."""
    result = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout_s, cwd=REPOSITORY, check=False
    )
    if check is not None:
        assert result.returncode == check, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def precompute(out: Path, *overrides: str, executor: str = "inline", restart: bool = False) -> dict[str, Any]:
    """Runs precompute in this process, which has the heavy modules loaded already; returns the summary."""
    workflow = Precompute(load_config(PrecomputeConfig, None, overrides))
    return workflow.run(out, RunOptions(executor, restart=restart, quiet=True))


def precompute_interrupted(
    stage: type[Any], allowed: Sequence[bool], out: Path, *overrides: str, patch: pytest.MonkeyPatch
) -> None:
    """Runs precompute until it ends, started again after each interruption.

    Args:
        stage: a call of its `process` raises KeyboardInterrupt where `allowed` is false; later calls are allowed.
    """
    honest, left = stage.process, iter(allowed)

    def process(self: Any, task: Any) -> None:
        if not next(left, True):
            raise KeyboardInterrupt
        honest(self, task)

    patch.setattr(stage, "process", process)
    for _ in range(allowed.count(False)):
        with pytest.raises(KeyboardInterrupt):
            precompute(out, *overrides)
    precompute(out, *overrides)


def store_bytes(out: Path) -> dict[str, bytes]:
    """Every file of the store, by name."""
    store = out / "store"
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def events(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run; tests must not change it."""
    out = tmp_path_factory.mktemp("small") / "run"
    precompute(out, *SMALL)
    return out


@pytest.fixture
def copy_of_small_run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished small run, which tests may change."""
    subprocess.run(["cp", "-r", str(small_run), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


@pytest.fixture
def emoji() -> Path:
    """2,000 real images."""
    if not EMOJI.is_dir():
        pytest.skip(f"needs the shared test data in {os.path.relpath(EMOJI, REPOSITORY)}")
    return EMOJI


@pytest.fixture(scope="session")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store `run/store`, and a base (16 px) and a super-resolution model (32 px) trained on it; tests
    must not change it."""
    from tests.trained import write_cascade

    return write_cascade(tmp_path_factory.mktemp("cascade"))
