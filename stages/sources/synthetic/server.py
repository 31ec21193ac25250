"""Serves drawn scenes over HTTP on this machine, as a stand-in for the web servers behind a caption list."""

import logging
import re
import socket
import sys
from collections.abc import Collection
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Lock, Thread, current_thread
from typing import Any, Literal

from stages.sources.synthetic.scenes import Scene, Split, encode_image, scene
from stages.sources.synthetic.words import encode_word, word_scene

log = logging.getLogger(__name__)

_PATH = re.compile(r"/scenes/([0-9]{9})\.png")


class SceneServer:
    """Context manager: serves `/scenes/{index:09d}.png` on 127.0.0.1, at a free port.

    An image is drawn when it is requested, so the number of samples costs no memory. Indices in
    `dead_indices`, like every other path, give 404.
    """

    def __init__(
        self,
        seed: int,
        num_samples: int,
        dead_indices: Collection[int] = (),
        split: Split = "train",
        kind: Literal["shapes", "words"] = "shapes",
    ):
        if not 0 <= num_samples <= 10**9:
            raise ValueError(f"num_samples must be in 0..10**9 (got {num_samples})")
        self.seed = seed
        self.num_samples = num_samples
        self.dead_indices = frozenset(dead_indices)
        self.split: Split = split
        self.kind = kind
        self._http: _HttpServer | None = None
        self._acceptor: Thread | None = None

    def __enter__(self) -> "SceneServer":
        self._http = _HttpServer(self)
        # A short poll, since shutdown() waits for it.
        self._acceptor = Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._http and self._acceptor:
            self._http.shutdown()
            self._acceptor.join()
            self._http.server_close()
            self._http.close_connections()
        self._http = self._acceptor = None

    def scene(self, index: int) -> Scene:
        """Give the scene of shapes behind `url(index)`, captions included."""
        return scene(self.seed, index, self.split)

    @property
    def endpoint(self) -> tuple[str, int]:
        """IP address and port; the server must be running."""
        if self._http is None:
            raise RuntimeError("SceneServer has no address yet; use it in a with statement")
        return "127.0.0.1", self._http.server_port

    def url(self, index: int) -> str:
        """Address of a scene; the server must be running."""
        host, port = self.endpoint
        return f"http://{host}:{port}/scenes/{index:09d}.png"

    def image(self, index: int) -> bytes | None:
        """Draw the PNG file behind `url(index)`; None where the server answers 404."""
        if index >= self.num_samples or index in self.dead_indices:
            return None
        if self.kind == "words":
            return encode_word(word_scene(self.seed, index, self.split))
        return encode_image(self.scene(index))


class _HttpServer(ThreadingHTTPServer):
    """Knows its open connections, so that closing it ends the ones that clients keep alive."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, scenes: SceneServer):
        self.scenes = scenes
        self._connections: dict[Thread, socket.socket] = {}
        self._lock = Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        # HTTPServer.server_bind looks the host name up, which can be slow.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.socket.getsockname()[1]

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._connections.pop(current_thread(), None)

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        with self._lock:
            self._connections[thread] = request
        thread.start()

    def close_connections(self) -> None:
        with self._lock:
            connections = list(self._connections.items())
        for thread, request in connections:
            with suppress(OSError):  # closed already
                request.shutdown(socket.SHUT_RDWR)
            thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):  # a client that left is no error
            log.error("request from %s failed", client_address, exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds a kept-alive connection may idle
    wbufsize = -1  # header and body in one packet
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        match = _PATH.fullmatch(self.path)
        body = self.server.scenes.image(int(match[1])) if match else None
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet: the client reports what it could not download."""
