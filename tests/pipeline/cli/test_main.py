"""The options of the `pipeline` command itself."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.commands import call


def test_version_prints_the_version_of_the_installed_package_and_stops() -> None:
    result = call("--version")
    assert (result.code, result.out, result.err) == (0, f"pipeline {version('imagen-precompute')}\n", "")


@pytest.mark.parametrize("command", [[], ["run"], ["config", "show"], ["inspect"]])
def test_h_is_help_for_the_command_and_its_subcommands(command: list[str]) -> None:
    short, long = call(*command, "-h"), call(*command, "--help")
    assert (short.code, short.out) == (0, long.out)
    assert " ".join(["Usage: pipeline", *command]) in short.out


@pytest.mark.parametrize("module", ["pipeline", "pipeline.cli"])
def test_the_module_is_the_command(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False, timeout=120
    )
    assert (result.returncode, result.stdout) == (0, f"pipeline {version('imagen-precompute')}\n")
