from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runs import REPOSITORY
from tests.stages.browse.browser import chromium, serving
from tests.stages.browse.screenshot import VIEWPORT, take

MOST_BYTES = 300_000


@pytest.mark.slow
def test_the_screenshot_of_the_readme_can_be_made_again(small_run: Path, tmp_path: Path) -> None:
    with serving(small_run) as address, chromium(viewport=VIEWPORT) as page:
        take(page, f"{address}/p/2/", tmp_path / "browse.png")
    made, shown = (Image.open(folder / "browse.png") for folder in (tmp_path, REPOSITORY / "docs"))
    assert made.size == shown.size == (VIEWPORT["width"], VIEWPORT["height"])
    assert len(np.unique(np.asarray(made.convert("RGB")).reshape(-1, 3), axis=0)) > 50, "there are images on it"


def test_the_readme_shows_a_screenshot_of_less_than_300_kb() -> None:
    assert "(docs/browse.png)" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert (REPOSITORY / "docs" / "browse.png").stat().st_size < MOST_BYTES
