"""How threads that wait for each other are set: before torch is imported, and never against the user."""

import os

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.executors.process import SHORT_SPIN, let_threads_sleep


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if name not in {*SHORT_SPIN, "OMP_WAIT_POLICY"}}
    monkeypatch.setattr(os, "environ", mine)
    return mine


def test_a_run_lets_its_threads_sleep_before_it_loads_the_workflow(environment: dict[str, str]) -> None:
    assert CliRunner().invoke(app, ["run", "no-such-workflow"]).exit_code
    assert {name: environment.get(name) for name in SHORT_SPIN} == SHORT_SPIN


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_says_of_waiting_threads_is_all_that_is_said(environment: dict[str, str], name: str) -> None:
    environment[name] = "user"
    let_threads_sleep()
    assert {n: environment[n] for n in {*SHORT_SPIN, "OMP_WAIT_POLICY"} & environment.keys()} == {name: "user"}
