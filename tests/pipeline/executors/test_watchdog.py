"""A task that hangs costs its shard one try, and its worker its life."""

from pathlib import Path

import pytest

from pipeline.errors import ShardError
from pipeline.executors import watchdog
from pipeline.executors.task import SetupRequest, TaskRequest
from pipeline.executors.watchdog import Watchdog, worker_lost
from pipeline.options import RunOptions, Summary
from pipeline.stage import Shard, note_progress
from pipeline.storage.run_folder import RunFolder
from tests.pipeline.toy import Toy, ToyConfig, marks


def run(out: Path, executor: str, *, limit_s: float | None, attempts: int = 3, **toy: object) -> Summary:
    execution = {"num_cpus": 2, "retry_delay_s": 0, "task_limit_s": limit_s, "max_attempts": attempts}
    return Toy(ToyConfig.model_validate({"toy": toy, "execution": execution})).run(
        out, RunOptions(executor, quiet=True)
    )


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])])
def test_a_shard_that_hangs_once_is_tried_again_in_another_worker(executor: str, tmp_path: Path) -> None:
    summary = run(tmp_path / "r", executor, limit_s=1000, trace=str(tmp_path), hanging_shard=1)
    assert summary["num_samples"] == 18
    assert marks(tmp_path, "square-00001") == 2
    assert marks(tmp_path, "square") == 6, "no other shard has lost a try"
    events = (tmp_path / "r" / "events.jsonl").read_text()
    assert "no sign of progress for 1000 s (execution.task_limit_s); its worker was ended" in events
    assert not list((tmp_path / "r").rglob("*.hangs"))


def test_a_shard_that_hangs_each_time_is_set_aside_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"1 of 2 shards failed.*no sign of progress for 1000 s"):
        run(tmp_path / "r", "local", limit_s=1000, attempts=1, trace=str(tmp_path), hanging_shard=1, num_shards=2)
    (failure,) = (tmp_path / "r" / "quarantine" / "failed").iterdir()
    assert failure.name == "square-00001.txt"
    assert "in hang_once" in failure.read_text()


@pytest.mark.slow
def test_a_library_that_holds_the_interpreter_does_not_keep_its_worker(tmp_path: Path) -> None:
    toy = {"trace": str(tmp_path), "hanging_shard": 0, "holds_interpreter": True, "num_shards": 1}
    summary = run(tmp_path / "r", "local", limit_s=1000, **toy)
    assert summary["num_samples"] == 4
    assert marks(tmp_path, "square-00000") == 2
    assert "the worker process died" in (tmp_path / "r" / "events.jsonl").read_text()


def test_without_tasks_nothing_ends_and_a_sign_of_one_task_counts_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[float | None] = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda s, **_: armed.append(s))
    monkeypatch.setattr(watchdog.faulthandler, "cancel_dump_traceback_later", lambda: armed.append(None))
    monkeypatch.setattr(watchdog.threading.Thread, "start", lambda _: None)
    run, found = RunFolder(tmp_path), Watchdog()
    one, two, free = (
        TaskRequest("s", Shard(i, [i], 1), frozenset(), {}, limit_s=limit) for i, limit in enumerate((90, 50, None))
    )
    with found.watching(run, free):
        assert armed == []
    with found.watching(run, one):
        with found.watching(run, two):
            note_progress()
            assert 49 < found._left_s() <= 50
        assert 89 < found._left_s() <= 90
    assert [None if s is None else round(s) for s in armed] == [150, 110, 150, None]


def test_only_a_worker_that_left_a_note_hung(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    request = TaskRequest("s", Shard(3, [3], 1), frozenset(), {}, limit_s=90)
    assert worker_lost(folder, request, "it died").error == "it died"
    folder.storage.write_text(watchdog._note(folder, SetupRequest("s", 90)), "Thread MainThread: loading")
    assert "loading" in worker_lost(folder, request, "it died").traceback, "the task waited for its setup"
    folder.storage.write_text(watchdog._note(folder, request), "Thread MainThread: here")
    outcome = worker_lost(folder, request, "it died")
    assert (outcome.lost, outcome.error) == (
        "worker",
        "no sign of progress for 90 s (execution.task_limit_s); its worker was ended",
    )
    assert "here" in outcome.traceback
    assert worker_lost(folder, request, "it died").error == "it died"
