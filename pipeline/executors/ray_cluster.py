"""The Ray cluster: joins or starts one, and reads the resources of its nodes."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipeline.errors import MachineError, PipelineError, first_line
from pipeline.executors.base import usable_cpus
from pipeline.executors.process import WAITING_THREADS
from pipeline.executors.ray_address import (
    AUTO,
    ask_head,
    check_joinable,
    is_connected,
    named,
    running_address,
    unused_address,
)

log = logging.getLogger(__name__)

Demand = Mapping[str, float]
"""Ray resources that a task or worker occupies: CPU, GPU and custom ones."""

_PROBE_TIMEOUT_S = 10.0
_connections: list[str | None] = []
"""The address of the Ray that `connect` joined or, None, started in this process; empty if it did neither."""
_OBJECT_STORE_BYTES = 256 * 2**20  # data travels through files; the object store only carries descriptors


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A living node of the cluster."""

    id: str
    resources: Demand
    host: str = ""
    address: str = ""

    def room(self, demand: Demand) -> int:
        """Workers of this demand that fit on the empty node; a worker's fraction of a GPU is on one GPU."""
        return min(_times(name, self.resources.get(name, 0.0), amount) for name, amount in demand.items())


def _times(name: str, available: float, amount: float) -> int:
    if name == "GPU" and amount < 1:
        return int(available) * int(1 / amount + 1e-9)
    return int(available / amount + 1e-9)


def living_nodes() -> list[ClusterNode]:
    """The nodes of the cluster that are alive now."""
    import ray

    return [
        ClusterNode(node["NodeID"], node["Resources"], node["NodeManagerHostname"], node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def total(nodes: Iterable[ClusterNode], name: str) -> float:
    """Amount of a resource on all nodes together."""
    return sum(node.resources.get(name, 0.0) for node in nodes)


def describe(demand: Demand) -> str:
    """`CPU 1, GPU 0.5`"""
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(demand.items()))


def connect(num_cpus: int | None, address: str | None) -> list[ClusterNode]:
    """Joins or starts Ray; returns its nodes. A Ray that this process is connected to already is used as it is.

    A Ray started here listens on the loopback interface only, asks no other machine for anything, has no dashboard,
    and keeps Ray's default: token authentication on every gRPC port.

    Args:
        num_cpus: of a Ray that is started here.
        address: HOST:PORT of the head, or `auto`: the cluster of which this machine is a node. None: starts one.

    Raises:
        ConfigError: it is no such address.
        MachineError: the cluster cannot be reached, or Ray not be started.
    """
    if address is not None and is_connected():
        return living_nodes()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_enable_metrics_collection", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default Ray ends workers that are idle for a second, and their successors load all packages again.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "86400000")
    if address is None:
        for name, value in WAITING_THREADS.items():
            os.environ.setdefault(name, value)  # which workers then have before they import anything
        # Ray's switch for machines that are no cluster: everything binds 127.0.0.1 instead of all interfaces.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray
    from ray._private import ray_constants

    on_terminate = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ray").setLevel(logging.ERROR)  # or it warns that authentication is on, as it should be
    started = time.perf_counter()
    try:
        if address is None:
            ray_constants.ENABLE_RAY_CLUSTER = False  # somebody may have imported Ray before
            _start_own(num_cpus)
        else:
            address = running_address() if address == AUTO else address
            check_joinable(address)
            ask_head(address)
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except PipelineError:  # a signal
        raise
    except Exception as error:  # Ray raises plain ones too
        raise MachineError(_not_connected(address, first_line(error))) from error
    _connections.append(address)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init put its own handler there
    nodes = living_nodes()
    log.debug("Ray is up after %.1f s: %s", time.perf_counter() - started, nodes)
    return nodes


def _start_own(num_cpus: int | None) -> None:
    """Starts a Ray on this machine, and says so if there is one that could have been joined."""
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    if (unused := unused_address()) is not None:
        log.warning("a Ray runs on this machine and is not used (%s): --address auto joins it", unused)
    with without_needless_processes():
        ray.init(
            address="local",
            num_cpus=num_cpus or usable_cpus(),
            include_dashboard=False,
            dashboard_host="127.0.0.1",
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )


def leave() -> None:
    """Leaves the Ray that `connect` joined or started; one to which this process was connected before it stays."""
    import ray

    if _connections:
        _connections.clear()
        ray.shutdown()


@contextmanager
def without_needless_processes() -> Iterator[None]:
    """Lets Ray start neither its API server in the block, as if that had failed, which Ray goes on after, nor its
    autoscaler and its reader of logs, which are two more interpreters and have nothing to do on one machine.

    Without a dashboard the API server has one module, UsageStatsHead. This asks 169.254.169.254 and
    metadata.google.internal for the cloud that it is in, also where usage statistics are off; no setting of Ray 2.60
    stops that.
    """
    from ray._private import services
    from ray._private.node import Node

    starts = ((services, "start_api_server"), (Node, "start_monitor"), (Node, "start_log_monitor"))
    found = [getattr(owner, name) for owner, name in starts]
    for owner, name in starts:
        setattr(owner, name, lambda *_, **__: (None, None))
    try:
        yield
    finally:
        for (owner, name), start in zip(starts, found, strict=True):
            setattr(owner, name, start)


def _not_connected(address: str | None, why: str) -> str:
    """The message of a cluster that cannot be reached, or of a local Ray that cannot be started."""
    if address:
        why = why.partition(". Note: ")[0]  # of a wrong token, with a paragraph of advice
        return (
            f"{named(address)}: cannot be reached ({why}); check the address and the token (RAY_AUTH_MODE, "
            "RAY_AUTH_TOKEN_PATH), or use --executor local"
        )
    if "path length" in why:
        return (
            f"the folder for temporary files is too long a path for Ray ({why}); set RAY_TMPDIR to a short one, such "
            "as /tmp, or use --executor local"
        )
    return f"a local Ray: cannot be started ({why}); use --executor local"


def probe(address: str) -> None:
    """Refuses an address where nobody listens; Ray itself would try for minutes.

    Raises:
        OSError: no connection.
        ValueError: it is no address.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=_PROBE_TIMEOUT_S).close()
