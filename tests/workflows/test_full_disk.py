"""A full disk ends the run with a message that names it; with room again, the same command resumes."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagen_core.store import cast_embedding, write_embedding_shard
from imagen_core.store.files import hdf5
from pipeline.storage import LocalStorage
from pipeline.storage.disk import disk_message, takes_no_data
from pipeline.storage.events import EventLog
from tests.commands import call, precompute, summary
from tests.runs import SMALL, events, store_bytes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here (not root)")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


def slow(store_format: str, kib: int, executor: str = "inline") -> Any:
    return pytest.param(store_format, kib, executor, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("store_format", "kib", "executor"),
    [
        ("parquet", 16, "inline"),  # the driver's own files
        slow("parquet", 150),  # images
        slow("hdf5", 150),
        *(slow("parquet", kib) for kib in (60, 100, 200, 250, 300)),
        *(slow("hdf5", kib) for kib in (16, 60, 100, 200, 250, 300)),
        slow("hdf5", 150, "local"),
        slow("parquet", 200, "local"),
    ],
)
def test_a_run_resumes_where_a_full_disk_stopped_it(
    store_format: str, kib: int, executor: str, small_disk: Path, tmp_path: Path
) -> None:
    settings = (*SMALL, f"store.format={store_format}", "execution.disk_check=warn")
    out = small_disk / "run"
    resize(small_disk, kib)
    stopped = call("run", "precompute", "--out", str(out), "--executor", executor, "--quiet", *settings)
    assert stopped.code == 4, stopped.err
    assert "No space left on device" in stopped.err
    assert f"are free on the file system at {small_disk}. Make room there" in stopped.err
    assert not list(out.rglob(".tmp-*"))
    assert not (out / "store" / "manifest.json").exists()
    resize(small_disk, 64 << 10)
    assert precompute(out, *settings).code == 0
    assert precompute(tmp_path / "plain", *settings).code == 0
    assert store_bytes(out) == store_bytes(tmp_path / "plain")
    assert events(out)[-1]["outcome"] == "finished", "each line is whole"


def test_an_event_that_does_not_fit_leaves_no_half_line(tmp_path: Path) -> None:
    log = EventLog(LocalStorage(tmp_path))
    log.write("first")
    whole = (tmp_path / "events.jsonl").read_bytes()
    file = log._file
    log._file = FullAfter(file, 5)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        log.write("second")
    assert (tmp_path / "events.jsonl").read_bytes() == whole
    log._file = file
    log.write("third")
    log.close()
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 2


class FullAfter:
    """A file on a disk with this many bytes left."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room
        self.seek, self.truncate = file.seek, file.truncate

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written


def test_hdf5_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: hdf5._Sink, left: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hdf5._Sink, "_write_all", full)
    embeddings, path = [cast_embedding(np.ones((3, 4), np.float32), "float16")], tmp_path / "00000.h5"
    for _ in range(3):
        with pytest.raises(OSError, match="No space left on device"):
            write_embedding_shard(
                path, embeddings, [3], 4, "float16", "hdf5", captions=["a"], fingerprint={"model": "m"}
            )
        assert not path.exists()


def test_a_full_disk_is_known_by_number_or_text_and_other_errors_are_not() -> None:
    assert takes_no_data(OSError(errno.EDQUOT, "over quota"))
    assert takes_no_data(RuntimeError("file write failed: errno = 28, error message = 'No space left on device'"))
    assert takes_no_data(OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"))
    assert not takes_no_data(FileNotFoundError(errno.ENOENT, "No such file or directory"))
    assert not takes_no_data(ValueError("28"))


def test_too_many_open_files_end_the_run_and_drop_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be opened for that reason is neither missing nor unreadable."""
    (tmp_path / "input").mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"input/{number}.png")
        (tmp_path / f"input/{number}.txt").write_text("an image\n")
    settings = ("source.kind=folder", f"source.path={tmp_path}/input", "images.sizes_px=[8]")

    def too_many(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith("2.png"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return open(path, *arguments, **options)

    monkeypatch.setattr("stages.sources.tree.open", too_many, raising=False)
    stopped = precompute(tmp_path / "run", *settings)
    assert stopped.code == 4
    assert "ulimit -n" in stopped.err
    monkeypatch.undo()
    assert precompute(tmp_path / "run", *settings).code == 0
    assert summary(tmp_path / "run")["tally"]["groups"]["samples"]["rows"] == 4


def test_the_message_names_the_file_systems_place(tmp_path: Path) -> None:
    error = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "absent" / "f"))
    message = disk_message(error, Path("/elsewhere"))
    assert message.startswith(f"{tmp_path}: OSError: [Errno 30] Read-only file system: '{tmp_path}/absent/f'\n")
    assert "run the same command again" in message
