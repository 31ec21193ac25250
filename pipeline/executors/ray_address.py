"""Which Ray is meant: one that was named, or the one that this process was started in. No port is ever assumed."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import ConfigError, MachineError, first_line

AUTO = "auto"
_VARIABLE = "RAY_ADDRESS"
_SYMMETRIC = "symmetric-run"
_HTTP_TIMEOUT_S = 5.0
_HEAD_TIMEOUT_S = 10.0


def meant_address(address: str | None) -> str | None:
    """The address of the Ray cluster that a run joins; None if it starts a Ray of its own.

    An address that was given counts. Without one, or with `auto`: RAY_ADDRESS, which Ray jobs and KubeRay set; that of
    the `ray symmetric-run` above this process; that of the Ray to which this process is connected, as in a notebook.
    """
    meant = address
    if meant in (None, AUTO):
        meant = os.environ.get(_VARIABLE) or symmetric_address(commands_above()) or _connected_address() or meant
    return None if meant == "local" else meant


def named(address: str) -> str:
    """An address as a message calls it: after the option, or after the variable that it comes from."""
    return f"{_VARIABLE}={address}" if os.environ.get(_VARIABLE) == address else f"--address {address}"


def symmetric_address(commands: Iterator[Sequence[str]]) -> str | None:
    """The `--address` of the first of these command lines that is a `ray symmetric-run`; None if none is."""
    for words in commands:
        own = words[: words.index("--")] if "--" in words else words
        if _SYMMETRIC in own:
            for word, following in zip(own, [*own[1:], ""], strict=True):
                if word == "--address":
                    return following or None
                if word.startswith("--address="):
                    return word.partition("=")[2] or None
    return None


def commands_above() -> Iterator[Sequence[str]]:
    """The command lines of the processes above this one, the nearest first; none where there is no /proc."""
    pid = os.getppid()
    while pid > 0:
        try:
            words = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
            status = (Path("/proc") / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            return
        yield words
        pid = int(status.rpartition(")")[2].split()[1])


def is_connected() -> bool:
    """Whether this process is connected to a Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _connected_address() -> str | None:
    return str(sys.modules["ray"].get_runtime_context().gcs_address) if is_connected() else None


def check_joinable(address: str) -> None:
    """Refuses an address at which a cluster is not joined, which Ray would try for a minute, or for minutes.

    Raises:
        ConfigError: it is a URL, no HOST:PORT, or where the cluster takes jobs.
        OSError: nobody listens there.
    """
    remedy = "give HOST:PORT as `ray start` prints it, or auto; from another machine use `pipeline submit`"
    if "://" in address or not _has_port(address):
        raise ConfigError(f"{named(address)}: a run joins a cluster from one of its machines; {remedy}")
    if _speaks_http(address):
        raise ConfigError(f"{named(address)}: jobs are submitted there, a run joins the head itself; {remedy}")


def unused_address() -> str | None:
    """The address of a cluster of which `ray start` has made this machine a node; None if there is none."""
    from ray._private import services, utils

    latest = utils.read_ray_address()
    return latest if latest and latest in services.find_gcs_addresses() else None


def use_token_of(address: str) -> None:
    """Turns Ray's token authentication on for a cluster of which this machine is a node, if there is a token.

    `ray start` turns it on by itself if it finds one, and a process that joins by an address does not. A cluster
    without tokens ignores it.
    """
    from ray._private import services
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    if address in services.find_gcs_addresses():
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def running_address() -> str:
    """The address of the Ray cluster of which this machine is a node.

    Ray itself takes any if there are several. Of several the one that was joined last by `ray start` is meant.

    Raises:
        MachineError: there is none, or several.
    """
    from ray._private import services, utils

    services.find_gcs_addresses.cache_clear()
    running, latest = services.find_gcs_addresses(), utils.read_ray_address()
    if latest in running:
        return latest
    if len(running) == 1:
        return next(iter(running))
    if running:
        raise MachineError(
            f"--address auto: nodes of several Ray clusters run on this machine ({', '.join(sorted(running))}); give "
            "one of them"
        )
    raise MachineError(
        "--address auto: no Ray runs on this machine; start it (ray start), or give --address HOST:PORT on a machine "
        "of the cluster"
    )


def jobs_url(address: str) -> str:
    """The HTTP address where a cluster takes jobs, of any of its addresses; its head is asked for the port.

    Args:
        address: `http://HOST:PORT`, `HOST:PORT` of the head as `ray start` prints it, or `auto`.

    Raises:
        ConfigError: another kind of address.
        MachineError: the cluster takes no jobs.
        OSError, RuntimeError: no answer.
    """
    if address.startswith(("http://", "https://")):
        return address
    if address != AUTO and not _has_port(address):
        raise ConfigError(
            f"{named(address)}: must be an address of the head: http://HOST:PORT where it takes jobs, or HOST:PORT "
            "as `ray start` prints it"
        )
    if address == AUTO and (meant := meant_address(AUTO)) not in (None, AUTO):
        return jobs_url(str(meant))
    head = running_address() if address == AUTO else address
    return f"http://{head}" if _speaks_http(head) else _jobs_url_of(head)


def _has_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdigit() and "/" not in address


def _speaks_http(address: str) -> bool:
    from http.client import HTTPConnection, HTTPException

    connection = HTTPConnection(address, timeout=_HTTP_TIMEOUT_S)
    connection.connect()
    try:
        connection.request("GET", "/api/version")
        return connection.getresponse().status > 0
    except (HTTPException, OSError):
        return False
    finally:
        connection.close()


def ask_head(address: str) -> str:
    """HOST:PORT where the cluster takes jobs, as its head says; empty if it takes none.

    Raises:
        AuthenticationError (of Ray): it has another token; Ray itself would try for 20 s.
        ConnectionError: no answer.
    """
    from ray._private import ray_constants
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] - has no types
    from ray.exceptions import RpcError

    use_token_of(address)
    try:
        found = GcsClient(address=address).internal_kv_get(
            ray_constants.DASHBOARD_ADDRESS.encode(),
            namespace=ray_constants.KV_NAMESPACE_DASHBOARD,
            timeout=_HEAD_TIMEOUT_S,
        )
    except RpcError as error:
        raise ConnectionError(first_line(error)) from error
    return (found or b"").decode()


def _jobs_url_of(head: str) -> str:
    found = ask_head(head)
    if not found:
        raise MachineError(
            f"{named(head)}: this cluster takes no jobs: it has no dashboard; start its head with "
            f"--include-dashboard=true, or use `pipeline run --address {head}` on one of its machines"
        )
    return f"http://{found}"
