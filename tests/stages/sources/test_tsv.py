"""Tab-separated lines with images in base64, as PaddleFleetX trains on."""

import base64
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagen_core.store import Store, verify_store
from pipeline.errors import ConfigError, StaleOutputError
from stages.precompute.resize import ResizeStage
from tests.commands import drops
from tests.images import BLUE, RED, noise_jpeg, plain_png
from tests.runs import precompute, store_bytes

SMALL = ("images.sizes_px=[16]", "encoders=[]", "shard_size=2", "max_drop_fraction=1")


def line(caption: bytes, image: bytes, *, encoded: bool = True) -> bytes:
    """Six fields, as in PaddleFleetX's laion_400M: the third and the fifth are used."""
    data = base64.b64encode(image) if encoded else image
    return b"\t".join([b"id", b"http://x/1.png", caption, b"0.3", data, b"last"])


def source(path: Path, *more: str) -> tuple[str, ...]:
    return ("source.kind=tsv", f"source.path={path}", *SMALL, *more)


def write(path: Path, lines: list[bytes]) -> None:
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("name", ["part-0.tsv", "part-0.tsv.gz"])
def test_captions_and_images_of_all_lines_are_in_the_store(tmp_path: Path, name: str) -> None:
    images = [plain_png((40 * i, 0, 0)) for i in range(5)]
    write(tmp_path / name, [line(f"image {i}".encode(), data) for i, data in enumerate(images)])
    precompute(tmp_path / "run", *source(tmp_path / name, "source.url_field=2"))
    store = Store.open(tmp_path / "run" / "store")
    assert [s.captions for s in store] == [[f"image {i}"] for i in range(5)]
    assert {s.url for s in store} == {"http://x/1.png"}
    for i, sample in enumerate(store):
        assert sample.key.endswith(f"/{i:07d}")
        assert (sample.width, sample.height) == (32, 32)
        np.testing.assert_array_equal(sample.images[16], np.broadcast_to((40 * i, 0, 0), (16, 16, 3)))
    assert verify_store(tmp_path / "run" / "store").ok


def test_other_fields_can_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(base64.b64encode(plain_png(BLUE)) + b"\ta blue square\r\n")
    precompute(tmp_path / "run", *source(tmp_path / "a.tsv", "source.caption_field=2", "source.image_field=1"))
    (sample,) = Store.open(tmp_path / "run" / "store")
    assert sample.captions == ["a blue square"]
    assert tuple(sample.images[16][0, 0]) == BLUE


def test_fields_are_kept_by_the_name_and_type_that_are_given(tmp_path: Path) -> None:
    image = base64.b64encode(plain_png(RED))
    scores = [b"0.25", b"", b"high"]
    (tmp_path / "a.tsv").write_bytes(b"".join(b"id\t\ta\t" + score + b"\t" + image + b"\n" for score in scores))
    kept = "source.keep_columns={score: {field: 4, type: float}, id: {field: 1}}"
    summary = precompute(tmp_path / "run", *source(tmp_path / "a.tsv", kept))
    store = Store.open(tmp_path / "run" / "store")
    assert store.columns == {"score": "float", "id": "text"}
    assert [sample.columns for sample in store] == [{"score": 0.25, "id": "id"}, {"score": None, "id": "id"}]
    assert summary["tally"]["groups"]["samples"]["drops"] == {"unsupported_type": 1}
    assert len(store.where("score < 1")) == 1
    with pytest.raises(StaleOutputError, match="keep_columns"):
        precompute(tmp_path / "run", *source(tmp_path / "a.tsv"))


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ("{width: {field: 4}}", "'width' is a column that the store has by itself"),
        ("{score: {field: 0}}", r"keep_columns\.score\.field"),
        ("{score: {field: 9}}", None),
        ("[score]", "keep_columns"),
    ],
)
def test_fields_that_cannot_be_kept_are_refused_or_dropped(tmp_path: Path, kept: str, says: str | None) -> None:
    (tmp_path / "a.tsv").write_bytes(line(b"a", plain_png(RED)) + b"\n")
    settings = source(tmp_path / "a.tsv", f"source.keep_columns={kept}")
    if says is None:
        assert precompute(tmp_path / "run", *settings)["tally"]["groups"]["samples"]["drops"] == {"missing_fields": 1}
        return
    with pytest.raises(ConfigError, match=says):
        precompute(tmp_path / "run", *settings)


