"""Every member of a tar is part of a sample, of a counted drop, or ignored by a rule and counted."""

import bz2
import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from imagen_core.store import Store
from pipeline.errors import ConfigError
from stages.sources.tars import WebdatasetConfig, WebdatasetSource
from tests.images import plain_png
from tests.runs import precompute
from tests.stages.sources.reading import outcomes, read_originals, tar_bytes

IMAGE, DEPTH = b"the image", b"its depth"
APPLE = b"\0\5\x16\7\0\2\0\0Mac OS X        "
GOOD = [("0.jpg", IMAGE), ("0.txt", b"zero"), ("1.jpg", IMAGE), ("1.txt", b"one")]


def source(path: Path, **settings: Any) -> WebdatasetSource:
    return WebdatasetConfig(path=str(path), **settings).build()


def source_of(folder: Path, members: list[tuple[str, bytes]], **settings: Any) -> WebdatasetSource:
    (folder / "a.tar").write_bytes(tar_bytes(members))
    return source(folder / "a.tar", **settings)


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


def test_what_systems_leave_in_tars_is_ignored_and_counted(tmp_path: Path) -> None:
    members = [
        *(("._0.jpg", APPLE), ("./0.jpg", IMAGE), ("./._0.txt", APPLE), ("./0.txt", b"zero")),
        *((".DS_Store", b"x"), ("__MACOSX/._1.jpg", APPLE), ("__MACOSX/1.jpg", b"x"), ("a/.git/HEAD", b"x")),
        *(("PaxHeaders.12/0.jpg", b"x"), ("@eaDir/0.jpg", b"x"), ("Thumbs.db", b"x"), ("__meta__", b"{}")),
        *(("./1.jpg", IMAGE), ("./1.txt", b"one")),
    ]
    tar = source_of(tmp_path, members)
    assert outcomes(tar) == {"a/./0": ["zero"], "a/./1": ["one"]}
    assert tar.ignored == {"hidden": 4, "of the operating system": 5, "of webdataset (__NAME__)": 1}


def test_members_of_a_key_that_do_not_follow_each_other_are_one_sample(tmp_path: Path) -> None:
    members = [
        (f"{key:03d}.{suffix}", data) for key in range(50) for suffix, data in [("jpg", IMAGE), ("txt", b"%d" % key)]
    ]
    random.Random(0).shuffle(members)
    found = outcomes(source_of(tmp_path, members), shard_size=7)
    assert found == {f"a/{key:03d}": [str(key)] for key in range(50)}


def test_a_later_sample_of_the_same_key_is_a_duplicate_and_not_joined(tmp_path: Path) -> None:
    tar = source_of(tmp_path, [*GOOD, ("0.jpg", b"another"), ("0.txt", b"again"), ("0.json", b"{}")])
    found = [(original.key, original.reason, original.data) for original in read_originals(tar)]
    assert found == [("a/0", None, IMAGE), ("a/1", None, IMAGE), ("a/0", "duplicate_key", None)]


def test_tars_joined_with_cat_are_read_to_their_end(tmp_path: Path) -> None:
    second = [("2.jpg", IMAGE), ("2.txt", b"two"), ("1.json", b'{"url": "http://x"}')]
    (tmp_path / "a.tar").write_bytes(tar_bytes(GOOD) + tar_bytes([]) + tar_bytes(second))
    found = read_originals(source(tmp_path / "a.tar"))
    assert [(o.key, o.captions, o.url, o.data) for o in found] == [
        ("a/0", ("zero",), None, IMAGE),
        ("a/1", ("one",), "http://x", IMAGE),
        ("a/2", ("two",), None, IMAGE),
    ]


