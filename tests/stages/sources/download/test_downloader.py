"""Downloads through img2dataset: failures by class, and only what may pass is tried again."""

from collections import Counter
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import pytest

from stages.precompute.fetch import fetch_originals
from stages.sources.download import downloader as module
from stages.sources.download.config import DownloadConfig
from stages.sources.download.downloader import classify, download
from stages.sources.synthetic.source import SyntheticConfig
from tests.image_server import (
    Server,
    body,
    closed_port_url,
    first_then,
    hang_up,
    redirect,
    serve,
    silence,
    status,
)
from tests.images import plain_png

IMAGE = plain_png()
CONFIG = DownloadConfig(threads=8, timeout_s=20, retries=0, disallowed_headers=("noai",), allow_private_addresses=True)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF_S", 0.001)
    module._host_failures.clear()
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def fetch(urls: Mapping[int, str], scratch: Path, **changes: object) -> dict[int, tuple[bytes | None, str | None]]:
    """Row -> (bytes, reason); each row exactly once."""
    found: dict[int, tuple[bytes | None, str | None]] = {}

    def result(row: int, data: bytes | None, reason: str | None, detail: str) -> None:
        assert row not in found
        assert (data is None) == (reason is not None)
        found[row] = (data, reason)

    scratch.mkdir(exist_ok=True)
    download(urls, scratch, CONFIG.model_copy(update=changes), result)
    return found


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 404: Not Found", "http_404"),
        ("HTTP Error 503: SSL certificate timed out", "http_503"),
        ("HTTP Error 302: Found - Redirection to url 'file:///etc/passwd' is not allowed", "http_302"),
        (
            "HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.\n"
            "The last 30x error message was:\nFound",
            "redirect_loop",
        ),
        ("Use of image disallowed by X-Robots-Tag directive", "robots_disallowed"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error [Errno 110] Connection timed out>", "timeout"),
        ("<urlopen error [Errno 111] Connection refused>", "connection_refused"),
        ("[Errno 104] Connection reset by peer", "connection_reset"),
        ("Remote end closed connection without response", "connection_reset"),
        ("[Errno 32] Broken pipe", "connection_reset"),
        ("<urlopen error [Errno -2] Name or service not known>", "dns_error"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns_error"),
        ("<urlopen error [Errno -5] No address associated with hostname>", "dns_error"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "tls_error"),
        ("<urlopen error EOF occurred in violation of protocol (_ssl.c:1006)>", "tls_error"),
        ("IncompleteRead(10 bytes read, 90 more expected)", "incomplete"),
        ("<urlopen error unknown url type: gopher>", "invalid_url"),
        ("<urlopen error no host given>", "invalid_url"),
        ("nonnumeric port: 'abc'", "invalid_url"),
        ("URL can't contain control characters. '/a b.png' (found at least ' ')", "invalid_url"),
        ("'ascii' codec can't encode character '\\xe9' in position 5: ordinal not in range(128)", "invalid_url"),
        ("encoding with 'idna' codec failed (UnicodeError: label empty or too long)", "invalid_url"),
        ("<urlopen error [Errno 101] Network is unreachable>", "download_error"),
        ("got more than 65536 bytes when reading chunk size", "invalid_response"),
        ("something new", "download_error"),
        ("", "download_error"),
    ],
)
def test_a_message_has_one_of_a_bounded_set_of_reasons(message: str, reason: str) -> None:
    assert classify(message) == reason


ROUTES = {
    "/good": body(IMAGE),
    "/404": status(404),
    "/403": status(403),
    "/500": status(500),
    "/503": status(503),
    "/429": status(429),
    "/408": status(408),
    "/hang-up": hang_up,
    "/short": body(IMAGE[:20], claimed=len(IMAGE)),
    "/loop": redirect("/loop"),
    "/robots": body(IMAGE, X_Robots_Tag="noai"),
    "/flaky": first_then(status(503), body(IMAGE)),
    "/empty": body(b""),
}


def urls_of(server: Server) -> dict[int, str]:
    return {row: server.url(path) for row, path in enumerate(ROUTES)}


def test_only_failures_that_may_pass_are_tried_again(tmp_path: Path) -> None:
    with serve(ROUTES) as server:
        urls = {**urls_of(server), 90: closed_port_url(), 91: "ftp://127.0.0.1/x", 92: "", 93: "http://[::1/x"}
        found = fetch(urls, tmp_path, retries=2)
        requests = server.requests
    reasons = {path: found[row][1] for row, path in enumerate(ROUTES)}
    assert reasons == {
        "/good": None,
        "/404": "http_404",
        "/403": "http_403",
        "/500": "http_500",
        "/503": "http_503",
        "/429": "http_429",
        "/408": "http_408",
        "/hang-up": "connection_reset",
        "/short": "incomplete",
        "/loop": "redirect_loop",
        "/robots": "robots_disallowed",
        "/flaky": None,
        "/empty": None,
    }
    assert [found[row][1] for row in (90, 91, 92, 93)] == ["connection_refused"] + ["invalid_url"] * 3
    assert {path: found[row][0] for row, path in enumerate(ROUTES) if reasons[path] is None} == {
        "/good": IMAGE,
        "/flaky": IMAGE,
        "/empty": b"",
    }
    loops = requests.pop("/loop")
    assert loops == 5, "urllib follows one address 4 times, then gives up; that is not repeated"
    once = {"/good": 1, "/404": 1, "/403": 1, "/robots": 1, "/empty": 1}
    twice = {"/flaky": 2}
    thrice = dict.fromkeys(("/500", "/503", "/429", "/408", "/hang-up", "/short"), 3)
    assert requests == Counter(once | twice | thrice)


