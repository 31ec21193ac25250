"""A file behind a URL is read whole and at any place, whatever breaks meanwhile."""

import asyncio
import io
import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.asyn import AsyncFileSystem

from imagen_core.far import FarFile, StorageError, download, open_filesystem, read_file
from imagen_core.far.listing import PatientFileSystem

DATA = bytes(range(256)) * 40
URL = "s3://bucket/a"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagen_core.far.calls.LONGEST_PAUSE_S", 0.001)


def test_the_error_of_a_connection_that_was_given_up_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    """Its request was made again, and whoever asked got the answer of that."""
    pytest.importorskip("s3fs")
    filesystem, _ = open_filesystem("s3://bucket/a", skip_instance_cache=True)

    async def abandoned() -> None:
        asyncio.get_running_loop().call_exception_handler({"message": "never retrieved", "exception": OSError("lost")})

    caplog.set_level(logging.DEBUG, "imagen_core.far")
    asyncio.run_coroutine_threadsafe(abandoned(), filesystem.loop).result(10)
    assert [(record.name, record.levelname) for record in caplog.records if "lost" in record.getMessage()] == [
        ("imagen_core.far.files", "DEBUG")
    ]
    assert not [record for record in caplog.records if record.name == "asyncio" and record.levelno >= logging.ERROR]


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagen_core.far.calls.PATIENCE_S", 0.05)


class Opened(io.BytesIO):
    def __init__(self, server: "Server"):
        super().__init__(server.data)
        self.server = server
        self.size = len(server.data) if server.ranges else None

    def read(self, size: int | None = -1) -> bytes:
        fault = self.server.next_fault()
        data = super().read(size)
        return data[: len(data) // 2] if fault == "half" else data

    def seek(self, offset: int, whence: int = 0) -> int:
        assert self.server.ranges, "a stream is not sent back"
        return super().seek(offset, whence)


class Server:
    """A file system of one file, with a list of faults: one for each read, then none."""

    def __init__(self, *faults: object, data: bytes = DATA, ranges: bool = True):
        self.faults, self.data, self.ranges, self.opened = list(faults), data, ranges, 0

    def next_fault(self) -> object:
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        return fault

    def open(self, path: str, mode: str, **options: object) -> Opened:
        self.opened += 1
        return Opened(self)

    def info(self, path: str) -> dict[str, Any]:
        return {"size": len(self.data)}

    def cat_file(self, path: str) -> bytes:
        fault = self.next_fault()
        return self.data[:-1] if fault == "half" else self.data

    def get_file(self, path: str, local: str, callback: Any) -> None:
        callback.set_size(len(self.data))
        Path(local).write_bytes(self.cat_file(path))


@pytest.mark.parametrize("ranges", [True, False])
def test_reading_goes_on_where_a_connection_broke(ranges: bool) -> None:
    server = Server(None, ConnectionResetError(), None, TimeoutError(), ranges=ranges)
    file = FarFile(server, "a", URL)
    assert [file.read(100), file.read(50), file.read()] == [DATA[:100], DATA[100:150], DATA[150:]]
    assert server.opened == 3
    assert file.read(1) == b""


def test_half_an_answer_is_asked_for_again() -> None:
    file = FarFile(Server("half", None, None, "half"), "a", URL)
    assert file.read(100) == DATA[:100]
    file.seek(-50, io.SEEK_END)
    assert file.read() == DATA[-50:]
    assert read_file(Server("half"), "a", URL, len(DATA)) == DATA


def test_a_download_of_half_a_file_is_made_again(tmp_path: Path) -> None:
    download(Server("half"), "a", URL, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == DATA


@pytest.mark.usefixtures("little_patience")
def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="IncompleteError: 10239 of 10240 bytes came, also after"):
        download(Server(*["half"] * 10_000), "a", URL, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_file_that_is_shorter_than_expected_is_read_as_it_is() -> None:
    assert read_file(Server(), "a", URL, len(DATA) + 1) == DATA


def test_libraries_hand_the_error_of_the_storage_on() -> None:
    """They call every OSError damage of the file."""
    hdf5, parquet = io.BytesIO(), io.BytesIO()
    with h5py.File(hdf5, "w") as file:
        file["x"] = np.arange(10)
    pq.write_table(pa.table({"x": [1]}), parquet)
    with pytest.raises(StorageError, match="cannot be read: PermissionError"):
        h5py.File(FarFile(Server(PermissionError(), data=hdf5.getvalue()), "a", URL), "r")
    with pytest.raises(StorageError, match="cannot be read: PermissionError"):
        pq.ParquetFile(FarFile(Server(PermissionError(), data=parquet.getvalue()), "a", URL))
    with h5py.File(FarFile(Server(TimeoutError(), "half", data=hdf5.getvalue()), "a", URL), "r") as file:
        assert file["x"][5] == 5


class Folders(AsyncFileSystem):
    """`top/a` and `top/deep/b`; listing `top/deep` fails so often."""

    cachable = False

    def __init__(self, fails: int):
        super().__init__()
        self.fails = fails

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[dict[str, Any]]:
        if path == "top":
            return [{"name": "top/a", "type": "file", "size": 1}, {"name": "top/deep", "type": "directory", "size": 0}]
        if self.fails:
            self.fails -= 1
            raise ConnectionResetError
        return [{"name": "top/deep/b", "type": "file", "size": 1}]

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "type": "directory", "size": 0}


def test_a_folder_that_cannot_be_listed_is_not_left_out() -> None:
    assert Folders(1).find("top") == ["top/a"], "fsspec leaves it out without a word"
    assert PatientFileSystem(Folders(2)).find("top") == ["top/a", "top/deep/b"]
    assert PatientFileSystem(Folders(2)).glob("top/**") == ["top", "top/a", "top/deep", "top/deep/b"]


@pytest.mark.usefixtures("little_patience")
def test_a_folder_that_cannot_be_listed_for_long_is_named() -> None:
    with pytest.raises(StorageError, match="top/deep: cannot be listed: ConnectionResetError, also after"):
        PatientFileSystem(Folders(10_000)).find("top")
