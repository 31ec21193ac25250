"""imagen-pytorch's checkpoints of a trainer become checkpoints, sample, and train on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from imagen_core.conversion.imagen_pytorch_unet import convert_name
from imagen_core.train import load_checkpoint
from tests.commands import Result, call
from tests.imagen_core.conversion.imagen_pytorch.test_imagen_pytorch import EXPECTED
from tests.imagen_core.conversion.minimagen.numbers import weights

UNETS = [EXPECTED["base"]["imagen"]["unets"][0], EXPECTED["super"]["imagen"]["unets"][1]]
IMAGEN: dict[str, Any] = {"unets": UNETS, "image_sizes": [4, 8], "timesteps": [4, 3], "cond_drop_prob": 0.1}
STATES = [
    weights(EXPECTED[case]["shapes"] | {"text_to_cond.weight": [width, 64]})
    for case, width in (("base", 16), ("super", 8))
]
NAME = "mid_block1.block1.project.weight"
HERE = f"net.{convert_name(NAME)}"


def checkpoint(kind: str = "original", imagen: object = IMAGEN, **more: Any) -> dict[str, Any]:
    """As ImagenTrainer.save has it; averages are 1.5 times the weights, and only the first UNet's were updated."""
    model = {f"unets.{index}.{name}": t for index, state in enumerate(STATES) for name, t in state.items()}
    ema = {f"{index}.ema_model.{name}": 1.5 * t for index, state in enumerate(STATES) for name, t in state.items()}
    ema |= {"0.initted": torch.tensor(True), "1.initted": torch.tensor(False)}
    file = {"model": model, "version": "2.1.0", "steps": torch.tensor([7, 0]), "optim0": {"state": {}}, "ema": ema}
    return file | ({} if imagen is None else {"imagen_type": kind, "imagen_params": imagen}) | more


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def imported(out: Path, *files: Path) -> Result:
    return call("import", "imagen-pytorch", *map(str, files), "--out", str(out), "--encoder-model", "tiny-random-t5")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["original", "elucidated"])
def test_a_trainers_checkpoint_becomes_checkpoints_that_sample(kind: str, tmp_path: Path) -> None:
    steps = {"timesteps": [4, 3]} if kind == "original" else {"num_sample_steps": [4, 3]}
    imagen = {name: value for name, value in IMAGEN.items() if name != "timesteps"} | steps
    out = tmp_path / "run"
    result = imported(out, saved(tmp_path / "imagen.pt", checkpoint(kind, imagen)))
    assert result.code == 0, result.err
    for index in range(2):
        loaded = load_checkpoint(out / f"unet-{index}")
        assert (loaded.stage.size_px, loaded.stage.low_res_px) == ((4, None), (8, 4))[index]
        assert loaded.stage.diffusion.objective == ("eps" if kind == "original" else "edm")
        assert loaded.encoder is not None
        assert loaded.encoder["fingerprint"]["max_tokens"] == 256
        assert loaded.max_tokens == 6
        averaged = STATES[index][NAME] * (1.5 if index == 0 else 1)
        assert loaded.denoiser.state_dict()[HERE].equal(averaged)
    stages = yaml.safe_load((out / "sample.yaml").read_text())["stages"]
    assert [stage["sampling"]["num_steps"] for stage in stages] == ([5, 4] if kind == "original" else [4, 3])
    assert stages[1]["sampling"]["threshold"] == {"kind": "dynamic", "percentile": 0.95}
    command = ["run", "sample", "-c", str(out / "sample.yaml"), "--out", str(tmp_path / "generated"), "--quiet"]
    result = call(*command, "prompts=[a small red circle]", "device=cpu", "encoder_model=tiny-random-t5")
    assert result.code == 0, result.err
    assert Image.open(tmp_path / "generated/images-8/00000.png").size == (8, 8)


@pytest.mark.slow
def test_an_imported_model_trains_on(cascade: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "imagen.pt", checkpoint(imagen=IMAGEN | {"image_sizes": [16, 32]}))
    assert imported(tmp_path / "run", file).code == 0
    command = ["run", "train", "-c", str(tmp_path / "run/unet-0/train.yaml"), "--out", str(tmp_path / "on"), "--quiet"]
    result = call(*command, f"store={cascade}/run/store", "text=t5", "num_steps=1", "batch_size=2")
    assert result.code == 0, result.err
    difference = load_checkpoint(tmp_path / "on", "model").denoiser.state_dict()[HERE] - 1.5 * STATES[0][NAME]
    assert 0 < difference.abs().max() < 1e-2


