"""Tars are byte for byte those of webdataset's writer, and .npy members those of numpy."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset.writer import TarWriter

from imagen_core.store import ArraySpec
from stages.exports.webdataset import npy_parts, tar_header
from tests.imagen_core.store.arrays_added import add_arrays, values_of
from tests.imagen_core.store.handmade_store import make_store
from tests.stages.exports.exporting import data_files, export


def test_a_tar_is_that_of_webdatasets_writer(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", shard_rows=(3,)).path
    spec = ArraySpec("float32")
    add_arrays(store, "long" * 30, spec, values_of(spec), "parquet")
    assert export(store, "webdataset", tmp_path / "out").code == 0
    data = data_files(tmp_path / "out")["00000.tar"]
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            content = tar.extractfile(member)
            assert content is not None
            samples.setdefault(key, {})[name] = content.read()
    assert len(samples) == 3
    assert all(f"array-{'long' * 30}.npy" in members for members in samples.values())
    file = io.BytesIO()
    writer = TarWriter(file, mtime=0, encoder=False)
    for key, members in samples.items():
        writer.write({"__key__": key, **members})
    writer.close()
    assert data == file.getvalue()


@pytest.mark.parametrize("name", ["", "a", "00000-000001.txt", "x" * 99, "x" * 100, "x" * 101, "é.npy", "d/" * 60])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 160_000, (1 << 33) - 1, 1 << 33])
def test_a_header_is_that_of_tarfile(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, 0o444, "bigdata", "bigdata"
    assert tar_header(name, size) == member.tobuf()


@pytest.mark.parametrize(
    "array",
    [
        np.ones((3, 4), np.float16),
        np.ones((2, 3, 5), np.float32),
        np.ones((0, 4), np.float16),
        np.array(2.5, np.float32),
        np.array([True, False]),
        np.arange(12, dtype=np.int64).reshape(3, 4).T,
        np.arange(12, dtype=np.uint8)[::2],
    ],
)
def test_a_npy_member_is_that_of_numpy(array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array).reshape(array.shape))
    assert b"".join(npy_parts(array)) == file.getvalue()
