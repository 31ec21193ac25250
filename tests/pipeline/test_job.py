"""A job shows that it received a stop signal, once."""

import signal

import pytest

from pipeline.engine.progress import Lines
from pipeline.job import Job
from pipeline.options import RunOptions
from pipeline.storage.run_folder import RunFolder


def test_a_stop_signal_is_shown_when_the_work_first_asks(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(RunFolder(str(tmp_path)), RunOptions(), Lines())
    assert not job.should_stop()
    assert capsys.readouterr().err == ""
    job.signals.received = signal.SIGINT
    assert job.should_stop()
    assert job.should_stop()
    assert capsys.readouterr().err == "SIGINT: finishing the current step; send it again to stop at once\n"
