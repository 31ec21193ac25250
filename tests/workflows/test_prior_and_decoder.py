"""The path of DALL-E 2 through the command line: CLIP's embeddings, a prior, a decoder, images from prompts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from imagen_core.train import load_checkpoint
from stages.sampling import prior as sample_prior
from stages.sampling.config import SamplePriorConfig
from tests.commands import call, precompute
from tests.stages.encoders import tiny_models
from tests.trained import COMMON, UNET, train

STEPS = COMMON | {"text": None, "num_steps": 4, "checkpoints": {"every_steps": 2}}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one CLIP's embeddings of captions and images, a prior and a decoder trained on it."""
    folder = tmp_path_factory.mktemp("dalle2")
    clip = tiny_models.write(tiny_models.clip, folder / "clip")
    tokens, vector = ({"name": name, "kind": "clip", "model": str(clip), "output": output, "num_gpus": 0}
                      for name, output in (("tokens", "last_hidden_state"), ("clip", "projected")))  # fmt: skip
    images = {"name": "clip", "model": str(clip), "from_px": 32, "num_gpus": 0}
    made = precompute(
        folder / "run",
        *("source.num_samples=20", "images.sizes_px=[16,32]"),
        f"encoders={json.dumps([tokens, vector])}",
        f"image_encoders={json.dumps([images])}",
    )
    assert made.code == 0, made.err
    network = {"dim": 16, "depth": 1, "num_heads": 2, "head_dim": 8, "text_dim": 24, "max_text_tokens": 77}
    configs = {
        "prior": {
            **STEPS,
            "denoiser": {"kind": "prior", "network": network},
            "text": "tokens",
            "text_embed": "clip",
            "image_embed": "clip",
            "validation": {"num_samples": 4, "every_steps": 4, "similarity_num_steps": [2, 4]},
        },
        "decoder": {
            **STEPS,
            "denoiser": {"size_px": 16, "unet": UNET | {"text_dim": None, "image_embed_dim": 16}},
            "image_embed": "clip",
        },
    }
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"store": str(folder / "run/store"), **config}))
        result = train(folder, name, folder / name)
        assert result.code == 0, result.err
    return folder


def sample(work: Path, out: Path, *more: str):
    stage = {"checkpoint": str(work / "decoder"), "sampling": {"num_steps": 3}}
    prior = {"checkpoint": str(work / "prior"), "encoder_model": str(work / "clip"), "sampling": {"num_steps": 3}}
    return call(
        *("run", "sample", "--out", str(out), "--quiet", "--json", "seed=3", "precision=float32"),
        *(f"stages={json.dumps([stage])}", f"prior={json.dumps(prior)}", *more),
    )


def pixels(out: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((out / "images-16").glob("*.png"))]


@pytest.mark.slow
def test_a_prior_and_a_decoder_generate_images_from_prompts(work: Path, tmp_path: Path) -> None:
    result = sample(work, tmp_path / "two", "prompts=[a red circle,a blue square]")
    assert result.code == 0, result.err
    assert set(json.loads(result.out)["summary"]["seconds_per_image"]) == {"prior", "16"}
    first, second = pixels(tmp_path / "two")
    assert first.shape == (16, 16, 3)
    assert not np.array_equal(first, second)
    assert sample(work, tmp_path / "one", "prompts=[a blue square]", "seed=4").code == 0
    assert np.array_equal(pixels(tmp_path / "one")[0], second), "an image depends on its prompt and seed alone"
    record = json.loads((tmp_path / "two" / "images.json").read_text())
    assert [stage["step"] for stage in record["stages"]] == [4, 4]


