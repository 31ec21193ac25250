"""Files of torch.save are read as tensors alone; all others are refused by one class of error."""

import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stages.torch_files import NotTensorsError, read_torch_file

RUN = "ran"


class Harmful:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (Path(RUN),)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_data_are_read_from_both_formats(zipped: bool, tmp_path: Path) -> None:
    content = {"weights": torch.arange(3.0), "steps": [1, "two"]}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    for file in (tmp_path / "file.pt", io.BytesIO((tmp_path / "file.pt").read_bytes())):
        found = read_torch_file(file)
        assert found["weights"].tolist() == [0, 1, 2]
        assert found["steps"] == [1, "two"]


@pytest.mark.parametrize("plain", [False, True])
def test_what_would_run_code_is_named_and_not_run(
    plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = io.BytesIO()
    if plain:
        pickle.dump({"weights": Harmful()}, file)
    else:
        torch.save({"weights": Harmful()}, file)
    file.seek(0)
    with warnings.catch_warnings(action="error"), pytest.raises(NotTensorsError) as caught:
        read_torch_file(file)
    assert not (tmp_path / RUN).exists()
    assert "weights_only" not in str(caught.value), "torch's own text says how the code could be run"
    assert len(str(caught.value).splitlines()) == 1
    if not plain:
        assert str(caught.value).endswith("which is no tensor, and of which nothing was run")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"hello world", b"<html>", b"a", b"K", b"u.", b"\x80\x02.", b"PK\x03\x04", pickle.dumps([1])),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n",
    ],
)
def test_other_bytes_are_no_file_of_torch_save(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(data)
    for file in (tmp_path / "file.pt", io.BytesIO(data)):
        with pytest.raises(NotTensorsError, match="no file of torch"):
            read_torch_file(file)


def test_a_missing_file_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "none.pt")
