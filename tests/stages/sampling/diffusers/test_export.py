"""`pipeline export --to diffusers`: a folder that diffusers opens without this package, with the same images."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from imagen_core.cascade import Cascade, CascadeStage, SamplingConfig
from imagen_core.train import LoadedDenoiser
from stages.sampling.cascade import load_cascade
from stages.sampling.config import SampleStageConfig
from stages.sampling.diffusers import export
from stages.sampling.diffusers.card import model_card
from stages.sampling.diffusers.encoder import ExportedEncoder
from tests.commands import call, tree
from tests.stages.sampling.diffusers.models import (
    DISCRETE,
    EFFICIENT,
    ENCODER,
    HYBRID,
    REGULAR,
    SUPER,
    TEXT_DIM,
    denoiser,
    save,
)
from tests.trained import write_cascade

OUTSIDE = Path(__file__).with_name("outside.py")
LOW_RES = {"low_res_px": 16, "low_res_noise": {"kind": "lognormal"}}
SAMPLING = [
    {"num_steps": 5, "guidance": {"text": 3.0}},
    {
        "num_steps": 4,
        "sampler": {"kind": "heun"},
        "grid": {"kind": "karras", "sigma_max": 10.0},  # from 80 in 4 steps rounding alone would be 1e-4
        "guidance": {"text": 2.0, "low_res": 1.5},
        "low_res_sigma": 0.1,
    },
]


def sampling_file(folder: Path, settings: list[dict[str, Any]]) -> str:
    stages = [{"checkpoint": "elsewhere", "sampling": each} for each in settings]
    (folder / "sampling.yaml").write_text(yaml.safe_dump({"stages": stages}))
    return str(folder / "sampling.yaml")


def images_outside(folder: Path, work: Path, **options: object) -> np.ndarray:
    """float (b, h, w, 3) in [-1, 1] of a process without this package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(OUTSIDE), str(folder), str(work / "images.npy")],
        input=json.dumps(options),
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(work / "images.npy") * 2 - 1


def images_inside(cascade: Cascade, text: list[torch.Tensor] | None, seeds: list[int], **options: Any) -> np.ndarray:
    images = cascade.sample(text, seeds, **options)
    return images[cascade.sizes_px[-1]].permute(0, 2, 3, 1).numpy()


def loaded(places: list[str], settings: list[dict[str, Any]]) -> Cascade:
    pairs = zip(places, settings, strict=True)
    return load_cascade([SampleStageConfig.model_validate({"checkpoint": p, "sampling": s}) for p, s in pairs]).cascade


def captions(folder: Path, lengths: tuple[int, ...]) -> tuple[list[torch.Tensor], str]:
    generator = torch.Generator().manual_seed(5)
    text = [torch.randn(length, TEXT_DIM, generator=generator) for length in lengths]
    save_file({str(number): each for number, each in enumerate(text)}, folder / "text.safetensors")
    return text, str(folder / "text.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "upsampling"),
    [(EFFICIENT, "bicubic"), (REGULAR, "bilinear_corners"), (HYBRID, "cubic_reflect")],
    ids=["efficient", "regular", "hybrid"],
)
def test_a_process_without_this_package_generates_the_same_images(
    tmp_path: Path, base: dict[str, Any], upsampling: str
) -> None:
    places = [
        save(tmp_path / "base", denoiser(base), ENCODER),
        save(tmp_path / "sr", denoiser(EFFICIENT | SUPER, 32, **LOW_RES, low_res_upsampling=upsampling), ENCODER),
    ]
    config = sampling_file(tmp_path, SAMPLING)
    result = call("export", *places, "--to", "diffusers", "--out", str(tmp_path / "out"), "--sampling", config)
    assert result.code == 0, result.err
    text, file = captions(tmp_path, (4, 14, 1))
    found = images_outside(tmp_path / "out", tmp_path, embeds=file, seed=[3, 1, 2])
    expected = images_inside(loaded(places, SAMPLING), text, [3, 1, 2])
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_a_cascade_of_flow_matching_generates_the_same_images(tmp_path: Path) -> None:
    schedule = {"kind": "flow", "noise_scale": 2.0, "time_scale": 1000.0}
    places = [
        save(tmp_path / "base", denoiser(REGULAR, diffusion={"schedule": schedule, "objective": "velocity"}), ENCODER),
        save(
            tmp_path / "sr",
            denoiser(EFFICIENT | SUPER, 32, **LOW_RES, diffusion={"schedule": {"kind": "flow"}, "objective": "x0"}),
            ENCODER,
        ),
    ]
    grid = {"kind": "uniform", "spacing": "trailing", "shift": 3.0}
    settings: list[dict[str, Any]] = [
        {"num_steps": 5, "sampler": {"kind": "heun"}, "grid": grid, "guidance": {"text": 3.0}},
        {"num_steps": 4, "sampler": {"kind": "euler"}, "grid": grid, "start": "unit_variance", "low_res_sigma": 0.1},
    ]
    config = sampling_file(tmp_path, settings)
    result = call("export", *places, "--to", "diffusers", "--out", str(tmp_path / "out"), "--sampling", config)
    assert result.code == 0, result.err
    text, file = captions(tmp_path, (4, 14, 1))
    found = images_outside(tmp_path / "out", tmp_path, embeds=file, seed=[3, 1, 2])
    expected = images_inside(loaded(places, settings), text, [3, 1, 2])
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_images_that_are_not_square_and_a_learned_variance_are_the_same(tmp_path: Path) -> None:
    unet = REGULAR | {"out_channels": 6, "num_classes": 4, "text_dim": None, "attention_type": "self"}
    trained = denoiser(unet, diffusion=DISCRETE | {"variance": "learned_range"})
    settings = [
        {"num_steps": 6, "sampler": {"kind": "ancestral"}, "grid": {"kind": "uniform"}, "guidance": {"labels": 2.0}}
    ]
    place = save(tmp_path / "base", trained)
    config = sampling_file(tmp_path, settings)
    result = call("export", place, "--to", "diffusers", "--out", str(tmp_path / "out"), "--sampling", config)
    assert result.code == 0, result.err
    found = images_outside(tmp_path / "out", tmp_path, labels=[2, -1], seed=9, height=16, width=24)
    expected = images_inside(loaded([place], settings), None, [9, 10], labels=[2, -1], shape=(16, 24))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade of the demo's kind trained through the command line, and its export with the text encoder."""
    folder = write_cascade(tmp_path_factory.mktemp("trained"))
    places = [str(folder / "base"), str(folder / "sr")]
    result = call("export", *places, "--to", "diffusers", "--out", str(folder / "out"), "--sampling", "demo")
    assert result.code == 0, result.err
    return folder


