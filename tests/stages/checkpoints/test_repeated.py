"""A killed import or export may be started again, whatever it had done; another one is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from imagen_core.diffusion import Denoiser, DenoiserConfig
from imagen_core.train import LoadedDenoiser, load_checkpoint
from pipeline.errors import ConfigError
from stages.checkpoints import export
from stages.checkpoints.export import export_model
from stages.checkpoints.imported import ImportedStage, new_folder, write_stages
from tests.commands import tree

UNET = {
    "family": "efficient",
    "image_size_px": 8,
    "embed_dim": 32,
    "channel_mult": [1],
    "num_res_blocks": [1],
    "attention_levels": [False],
    "head_dim": 16,
    "text_dim": 8,
    "low_res": False,
}
CONFIG = DenoiserConfig.model_validate({"size_px": 8, "unet": UNET})


@pytest.fixture(scope="module")
def network() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(Denoiser(CONFIG).net.state_dict())


def imported(out: Path, network: dict[str, torch.Tensor], *, max_tokens: int = 16) -> dict[str, Any]:
    stage = ImportedStage("weights.pt", CONFIG, {"num_steps": 2}, max_tokens, lambda: network)
    encoder = {"name": "t5", "dim": 8, "dtype": "float32", "fingerprint": {}}
    return dict(write_stages(new_folder(str(out)), [stage], encoder)[0])


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tree(folder)}


def test_the_same_import_again_changes_nothing_and_says_the_same(tmp_path: Path, network: dict[str, Any]) -> None:
    out = tmp_path / "model"
    first = imported(out, network)
    files = contents(tmp_path)
    assert imported(out, network) == first
    assert contents(tmp_path) == files
    assert load_checkpoint(out / "unet-0").max_tokens == 16


def test_an_import_takes_the_place_of_a_killed_one(tmp_path: Path, network: dict[str, Any]) -> None:
    half = tmp_path / ".tmp-model" / "unet-0" / "checkpoints"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    imported(tmp_path / "model", network)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_import_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def refuse() -> dict[str, torch.Tensor]:
        raise ConfigError("weights.pt: do not fit")

    stage = ImportedStage("weights.pt", CONFIG, {}, 16, refuse)
    with pytest.raises(ConfigError, match="do not fit"):
        write_stages(new_folder(str(tmp_path / "model")), [stage], {})
    assert list(tmp_path.iterdir()) == []


def test_another_import_and_other_files_are_refused_and_stay(tmp_path: Path, network: dict[str, Any]) -> None:
    imported(tmp_path / "model", network)
    files = contents(tmp_path)
    with pytest.raises(ConfigError, match="model: holds another import; give a new folder"):
        imported(tmp_path / "model", network, max_tokens=17)
    assert contents(tmp_path) == files
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for out, words in (("mine", "is not empty"), ("mine/notes.txt", "is a file"), ("mine/notes.txt/a/b", "is a file")):
        with pytest.raises(ConfigError, match=words):
            imported(tmp_path / out, network)


@pytest.fixture
def model(network: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> LoadedDenoiser:
    """What `export_model` loads."""
    denoiser = Denoiser(CONFIG)
    denoiser.net.load_state_dict(network)
    loaded = LoadedDenoiser(denoiser, None, {}, step=3, weights="model", sha256="", max_tokens=16)
    monkeypatch.setattr(export, "load_checkpoint_from", lambda *_: loaded)
    return loaded


def test_the_same_export_again_changes_nothing_and_another_is_refused(tmp_path: Path, model: LoadedDenoiser) -> None:
    out = tmp_path / "a" / "model.safetensors"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".tmp-model.safetensors").write_bytes(b"half")  # of a killed one
    first = export_model("run", out=str(out))
    data = out.read_bytes()
    assert export_model("run", out=str(out)) == first
    assert (out.read_bytes(), [path.name for path in out.parent.iterdir()]) == (data, ["model.safetensors"])
    out.write_bytes(b"another")
    with pytest.raises(ConfigError, match="exists, and is another model or file; give a new file"):
        export_model("run", out=str(out))
    assert out.read_bytes() == b"another"
    with pytest.raises(ConfigError, match=r"model\.safetensors is a file, not a folder; give another place"):
        export_model("run", out=str(out / "model.safetensors"))


def test_an_export_is_durable_before_it_has_its_name(
    tmp_path: Path, model: LoadedDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr("pipeline.storage.files.fsync_path", lambda path: synced.append(path.name))
    export_model("run", out=str(tmp_path / "model.safetensors"))
    assert synced[-2:] == ["model.safetensors", tmp_path.name]
