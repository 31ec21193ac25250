"""The application in a real browser: Chromium through Playwright, where both are installed."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from stages.browse.app import make_app
from stages.browse.places import find_places
from stages.browse.security import Access

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_LEFT = "net::ERR_ABORTED"
"""Of a request whose page was left before its end."""
_REFUSED = "Failed to load resource: the server responded"


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
        listener.close()


@contextmanager
def started_chromium() -> Iterator["Browser"]:
    """A headless browser; skips the test with the reason where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched(
    browser: "Browser", address: str, *, width: int = 1600, dark: bool = False, answered: bool = True, **options: Any
) -> Iterator["Page"]:
    """A page on which there must be no console error, and from which nothing but the server is asked.

    Args:
        answered: every answer must be a good one, as well; else a test that expects another one asserts it.
        options: of the browser's context.
    """
    usual = {"viewport": {"width": width, "height": 900}, "color_scheme": "dark" if dark else "light"}
    context = browser.new_context(**{"reduced_motion": "reduce", **usual, **options})
    page = context.new_page()
    page.set_default_timeout(60_000)
    found: list[str] = []
    page.on("console", lambda message: found.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith((address, "data:")) else found.append(request.url)
    )
    page.on("requestfailed", lambda request: found.append(f"{request.failure}: {request.url}"))
    if answered:
        page.on("response", lambda each: found.append(f"{each.status} {each.url}") if each.status >= 400 else None)
    try:
        yield page
        accepted = (_LEFT,) if answered else (_LEFT, _REFUSED)
        assert [each for each in found if not each.startswith(accepted)] == []
    finally:
        context.close()


@contextmanager
def chromium(**options: Any) -> Iterator["Page"]:
    """The page of `watched` in a browser of its own, with `options` of its context."""
    with started_chromium() as browser, watched(browser, "http://127.0.0.1:", answered=False, **options) as page:
        yield page


def fits(page: "Page") -> bool:
    """Whether nothing is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def contrast(page: "Page", selector: str = "main") -> float:
    """The contrast of text to its page, 1 to 21, as WCAG defines it."""
    script = """(selector) => {
        const parts = (text) => text.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255);
        const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const weights = [0.2126, 0.7152, 0.0722];
        const light = (text) => parts(text).map(linear).reduce((sum, v, i) => sum + v * weights[i], 0);
        const color = getComputedStyle(document.querySelector(selector)).color;
        const back = getComputedStyle(document.body).backgroundColor;
        const [dark, bright] = [light(color), light(back)].sort((a, b) => a - b);
        return (bright + 0.05) / (dark + 0.05);
    }"""
    return page.evaluate(script, selector)


def tab_to(page: "Page", wanted: str, most: int = 120) -> None:
    """Presses Tab until the focus is on an element that matches a selector."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("(wanted) => document.activeElement.matches(wanted)", wanted):
            return
    raise AssertionError(f"{most} presses of Tab do not reach {wanted}")


def pixels_shown(page: "Page", selector: str) -> Sequence[int]:
    """Width and height of each image once it has loaded, 0 and 0 of one that cannot, one after the other."""
    return page.evaluate(
        """async (selector) => {
            const images = [...document.querySelectorAll(selector)];
            for (const image of images) image.loading = "eager";
            await Promise.all(images.map((image) => image.decode().catch(() => null)));
            return images.flatMap((image) => [image.naturalWidth, image.naturalHeight]);
        }""",
        selector,
    )
