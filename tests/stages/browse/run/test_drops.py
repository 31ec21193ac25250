"""The dropped rows of a run, by pages."""

import io
import json
import tarfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image

from pipeline.engine.watch import RunWatch
from pipeline.errors import ConfigError
from pipeline.storage.record import Record
from pipeline.storage.run_folder import RunFolder
from stages.browse.run import drops as drops_module
from stages.browse.run.drops import Drops
from tests.object_store import BUCKET, object_store
from tests.pipeline.engine.test_watch import PLAN
from tests.runs import precompute
from tests.stages.browse.clients import client

REASONS = ("http_404", "too_small", "http_404")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """20 shards of 3 drops each, and one excluded sample."""
    run = RunFolder(tmp_path / "run")
    run.storage.write_json("plan.json", PLAN)
    for shard in range(20):
        rows = [
            {"row": row, "key": f"k{shard}-{row}", "reason": reason, "detail": f"Detail {shard * 3 + row}"}
            for row, reason in enumerate(REASONS)
        ]
        write_list(run, "samples", shard, rows)
    write_list(run, "images-16", 4, [{"row": 7, "key": "late", "reason": "source_changed", "detail": ""}])
    return run


def write_list(run: RunFolder, group: str, shard: int, rows: list[dict[str, object]]) -> None:
    run.storage.write_text(run.drops_name(group, f"{shard:05d}"), "".join(json.dumps(row) + "\n" for row in rows))
    reasons = [str(row["reason"]) for row in rows]
    run.write_record(Record(group, shard, "f", "i", 10, 7, {reason: reasons.count(reason) for reason in set(reasons)}))


def keys(page: drops_module.DropsPage) -> list[str]:
    return [row.key for row in page.rows]


def test_pages_follow_each_other_without_gap_or_repetition(run: RunFolder) -> None:
    drops, seen, first = Drops(RunWatch(run.url)), [], 0
    while first is not None:
        page = drops.page(first=first, rows=7)
        assert page.total == 61
        seen += keys(page)
        first = page.next
    assert seen == [f"k{shard}-{row}" for shard in range(20) for row in range(3)] + ["late"]


def test_a_reason_is_counted_without_reading_lists_and_found_in_them(run: RunFolder) -> None:
    page = Drops(RunWatch(run.url)).page(reason="http_404", first=5, rows=4)
    assert (page.total, page.next) == (40, 9)
    assert keys(page) == ["k2-2", "k3-0", "k3-2", "k4-0"]


