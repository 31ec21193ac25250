"""The writing in an image, as a source describes it, reaches the store and the batches of training."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from imagen_core.store import Store, read_samples
from imagen_core.train.data.stream import random_views
from pipeline.errors import ConfigError, StaleOutputError
from tests.commands import call, drops
from tests.image_server import body, serve
from tests.imagen_core.train.small import make_config
from tests.images import BLUE, RED, plain_png
from tests.runs import precompute, store_bytes

SIZE = ["images.sizes_px=[16]", "encoders=[]"]
COLUMN = "source.transcription_column=written"
ROWS = [
    {"file": "a.png", "caption": "a sign", "written": "STOP\n  here é"},
    {"file": "b.png", "caption": "a wall", "written": ""},
    {"file": "c.png", "caption": "a door", "written": None},
]
IMAGES = {"a.png": plain_png(RED), "b.png": plain_png(BLUE), "c.png": plain_png((1, 2, 3))}
EXPECTED = {"a sign": "STOP\n  here é", "a wall": "", "a door": None}


def folder(root: Path, rows: list[dict] = ROWS) -> Path:
    root.mkdir()
    for name, data in IMAGES.items():
        (root / name).write_bytes(data)
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def transcriptions(run: Path) -> dict[str, str | None]:
    return {sample.captions[0]: sample.transcription for sample in Store.open(run / "store")}


def test_a_folders_table_brings_transcriptions(tmp_path: Path) -> None:
    source = ["source.kind=folder", f"source.path={folder(tmp_path / 'data')}", COLUMN]
    precompute(tmp_path / "run", *source, *SIZE)
    assert transcriptions(tmp_path / "run") == EXPECTED
    store = Store.open(tmp_path / "run" / "store")
    (batch,) = store.loader(3, transcriptions=True, shuffle=False)
    assert batch["transcriptions"] == ["STOP\n  here é", "", ""], "not known is none"
    (batch,) = store.loader(3)
    assert "transcriptions" not in batch
    shown = call("inspect", str(tmp_path / "run"), "--key", "a.png").out
    assert r"transcription 'STOP\n  here é'" in shown


def test_a_url_list_brings_transcriptions(tmp_path: Path) -> None:
    with serve({f"/{name}": body(data) for name, data in IMAGES.items()}) as server:
        rows = [{"url": server.url(f"/{row['file']}"), **row} for row in ROWS]
        (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = ["source.kind=urls", f"source.path={tmp_path / 'l.jsonl'}", COLUMN]
        precompute(tmp_path / "run", *source, *SIZE, "source.download.allow_private_addresses=true")
    assert transcriptions(tmp_path / "run") == EXPECTED


def test_a_parquet_column_brings_transcriptions(tmp_path: Path) -> None:
    rows = [{"image": IMAGES[row["file"]], **row} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    source = ["source.kind=parquet", f"source.path={tmp_path / 'p.parquet'}", *SIZE]
    precompute(tmp_path / "run", *source, COLUMN)
    assert transcriptions(tmp_path / "run") == EXPECTED
    with pytest.raises(StaleOutputError, match="transcription: written -> "):
        precompute(tmp_path / "run", *source)


def test_a_tars_json_brings_transcriptions(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for row in ROWS:
            stem = row["file"].removesuffix(".png")
            for name, data in ((f"{stem}.json", json.dumps(row).encode()), (f"{stem}.png", IMAGES[row["file"]])):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    precompute(tmp_path / "run", "source.kind=webdataset", f"source.path={tmp_path / 't.tar'}", COLUMN, *SIZE)
    assert transcriptions(tmp_path / "run") == EXPECTED


def test_without_the_column_a_store_has_the_bytes_it_always_had(tmp_path: Path) -> None:
    source = ["source.kind=folder", f"source.path={folder(tmp_path / 'data')}", *SIZE]
    precompute(tmp_path / "run", *source)
    assert transcriptions(tmp_path / "run") == dict.fromkeys(EXPECTED)
    names = pq.read_schema(tmp_path / "run" / "store" / "samples" / "00000.parquet").names
    assert names == ["key", "captions", "caption_ids", "url", "sha256", "width", "height", "input_row"]
    before = store_bytes(tmp_path / "run")
    with pytest.raises(StaleOutputError, match="other input rows"):
        precompute(tmp_path / "run", *source, COLUMN)
    assert store_bytes(tmp_path / "run") == before
    precompute(tmp_path / "run", *source, COLUMN, restart=True)
    assert transcriptions(tmp_path / "run") == EXPECTED


def test_text_that_is_not_utf8_is_a_counted_drop(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", [])
    (data / "captions.jsonl").unlink()
    lines = [b"file\tcaption\twritten", b"a.png\ta sign\tcaf\xe9", b"b.png\ta wall\tfine"]
    (data / "captions.tsv").write_bytes(b"\n".join(lines))
    limit = "max_drop_fraction=0.9"
    precompute(tmp_path / "run", "source.kind=folder", f"source.path={data}", COLUMN, *SIZE, limit)
    assert transcriptions(tmp_path / "run") == {"a wall": "fine"}
    drop = json.loads((tmp_path / "run" / "quarantine" / "samples" / "00000.jsonl").read_text())
    assert (drop["key"], drop["reason"], drop["detail"]) == ("a.png", "invalid_transcription", "not UTF-8")


def test_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    data = folder(tmp_path / "data")
    source = ["source.kind=folder", f"source.path={data}", *SIZE]
    with pytest.raises(ConfigError, match=r"source.transcription_column: .* no column 'text'; it has: file, caption"):
        precompute(tmp_path / "run", *source, "source.transcription_column=text")
    (data / "captions.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"source.transcription_column: 'written' is a column of a captions table"):
        precompute(tmp_path / "run", *source, COLUMN)


def test_the_rectangle_around_the_writing_is_stored_in_whole_pixels(tmp_path: Path) -> None:
    boxes = ["1.5, 2, 10,20.1", "[3,4,5,6]", None]
    rows = [{"image": IMAGES[row["file"]], "box": box, **row} for row, box in zip(ROWS, boxes, strict=True)]
    rows.append({"image": IMAGES["a.png"], "caption": "bad", "box": "1,2,3"})
    rows.append({"image": IMAGES["a.png"], "caption": "turned round", "box": "5,2,3,9"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    listed = [{**row, "box": [3.0, 4.5, 5, 6]} for row in rows[:1]]
    pq.write_table(pa.Table.from_pylist(listed), tmp_path / "q.parquet")
    for name, expected in (
        ("p", [(1, 2, 10, 21), (3, 4, 5, 6), None]),
        ("q", [(3, 4, 5, 6)]),
    ):
        run = tmp_path / f"run-{name}"
        source = ["source.kind=parquet", f"source.path={tmp_path / name}.parquet", "source.safebox_column=box"]
        precompute(run, *source, *SIZE, "max_drop_fraction=0.9")
        assert [sample.safebox for sample in Store.open(run / "store")] == expected
    assert [reason for _, reason in drops(tmp_path / "run-p")] == ["invalid_safebox", "invalid_safebox"]
    shown = call("inspect", str(tmp_path / "run-q"), "--key", "q/0000000").out
    assert "safebox    (3, 4, 5, 6)" in shown


def test_a_transcription_is_removed_with_its_sample(tmp_path: Path) -> None:
    source = ["source.kind=folder", f"source.path={folder(tmp_path / 'data')}", COLUMN, "keep_originals=true"]
    precompute(tmp_path / "run", *source, *SIZE)
    assert call("remove", str(tmp_path / "run"), "--key", "a.png", "--compact").code == 0
    erased, *kept = read_samples(next((tmp_path / "run" / "store" / "samples").iterdir()))
    assert erased.transcription is None
    assert [row.transcription for row in kept] == ["", None]
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"STOP" in path.read_bytes()]


def test_random_views_in_training_show_the_writing_whole(tmp_path: Path) -> None:
    """A red bar with a margin in its safebox: if a view divides the box, red is at an edge of it."""
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for name, (width, height), (left, top) in (("a", (300, 200), (90, 20)), ("b", (160, 240), (30, 150))):
        image = Image.new("RGB", (width, height), "white")
        image.paste((255, 0, 0), (left + 20, top + 20, left + 80, top + 40))
        image.save(data / f"{name}.png")
        rows.append({"file": f"{name}.png", "caption": name, "text": "IIII", "box": [left, top, left + 100, top + 60]})
    (data / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edges = {}
    for columns in (["source.transcription_column=text", "source.safebox_column=box"], []):
        run = tmp_path / f"run{len(columns)}"
        precompute(run, "source.kind=folder", f"source.path={data}", "images.sizes_px=[96]", "encoders=[]", *columns)
        config = make_config(
            run / "store", views={"resized_crop": {"from_px": 96, "min_scale": 0.2}, "horizontal_flip": True}
        )
        loader = Store.open(run / "store").loader(2, [16], crop=random_views(config))
        views = torch.cat([batch["images"][16] for _ in range(100) for batch in loader])
        assert len(views) == 200
        assert (views[:, 1] < 128).flatten(1).any(1).all() == bool(columns)
        at_edge = torch.stack([views[:, 1, 0], views[:, 1, -1], views[:, 1, :, 0], views[:, 1, :, -1]])
        edges[bool(columns)] = int((at_edge < 200).any(0).any(-1).sum())
    assert edges[True] == 0
    assert edges[False] > 20, "which is the safebox's doing"