@pytest.mark.slow
def test_the_prior_samples_in_the_requested_precision(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    generate = sample_prior.generate_embeddings

    def seeing(*arguments, **options):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return generate(*arguments, **options)

    monkeypatch.setattr(sample_prior, "generate_embeddings", seeing)
    for precision in ("float32", "bfloat16"):
        result = sample(work, tmp_path / precision, "prompts=[a red circle]", f"precision={precision}")
        assert result.code == 0, result.err
    assert seen == [None, torch.bfloat16]


@pytest.mark.slow
def test_validation_of_a_prior_says_how_alike_its_embeddings_are(work: Path) -> None:
    lines = [json.loads(line) for line in (work / "prior" / "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in lines if "baseline" in line)
    for name in ("with_image", "with_text", "with_unrelated_text", "above_baseline"):
        for steps in (2, 4):
            assert -2 <= found[f"{name}_{steps}"] <= 2
    assert found["above_baseline_2"] == pytest.approx(found["with_text_2"] - found["baseline"])


@pytest.mark.slow
def test_a_checkpoint_names_the_encoders_of_captions_and_images(work: Path) -> None:
    prior, decoder = load_checkpoint(work / "prior"), load_checkpoint(work / "decoder")
    assert (prior.encoder or {})["name"] == "tokens"
    assert {field: facts["name"] for field, facts in prior.embed_encoders.items()} == {
        "text_embed": "clip",
        "image_embed": "clip",
    }
    assert decoder.encoder is None
    assert decoder.embed_encoders["image_embed"] == prior.embed_encoders["image_embed"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["prior=null"], "the stages read image embeddings of 'clip'; give prior.checkpoint"),
        (["prior.checkpoint={work}/decoder"], "prior.checkpoint: its model generates images"),
        (["stages.0.checkpoint={work}/prior"], "it is a prior, which generates embeddings"),
    ],
)
def test_checkpoints_in_the_wrong_place_are_refused(work: Path, tmp_path: Path, more: list[str], message: str) -> None:
    result = sample(work, tmp_path / "out", "prompts=[a red circle]", *(m.format(work=work) for m in more))
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("prior", "text_embed=null", "text_embed is None: a prior reads it"),
        ("prior", "text_embed=tokens", "text_embed: 'tokens' has "),
        ("prior", "text_embed=clip denoiser.network.dim=9", "network.dim is 9, but the embeddings of 'clip' in the"),
        ("prior", "image_embed=dino", "the store has no image encoder 'dino' (image encoders: ['clip'])"),
        ("prior", "grid.every_steps=2", "grid.every_steps is for images"),
        ("decoder", "image_embed=null", "image_embed is None: a prior and a decoder"),
        ("decoder", "denoiser.unet.image_embed_dim=9", "are 16 wide; set denoiser.unet.image_embed_dim=16"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    work: Path, tmp_path: Path, name: str, change: str, message: str
) -> None:
    result = train(work, name, tmp_path / "out", *change.split())
    assert result.code == 2
    assert message in result.err


@pytest.mark.slow
def test_a_prior_resumes_where_it_was(work: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    assert train(work, "prior", half, "num_steps=2", "validation.every_steps=9").code == 0
    assert train(work, "prior", half).code == 0
    ends = [load_checkpoint(folder, weights="model") for folder in (work / "prior", half)]
    assert ends[0].sha256 == ends[1].sha256


def test_the_likelihood_of_a_decoder_is_measured_with_its_own_image_encoder_only(work: Path, tmp_path: Path) -> None:
    def likelihood(store: Path, out: str):
        settings = [f"checkpoint={work}/decoder", f"store={store}", "num_images=2", "num_steps=2"]
        return call("run", "likelihood", "--out", str(tmp_path / out), "--quiet", *settings)

    assert likelihood(work / "run/store", "own").code == 0
    few = ("source.num_samples=4", "images.sizes_px=[16,32]", "encoders=[]")
    clip = tiny_models.write(tiny_models.clip, tmp_path / "another-clip")
    encoders = json.dumps([{"name": "clip", "model": str(clip), "from_px": 32, "num_gpus": 0}])
    assert precompute(tmp_path / "run", *few, f"image_encoders={encoders}").code == 0
    result = likelihood(tmp_path / "run/store", "other")
    assert result.code == 2
    assert "its images are encoded by another encoder than the model's: fingerprint.model" in result.err
    assert precompute(tmp_path / "plain", *few).code == 0
    result = likelihood(tmp_path / "plain/store", "without")
    assert result.code == 2
    assert "has no encoder of images 'clip' (encoders: [])" in result.err


def test_a_prior_on_two_text_encoders_finds_each_where_it_is(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vectors' at prior.encoder_model, its tokens' at encoder_model; one model for both at prior.encoder_model."""
    loaded = load_checkpoint(work / "prior")
    assert isinstance(loaded.encoder, dict)
    other = {**loaded.encoder, "fingerprint": {**loaded.encoder["fingerprint"], "model": "t5"}}
    found = []
    for name in ("PromptEmbeddings", "PromptTokens"):
        monkeypatch.setattr(sample_prior, name, lambda *_, **more: found.append((more["option"], more["model"])))
    for encoder in (loaded.encoder, other):
        monkeypatch.setattr(sample_prior, "load_checkpoint_from", lambda *_, e=encoder: replace(loaded, encoder=e))
        settings = SamplePriorConfig(checkpoint="p", encoder_model="CLIP")
        cpu = torch.device("cpu")
        sample_prior.PriorSampler(settings, store=None, encoder_model="T5", device=cpu, autocast=None)
    own = ("prior.encoder_model", "CLIP")
    assert found == [own, own, own, ("encoder_model", "T5")]


@pytest.mark.slow
def test_a_prior_reads_the_tokens_of_several_encoders(work: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((work / "prior.yaml").read_text())
    config["denoiser"]["network"]["text_dim"], config["text"] = [24, 16], ["tokens", "clip"]
    (work / "both.yaml").write_text(yaml.safe_dump(config))
    result = train(work, "both", work / "both")
    assert result.code == 0, result.err
    stage = {"checkpoint": str(work / "decoder"), "sampling": {"num_steps": 2}}
    prior = {"checkpoint": str(work / "both"), "encoder_model": str(work / "clip"), "sampling": {"num_steps": 2}}
    common = (f"stages={json.dumps([stage])}", f"prior={json.dumps(prior)}", "device=cpu", "precision=float32")
    prompt = ("prompts=[a red circle]", f"encoder_model={{tokens: {work}/clip, clip: {work}/clip}}")
    given = call("run", "sample", "--out", str(tmp_path / "prompts"), "--quiet", *common, *prompt)
    assert given.code == 0, given.err
    assert pixels(tmp_path / "prompts")[0].shape == (16, 16, 3)
    captions = f"captions={{kind: store, path: {work}/run/store, num_captions: 2}}"
    stored = call("run", "sample", "--out", str(tmp_path / "stored"), "--quiet", *common, captions)
    assert stored.code == 0, stored.err
