"""What servers, names and redirects may try, and where it ends. Hosts here: 127.0.0.1, 127.0.0.2, localhost."""

import gzip
import itertools
import socket
import ssl
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.request import OpenerDirector

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from stages.precompute.fetch import fetch_originals
from stages.sources.download import downloader as module
from stages.sources.download import host_queue
from stages.sources.download import open_url as visit
from stages.sources.download.config import DownloadConfig
from stages.sources.download.downloader import classify, download
from stages.sources.download.open_url import Endpoint, retry_after_s
from stages.sources.synthetic.source import SyntheticConfig
from tests.image_server import (
    Answer,
    Handler,
    Server,
    body,
    chunked,
    closed_port_url,
    drip,
    first_then,
    redirect,
    serve,
    silence,
    status,
)
from tests.images import plain_png

IMAGE = plain_png()
BAD_HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5")
CONFIG = DownloadConfig(threads=8, timeout_s=20, retries=0, allow_private_addresses=True)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF_S", 0.001)
    module._host_failures.clear()
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def outcomes(
    urls: list[str], scratch: Path, *, own: Endpoint | None = None, **changes: object
) -> list[bytes | str | None]:
    """The bytes or the reason of each URL, in their order."""
    found: dict[int, bytes | str | None] = {}

    def result(row: int, data: bytes | None, reason: str | None, detail: str) -> None:
        assert row not in found
        found[row] = data if reason is None else reason

    scratch.mkdir(exist_ok=True)
    download(dict(enumerate(urls)), scratch, CONFIG.model_copy(update=changes), result, own=own)
    return [found[row] for row in range(len(urls))]


# Hosts


def test_a_host_that_waits_does_not_hold_the_threads_of_the_others(tmp_path: Path) -> None:
    others_done = threading.Event()

    def slow(handler: Handler) -> None:
        assert others_done.wait(20)
        body(IMAGE)(handler)

    def quick(handler: Handler) -> None:
        body(IMAGE)(handler)
        if handler.server.requests["/quick"] == 6:
            others_done.set()

    with serve({"/slow": slow, "/quick": quick}, "127.0.0.2") as server:
        urls = [server.url("/slow")] * 6 + [server.url("/quick", "127.0.0.2")] * 6
        found = outcomes(urls, tmp_path, threads=2, max_per_host=1, timeout_s=20)
    assert found == [IMAGE] * 12
    assert others_done.is_set()


def test_one_host_has_no_more_downloads_at_once_than_allowed(tmp_path: Path) -> None:
    lock, active, most = threading.Lock(), Counter[str](), Counter[str]()
    three_at_once = threading.Barrier(3)

    def count(handler: Handler) -> None:
        host = handler.headers["Host"].partition(":")[0]
        with lock:
            active[host] += 1
            most[host] = max(most[host], active[host])
        three_at_once.wait(20)
        with lock:
            active[host] -= 1
        body(IMAGE)(handler)

    with serve({"/": count}, "127.0.0.2") as server:
        hosts = ["127.0.0.1", "127.0.0.2", "localhost"]
        found = outcomes([server.url("/", host) for host in hosts for _ in range(4)], tmp_path, max_per_host=1)
    assert found == [IMAGE] * 12
    assert most == dict.fromkeys(hosts, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["silent", "closed", "reset"])
def test_a_stuck_host_is_given_up_and_others_are_not(tmp_path: Path, kind: str) -> None:
    routes = {"/silent": silence, "/reset": lambda _: None, "/good": body(IMAGE)}
    with serve(routes, "127.0.0.2") as server:
        stuck = server.url(f"/{kind}", "127.0.0.2")
        if kind == "closed":
            stuck = closed_port_url().replace("127.0.0.1", "127.0.0.2")
        urls = [stuck] * 40 + [server.url("/good")] * 5
        found = outcomes(
            urls, tmp_path, timeout_s=1 if kind == "silent" else 20, max_host_failures=2, max_per_host=1, retries=1
        )
        asked = server.requests[f"/{kind}"]
    reason = {"silent": "timeout", "closed": "connection_refused", "reset": "connection_reset"}[kind]
    assert Counter(found[:40]) == {reason: 2, "host_unreachable": 38}
    assert asked == (0 if kind == "closed" else 2)
    assert found[40:] == [IMAGE] * 5


