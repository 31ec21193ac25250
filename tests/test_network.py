"""The audit hook of tests/network.py refuses what would leave this machine, before anything is sent."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.network import OutsideAccessError, is_loopback, refused

DOCUMENTATION_ADDRESS = "192.0.2.1"
"""TEST-NET-1 (RFC 5737): belongs to nobody."""


@pytest.fixture(autouse=True)
def _expected() -> Iterator[None]:
    yield
    refused()


def open_socket(kind: int = socket.SOCK_STREAM) -> socket.socket:
    return socket.socket(socket.AF_INET, kind)


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("socket.connect", (None, (DOCUMENTATION_ADDRESS, 80))),
        ("socket.connect", (None, ("2001:db8::1", 80, 0, 0))),
        ("socket.sendto", (None, (DOCUMENTATION_ADDRESS, 80))),
        ("socket.sendmsg", (None, (DOCUMENTATION_ADDRESS, 80))),
        ("socket.bind", (None, (DOCUMENTATION_ADDRESS, 80))),
        ("socket.bind", (None, ("0.0.0.0", 0))),
        ("socket.bind", (None, ("", 0))),
        ("socket.bind", (None, ("::", 0, 0, 0))),
        ("socket.connect", (None, ("0.0.0.0", 80))),
        ("socket.getaddrinfo", ("example.org", 443, 0, 1, 0)),
        ("socket.getaddrinfo", (b"example.org", 443, 0, 1, 0)),
        ("socket.gethostbyname", ("example.org",)),
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
        lambda: open_socket().bind(("", 0)),
        lambda: socket.getaddrinfo("example.org", 443),
        lambda: socket.gethostbyname("example.org"),
    ],
    ids=["create_connection", "connect", "connect_ex", "sendto", "bind", "getaddrinfo", "gethostbyname"],
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


@pytest.mark.parametrize("name", ["example.invalid", "host.test", b"a.b.example", socket.gethostname()])
def test_invented_names_are_resolved_to_nothing(name: str) -> None:
    for look_up in (lambda: socket.getaddrinfo(name, 80), lambda: socket.gethostbyname(name)):
        with pytest.raises(socket.gaierror, match="not known"):
            look_up()
    assert refused() == []


def test_processes_that_tests_start_are_refused_too_and_the_test_learns_of_it() -> None:
    attempt = f"socket.create_connection(({DOCUMENTATION_ADDRESS!r}, 80), 1)"
    code = f"import socket\ntry: {attempt}\nexcept Exception as error: print(error)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert "which is not this machine" in done.stdout
    (line,) = refused()
    assert "test_processes_that_tests_start" in line
    assert f"socket.connect of '{DOCUMENTATION_ADDRESS}'" in line
    assert refused() == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "127.1", "0x7f000001", "::1", "::ffff:127.0.0.1", b"localhost"]
)
def test_loopback_hosts_are_told(host: object) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "192.0.2.1",
        "10.0.0.1",
        "2001:db8::1",
        "::ffff:192.0.2.1",
        "0.0.0.0",
        "::",
        "",
        None,
        "example.invalid",
        "localhost.org",
    ],
)
def test_other_hosts_are_told(host: object) -> None:
    assert not is_loopback(host)
    assert not is_loopback(socket.gethostname())
