"""An audit hook that refuses connections, binds and look-ups beyond the loopback interface.

It sees all sockets that Python opens, in this process and, through `guard/sitecustomize.py`, in all Python processes
that it starts, Ray's among them. What it refused is written to a file, so that a test fails also where the error was
swallowed or another process had it. Programs that are not Python, such as Ray's raylet, are not covered.
"""

import atexit
import ipaddress
import os
import socket
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any


class OutsideAccessError(RuntimeError):
    """A test tried to reach something other than this machine."""


_PLACES = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"}
_LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname"}
_REVERSE_LOOKUPS = {"socket.gethostbyaddr", "socket.getnameinfo"}
_EVENTS = _PLACES | _LOOKUPS | _REVERSE_LOOKUPS
_INVENTED = ("test", "invalid", "example")
"""Top-level domains that nobody has (RFC 2606). These, and the name of this machine, are resolved to nothing."""
_FILE = "TESTS_REFUSED_FILE"
os.environ["HF_ENDPOINT"] = "https://hub.invalid"  # huggingface_hub reads it when it is imported
_GUARD = str(Path(__file__).resolve().parent / "guard")


def forbid_outside_access() -> None:
    """Installs the hook here and in all processes that are started from here. Python has no way to remove one."""
    handle, os.environ[_FILE] = tempfile.mkstemp(prefix="refused-")
    os.close(handle)
    atexit.register(_remove, os.environ[_FILE], os.getpid())
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", _GUARD)]
    os.environ["PYTHONPATH"] = os.pathsep.join([_GUARD, *paths])
    install()


def _remove(file: str, owner: int) -> None:
    if os.getpid() == owner:
        os.unlink(file)


@cache
def install() -> None:
    """Installs the hook in this process."""
    sys.addaudithook(_check)


def guarded(*paths: object) -> dict[str, str]:
    """Environment of a Python process that is to find packages in these folders, and to be refused as this one is."""
    return {_FILE: os.environ[_FILE], "PYTHONPATH": os.pathsep.join(map(str, (_GUARD, *paths)))}


def refused() -> list[str]:
    """What was refused since the last call, here and in the processes started from here."""
    file = Path(os.environ[_FILE])
    if not file.stat().st_size:
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    os.truncate(file, 0)
    return lines


def _check(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _EVENTS:
        return
    host = arguments[1] if event in _PLACES else arguments[0]
    if event in _PLACES and not isinstance(host, tuple):  # the path of a Unix socket, or a socket already connected
        return
    if isinstance(host, tuple):
        host = host[0]
    name = _text(host)
    if event in _LOOKUPS and (not name or _address(name) is not None):
        return  # an address in figures is not looked up
    if event not in _PLACES and (name.rpartition(".")[2] in _INVENTED or name == socket.gethostname().lower()):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    if not is_loopback(host) and not (event == "socket.bind" and _looks_for_a_port()):
        said = f"{event} of {host!r}, which is not this machine; tests use 127.0.0.1 only"
        test = os.environ.get("PYTEST_CURRENT_TEST", "outside of any test")
        with open(os.environ[_FILE], "a", encoding="utf-8") as file:
            file.write(f"{test}: {said} {sys.orig_argv!r:.300}\n")
        raise OutsideAccessError(f"{test}: {said}")


def _looks_for_a_port() -> bool:
    """Whether Ray calls, which binds a socket to all interfaces, without listening, to find a free port."""
    return sys._getframe(2).f_code.co_filename.endswith("/ray/_common/network_utils.py")


def is_loopback(host: object) -> bool:
    """Whether a host given to a socket function is on the loopback interface, or a name that stands for it."""
    name = _text(host)
    address = _address(name)
    if address is None:
        return name == "localhost" or name.endswith(".localhost")
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


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
