"""A folder of images behind a URL gives the same rows as a local one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import ConfigError
from pipeline.stage import Shard
from pipeline.storage.run_folder import RunFolder
from stages.precompute.fetch import fetch_originals
from stages.sources.base import Original
from stages.sources.folder import FolderConfig, FolderSource
from stages.sources.incremental import InputBatches
from stages.sources.tree import Tree

LOOSE = {
    "b.png": b"bb",
    "b.txt": b"\xef\xbb\xbfone\r\ntwo\n",
    "a.png": b"a",
    "sub/x.jpg": b"xxx",
    "sub/x.txt": b"below",
    "sub-1.png": b"1234",
    "notes.md": b"no image",
}
TABLE = {
    "captions.tsv": b"file\tcaption\nb.png\tone\nx.png\tin images\n../secret.png\tout\n/b.png\tout\nmissing.png\tx\n"
    b"b.png\tagain\n[a]*.png\twildcards\nfolder\tx\n",
    "b.png": b"bb",
    "images/x.png": b"x",
    "[a]*.png": b"w",
    "folder/y.png": b"y",
    "folder/captions.txt": b"",
}
SECRET = b"secret"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("no_proxy", host)
        fsspec.filesystem("s3").mkdir("images")
        yield "s3://images"
        fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(params=["file", "memory", "s3"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/far"
    if request.param == "memory":
        return f"memory://{tmp_path.name}/far"
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}/far"


def fill(folder: str, files: dict[str, bytes]) -> None:
    filesystem, root = fsspec.core.url_to_fs(folder)
    for name, data in files.items():
        filesystem.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{root}/{name}", data)


def source(folder: str) -> FolderSource:
    made = FolderConfig(path=folder).build()
    made.check()
    return made


def fetched(source: FolderSource, shard: Shard, scratch: Path) -> list[Original]:
    result: list[Original] = []
    fetch_originals(source, shard, None, scratch, result.append)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("files", [LOOSE, TABLE], ids=["loose", "table"])
def test_rows_and_images_are_those_of_a_local_folder(files: dict[str, bytes], far: str, tmp_path: Path) -> None:
    near = str(tmp_path / "near")
    for folder in (near, far):
        fill(folder, files)
    fill(str(tmp_path), {"secret.png": SECRET})
    fill(far.rpartition("/")[0], {"secret.png": SECRET})
    (expected,), (found,) = source(near).shards(100), source(far).shards(100)
    assert found.rows == expected.rows
    assert found.digest == expected.digest
    read, wanted = fetched(source(far), found, tmp_path), fetched(source(near), expected, tmp_path)
    assert [replace(original, detail="") for original in read] == [replace(original, detail="") for original in wanted]
    assert source(far).fingerprint() == source(near).fingerprint()


def test_files_outside_the_folder_are_never_read(far: str, tmp_path: Path) -> None:
    fill(far, TABLE)
    fill(far.rpartition("/")[0], {"secret.png": SECRET})
    (shard,) = source(far).shards(100)
    originals = {original.key: original for original in fetched(source(far), shard, tmp_path)}
    assert SECRET not in {original.data for original in originals.values()}
    assert {key: original.reason for key, original in originals.items()} == {
        "b.png": "duplicate_key",
        "x.png": None,
        "../secret.png": "unsafe_path",
        "/b.png": "unsafe_path",
        "missing.png": "missing_file",
        "[a]*.png": None,
        "folder": "missing_file",
    }
    assert originals["[a]*.png"].data == b"w", "names are no patterns"


def test_a_process_that_has_listed_the_folder_sees_new_files(far: str, tmp_path: Path) -> None:
    fill(far, LOOSE)
    run = RunFolder(tmp_path / "run")
    first = InputBatches(source(far), run, 2, "samples")
    first.record(restart=False)
    assert [shard.num_rows for shard in first.shards()] == [2, 2]
    filesystem, root = fsspec.core.url_to_fs(far)
    another = type(filesystem)(skip_instance_cache=True)  # as another process: it empties no cache of this one
    another.pipe_file(f"{root}/a2.png", b"new")
    second = InputBatches(source(far), run, 2, "samples")
    assert [shard.rows for shard in second.shards()][2:] == [[["a2.png", [], 3, False]]]
    assert list(first.shards()) == list(second.shards())[:2]


def test_an_error_of_a_store_far_away_is_no_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> bytes:
        raise PermissionError("Access Denied")

    fill("memory://denied", LOOSE)
    (shard,) = source("memory://denied").shards(100)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", refused)
    with pytest.raises(PermissionError):
        fetched(source("memory://denied"), shard, tmp_path)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("memory:///nothing-here", "source.path: memory:///nothing-here is not a folder; check the path"),
        ("gopher://x/y", "source.path: gopher://x/y cannot be opened: Protocol not known: gopher"),
    ],
)
def test_a_url_where_no_folder_is_is_refused(path: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        source(path)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    fill(str(tmp_path / "data"), {"a/x.png": b"x"})
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "nowhere.png").symlink_to(tmp_path / "nothing")
    assert list(Tree(str(tmp_path / "data")).walk()) == [("a/x.png", 1), ("again/x.png", 1)]
