"""A URL that leads to nothing, that cannot be reached or whose server refuses ends a run with words."""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.far import StorageError, is_far
from imagen_core.store import Store
from pipeline.errors import ConfigError, MachineError, UnavailableError
from stages.sources.records.far import open_file, reaching
from stages.sources.tables import read_rows
from stages.sources.tars import WebdatasetConfig
from tests.commands import precompute
from tests.image_server import body, serve, status
from tests.images import plain_png
from tests.stages.sources.reading import read_originals, tar_bytes

CLOSED = "http://127.0.0.1:1"
FILES = {"urls": "l.csv", "parquet": "a.parquet", "webdataset": "a.tar", "tsv": "a.tsv", "folder": "images"}


def run(out: Path, kind: str, url: str) -> tuple[int, str]:
    result = precompute(out, f"source.kind={kind}", f"source.path={url}", "images.sizes_px=[16]", "encoders=[]")
    assert "Traceback" not in result.err
    return result.code, result.err


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagen_core.far.calls.PATIENCE_S", 0.05)
    monkeypatch.setattr("imagen_core.far.calls.LONGEST_PAUSE_S", 0.01)


@pytest.mark.parametrize("kind", FILES)
def test_a_server_that_cannot_be_reached_for_long_is_exit_75_with_words(tmp_path: Path, kind: str) -> None:
    code, message = run(tmp_path / "run", kind, f"{CLOSED}/{FILES[kind]}")
    assert code == 75, message
    assert f"source.path: {CLOSED}/" in message
    assert "ClientConnectorError: Cannot connect to host 127.0.0.1:1" in message
    assert "tries in 0.05 s; check the address and the network, and run the same command again when it can" in message


@pytest.mark.parametrize("kind", FILES)
def test_a_server_that_refuses_is_exit_4_and_one_without_the_file_exit_2(tmp_path: Path, kind: str) -> None:
    with serve({f"/{FILES[kind]}": status(403)}) as server:
        code, message = run(tmp_path / "refused", kind, server.url(f"/{FILES[kind]}"))
        assert code == 4, message
        assert "403" in message
        code, message = run(tmp_path / "missing", kind, server.url(f"/no/{FILES[kind]}"))
    assert code == 2, message
    assert "source.path: " in message


def test_a_tar_on_a_server_is_read(tmp_path: Path) -> None:
    with serve({"/a.tar": body(tar_bytes([("0.png", plain_png()), ("0.txt", b"red")]))}) as server:
        code, message = run(tmp_path / "run", "webdataset", server.url("/a.tar"))
    assert code == 0, message
    assert [sample.captions for sample in Store.open(tmp_path / "run" / "store")] == [["red"]]


def test_a_damaged_tar_on_a_server_is_a_drop_that_counts_the_bytes() -> None:
    members = tar_bytes([(f"{i}.{suffix}", b"x") for i in range(4) for suffix in ("png", "txt")])
    for damaged, detail in (
        (members[:4096] + b"?" * 512 + members[4608:], "no valid header at byte 4,096; 1,024 bytes were not read"),
        (members[:6144], "it ends at byte 6,144 without an end mark; 0 bytes were not read"),
    ):
        with serve({"/a.tar": body(damaged)}) as server:
            rows = read_originals(WebdatasetConfig(path=server.url("/a.tar")).build())
        assert [(row.reason, row.detail) for row in rows if row.reason][-1] == ("damaged_tar", detail)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lambda data: pa.compress(data, "zstd", asbytes=True)])
def test_a_list_on_a_server_is_read(compress: Callable[[bytes], bytes]) -> None:
    with serve({"/l.csv": body(compress(b"url,caption\nu,red\n"))}) as server:
        assert list(read_rows(server.url("/l.csv"), None)) == [{"url": "u", "caption": "red"}]


def test_a_server_without_ranges_cannot_serve_parquet_and_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [plain_png()], "caption": ["red"]}), tmp_path / "a.parquet")
    with serve({"/a.parquet": body((tmp_path / "a.parquet").read_bytes())}) as server:
        code, message = run(tmp_path / "run", "parquet", server.url("/a.parquet"))
    assert code == 4
    assert "a.parquet: cannot be read: ValueError: The HTTP server doesn't appear to support range requests" in message


def test_a_package_that_is_missing_is_exit_4_and_an_unknown_protocol_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ossfs", None)
    code, message = run(tmp_path / "run", "urls", "oss://bucket/l.csv")
    assert code == 4, message
    assert "source.path: oss://bucket/l.csv cannot be opened: " in message
    assert "ossfs" in message
    code, message = run(tmp_path / "run", "urls", "nothing://bucket/l.csv")
    assert code == 2, message


def test_only_urls_of_other_machines_are_far() -> None:
    assert [is_far(path) for path in ("http://a/b", "s3://b/c", "/a/b", "a://", "file:///a", "memory://a")] == [
        *(True, True, False, True, False, False)
    ]


def test_errors_of_local_files_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), reaching(str(tmp_path)):
        open_file(str(tmp_path / "missing"))
    with pytest.raises(ZeroDivisionError), reaching(str(tmp_path)):
        _ = 1 / 0


def test_a_server_that_is_gone_is_told_apart_from_one_that_refuses_and_from_a_missing_file() -> None:
    with serve({"/a.csv": body(b"x" * 100)}) as server:
        url = server.url("/a.csv")
        with open_file(url) as file:
            assert file.read(1) == b"x"
    with pytest.raises(UnavailableError, match=r"source\.path: .*a\.csv: cannot be read: "), reaching(url):
        open_file(url)
    with pytest.raises(MachineError, match=r"source\.path: it is refused") as caught, reaching(url):
        raise StorageError("it is refused")
    assert caught.value.exit_code == 4
    with pytest.raises(ConfigError, match="does not exist"), reaching(url):
        raise FileNotFoundError(url)
