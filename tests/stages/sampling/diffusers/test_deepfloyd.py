"""`pipeline export --to diffusers` of DeepFloyd IF's networks: what was imported comes out again, for diffusers."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stages.encoders.tiny import write_tiny_model
from tests.commands import Result, call
from tests.diffusers_layout import CLASSES, NOISING, SCHEDULERS, UNETS, unet_state, write_pipeline
from tests.stages.sampling.diffusers.models import ENCODER, REGULAR, denoiser, save

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, imported."""
    folder = tmp_path_factory.mktemp("imported")
    pipelines = [str(write_pipeline(folder / f"IF-{number}", number)) for number in (1, 2)]
    command = ["import", "diffusers", *pipelines, "--out", str(folder / "run"), "--encoder-model", "tiny-random-t5"]
    assert call(*command).code == 0
    return folder / "run"


def exported(run: Path, out: Path, *options: str, stages: tuple[int, ...] = (1, 2)) -> Result:
    places = [str(run / f"unet-{number - 1}") for number in stages]
    return call("export", *places, "--to", "diffusers", "--out", str(out), *options)


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_what_was_imported_comes_out_again_bit_for_bit(run: Path, tmp_path: Path) -> None:
    result = exported(run, tmp_path / "out")
    assert result.code == 0, result.err
    for number in (1, 2):
        folder, state = tmp_path / f"out/stage-{number}", unet_state(number)
        found = load_file(folder / WEIGHTS)
        assert found.keys() == state.keys()
        assert all(found[name].equal(state[name]) for name in state)
        scheduler = content(folder / "scheduler/scheduler_config.json")
        assert {key: scheduler[key] for key in SCHEDULERS[number]} == SCHEDULERS[number]
        index = content(folder / "model_index.json")
        assert (index["_class_name"], index["text_encoder"]) == (CLASSES[number], [None, None])
        assert content(folder / "unet/config.json")["sample_size"] == UNETS[number]["sample_size"]
    noising = content(tmp_path / "out/stage-2/image_noising_scheduler/scheduler_config.json")
    assert {key: noising[key] for key in NOISING} == NOISING
    card = (tmp_path / "out/README.md").read_text()
    assert f"| `stage-2` | {CLASSES[2]} | 16 to 32 px | {sum(t.numel() for t in unet_state(2).values()):,} |" in card
    assert "captions were encoded by `tiny-random-t5`" in card


def test_it_can_be_imported_again_to_the_same_checkpoints(run: Path, tmp_path: Path) -> None:
    assert exported(run, tmp_path / "out").code == 0
    pipelines = [str(tmp_path / f"out/stage-{number}") for number in (1, 2)]
    command = [
        "import",
        "diffusers",
        *pipelines,
        "--out",
        str(tmp_path / "again"),
        "--encoder-model",
        "tiny-random-t5",
    ]
    assert call(*command).code == 0
    for index in (0, 1):
        names = [f"{folder}/unet-{index}/checkpoints/step-00000000/model.safetensors" for folder in ("again", "run")]
        again, before = load_file(tmp_path / names[0]), load_file(run.parent / names[1])
        assert again.keys() == before.keys()
        assert all(again[name].equal(before[name]) for name in before)
        assert content_of_denoiser(tmp_path / "again", index) == content_of_denoiser(run, index)


def content_of_denoiser(run: Path, index: int) -> Any:
    return yaml.safe_load((run / f"unet-{index}/train.yaml").read_text())["denoiser"]


