"""Lines of every text file end at line feeds only."""

import io
from pathlib import Path

import pytest

from stages.lines import split_lines, stream_lines
from stages.sampling.config import RequestConfig
from stages.sampling.requests import resolve_requests
from stages.sources.file_lists import find_listed
from stages.sources.folder import FolderConfig
from stages.store_tools.remove import _read_values

ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
"""One line for a text editor; eight for `str.splitlines`."""


@pytest.mark.parametrize(
    ("text", "lines"),
    [("", []), ("\n", [""]), ("a", ["a"]), ("a\r\nb\n", ["a", "b"]), ("\ufeffa\n\nb", ["a", "", "b"]), (ODD, [ODD])],
)
def test_lines_end_at_line_feeds_with_or_without_a_carriage_return(text: str, lines: list[str]) -> None:
    data = text.encode()
    assert split_lines(data) == lines
    assert [line.rstrip("\n").removesuffix("\r") for line in stream_lines(io.BytesIO(data))] == lines


def test_every_reader_of_text_files_splits_alike(tmp_path: Path) -> None:
    odd = ODD.replace("\x1c", "")
    (tmp_path / "list.txt").write_bytes(f"\ufeff{odd}\r\nsecond\n".encode())
    prompts = [request.prompt for request in resolve_requests(RequestConfig(prompts_file=str(tmp_path / "list.txt")))]
    assert prompts == [odd, "second"]
    assert _read_values("key", [str(tmp_path / "list.txt")]) == {odd, "second"}
    (tmp_path / "files").mkdir()
    for name in (odd, "second"):
        (tmp_path / "files" / name).write_text("")
    assert list(find_listed(str(tmp_path / "files"), str(tmp_path / "list.txt"))) == [odd, "second"]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    (tmp_path / "list.txt").rename(tmp_path / "images" / "a.txt")
    (shard,) = FolderConfig(path=str(tmp_path / "images")).build().shards(10)
    assert shard.rows[0][1] == [odd, "second"]


def test_prompts_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(Exception, match="give a UTF-8 text file"):
        resolve_requests(RequestConfig(prompts_file=str(tmp_path / "p.txt")))
