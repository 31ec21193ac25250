"""A compressed file is read to its proven end, or is an error; where it ends early, what was not read is counted."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from stages.sources.records.compressed import SUFFIXES, Decompressed, open_random, open_whole


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
DATA = b"".join(b"line %d\n" % number for number in range(20_000))


def test_every_compression_has_a_case() -> None:
    assert COMPRESS.keys() == SUFFIXES.keys()


def written(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def read_whole(path: str) -> bytes:
    with open_whole(path) as file:
        return file.read()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_all_streams_of_a_file_are_read(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    path = written(tmp_path, f"a.csv{suffix}", compress(DATA[:1000]) + compress(DATA[1000:]))
    assert read_whole(path) == DATA
    with open_random(path) as file:
        assert file.seek(len(DATA) - 5) == len(DATA) - 5
        assert file.read(100) == DATA[-5:]
        assert (file.seek(7), file.read(6)) == (7, DATA[7:13])


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "cut head", "second stream", "second head", "rubbish"])
def test_what_is_damaged_cut_or_behind_the_end_is_an_error(tmp_path: Path, suffix: str, damage: str) -> None:
    first, second = COMPRESS[suffix](DATA), bytearray(COMPRESS[suffix](DATA))
    data = {
        "cut": first[:-5],
        "cut head": first + second[:5],
        "second stream": first + second[: len(second) // 2] + bytes(20) + second[len(second) // 2 + 20 :],
        "second head": first + b"\xff" + second[1:],
        "rubbish": first + b"rubbish",
    }[damage]
    with pytest.raises(OSError, match="the compressed data is damaged: "):
        read_whole(written(tmp_path, f"a.csv{suffix}", data))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_zeros_behind_the_end_are_no_damage(tmp_path: Path, suffix: str) -> None:
    assert read_whole(written(tmp_path, f"a.csv{suffix}", COMPRESS[suffix](DATA) + bytes(1024))) == DATA


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("data", [b"", b"url,caption\n"])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path: Path, suffix: str, data: bytes) -> None:
    with pytest.raises(OSError, match=f"it is no {SUFFIXES[suffix]} file, as its name says: it begins with"):
        read_whole(written(tmp_path, f"a.csv{suffix}", data))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_the_first_bytes_tell_the_compression_of_a_file_without_a_suffix(tmp_path: Path, suffix: str) -> None:
    assert read_whole(written(tmp_path, "a.csv", COMPRESS[suffix](DATA))) == DATA


def test_a_plain_file_is_read_from_any_place(tmp_path: Path) -> None:
    with open_whole(written(tmp_path, "a.csv", DATA)) as file:
        assert file.readline() == b"line 0\n"
        assert (file.seek(len(DATA) - 3), file.read()) == (len(DATA) - 3, DATA[-3:])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_bytes_behind_damage_are_counted(tmp_path: Path, suffix: str) -> None:
    stream = COMPRESS[suffix](DATA)
    path = written(tmp_path, "a.tar", stream + b"rubbish" + bytes(range(256)) * 20_000)
    with open_random(path) as file:
        assert isinstance(file, Decompressed)
        found = file.read(10**7)
        assert DATA.startswith(found)
        assert len(found) >= len(DATA) - 2**16
        assert "the compressed data is damaged" in file.damage
        assert 0 < file.unread_bytes <= 7 + 256 * 20_000
