"""Whatever the internet and the disk hold: a bad row is a counted drop, and the others are unharmed."""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.store import Sample, Store
from tests.commands import Result, call, drops, precompute, summary, tree
from tests.image_server import body, closed_port_url, hang_up, redirect, serve, silence, status
from tests.images import BLUE, RED, animation, bomb_png, noise_jpeg, plain_png
from tests.stages.sources.reading import tar_bytes

SIZE = 16
BASE = (f"images.sizes_px=[{SIZE}]", "max_drop_fraction=1", "execution.num_cpus=1")
NO_TEXT = (*BASE, "encoders=[]")


@dataclass(frozen=True)
class Run:
    """A finished run, and what was around it."""

    folder: Path
    result: Result
    dropped: dict[str, str]
    """Key -> reason."""
    samples: dict[str, Sample]


def finished(folder: Path, result: Result) -> Run:
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    store = Store.open(folder / "store")
    return Run(folder, result, dict(drops(folder)), {sample.key: sample for sample in store})


def assert_counts_add_up(run: Run, rows: int) -> None:
    """Every input row is a sample or a listed, counted drop."""
    found = summary(run.folder)
    dropped = drops(run.folder)
    assert found["tally"]["input_rows"] == rows
    assert found["num_samples"] == len(run.samples) == rows - len(dropped)
    assert found["tally"]["groups"]["samples"]["rows"] == len(run.samples)
    assert found["tally"]["groups"]["samples"]["drops"] == dict(Counter(reason for _, reason in dropped))
    assert found["tally"]["shards_failed"] == 0


