"""The contract of the executors: both pass the same tests."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from pipeline.errors import MachineError, PipelineError, ShardError, StaleOutputError
from pipeline.options import RunOptions, Summary
from tests.pipeline.toy import Toy, ToyConfig, marks

EXECUTORS = ["inline", "local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]


def run(out: Path, executor: str, *, restart: bool = False, **toy: object) -> Summary:
    config = ToyConfig.model_validate({"toy": toy, "execution": {"num_cpus": 2, "retry_delay_s": 0}})
    return Toy(config).run(out, RunOptions(executor, restart=restart, quiet=True))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    folder = tmp_path / "trace"
    folder.mkdir()
    return folder


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "store").rglob("*")) if p.is_file()}


@dataclass(frozen=True)
class FinishedRun:
    out: Path
    toy: dict[str, object]
    summary: Summary


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FinishedRun]:
    """A finished run by an executor, done once; the same command again is all that may be done with it."""

    @cache
    def finished(executor: str) -> FinishedRun:
        folder = tmp_path_factory.mktemp(executor)
        (folder / "trace").mkdir()
        toy: dict[str, object] = {"trace": str(folder / "trace"), "add_cubes": True}
        return FinishedRun(folder / "r", toy, run(folder / "r", executor, **toy))

    return finished


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_run_is_whole_and_the_same_command_again_does_nothing(
    executor: str, finished_run: Callable[[str], FinishedRun]
) -> None:
    done = finished_run(executor)
    out, summary, trace = done.out, done.summary, Path(str(done.toy["trace"]))
    assert summary["num_samples"] == 18  # 20 values, of which 7 and 17 are dropped
    made = files(out)
    assert made["store/squares/00001.txt"] == b"32\n50\n72"
    assert made["store/cubes/00001.txt"] == b"132\n150\n172"
    assert marks(trace, "setup") == 1, "the worker keeps its model across shards"
    assert not list((out / "staging").rglob("*.txt")), "intermediate files are gone"
    quarantine = (out / "quarantine" / "squares" / "00001.jsonl").read_text()
    assert json.loads(quarantine) == {"row": 3, "key": "7", "reason": "ends_in_seven", "detail": ""}
    calls = len(list(trace.iterdir()))
    again = run(out, executor, **done.toy)
    assert len(list(trace.iterdir())) == calls
    assert again["tally"]["shards_skipped"] == 5  # type: ignore[index]
    assert again["tally"]["groups"] == summary["tally"]["groups"]  # type: ignore[index]
    assert files(out) == made


@pytest.mark.ray
@pytest.mark.slow
def test_all_executors_write_the_same_bytes(finished_run: Callable[[str], FinishedRun]) -> None:
    inline, local, ray = (files(finished_run(executor).out) for executor in ("inline", "local", "ray"))
    assert ray == local == inline
    assert len(inline) == 10


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_failing_shard_is_retried_set_aside_and_the_rest_finishes(
    executor: str, tmp_path: Path, trace: Path
) -> None:
    with pytest.raises(ShardError, match=r"1 of 5 shards failed.*cannot square shard 2"):
        run(tmp_path / "r", executor, trace=str(trace), fail_shards=[2])
    assert marks(trace, "square-00002") == 3
    assert sorted(files(tmp_path / "r")) == [f"store/squares/0000{i}.txt" for i in (0, 1, 3, 4)]
    assert "ValueError" in (tmp_path / "r" / "quarantine" / "failed" / "square-00002.txt").read_text()
    run(tmp_path / "r", executor, trace=str(trace))
    assert len(files(tmp_path / "r")) == 5
    assert marks(trace, "square-00001") == 1


@pytest.mark.parametrize("executor", EXECUTORS[1:])
def test_a_killed_worker_costs_nothing_but_time(executor: str, tmp_path: Path, trace: Path) -> None:
    run(tmp_path / "r", executor, trace=str(trace), kill_shard=1)
    run(tmp_path / "plain", executor)
    assert files(tmp_path / "r") == files(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.ray
def test_a_worker_runs_as_many_tasks_at_once_as_its_stage_allows(tmp_path: Path, trace: Path) -> None:
    run(tmp_path / "r", "ray", trace=str(trace), add_cubes=True, meet=True)
    order = sorted(trace.iterdir(), key=lambda mark: int(mark.name.rsplit("-", 1)[1]))
    steps = [mark.name.split("-")[0] for mark in order if mark.name.startswith(("cube", "done"))]
    assert steps[:3] == ["cube", "cube", "done"]
    assert marks(trace, "setup") == 1


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_setup_that_cannot_work_ends_the_run_at_once_with_its_exit_code(executor: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"toy\.model: not found") as caught:
        run(tmp_path / "r", executor, add_cubes=True, broken_setup=True)
    assert caught.value.exit_code == MachineError.exit_code


def test_a_group_added_later_leaves_the_others_alone(tmp_path: Path, trace: Path) -> None:
    run(tmp_path / "r", "inline", trace=str(trace))
    run(tmp_path / "r", "inline", trace=str(trace), add_cubes=True)
    assert marks(trace, "square") == 5
    assert marks(trace, "fetch") == 5, "cubes need only squares, so nothing is fetched again"
    assert marks(trace, "cube") == 5


def test_a_changed_config_is_refused_with_a_diff_and_rebuilt_on_restart(tmp_path: Path) -> None:
    run(tmp_path / "r", "inline", add_cubes=True)
    before = files(tmp_path / "r")
    with pytest.raises(StaleOutputError, match=r"squares\.factor: 2 -> 3\n.*therefore: cubes"):
        run(tmp_path / "r", "inline", add_cubes=True, factor=3)
    assert files(tmp_path / "r") == before
    run(tmp_path / "r", "inline", restart=True, add_cubes=True, factor=3)
    assert files(tmp_path / "r")["store/cubes/00001.txt"] == b"148\n175\n208"


def test_changed_input_rows_are_refused_and_rebuilt_on_restart(tmp_path: Path) -> None:
    run(tmp_path / "r", "inline", rows=4)
    with pytest.raises(StaleOutputError, match="shard 00000 of squares was made from other input rows"):
        run(tmp_path / "r", "inline", rows=3)
    run(tmp_path / "r", "inline", rows=3, restart=True)
    run(tmp_path / "plain", "inline", rows=3)
    assert files(tmp_path / "r") == files(tmp_path / "plain")


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_file_and_what_was_made_from_it_is_made_anew(tmp_path: Path, damage: str) -> None:
    run(tmp_path / "r", "inline", add_cubes=True)
    before = files(tmp_path / "r")
    bad = tmp_path / "r" / "store" / "squares" / "00003.txt"
    bad.unlink() if damage == "missing" else bad.write_bytes(b"1")
    (tmp_path / "r" / "store" / "cubes" / "00003.txt").write_text("made from the bad file")
    run(tmp_path / "r", "inline", add_cubes=True)
    assert files(tmp_path / "r") == before


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    run(tmp_path / "r", "inline")
    (tmp_path / "r" / "store" / "squares" / ".tmp-123-00000.txt").write_text("half")
    (tmp_path / "r" / "staging").mkdir(exist_ok=True)
    (tmp_path / "r" / "staging" / ".tmp-abc").mkdir()
    run(tmp_path / "r", "inline")
    assert not list((tmp_path / "r").rglob(".tmp-*"))


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    from pipeline.errors import LockedError
    from pipeline.storage.run_folder import RunFolder

    with RunFolder(tmp_path / "r").lock(), pytest.raises(LockedError, match=f"process {os.getpid()} of "):
        run(tmp_path / "r", "inline")


def test_intermediate_files_are_kept_if_asked(tmp_path: Path) -> None:
    run(tmp_path / "r", "inline", keep=True)
    assert len(list((tmp_path / "r" / "staging" / "raw").glob("*.txt"))) == 5