def test_a_host_whose_targets_are_stuck_is_not_given_up(tmp_path: Path) -> None:
    with serve({"/away": redirect(closed_port_url()), "/good": body(IMAGE)}) as server:
        urls = [server.url("/away")] * 12 + [server.url("/good")]
        found = outcomes(urls, tmp_path, max_host_failures=2, max_per_host=1)
    assert found == ["connection_refused"] * 12 + [IMAGE]


@pytest.mark.slow
@pytest.mark.parametrize("code", [429, 503])
def test_a_pause_that_a_server_asks_for_is_given_up_to_the_bound(tmp_path: Path, code: int) -> None:
    def busy(seconds: int) -> Answer:
        def answer(handler: Handler) -> None:
            handler.send_response(code)
            handler.send_header("Retry-After", str(seconds))
            handler.end_headers()

        return answer

    routes = {"/soon": first_then(busy(1), body(IMAGE)), "/never": busy(3600), "/to-never": redirect("/never")}
    with serve(routes, "127.0.0.2") as server:
        urls = [server.url("/soon")] + [server.url("/never", "127.0.0.2")] * 9
        found = outcomes([*urls, server.url("/to-never", "localhost")], tmp_path, retries=1, max_per_host=1)
        assert server.requests == {"/soon": 2, "/never": 2, "/to-never": 1}
    assert found == [IMAGE, f"http_{code}"] + ["host_unreachable"] * 8 + [f"http_{code}"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120),
        (" 0 ", 0),
        (formatdate(1_000_090, usegmt=True), 90),
        (formatdate(999_000, usegmt=True), 0),
        ("-5", 0),
        ("soon", 0),
        ("9" * 5000, 0),
        (None, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str | None, seconds: float) -> None:
    headers = Message()
    if text is not None:
        headers["Retry-After"] = text
    assert retry_after_s(headers, now=1_000_000) == seconds


# Bytes and time


def pour(handler: Handler) -> None:
    """Far more than allowed; not without an end, lest a missing limit fill the memory."""
    for _ in range(100):
        handler.wfile.write(bytes(1 << 16))


def unsized(handler: Handler) -> None:
    """A body of which nothing says how long it is."""
    handler.send_response(200)
    handler.end_headers()
    pour(handler)


def endless_headers(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers = lambda: None  # type: ignore[method-assign]
    handler.flush_headers()
    for i in itertools.count():
        handler.wfile.write(f"X-{i}: {'x' * 1000}\r\n".encode())


def long_redirect(handler: Handler) -> None:
    redirect("/good")(handler)
    pour(handler)


LARGE: dict[str, Answer] = {
    "/body": body(bytes(60_000)),
    "/small-claim": body(bytes(60_000), claimed=10),
    "/huge-claim": body(b"x", claimed=10**15),
    "/unsized": unsized,
    "/chunks-for-long": chunked([bytes(1 << 16)] * 100),
    "/small-chunks": chunked([bytes(100)] * 1000),
    "/huge-chunk": chunked([b"x"], claimed=10**15),
    "/long-redirect": long_redirect,
}


def test_no_more_bytes_than_allowed_are_received_whatever_is_claimed(tmp_path: Path) -> None:
    with serve({**LARGE, "/good": body(IMAGE), "/chunks": chunked([IMAGE[:9], IMAGE[9:]])}) as server:
        paths = [*LARGE, "/good", "/chunks"]
        found = outcomes([server.url(path) for path in paths], tmp_path, max_bytes=50_000)
    expected = dict.fromkeys(paths, "too_large") | {"/small-claim": bytes(10), "/good": IMAGE, "/chunks": IMAGE}
    assert dict(zip(paths, found, strict=True)) == expected


def test_endless_headers_end(tmp_path: Path) -> None:
    with serve({"/": endless_headers}) as server:
        assert outcomes([server.url("/")], tmp_path, max_bytes=50_000) == ["too_large"]
        assert outcomes([server.url("/")], tmp_path) == ["invalid_response"], "http.client takes 100 headers"


def test_what_is_no_http_is_dropped_once_and_cannot_name_a_reason(tmp_path: Path) -> None:
    def say(words: bytes) -> Answer:
        return lambda handler: handler.wfile.write(words)

    routes = {
        "/headers": say(b"HTTP/1.0 200 OK\r\n" + b"X-A: b\r\n" * 101 + b"Content-Length: 1\r\n\r\nx"),
        "/99-headers": say(b"HTTP/1.0 200 OK\r\n" + b"X-A: b\r\n" * 99 + b"\r\n" + IMAGE),
        "/line": say(b"HTTP/1.0 200 OK\r\nX-A: " + b"b" * 70_000 + b"\r\n\r\nx"),
        "/chunk": say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 70_000),
        "/forged": say(b"host_unreachable: timed out\r\n\r\n"),
        "/version": say(b"HTTP/9.9 200 OK\r\n\r\n"),
    }
    with serve(routes) as server:
        found = outcomes([server.url(path) for path in routes], tmp_path, retries=2, max_host_failures=1)
        assert server.requests == dict.fromkeys(routes, 1)
    assert dict(zip(routes, found, strict=True)) == dict.fromkeys(routes, "invalid_response") | {"/99-headers": IMAGE}