def test_what_is_behind_the_end_of_a_tar_is_a_drop_that_counts_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(GOOD) + b"a signature")
    tar = source(tmp_path / "a.tar")
    assert outcomes(tar) == {"a/0": ["zero"], "a/1": ["one"], "a.tar": "damaged_tar"}
    assert read_originals(tar)[-1].detail == "no tar behind the end mark at byte 4,096; 11 bytes were not read"


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("0.tar.gz", gzip.compress),
        ("0.tgz", gzip.compress),
        ("0.tar", gzip.compress),
        ("0.tar.bz2", bz2.compress),
        ("0.tar.xz", lzma.compress),
        ("0.tar.zst", zstd),
        ("0.tar.gz", lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:])),
        ("0.tar.zst", lambda data: zstd(data[:1000]) + zstd(data[1000:])),
    ],
)
def test_compressed_tars_are_read_whatever_their_name(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / name).write_bytes(compress(tar_bytes(GOOD)))
    found = [(o.key, o.captions, o.data) for o in read_originals(source(tmp_path), shard_size=1)]
    assert found == [("0/0", ("zero",), IMAGE), ("0/1", ("one",), IMAGE)]


@pytest.mark.parametrize("cut", ["header", "data", "garbage", "compressed", "flipped"])
def test_a_damaged_tar_keeps_the_samples_around_the_damage_and_counts_the_rest(tmp_path: Path, cut: str) -> None:
    noise = random.Random(0).randbytes(200_000)
    whole = tar_bytes([*GOOD, ("2.jpg", noise), ("2.txt", b"two"), ("3.jpg", IMAGE), ("3.txt", b"three")])
    behind_first = 8 * 512
    data = {
        "header": whole[: behind_first + 100],
        "data": whole[: behind_first + 1000],
        "garbage": whole[:behind_first] + b"\x7f" * 512 + whole[behind_first + 512 :],
        "compressed": gzip.compress(whole)[:-150_000],
        "flipped": bytes([*whole[: behind_first + 124], 255, *whole[behind_first + 125 :]]),
    }[cut]
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.tar").write_bytes(tar_bytes(GOOD))
    behind = {"a/2": "no_image", "a/3": ["three"]} if cut in ("garbage", "flipped") else {}
    last = {"a/2": "truncated"} if cut in ("data", "compressed") else {"a.tar": "damaged_tar"}
    good = {"a/0": ["zero"], "a/1": ["one"], "b/0": ["zero"], "b/1": ["one"]}
    assert outcomes(source(tmp_path)) == {**good, **behind, **last}


def whole_tar() -> bytes:
    """Ten samples of an image of 1,000 bytes and a caption: 5 blocks each, from byte 0."""
    return tar_bytes(
        [(f"{i}.{suffix}", data) for i in range(10) for suffix, data in (("jpg", b"x" * 1000), ("txt", b"t"))]
    )


