"""Who is answered: no other site, no other name, no other method; beyond this machine only with the token."""

from pathlib import Path

import pytest

from stages.browse.security import Access, is_loopback
from tests.stages.browse.clients import PORT, client


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST"])
def test_a_loopback_server_answers_to_its_names(small_run: Path, host: str) -> None:
    assert client(small_run).get("/", headers={"Host": f"{host}:{PORT}"}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        f"evil.example:{PORT}",
        "127.0.0.1",
        f"127.0.0.1:{PORT + 1}",
        f"127.0.0.1.evil.example:{PORT}",
        "",
        "x:y",
    ],
)
def test_a_foreign_host_header_is_refused(small_run: Path, host: str) -> None:
    answer = client(small_run).get("/", headers={"Host": host})
    assert answer.status_code == 421
    assert "another name" in answer.text
    assert str(small_run) not in answer.text


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("address", ["/", "/static/browse.css", "/p/1/", "/nowhere"])
def test_a_request_of_another_site_is_refused(small_run: Path, site: str, address: str) -> None:
    assert client(small_run).get(address, headers={"Sec-Fetch-Site": site}).status_code == 403


@pytest.mark.parametrize("site", ["none", "same-origin"])
def test_what_the_user_typed_or_followed_is_answered(small_run: Path, site: str) -> None:
    assert client(small_run).get("/", headers={"Sec-Fetch-Site": site}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_only_reads_are_answered(small_run: Path, method: str) -> None:
    assert client(small_run).request(method, "/").status_code == 405


def test_head_is_answered_like_get_without_a_body(small_run: Path) -> None:
    answer = client(small_run).head("/")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(
    "address",
    [
        "/static/../command.py",
        "/static/%2e%2e/command.py",
        "/static/..%2fcommand.py",
        "/static/%2fetc%2fpasswd",
        "/p/1/../../../../etc/passwd",
        "/p/%2e%2e/",
        "/p/1/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/p/99/",
    ],
)
def test_no_path_leaves_the_pages(small_run: Path, address: str) -> None:
    answer = client(small_run).get(address, follow_redirects=False)
    assert answer.status_code in (404, 307)
    assert "root:" not in answer.text
    assert "import" not in answer.text


@pytest.mark.parametrize("address", ["/", "/p/2/", "/static/browse.js", "/nowhere"])
def test_every_answer_forbids_foreign_content_scripts_in_pages_and_framing(small_run: Path, address: str) -> None:
    headers = client(small_run).get(address).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "server" not in headers


def test_another_address_than_loopback_requires_the_token_of_the_printed_url(small_run: Path) -> None:
    browser = client(small_run, token="right", host="127.0.0.2")
    browser.headers["Host"] = f"127.0.0.2:{PORT}"
    refused = [browser.get(address).status_code for address in ("/", "/p/1/", "/static/browse.css", "/?token=wrong")]
    assert refused == [401] * 4
    answer = browser.get("/p/1/?token=right", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert f"pipeline-browse-{PORT}=right" in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    browser.cookies.clear()
    assert browser.get("/", headers={"Cookie": f"pipeline-browse-{PORT}=right"}).status_code == 200
    assert browser.get("/", headers={"Cookie": f"pipeline-browse-{PORT}=wrong"}).status_code == 401


def test_a_token_is_made_only_where_others_can_connect() -> None:
    assert Access.to("127.0.0.1", PORT).token is None
    tokens = {Access.to("0.0.0.0", PORT).token for _ in range(2)}
    assert len(tokens) == 2
    assert all(token is not None and len(token) >= 32 for token in tokens)
    token = (access := Access.to("192.0.2.7", PORT)).token
    assert access.url == f"http://192.0.2.7:{PORT}/?token={token}"


@pytest.mark.parametrize(
    ("host", "expected"), [("::1", True), ("127.9.9.9", True), ("localhost", True), ("::", False)]
)
def test_loopback_addresses(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_server_on_all_addresses_answers_to_addresses_but_not_to_foreign_names() -> None:
    access = Access("0.0.0.0", PORT, "t")
    assert access.is_ours(f"192.0.2.7:{PORT}")
    assert access.is_ours(f"[2001:db8::1]:{PORT}")
    assert not access.is_ours(f"evil.example:{PORT}")
