"""An audit hook that refuses connections and look-ups that would leave this machine.

It sees all sockets that Python opens in this process; subprocesses and native libraries are not covered.
"""

import ipaddress
import os
import socket
import sys
from functools import cache
from typing import Any


class OutsideAccessError(RuntimeError):
    """A test tried to reach something other than this machine."""


_SENDS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
_LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname"}
_REVERSE_LOOKUPS = {"socket.gethostbyaddr", "socket.getnameinfo"}
_EVENTS = _SENDS | _LOOKUPS | _REVERSE_LOOKUPS


def forbid_outside_access() -> None:
    """Installs the hook. Python has no way to remove one, so call it once per process."""
    sys.addaudithook(_check)


def _check(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _EVENTS:
        return
    host = arguments[1] if event in _SENDS else arguments[0]
    if event in _SENDS and not isinstance(host, tuple):  # the path of a Unix socket, or a socket already connected
        return
    if isinstance(host, tuple):
        host = host[0]
    is_literal = event in _LOOKUPS and _address(_text(host)) is not None  # an address in figures is not looked up
    if not is_literal and not is_this_machine(host):
        test = os.environ.get("PYTEST_CURRENT_TEST", "outside of any test")
        raise OutsideAccessError(f"{test}: {event} of {host!r}, which is not this machine; tests use 127.0.0.1 only")


def is_this_machine(host: object) -> bool:
    """Whether a host given to a socket function is the loopback interface, or a name or address of this machine."""
    name = _text(host)
    if not name:  # the wildcard address of a listening socket
        return True
    address = _address(name)
    if address is None:
        return name == "localhost" or name.endswith(".localhost") or name in _own_names()
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped.is_loopback or mapped.is_unspecified or str(mapped) in _own_addresses()


def _text(host: object) -> str:
    text = bytes(host).decode("ascii", "replace") if isinstance(host, bytes | bytearray) else str(host or "")
    return text.lower().rstrip(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host spells, also in the old forms (127.1, 0x7f000001); None for a name."""
    try:
        return ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(name))
    except (OSError, UnicodeError):
        return None


@cache
def _own_names() -> frozenset[str]:
    name = socket.gethostname().lower()
    return frozenset({name, name.partition(".")[0]})


@cache
def _own_addresses() -> frozenset[str]:
    """Addresses of this machine as its own hosts file and its routing table in /proc list them; no look-up."""
    hosts = [line.split() for line in _lines("/etc/hosts")]
    found = {address for address, *names in filter(None, hosts) if _own_names() & {*names}}
    local, last = set(), ""
    for line in _lines("/proc/net/fib_trie"):
        words = line.split()
        if words[:1] == ["|--"]:
            last = words[1]
        elif words[:3] == ["/32", "host", "LOCAL"]:
            local.add(last)
    return frozenset(found | local)


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return [line.partition("#")[0] for line in file]
    except OSError:
        return []
