"""The audit hook of tests/network.py refuses what would leave this machine, before anything is sent."""

import socket
import sys
from collections.abc import Callable

import pytest

from tests.network import OutsideAccessError, is_this_machine

DOCUMENTATION_ADDRESS = "192.0.2.1"
"""TEST-NET-1 (RFC 5737): belongs to nobody."""


def open_socket(kind: int = socket.SOCK_STREAM) -> socket.socket:
    return socket.socket(socket.AF_INET, kind)


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("socket.connect", (None, (DOCUMENTATION_ADDRESS, 80))),
        ("socket.connect", (None, ("2001:db8::1", 80, 0, 0))),
        ("socket.sendto", (None, (DOCUMENTATION_ADDRESS, 80))),
        ("socket.sendmsg", (None, (DOCUMENTATION_ADDRESS, 80))),
        ("socket.getaddrinfo", ("example.invalid", 443, 0, 1, 0)),
        ("socket.getaddrinfo", (b"example.invalid", 443, 0, 1, 0)),
        ("socket.gethostbyname", ("example.invalid",)),
        ("socket.gethostbyaddr", (DOCUMENTATION_ADDRESS,)),
        ("socket.getnameinfo", ((DOCUMENTATION_ADDRESS, 80),)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_audit_events_that_name_another_machine_are_refused(
    event: str, arguments: tuple[object, ...], request: pytest.FixtureRequest
) -> None:
    with pytest.raises(OutsideAccessError, match=f"{event} of .*which is not this machine") as caught:
        sys.audit(event, *arguments)
    assert request.node.name.partition("[")[0] in str(caught.value)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: socket.create_connection((DOCUMENTATION_ADDRESS, 80), timeout=1),
        lambda: open_socket().connect((DOCUMENTATION_ADDRESS, 80)),
        lambda: open_socket().connect_ex((DOCUMENTATION_ADDRESS, 80)),
        lambda: open_socket(socket.SOCK_DGRAM).sendto(b"", (DOCUMENTATION_ADDRESS, 80)),
        lambda: socket.getaddrinfo("example.invalid", 443),
        lambda: socket.gethostbyname("example.invalid"),
    ],
    ids=["create_connection", "connect", "connect_ex", "sendto", "getaddrinfo", "gethostbyname"],
)
def test_socket_calls_are_refused_before_a_packet_is_sent(attempt: Callable[[], object]) -> None:
    with pytest.raises(OutsideAccessError):
        sys.audit("socket.connect", None, (DOCUMENTATION_ADDRESS, 80))  # without the hook the test ends here
    with pytest.raises(OutsideAccessError):
        attempt()


def test_loopback_connections_and_unix_sockets_are_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for host in ("127.0.0.1", "localhost"):
            with socket.create_connection((host, server.getsockname()[1]), timeout=5):
                pass
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        one.sendall(b"x")
        assert other.recv(1) == b"x"
    sys.audit("socket.connect", None, "/run/a.sock")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "0x7f000001", "::1", "::ffff:127.0.0.1", "0.0.0.0", "", None, b"localhost"]
)
def test_loopback_and_wildcard_hosts_are_this_machine(host: object) -> None:
    assert is_this_machine(host)
    assert is_this_machine(socket.gethostname())


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "10.0.0.1", "2001:db8::1", "::ffff:192.0.2.1", "example.invalid", "localhost.org"]
)
def test_other_hosts_are_not_this_machine(host: str) -> None:
    assert not is_this_machine(host)
