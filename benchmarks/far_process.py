"""Commands in processes that are forked from one with all modules loaded, each behind a proxy of its own.

Preloaded by multiprocessing's fork server, so a command starts within a fraction of a second. No thread runs in that
server, and no command: threads, which libraries start when they compute or connect, do not survive a fork.
"""

import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import types
import weakref
from collections.abc import Mapping
from pathlib import Path

from benchmarks.faults import call, fix_time

PACKAGES = ("imagen_core", "pipeline", "stages", "workflows")
_MODULES = ("pipeline.storage.", "pipeline.job", "pipeline.executors.task", "imagen_core.far.")
SHORT_S = {
    "PATIENCE_S": 6.0,
    "LONGEST_PAUSE_S": 0.5,
    "SEND_EVERY_S": 0.2,
    "RENEW_S": 0.5,
    "EXPIRE_S": 3.0,
    "POLL_S": 0.1,
}
"""Constants by name, with or without a leading `_`, and their values here; in whichever of the modules has them."""
ALSO_SHORT_S = {"LEASE_WITHIN_S": 0.2, "LEASE_HOLDS_S": 0.2, "FAR_STEP_S": 0.7, "STUCK_AFTER_S": 4.0}
"""Likewise, but earlier versions have none of them."""
LIBRARY = {"connect_timeout": 4, "read_timeout": 4, "retries": {"mode": "standard", "max_attempts": 2}}
"""The S3 library's own patience, by fsspec's configuration."""
_PR_SET_PDEATHSIG = 1


def constants() -> dict[str, float]:
    """The constants to shorten that the loaded modules have, with their module, and their values here.

    Raises:
        LookupError: there is none of a name any more.
    """
    values = {**SHORT_S, **ALSO_SHORT_S}
    found = {
        f"{module.__name__}.{name}": values[name.lstrip("_")]
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith(_MODULES)
        for name in list(vars(module))
        if name.lstrip("_") in values
    }
    if absent := SHORT_S.keys() - {name.rpartition(".")[2].lstrip("_") for name in found}:
        raise LookupError(f"no constant {', '.join(sorted(absent))} in {', '.join(_MODULES)}: name the new one here")
    return found


def _shorten() -> None:
    for found, value in constants().items():
        module, _, name = found.rpartition(".")
        setattr(sys.modules[module], name, value)


def _child(commands: list[list[str]], environment: dict[str, str], folder: Path, output: Path) -> None:
    """Runs commands until one fails, and ends the process with its exit code."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # none is left, not even one that was stopped
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.modules["__main__"] = types.ModuleType("__main__")  # so that processes started from here do not import it
        os.environ.update(environment)
        tempfile.tempdir = environment["TMPDIR"]
        os.chdir(folder)
        import torch

        torch.set_num_threads(1)
        _shorten()
        fix_time()
        code = 0
        for command in commands:
            code = call(command)
            if code:
                break
        gc.collect()
        weakref.finalize._exitfunc()  # type: ignore[attr-defined]
    except BaseException:  # noqa: BLE001 - the end of a process
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Process:
    """Commands at work in a process of their own."""

    def __init__(self, commands: list[list[str]], environment: Mapping[str, str], folder: Path, output: Path) -> None:
        """
        Args:
            environment: added to that of the fork server.
            folder: where it works.
            output: file for what it prints.
        """
        self._output = output
        self._process = _CONTEXT.Process(target=_child, args=(commands, dict(environment), folder, output))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def ended(self) -> bool:
        return not self._process.is_alive()

    def wait(self, limit_s: float) -> int | None:
        """The exit code, negative of a signal that ended it; None of one that hung, and was killed."""
        self._process.join(limit_s)
        if self._process.is_alive():
            self.send(signal.SIGKILL)
            self._process.join()
            return None
        return self._process.exitcode


def environment(endpoint: str, credentials: Mapping[str, str], temporary: Path) -> dict[str, str]:
    """Variables of a process that reaches the object store through a proxy."""
    return {
        **credentials,
        "AWS_ENDPOINT_URL": endpoint,
        "TMPDIR": str(temporary),
        "FSSPEC_S3": json.dumps({"config_kwargs": LIBRARY}),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["benchmarks.far_preload"])