@pytest.mark.slow
def test_silence_is_tried_again(tmp_path: Path) -> None:
    with serve({"/silent": silence, "/slow-start": first_then(silence, body(IMAGE))}) as server:
        assert fetch({0: server.url("/silent")}, tmp_path / "1", timeout_s=0.3, retries=2) == {0: (None, "timeout")}
        assert server.requests["/silent"] <= 3
        found = fetch({0: server.url("/slow-start")}, tmp_path / "2", timeout_s=1, retries=9)
        assert server.requests["/slow-start"] >= 2
    assert found == {0: (IMAGE, None)}


def test_without_retries_each_url_is_asked_once(tmp_path: Path) -> None:
    with serve(ROUTES) as server:
        found = fetch({0: server.url("/flaky"), 7: server.url("/good")}, tmp_path)
        assert (found, server.requests) == (
            {0: (None, "http_503"), 7: (IMAGE, None)},
            Counter({"/flaky": 1, "/good": 1}),
        )


def test_the_images_come_through_img2dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = module.load_downloader()
    asked: list[object] = []
    original = theirs.is_disallowed

    def spy(headers: object, *arguments: object) -> bool:
        asked.append(headers)
        return original(headers, *arguments)

    monkeypatch.setattr(theirs, "is_disallowed", spy)
    with serve(ROUTES) as server:
        urls = {row: server.url("/good") for row in range(30)}
        found = fetch(urls, tmp_path, user_agent_token="ourbot")
        assert all("ourbot; +https://github.com/rom1504/img2dataset" in agent for agent in server.agents)
    assert found == dict.fromkeys(range(30), (IMAGE, None))
    assert len(asked) == 30


@pytest.mark.parametrize("name", ["download_image_with_retry", "urllib"])
def test_an_img2dataset_that_goes_past_the_limits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    theirs = module.load_downloader()

    if name == "urllib":
        monkeypatch.setattr(theirs, "download_image", lambda row, **_: (row[0], BytesIO(IMAGE), None))
        monkeypatch.setitem(globals(), "urllib", None)
        message = "did not open"
    else:
        monkeypatch.setattr(theirs.Downloader, "download_shard", lambda self, row: None)
        monkeypatch.setitem(globals(), "download_image_with_retry", None)
        message = "no result for 2 of 2"
    with pytest.raises(RuntimeError, match=message):
        fetch({0: "http://127.0.0.1/a", 1: "http://127.0.0.1/b"}, tmp_path)
    monkeypatch.undo()
    monkeypatch.delattr(theirs, name)
    with pytest.raises(RuntimeError, match=f"img2dataset.downloader has no {name}; install img2dataset 1.47"):
        fetch({0: "http://127.0.0.1/a"}, tmp_path)


def test_robots_headers_are_obeyed_only_as_configured(tmp_path: Path) -> None:
    routes = {
        "/noai": body(IMAGE, X_Robots_Tag="noindex, noai"),
        "/other": body(IMAGE, X_Robots_Tag="otherbot: noai"),
        "/ours": body(IMAGE, X_Robots_Tag="ourbot: noai"),
    }
    with serve(routes) as server:
        urls = {0: server.url("/noai"), 1: server.url("/other"), 2: server.url("/ours")}
        named = fetch(urls, tmp_path / "a", user_agent_token="ourbot")
        assert all("ourbot" in agent for agent in server.agents)
        ignored = fetch(urls, tmp_path / "b", disallowed_headers=())
    assert [named[row][1] for row in urls] == ["robots_disallowed", None, "robots_disallowed"]
    assert [ignored[row][1] for row in urls] == [None, None, None]


def test_a_result_that_cannot_be_kept_stops_the_shard(tmp_path: Path) -> None:
    calls: list[int] = []

    def result(row: int, data: bytes | None, reason: str | None, detail: str) -> None:
        calls.append(row)
        raise OSError(28, "No space left on device")

    with serve(ROUTES) as server, pytest.raises(OSError, match="No space left"):
        download({row: server.url("/good") for row in range(5)}, tmp_path, CONFIG, result)
    assert len(calls) == 1


def test_a_url_without_an_answer_is_an_error_and_not_a_lost_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = module.load_downloader()
    original = theirs.compute_key

    def broken(key: int, *arguments: object) -> str:
        if key == 0:
            raise ValueError("broken")
        return original(key, *arguments)

    monkeypatch.setattr(theirs, "compute_key", broken)
    with serve(ROUTES) as server, pytest.raises(RuntimeError, match="no result for 1 of 2 URLs"):
        fetch({0: server.url("/good"), 1: server.url("/404")}, tmp_path)
    capsys.readouterr()  # img2dataset prints the traceback


def test_no_url_is_no_work(tmp_path: Path) -> None:
    assert fetch({}, tmp_path) == {}
    assert fetch({3: "data:image/png;base64,"}, tmp_path) == {3: (None, "invalid_url")}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bypass", ["", "example.org,"])
def test_the_built_in_source_goes_past_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bypass: str) -> None:
    monkeypatch.setenv("http_proxy", closed_port_url())
    monkeypatch.setenv("no_proxy", bypass)
    source = SyntheticConfig(num_samples=2, dead_links=0).build()
    (shard,) = source.shards(10)
    originals = []
    fetch_originals(source, shard, None, tmp_path, originals.append)
    assert [o.reason for o in originals] == [None, None]
