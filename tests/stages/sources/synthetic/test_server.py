import http.client
import io
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from stages.sources.synthetic.scenes import encode_image, is_held_out, scene
from stages.sources.synthetic.server import SceneServer


def connect(server: SceneServer) -> http.client.HTTPConnection:
    address = urlsplit(server.url(0))
    return http.client.HTTPConnection(str(address.hostname), address.port, timeout=20)


def fetch(connection: http.client.HTTPConnection, path: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection.request("GET", path)
    response = connection.getresponse()
    return response, response.read()


def get(server: SceneServer, path: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = connect(server)
    try:
        return fetch(connection, path)
    finally:
        connection.close()


def test_serves_the_image_of_each_scene():
    with SceneServer(seed=3, num_samples=10) as server:
        assert urlsplit(server.url(7)).path == "/scenes/000000007.png"
        response, body = get(server, "/scenes/000000007.png")
    assert response.status == 200
    assert response.version == 11
    assert response.headers["Content-Type"] == "image/png"
    assert int(response.headers["Content-Length"]) == len(body)
    assert body == encode_image(scene(3, 7, "train")) == server.image(7)
    assert Image.open(io.BytesIO(body)).format == "PNG"


def test_split_chooses_the_scenes():
    with SceneServer(seed=3, num_samples=5, split="held_out") as server:
        _, body = get(server, "/scenes/000000002.png")
    assert is_held_out(server.scene(2))
    assert body == encode_image(scene(3, 2, "held_out"))


@pytest.mark.parametrize(
    "path",
    [
        "/scenes/000000002.png",
        "/scenes/000000010.png",
        "/scenes/3.png",
        "/scenes/000000003.jpg",
        "/",
        "/scenes/",
        "/scenes/000000003.png/x",
        "/scenes/00000000٣.png",
    ],
)
def test_dead_and_unknown_paths_give_404(path):
    with SceneServer(seed=0, num_samples=10, dead_indices={2, 5}) as server:
        with socket.create_connection(("127.0.0.1", urlsplit(server.url(0)).port), timeout=20) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())  # as is: a client would quote it
            assert client.recv(4096).split()[1] == b"404"
        assert server.image(2) is None
        assert get(server, "/scenes/000000003.png")[0].status == 200


def test_parallel_requests_get_their_own_images():
    with SceneServer(seed=0, num_samples=10**6) as server, ThreadPoolExecutor(8) as pool:
        indices = [i * 997 for i in range(48)]
        bodies = list(pool.map(lambda i: get(server, urlsplit(server.url(i)).path)[1], indices))
    assert bodies == [encode_image(scene(0, i, "train")) for i in indices]


def test_a_connection_serves_many_requests():
    with SceneServer(seed=0, num_samples=10) as server:
        connection = connect(server)
        bodies = [fetch(connection, f"/scenes/{i:09d}.png")[1] for i in range(2)]
        used = connection.sock
        bodies.append(fetch(connection, "/scenes/000000002.png")[1])
        assert connection.sock is used
        connection.close()
    assert len({np.asarray(Image.open(io.BytesIO(b))).tobytes() for b in bodies}) == 3


def test_closing_leaves_no_thread_and_no_open_port():
    before = set(threading.enumerate())
    with SceneServer(seed=0, num_samples=10) as server:
        port = urlsplit(server.url(0)).port
        kept_alive = connect(server)
        fetch(kept_alive, "/scenes/000000000.png")
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before
    assert kept_alive.sock.recv(1) == b""  # the server hung up
    kept_alive.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    with pytest.raises(RuntimeError, match="with statement"):
        server.url(0)


def test_says_nothing_when_clients_leave_or_ask_for_dead_paths(capfd, caplog):
    with SceneServer(seed=0, num_samples=10, dead_indices={1}) as server:
        get(server, "/scenes/000000001.png")
        port = urlsplit(server.url(0)).port
        for request in (b"GET /scenes/0000", b"GET /scenes/000000000.png HTTP/1.1\r\n\r\n" * 50):
            client = socket.create_connection(("127.0.0.1", port))
            # Closing with zero linger resets the connection.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.sendall(request)
            client.close()
        assert get(server, "/scenes/000000000.png")[0].status == 200
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_too_many_samples_are_refused():
    with pytest.raises(ValueError, match="1000000001"):
        SceneServer(seed=0, num_samples=10**9 + 1)
