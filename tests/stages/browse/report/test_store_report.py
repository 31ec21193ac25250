import base64
import io
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import call, precompute

SMALL = ("images.sizes_px=[16]", "encoders=[]", "shard_size=4", "max_drop_fraction=1")
CAPTION = "<script>alert(1)</script> & a caption"


def write_folder(folder: Path) -> Path:
    """Six images: two too small, one no image, three good ones of 40 x 20, 20 x 40 and 20 x 20 px."""
    folder.mkdir()
    for name, width, height in (("a", 40, 20), ("b", 8, 9), ("c", 20, 40), ("d", 5, 12), ("e", 20, 20)):
        pixels = np.full((height, width, 3), (10 * width, 255, height), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(CAPTION)
    (folder / "f.png").write_bytes(b"this is text")
    (folder / "f.txt").write_text("no image")
    return folder


def run(tmp_path: Path, *more: str) -> Path:
    out = tmp_path / "run"
    source = f"source={{kind: folder, path: {write_folder(tmp_path / 'images')}}}"
    result = precompute(out, source, *SMALL, *more)
    assert result.code in (0, 3), result.err
    return out


def page_of(out: Path) -> str:
    result = call("report", str(out))
    assert result.code == 0, result.err
    return (out / "report" / "index.html").read_text(encoding="utf-8")


def dropped_rows(page: str) -> dict[str, str]:
    """The table row of each dropped key."""
    part = page[page.index("Dropped samples") : page.index("Throughput by stage")]
    rows = re.findall(r"<tr>.*?</tr>", part, re.DOTALL)
    return {unescape(key[1]): row for row in rows if (key := re.search(r"<td>([a-f]\.png)</td>", row))}


def test_drops_are_listed_by_reason_with_a_thumbnail_where_the_bytes_are_kept(tmp_path: Path) -> None:
    page = page_of(run(tmp_path, "keep_originals=true"))
    rows = dropped_rows(page)
    assert sorted(rows) == ["b.png", "d.png", "f.png"]
    assert page.index("<h3>not_an_image</h3>") < page.index("<h3>too_small</h3>") < page.index("b.png</td>")
    for key, width, height in (("b.png", 8, 9), ("d.png", 5, 12)):
        (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', rows[key])
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert np.array_equal(shown, np.full((height, width, 3), (10 * width, 255, height), np.uint8))
    assert "src=" not in rows["f.png"]
    assert "no image" in rows["f.png"]


def test_without_kept_originals_drops_are_listed_without_images(tmp_path: Path) -> None:
    page = page_of(run(tmp_path))
    assert sorted(dropped_rows(page)) == ["b.png", "d.png", "f.png"]
    assert "src=" not in "".join(dropped_rows(page).values())
    assert "bytes are still in the run folder" not in page


def test_damaged_originals_are_a_line_in_their_place_and_the_rest_is_shown(tmp_path: Path) -> None:
    out = run(tmp_path, "keep_originals=true")
    (damaged, *_) = sorted((out / "staging" / "originals").glob("*.tar"))
    damaged.write_bytes(b"damage" * 500)
    page = page_of(out)
    (line,) = re.findall(r'<p class="error">(.*?)</p>', page)
    assert damaged.name in line
    assert "Traceback" not in page
    assert sorted(dropped_rows(page)) == ["b.png", "d.png", "f.png"]


def test_the_sizes_of_originals_are_histograms(tmp_path: Path) -> None:
    page = page_of(run(tmp_path))
    assert "3 images counted" in page
    titles = re.findall(r"<title>([^<]*: [1-9][0-9,]*)</title>", page)
    assert titles == ["0.46 to 0.50: 1", "1.00 to 1.09: 1", "1.83 to 2.00: 1", "20: 2", "40: 1", "20: 2", "40: 1"] or (
        titles == ["0.50 to 0.55: 1", "1.00 to 1.09: 1", "2.00 to 2.18: 1", "20: 2", "40: 1", "20: 2", "40: 1"]
    )


def test_the_page_is_one_file_whose_data_is_text(tmp_path: Path) -> None:
    page = page_of(run(tmp_path, "keep_originals=true"))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; a caption" in page
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "@import" not in page
    assert "url(" not in page


def test_json_has_the_numbers_and_no_images(tmp_path: Path) -> None:
    out = run(tmp_path, "keep_originals=true")
    report = json.loads(call("report", str(out), "--json").out)
    assert {(drop["reason"], drop["count"]) for drop in report["drops"]} == {("too_small", 2), ("not_an_image", 1)}
    assert [drop["key"] for drop in report["dropped_rows"]] == ["b.png", "d.png", "f.png"]
    assert "base64" not in json.dumps(report)


@pytest.mark.parametrize("workflow", ["sample", "evaluate"])
def test_a_sampling_or_evaluation_is_refused_with_what_shows_it(tmp_path: Path, workflow: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"workflow": workflow, "stages": [], "transient_groups": []}))
    result = call("report", str(tmp_path))
    assert result.code == 2
    assert f"pipeline browse {tmp_path}" in result.err
    assert len(result.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_report_needs_no_package_of_the_server() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('starlette', 'uvicorn', 'duckdb', 'torch')));"
        "from stages.browse.report.command import report_command, templates;"
        "templates().get_template('report/store.html'); templates().get_template('report/training.html')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
