"""A Ray cluster of several nodes on this machine, on the loopback interface, with token authentication."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.network import guarded
from tests.processes import descendants

REPOSITORY = Path(__file__).resolve().parents[3]

_RAY_START = """
from ray._private import ray_constants, services
ray_constants.ENABLE_RAY_CLUSTER = True  # or `ray start` joins no cluster on the loopback interface
services.resolve_ip_for_localhost = lambda host: host
from ray.scripts.scripts import main
main()
"""


@dataclass
class RayNodes:
    """Nodes started by `ray start`, each with all its processes below one of ours."""

    folder: Path
    ray_folder: Path
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    address: str = ""
    dashboard: str = ""

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are to know the cluster's token, and stay on the loopback interface."""
        return {
            **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",  # or a head reports that they are off
            "HOME": str(self.folder),  # with a file, without which a head asks which cloud it is in
            **guarded(REPOSITORY),
            "RAY_enable_metrics_collection": "false",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_initial_delay_ms": "500",
        }

    def start(self, name: str, *options: str, folder: Path | None = None, packages: Path | None = None) -> None:
        """Starts a node and waits until it is up; the first one is the head.

        Args:
            folder: the current folder of all its processes; default that of the cluster.
            packages: a folder in which its processes look for packages first.
        """
        where = (
            [f"--address={self.address}"]
            if self.nodes
            else ["--head", "--port=0", f"--temp-dir={self.ray_folder}", "--dashboard-port=0"]
        )
        arguments = ["start", "--block", "--node-ip-address=127.0.0.1", "--dashboard-agent-listen-port=0"]
        log = self.folder / f"{name}.log"
        environment = self.environment
        if packages is not None:
            environment["PYTHONPATH"] = f"{packages}:{environment['PYTHONPATH']}"
        with log.open("wb") as output:
            self.nodes[name] = subprocess.Popen(
                [sys.executable, "-c", _RAY_START, *arguments, "--object-store-memory=80000000", *where, *options],
                env=environment,
                cwd=folder or self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 180
        has_dashboard = not self.address and "--include-dashboard=false" not in options
        last = "view the dashboard at" if has_dashboard else "Ray runtime started"
        while last not in log.read_text():
            assert self.nodes[name].poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        if not self.address:
            self.address = (self.ray_folder / "ray_current_cluster").read_text().strip()
        if has_dashboard:
            lines = [line for line in log.read_text().splitlines() if "RAY_API_SERVER_ADDRESS" in line]
            self.dashboard = lines[0].split("RAY_API_SERVER_ADDRESS='")[1].split("'")[0]

    def kill(self, name: str) -> None:
        """SIGKILL to every process of the node, as if its plug were pulled."""
        process = self.nodes.pop(name)
        for pid in [process.pid, *descendants(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


@contextmanager
def ray_nodes(folder: Path) -> Iterator[RayNodes]:
    """A cluster without nodes; all that are started in it are killed at the end.

    Ray's sockets lie in a folder of their own: their paths are limited to 107 bytes, pytest's folders are long.
    """
    folder.mkdir()
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "ray_bootstrap_config.yaml").write_text("{}\n")
    with TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as ray_folder:
        cluster = RayNodes(folder, Path(ray_folder))
        try:
            yield cluster
        finally:
            for name in list(cluster.nodes):
                cluster.kill(name)


def open_ports(pids: set[int]) -> set[str]:
    """Addresses other than the loopback ones on which these processes listen, as /proc tells."""
    inodes = {
        os.readlink(link).removeprefix("socket:[").removesuffix("]")
        for pid in pids
        for link in _links(Path("/proc") / str(pid) / "fd")
    }
    local = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in inodes and address.partition(":")[0] not in local:
                found.add(address)
    return found


def _links(folder: Path) -> list[Path]:
    try:
        return [link for link in folder.iterdir() if os.readlink(link).startswith("socket:")]
    except (FileNotFoundError, ProcessLookupError):
        return []
