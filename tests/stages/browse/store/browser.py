"""A real browser on a real server; tests that use it are skipped where one is missing."""

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@contextmanager
def served(*paths: Path) -> Iterator[str]:
    """The address of the application over some folders, in a thread of this process."""
    import uvicorn

    from stages.browse.app import make_app
    from stages.browse.command import _listen
    from stages.browse.places import find_places
    from stages.browse.security import Access

    listener = _listen("127.0.0.1", 0)
    access = Access.to("127.0.0.1", listener.getsockname()[1])
    config = uvicorn.Config(
        make_app(find_places([str(p) for p in paths]), access), log_level="critical", lifespan="off"
    )  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield access.url
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


@contextmanager
def chromium() -> Iterator["Browser"]:
    """A headless browser; skips the test with the reason where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched(browser: "Browser", address: str, *, width: int = 1600, dark: bool = False) -> Iterator["Page"]:
    """A page on which there must be no console error, and from which nothing but the server is asked."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if _is_own(request.url, address) else problems.append(request.url))
    page.on("requestfailed", lambda request: problems.append(f"{request.failure}: {request.url}"))
    page.on(
        "response", lambda answer: problems.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
    )
    try:
        yield page
        serious = [
            problem for problem in problems if not problem.startswith("net::ERR_ABORTED")
        ]  # left before its end
        assert not serious, serious
    finally:
        context.close()


def _is_own(url: str, address: str) -> bool:
    return url.startswith((address, "data:"))


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
    """Width and height of each image that has loaded, 0 and 0 of one that has not, one after the other."""
    return page.evaluate(
        "(selector) => [...document.querySelectorAll(selector)].flatMap((i) => [i.naturalWidth, i.naturalHeight])",
        selector,
    )
