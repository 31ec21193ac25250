"""Servers of captions that are broken, or other than configured: one line each, and no row is lost."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EXIT_USAGE, MachineError, PipelineError, UnavailableError
from tests.caption_server import Asked, CaptionServer, serve
from tests.commands import Result, call
from tests.runs import precompute, store_bytes
from tests.workflows.test_captioners import KEYS, SMALL, captioner, captions, probes_left_out

GOOD_ONES = 7
"""Answers before a server breaks, 4 or 5 of them to the fixed images."""


def breaking(fault: str) -> CaptionServer:
    """All its answers are faulty from a moment on."""
    server = CaptionServer()
    server.fault = lambda asked: fault if server.answered > GOOD_ONES else None
    return server


def drops(summary: dict[str, Any]) -> dict[str, int]:
    return summary["tally"]["groups"]["captions-long"]["drops"]


def line_of(result: Result) -> str:
    """What a command that fails says."""
    (line,) = result.err.strip().splitlines()
    return line


def run(out: Path, *settings: str) -> Result:
    return call("run", "precompute", "--out", str(out), "--executor", "inline", "--quiet", *SMALL, *settings)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["html", "half", "error_500"])
def test_rows_are_not_lost_to_a_server_that_breaks(fault: str, tmp_path: Path) -> None:
    out, server = tmp_path / "run", breaking(fault)
    with serve(server):
        with pytest.raises(PipelineError, match=r"gave no answer for 0\.5 s \(wait_for_server_s\)") as error:
            precompute(out, *SMALL, captioner(server, wait_for_server_s=0.5, max_in_flight=2))
        assert error.value.exit_code == UnavailableError.exit_code
        server.fault = lambda asked: None
        assert drops(precompute(out, *SMALL, captioner(server))) == {}
        precompute(tmp_path / "whole", *SMALL, captioner(server))
    assert store_bytes(out) == store_bytes(tmp_path / "whole")


def test_one_broken_server_of_two_loses_no_row(tmp_path: Path) -> None:
    with serve(breaking("html")) as broken, serve(CaptionServer(seconds=0.02)) as good:
        config = captioner(broken, base_url=[broken.url, good.url], max_in_flight=4)
        assert drops(precompute(tmp_path / "run", *SMALL, config)) == {}
        assert len(probes_left_out(good)) > KEYS / 2
    assert all(captions(tmp_path / "run").values())


def test_a_server_that_answers_with_another_model_later_ends_the_run_by_name(tmp_path: Path) -> None:
    with serve(breaking("other_model")) as server:
        says = r"answers as 'tiny/another'; the set was begun with 'tiny/describer': serve it again"
        with pytest.raises(PipelineError, match=says) as error:
            precompute(tmp_path / "run", *SMALL, captioner(server))
        assert error.value.exit_code == MachineError.exit_code
        server.fault = lambda asked: None
        assert drops(precompute(tmp_path / "run", *SMALL, captioner(server))) == {}


def test_the_last_bad_image_is_told_from_a_broken_server(tmp_path: Path) -> None:
    """No other image is in flight, so the server is asked about a known one."""
    seen: list[str] = []

    def fault(asked: Asked) -> str | None:
        if asked.prompt == "Describe it." and asked.number not in seen:
            seen.append(asked.number)
        return "error_500" if asked.number in seen[-1:] and len(seen) == KEYS else None

    with serve(CaptionServer(fault=fault)) as server:
        summary = precompute(tmp_path / "run", *SMALL, captioner(server, max_in_flight=1, wait_for_server_s=60))
    assert drops(summary) == {"server_error": 1}


@contextmanager
def raw(answer: bytes) -> Iterator[str]:
    """Answers each connection with these bytes, and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def work() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(2**20)
                    connection.sendall(answer)

        threading.Thread(target=work, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        listening.shutdown(socket.SHUT_RDWR)


PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n<html>Hi</html>"


@pytest.mark.parametrize(
    ("answer", "says", "code"),
    [
        (
            PAGE,
            "does not caption the first image that it is asked about: no_answer: <html>Hi</html>; check base_url",
            4,
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "half_answer: ", 4),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no_answer: ", 4),
        (b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n", "answers HTTP 302 for model", 4),
        (b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n", "image_too_large: HTTP 413", 4),
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "answers HTTP 404 for model 'tiny/describer'", 4),
        (b"", "gave no answer for 0.2 s (wait_for_server_s)", UnavailableError.exit_code),
    ],
    ids=["page", "half", "no-http", "redirect", "too-large", "no-such-path", "closes"],
)
def test_what_never_was_a_server_of_captions_ends_the_run_in_a_line(
    answer: bytes, says: str, code: int, tmp_path: Path
) -> None:
    with raw(answer) as url:
        result = run(tmp_path / "run", captioner(CaptionServer(url=url), wait_for_server_s=0.2, timeout_s=5))
    assert result.code == code
    assert says in line_of(result)


def test_https_to_a_server_without_it_ends_the_run_at_once(tmp_path: Path) -> None:
    with raw(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        result = run(tmp_path / "run", captioner(CaptionServer(url=url.replace("http:", "https:"))))
    assert result.code == 4
    assert "cannot be reached by TLS" in line_of(result)


@pytest.mark.parametrize("key", ["wrong-secret", "a\nsecret", "sécret", "secret\r\nX-More: 1"])
def test_a_bad_key_is_named_and_not_repeated(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTION_ACCESS", key)
    with serve(CaptionServer(key="right")) as server:
        result = run(tmp_path / "run", captioner(server, api_key_env="CAPTION_ACCESS"))
    assert result.code == 4
    assert "CAPTION_ACCESS" in line_of(result)
    assert "ecret" not in result.err + result.out
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"ecret" in path.read_bytes()]


@pytest.mark.parametrize("url", ["http://", "http:///v1", "https://a b/v1", "http://a:port/v1", "ftp://a/v1"])
def test_an_address_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    result = run(tmp_path / "run", captioner(CaptionServer(url=url)))
    assert result.code == EXIT_USAGE
    assert f"{url!r} is no http or https URL" in result.err
    assert not (tmp_path / "run" / "store").exists()


def test_a_prompt_with_an_unknown_column_says_which_there_are(tmp_path: Path) -> None:
    result = run(tmp_path / "run", captioner(CaptionServer(url="http://a/v1"), prompt="Say {aesthetic}."))
    assert result.code == EXIT_USAGE
    assert "captioners.long.prompt: {aesthetic} is not known; use {caption}, {key}" in line_of(result)
    assert line_of(result).endswith("or add the column to source.keep_columns")


@pytest.mark.slow
def test_answers_are_used_as_they_are_whatever_is_in_them(tmp_path: Path) -> None:
    """Line breaks, quotes, other scripts and control characters are text; what is no text is a reason."""
    texts = ['"Two\nlines"', "né \U0001f98a 狐", "a\x00b", "x" * 200_000, "\ud800 alone", "{caption} %s $HOME"]
    with serve(CaptionServer()) as server:
        order: dict[str, str] = {}

        def caption(asked: Asked) -> str:
            if asked.prompt != "Describe it.":
                return "a fixed one"
            return order.setdefault(asked.number, texts[len(order) % len(texts)])

        server.caption = caption  # type: ignore[method-assign]
        summary = precompute(tmp_path / "run", *SMALL, captioner(server, max_in_flight=1, attempts=1))
    found = {text for caption in captions(tmp_path / "run").values() for text in caption}
    assert "{caption} %s $HOME" in found
    assert "né \U0001f98a 狐" in found
    assert sum(drops(summary).values()) + sum(map(len, captions(tmp_path / "run").values())) == KEYS
