"""A proxy in front of an object store, one for each process, that answers some requests with a fault.

It forwards HTTP to the server, keeps a list of what was asked, and can call a function before or after a request is
passed on: to kill or to stop the process that made it, for example.
"""

import contextlib
import http.client
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import ClassVar

KINDS = (
    "reset",
    "reset after",
    "half",
    "delay",
    "silence",
    "refuse",
    "403",
    "500",
    "500 after",
    "503",
    "503 after",
)
"""`after`: the request is passed on, and its answer is lost. `half`: of the answer. `delay`: a late answer; `silence`:
one that comes after the client has given up. `refuse`: no new connection for a moment either."""

DELAY_S = 0.3
SILENCE_S = 4.5
REFUSE_S = 0.3
CHANGES = ("PUT", "POST", "DELETE")
_CODES = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}
_NOT_PASSED_ON = ("connection", "transfer-encoding", "expect", "content-length", "keep-alive")
_TIMEOUT_S = 120.0


@dataclass
class Request:
    """One request.

    Attributes:
        number: from 0, in the order in which they came.
        path: with the query.
        began: when it came, of time.monotonic.
        fault: one of KINDS, or "".
        passed: when it was passed on, None if it was not.
        status: of the server's answer, None without one.
        answered: when the answer was sent, None without one.
    """

    number: int
    method: str
    path: str
    began: float
    fault: str = ""
    passed: float | None = None
    status: int | None = None
    answered: float | None = None

    @property
    def key(self) -> str:
        """The object, without bucket and query."""
        return self.path.partition("?")[0].lstrip("/").partition("/")[2]

    @property
    def changed(self) -> bool:
        """Whether it changed an object."""
        return self.method in CHANGES and self.status is not None and self.status < 300


Chosen = Callable[[Request], str]
"""The fault of a request, "" for none. It is called once for each, one after another."""
Hook = Callable[[Request], str]
"""Called with a request; returns a fault that it gets now, or ""."""


class Proxy:
    """Forwards to a server on this machine, from a port of its own.

    Attributes:
        requests: all so far.
    """

    def __init__(self, upstream_port: int, chosen: Chosen = lambda request: ""):
        """
        Args:
            chosen: decides which fault a request gets.
        """
        self.requests: list[Request] = []
        self.before: Hook = lambda request: ""
        """Called in the request's thread before it is passed on."""
        self.after: Hook = lambda request: ""
        """Called when it was passed on, before its answer is sent; what it returns is ignored."""
        self._upstream_port, self._chosen = upstream_port, chosen
        self._mutex = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = self._refuses = False
        self._server = self._listen(0)
        self.port = int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Ends it, and the connections that are open."""
        self._closed = True
        self._stop_listening()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def note(self, method: str, path: str) -> Request:
        with self._mutex:
            request = Request(len(self.requests), method, path, time.monotonic())
            self.requests.append(request)
            request.fault = self._chosen(request)
            return request

    def forward(self, request: Request, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The server's answer: status, headers, body."""
        request.passed = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream_port, timeout=_TIMEOUT_S)
        try:
            connection.request(request.method, request.path, body, {**headers, "Content-Length": str(len(body))})
            answer = connection.getresponse()
            data = answer.read()
            request.status = answer.status
            kept = {k: v for k, v in answer.getheaders() if k.lower() not in _NOT_PASSED_ON}
            length = answer.getheader("Content-Length") if request.method == "HEAD" else str(len(data))
            return answer.status, {**kept, "Content-Length": length or "0"}, data
        finally:
            connection.close()

    def refuse(self, seconds: float) -> None:
        """Takes no connection for some seconds, and resets those that are open."""

        def later() -> None:
            self._stop_listening()
            time.sleep(seconds)
            if not self._closed:
                self._server = self._listen(self.port)
            self._refuses = False

        with self._mutex:
            begins, self._refuses = not self._refuses, True
        if begins:
            threading.Thread(target=later, daemon=True).start()

    def connected(self, connection: socket.socket, *, there: bool) -> None:
        with self._mutex:
            (self._open.add if there else self._open.discard)(connection)

    def _listen(self, port: int) -> "_Server":
        server = _Server(("127.0.0.1", port), _Handler)
        server.proxy = self
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def _stop_listening(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        with self._mutex:
            connections = list(self._open)
        for connection in connections:
            reset(connection)


def reset(connection: socket.socket) -> None:
    """Ends a connection with a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    with contextlib.suppress(OSError):
        connection.close()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: Proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has ended, or a connection that was reset here, is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # type: ignore[assignment]
    _faults: ClassVar[dict[str, str]] = {}

    def setup(self) -> None:
        super().setup()
        self.server.proxy.connected(self.connection, there=True)

    def finish(self) -> None:
        self.server.proxy.connected(self.connection, there=False)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _handle(self) -> None:
        proxy = self.server.proxy
        try:
            body = self._body()
        except (ValueError, EOFError):  # it ended in the middle of a request, which a server does not take
            self.close_connection = True
            return
        request = proxy.note(self.command, self.path)
        request.fault = proxy.before(request) or request.fault
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _NOT_PASSED_ON}
        name, _, after = request.fault.partition(" ")
        passes = after or name in ("", "half", "delay", "silence")
        answer = proxy.forward(request, headers, body) if passes else None
        if answer is not None:
            proxy.after(request)
        if name == "delay":
            time.sleep(DELAY_S)
        elif name == "silence":
            time.sleep(SILENCE_S)
        if name == "refuse":
            proxy.refuse(REFUSE_S)
        if name in _CODES:
            self._send(int(name), {"Content-Type": "application/xml"}, error_body(_CODES[name]))
        elif answer is None or name == "reset" or (name == "half" and not answer[2]):
            self._reset()
            return
        else:
            self._send(*answer, half=name == "half")
        request.answered = time.monotonic()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self._exactly(int(self.headers.get("Content-Length") or 0))
        parts: list[bytes] = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self._exactly(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, half: bool = False) -> None:
        self.send_response_only(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        self.wfile.flush()
        if half:
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        reset(self.connection)


def error_body(code: str) -> bytes:
    """What S3 answers with an error."""
    text = f"<Error><Code>{code}</Code><Message>a fault of the proxy</Message><RequestId>0</RequestId></Error>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