def test_a_compressed_body_is_not_inflated(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    with serve({"/": body(bomb, Content_Encoding="gzip")}) as server:
        assert outcomes([server.url("/")], tmp_path, max_bytes=20_000) == [bomb]


def test_bytes_that_drip_are_cut_off_at_the_deadline(tmp_path: Path) -> None:
    with serve({"/": drip(bytes(1000), pause_s=0.02), "/quick": drip(b"abc", pause_s=0.01)}) as server:
        assert outcomes([server.url("/")], tmp_path, timeout_s=4, deadline_s=0.4) == ["timeout"]
        assert outcomes([server.url("/quick")], tmp_path) == [b"abc"]


def test_a_rate_below_the_least_is_a_timeout_of_its_host(tmp_path: Path) -> None:
    limits = {"timeout_s": 0.4, "deadline_s": 30, "min_bytes_per_s": 10_000, "retries": 1}  # either way too slow
    with serve({"/": drip(bytes(1000), pause_s=0.02)}) as server:
        found = outcomes([server.url("/")] * 6, tmp_path, **limits, max_host_failures=2, max_per_host=1)
        assert server.requests["/"] <= 2
    assert Counter(found) == {"timeout": 2, "host_unreachable": 4}


def test_the_rate_counts_from_the_first_byte_over_each_span_of_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(visit.time, "monotonic", lambda: now)
    config = DownloadConfig(timeout_s=10, min_bytes_per_s=100)
    attempt = visit.FetchAttempt(config, visit.make_opener())
    for seconds, received in ((9, 200), (5, 700), (5, 101), (9, 1), (0.9, 5000), (9, 1), (1, 0)):
        now += seconds
        attempt.count_bytes(received)
    now += 10
    with pytest.raises(TimeoutError, match="timed out: 1 bytes in 11 s"):
        attempt.count_bytes(1)
    unlimited = visit.FetchAttempt(config.model_copy(update={"min_bytes_per_s": 0}), visit.make_opener())
    for _ in range(3):
        now += 9
        unlimited.count_bytes(1)


def test_the_deadline_is_that_of_all_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    init = visit.FetchAttempt.__init__

    def spy(self: visit.FetchAttempt, *arguments: Any) -> None:
        init(self, *arguments)
        given.append(self._ends - self._started)

    monkeypatch.setattr(visit.FetchAttempt, "__init__", spy)
    monkeypatch.setattr(module, "_BACKOFF_S", 0.1)
    with serve({"/": drip(bytes(1000), pause_s=0.02), "/503": status(503)}) as server:
        assert outcomes([server.url("/")], tmp_path / "1", deadline_s=0.3, retries=5) == ["timeout"]
        assert server.requests["/"] <= 1, "nothing is left for another try"
        assert outcomes([server.url("/503")], tmp_path / "2", deadline_s=100, retries=2) == ["http_503"]
    _, first, second, third = given
    assert first == 100
    assert second < first - 0.1
    assert third < second - 0.2


@pytest.mark.parametrize(
    ("spent_s", "requested_s", "again"), [(97, 0, True), (99.6, 0, False), (60, 30, True), (71, 30, False)]
)
def test_no_try_starts_after_the_deadline(
    spent_s: float, requested_s: float, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BACKOFF_S", 0.5)
    fetcher = module._Fetcher(["http://127.0.0.1/"], CONFIG.model_copy(update={"retries": 1, "deadline_s": 100}), None)
    turn = fetcher.queue.take()
    turn.message, turn.spent_s = "HTTP Error 503: ", spent_s
    ended = visit.FetchAttempt(CONFIG, visit.make_opener())
    ended.retry_after_s = requested_s
    assert fetcher._give_back(turn, ended) is again


def test_a_name_whose_lookup_hangs_is_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    real = socket.getaddrinfo

    def look_up(host: str, *arguments: Any, **options: Any) -> list[Any]:
        if host == "slow.test":
            assert answered.wait(20)
        return real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with serve({"/": body(IMAGE)}) as server:
        urls = [server.url("/", "slow.test"), server.url("/", "quick.test")]
        assert outcomes(urls, tmp_path, timeout_s=1) == ["timeout", IMAGE]
    answered.set()


def test_good_hosts_do_not_wait_behind_bad_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_queue, "_PATIENCE_S", 0.05)
    good_done = threading.Event()

    def bad(handler: Handler) -> None:
        assert good_done.wait(20)

    def good(handler: Handler) -> None:
        body(IMAGE)(handler)
        if handler.server.requests["/good"] == 20:
            good_done.set()

    with serve({"/bad": bad, "/good": good}, *BAD_HOSTS) as server:
        bad_urls = [server.url("/bad", host) for host in BAD_HOSTS]
        urls = [*bad_urls, *[server.url("/good")] * 20]
        found = outcomes(urls, tmp_path, threads=2, timeout_s=20)
    assert found == ["connection_reset"] * 4 + [IMAGE] * 20


def test_no_more_images_are_held_than_stated(tmp_path: Path) -> None:
    most = 0

    def result(row: int, data: bytes | None, reason: str | None, detail: str) -> None:
        nonlocal most
        if row == 0:
            time.sleep(0.3)  # the others come, as far as they may
        if not most:
            most = server.requests.total()

    with serve({"/": body(IMAGE)}) as server:
        download(
            dict.fromkeys(range(100), server.url("/")), tmp_path, CONFIG.model_copy(update={"threads": 2}), result
        )
        assert server.requests.total() == 100
    assert 1 <= most <= 1 + 2 * 2 + 2


def test_the_deadline_holds_over_redirects_and_for_headers(tmp_path: Path) -> None:
    def dripping_headers(handler: Handler) -> None:
        for byte in b"HTTP/1.0 200 OK\r\nX-Slow: " + b"x" * 1000:
            handler.wfile.write(bytes([byte]))
            if handler.server.closing.wait(0.02):
                return

    def circle(handler: Handler) -> None:
        handler.server.closing.wait(0.03)
        redirect(f"/{handler.server.requests.total()}")(handler)

    with serve({"/headers": dripping_headers}) as server:
        server.routes = {**server.routes, **{f"/{i}": circle for i in range(1000)}}
        urls = [server.url("/headers"), server.url("/0")]
        found = outcomes(urls, tmp_path, timeout_s=4, deadline_s=0.5, max_redirects=10**6)
    assert found == ["timeout", "timeout"]


# Addresses and redirects


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "[::1]"])
def test_private_addresses_are_refused_however_written(tmp_path: Path, host: str) -> None:
    with serve({"/": body(IMAGE)}, "127.0.0.2") as server:
        assert outcomes([server.url("/", host)], tmp_path, allow_private_addresses=False) == ["forbidden_address"]
        assert server.requests == {}
        if host not in ("[::1]", "0.0.0.0"):  # no test connects to either
            assert outcomes([server.url("/", host)], tmp_path) == [IMAGE]


