"""Shards that fail, workers that die, runs that are told to stop: what is lost is never more than it must be."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.engine import scheduler
from pipeline.errors import PipelineError, PreemptedError, ShardError
from pipeline.options import RunOptions, Summary
from pipeline.signals import StopSignals
from tests.pipeline.executors.test_executors import files
from tests.pipeline.toy import Toy, ToyConfig, marks


def run(out: Path, executor: str, execution: dict[str, object] | None = None, **toy: object) -> Summary:
    execution = {"num_cpus": 2, "retry_delay_s": 0, **(execution or {})}
    config = ToyConfig.model_validate({"toy": toy, "execution": execution})
    return Toy(config).run(out, RunOptions(executor, quiet=True))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    folder = tmp_path / "trace"
    folder.mkdir()
    return folder


def squared(out: Path) -> set[str]:
    return {name.rpartition("/")[2] for name in files(out)}


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_is_set_aside_and_costs_no_other_shard_a_try(
    tmp_path: Path, trace: Path
) -> None:
    with pytest.raises(ShardError, match=r"1 of 6 shards failed.*on shard 3: the worker process died") as caught:
        run(tmp_path / "r", "local", {"num_cpus": 3}, trace=str(trace), deadly_shard=3, num_shards=6)
    assert caught.value.exit_code == 3
    assert [marks(trace, f"square-0000{i}") for i in range(6)] == [1, 1, 1, 3, 1, 1]
    assert squared(tmp_path / "r") == {f"0000{i}.txt" for i in (0, 1, 2, 4, 5)}
    assert "worker process died" in (tmp_path / "r" / "quarantine" / "failed" / "square-00003.txt").read_text()


def test_the_next_run_tries_only_the_failed_shards_and_forgets_their_tracebacks(tmp_path: Path, trace: Path) -> None:
    out = tmp_path / "r"
    with pytest.raises(ShardError) as caught:
        run(out, "inline", trace=str(trace), fail_shards=[1, 3])
    assert caught.value.summary["tally"]["shards_failed"] == 2  # type: ignore[index]
    assert len(list((out / "quarantine" / "failed").iterdir())) == 2
    run(out, "inline", trace=str(trace))
    assert [marks(trace, f"square-0000{i}") for i in range(5)] == [1, 4, 1, 4, 1]
    assert not (out / "quarantine" / "failed").exists()
    assert len(files(out)) == 5


def test_further_tries_wait_longer_and_longer(tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(scheduler, "time", clock)
    with pytest.raises(ShardError):
        run(tmp_path / "r", "inline", {"retry_delay_s": 4}, trace=str(trace), fail_shards=[2], num_shards=3)
    assert marks(trace, "square-00002") == 3
    assert clock.now == pytest.approx(4 + 8)


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_stage_that_fails_on_all_of_its_first_shards_ends_the_run(tmp_path: Path, trace: Path) -> None:
    toy = {"trace": str(trace), "fail_shards": range(50), "num_shards": 50}
    with pytest.raises(PipelineError, match=r"square failed on each of its first 2 shards .*shard 1") as caught:
        run(tmp_path / "r", "inline", {"give_up_after_shards": 2}, **toy)
    assert caught.value.exit_code == 1
    assert marks(trace, "square") == 6, "two shards, three tries each"


def test_a_stage_that_has_succeeded_may_fail_on_any_number_of_shards(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="4 of 5 shards failed") as caught:
        run(tmp_path / "r", "inline", {"give_up_after_shards": 2}, fail_shards=range(1, 5))
    assert caught.value.exit_code == 3


def test_a_run_in_which_every_shard_fails_has_failed(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="5 of 5 shards failed") as caught:
        run(tmp_path / "r", "inline", fail_shards=range(5))
    assert caught.value.exit_code == 1


@pytest.fixture
def when() -> Iterator[Callable[[Callable[[], bool], Callable[[], None]], None]]:
    """Does something in a thread of its own as soon as a condition holds."""
    threads: list[threading.Thread] = []

    def watch(condition: Callable[[], bool], action: Callable[[], None]) -> None:
        def wait() -> None:
            deadline = time.monotonic() + 60
            while not condition() and time.monotonic() < deadline:
                time.sleep(0.01)
            action()

        threads.append(threading.Thread(target=wait))
        threads[-1].start()

    yield watch
    for thread in threads:
        thread.join()


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("executor", ["inline", "local"])
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, PreemptedError)])
def test_told_to_stop_a_run_commits_what_is_running_and_begins_nothing(
    executor: str, number: int, error: type[BaseException], tmp_path: Path, trace: Path, when
) -> None:
    gate = tmp_path / "gate"
    under_way = 1 if executor == "inline" else 2

    def stop() -> None:
        send(number)
        gate.touch()

    when(lambda: marks(trace, "square") == under_way, stop)
    with pytest.raises(error):
        run(tmp_path / "r", executor, {"grace_s": 60}, trace=str(trace), gate=str(gate), num_shards=9, add_cubes=True)
    assert marks(trace, "square") == under_way
    assert marks(trace, "cube") == 0
    made = files(tmp_path / "r")
    assert len(made) == under_way, "their commits count"
    ended = json.loads((tmp_path / "r" / "events.jsonl").read_text().splitlines()[-1])
    assert ended["outcome"] == f"stopped: {error.__name__}"
    run(tmp_path / "r", "inline", trace=str(trace), num_shards=9, add_cubes=True)
    assert marks(trace, "square") == 9
    assert {name: files(tmp_path / "r")[name] for name in made} == made


@pytest.mark.parametrize("executor", ["inline", "local"])
@pytest.mark.parametrize("again", [True, False])
def test_a_second_signal_or_the_end_of_the_grace_period_abandons_what_is_running(
    executor: str, again: bool, tmp_path: Path, trace: Path, when
) -> None:
    def stop() -> None:
        send(signal.SIGTERM)
        if again:
            time.sleep(0.1)
            send(signal.SIGTERM)

    when(lambda: marks(trace, "square") > 0, stop)
    execution: dict[str, object] = {"grace_s": 60 if again else 0.1}
    with pytest.raises(PipelineError, match="stopped by SIGTERM; run the same command again") as caught:
        run(tmp_path / "r", executor, execution, trace=str(trace), gate=str(tmp_path / "never"))
    assert caught.value.exit_code == 75
    assert files(tmp_path / "r") == {}
    assert not list((tmp_path / "r").rglob(".tmp-*"))


def test_a_hangup_stops_like_sigterm_unless_it_is_ignored() -> None:
    former = signal.getsignal(signal.SIGHUP)
    try:
        with StopSignals() as stop:
            send(signal.SIGHUP)
            assert stop.received == signal.SIGHUP
            with pytest.raises(PreemptedError, match="stopped by SIGHUP"):
                stop.raise_stop()
        assert signal.getsignal(signal.SIGHUP) == former
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with StopSignals() as stop:
            send(signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, former)
