"""The files behind a path: what is there is found or counted as ignored, and what cannot be read is named."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from stages.sources.files import find_files, named_parts


def test_hidden_files_and_other_suffixes_are_left_out_and_counted(tmp_path: Path) -> None:
    for name in (
        "a.tar",
        "sub/b.tgz",
        "sub/c.tar.zst",
        "._a.tar",
        ".ipynb_checkpoints/a.tar",
        "__MACOSX/a.tar",
        "x.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    ignored: Counter[str] = Counter()
    found = find_files(str(tmp_path), "source.path", ("tar",), ignored=ignored)
    assert found == {"a.tar": 1, "sub/b.tgz": 1, "sub/c.tar.zst": 1}
    assert ignored == {"hidden": 2, "of the operating system": 1, ".md files": 1}
    assert [part.name for part in named_parts(found)] == ["a", "b", "c"]


def test_a_subfolder_that_may_not_be_read_is_refused_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walk(path: str, onerror: Callable[[OSError], None]) -> Iterator[None]:
        yield None
        onerror(PermissionError(13, "Permission denied", f"{path}/secret"))

    (tmp_path / "a.tar").write_bytes(b"x")
    monkeypatch.setattr("stages.sources.files.os.walk", walk)
    with pytest.raises(ConfigError, match=r"source.path: .*/secret cannot be read: Permission denied; let this user"):
        find_files(str(tmp_path), "source.path", ("tar",))
