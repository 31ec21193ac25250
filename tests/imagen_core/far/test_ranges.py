"""Files that are read in ranges: what is asked for."""

import errno
import io
import tarfile

import pytest

from imagen_core.far import StorageError
from imagen_core.far.ranges import RangedFile, has_ranges

URL = "s3://bucket/file"
CONTENT = bytes(range(256)) * 4096


class Asked:
    """A file system of one file that notes which ranges are asked for."""

    def __init__(self, content: bytes, lost: int = 0):
        self.content, self.lost = content, lost
        self.ranges: list[tuple[int, int]] = []

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        if start >= len(self.content):
            raise OSError(errno.EINVAL, "The requested range is not satisfiable")
        self.ranges.append((start, min(end, len(self.content))))
        data = self.content[start:end]
        if self.lost:
            self.lost -= 1
            return data[: len(data) // 2]
        return data

    def info(self, path: str) -> dict[str, int]:
        return {"size": len(self.content)}

    @property
    def bytes(self) -> int:
        return sum(end - start for start, end in self.ranges)


def opened(content: bytes = CONTENT, planned: tuple[int, int] = (0, 0), lost: int = 0) -> tuple[RangedFile, Asked]:
    asked = Asked(content, lost)
    return RangedFile(asked, "bucket/file", URL, planned), asked


def test_every_byte_is_the_one_of_the_file_wherever_it_is_read() -> None:
    file, _ = opened()
    for start, size in ((5, 10), (0, 1), (70_000, 200_000), (len(CONTENT) - 3, 10), (len(CONTENT), 4), (100, 3000)):
        assert file.seek(start) == start
        assert file.read(size) == CONTENT[start : start + size]
    file.seek(1000)
    assert file.read() == CONTENT[1000:]
    assert file.read(1) == b""
    assert file.seek(-2, io.SEEK_END) == len(CONTENT) - 2


def test_a_file_that_is_read_on_takes_few_requests() -> None:
    file, asked = opened()
    while file.read(10_000):
        pass
    assert asked.bytes == len(CONTENT)
    assert len(asked.ranges) <= 10


def test_the_headers_of_a_tar_are_read_without_what_is_in_it() -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for index in range(10):
            info = tarfile.TarInfo(f"{index}.png")
            info.size = 100_000
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    file, asked = opened(tar.getvalue())
    with tarfile.open(fileobj=file, mode="r:") as archive:
        assert [member.name for member in archive] == [f"{index}.png" for index in range(10)]
    assert asked.bytes < 0.05 * len(tar.getvalue())
    assert len(asked.ranges) <= 12


def test_a_planned_part_comes_with_one_request_and_nothing_behind_it() -> None:
    file, asked = opened(planned=(10_000, 60_000))
    for start in range(10_000, 60_000, 5000):
        file.seek(start)
        assert file.read(4000) == CONTENT[start : start + 4000]
    assert asked.ranges == [(10_000, 60_000)]


def test_half_an_answer_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagen_core.far.calls.LONGEST_PAUSE_S", 0.0)
    file, asked = opened(lost=2)
    assert file.read(2000) == CONTENT[:2000]
    assert len(asked.ranges) == 3


def test_a_refusal_is_an_error_with_words() -> None:
    file, asked = opened()

    def refuse(path: str, start: int, end: int) -> bytes:
        raise PermissionError("Access Denied")

    asked.cat_file = refuse  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="s3://bucket/file: cannot be read: PermissionError: Access Denied"):
        file.read(1)


def test_only_object_stores_are_sure_to_have_ranges() -> None:
    urls = ("s3://b/a.tar", "gs://b/a.tar", "https://host/a.tar", "/data/a.tar", "memory://a.tar")
    assert [has_ranges(url) for url in urls] == [True, True, False, False, False]
