"""DALLE2-pytorch's checkpoints of its trainers become checkpoints, sample, and train on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.version import Version
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from imagen_core.train import load_checkpoint
from tests.commands import Result, call, precompute
from tests.imagen_core.conversion.dalle2_pytorch.numbers import DIM, weights
from tests.imagen_core.conversion.dalle2_pytorch.test_decoder import EXPECTED as DECODERS
from tests.imagen_core.conversion.dalle2_pytorch.test_prior import EXPECTED as PRIORS
from tests.stages.encoders import tiny_models

SUPER = DECODERS["super"]["settings"]
DECODER: dict[str, Any] = SUPER | {"unets": [DECODERS["base"]["settings"]["unets"][0], SUPER["unets"][1]]}
STATES = [weights(DECODERS[case]["shapes"]) for case in ("base", "super")]
PRIOR: dict[str, Any] = PRIORS["steps"]["settings"] | {"sample_timesteps": 5, "image_embed_dim": DIM}
STATE = weights(PRIORS["steps"]["shapes"])


WIDE = {"unets": [DECODER["unets"][0] | {"image_embed_dim": 24}]}
OTHER_WIDTH = {"unets": [DECODER["unets"][0] | {"cond_dim": 24}, DECODER["unets"][1]]}


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


def decoder_file(path: Path, *, settings: object = DECODER, **more: Any) -> Path:
    """As DecoderTrainer.save has it; averages are twice the weights, and those of the second UNet never updated."""
    model, ema = {"noise_schedulers.0.betas": torch.ones(20)}, {}
    for index, state in enumerate(STATES):
        model |= {f"unets.{index}.{name}": values for name, values in state.items()}
        ema |= {f"{index}.ema_model.{name}": 2 * values for name, values in state.items()}
        ema[f"{index}.initted"] = torch.tensor(index == 0)
    torch.save({"model": model, "version": "1.15.6", "steps": torch.tensor([7, 0]), "ema": ema} | more, path)
    path.with_name("decoder_config.json").write_text(json.dumps({"decoder": settings, "train": {"epochs": 1}}))
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


@pytest.mark.slow
def test_a_prior_and_a_decoder_become_checkpoints_that_sample(clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = imported(out, clip, decoder_file(tmp_path / "decoder.pth"), prior_file(tmp_path / "prior.pth"))
    assert result.code == 0, result.err
    for index, factor in enumerate((2, 1)):
        loaded = load_checkpoint(out / f"unet-{index}")
        assert (loaded.stage.size_px, loaded.stage.low_res_px) == ((4, None), (8, 4))[index]
        weight = STATES[index]["mid_block1.block1.project.weight"]
        assert loaded.denoiser.state_dict()["net.middle.0.layer.conv1.weight"].equal(factor * weight)
        assert (loaded.encoder is None) == (index == 1)
        assert set(loaded.embed_encoders) == ({"image_embed"} if index == 0 else set())
    assert (
        load_checkpoint(out / "unet-0").embed_encoders.items() <= load_checkpoint(out / "prior").embed_encoders.items()
    )
    encoders = [f"prior.encoder_model={clip}", f"encoder_model={clip}"]
    few = ["prior.sampling.num_steps=3", "stages.0.sampling.num_steps=3", "stages.1.sampling.num_steps=3"]
    command = ["run", "sample", "-c", str(out / "sample.yaml"), "--out", str(tmp_path / "generated"), "--quiet"]
    result = call(*command, *few, *encoders, "prompts=[a red circle]", "device=cpu")
    assert result.code == 0, result.err
    assert Image.open(tmp_path / "generated/images-8/00000.png").size == (8, 8)


def test_a_decoder_alone_says_that_it_needs_a_prior(clip: Path, tmp_path: Path) -> None:
    result = imported(tmp_path / "run", clip, decoder_file(tmp_path / "decoder.pth"))
    assert result.code == 0, result.err
    assert "'prior={checkpoint: PRIOR}'" in result.out
    assert "text=clip-tokens image_embed=clip" in result.out
    assert set(yaml.safe_load((tmp_path / "run/sample.yaml").read_text())) == {"stages"}


@pytest.mark.slow
def test_imported_models_train_on(clip: Path, tmp_path: Path) -> None:
    tokens, vector = ({"name": name, "kind": "clip", "model": str(clip), "output": output, "num_gpus": 0}
                      for name, output in (("clip-tokens", "last_hidden_state"), ("clip", "projected")))  # fmt: skip
    images = {"name": "clip", "model": str(clip), "from_px": 32, "num_gpus": 0}
    made = precompute(
        tmp_path / "store-run",
        *("source.num_samples=4", "images.sizes_px=[4,32]"),
        f"encoders={json.dumps([tokens, vector])}",
        f"image_encoders={json.dumps([images])}",
    )
    assert made.code == 0, made.err
    files = decoder_file(tmp_path / "decoder.pth"), prior_file(tmp_path / "prior.pth")
    assert imported(tmp_path / "run", clip, *files).code == 0
    for name, reads in (("prior", ["text_embed=clip"]), ("unet-0", [])):
        config = str(tmp_path / f"run/{name}/train.yaml")
        command = [
            "run",
            "train",
            "-c",
            config,
            "--out",
            str(tmp_path / name),
            "--quiet",
            "num_steps=1",
            "batch_size=2",
        ]
        reads = [*reads, f"store={tmp_path}/store-run/store", "text=clip-tokens", "image_embed=clip"]
        result = call(*command, *reads, "validation.num_samples=0")
        assert result.code == 0, result.err
        before, after = (load_checkpoint(tmp_path / at, "model") for at in (f"run/{name}", name))
        assert (
            before.embed_encoders["image_embed"]["fingerprint"] == after.embed_encoders["image_embed"]["fingerprint"]
        )
        changes = [
            float((values - after.denoiser.state_dict()[key]).abs().max())
            for key, values in before.denoiser.state_dict().items()
        ]
        assert 0 < max(changes) < 1e-2


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
    refused("a prior of version 0.26.2", prior_file(tmp_path / "prior.pth", version=Version("0.26.2")))
    refused("a decoder of version 1.9.0", decoder_file(tmp_path / "d.pth", version="1.9.0"))
    refused("names no version", prior_file(tmp_path / "prior.pth", version=None))
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
    refused("give one prior, one decoder, or both (got prior, prior)", prior(), prior())
    wide = decoder_file(tmp_path / "d.pth", settings=DECODER | WIDE)
    refused("d.pth: cannot be built here: image_sizes must rise", wide)
    wide.with_suffix(".json").write_text(json.dumps(DECODERS["base"]["settings"] | WIDE))
    refused("the models read embeddings of images of different widths ([16, 24])", prior(), wide)
    refused("the weights of unets.0 do not fit", decoder_file(tmp_path / "e.pth", settings=DECODER | OTHER_WIDTH))
    file = prior()
    (tmp_path / "prior_config.json").write_text("no json")
    refused("prior_config.json: cannot be read as JSON", file)
    (tmp_path / "prior_config.json").unlink()
    refused(f"put those it was trained with at {tmp_path}/prior.json or {tmp_path}/prior_config.json", file)
    torch.save({"state_dict": {}}, file)
    refused("has no model in it", file)
    refused("there is no such file", tmp_path / "none.pth")
