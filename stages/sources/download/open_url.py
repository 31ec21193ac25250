"""Opens a URL as urllib does, within limits of time, rate, bytes, redirects and addresses.

Every connection is made in `FetchAttempt.connect`, and every byte received comes through `_Wire`, also the bytes of
redirects and proxies. So it does not matter what a server claims or leaves out.
"""

import http.client
import io
import re
import socket
import ssl
import sys
import time
import urllib.request
from collections.abc import Mapping
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import cache, partial
from http import HTTPStatus
from ipaddress import ip_address
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from stages.sources.download.addresses import is_public
from stages.sources.download.config import DownloadConfig
from stages.sources.download.uri import HAS_LOGIN

Endpoint = tuple[str, int]
"""IP address, port."""


class Refused(Exception):
    """A limit was reached. The message starts with the reason of the drop and a colon."""


def make_opener() -> urllib.request.OpenerDirector:
    """Opens http and https for visits, with the proxies that the environment names now."""
    proxies = {scheme: proxy for scheme, proxy in urllib.request.getproxies().items() if scheme in ("http", "https")}
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(proxies),
        _HttpHandler(),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


class FetchAttempt:
    """One download; the clock starts when it is made.

    Args:
        opener: from `make_opener`; visits may share it, also at the same time.
        own: an address of this program itself, allowed though it be private.
        spent_s: seconds of `deadline_s` that earlier attempts took.
    """

    def __init__(
        self,
        config: DownloadConfig,
        opener: urllib.request.OpenerDirector,
        own: Endpoint | None = None,
        spent_s: float = 0.0,
    ):
        self.config = config
        self.opener = opener
        self.own = own
        self.redirects = 0
        self.opened = False
        """Whether `open` was called."""
        self.retry_after_s = 0.0
        """The pause that a 429 or 503 requested."""
        self.received = 0
        """Bytes so far."""
        self._started = time.monotonic()
        self._ends = self._started + config.deadline_s - spent_s
        self._measured: tuple[float, int] | None = None
        """Since when the rate of the present connection is measured, and the bytes received until then."""

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def open(self, request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
        """In the place of `urllib.request.urlopen`."""
        self.opened = True
        vars(request)["visit"] = self  # redirects take it along
        try:
            return self.opener.open(request, timeout=timeout)
        except HTTPError as error:
            if error.code in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
                self.retry_after_s = retry_after_s(error.headers, time.time())
            error.close()
            raise
        except http.client.HTTPException as error:
            if isinstance(error, http.client.InvalidURL | http.client.IncompleteRead | ConnectionError):
                raise
            raise Refused(f"invalid_response: {type(error).__name__}: {error}") from error

    def connect(self, host: str, port: int, *, proxy: bool) -> socket.socket:
        """Connects to the first allowed address of a host that answers; each is checked after the one lookup.

        Raises:
            Refused: no address is allowed.
            OSError: none answered.
        """
        ends = time.monotonic() + self.wait_s()
        failure: Exception | None = None
        allowed = []
        for found in _look_up(host, port, self.wait_s()):
            address = found[4]
            if proxy or self._is_allowed(str(address[0]), int(address[1])):
                allowed.append(found)
            else:
                failure = failure or Refused(f"forbidden_address: {host} is at {address[0]}")
        for number, (family, kind, protocol, _, address) in enumerate(allowed):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(max(_LEAST_WAIT_S, (ends - time.monotonic()) / (len(allowed) - number)))
                sock.connect(address)
                sock.settimeout(self.wait_s())  # for the TLS handshake
                self._measured = None
                return sock
            except OSError as error:
                sock.close()
                failure = error
        raise failure or OSError(f"No address for {host}")

    def check_written(self, url: str) -> None:
        """Checks the address written into a URL that a proxy will fetch; a name is looked up by the proxy.

        Raises:
            Refused: it is not allowed.
        """
        host = urlsplit(url).hostname or ""
        try:
            address = str(ip_address(host))
        except ValueError:
            return
        if not (self.config.allow_private_addresses or is_public(address)):
            raise Refused(f"forbidden_address: {host}")

    def _is_allowed(self, address: str, port: int) -> bool:
        return self.config.allow_private_addresses or (address, port) == self.own or is_public(address)

    def wait_s(self) -> float:
        """How long to wait for the next bytes.

        Raises:
            TimeoutError: the deadline has passed.
        """
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"timed out after {self.config.deadline_s:g} s in all")
        return min(self.config.timeout_s, left_s)

    def count_bytes(self, received: int) -> None:
        """Counts what came over the present connection, and measures its rate from the first byte on.

        Raises:
            Refused: more than `max_bytes` in all.
            TimeoutError: slower than `min_bytes_per_s` over `timeout_s`.
        """
        self.received += received
        if self.received > self.config.max_bytes:
            raise self.too_large()
        now = time.monotonic()
        since, before = self._measured or (now, self.received - received)
        seconds = now - since
        if received and seconds >= self.config.timeout_s:
            if self.received - before < self.config.min_bytes_per_s * seconds:
                raise TimeoutError(f"timed out: {self.received - before} bytes in {seconds:.0f} s")
            since, before = now, self.received
        self._measured = since, before

    def count_redirect(self) -> None:
        self.redirects += 1
        if self.redirects > self.config.max_redirects:
            raise Refused(f"too_many_redirects: more than {self.config.max_redirects}")

    def too_large(self) -> Refused:
        return Refused(f"too_large: more than {self.config.max_bytes} bytes")


