"""Asked to stop, a run stops with the right exit code, and the same command goes on."""

import signal
import time
from pathlib import Path

import pytest

from tests.workflows.conftest import pipeline
from tests.workflows.test_kill import CONFIG, descendants, records, start, wait_until_gone

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_ctrl_c_and_sigterm_end_the_run_with_their_codes(
    executor: str, how: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = start(tmp_path / "run", executor)
    while records(tmp_path / "run") < 2 and process.poll() is None:
        time.sleep(0.05)
    children = list(descendants(process.pid))
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors.decode()
    assert b"Traceback" not in errors
    wait_until_gone(children)
    if executor == "local":
        pipeline("run", "precompute", "--out", str(tmp_path / "run"), "--executor", executor, "--quiet", *CONFIG)