SAMPLE = 5 * 512
DAMAGES = {
    "a cut between two members": (lambda tar: tar[: 6 * SAMPLE], range(6), 0),
    "a cut in the padding of the last member": (lambda tar: tar[: 6 * SAMPLE - 100], range(6), 0),
    "a single block of zeros at the end": (lambda tar: tar[: 10 * SAMPLE + 512], range(10), 0),
    "a page of zeros": (
        lambda tar: tar[: 2 * SAMPLE] + bytes(4096) + tar[2 * SAMPLE + 4096 :], (0, 1, 4, 5, 6, 7, 8, 9), 4096
    ),
    "zeros that end at a member": (
        lambda tar: tar[:SAMPLE] + bytes(2 * SAMPLE) + tar[3 * SAMPLE :], (0, 3, 4, 5, 6, 7, 8, 9), 2 * SAMPLE
    ),
    "a bad checksum": (
        lambda tar: tar[: 3 * SAMPLE + 150] + b"9" + tar[3 * SAMPLE + 151 :], (0, 1, 2, 4, 5, 6, 7, 8, 9), 1536
    ),
    "bytes that are gone": (lambda tar: tar[: 3 * SAMPLE] + tar[3 * SAMPLE + 700 :], (0, 1, 2, 4, 5, 6, 7, 8, 9), 836),
    "a tail of zeros": (lambda tar: tar[: 4 * SAMPLE] + bytes(2**21), range(4), 2**21),
    "rubbish behind a second tar": (lambda tar: tar + tar_bytes([]) + b"rubbish", range(10), 7),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
def test_the_end_of_a_tar_is_proven_or_a_drop_counts_the_bytes_that_were_not_read(
    tmp_path: Path, damage: str, compress: Callable[[bytes], bytes]
) -> None:
    change, whole, unread = DAMAGES[damage]
    (tmp_path / "a.tar").write_bytes(compress(change(whole_tar())))
    tar = source(tmp_path / "a.tar")
    found = read_originals(tar)
    assert [o.key for o in found if o.reason is None] == [f"a/{i}" for i in whole]
    (drop,) = [o for o in found if o.reason == "damaged_tar"]
    assert drop.key == "a.tar"
    assert drop.detail.endswith(f"; {unread:,} bytes were not read")


@pytest.mark.parametrize(
    "behind", [b"", bytes(512), bytes(10_240), bytes(2**20 - 20_480), tar_bytes([("10.jpg", IMAGE), ("10.txt", b"x")])]
)
def test_zeros_and_further_tars_behind_the_end_mark_are_no_damage(tmp_path: Path, behind: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(whole_tar() + behind)
    found = read_originals(source(tmp_path / "a.tar"))
    assert [o.reason for o in found] == [None] * (11 if behind.strip(b"\0") else 10)


def test_a_cut_in_a_member_that_is_no_content_is_counted(tmp_path: Path) -> None:
    hidden = tar_bytes([*GOOD, ("._2.jpg", b"x" * 5000)])
    (tmp_path / "a.tar").write_bytes(hidden[: 9 * 512 + 1000])
    assert outcomes(source(tmp_path / "a.tar")) == {"a/0": ["zero"], "a/1": ["one"], "a.tar": "damaged_tar"}


def test_a_member_of_more_bytes_than_allowed_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.sources.tars.MAX_FILE_BYTES", 1000)
    tar = source_of(
        tmp_path, [*GOOD, ("2.jpg", b"x" * 1000), ("2.txt", b"2"), ("3.jpg", b"x"), ("3.txt", b"3" * 1001)]
    )
    assert outcomes(tar) == {"a/0": ["zero"], "a/1": ["one"], "a/2": ["2"], "a/3": "too_large"}
    assert read_originals(tar)[-1].detail == "a member of 1,001 bytes, over 1,000"


def test_a_tar_in_a_tar_is_not_read_while_the_outer_one_is_whole(tmp_path: Path) -> None:
    inner = tar_bytes([("9.jpg", IMAGE), ("9.txt", b"nine")])
    tar = source_of(tmp_path, [*GOOD, ("1.bin", inner)])
    assert outcomes(tar) == {"a/0": ["zero"], "a/1": ["one"]}


def test_a_tar_of_which_nothing_can_be_read_is_a_counted_drop_among_others(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>")
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(tar_bytes(GOOD))
    tars = source(tmp_path)
    tars.check()
    assert outcomes(tars) == {
        "a.tar": "damaged_tar",
        "b.tar": "damaged_tar",
        "c/0": ["zero"],
        "c/1": ["one"],
    }


def test_a_tar_that_may_not_be_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    tar = source_of(tmp_path, GOOD)
    monkeypatch.setattr("stages.sources.records.far.fsspec.open", refuse)
    with pytest.raises(ConfigError, match=r"source.path: .*a.tar cannot be opened: Permission denied; "):
        tar.check()


@pytest.mark.parametrize(
    ("members", "names"),
    [
        ([("0.depth.png", DEPTH), ("0.jpg", IMAGE)], [".depth.png and .jpg", "image_member=depth.png"]),
        ([("0.JPG", IMAGE), ("0.jpg", DEPTH)], [".JPG and .jpg"]),
        ([("0.jpg", IMAGE), ("0.v2.jpg", DEPTH)], [".jpg and .v2.jpg", "key_ends_at=last_dot"]),
        ([("0.jpg", IMAGE), ("0.txt", b"a"), ("0.TXT", b"b")], [".txt and .TXT", "caption_member=txt"]),
    ],
)
def test_an_ambiguous_sample_is_refused_among_the_first_and_dropped_later(
    tmp_path: Path, members: list[tuple[str, bytes]], names: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        source_of(tmp_path, [("8.jpg", IMAGE), ("8.txt", b"8"), *members]).check()
    assert all(name in str(refused.value) for name in ["the sample '0' has ", *names])
    many = [(f"x{i}.{suffix}", b"x") for i in range(600) for suffix in ("jpg", "txt")]
    later = source_of(tmp_path, [*many, *members])
    later.check()
    drop = read_originals(later, 1000)[-1]
    assert (drop.key, drop.reason) == ("a/0", "ambiguous_members")
    assert names[0] in drop.detail


def test_keys_say_which_member_is_image_caption_and_label(tmp_path: Path) -> None:
    members = [
        *(("0.depth.png", DEPTH), ("0.jpg", IMAGE), ("0.long.txt", b"long"), ("0.txt", b"short"), ("0.id.txt", b"7")),
        *(("1.depth.png", DEPTH), ("1.png", IMAGE), ("1.long.txt", b"longer"), ("1.txt", b"short")),
    ]
    tar = source_of(tmp_path, members, image_member="jpg;png", caption_member="long.txt", label_member="id.txt")
    tar.check()
    found = [(o.captions, o.data, o.annotations.get("label")) for o in read_originals(tar)]
    assert found == [(("long",), IMAGE, "7"), (("longer",), IMAGE, "")]
    plain = source_of(tmp_path, members, image_member="jpg;png")
    assert [o.captions for o in read_originals(plain)] == [("short",), ("short",)]
    assert set(tar.fingerprint()) - set(plain.fingerprint()) == {"caption_member", "label_member", "label"}


def test_without_these_keys_the_fingerprint_is_that_of_before(tmp_path: Path) -> None:
    assert source(tmp_path / "a.tar").fingerprint() == {"caption_column": "caption"}


def test_keys_with_dots_lose_no_sample(tmp_path: Path) -> None:
    members = [(f"shot.{i}.{suffix}", b"%d" % i) for i in range(3) for suffix in ("jpg", "txt")]
    with pytest.raises(ConfigError, match=r"the sample 'shot' has .*key_ends_at=last_dot if keys have dots"):
        source_of(tmp_path, members).check()
    whole = source_of(tmp_path, members, key_ends_at="last_dot")
    assert outcomes(whole) == {f"a/shot.{i}": [str(i)] for i in range(3)}
    alone = [(f"{i}.of.{suffix}", b"%d" % i) for i in range(3) for suffix in ("jpg", "txt")]
    assert outcomes(source_of(tmp_path, alone)) == {f"a/{i}": [str(i)] for i in range(3)}


def test_an_image_that_is_not_decoded_gives_way_to_one_that_is(tmp_path: Path) -> None:
    tar = source_of(tmp_path, [("0.exr", DEPTH), ("0.jpg", IMAGE), ("0.txt", b"x"), ("1.heic", b"h"), ("1.txt", b"y")])
    assert [o.data for o in read_originals(tar)] == [IMAGE, b"h"]


@pytest.mark.parametrize("name", ["set [v1] {a,b}", "{unbalanced", "a*b?"])
def test_a_path_that_exists_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "part[0].tar").write_bytes(tar_bytes(GOOD))
    (folder / "01.tar").write_bytes(tar_bytes(GOOD))
    rows = {"0": ["zero"], "1": ["one"]}
    first, second = ({f"{tar}/{key}": caption for key, caption in rows.items()} for tar in ("01", "part[0]"))
    assert outcomes(source(folder / "part[0].tar")) == second
    assert outcomes(source(folder)) == {**first, **second}
    assert outcomes(source(folder / "0?.tar")) == first


def test_a_range_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        source(tmp_path / "{0.tar").check()


def test_a_run_counts_what_it_ignored_and_what_it_could_not_read(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.tar").write_bytes(tar_bytes([("._0.png", APPLE), ("0.png", plain_png()), ("0.txt", b"red")]))
    (data / "._a.tar").write_bytes(APPLE)
    (data / "b.tar").write_bytes(tar_bytes([]) + b"rubbish")
    (data / "list.json").write_bytes(b"{}")
    settings = ("source.kind=webdataset", f"source.path={data}", "images.sizes_px=[16]", "encoders=[]")
    for _ in range(2):
        summary = precompute(tmp_path / "run", *settings)
        assert summary["ignored"] == {".json files": 1, "hidden": 2}
        assert summary["unread_bytes"] == 7
        assert summary["tally"]["groups"]["samples"]["drops"] == {"damaged_tar": 1}
    assert [sample.key for sample in Store.open(tmp_path / "run" / "store")] == ["a/0"]
