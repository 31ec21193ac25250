"""A loopback HTTP server that answers as badly as the internet does."""

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]
"""Writes the whole response."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, routes: Mapping[str, Answer]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes = routes
        self.requests: Counter[str] = Counter()
        self.agents: list[str] = []
        self.addresses: list[str] = []
        """Of this machine, by which each request came."""
        self.closing = threading.Event()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _Twin(ThreadingHTTPServer):
    """The same server at another address of the loopback interface."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, server: Server, address: str):
        super().__init__((address, server.server_port), Handler)
        self.server = server

    def finish_request(self, request: Any, client_address: Any) -> None:
        Handler(request, client_address, self.server)

    def handle_error(self, request: object, client_address: object) -> None:
        """As `Server`."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        self.server.agents.append(self.headers["User-Agent"])
        self.server.addresses.append(self.connection.getsockname()[0])
        self.server.routes.get(self.path, status(404))(self)

    def log_message(self, format: str, *arguments: object) -> None:
        """Stay quiet."""


@contextmanager
def serve(routes: Mapping[str, Answer], *also: str) -> Iterator[Server]:
    """A server at 127.0.0.1, and at other addresses in 127.0.0.0/8 with the same port."""
    server = Server(routes)
    servers = [server, *(_Twin(server, address) for address in also)]
    threads = [
        threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True) for each in servers
    ]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        for each in servers:
            each.shutdown()
            each.server_close()
        for thread in threads:
            thread.join()


def body(data: bytes, *, claimed: int | None = None, **headers: str) -> Answer:
    """200 with these bytes; `claimed` is a wrong Content-Length, `X_Y` the header X-Y."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data) if claimed is None else claimed))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def status(code: int) -> Answer:
    return lambda handler: handler.send_error(code)


def redirect(target: str) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    return answer


def drip(data: bytes, pause_s: float) -> Answer:
    """200 with these bytes, one after the other."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for byte in data:
            handler.wfile.write(bytes([byte]))
            if handler.server.closing.wait(pause_s):
                return

    return answer


def chunked(chunks: Iterable[bytes], *, claimed: int | None = None) -> Answer:
    """200 in HTTP chunks; `claimed` is a wrong size of each."""

    def answer(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for chunk in chunks:
            handler.wfile.write(f"{claimed or len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    return answer


def silence(handler: Handler) -> None:
    """Accepts, and never says a word."""
    handler.server.closing.wait(30)


def hang_up(handler: Handler) -> None:
    """Closes the connection without an answer."""
    handler.close_connection = True


def first_then(first: Answer, then: Answer) -> Answer:
    """`first` to the first request of a path, `then` to all later ones."""
    return lambda handler: (first if handler.server.requests[handler.path] == 1 else then)(handler)


def closed_port_url() -> str:
    """A URL where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/x.png"