def own_address(server: Server) -> Endpoint:
    return "127.0.0.1", server.server_port


def test_only_the_own_address_and_port_are_allowed(tmp_path: Path) -> None:
    with serve({"/": body(IMAGE)}, "127.0.0.2") as server, serve({"/": body(IMAGE)}) as other:
        urls = [server.url("/"), server.url("/", "127.0.0.2"), other.url("/")]
        found = outcomes(urls, tmp_path, own=own_address(server), allow_private_addresses=False)
        assert (server.requests, other.requests) == ({"/": 1}, {})
    assert found == [IMAGE, "forbidden_address", "forbidden_address"]


def test_a_redirect_is_checked_like_a_url(tmp_path: Path) -> None:
    with serve({"/": body(IMAGE)}) as inside:
        routes = {
            "/inside": redirect(inside.url("/")),
            "/metadata": redirect("http://169.254.169.254/latest/meta-data/"),
            "/twice": redirect("/inside"),
            "/file": redirect("file:///etc/passwd"),
            "/ftp": redirect("ftp://127.0.0.1/x"),
            "/data": redirect("data:image/png;base64,"),
            "/login": redirect("http://user:pass@127.0.0.1:1/x"),
        }
        with serve(routes) as server:
            found = outcomes(
                [server.url(path) for path in routes],
                tmp_path,
                own=own_address(server),
                allow_private_addresses=False,
            )
        assert inside.requests == {}
    assert found == ["forbidden_address"] * 3 + ["http_302", "invalid_url", "http_302", "invalid_url"]