@pytest.mark.slow
def test_prompts_give_the_images_of_run_sample(trained: Path, tmp_path: Path) -> None:
    prompts = ["a small red circle on the left", "a blue square"]
    stages = [f"stages.{number}.checkpoint={trained / name}" for number, name in enumerate(("base", "sr"))]
    more = [f"prompts={json.dumps(prompts)}", "num_images_per_prompt=2", "seed=7"]
    assert call("run", "sample", "-c", "demo", "--out", str(tmp_path / "run"), "--quiet", *stages, *more).code == 0
    files = sorted((tmp_path / "run" / "images-32").glob("*.png"))
    expected = np.stack([np.asarray(Image.open(file)) for file in files]) / 127.5 - 1
    found = images_outside(trained / "out", tmp_path, prompt=prompts, num_images_per_prompt=2, seed=7)
    assert found.shape == expected.shape == (4, 32, 32, 3)
    assert np.abs(found - expected).max() < 1.5 / 127.5  # the encoder's bfloat16, and levels of a PNG


@pytest.mark.slow
def test_the_folder_says_what_it_is(trained: Path) -> None:
    out = trained / "out"
    assert {
        "README.md",
        "model_index.json",
        "pipeline.py",
        "cascade_sampling.py",
        "stage_1/network.py",
        "stage_2/config.json",
    } <= tree(out)
    index = json.loads((out / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    card = (out / "README.md").read_text()
    assert "license:" in card
    for number, name in enumerate(("base", "sr"), 1):
        file = out / f"stage_{number}" / "diffusion_pytorch_model.safetensors"
        with safe_open(file, framework="np") as tensors:
            count = sum(int(np.prod(tensors.get_slice(key).get_shape())) for key in tensors.keys())  # noqa: SIM118
        assert f"{count:,}" in card, name
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((out / "README.md").stat().st_mode)
    assert "16 -> 32 px" in card
    assert "dpmpp_2m, 25 steps" in card


@pytest.mark.slow
def test_the_chosen_weights_are_exported(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = str(trained / "base")
    assert call("export", base, "--to", "diffusers", "--out", str(out), "--weights", "model").code == 0
    expected = load_cascade([SampleStageConfig(checkpoint=base, weights="model")]).cascade.stages[0].denoiser
    with safe_open(out / "stage_1" / "diffusion_pytorch_model.safetensors", framework="pt") as tensors:
        assert all(torch.equal(tensors.get_tensor(name), value) for name, value in expected.state_dict().items())
    assert "model of step 6" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("unet", "more", "call_shown"),
    [
        (EFFICIENT, {}, "pipe(prompt_embeds=EMBEDDINGS, seed=0)"),
        (EFFICIENT | {"text_dim": None, "attention_type": "self"}, {}, "pipe(seed=0)"),
        (
            EFFICIENT | SUPER | {"text_dim": None, "attention_type": "self", "num_classes": 3},
            LOW_RES,
            'pipe(labels=[0], image=[Image.open("small.png")], seed=0)',
        ),
    ],
)
def test_the_card_shows_the_call_that_the_cascade_takes(
    unet: dict[str, Any], more: dict[str, Any], call_shown: str
) -> None:
    one = CascadeStage(denoiser(unet, 32, **more), SamplingConfig())
    trained_on = LoadedDenoiser(one.denoiser, None, {}, 7, "model", "", 12)
    card = model_card([one], [trained_on], ExportedEncoder())
    assert call_shown in card
    assert ("from PIL import Image" in card) == ("Image.open" in call_shown)


def refused(work: Path, *arguments: str, out: str = "out") -> str:
    """The one line of a refused export, which leaves nothing."""
    before = tree(work)
    result = call("export", *arguments, "--to", "diffusers", "--out", str(work / out))
    assert result.code == 2, result.err
    assert tree(work) == before
    (line,) = result.err.strip().splitlines()
    return line


def test_a_folder_that_is_not_new_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "is not empty; give a new folder" in refused(tmp_path, "nothing", out="full")
    assert "is a file; give a new folder" in refused(tmp_path, "nothing", out="full/file")


def test_stages_that_do_not_continue_each_other_are_refused(tmp_path: Path) -> None:
    base, large = (
        save(tmp_path / "a", denoiser(REGULAR), ENCODER),
        save(tmp_path / "b", denoiser(REGULAR, 32), ENCODER),
    )
    sr = save(tmp_path / "c", denoiser(EFFICIENT | SUPER, 64, **LOW_RES), ENCODER)
    assert "sizes must rise from stage to stage (got [64, 16] pixels)" in refused(tmp_path, sr, base)
    assert f"PATH {large}: would super-resolve images of 16 px, but was trained on none" in refused(
        tmp_path, base, large
    )
    assert f"PATH {sr}: would super-resolve images of 32 px, but was trained on those of 16 px" in refused(
        tmp_path, large, sr
    )


def test_stages_of_different_encoders_are_refused(tmp_path: Path) -> None:
    other = ENCODER | {"fingerprint": ENCODER["fingerprint"] | {"model": "another"}}
    base = save(tmp_path / "base", denoiser(REGULAR), ENCODER)
    sr = save(tmp_path / "sr", denoiser(EFFICIENT | SUPER, 32, **LOW_RES), other)
    assert f"PATH {sr}: was trained with another encoder than the stage before it" in refused(tmp_path, base, sr)


@pytest.mark.parametrize(
    ("unet", "reason"),
    [
        ({"self_conditioning": True}, "unet.self_conditioning"),
        ({"image_embed_dim": 8}, "unet.image_embed_dim"),
        ({"text_embed_dim": 8}, "unet.text_embed_dim"),
        ({"condition_channels": 1}, "unet.condition_channels"),
        ({"transcription": {"dim": 32, "head_dim": 16, "resolutions": [8]}}, "unet.transcription"),
    ],
)
def test_what_the_exported_code_lacks_is_refused_by_name(tmp_path: Path, unet: dict[str, Any], reason: str) -> None:
    place = save(tmp_path / "base", denoiser(REGULAR | unet), ENCODER)
    assert reason in refused(tmp_path, place)


def test_a_missing_checkpoint_and_settings_for_other_stages_are_refused(tmp_path: Path) -> None:
    place = save(tmp_path / "base", denoiser(REGULAR), ENCODER)
    missing = str(tmp_path / "missing")
    assert f"PATH {missing}: " in refused(tmp_path, place, missing)
    config = sampling_file(tmp_path, SAMPLING)
    assert "has 2 stages for 1 checkpoints" in refused(tmp_path, place, "--sampling", config)
    assert "--sampling nowhere: no such file or shipped configuration" in refused(
        tmp_path, place, "--sampling", "nowhere"
    )


def test_a_guide_is_refused_as_an_exported_stage_has_one_model(tmp_path: Path) -> None:
    place = save(tmp_path / "base", denoiser(REGULAR), ENCODER)
    config = tmp_path / "guided.yaml"
    config.write_text(yaml.safe_dump({"stages": [{"checkpoint": place, "guide": {"checkpoint": place}}]}))
    said = refused(tmp_path, place, "--sampling", str(config))
    assert "stages.0.guide: an exported stage has one model; leave guide" in said


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    place = save(tmp_path / "base", denoiser(REGULAR), ENCODER)
    before = tree(tmp_path)
    monkeypatch.setattr(export, "trace", full)
    assert call("export", place, "--to", "diffusers", "--out", str(tmp_path / "out")).code != 0
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--out", "x.safetensors"], "PATH: b: only --to diffusers takes several"),
        (["a", "--out", "x", "--to", "diffusers", "--size", "64"], "--size: is for exports of a store"),
        (["a", "--out", "x", "--sampling", "demo"], "--sampling: is for exports of a cascade; add --to diffusers"),
        (["a", "--out", "x", "--to", "mds", "--weights", "model"], "--weights: is for exports of a model"),
    ],
)
def test_options_of_other_exports_are_refused(arguments: list[str], message: str) -> None:
    result = call("export", *arguments)
    assert result.code == 2
    assert message in result.err
