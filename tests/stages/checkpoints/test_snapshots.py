"""An average that is rebuilt from snapshots, exported, and read from an object store."""

import shutil
from pathlib import Path

import fsspec
import pytest
import torch

from imagen_core.train import CheckpointError, load_checkpoint, train
from stages.checkpoints.load import load_checkpoint_from
from tests.commands import call
from tests.imagen_core.train.small import make_config, make_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    ema = {"rates": [0.9], "profiles": [0.05, 0.1], "snapshot_every_steps": 1}
    train(make_config(make_store(folder / "store"), precision="float32", num_steps=16, ema=ema), folder / "base")
    return folder / "base"


def test_the_exported_average_is_the_rebuilt_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "base.safetensors"
    assert call("export", str(run), "--weights", "power-0.07", "--out", str(out)).code == 0
    exported, rebuilt = load_checkpoint(out), load_checkpoint(run, "power-0.07")
    assert (exported.weights, exported.step) == ("power-0.07", 16)
    wanted = rebuilt.denoiser.state_dict()
    assert all(torch.equal(values, wanted[name]) for name, values in exported.denoiser.state_dict().items())
    refused = call("export", str(run), "--weights", "power-0.005", "--out", str(tmp_path / "other.safetensors"))
    assert (refused.code, "weights 'power-0.005' cannot be rebuilt" in refused.err) == (2, True)
    assert not (tmp_path / "other.safetensors").exists()


def test_an_average_is_rebuilt_from_an_object_store_too(run: Path) -> None:
    url = "memory://far-snapshots/base"
    fsspec.filesystem("memory").put(str(run), url, recursive=True)
    for place, local in (
        (url, run),
        (f"{url}/checkpoints/step-00000016", run),
        (f"{url}/snapshots/step-00000010", run / "snapshots/step-00000010"),
    ):
        far, near = load_checkpoint_from(place, "power-0.07"), load_checkpoint(local, "power-0.07")
        assert (far.step, far.sha256) == (near.step, near.sha256)
        assert far.place.startswith(url)
    with pytest.raises(CheckpointError, match=r"memory://far-snapshots/base.* cannot be rebuilt"):
        load_checkpoint_from(url, "power-0.005")


def test_a_checkpoint_alone_has_its_own_lengths_only(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints/step-00000016", tmp_path / "alone/step-00000016")
    alone = tmp_path / "alone/step-00000016"
    assert load_checkpoint(alone, "power-0.05").weights == "power-0.05"
    with pytest.raises(CheckpointError, match=r"weights 'power-0.02' cannot be rebuilt from 2 averages"):
        load_checkpoint(alone, "power-0.02")