def test_a_url_with_a_password_is_neither_looked_up_nor_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def look_up(host: object, *_: object, **__: object) -> list[Any]:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    said: list[str] = []
    with serve({"/": redirect("http://me:hidden@example.invalid/x")}) as server:
        urls = ["http://me:hidden@example.invalid/x", "http://hidden@example.invalid/", server.url("/")]
        real = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *a, **o: (look_up if host != "127.0.0.1" else real)(host, *a, **o)
        )
        download(
            dict(enumerate(urls)),
            tmp_path,
            CONFIG,
            lambda row, data, reason, detail: said.append(f"{reason}: {detail}"),
        )
    assert asked == []
    assert len(said) == 3
    assert all(words.startswith("invalid_url: ") and "user or password" in words for words in said)
    assert not any("hidden" in words for words in said)


def test_redirects_are_followed_up_to_the_limit(tmp_path: Path) -> None:
    routes = {f"/{i}": redirect(f"/{i - 1}") for i in range(1, 20)} | {"/0": body(IMAGE)}
    with serve(routes) as server:
        assert outcomes([server.url("/19")], tmp_path / "20", max_redirects=19) == [IMAGE]
        urls = [server.url(f"/{i}") for i in range(5)]
        assert outcomes(urls, tmp_path / "2", max_redirects=2) == [IMAGE] * 3 + ["too_many_redirects"] * 2
        assert outcomes(urls, tmp_path / "0", max_redirects=0) == [IMAGE] + ["too_many_redirects"] * 4


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Key and certificate of localhost, by its own word."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    file = tmp_path / "localhost.pem"
    file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(pem)
    )
    return file


