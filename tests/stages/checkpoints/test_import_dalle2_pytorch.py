"""DALLE2-pytorch's checkpoints of its trainers become checkpoints, sample, and train on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.version import Version
from transformers import CLIPConfig, CLIPModel

from imagen_core.train import load_checkpoint
from tests.commands import Result, call
from tests.imagen_core.conversion.dalle2_pytorch.numbers import DIM, weights
from tests.imagen_core.conversion.dalle2_pytorch.test_prior import EXPECTED as PRIORS
from tests.stages.encoders import tiny_models

PRIOR: dict[str, Any] = PRIORS["steps"]["settings"] | {"sample_timesteps": 5, "image_embed_dim": DIM}
STATE = weights(PRIORS["steps"]["shapes"])


def write_clip(folder: Path) -> None:
    """A CLIP whose token states are as wide as its embeddings, as OpenAI's are."""
    shape = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    vocabulary = tiny_models.tokenizer(folder, "</s>", "<unk> $A </s>")
    text = tiny_models.CLIP_TEXT | shape | {"projection_dim": DIM, "vocab_size": vocabulary}
    vision = shape | {"image_size": 32, "patch_size": 8, "projection_dim": DIM}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)).save_pretrained(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(write_clip, tmp_path_factory.mktemp("clip"))


def prior_file(path: Path, *, settings: object = PRIOR, initted: bool = True, **more: Any) -> Path:
    """As DiffusionPriorTrainer.save has it, with settings in prior_config.json; averages are twice the weights."""
    model, averages = ({f"net.{name}": by * t for name, t in STATE.items()} for by in (1, 2))
    buffers = {"noise_scheduler.betas": torch.ones(20)}
    file = {"model": model | buffers, "version": Version("1.15.6"), "step": torch.tensor([7]), "optimizer": {}}
    file |= {"ema": {"initted": torch.tensor(initted)}, "ema_model": averages | buffers, "warmup_scheduler": None}
    torch.save(file | more, path)
    path.with_name("prior_config.json").write_text(json.dumps({"prior": settings, "train": {"epochs": 1}}))
    return path


def imported(out: Path, clip: Path | None, *files: Path) -> Result:
    encoder = [] if clip is None else ["--encoder-model", str(clip)]
    return call("import", "dalle2-pytorch", *map(str, files), "--out", str(out), *encoder)


@pytest.mark.parametrize("initted", [True, False])
def test_a_prior_becomes_a_checkpoint_with_its_averages(clip: Path, tmp_path: Path, initted: bool) -> None:
    out = tmp_path / "run"
    result = imported(out, clip, prior_file(tmp_path / "prior.pth", initted=initted))
    assert result.code == 0, result.err
    assert "text=clip-tokens text_embed=clip image_embed=clip" in result.out
    loaded = load_checkpoint(out / "prior")
    assert loaded.denoiser.state_dict()["net.query"].equal(STATE["learned_query"] * (2 if initted else 1))
    assert loaded.max_tokens == 6
    assert (loaded.encoder or {})["fingerprint"]["output"] == "last_hidden_state"
    outputs = {name: record["fingerprint"]["output"] for name, record in loaded.embed_encoders.items()}
    assert outputs == {"text_embed": "projected", "image_embed": "projected"}
    assert loaded.embed_encoders["image_embed"]["fingerprint"]["from_px"] == 32
    prior = yaml.safe_load((out / "sample.yaml").read_text())["prior"]
    assert prior["checkpoint"] == str(out / "prior")
    assert prior["sampling"]["num_steps"] == 5


def test_settings_next_to_a_file_come_first(clip: Path, tmp_path: Path) -> None:
    file = prior_file(tmp_path / "prior.pth", settings={"none": 1})
    file.with_suffix(".json").write_text(json.dumps(PRIOR))
    result = imported(tmp_path / "run", clip, file)
    assert result.code == 0, result.err


def test_a_pickle_with_code_is_refused_and_runs_nothing(clip: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    result = imported(tmp_path / "run", clip, prior_file(tmp_path / "prior.pth", warmup_scheduler=Payload()))
    assert result.code == 2
    assert "prior.pth: cannot be read as tensors" in result.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_imported_exactly_is_refused(clip: Path, tmp_path: Path) -> None:
    def refused(words: str, *files: Path, encoder: Path | None = clip) -> None:
        result = imported(tmp_path / "refused", encoder, *files)
        assert result.code == 2, result.err
        assert words in result.err
        assert not (tmp_path / "refused").exists()

    def prior(**settings: Any) -> Path:
        return prior_file(tmp_path / "prior.pth", settings=PRIOR | settings)

    refused("predict_x_start is False", prior(predict_x_start=False))
    refused("the weights do not fit the settings", prior(net=PRIOR["net"] | {"depth": 1}))
    refused("the settings have no clip, which is none of OpenAI's (ViT-B/32", prior(), encoder=None)
    refused("say with --encoder-model", prior(clip={"make": "open_clip", "model": "ViT-H-14"}), encoder=None)
    refused(
        "the network reads 16-wide embeddings", prior(), encoder=tiny_models.write(tiny_models.clip, tmp_path / "c")
    )
    refused(
        "its model is neither a prior nor a decoder",
        prior_file(tmp_path / "prior.pth", model={"weight": torch.ones(1)}),
    )
    file = prior()
    (tmp_path / "prior_config.json").write_text("no json")
    refused("prior_config.json: cannot be read as JSON", file)
    (tmp_path / "prior_config.json").unlink()
    refused(f"put those it was trained with at {tmp_path}/prior.json or {tmp_path}/prior_config.json", file)
    torch.save({"state_dict": {}}, file)
    refused("has no model in it", file)
    refused("there is no such file", tmp_path / "none.pth")
