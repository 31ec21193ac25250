"""`pipeline export` and `pipeline import` refuse a place that cannot be made before they read anything."""

from pathlib import Path

import fsspec
import pytest

from imagen_core.train import CheckpointError
from stages.checkpoints.load import load_checkpoint_from
from tests.commands import call


@pytest.mark.parametrize("below", ["file/new", "file/new/deeper"])
@pytest.mark.parametrize("command", [["export", "nothing"], ["import", "minimagen", "nothing"]])
def test_a_place_below_a_file_is_refused_by_name(tmp_path: Path, command: list[str], below: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    out = tmp_path / (f"{below}.safetensors" if command[0] == "export" else below)
    result = call(*command, "--out", str(out))
    assert result.code == 2
    assert result.err.startswith(f"error: --out {out}: ")
    assert str(tmp_path / "file") in result.err


def test_a_damaged_checkpoint_of_an_object_store_is_named_by_its_place() -> None:
    place = "memory://far-checkpoint/checkpoints/step-00000002/state.json"
    fsspec.filesystem("memory").pipe_file(place, b"{")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint_from("memory://far-checkpoint", None)
    assert str(caught.value).startswith(f"{place}: cannot be read")
