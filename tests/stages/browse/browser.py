"""The pages in a real browser: headless Chromium through playwright. Tests skip where either is missing."""

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import pytest
import uvicorn

from stages.browse.app import make_app
from stages.browse.command import _listen
from stages.browse.places import find_places
from stages.browse.security import Access

if TYPE_CHECKING:
    from playwright.sync_api import Page

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def served(*paths: str | os.PathLike[str]) -> Iterator[str]:
    """The address of a server over some folders, on a free port of this machine."""
    listener = _listen("127.0.0.1", 0)
    access = Access.to("127.0.0.1", listener.getsockname()[1])
    app = make_app(find_places([os.fspath(path) for path in paths]), access)
    config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield access.url
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def browser_page(
    address: str, *, width: int = 1200, scheme: Literal["dark", "light"] = "light", allowed: Sequence[str] = ()
) -> Iterator["Page"]:
    """A page of a new browser at an address. At the end there was no error in its console, and no request but to the
    server.

    Args:
        allowed: parts of messages of the console that may be there.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    executable = next(filter(None, map(shutil.which, _NAMES)), None)
    if executable is None:
        pytest.skip("needs chromium on the PATH")
    messages: list[str] = []
    requests: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: messages.append(f"error: {error}"))
            page.on("request", lambda request: requests.append(request.url))
            page.set_default_timeout(60_000)
            page.goto(address)
            yield page
        finally:
            browser.close()
    assert [text for text in messages if not any(part in text for part in allowed)] == []
    hosts = {urlsplit(url).netloc for url in requests if urlsplit(url).scheme != "data"}
    assert hosts == {urlsplit(address).netloc}


def is_wider_than_window(page: "Page") -> bool:
    """Whether the page, not only a part of it, has to be scrolled sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def tab_to(page: "Page", selector: str, most: int = 60) -> None:
    """Presses Tab until the element has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} is not reached by {most} times Tab")