def retry_after_s(headers: Message | Mapping[str, str], now: float) -> float:
    """Seconds that Retry-After asks for (RFC 9110, 10.2.3: seconds or a date); 0 where it says nothing one can read.

    Args:
        now: seconds since 1970.
    """
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return 0.0


_LEAST_WAIT_S = 0.001  # a socket that waits for 0 s does not wait at all


def _look_up(host: str, port: int, wait_s: float) -> list[Any]:
    """What `socket.getaddrinfo` says; the thread that asks is left behind if the resolver takes longer.

    Raises:
        TimeoutError: no answer in time.
        OSError: there is no such name.
    """
    answers: SimpleQueue[list[Any] | BaseException] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            answers.put(error)

    Thread(target=ask, daemon=True, name="look-up").start()
    try:
        answer = answers.get(timeout=wait_s)
    except Empty:
        raise TimeoutError(f"timed out while {host} was looked up") from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


@cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


class _Wire(io.RawIOBase):
    """The bytes of a socket, in time and counted."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, visit: FetchAttempt):
        self._socket = sock
        self._raw = raw
        self._visit = visit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._visit.wait_s())
        received = self._raw.readinto(buffer)
        self._visit.count_bytes(received or 0)
        return received

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Reader(io.BufferedReader):
    """Refuses a claimed size before it is allocated."""

    def __init__(self, wire: _Wire, visit: FetchAttempt):
        super().__init__(wire)
        self._visit = visit

    def read(self, size: int | None = -1, /) -> bytes:
        if (size or 0) > self._visit.config.max_bytes:
            raise self._visit.too_large()
        return super().read(size)


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, visit: FetchAttempt, **options: Any):
        super().__init__(sock, *arguments, **options)
        self.fp: Any = _Reader(_Wire(sock, self.fp.detach(), visit), visit)


class _Http(http.client.HTTPConnection):
    visit: FetchAttempt
    to_proxy: bool

    def connect(self) -> None:
        self.sock = self.visit.connect(self.host, self.port, proxy=self.to_proxy)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tunnel_host:  # type: ignore[attr-defined]
            self._tunnel()  # type: ignore[attr-defined]


class _Https(http.client.HTTPSConnection, _Http):
    """Its connect is that of HTTPSConnection, which wraps what `_Http` connects."""


class _HttpHandler(urllib.request.AbstractHTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(self._connection, _Http, request), request)  # type: ignore[arg-type]

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(self._connection, _Https, request), request, context=_tls())  # type: ignore[arg-type]

    def _connection(self, kind: type[_Http], request: urllib.request.Request, host: str, **options: Any) -> _Http:
        visit: FetchAttempt = vars(request)["visit"]
        if "@" in urlsplit(request.full_url).netloc or "@" in host:  # urllib would look it up as part of the name
            raise Refused(f"invalid_url: {HAS_LOGIN}")
        connection = kind(host, **options)
        connection.visit = visit
        connection.to_proxy = request.has_proxy() or bool(request._tunnel_host)  # type: ignore[attr-defined]
        connection.response_class = partial(_Response, visit=visit)  # type: ignore[assignment]
        if connection.to_proxy:
            visit.check_written(request.full_url)
        return connection

    http_request = urllib.request.AbstractHTTPHandler.do_request_
    https_request = urllib.request.AbstractHTTPHandler.do_request_


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = sys.maxsize  # `FetchAttempt` counts them

    def redirect_request(self, req: urllib.request.Request, *arguments: Any) -> urllib.request.Request | None:
        visit: FetchAttempt = vars(req)["visit"]
        visit.count_redirect()
        further = super().redirect_request(req, *arguments)
        if further is not None:
            vars(further)["visit"] = visit
        return further