def test_settings_come_from_a_file_next_to_a_checkpoint_without_them(tmp_path: Path) -> None:
    states = []
    for number, (file, settings) in enumerate(
        (
            (checkpoint(), None),
            (checkpoint(imagen=None), {"type": "original", "imagen": IMAGEN, "trainer": {"lr": 1e-4}}),
            (checkpoint(imagen=None), {"imagen": IMAGEN, "elucidated": False}),
        )
    ):
        path = saved(tmp_path / f"imagen-{number}.pt", file)
        if settings is not None:
            path.with_suffix(".json").write_text(json.dumps(settings))
        result = imported(tmp_path / f"run-{number}", path)
        assert result.code == 0, result.err
        loaded = load_checkpoint(tmp_path / f"run-{number}/unet-1")
        states.append((loaded.stage, loaded.denoiser.state_dict()))
    for stage, state in states[1:]:
        assert stage == states[0][0]
        assert all(values.equal(states[0][1][name]) for name, values in state.items())


def test_unets_trained_apart_make_one_cascade(tmp_path: Path) -> None:
    files = [
        saved(tmp_path / f"{index}.pt", checkpoint(imagen=IMAGEN | {"unets": unets}))
        for index, unets in enumerate(([UNETS[0], {"is_null": True}], [{"is_null": True}, UNETS[1]]))
    ]
    result = imported(tmp_path / "run", files[1], files[0])
    assert result.code == 0, result.err
    assert "0.pt -> " in result.out.splitlines()[0]
    assert "1.pt -> " in result.out.splitlines()[1]


def test_group_norms_of_versions_before_2_are_read(tmp_path: Path) -> None:
    old = EXPECTED["base bare of 1.26.3"]
    state = weights(old["shapes"] | {"text_to_cond.weight": [8, 64]})
    model = {f"unets.0.{name}": values for name, values in state.items()}
    file = {"model": model, "version": "1.26.3", "imagen_type": "original", "imagen_params": old["imagen"]}
    result = imported(tmp_path / "run", saved(tmp_path / "imagen.pt", file))
    assert result.code == 0, result.err
    loaded = load_checkpoint(tmp_path / "run/unet-0")
    assert loaded.denoiser.state_dict()["net.final.layer.norm1.bias"].equal(
        state["final_res_block.block1.groupnorm.bias"]
    )


def test_a_model_without_captions_has_no_encoder(tmp_path: Path) -> None:
    imagen = EXPECTED["base without captions"]["imagen"]
    state = weights(EXPECTED["base without captions"]["shapes"])
    model = {f"unets.0.{name}": values for name, values in state.items()}
    file = {"model": model, "version": "2.1.0", "imagen_type": "original", "imagen_params": imagen}
    result = call("import", "imagen-pytorch", str(saved(tmp_path / "i.pt", file)), "--out", str(tmp_path / "run"))
    assert result.code == 0, result.err
    assert load_checkpoint(tmp_path / "run/unet-0").encoder is None
    assert "text=t5" not in result.out


def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    result = imported(tmp_path / "run", saved(tmp_path / "imagen.pt", checkpoint(scheduler0=Payload())))
    assert result.code == 2
    assert "imagen.pt: cannot be read as tensors" in result.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_imported_exactly_is_refused(tmp_path: Path) -> None:
    def refused(words: str, content: object, beside: str | None = None) -> None:
        file = saved(tmp_path / "imagen.pt", content)
        file.with_suffix(".json").unlink(missing_ok=True)
        if beside is not None:
            file.with_suffix(".json").write_text(beside)
        result = imported(tmp_path / "refused", file)
        assert result.code == 2, result.err
        assert words in result.err
        assert len(result.err.splitlines()) == 1
        assert not (tmp_path / "refused").exists()

    def with_unet(**changes: Any) -> dict[str, Any]:
        return checkpoint(imagen=IMAGEN | {"unets": [UNETS[0] | changes, UNETS[1]]})

    refused("imagen_params: p2_loss_weight_k: not a setting", checkpoint(imagen=IMAGEN | {"p2_loss_weight_k": 1}))
    refused("unets.0: final_resnet_block is False", with_unet(final_resnet_block=False))
    refused("unets.0: dim: Input should be a valid integer, unable to parse", with_unet(dim="banana"))
    refused("as an integer (got 'banana')", with_unet(dim="banana"))
    refused("the weights of unets.0 do not fit the settings: ", with_unet(dim_mults=[-1, 2]))
    refused("sampling cannot be followed here: num_steps", checkpoint(imagen=IMAGEN | {"timesteps": -1}))
    refused("the weights of unets.0 do not fit the settings", with_unet(cond_dim=8))
    refused("is of version 1.20.3 of imagen-pytorch", checkpoint(version="1.20.3"))
    refused("names no version", checkpoint(version=None))
    refused("its type must be original or elucidated (got 'video')", checkpoint("video"))
    refused(f"put its settings at {tmp_path}/imagen.json", checkpoint(imagen=None))
    refused("has no imagen in it", checkpoint(imagen=None), "{}")
    refused("cannot be read as JSON", checkpoint(imagen=None), "no json")
    refused("has no model in it", {"state_dict": {}})
    result = imported(tmp_path / "refused", tmp_path / "none.pt")
    assert result.code == 2
    assert "none.pt: there is no such file" in result.err