def test_a_page_reads_only_the_lists_of_its_own_shards(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    drops, read = Drops(RunWatch(run.url)), []
    lines = type(run.storage).read_lines
    monkeypatch.setattr(type(run.storage), "read_lines", lambda self, name: read.append(name) or lines(self, name))
    drops.page(group="samples", first=30, rows=3)
    assert read == ["quarantine/samples/00010.jsonl"]


def test_a_group_that_is_made_of_samples_excludes_them(run: RunFolder) -> None:
    (row,) = Drops(RunWatch(run.url)).page(group="images-16").rows
    assert (row.stage, row.row, row.is_input) == ("resize", 7, False)
    assert Drops(RunWatch(run.url)).page(group="../../etc").total == 0


def test_a_search_looks_at_keys_and_details_and_goes_on_where_it_ended(run: RunFolder) -> None:
    drops = Drops(RunWatch(run.url))
    assert keys(drops.page(text="K11-")) == ["k11-0", "k11-1", "k11-2"]
    assert keys(drops.page(text="detail 59")) == ["k19-2"]
    page = drops.page(text="detail 1", rows=2)
    assert (keys(page), page.is_cut) == (["k0-1", "k3-1"], False)
    assert page.next is not None
    assert keys(drops.page(text="detail 1", first=page.next, rows=2)) == ["k3-2", "k4-0"]


def test_a_search_that_takes_too_long_says_where_it_goes_on(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drops_module, "_SEARCH_S", -1.0)
    page = Drops(RunWatch(run.url)).page(text="late")
    assert (page.rows, page.next, page.is_cut) == ([], 0, True)
    monkeypatch.setattr(drops_module, "_SEARCH_S", 60.0)
    assert keys(Drops(RunWatch(run.url)).page(text="late", first=0)) == ["late"]


def test_rows_of_a_round_are_marked(run: RunFolder) -> None:
    line = {"shard": 2, "row": 0, "reason": "http_404", "source": ["k"]}
    run.storage.write_json_lines("retries/00001-10.jsonl", [line])
    rows = Drops(RunWatch(run.url)).page(rows=60).rows
    assert [row.key for row in rows if row.retried] == ["k2-0"]


def test_a_list_that_is_damaged_or_missing_is_named_and_the_rest_is_shown(run: RunFolder) -> None:
    (run.root / "quarantine/samples/00003.jsonl").write_text('{"row": 0, "key": "k3-0", "reason": "http_404"}\n{"ro')
    (run.root / "quarantine/samples/00005.jsonl").unlink()
    page = Drops(RunWatch(run.url)).page(rows=100)
    assert len(page.rows) == 61 - 2 - 3
    damaged, missing = page.problems
    assert damaged.startswith("quarantine/samples/00003.jsonl: cannot be read: ")
    assert damaged.endswith("; 2 of its 3 rows are not shown")
    assert missing == (
        "quarantine/samples/00005.jsonl: is missing; the next run writes it again; 3 of its 3 rows are not shown"
    )


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def stage_originals(run: RunFolder, shard: int, images: dict[int, bytes]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for row in range(3):
            values = {"key": f"k{shard}-{row}", "url": f"http://h/{row}", "captions": [f"<b>{row}</b>"]}
            add(tar, f"{row:08d}.json", json.dumps({**values, "reason": None, "detail": ""}).encode())
            if row in images:
                add(tar, f"{row:08d}.bin", images[row])
    run.storage.write(f"staging/originals/{shard:05d}.tar", file.getvalue())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_staged_originals_give_url_captions_and_image(run: RunFolder) -> None:
    stage_originals(run, 0, {0: png("red"), 1: b"<svg onload=alert(1)>"})
    drops = Drops(RunWatch(run.url))
    page = drops.page(rows=3)
    assert drops.add_urls(page) is None
    assert [(row.url, row.captions, row.has_image) for row in page.rows] == [
        ("http://h/0", ("<b>0</b>",), True),
        ("http://h/1", ("<b>1</b>",), True),
        ("http://h/2", ("<b>2</b>",), False),
    ]
    browser = client(run.root)
    image = browser.get("/p/1/drops/0/0")
    assert (image.status_code, image.headers["content-type"], image.content) == (200, "image/png", png("red"))
    assert browser.get("/p/1/drops/0/1").status_code == 404  # what may hold scripts is not sent
    assert browser.get("/p/1/drops/0/2").status_code == 404
    assert browser.get("/p/1/drops/99/0").status_code == 404
    assert browser.get("/p/1/drops/x/0").status_code == 404
    text = browser.get("/p/1/drops").text
    assert "&lt;b&gt;0&lt;/b&gt;" in text
    assert "<b>0</b>" not in text


@pytest.mark.parametrize("kind", ["memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_run_on_an_object_store_shows_images_without_a_copy_of_the_tar(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.browse.run.staged._FAR_BLOCK", 4096)
    large = png("red") + bytes(300_000)
    with object_store() if kind == "s3" else nullcontext() as server:
        run = RunFolder(f"s3://{BUCKET}/drops" if kind == "s3" else f"memory://{tmp_path.name}")
        run.storage.write_json("plan.json", PLAN)
        for shard in (0, 1):
            rows = [{"row": row, "key": f"k{shard}-{row}", "reason": "too_small", "detail": ""} for row in range(3)]
            write_list(run, "samples", shard, rows)
            stage_originals(run, shard, {0: large, 2: png("blue")})
        drops = Drops(RunWatch(run.url))
        page = drops.page()
        if server is not None:
            server.requests.clear()
        assert drops.add_urls(page) is None
        assert [row.has_image for row in page.rows] == [True, False, True] * 2
        assert page.unread == 0
        browser = client(run.url)
        assert browser.get("/p/1/drops/1/0").content == large
        assert browser.get("/p/1/drops/1/2").content == png("blue")
        if server is not None:
            assert server.requests.bytes_sent("drops/staging") < 300_000 + 100_000, "one image, and what is around it"


def test_a_tar_that_takes_long_is_read_on_with_the_next_page(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_originals(run, 0, {0: png("red")})
    drops = Drops(RunWatch(run.url))
    monkeypatch.setattr(drops_module, "_STAGED_S", -1.0)
    page = drops.page(rows=3)
    with pytest.raises(ConfigError, match="no source"):
        drops.add_urls(page)
    assert ([row.has_image for row in page.rows], page.unread) == ([False] * 3, 1)
    assert drops.staged.rows(0, -1.0) == ({}, False)
    monkeypatch.setattr(drops_module, "_STAGED_S", 60.0)
    drops.add_urls(page)
    assert [row.has_image for row in page.rows] == [True, False, False]


def test_a_truncated_tar_costs_its_images_alone(run: RunFolder) -> None:
    stage_originals(run, 0, {0: png("red"), 1: png("red")})
    path = run.root / "staging/originals/00000.tar"
    path.write_bytes(path.read_bytes()[:700])
    browser = client(run.root)
    assert "k0-0" in browser.get("/p/1/drops").text
    assert browser.get("/p/1/drops/0/1").status_code == 404


@pytest.mark.slow
def test_urls_of_drops_are_read_from_the_source_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "urls.csv").write_text(
        "url,caption\n" + "".join(f"http://127.0.0.1:9/{i}.jpg,caption {i}\n" for i in range(5))
    )
    out = tmp_path / "run"
    settings = ["source.kind=urls", f"source.path={tmp_path / 'urls.csv'}", "encoders=[]", "images.sizes_px=[16]"]
    precompute(out, *settings, "shard_size=3", "max_drop_fraction=1")
    text = client(out).get("/p/1/drops").text
    assert all(f"http://127.0.0.1:9/{i}.jpg" in text and f"caption {i}" in text for i in range(5))
    (tmp_path / "urls.csv").unlink()
    text = client(out).get("/p/1/drops").text
    assert "URLs are not known: " in text
    assert "5 dropped rows: 1 to 5" in text


def test_of_a_long_source_urls_are_read_when_asked_for(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drops_module, "_FEW_SHARDS", 3)
    drops, read = Drops(RunWatch(run.url)), []

    def add_rows(run: RunFolder, rows: list[dict[str, object]]) -> None:
        read.append(len(rows))
        for row in rows:
            row.update(url="http://h/", captions=None)

    monkeypatch.setattr(drops_module, "add_source_rows", add_rows)
    page = drops.page(group="samples", rows=2)
    assert drops.add_urls(page) == "the source has many shards"
    assert read == []
    assert drops.add_urls(page, wanted=True) is None
    assert (read, page.rows[0].url) == ([2], "http://h/")
