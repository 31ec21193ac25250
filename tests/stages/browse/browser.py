"""The application in a real browser: Chromium through Playwright, where both are installed."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from stages.browse.app import make_app
from stages.browse.places import find_places
from stages.browse.security import Access

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def serving(*paths: str | os.PathLike[str]) -> Iterator[str]:
    """Serves pages about some folders from a thread; gives the address, without a slash at its end."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    access = Access.to("127.0.0.1", listener.getsockname()[1])
    app = make_app(find_places([os.fspath(path) for path in paths]), access)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield access.url.rstrip("/")
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def chromium(**options: Any) -> Iterator[Any]:
    """A Playwright page. At the end: nothing was an error on the console, and nothing was asked of another server.

    Answers of 400 and more, which the console calls errors, are not: a test that expects one asserts it.

    Args:
        options: of the browser's context, such as `viewport` or `color_scheme`.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    errors: list[str] = []
    elsewhere: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(**options).new_page()
        page.on("console", lambda message: errors.append(message.text) if _is_error(message) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: elsewhere.append(request.url) if not _is_ours(request.url) else None)
        yield page
        browser.close()
    assert errors == []
    assert elsewhere == []


def _is_error(message: Any) -> bool:
    return message.type == "error" and not message.text.startswith("Failed to load resource: the server responded")


def _is_ours(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:"))
