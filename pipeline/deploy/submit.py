"""Runs workflows on a cluster through Ray Jobs: ships configuration and code, follows and stops jobs."""

import asyncio
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.config import Config, dump_yaml
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, ConfigError, MachineError, first_line
from pipeline.executors.ray_address import jobs_url
from pipeline.executors.ray_cluster import probe
from pipeline.storage.credentials import check_no_credentials
from pipeline.storage.scratch import temporary_folder

_ENTRY_POINTS = ("pipeline.workflows", "pipeline.commands", "pipeline.models")
_DISTRIBUTION = "imagen-precompute"
_CONFIG_FILE = "config.yaml"
_STOP_WAIT_S = 300  # from SIGTERM to SIGKILL: a training saves a checkpoint
_POLL_S = 0.5
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


class RayJobs:
    """The jobs of one cluster, through the HTTP server of its head (the dashboard)."""

    def __init__(self, address: str):
        """Connects.

        Args:
            address: `http://HOST:PORT`, where the cluster takes jobs; or HOST:PORT of its head, or `auto`, which says
                where that is.

        Raises:
            ConfigError: it is not such an address, or holds a user or password.
            MachineError: no answer, or a wrong token.
        """
        check_no_credentials(address, "--address")
        self.address = address
        if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        with self._errors_explained():
            self.address = address = jobs_url(address)
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would prefer these
            os.environ.pop(name, None)
        with self._errors_explained():
            probe(address)
            from ray.job_submission import JobSubmissionClient

            for name in _CHATTY:
                logging.getLogger(name).setLevel(logging.WARNING)
            self.client = JobSubmissionClient(address)

    def submit(self, workflow: str, config: Config, out: str, options: Sequence[str], *, with_code: bool) -> str:
        """Starts `pipeline run WORKFLOW` on the cluster; returns the job's id.

        Args:
            out: the run folder, under a path or URL that every node can access.
            options: further options of `pipeline run`.
            with_code: ship this installation's code, instead of using the code on the nodes.
        """
        words = ["python", "-m", "pipeline", "run", workflow, "-c", _CONFIG_FILE, "--out", out]
        words += ["--executor", "ray", "--address", "auto", *options]
        with temporary_folder() as folder, self._errors_explained():
            (folder / _CONFIG_FILE).write_text(dump_yaml(config), encoding="utf-8")
            if with_code:
                pack_code(folder)
            return self.client.submit_job(
                entrypoint=f"exec {shlex.join(words)}",
                runtime_env={
                    "working_dir": str(folder),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)},
                },
                metadata={"workflow": workflow, "out": out},
            )

    def follow(self, job: str, show: Callable[[str], None]) -> dict[str, object]:
        """Hands the job's output to `show` as it comes; returns its status at the end."""
        shown = 0
        while True:
            status = self.status(job)
            try:
                shown = asyncio.run(self._tail(job, shown, show))
            except (RuntimeError, OSError) as error:  # the connection was lost; the job is not
                logging.getLogger(__name__).debug("%s: %s", job, error)
            if status["exit_code"] is not None:
                with self._errors_explained():
                    show(self.client.get_job_logs(job)[shown:])
                return status
            time.sleep(_POLL_S)

    async def _tail(self, job: str, shown: int, show: Callable[[str], None]) -> int:
        """Shows what comes after the first `shown` characters, until the end; returns their new number."""
        position = 0
        async for text in self.client.tail_job_logs(job):
            show(text[max(0, shown - position) :])
            position += len(text)
        return max(position, shown)

    def status(self, job: str) -> dict[str, object]:
        """What is known of a job: `status` as Ray says, `exit_code` of the run once it has ended, its last words."""
        with self._errors_explained():
            details = self.client.get_job_info(job)
            words = self.client.get_job_logs(job).splitlines()
        if details.driver_exit_code is None and details.message and details.status.is_terminal():
            words = [first_line(RuntimeError(details.message))]  # it never started, or was stopped
        return {
            "job": job,
            "status": str(details.status.value),
            "exit_code": _exit_code(details),
            "workflow": (details.metadata or {}).get("workflow"),
            "out": (details.metadata or {}).get("out"),
            "last_line": next((line for line in reversed(words) if line.strip()), ""),
        }

    def stop(self, job: str) -> dict[str, object]:
        """Stops the job with SIGTERM, waits for its end, and returns its status."""
        with self._errors_explained():
            self.client.stop_job(job)
        while True:
            status = self.status(job)
            if status["exit_code"] is not None:
                return status
            time.sleep(_POLL_S)

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        """Turns Ray's exceptions into errors with a remedy."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            reason = first_line(error)
            if "does not exist" in reason:
                raise ConfigError(f"--address {self.address}: {reason.partition(': ')[2] or reason}") from error
            raise MachineError(
                f"--address {self.address}: {reason}; check the address, and that RAY_AUTH_MODE and "
                "RAY_AUTH_TOKEN_PATH match the cluster"
            ) from error
        except Exception as error:
            if type(error).__name__ != "AuthenticationError":
                raise
            raise MachineError(
                f"--address {self.address}: {first_line(error)}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a "
                "file with the cluster's token"
            ) from error


def check_shared(out: str) -> None:
    """Refuses a run folder that other machines cannot access.

    Raises:
        ConfigError: `out` is a relative path.
    """
    if "://" not in out and not PurePosixPath(out).is_absolute():
        raise ConfigError(
            f"--out {out}: every node must access it; give a URL, or an absolute path that all nodes share"
        )


def _exit_code(details: Any) -> int | None:
    """The exit code of the run; None while it is running."""
    if not details.status.is_terminal():
        return None
    if details.status.value == "SUCCEEDED":
        return EXIT_OK
    if details.status.value == "STOPPED":
        return EXIT_PREEMPTED
    if details.driver_exit_code is None:  # it never started: a missing package, no node
        return MachineError.exit_code
    return details.driver_exit_code if details.driver_exit_code > 0 else EXIT_FAILED


def pack_code(folder: Path) -> None:
    """Copies the packages of the workflows and commands, with the metadata of their entry points."""
    found = [entry for group in _ENTRY_POINTS for entry in entry_points(group=group)]
    for package in sorted({"pipeline", *(entry.module.partition(".")[0] for entry in found)}):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(Path(spec.origin).parent, folder / package, ignore=ignored)
    info = folder / f"{_DISTRIBUTION.replace('-', '_')}-{version(_DISTRIBUTION)}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {_DISTRIBUTION}\nVersion: {version(_DISTRIBUTION)}\n"
    )
    sections = [
        "\n".join([f"[{group}]", *(f"{entry.name} = {entry.value}" for entry in found if entry.group == group)])
        for group in _ENTRY_POINTS
    ]
    (info / "entry_points.txt").write_text("\n\n".join(sections) + "\n")