@pytest.mark.slow
def test_diffusers_opens_it_and_its_networks_give_the_same_numbers(run: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "encoder")
    result = exported(run, tmp_path / "out", "--encoder-model", str(tmp_path / "encoder"))
    assert result.code == 0, result.err
    diffusers = importlib.import_module("diffusers")
    for number in (1, 2):
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / f"out/stage-{number}")
        assert type(pipe).__name__ == CLASSES[number]
        assert type(pipe.scheduler).__name__ == "DDPMScheduler"
        original = diffusers.UNet2DConditionModel.from_config(UNETS[number]).eval()
        original.load_state_dict(unet_state(number))
        size, channels = UNETS[number]["sample_size"], UNETS[number]["in_channels"]
        x, text, labels = torch.randn(1, channels, size, size), torch.randn(1, 77, 64), torch.tensor([250])
        with torch.no_grad():
            outputs = [unet(x, 500, text, class_labels=labels).sample for unet in (pipe.unet, original)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
        if number == 1:
            embeddings, empty = pipe.encode_prompt("a small red circle", clean_caption=True)
            assert embeddings.shape == empty.shape == (1, 77, 64)
            assert not embeddings.equal(empty)
        else:
            assert pipe.text_encoder is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_may_be_written_in_half_precision(dtype: str, run: Path, tmp_path: Path) -> None:
    assert exported(run, tmp_path / "out", "--dtype", dtype, stages=(2,)).code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "stage-2"]
    found, state, kind = load_file(tmp_path / "out/stage-2" / WEIGHTS), unet_state(2), getattr(torch, dtype)
    assert all(found[name].equal(state[name].to(kind)) for name in state)


def test_the_sampling_that_is_given_becomes_the_schedulers(run: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((run / "sample.yaml").read_text())
    solver = {"sampler": {"kind": "dpmpp_2m"}, "grid": {"kind": "uniform", "skip_lowest": True}, "num_steps": 20}
    settings["stages"][0]["sampling"] |= solver
    (tmp_path / "sampling.yaml").write_text(yaml.safe_dump(settings))
    assert exported(run, tmp_path / "out", "--sampling", str(tmp_path / "sampling.yaml")).code == 0
    scheduler = content(tmp_path / "out/stage-1/scheduler/scheduler_config.json")
    assert (scheduler["_class_name"], scheduler["timestep_spacing"]) == ("DPMSolverMultistepScheduler", "linspace")
    assert content(tmp_path / "out/stage-1/model_index.json")["scheduler"] == ["diffusers", scheduler["_class_name"]]
    assert content(tmp_path / "out/stage-2/scheduler/scheduler_config.json")["_class_name"] == "DDPMScheduler"
    assert "num_inference_steps=20," in (tmp_path / "out/README.md").read_text()


def test_the_text_encoder_is_a_copy_and_no_link(run: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "encoder")
    assert exported(run, tmp_path / "out", "--encoder-model", str(tmp_path / "encoder")).code == 0
    name = "model.safetensors"
    copy = tmp_path / "out/stage-1/text_encoder" / name
    assert copy.read_bytes() == (tmp_path / "encoder" / name).read_bytes()
    assert copy.stat().st_nlink == 1
    assert not (tmp_path / "out/stage-2/text_encoder").exists()


def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    def refused(words: str, *options: str, stages: tuple[int, ...] = (1, 2)) -> None:
        result = exported(run, tmp_path / "out", *options, stages=stages)
        assert result.code == 2, result.err
        assert words in result.err
        assert len(result.err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    refused("--dtype int8: must be float32, float16, bfloat16", "--dtype", "int8")
    refused("--encoder-model google/t5-v1_1-xxl: is not a folder", "--encoder-model", "google/t5-v1_1-xxl")
    write_tiny_model(tmp_path / "other")
    config = content(tmp_path / "other/config.json")
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"relative_attention_max_distance": 64}))
    refused("is not the encoder of the training: ", "--encoder-model", str(tmp_path / "other"))
    (tmp_path / "karras.yaml").write_text(
        yaml.safe_dump({"stages": [{"checkpoint": "x", "sampling": {"num_steps": 7}}]})
    )
    refused("the 16 px stage: ", "--sampling", str(tmp_path / "karras.yaml"), stages=(1,))


def test_an_option_for_these_networks_is_refused_for_others(tmp_path: Path) -> None:
    place = save(tmp_path / "base", denoiser(REGULAR), ENCODER)
    result = call("export", place, "--to", "diffusers", "--out", str(tmp_path / "out"), "--dtype", "float16")
    assert result.code == 2
    assert "--dtype float16: is for DeepFloyd IF's networks" in result.err
    assert not (tmp_path / "out").exists()
