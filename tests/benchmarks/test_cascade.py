"""Images of a shortly trained demo cascade show captions it has never seen; `make evidence` trains it to the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import REPOSITORY


@pytest.mark.slow
def test_held_out_captions_are_shown_after_two_minutes_of_training(tmp_path: Path) -> None:
    arguments = ["--samples", "2500", "--base-steps", "700", "--sr-steps", "400", "--captions", "100"]
    paths = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "cascade.json")]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.cascade", *arguments, *paths], cwd=REPOSITORY, check=True, timeout=1100
    )
    rows = json.loads((tmp_path / "cascade.json").read_text())["results"]
    own, other, large = rows[:3]
    assert [(r["size_px"], r["caption"]) for r in rows[:3]] == [
        (16, "its own"),
        (16, "of another image"),
        (64, "its own"),
    ]
    assert own["color"] > 0.85 > 0.3 > other["color"]
    assert own["position"] > 0.85 > 0.45 > other["position"]
    assert own["shape"] > other["shape"]
    assert large["color"] > 0.85
    assert large["position"] > 0.85
