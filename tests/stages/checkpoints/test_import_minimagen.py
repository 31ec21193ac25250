"""M8, M9: a training directory of MinImagen becomes checkpoints, and draws."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from imagen_core.conversion.minimagen import convert_name
from imagen_core.train import load_checkpoint
from tests.commands import Result, call
from tests.imagen_core.conversion.minimagen.numbers import weights
from tests.imagen_core.conversion.minimagen.test_minimagen import EXPECTED

IMAGEN = {"text_encoder_name": "t5_small", "image_sizes": [8, 16], "timesteps": 25, "cond_drop_prob": 0.15}
STATES = {
    case: weights(EXPECTED[case]["shapes"] | {"text_to_cond.weight": [8, 64]}) for case in ("BaseTest", "SuperTest")
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A training directory as MinImagen leaves it, with an encoder of 64 instead of 512 features."""
    root = tmp_path / "training_20260101_120000"
    for name in ("parameters", "state_dicts", "tmp"):
        (root / name).mkdir(parents=True)
    for index, (case, state) in enumerate(STATES.items()):
        settings = EXPECTED[case]["settings"] | {"lowres_cond": False, "text_embed_dim": 512}  # the cascade decides
        write(root / f"parameters/unet_{index}_params_20260101_120000.json", settings)
        torch.save(state, root / f"state_dicts/unet_{index}_state_20260101_120000.pth")
    write(root / "parameters/imagen_params_20260101_120000.json", IMAGEN)
    (root / "parameters/training_parameters_20260101_120000.txt").write_text("--TIMESTEPS=25\n")
    return root


def write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings))


def imported(directory: Path, out: Path) -> Result:
    return call("import", "minimagen", str(directory), "--out", str(out), "--encoder-model", "tiny-random-t5")


@pytest.mark.slow
def test_a_training_directory_becomes_checkpoints_that_draw(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = imported(directory, out)
    assert result.code == 0, result.err
    assert "unet_1_state_20260101_120000.pth -> " in result.out
    for index, (case, state) in enumerate(STATES.items()):
        loaded = load_checkpoint(out / f"unet-{index}")
        assert (loaded.stage.size_px, loaded.stage.low_res_px) == ((8, None), (16, 8))[index]
        assert loaded.stage.diffusion.schedule.model_dump() == {"kind": "discrete", "num_steps": 25, "beta": "linear"}
        assert loaded.encoder is not None
        assert loaded.encoder["fingerprint"]["max_tokens"] == 256
        mine = loaded.denoiser.state_dict()
        assert mine[f"net.{convert_name('mid_block1.block1.project.weight')}"].equal(
            state["mid_block1.block1.project.weight"]
        ), case
    command = ["run", "sample", "-c", str(out / "sample.yaml"), "--out", str(tmp_path / "generated"), "--quiet"]
    result = call(*command, "prompts=[a small red circle]", "device=cpu", "encoder_model=tiny-random-t5")
    assert result.code == 0, result.err
    assert Image.open(tmp_path / "generated/images-16/00000.png").size == (16, 16)
    sampling = yaml.safe_load((out / "sample.yaml").read_text())["stages"][0]["sampling"]
    assert sampling == {
        "sampler": {"kind": "ancestral"},
        "grid": {"kind": "uniform"},
        "num_steps": 25,
        "threshold": {"kind": "dynamic", "percentile": 0.9},
    }


def test_without_best_weights_the_last_ones_are_taken(directory: Path, tmp_path: Path) -> None:
    for index in range(2):
        (found,) = (directory / "state_dicts").glob(f"unet_{index}*")
        found.rename(directory / f"tmp/unet_{index}_tmp.pth")
    result = imported(directory, tmp_path / "run")
    assert result.code == 0, result.err
    assert "unet_0_tmp.pth" in result.out


class Harmful:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/never-imported"),))


def test_what_cannot_be_imported_exactly_is_refused(directory: Path, tmp_path: Path) -> None:
    settings = json.loads((directory / "parameters/unet_0_params_20260101_120000.json").read_text())
    state = directory / "state_dicts/unet_0_state_20260101_120000.pth"
    parameters = directory / "parameters/unet_0_params_20260101_120000.json"

    def refused(words: str) -> None:
        result = imported(directory, tmp_path / "refused")
        assert result.code == 2
        assert words in result.err
        assert not (tmp_path / "refused").exists()

    write(parameters, settings | {"depth": 2})
    refused("depth: not a setting")
    write(parameters, settings | {"dim": 16})
    refused("does not fit the settings in parameters/: ")
    write(parameters, settings)
    torch.save(Harmful(), state)
    refused("cannot be read as tensors")
    state.unlink()
    refused("needs one unet_0_*.pth (found none)")
    write(directory / "parameters/imagen_params_20260101_120000.json", IMAGEN | {"elucidated": True})
    refused("elucidated")
    assert not Path("/tmp/never-imported").exists()


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    result = imported(tmp_path, tmp_path / "run")
    assert result.code == 2
    assert "has no parameters/unet_0_params_*.json" in result.err


def test_weights_that_are_a_pickle_with_code_are_refused_and_run_nothing(directory: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"weight": Payload()}, directory / "state_dicts/unet_0_state_20260101_120000.pth")
    result = imported(directory, tmp_path / "run")
    assert result.code == 2
    assert "unet_0_state_20260101_120000.pth: cannot be read as tensors" in result.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()