def secure(server: Server, certificate: Path) -> None:
    """Makes a server speak TLS, on connections from now on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)


def test_https_has_the_same_limits_and_checks_certificates(
    tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = {"/": body(IMAGE), "/drip": drip(bytes(1000), pause_s=0.02), "/huge": body(b"x", claimed=10**15)}
    with serve(routes) as server, socket.create_server(("127.0.0.1", 0)) as no_handshake:
        secure(server, certificate)
        base = f"https://localhost:{server.server_port}"
        stuck = f"https://localhost:{no_handshake.getsockname()[1]}/"
        urls = [f"{base}/", f"{base}/huge", f"https://127.0.0.1:{server.server_port}/", f"{base}/drip", stuck]
        trusting = ssl.create_default_context(cafile=str(certificate))
        assert outcomes(urls[:1], tmp_path / "untrusted") == ["tls_error"]
        monkeypatch.setattr(visit, "_tls", lambda: trusting)
        found = outcomes(urls[:3], tmp_path / "trusted")
        slow = outcomes(urls[3:], tmp_path / "slow", deadline_s=0.5)
        refused = outcomes(urls, tmp_path / "public", allow_private_addresses=False)
    assert found == [IMAGE, "too_large", "tls_error"]
    assert slow == ["timeout", "timeout"]
    assert refused == ["forbidden_address"] * 5


def test_https_goes_through_a_proxy(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "_tls", lambda: ssl.create_default_context(cafile=str(certificate)))
    with serve({"/": body(IMAGE)}) as server, socket.create_server(("127.0.0.1", 0)) as proxy:
        secure(server, certificate)
        asked: list[bytes] = []

        def pump(source: socket.socket, target: socket.socket) -> None:
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

        def tunnel() -> None:
            client, _ = proxy.accept()
            with client, socket.create_connection(server.server_address[:2]) as target:
                asked.append(client.recv(1 << 16).splitlines()[0])
                client.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                back = threading.Thread(target=pump, args=(target, client), daemon=True)
                back.start()
                pump(client, target)
                back.join()

        threading.Thread(target=tunnel, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert outcomes(["https://localhost:1/"], tmp_path, allow_private_addresses=False) == [IMAGE]
    assert asked[0].startswith(b"CONNECT localhost:1 ")


class Resolver:
    """Answers a name with one list of addresses after the other, then with the last again and again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]):
        self.answers = list(answers)
        self.asked = 0
        self.real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: str, port: int, *arguments: object, **options: object) -> list[object]:
        if host != "rebind.test":
            return self.real(host, port, *arguments, **options)  # type: ignore[return-value,arg-type]
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answer]


def test_a_name_that_changes_its_address_gets_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    with serve({"/": body(IMAGE)}, "127.0.0.2") as server:
        urls = [server.url("/", "rebind.test")] * 2
        found = outcomes(urls, tmp_path, own=own_address(server), allow_private_addresses=False, threads=1)
        assert server.addresses == ["127.0.0.1"], "connected to what was checked, and not to a second answer"
    assert found == [IMAGE, "forbidden_address"]
    assert resolver.asked == 2, "one lookup a connection"


def test_of_several_addresses_only_the_allowed_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Resolver(monkeypatch, ["127.0.0.2", "127.0.0.1", "10.0.0.1"])
    with serve({"/": body(IMAGE)}, "127.0.0.2") as server:
        url = server.url("/", "rebind.test")
        assert outcomes([url], tmp_path, own=own_address(server), allow_private_addresses=False) == [IMAGE]
        assert server.addresses == ["127.0.0.1"]


def test_a_proxy_is_used_and_addresses_written_into_urls_are_still_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["http://example.org/a", "http://169.254.169.254/a", "https://[fd00:ec2::254]/a", "http://[::1]:1/a"]
    with serve({asked[0]: body(IMAGE)}) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url(""))
        monkeypatch.setenv("https_proxy", proxy.url(""))
        found = outcomes(asked, tmp_path, allow_private_addresses=False)
        assert proxy.requests == {asked[0]: 1}
    assert found == [IMAGE] + ["forbidden_address"] * 3


def test_the_built_in_source_opens_no_other_private_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[Endpoint | None] = []
    init = visit.FetchAttempt.__init__

    def spy(
        self: visit.FetchAttempt, config: DownloadConfig, opener: OpenerDirector, own: Endpoint | None, spent_s: float
    ) -> None:
        assert not config.allow_private_addresses
        allowed.append(own)
        init(self, config, opener, own, spent_s)

    monkeypatch.setattr(visit.FetchAttempt, "__init__", spy)
    source = SyntheticConfig(num_samples=2, dead_links=0).build()
    (shard,) = source.shards(10)
    originals = []
    fetch_originals(source, shard, None, tmp_path, originals.append)
    assert [original.reason for original in originals] == [None, None]
    assert len(set(allowed)) == 1
    assert allowed[0] is not None
    assert allowed[0][0] == "127.0.0.1"


@pytest.mark.parametrize(
    "reason", ["too_large", "too_many_redirects", "forbidden_address", "host_unreachable", "invalid_response"]
)
def test_a_limit_names_itself_and_no_server_can_name_it(reason: str) -> None:
    assert classify(f"{reason}: more than 3") == reason
    assert classify(f"HTTP Error 500: {reason}: ") == "http_500"
