"""Two processes (gloo, on this machine) train as one does, also when one takes over from two in the middle.

The processes are started once for the complete file, since starting them takes longer than all they do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.train import train
from tests.imagen_core.train.processes import ROOT, job, keys_in_order, newest, report, train_split
from tests.imagen_core.train.small import BASE, SUPER, TRANSFORMER, make_config, metrics, tensors

pytestmark = pytest.mark.slow

ONE: dict[str, dict[str, Any]] = {
    "base": {"num_steps": 4},
    "super": {"num_steps": 2, "denoiser": SUPER, "views": {"crop_px": 16, "horizontal_flip": True}},
    "uneven": {
        "num_steps": 6,
        "validation": {"num_samples": 7},
    },  # 33 samples: the fifth batch has one, so one process none
    "split": {"num_steps": 13},
    "transformer": {"num_steps": 3, "denoiser": TRANSFORMER},
    "times": {
        "num_steps": 5,
        "noise_levels": {"kind": "loss_second_moment"},
        "denoiser": BASE
        | {"diffusion": {"schedule": {"kind": "discrete", "num_steps": 2, "beta": "cosine"}, "objective": "eps"}},
    },
}
TWO: dict[str, dict[str, Any]] = {
    "base": ONE["base"],
    "base-micro": {**ONE["base"], "micro_batch_size": 2},
    "super": ONE["super"],
    "uneven": {**ONE["uneven"], "micro_batch_size": 3},
    "transformer": ONE["transformer"],
    "times-micro": {**ONE["times"], "micro_batch_size": 3},
    "stopped": {"stop_at": 2},
    "lost": {"unreadable": 3},
    "poisoned": {"poison": 3, "checkpoints": {"every_steps": 1}},
}


@pytest.fixture(scope="module")
def one(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of ONE, by this process alone."""
    folder = tmp_path_factory.mktemp("one")
    for name, changes in ONE.items():
        train(make_config(store, **changes), folder / name)
    return folder


@pytest.fixture(scope="module")
def two(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of TWO, by two processes, and one that goes from two processes to one and back to two."""
    folder = tmp_path_factory.mktemp("two")
    train_split(store, folder, TWO)
    return folder


@pytest.mark.parametrize("name", ["split", *(name for name in TWO if name.split("-")[0] in ONE)])
def test_two_processes_train_as_one(one: Path, two: Path, name: str) -> None:
    expected = tensors(newest(one / name.split("-")[0]))
    found = tensors(newest(two / name))
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", ["base", "base-micro", "uneven"])
def test_metrics_are_those_of_all_processes(one: Path, two: Path, name: str) -> None:
    expected, found = metrics(one / name.split("-")[0]), metrics(two / name)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(expected, found, strict=True):
        for field in {"samples", "loss", "grad_norm", "lr", "validation_loss", "validation_loss_without_ema"} & set(a):
            assert b[field] == pytest.approx(a[field], rel=1e-9)


def test_a_process_without_samples_takes_part(two: Path) -> None:
    sizes = [[len(keys) for keys in report(two, "uneven", f"rank-{rank}")["keys"]] for rank in range(2)]
    assert sizes == [[4, 4, 4, 4, 0, 4], [4, 4, 4, 4, 1, 4]]


def test_two_then_one_then_two_processes_see_each_sample_once_an_epoch(two: Path) -> None:
    seen = keys_in_order(two, "split")
    assert len(seen) == 13 * 8
    for epoch in (seen[:40], seen[40:80]):
        assert len(set(epoch)) == 40
    assert len(set(seen[80:])) == 24


def test_one_process_that_wants_to_stop_stops_all(two: Path) -> None:
    for rank in range(2):
        assert report(two, "stopped", f"rank-{rank}")["error"].startswith("TrainingStopped: stopped after step 2")
    assert newest(two / "stopped").name == "step-00000002"


def test_a_loss_that_is_not_finite_stops_all_before_the_step(two: Path) -> None:
    reports = [report(two, "poisoned", f"rank-{rank}") for rank in range(2)]
    assert all(r["error"].startswith("NonFiniteLossError: step 2") for r in reports)
    saved = json.loads((two / "poisoned" / "nan" / "step-00000002.json").read_text(encoding="utf-8"))
    assert saved["keys"] == reports[0]["keys"][2] + reports[1]["keys"][2]
    assert (saved["step"], saved["loss"]) == (2, "nan")
    assert newest(two / "poisoned").name == "step-00000002"
    assert all(bool(values.isfinite().all()) for values in tensors(newest(two / "poisoned")).values())


def test_a_process_that_cannot_read_the_store_ends_all_with_a_checkpoint(one: Path, two: Path) -> None:
    for rank in range(2):
        error = report(two, "lost", f"rank-{rank}")["error"]
        assert error.startswith("StoreLostError: store ")
        assert "ConnectionError: the store is far away; the checkpoint of step 2 is saved" in error
    assert newest(two / "lost").name == "step-00000002"
    assert not metrics(two / "lost")[2:]


def test_only_the_first_process_writes(two: Path) -> None:
    names = {path.name for path in (two / "base").iterdir()}
    assert names == {"checkpoints", "metrics.jsonl", "starts.jsonl", "rank-0.json", "rank-1.json"}
    assert len(metrics(two / "base")) == 4


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_torchrun_starts_it(store: Path, one: Path, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([job(store, tmp_path / "out", **ONE["base"])]), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tests.imagen_core.train.worker", str(jobs)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"})
    expected, found = tensors(newest(one / "base")), tensors(newest(tmp_path / "out"))
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-5, atol=1e-10)
