"""Real images: from a folder and over HTTP, against Pillow, pixel by pixel."""

import csv
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from imagen_core.store import Store
from tests.runs import pipeline
from tests.workflows.test_precompute import max_difference, pillow_resize

pytestmark = pytest.mark.slow
NUM_IMAGES = 400
"""The first of 2,000; benchmarks.real_images takes all."""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def served(emoji: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(emoji / "images")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.ray
def test_every_pixel_is_within_one_level_of_pillow_and_http_gives_the_same(
    emoji: Path, served: str, tmp_path: Path
) -> None:
    with (emoji / "captions.tsv").open(encoding="utf-8") as table:
        lines = list(islice(table, 1 + NUM_IMAGES))
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    (source / "captions.tsv").write_text("".join(lines), encoding="utf-8")
    for row in rows:
        shutil.copyfile(emoji / "images" / row["file"], source / "images" / row["file"])

    arguments = ["run", "precompute", "shard_size=250", "--quiet"]
    pipeline(
        *arguments, "--out", str(tmp_path / "folder"), "source.kind=folder", f"source.path={source}", timeout_s=600
    )
    folder = Store.open(tmp_path / "folder" / "store")
    assert len(folder) == len(rows) == NUM_IMAGES
    for row, sample in zip(rows, folder, strict=True):
        assert (sample.key, sample.captions) == (row["file"], [row["caption"]])
        data = (emoji / "images" / row["file"]).read_bytes()
        for size in (64, 256):
            assert max_difference(sample.images[size], pillow_resize(data, size)) <= 1, (row["file"], size)

    urls = tmp_path / "urls.csv"
    with urls.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption"])
        writer.writerows([f"{served}/{row['file']}", row["caption"]] for row in rows)
    pipeline(
        *arguments,
        "--out",
        str(tmp_path / "http"),
        "source.kind=urls",
        f"source.path={urls}",
        "source.download.allow_private_addresses=true",
        "store.format=hdf5",
        timeout_s=600,
    )
    http = Store.open(tmp_path / "http" / "store")
    assert len(http) == NUM_IMAGES
    for a, b in zip(folder, http, strict=True):
        assert (a.captions, a.sha256) == (b.captions, b.sha256)
        assert all(np.array_equal(a.images[size], b.images[size]) for size in (64, 256))
        assert all(np.array_equal(x, y) for x, y in zip(a.text["t5"], b.text["t5"], strict=True))
