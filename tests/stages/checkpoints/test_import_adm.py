"""Models of guided-diffusion, improved-diffusion and nostalgebraist's fork become checkpoints, and sample."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from imagen_core.conversion.adm_unet import convert_name
from imagen_core.models.unet.regular import RegularUNetConfig
from imagen_core.train import load_checkpoint
from pipeline.errors import ConfigError
from stages.checkpoints.import_adm import parse_flags
from tests.commands import Result, call
from tests.imagen_core.conversion.adm.test_adm import CASES
from tests.imagen_core.conversion.minimagen.numbers import weights

BASE, UPSAMPLER = CASES["ordered by kind"], CASES["upsampler"]


def saved(folder: Path, name: str, case: dict[str, Any]) -> Path:
    torch.save(weights(case["shapes"]), folder / name)
    return folder / name


def imported(out: Path, *arguments: str | Path) -> Result:
    return call("import", "adm", *map(str, arguments), "--out", str(out))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path, "base.pt", BASE)


def test_flags_of_a_readme_become_a_checkpoint(base: Path, tmp_path: Path) -> None:
    result = imported(tmp_path / "run", base, "--flags", BASE["flags"] + " --model_path models/x.pt --batch_size 4")
    assert result.code == 0, result.err
    assert "base.pt -> " in result.out
    assert "store=STORE\n" in result.out, "it reads no captions"
    loaded = load_checkpoint(tmp_path / "run/unet-0")
    assert loaded.encoder is None
    mine = loaded.denoiser.state_dict()
    assert isinstance(loaded.stage.unet, RegularUNetConfig)
    name = "input_blocks.1.0.in_layers.2.weight"
    assert mine[f"net.{convert_name(name, loaded.stage.unet)}"].equal(weights(BASE["shapes"])[name])
    assert yaml.safe_load((tmp_path / "run/sample.yaml").read_text())["stages"][0]["sampling"] == {
        "sampler": {"kind": "ddim"},
        "grid": {"kind": "respaced", "sections": "ddim25"},
        "num_steps": 25,
        "threshold": {"kind": "static"},
        "start": "unit_variance",
    }


@pytest.mark.slow
def test_a_base_model_and_an_upsampler_sample_together(base: Path, tmp_path: Path) -> None:
    upsampler = saved(tmp_path, "upsampler.pt", UPSAMPLER)
    upsampler.with_suffix(".flags").write_text(f'MODEL_FLAGS="{UPSAMPLER["flags"]}"\nSAMPLE_FLAGS="--num_samples 4"\n')
    base.with_suffix(".flags").write_text(BASE["flags"])
    out = tmp_path / "run"
    result = imported(out, upsampler, base)
    assert result.code == 0, result.err
    command = ["run", "sample", "-c", str(out / "sample.yaml"), "--out", str(tmp_path / "generated"), "--quiet"]
    changes = [f"stages.{k}.sampling={{grid: {{kind: respaced, sections: '2'}}, num_steps: 2}}" for k in (0, 1)]
    result = call(*command, "prompts=[a, b]", "labels=[3, 998]", "device=cpu", *changes)
    assert result.code == 0, result.err
    assert Image.open(tmp_path / "generated/images-64/00001.png").size == (64, 64)


@pytest.mark.slow
def test_an_imported_model_trains_on(cascade: Path, tmp_path: Path) -> None:
    case = CASES["bound"]
    model = saved(tmp_path, "ema_0.9999_000100.pt", case)
    assert imported(tmp_path / "run", model, "--flags", case["flags"]).code == 0
    command = ["run", "train", "-c", str(tmp_path / "run/unet-0/train.yaml"), "--out", str(tmp_path / "on"), "--quiet"]
    result = call(*command, f"store={cascade}/run/store", "num_steps=1", "batch_size=2")
    assert result.code == 0, result.err
    loaded = load_checkpoint(tmp_path / "on", "model")
    assert loaded.stage.diffusion.loss == "rescaled_kl"
    before = weights(case["shapes"])["input_blocks.0.0.weight"]
    assert 0 < (loaded.denoiser.state_dict()["net.conv_in.weight"] - before).abs().max() < 1e-2


def test_a_model_of_the_fork_is_read_with_its_config_json(tmp_path: Path) -> None:
    case = CASES["of the fork"]
    model = saved(tmp_path, "ema_0.9999_001000.pt", case)
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    result = imported(tmp_path / "run", model)
    assert result.code == 0, result.err
    assert load_checkpoint(tmp_path / "run/unet-0").stage.diffusion.weight == "snr_plus_one"
    (tmp_path / "config.json").write_text(json.dumps(case["config"] | {"txt": True}))
    refused(
        imported(tmp_path / "other", model), "config.json: txt is True, but only False has a counterpart", tmp_path
    )
    (tmp_path / "config.json").write_text(json.dumps({"image_size": 64}))
    refused(imported(tmp_path / "other", model), "config.json: has no is_super_res", tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused(imported(tmp_path / "other", model), "config.json: ", tmp_path)


def refused(result: Result, words: str, folder: Path) -> None:
    assert result.code == 2, result.out
    assert words in result.err
    assert "\n" not in result.err.strip()
    assert not (folder / "other").exists()


def test_what_cannot_be_imported_exactly_is_refused(base: Path, tmp_path: Path) -> None:
    other, flags = tmp_path / "other", BASE["flags"]
    refused(imported(other, base), "its settings are in no such file; give the flags of its README", tmp_path)
    refused(imported(other, base, "--flags", flags, "--flags", flags), "--flags: 2 given for 1 files", tmp_path)
    refused(imported(other, base, "--flags", flags + " --depth 2"), "--flags: depth: not a flag", tmp_path)
    refused(imported(other, base, "--flags", "image_sample.py " + flags), "'image_sample.py' is no flag", tmp_path)
    refused(imported(other, base, "--flags", flags + " --num_channels 64"), "do not fit the settings", tmp_path)
    refused(
        imported(other, base, "--flags", flags + " --num_heads 3"), "--flags: num_heads 3 does not divide", tmp_path
    )
    refused(imported(other, base, "--flags", flags + " '"), "--flags: No closing quotation", tmp_path)
    refused(imported(other, base, base, "--flags", flags, "--flags", flags), "images of [16, 16] pixels", tmp_path)
    refused(imported(other, base, "--encoder-model", "x"), "--encoder-model x: these models read no", tmp_path)
    refused(imported(other, tmp_path / "none.pt", "--flags", flags), "there is no such file", tmp_path)
    result = call("import", "nemo", str(base), "--out", str(other), "--flags", flags)
    refused(result, "--flags: models of nemo have none", tmp_path)


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    for content, words in (
        (
            {"input_blocks.0.0.weight": torch.ones(8, 3, 3, 3), "out.2.c_proj.weight": torch.ones(5, 8, 1)},
            "classifier",
        ),
        ({"state": {}, "param_groups": []}, "something else, such as an optimizer's state"),
        ([torch.ones(1)], "has no tensors by name in it"),
    ):
        torch.save(content, file)
        refused(imported(tmp_path / "other", file, "--flags", BASE["flags"]), words, tmp_path)


class Harmful:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/never-imported"),)


def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    torch.save({"input_blocks.0.0.weight": Harmful()}, tmp_path / "file.pt")
    result = imported(tmp_path / "other", tmp_path / "file.pt", "--flags", BASE["flags"])
    refused(result, "cannot be read as tensors", tmp_path)
    assert not Path("/tmp/never-imported").exists()


def test_flags_are_read_from_lines_of_a_shell() -> None:
    text = 'MODEL_FLAGS="--image_size 64 --class_cond True" # base\nDIFFUSION_FLAGS="--noise_schedule=cosine"\n'
    expected = [("image_size", "64"), ("class_cond", "True"), ("noise_schedule", "cosine")]
    assert list(parse_flags(text)) == expected
    for wrong in ("--image_size", "--image_size --class_cond True", "64"):
        with pytest.raises((ValueError, ConfigError), match="is no flag with a value"):
            list(parse_flags(wrong))
