"""A job shows that it received a stop signal, once, and writes nothing once it has lost its folder."""

import json
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.engine.progress import Lines
from pipeline.errors import EXIT_PREEMPTED, ConfigError, LockedError, MachineError, PreemptedError
from pipeline.job import Job, JobWorkflow
from pipeline.options import RunOptions
from pipeline.storage import lock, mirror
from pipeline.storage.events import read_events
from pipeline.storage.open import open_storage
from pipeline.storage.run_folder import SUMMARY, RunFolder


def test_a_stop_signal_is_shown_when_the_work_first_asks(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(RunFolder(str(tmp_path)), RunOptions(), Lines())
    assert not job.should_stop()
    assert capsys.readouterr().err == ""
    job.signals.received = signal.SIGINT
    assert job.should_stop()
    assert job.should_stop()
    assert capsys.readouterr().err == "SIGINT: finishing the current step; send it again to stop at once\n"


class Once(JobWorkflow):
    """A job whose work is a function."""

    name = "once"
    summary = "works once"
    config_class = Config

    def __init__(self, do: Callable[[Job], object]):
        super().__init__(Config())
        self.do = do

    def work(self, job: Job) -> Mapping[str, object]:
        self.do(job)
        return {"done": True}

    def dry_run(self) -> Mapping[str, object]:
        return {}


def taken_over(job: Job) -> None:
    """Another machine takes the folder."""
    now = time.time()
    lease = {"owner": "other", "host": "node-4", "pid": 7, "user": "ann", "since": now, "renewed": now}
    job.run.storage.write(lock.LEASE, json.dumps(lease).encode())


def run(out: str, do: Callable[[Job], object]) -> Mapping[str, object]:
    return Once(do).run(out, RunOptions("local", quiet=True))


@pytest.fixture(params=["local", "object store"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lock, "_STEP_S", -1.0)
    monkeypatch.setattr(lock, "_FAR_STEP_S", -1.0)
    return str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}"


def test_a_job_that_lost_its_folder_ends_at_the_next_step_and_writes_nothing_more(out: str) -> None:
    def work(job: Job) -> None:
        with job.working_folder() as folder:
            (folder / "first").write_text("1")
            job.send()
            assert not job.should_stop()
            taken_over(job)
            job.should_stop()
            (folder / "second").write_text("2")

    with pytest.raises(LockedError, match="lost the folder to process 7 of ann on node-4"):
        run(out, work)
    storage = open_storage(out)
    assert storage.read("first") == b"1"
    assert (storage.size("second"), storage.size(SUMMARY)) == (None, None)
    assert [event["event"] for event in read_events(storage)] in (["run_started"], [])
    lease = lock.read_lease(storage)
    assert lease is not None
    assert lease["owner"] == "other", "the other run's lease stays"


@pytest.mark.parametrize("error", [None, ConfigError("refused")])
def test_a_job_that_lost_its_folder_after_its_last_step_leaves_the_summary_of_the_other(
    out: str, error: Exception | None
) -> None:
    def work(job: Job) -> None:
        taken_over(job)
        open_storage(out).write_json(SUMMARY, {"of": "the other"})
        if error is not None:
            raise error

    with pytest.raises(LockedError):
        run(out, work)
    assert open_storage(out).read_json(SUMMARY) == {"of": "the other"}


def test_a_job_whose_changes_could_not_be_sent_for_long_stops_and_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(mirror, "SEND_EVERY_S", 0.01)
    monkeypatch.setattr(mirror, "STUCK_AFTER_S", 0.1)

    def refuse(*_: object) -> bool:
        raise MachineError("the store takes nothing")

    def work(job: Job, *, comes_back: bool) -> None:
        with pytest.MonkeyPatch.context() as patch, job.working_folder() as folder:
            (folder / "made").write_text("1")
            patch.setattr(type(job.run.storage), "replace_file", refuse)
            deadline = time.monotonic() + 20
            while not job.should_stop():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            if comes_back:
                patch.undo()

    with pytest.raises(MachineError, match=r"the store takes nothing; what was not sent is kept in /"):
        run(url, lambda job: work(job, comes_back=False))
    assert open_storage(url).size("made") is None
    with pytest.raises(
        PreemptedError, match=r"nothing could be sent .* run the same command again to resume"
    ) as found:
        run(url, lambda job: work(job, comes_back=True))
    assert found.value.exit_code == EXIT_PREEMPTED
    assert open_storage(url).read("made") == b"1"


def test_under_torchrun_a_preempted_job_says_that_its_exit_code_gets_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(job: Job) -> None:
        job.signals.received = signal.SIGTERM

    with pytest.raises(PreemptedError, match=r"^stopped by SIGTERM; run the same command again to resume$"):
        run(str(tmp_path / "run"), stopped)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(PreemptedError, match=r"resume \(torchrun makes 1 of this exit code 75, --executor ray"):
        run(str(tmp_path / "run"), stopped)
