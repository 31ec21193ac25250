"""Makes the screenshot of the README: the grid of a store of the demo's scenes, searched.

    python -m tests.stages.browse.screenshot docs/browse.png
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.runs import precompute
from tests.stages.browse.browser import chromium, serving

VIEWPORT = {"width": 1200, "height": 760}
SCENES = ("source.num_samples=240", "images.sizes_px=[64]", "shard_size=120", "source.seed=0")


def main(out: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "scenes"
        precompute(run, *SCENES)
        with serving(run) as address, chromium(viewport=VIEWPORT) as page:
            take(page, f"{address}/p/2/", Path(out))


def take(page: Any, store: str, out: Path) -> None:
    """Opens a store's page, searches for "red" by keyboard, and writes a PNG of what is then seen."""
    page.goto(store)
    page.keyboard.press("/")
    page.keyboard.type("red")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=red**")
    page.wait_for_function("[...document.querySelectorAll('.grid img')].slice(0, 8).every((i) => i.naturalWidth > 0)")
    page.screenshot(path=str(out))


if __name__ == "__main__":
    main(sys.argv[1])
