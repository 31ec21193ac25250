import json
import shutil
from pathlib import Path

import pytest
import torch

from imagen_core.train import load_checkpoint
from imagen_core.train.checkpoints.load import SHARED
from stages.checkpoints.load import load_checkpoint_from
from stages.hub.package import MODEL
from tests.commands import call
from tests.hub_server import Blob, Hub, Repository
from tests.stages.hub.test_push import cells, metadata

MODELS = "models/me/base"


@pytest.mark.slow
def test_a_trained_model_is_pushed_as_the_file_of_an_export_and_samples_when_pulled(
    hub: Hub, cascade: Path, tmp_path: Path
) -> None:
    result = call("push", str(cascade / "base"), "me/base", "--license", "apache-2.0")
    assert result.code == 0, result.err
    files = hub.repositories[MODELS].files()
    card = files.pop("README.md")
    assert call("export", str(cascade / "base"), "--out", str(tmp_path / "base.safetensors")).code == 0
    assert files == {SHARED: (tmp_path / "base.safetensors").read_bytes()}
    assert MODEL.head == SHARED

    model = load_checkpoint(cascade / "base")
    head = metadata(card)
    assert (head["license"], head["library_name"], head["pipeline_tag"]) == (
        "apache-2.0",
        "imagen-precompute",
        "text-to-image",
    )
    rows = cells(card)
    assert rows["images"] == ["16 px"]
    assert rows["parameters"] == [f"{sum(p.numel() for p in model.denoiser.parameters()):,}"]
    assert rows["weights"] == [f"{model.weights} of step 6"]
    assert rows["bytes"][0].startswith(f"{len(files[SHARED]):,} (")
    assert rows["t5"][0] == "`tiny-random-t5`"

    out = tmp_path / "pulled"
    pulled = call("pull", "me/base", "--out", str(out))
    assert pulled.code == 0, pulled.err
    assert f"{{checkpoint: {out}}}" in pulled.out
    for loaded in (load_checkpoint(out), load_checkpoint_from(f"file://{out}", None)):
        assert (loaded.step, loaded.weights) == (6, model.weights)
        for name, value in model.denoiser.state_dict().items():
            assert torch.equal(loaded.denoiser.state_dict()[name], value)
    sampled = call(
        *("run", "sample", "--out", str(tmp_path / "images"), "--quiet"),
        *(f"stages=[{{checkpoint: {out}}}]", "prompts=[a red fox]"),
    )
    assert sampled.code == 0, sampled.err
    assert (tmp_path / "images/images-16/00000.png").is_file()
    sent = len(hub.uploads)
    assert call("push", str(out), "me/base").code == 0
    assert len(hub.uploads) == sent
    code = card.decode().partition("```python\n")[2].partition("```")[0]
    exec(code.replace('"MODEL/', f'"{out}/'), {})


@pytest.mark.slow
def test_weights_choose_an_average_and_a_wrong_name_is_refused(hub: Hub, cascade: Path) -> None:
    assert call("push", str(cascade / "sr"), "me/sr", "--weights", "model").code == 0
    rows = cells(hub.repositories["models/me/sr"].files()["README.md"])
    assert (rows["weights"], rows["images"]) == (["model of step 6"], ["16 -> 32 px"])
    result = call("push", str(cascade / "sr"), "me/sr", "--weights", "best")
    assert (result.code, "'best'" in result.err) == (2, True)


def test_a_checkpoint_without_its_state_is_no_shared_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from imagen_core.train import CheckpointError

    save_file({"x": torch.zeros(2)}, tmp_path / SHARED)
    with pytest.raises(CheckpointError, match="metadata do not fit"):
        load_checkpoint(tmp_path)


def diffusers_folder(folder: Path, card: str | None) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    (folder / "unet/config.json").write_text("{}")
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("not for others")
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def test_a_diffusers_folder_keeps_its_own_card_with_the_licence_filled_in(hub: Hub, tmp_path: Path) -> None:
    own = '---\nlicense: unknown\ntags: [cascade]\n---\n\n# Mine\n\n```python\npipe = load("FOLDER")\n```\n'
    folder = diffusers_folder(tmp_path / "pipe", own)
    assert call("push", str(folder), "me/pipe", "--license", "mit").code == 0
    files = hub.repositories["models/me/pipe"].files()
    card = files.pop("README.md")
    assert set(files) == {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert metadata(card) == {"license": "mit", "tags": ["cascade"]}
    assert '# Mine\n\n```python\npipe = load("me/pipe")' in card.decode()
    assert call("pull", "me/pipe", "--out", str(tmp_path / "back")).code == 0
    assert (tmp_path / "back/unet/diffusion_pytorch_model.safetensors").read_bytes() == b"weights"


def test_a_diffusers_folder_without_a_card_gets_one(hub: Hub, tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "pipe", None)
    assert call("push", str(folder), "me/pipe").code == 0
    card = hub.repositories["models/me/pipe"].files()["README.md"]
    assert (metadata(card)["license"], metadata(card)["library_name"]) == ("unknown", "diffusers")
    assert 'DiffusionPipeline.from_pretrained("me/pipe")' in card.decode()
    assert "`DDPMPipeline`" in card.decode()


def test_other_files_of_a_models_repository_stay(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["models/me/pipe"] = Repository()
    hub.repositories["models/me/pipe"].add("main", {"grid.png": Blob(b"image", False)})
    folder = diffusers_folder(tmp_path / "pipe", None)
    assert call("push", str(folder), "me/pipe").code == 0
    (folder / "unet/config.json").write_text('{"changed": true}')
    assert call("push", str(folder), "me/pipe").code == 0
    files = hub.repositories["models/me/pipe"].files()
    assert files["grid.png"] == b"image"
    assert files["unet/config.json"] == b'{"changed": true}'
    shutil.rmtree(folder)