def assert_plain(pixels: np.ndarray, colour: tuple[int, int, int]) -> None:
    assert pixels.shape == (SIZE, SIZE, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= 1


# ---- URLs ----

LONG = "word " * 20_000
RIGHT_TO_LEFT = "\u200fخط عربي\u200e and English"
EMOJI = "a cat 🐈\u200d⬛ and a flag 🇨🇭"


def url_rows(base: str, refused: str) -> list[tuple[bytes, str, bytes, str | None]]:
    """(key, url, caption, drop reason or None)."""
    rows: list[tuple[str | bytes, str, str | bytes, str | None]] = [
        ("good", f"{base}/good.png", "a red square", None),
        ("404", f"{base}/missing.png", "x", "http_404"),
        ("500", f"{base}/500", "x", "http_500"),
        ("refused", refused, "x", "connection_refused"),
        ("silent", f"{base}/silent", "x", "timeout"),
        ("hang-up", f"{base}/hang-up", "x", "connection_reset"),
        ("short-body", f"{base}/short", "x", "incomplete"),
        ("loop", f"{base}/loop", "x", "redirect_loop"),
        ("to-file", f"{base}/to-file", "x", "http_302"),
        ("to-good", f"{base}/to-good", "x", None),
        ("robots", f"{base}/robots", "x", "robots_disallowed"),
        ("html", f"{base}/page.jpg", "x", "not_an_image"),
        ("cut", f"{base}/cut.jpg", "x", "truncated"),
        ("tiny", f"{base}/tiny.png", "x", "too_small"),
        ("bomb", f"{base}/bomb.png", "x", "too_many_pixels"),
        ("empty", f"{base}/empty", "x", "empty_file"),
        ("gif", f"{base}/a.gif", "x", None),
        ("webp", f"{base}/a.webp", "x", None),
        ("no-caption", f"{base}/never", "", "empty_caption"),
        ("blank-caption", f"{base}/never", " \t\n\x00 ", "empty_caption"),
        ("long-caption", f"{base}/good.png", LONG, None),
        ("nul-caption", f"{base}/good.png", "a\0red\nsquare", None),
        ("emoji", f"{base}/good.png", EMOJI, None),
        ("right-to-left", f"{base}/good.png", RIGHT_TO_LEFT, None),
        ("latin-1", f"{base}/never", b"caf\xe9", "invalid_caption"),
        ("quotes", f"{base}/good.png", 'the sign says "stop, now"', None),
        ("file-url", "file:///etc/passwd", "x", "invalid_url"),
        ("ftp-url", "ftp://127.0.0.1/x.png", "x", "invalid_url"),
        ("empty-url", "", "x", "invalid_url"),
        ("no-scheme", "127.0.0.1/x.png", "x", "invalid_url"),
        ("bracket-url", "http://[::1/x.png", "x", "invalid_url"),
        ("space-url", f"{base}/a b.png", "x", None),
        ("nul-url", f"{base}/a\0b.png", "x", "invalid_url"),
        ("accent-url", f"{base}/é.png", "x", None),
        (b"key-\xff", f"{base}/good.png", "x", "invalid_key"),
        ("../../escape", f"{base}/good.png", "x", None),
        ("/absolute", f"{base}/good.png", "x", None),
        ("good", f"{base}/never", "the key came before", "duplicate_key"),
        ("last", f"{base}/blue.png", "a blue square", None),
    ]
    return [(_bytes(key), url, _bytes(caption), reason) for key, url, caption, reason in rows]


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def routes() -> dict:
    jpeg = noise_jpeg()
    return {
        "/good.png": body(plain_png(RED)),
        "/blue.png": body(plain_png(BLUE)),
        "/500": status(500),
        "/silent": silence,
        "/hang-up": hang_up,
        "/short": body(jpeg[:1000], claimed=len(jpeg)),
        "/loop": redirect("/loop"),
        "/to-file": redirect("file:///etc/passwd"),
        "/to-good": redirect("/good.png"),
        "/robots": body(plain_png(), X_Robots_Tag="noai"),
        "/page.jpg": body(b"<!doctype html><title>Gone</title>"),
        "/cut.jpg": body(jpeg[: len(jpeg) // 2]),
        "/tiny.png": body(plain_png(size_px=1)),
        "/bomb.png": body(bomb_png()),
        "/empty": body(b""),
        "/a.gif": body(animation("GIF")),
        "/a.webp": body(animation("WEBP")),
        "/a%20b.png": body(plain_png(RED)),
        "/%C3%A9.png": redirect("/\u00c3\u00a9.png?again"),  # its bytes are UTF-8
        "/%C3%A9.png?again": body(plain_png(RED)),
    }


def write_csv(path: Path, rows: list[tuple[bytes, str, bytes, str | None]]) -> None:
    lines = [b"key,url,caption"]
    for key, url, caption, _ in rows:
        lines.append(b",".join(b'"' + cell.replace(b'"', b'""') + b'"' for cell in (key, url.encode(), caption)))
    path.write_bytes(b"\n".join(lines) + b"\n")


@dataclass(frozen=True)
class UrlRun(Run):
    expected: dict[str, str | None]
    rows: int
    outside: set[str]
    """Files that appeared anywhere but in the run folder."""
    temporary: set[str]
    """Files left in the folder for temporary files, but for the lock that this process holds there until it ends."""
    never_asked: int
    overrides: tuple[str, ...]


@pytest.fixture(scope="module")
def url_run(tmp_path_factory: pytest.TempPathFactory) -> UrlRun:
    """One run over every bad URL."""
    root = tmp_path_factory.mktemp("urls")
    for name in ("data", "cwd", "tmp"):
        (root / name).mkdir()
    with serve(routes()) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "cwd")
        patch.setattr("tempfile.tempdir", str(root / "tmp"))
        patch.setenv("no_proxy", "127.0.0.1")
        rows = url_rows(server.url(""), closed_port_url())
        write_csv(root / "data" / "list.csv", rows)
        before = tree(root)
        overrides = (
            "source.kind=urls",
            f"source.path={root / 'data' / 'list.csv'}",
            "source.key_column=key",
            "source.download.timeout_s=1",
            "source.download.retries=0",
            "source.download.allow_private_addresses=true",
            "shard_size=25",
            *BASE,
        )
        result = call("run", "precompute", "--out", str(root / "run"), "--executor", "inline", *overrides)
        never_asked = server.requests["/never"]
    done = finished(root / "run", result)
    added = tree(root) - before
    return UrlRun(
        done.folder,
        done.result,
        done.dropped,
        done.samples,
        expected={key.decode("utf-8", "surrogateescape"): reason for key, _, _, reason in rows[:-2] + rows[-1:]},
        rows=len(rows),
        outside={name for name in added if not name.startswith(("run/", "tmp/"))},
        temporary={name for name in added if name.startswith("tmp/") and not name.endswith("/lock")},
        never_asked=never_asked,
        overrides=overrides,
    )


@pytest.mark.slow
def test_every_bad_url_is_dropped_for_its_own_reason(url_run: UrlRun) -> None:
    expected = {key: reason for key, reason in url_run.expected.items() if reason is not None}
    assert {**url_run.dropped, "good": None} == {**expected, "good": None}
    assert sorted(url_run.samples) == sorted(key for key, reason in url_run.expected.items() if reason is None)


def test_the_second_row_of_a_key_is_the_one_dropped(url_run: UrlRun) -> None:
    assert [reason for key, reason in drops(url_run.folder) if key == "good"] == ["duplicate_key"]
    assert url_run.samples["good"].captions == ["a red square"]


def test_each_drop_says_why(url_run: UrlRun) -> None:
    lines = [
        json.loads(line)
        for path in sorted((url_run.folder / "quarantine" / "samples").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    details = {line["key"]: line["detail"] for line in lines}
    assert details["tiny"] == f"1 x 1 px, {SIZE} needed"
    assert details["bomb"] == "30000 x 30000 is over 100000000 pixels"
    assert "404" in details["404"]
    assert details["file-url"] == "only http and https URLs are fetched"
    assert {line["key"]: line["row"] for line in lines}["nul-url"] == 32 - 25, "the row within its shard"


def test_bad_urls_harm_no_other_row(url_run: UrlRun) -> None:
    samples = url_run.samples
    for key in ("good", "to-good", "long-caption", "quotes", "../../escape", "/absolute", "space-url", "accent-url"):
        assert_plain(samples[key].images[SIZE], RED)
        assert samples[key].sha256 == hashlib.sha256(plain_png(RED)).hexdigest()
        assert (samples[key].width, samples[key].height) == (32, 32)
    assert_plain(samples["last"].images[SIZE], BLUE)
    assert samples["last"].captions == ["a blue square"]


@pytest.mark.parametrize("key", ["gif", "webp"])
def test_an_animation_is_its_first_frame(url_run: UrlRun, key: str) -> None:
    assert_plain(url_run.samples[key].images[SIZE], RED)


@pytest.mark.parametrize(
    ("key", "caption"),
    [
        ("nul-caption", "a red\nsquare"),
        ("emoji", EMOJI),
        ("right-to-left", RIGHT_TO_LEFT),
        ("quotes", 'the sign says "stop, now"'),
        ("long-caption", LONG.strip()),
    ],
)
def test_strange_captions_have_a_defined_form(url_run: UrlRun, key: str, caption: str) -> None:
    assert url_run.samples[key].captions == [caption]


def test_a_long_caption_is_truncated_to_max_tokens_and_counted(url_run: UrlRun) -> None:
    (embedding,) = url_run.samples["long-caption"].text["t5"]
    assert embedding.shape == (128, 64)
    assert np.isfinite(embedding).all()
    assert summary(url_run.folder)["tally"]["groups"]["text-t5"]["counters"]["captions_truncated"] == 1


def test_urls_of_rows_that_are_dropped_anyway_are_not_requested(url_run: UrlRun) -> None:
    assert url_run.never_asked == 0


def test_the_counts_of_a_run_over_bad_urls_add_up(url_run: UrlRun) -> None:
    assert_counts_add_up(url_run, url_run.rows)


def test_no_file_appears_outside_the_run_folder(url_run: UrlRun) -> None:
    assert url_run.outside == set()
    assert url_run.temporary == set()
    assert not any("escape" in name or "absolute" in name for name in tree(url_run.folder))
    assert tree(url_run.folder / "staging") == set()


def test_a_store_of_such_a_run_verifies(url_run: UrlRun) -> None:
    result = call("verify", str(url_run.folder))
    assert (result.code, result.err) == (0, "")


def test_more_drops_than_allowed_end_with_3_and_keep_the_store(url_run: UrlRun) -> None:
    store = {name: (url_run.folder / "store" / name).read_bytes() for name in tree(url_run.folder / "store")}
    dropped = url_run.rows - len(url_run.samples)
    overrides = [o for o in url_run.overrides if not o.startswith("max_drop")]
    result = precompute(url_run.folder, *overrides, "max_drop_fraction=0.01")
    assert result.code == 3
    message = f"max_drop_fraction: {dropped} of {url_run.rows} samples were dropped"
    assert message in result.err
    assert f"more than the 1.0% allowed; see {url_run.folder / 'quarantine'}" in result.err
    assert f"The store holds the other {len(url_run.samples)}." in result.err
    assert summary(url_run.folder)["tally"]["shards_skipped"] == 2
    assert {name: (url_run.folder / "store" / name).read_bytes() for name in store} == store
    share = dropped / url_run.rows
    assert precompute(url_run.folder, *overrides, f"max_drop_fraction={share}").code == 0


# ---- folder ----


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("folder")
    data = root / "data"
    (data / "images").mkdir(parents=True)
    (root / "outside.png").write_bytes(plain_png())
    for name in ("a.png", "b.png", "nul.png", "blank.png"):
        (data / name).write_bytes(plain_png(RED))
    (data / "images" / "inner.png").write_bytes(plain_png(BLUE))
    (data / "corrupt.png").write_bytes(plain_png().replace(b"IDAT", b"IDAT\xff\xff"))
    (data / "cut.jpg").write_bytes(noise_jpeg()[:2000])
    (data / "empty.png").write_bytes(b"")
    (data / "page.png").write_bytes(b"<html>")
    (data / "folder.png").mkdir()
    os.symlink(data / "nowhere.png", data / "dangling.png")
    latin_1 = os.fsencode(data) + b"/caf\xe9.png"
    Path(os.fsdecode(latin_1)).write_bytes(plain_png())
    rows: list[tuple[bytes, bytes]] = [
        (b"a.png", b"a red square"),
        (b"missing.png", b"x"),
        (b"../outside.png", b"x"),
        (str(root / "outside.png").encode(), b"x"),
        (b"images/../../outside.png", b"x"),
        (b"a.png", b"the same file again"),
        (b"blank.png", b"  "),
        (b"nul.png", b"a\0red\0square"),
        (b"corrupt.png", b"x"),
        (b"cut.jpg", b"x"),
        (b"empty.png", b"x"),
        (b"page.png", b"x"),
        (b"folder.png", b"x"),
        (b"dangling.png", b"x"),
        (b"n" * 5000 + b".png", b"x"),
        (b"nul\0.png", b"x"),
        (b"", b"x"),
        (b"caf\xe9.png", b"x"),
        (b"b.png", b"caf\xe9"),
        (b"inner.png", b"found below images/"),
    ]
    lines = b"file\tcaption\n" + b"".join(b"%s\t%s\n" % row for row in rows)
    (data / "captions.tsv").write_bytes(lines + b"lonely.png\n")
    return finished(
        root / "run", precompute(root / "run", "source.kind=folder", f"source.path={data}", "shard_size=7", *NO_TEXT)
    )


def test_every_bad_row_of_a_folder_is_dropped_for_its_own_reason(folder_run: Run) -> None:
    outside = str(folder_run.folder.parent / "outside.png")
    assert drops(folder_run.folder) == [
        ("missing.png", "missing_file"),
        ("../outside.png", "unsafe_path"),
        (outside, "unsafe_path"),
        ("images/../../outside.png", "unsafe_path"),
        ("a.png", "duplicate_key"),
        ("blank.png", "empty_caption"),
        ("corrupt.png", "decode_error"),
        ("cut.jpg", "truncated"),
        ("empty.png", "empty_file"),
        ("page.png", "not_an_image"),
        ("folder.png", "missing_file"),
        ("dangling.png", "missing_file"),
        ("n" * 5000 + ".png", "missing_file"),
        ("nul\0.png", "unsafe_path"),
        ("", "unsafe_path"),
        ("caf\udce9.png", "invalid_key"),
        ("b.png", "invalid_caption"),
        ("", "invalid_line"),  # a line of one field
    ]
    assert_counts_add_up(folder_run, 21)


def test_the_other_rows_of_a_folder_are_unharmed(folder_run: Run) -> None:
    captions = {key: sample.captions for key, sample in folder_run.samples.items()}
    assert captions == {
        "a.png": ["a red square"],
        "nul.png": ["a red square"],
        "inner.png": ["found below images/"],
    }
    assert_plain(folder_run.samples["a.png"].images[SIZE], RED)
    assert_plain(folder_run.samples["inner.png"].images[SIZE], BLUE)


@pytest.mark.parametrize("store_format", ["parquet", "hdf5"])
def test_a_run_that_keeps_nothing_ends_with_3_and_an_empty_store(tmp_path: Path, store_format: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "page.png").write_bytes(b"<html>")
    (tmp_path / "data" / "page.txt").write_text("a web page")
    overrides = ("source.kind=folder", f"source.path={tmp_path / 'data'}", f"store.format={store_format}")
    result = precompute(tmp_path / "run", *overrides, *BASE[:1])
    assert result.code == 3
    assert "1 of 1 samples were dropped (100.0%)" in result.err
    assert drops(tmp_path / "run") == [("page.png", "not_an_image")]
    store = Store.open(tmp_path / "run" / "store")
    assert (len(store), store.image_sizes, store.encoders) == (0, [SIZE], ["t5"])
    assert call("verify", str(tmp_path / "run")).code == 0


# ---- webdataset ----


@pytest.fixture(scope="module")
def tar_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("tars")
    data = root / "data"
    data.mkdir()
    red, blue = plain_png(RED), plain_png(BLUE)

    def described(**values: object) -> bytes:
        return json.dumps(values).encode()

    first = [
        ("0.png", red),
        ("0.txt", b"a red square\n"),
        ("1.PNG", blue),
        ("1.json", described(caption="from json", url="http://example.org/1")),
        ("2.jpg", red),
        ("2.txt", b"txt goes first"),
        ("2.json", described(caption="not this")),
        ("no-image.txt", b"x"),
        ("no-caption.png", red),
        ("no-caption-in-json.png", red),
        ("no-caption-in-json.json", described(other=1)),
        ("bad-json.png", red),
        ("bad-json.json", b"{not json"),
        ("deep-json.png", red),
        ("deep-json.json", b"[" * 100_000),
        ("latin-1.png", red),
        ("latin-1.txt", b"caf\xe9"),
        ("blank.png", red),
        ("blank.txt", b" \n"),
        ("corrupt.png", red[:50]),
        ("corrupt.txt", b"x"),
        ("two.png", red),
        ("two.json", described(caption=["one", "two", "one", ""])),
        ("sub/dir.image.png", red),
        ("sub/dir.txt", b"the key ends at the first dot of the name"),
        ("../../escape.png", red),
        ("../../escape.txt", b"only a name"),
        ("twin.png", red),
        ("twin.txt", b"the first"),
        ("twin.png", blue),
        ("twin.txt", b"the second, next to it"),
        ("0.png", blue),
        ("0.txt", b"the same key, later"),
        ("readme.md", b"not a sample"),
    ]
    second = [("0.png", blue), ("0.txt", b"the same key in another tar"), ("9.png", red), ("9.txt", b"last")]
    cut_image = [("0.png", red), ("0.txt", b"whole"), ("1.txt", b"cut"), ("1.png", noise_jpeg())]
    cut_caption = [("0.png", red), ("0.txt", b"whole"), ("1.png", red), ("1.txt", b"half a caption " * 100)]
    (data / "00.tar").write_bytes(tar_bytes(first))
    (data / "01.tar").write_bytes(tar_bytes(second))
    (data / "02.tar").write_bytes(tar_bytes(cut_image)[: 4 * 512 + 512 + 512 + 512 + 700])
    (data / "03.tar").write_bytes(tar_bytes(cut_caption)[: 6 * 512 + 512 + 512 + 200])
    return finished(
        root / "run",
        precompute(root / "run", "source.kind=webdataset", f"source.path={data}", "shard_size=8", *NO_TEXT),
    )


def test_every_bad_sample_of_a_tar_is_dropped_for_its_own_reason(tar_run: Run) -> None:
    assert drops(tar_run.folder) == [
        ("00/no-image", "no_image"),
        ("00/no-caption", "empty_caption"),
        ("00/no-caption-in-json", "empty_caption"),
        ("00/bad-json", "empty_caption"),
        ("00/deep-json", "empty_caption"),
        ("00/latin-1", "invalid_caption"),
        ("00/blank", "empty_caption"),
        ("00/corrupt", "truncated"),
        ("00/twin", "duplicate_key"),
        ("00/0", "duplicate_key"),
        ("00/readme", "no_image"),
        ("02/1", "truncated"),
        ("03/1", "truncated"),
    ]
    assert_counts_add_up(tar_run, 24)


def test_the_other_samples_of_the_tars_are_unharmed(tar_run: Run) -> None:
    captions = {key: sample.captions for key, sample in tar_run.samples.items()}
    assert captions == {
        "00/0": ["a red square"],
        "00/1": ["from json"],
        "00/2": ["txt goes first"],
        "00/two": ["one", "two"],
        "00/sub/dir": ["the key ends at the first dot of the name"],
        "00/../../escape": ["only a name"],
        "00/twin": ["the first"],
        "01/0": ["the same key in another tar"],
        "01/9": ["last"],
        "02/0": ["whole"],
        "03/0": ["whole"],
    }
    assert tar_run.samples["00/1"].url == "http://example.org/1"
    for key in ("00/0", "00/2", "00/twin", "01/9", "03/0"):
        assert_plain(tar_run.samples[key].images[SIZE], RED)
    for key in ("00/1", "01/0"):
        assert_plain(tar_run.samples[key].images[SIZE], BLUE)
    assert {name for name in tree(tar_run.folder.parent) if "escape" in name} == set()


# ---- parquet ----


@pytest.fixture(scope="module")
def parquet_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two files: image bytes as binary, and as a struct with `bytes` and `path`."""
    root = tmp_path_factory.mktemp("parquet")
    data = root / "data"
    data.mkdir()
    red, blue = plain_png(RED), plain_png(BLUE)
    rows: list[tuple[str | None, bytes | None, list[str] | None]] = [
        ("red", red, ["a red square"]),
        ("null-image", None, ["x"]),
        ("null-caption", red, None),
        ("blank", red, [" "]),
        ("cut", red[:50], ["x"]),
        ("empty", b"", ["x"]),
        ("red", blue, ["the key came before"]),
        (None, blue, ["no key of its own"]),
        (None, blue, ["nor this one"]),
        ("two", blue, ["one", "two", "one"]),
        ("../../escape", red, ["only a name"]),
    ]
    keys, images, captions = (list(column) for column in zip(*rows, strict=True))
    pq.write_table(
        pa.table({"key": keys, "image": pa.array(images, pa.binary()), "caption": captions}),
        data / "a.parquet",
        row_group_size=4,
    )
    cells = [{"bytes": red, "path": "red.png"}, {"bytes": None, "path": "/etc/passwd"}, None, {"bytes": blue}]
    pq.write_table(
        pa.table(
            {
                "key": ["s0", "s1", "s2", "s3"],
                "image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                "caption": ["in a struct", "x", "x", "in a struct, too"],
            }
        ),
        data / "b.parquet",
    )
    text = pa.array([b"caf\xe9", b"fine", b"fine"]).view(pa.string())  # the schema says UTF-8, the bytes are not
    key = pa.array([b"latin-1", b"key-\xe9", b"ok"]).view(pa.string())
    pq.write_table(pa.table({"key": key, "image": [red, red, red], "caption": text}), data / "c.parquet")
    overrides = ("source.kind=parquet", f"source.path={data}", "source.key_column=key", "shard_size=5")
    return finished(root / "run", precompute(root / "run", *overrides, *NO_TEXT))


def test_every_bad_row_of_parquet_is_dropped_for_its_own_reason(parquet_run: Run) -> None:
    assert drops(parquet_run.folder) == [
        ("null-image", "no_image"),
        ("null-caption", "empty_caption"),
        ("blank", "empty_caption"),
        ("cut", "truncated"),
        ("empty", "empty_file"),
        ("red", "duplicate_key"),
        ("s1", "unsafe_path"),
        ("s2", "no_image"),
        ("latin-1", "invalid_caption"),
        ("key-\udce9", "invalid_key"),
    ]
    assert_counts_add_up(parquet_run, 18)


def test_the_other_rows_of_parquet_are_unharmed(parquet_run: Run) -> None:
    captions = {key: sample.captions for key, sample in parquet_run.samples.items()}
    assert captions == {
        "red": ["a red square"],
        "a/0000007": ["no key of its own"],
        "a/0000008": ["nor this one"],
        "two": ["one", "two"],
        "../../escape": ["only a name"],
        "s0": ["in a struct"],
        "s3": ["in a struct, too"],
        "ok": ["fine"],
    }
    for key in ("red", "../../escape", "s0", "ok"):
        assert_plain(parquet_run.samples[key].images[SIZE], RED)
    for key in ("a/0000007", "a/0000008", "two", "s3"):
        assert_plain(parquet_run.samples[key].images[SIZE], BLUE)


# ---- huggingface ----


@pytest.fixture(scope="module")
def huggingface_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("huggingface")
    (root / "red.png").write_bytes(plain_png(RED))
    rows = [
        ({"bytes": plain_png(RED), "path": None}, "a red square"),
        (None, "x"),
        ({"bytes": plain_png(), "path": None}, None),
        ({"bytes": plain_png(), "path": None}, ""),
        ({"bytes": plain_png()[:50], "path": None}, "x"),
        ({"bytes": None, "path": str(root / "red.png")}, "read from its path"),
        ({"bytes": plain_png(BLUE), "path": None}, "a\0blue square"),
    ]
    images, texts = (list(column) for column in zip(*rows, strict=True))
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict({"image": images, "text": texts}, features=features)
    datasets.DatasetDict({"train": dataset}).save_to_disk(root / "data")
    overrides = ("source.kind=huggingface", f"source.path={root / 'data'}", "shard_size=5")
    return finished(root / "run", precompute(root / "run", *overrides, *NO_TEXT))


def test_every_bad_row_of_a_dataset_is_dropped_for_its_own_reason(huggingface_run: Run) -> None:
    assert drops(huggingface_run.folder) == [
        ("000000001", "no_image"),
        ("000000002", "empty_caption"),
        ("000000003", "empty_caption"),
        ("000000004", "truncated"),
    ]
    assert_counts_add_up(huggingface_run, 7)


def test_the_other_rows_of_a_dataset_are_unharmed(huggingface_run: Run) -> None:
    captions = {key: sample.captions for key, sample in huggingface_run.samples.items()}
    assert captions == {
        "000000000": ["a red square"],
        "000000005": ["read from its path"],
        "000000006": ["a blue square"],
    }
    assert_plain(huggingface_run.samples["000000005"].images[SIZE], RED)
    assert_plain(huggingface_run.samples["000000006"].images[SIZE], BLUE)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["source.split=test"], "split 'test' cannot be loaded"),
        (["source.caption_column=label"], "has no column 'label'; it has: image, text"),
    ],
)
def test_a_split_or_column_that_is_not_there_is_refused(
    huggingface_run: Run, tmp_path: Path, overrides: list[str], says: str
) -> None:
    data = huggingface_run.folder.parent / "data"
    result = precompute(tmp_path / "run", "source.kind=huggingface", f"source.path={data}", *overrides)
    assert (result.code, result.err.count("error:")) == (2, 1)
    assert says in result.err
    assert not (tmp_path / "run").exists()


def test_a_dataset_of_urls_is_downloaded_and_its_bad_rows_are_dropped(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    with serve({"/red.png": body(plain_png(RED)), "/blue.png": body(plain_png(BLUE)), "/never": silence}) as server:
        rows = [
            ("/red.png", "red"),
            ("/missing.png", "x"),
            ("/never", ""),
            ("/blue.png", "blue"),
        ]
        columns = {"image_url": [server.url(path) for path, _ in rows], "caption": [caption for _, caption in rows]}
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "data")
        result = precompute(
            *(tmp_path / "run", "source.kind=huggingface", f"source.path={tmp_path / 'data'}", "shard_size=3"),
            *("source.url_column=image_url", "source.caption_column=caption"),
            *("source.download.allow_private_addresses=true", *NO_TEXT),
        )
    run = finished(tmp_path / "run", result)
    assert run.dropped == {"000000001": "http_404", "000000002": "empty_caption"}
    assert server.requests["/never"] == 0
    assert {key: sample.captions for key, sample in run.samples.items()} == {
        "000000000": ["red"],
        "000000003": ["blue"],
    }
    assert_plain(run.samples["000000003"].images[SIZE], BLUE)
    assert run.samples["000000003"].url == columns["image_url"][3]
