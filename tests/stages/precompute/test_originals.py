"""The staged tar of a shard keeps every row, whatever came."""

import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from stages.precompute.originals import OriginalsReader, OriginalsWriter
from stages.sources.base import Original
from tests.images import animation, noise_jpeg, plain_png

ORIGINALS = [
    Original(0, "a", "http://example.org/a", ("one", "two"), plain_png()),
    Original(1, "../../b\0\udcff", None, ("خط 🐈", "caf\udce9"), noise_jpeg()),
    Original(2, "404", "http://example.org/c", ("x",), None, "http_404", "HTTP Error 404: Not Found"),
    Original(3, "empty", None, (), b""),
    Original(4, "gif", None, ("x",), animation("GIF")),
    Original(5, "webp", None, ("x",), animation("WEBP")),
    Original(6, "text", None, ("x",), b"<html>"),
    Original(12345678, "far", None, ("x",), b"\0" * 3000),
]
SHUFFLED = [ORIGINALS[i] for i in (4, 7, 0, 2, 6, 1, 5, 3)]


def write(path: Path, originals: list[Original]) -> Path:
    with OriginalsWriter(path) as writer:
        for original in originals:
            writer.write(original)
    return path


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write(tmp_path / "00000.tar", SHUFFLED)


def test_every_row_comes_back_in_row_order_whatever_order_it_came_in(tar: Path) -> None:
    with OriginalsReader(tar) as reader:
        found = [Original(e.row, e.key, e.url, e.captions, reader.data(e), e.reason, e.detail) for e in reader.entries]
    dropped = Original(2, "404", "http://example.org/c", ("x",), b"", "http_404", "HTTP Error 404: Not Found")
    assert found == [*ORIGINALS[:2], dropped, *ORIGINALS[3:]]


def test_images_can_be_read_in_any_order(tar: Path) -> None:
    with OriginalsReader(tar) as reader:
        by_key = {entry.key: entry for entry in reader.entries}
        for original in reversed(ORIGINALS):
            assert reader.data(by_key[original.key]) == (original.data or b"")


def test_the_tar_is_plain_webdataset(tar: Path) -> None:
    samples = {sample["__key__"]: sample for sample in wds.WebDataset(str(tar), shardshuffle=False)}
    assert sorted(samples) == [f"{original.row:08d}" for original in ORIGINALS]
    assert samples["00000000"]["png"] == plain_png()
    assert b"HTTP Error 404" in samples["00000002"]["json"]


def test_members_have_the_suffix_of_their_bytes_and_never_a_name_from_outside(tar: Path) -> None:
    with tarfile.open(tar) as archive:
        names = sorted(archive.getnames())
    images = [name for name in names if not name.endswith(".json")]
    assert images == [
        "00000000.png",
        "00000001.jpg",
        "00000003.bin",
        "00000004.gif",
        "00000005.webp",
        "00000006.bin",
        "12345678.bin",
    ]
    assert len(names) == len(ORIGINALS) + len(images)


def test_the_same_rows_make_the_same_bytes(tar: Path, tmp_path: Path) -> None:
    assert write(tmp_path / "again.tar", SHUFFLED).read_bytes() == tar.read_bytes()


def test_a_shard_without_rows_is_an_empty_tar(tmp_path: Path) -> None:
    with OriginalsReader(write(tmp_path / "00000.tar", [])) as reader:
        assert reader.entries == []
