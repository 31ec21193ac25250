"""Workers start before their first task, finish shards before they begin others, and are forked to import once."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.executors import local_worker
from pipeline.executors import task as task_module
from pipeline.options import RunOptions, Summary
from tests.pipeline.toy import Toy, ToyConfig, marks

EXECUTORS = ["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]


def run(tmp_path: Path, executor: str, *, attempts: int = 3, num_cpus: int = 2, **toy: object) -> Summary:
    trace = tmp_path / "trace"
    trace.mkdir()
    execution = {"num_cpus": num_cpus, "retry_delay_s": 0, "max_attempts": attempts}
    config = ToyConfig.model_validate({"toy": {"trace": str(trace), **toy}, "execution": execution})
    return Toy(config).run(tmp_path / "r", RunOptions(executor, quiet=True))


def names(tmp_path: Path, prefix: str) -> list[str]:
    return [mark.name for mark in sorted((tmp_path / "trace").glob(f"{prefix}-*"))]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_later_stage_is_set_up_before_the_first_shard_is_fetched(executor: str, tmp_path: Path) -> None:
    summary = run(tmp_path, executor, add_cubes=True, fetch_awaits="setup")
    assert summary["num_samples"] == 18
    assert marks(tmp_path / "trace", "setup") == 1, "by the worker that then has the tasks"


@pytest.mark.parametrize("executor", EXECUTORS)
def test_tasks_that_wait_leave_the_processors_to_tasks_that_compute(executor: str, tmp_path: Path) -> None:
    assert run(tmp_path, executor, fetch_waits=True)["num_samples"] == 18


def test_shards_are_finished_before_others_are_begun(tmp_path: Path) -> None:
    run(tmp_path, "local", num_cpus=1)
    begun = [mark.name for mark in sorted((tmp_path / "trace").iterdir(), key=lambda mark: mark.stat().st_mtime_ns)]
    shards = [name.split("-")[1] for name in begun if name.startswith(("fetch", "square"))]
    assert shards == [shard for shard in dict.fromkeys(shards) for _ in range(2)]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
@pytest.mark.parametrize("fetch_waits", [False, True])
def test_workers_of_a_run_with_large_packages_are_forked_from_one_process(
    tmp_path: Path, *, fetch_waits: bool
) -> None:
    assert run(tmp_path, "local", modules=("decimal",), fetch_waits=fetch_waits)["num_samples"] == 18
    parents = {name.split("-of-")[1].split("-")[0] for name in names(tmp_path, "worker")}
    assert len(parents) == 1
    assert parents != {str(os.getpid())}


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_what_needs_large_packages_is_answered_by_a_forked_process() -> None:
    assert local_worker.call_warm(os.getpid) == os.getpid()
    with local_worker.warmed(sorted(local_worker._imported) or ["decimal"]):
        assert local_worker.call_warm(os.getpid) != os.getpid()
        with pytest.raises(ValueError, match="invalid literal for int"):
            local_worker.call_warm(int, "x")
        with local_worker.call_warm(threading.Lock):  # cannot be sent, so it is this process's own
            pass
    with local_worker.warmed(["a module that was not imported then"]):
        assert local_worker.call_warm(os.getpid) == os.getpid()
    assert local_worker.call_warm(os.getpid) == os.getpid()


def test_the_processor_time_of_tasks_that_run_together_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [3.0]
    monkeypatch.setattr(task_module.time, "process_time", lambda: now[0])
    shares = task_module._CpuShares()
    shares.begin(1)
    now[0] = 4.0
    shares.begin(2)
    now[0] = 8.0
    assert shares.end(1) == 1.0 + 2.0
    now[0] = 9.0
    assert shares.end(2) == 2.0 + 1.0
    assert shares.end(3) == 0.0, "it never began"


def test_a_worker_looks_for_garbage_once_a_stage_is_set_up_and_not_among_what_was_there() -> None:
    code = """
import gc, weakref
from pipeline.executors.process import prepare_process, set_up_once

class Node:
    pass

def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)

with set_up_once():
    print(gc.isenabled(), gc.get_freeze_count())
print(gc.isenabled(), gc.get_freeze_count())
prepare_process()
frozen = gc.get_freeze_count()
print(gc.isenabled(), frozen > 1000)
with set_up_once():
    of_set_up = cycle()
    import decimal
print(of_set_up(), gc.isenabled(), gc.get_freeze_count() > frozen)
frozen = gc.get_freeze_count()
prepare_process()
of_task = cycle()
gc.collect()
print(of_task(), gc.isenabled(), gc.get_freeze_count() - frozen)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["True 0", "True 0", "False True", "None True True", "None True 0"], done.stderr


@pytest.mark.slow
def test_what_workers_are_forked_from_has_no_threads_of_python_and_uses_no_gpu() -> None:
    code = (
        "import importlib, threading\n"
        "from stages.encoders.t5 import T5EncoderConfig\n"
        "from stages.precompute.resize import ResizeStage\n"
        "names = {'torch', 'scipy.fft', *T5EncoderConfig.modules, ResizeStage.__module__}\n"
        "[importlib.import_module(name) for name in sorted(names)]\n"
        "import torch\n"
        "print(threading.active_count(), torch.cuda.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "1 False\n", done.stderr