def test_every_bad_line_is_dropped_for_its_own_reason_and_blank_lines_are_none(tmp_path: Path) -> None:
    cut = noise_jpeg()[:2000]
    lines = [
        line(b"good", plain_png()),
        b"",
        b"id\turl\tcaption only",
        line(b"not base64", b"!!!", encoded=False),
        line(b"cut base64", base64.b64encode(plain_png())[:-3], encoded=False),
        line(b"no image", b""),
        line(b"not an image", b"<html>"),
        line(b"cut image", cut),
        line(b"  ", plain_png()),
        line(b"caf\xe9", plain_png()),
        line(b"tiny", plain_png(size_px=1)),
        line("gut \u00fc".encode(), plain_png(RED)),
    ]
    write(tmp_path / "a.tsv", lines)
    precompute(tmp_path / "run", *source(tmp_path / "a.tsv"))
    assert [reason for _, reason in drops(tmp_path / "run")] == [
        "missing_fields",
        "bad_base64",
        "bad_base64",
        "no_image",
        "not_an_image",
        "truncated",
        "empty_caption",
        "invalid_caption",
        "too_small",
    ]
    assert [s.captions[0] for s in Store.open(tmp_path / "run" / "store")] == ["good", "gut \u00fc"]


def test_long_lines_are_read_whole(tmp_path: Path) -> None:
    image = noise_jpeg(1600)
    assert len(image) > 2**21
    write(tmp_path / "a.tsv", [line(b"small", plain_png()), line(b"large", image), line(b"last", plain_png())])
    precompute(tmp_path / "run", *source(tmp_path / "a.tsv"))
    store = Store.open(tmp_path / "run" / "store")
    assert [s.captions[0] for s in store] == ["small", "large", "last"]
    assert store[1].width == 1600


def test_a_file_list_names_the_files_in_its_order(tmp_path: Path) -> None:
    for name in ("b", "a", "unlisted"):
        write(tmp_path / f"part-{name}.gz", [line(name.encode(), plain_png())])
    (tmp_path / "train").write_text(f"part-b.gz\n\n{tmp_path}/part-a.gz\n")
    precompute(tmp_path / "run", *source(tmp_path, f"source.file_list={tmp_path}/train"))
    assert [s.captions[0] for s in Store.open(tmp_path / "run" / "store")] == ["b", "a"]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("part-0.tsv\nmissing.tsv", "missing.tsv does not exist; names are relative to source.path"),
        ("../part-0.tsv", "'../part-0.tsv' is not below source.path="),
        ("/etc/passwd", "'/etc/passwd' is not below source.path="),
        ("part-0.tsv\n./part-0.tsv", "'./part-0.tsv' is listed twice"),
        ("\n", "names no file"),
    ],
)
def test_a_file_list_that_cannot_be_followed_is_refused(tmp_path: Path, listed: str, message: str) -> None:
    write(tmp_path / "part-0.tsv", [line(b"a", plain_png())])
    (tmp_path / "train").write_text(listed)
    with pytest.raises(ConfigError, match=message):
        precompute(tmp_path / "run", *source(tmp_path, f"source.file_list={tmp_path}/train"))


def test_an_empty_or_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"\n\n")
    with pytest.raises(ConfigError, match="holds no lines"):
        precompute(tmp_path / "run", *source(tmp_path / "a.tsv"))
    write(tmp_path / "b.tsv.gz", [line(b"a", noise_jpeg())] * 4)
    (tmp_path / "b.tsv.gz").write_bytes((tmp_path / "b.tsv.gz").read_bytes()[:-3000])
    with pytest.raises(ConfigError, match=r"b.tsv.gz cannot be read to its end"):
        precompute(tmp_path / "run", *source(tmp_path / "b.tsv.gz"))


def test_a_killed_run_goes_on_and_later_files_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.tsv.gz", [line(f"a{i}".encode(), plain_png()) for i in range(5)])
    precompute(tmp_path / "whole", *source(data))
    honest, allowed = ResizeStage.process, iter((True, False))

    def process(stage: ResizeStage, task: Any) -> None:
        if not next(allowed, True):
            raise KeyboardInterrupt
        honest(stage, task)

    monkeypatch.setattr(ResizeStage, "process", process)
    with pytest.raises(KeyboardInterrupt):
        precompute(tmp_path / "run", *source(data))
    assert precompute(tmp_path / "run", *source(data))["tally"]["shards_skipped"] == 1
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "whole")
    write(data / "b.tsv", [line(b"b0", plain_png())])
    precompute(tmp_path / "run", *source(data))
    captions = [s.captions[0] for s in Store.open(tmp_path / "run" / "store")]
    assert captions == [*(f"a{i}" for i in range(5)), "b0"]
    write(data / "b.tsv", [line(b"B0", plain_png())])  # as many bytes
    with pytest.raises(StaleOutputError, match="made from other input rows"):
        precompute(tmp_path / "run", *source(data))
