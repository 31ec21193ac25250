"""Stacked layers of a language model beside a pooled CLIP: stored, trained on, and sampled from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from imagen_core.store import Store
from imagen_core.train import load_checkpoint
from stages.encoders.prompts import encode_prompts
from tests.commands import Result, call, precompute
from tests.stages.encoders import tiny_models
from tests.trained import BASE, UNET, train

READS = {"text_dim": 24, "num_text_layers": 3, "text_embed_dim": 24}


def encoders(work: Path, **more: object) -> str:
    stacked = {"name": "llm", "kind": "auto", "model": str(work / "llama"), "layers": [1, 2, 3], "join": "stack"}
    pooled = {"name": "clip", "kind": "clip", "model": str(work / "clip"), "output": "pooled"}
    return f"encoders={json.dumps([{**stacked, 'max_tokens': 32, **more}, pooled])}"


def write_training(work: Path, name: str, unet: dict[str, Any], **more: object) -> None:
    config = BASE | {"denoiser": {"size_px": 16, "unet": UNET | unet}, "text": "llm", "store": str(work / "run/store")}
    (work / f"{name}.yaml").write_text(yaml.safe_dump(config | more))


def sample(work: Path, name: str, out: Path, *more: str) -> Result:
    stage = {"checkpoint": str(work / name), "sampling": {"num_steps": 2, "guidance": {"text": 3.0}}}
    given = [
        f"stages={json.dumps([stage])}",
        "device=cpu",
        'prompts=["a red square"]',
        f"encoder_model={work}/llama",
        f"text_embed_model={work}/clip",
        *more,
    ]
    return call("run", "sample", "--out", str(out), "--quiet", "--json", *given)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    tiny_models.llama(folder / "llama")
    tiny_models.clip_text(folder / "clip")
    small = ["source.num_samples=24", "images.sizes_px=[16]", "store.dtype=bfloat16"]
    result = precompute(folder / "run", *small, encoders(folder))
    assert result.code == 0, result.err
    return folder


@pytest.mark.slow
def test_a_model_learns_the_weights_of_stacked_layers_beside_a_pooled_vector_and_samples(
    work: Path, tmp_path: Path
) -> None:
    assert Store.open(work / "run/store")[0].text["llm"][0].shape[1:] == (3, 24)
    assert Store.open(work / "run/store")[0].text["clip"][0].shape == (1, 24)
    write_training(work, "sum", READS, text_embed="clip", num_steps=12)
    result = train(work, "sum", work / "sum")
    assert result.code == 0, result.err
    assert np.isfinite(json.loads((work / "sum/summary.json").read_text())["summary"]["loss"])
    steps = sorted((work / "sum/checkpoints").iterdir())
    first, last = (load_file(step / "model.safetensors") for step in (steps[0], steps[-1]))
    name = next(name for name in last if name.endswith("text_layers.weights"))
    assert last[name].shape == (3,)
    assert np.abs(last[name]).max() > 1e-4
    assert not np.array_equal(first[name], last[name])
    assert np.ptp(last[name]) > 0, "layers are told apart"
    loaded = load_checkpoint(work / "sum")
    assert (loaded.encoder or {})["layers"] == [1, 2, 3]
    assert loaded.embed_encoders["text_embed"]["name"] == "clip"
    images = sample(work, "sum", tmp_path / "images")
    assert images.code == 0, images.err
    gone = sample(work, "sum", tmp_path / "gone", f"text_embed_model={work}/gone")
    assert gone.code == 4
    assert "error: encoder clip: " in gone.err
    assert "its place now is text_embed_model=..." in gone.err
    from_store = sample(
        work, "sum", tmp_path / "of-store", "prompts=[]", f"captions={{kind: store, path: {work}/run/store}}"
    )
    assert from_store.code == 0, from_store.err
    assert json.loads(from_store.out)["summary"]["embeddings"] == "store, text-llm"


@pytest.mark.slow
def test_some_of_the_layers_side_by_side_train_and_prompts_are_encoded_to_these(work: Path, tmp_path: Path) -> None:
    reads = {"text_dim": 24, "num_text_layers": 2, "text_layer_join": "concat"}
    write_training(work, "concat", reads, text_layers=[3, 1])
    result = train(work, "concat", work / "concat")
    assert result.code == 0, result.err
    loaded = load_checkpoint(work / "concat")
    assert loaded.encoder is not None
    assert loaded.encoder["layers"] == [3, 1]
    store = Store.open(work / "run/store")
    (found,) = encode_prompts([store[0].captions[0]], loaded.encoder, model=str(work / "llama"))
    expected = store[0].text["llm"][0][:, [2, 0]]
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)
    assert sample(work, "concat", tmp_path / "images").code == 0
    other = train(work, "concat", work / "concat", "text_layers=[1,3]", "num_steps=8")
    assert other.code != 0
    assert "was trained with another encoder: layers" in other.err


@pytest.mark.slow
def test_captions_encoded_in_the_training_loop_have_the_same_layers(work: Path, tmp_path: Path) -> None:
    reads = {"text_dim": 24, "num_text_layers": 2}
    stacked = {"name": "llm", "kind": "auto", "model": str(work / "llama"), "layers": [1, 2, 3], "join": "stack"}
    online = {"online_encoder": {**stacked, "max_tokens": 32, "compute_dtype": "float32", "num_gpus": 0}}
    write_training(work, "online", reads, text_layers=[3, 1], num_steps=3, **online)
    result = train(work, "online", tmp_path / "online")
    assert result.code == 0, result.err
    encoder = load_checkpoint(tmp_path / "online").encoder
    assert encoder is not None
    assert (encoder["layers"], encoder["dim"], encoder["dtype"]) == ([3, 1], 24, "float32")
    (found,) = encode_prompts(["a red square"], encoder, model=str(work / "llama"))
    assert found.shape[1:] == (2, 24)
    wrong = train(work, "online", tmp_path / "wrong", "text_layers=[3,4]")
    assert wrong.code == 2
    assert "text_layers: [3, 4], but the encoder llm keeps the layers [1, 2, 3]" in wrong.err


@pytest.mark.parametrize(
    ("unet", "more", "message"),
    [
        ({"text_dim": 24}, {}, "denoiser.unet.num_text_layers is null, but the store"),
        ({"text_dim": 24, "num_text_layers": 2}, {}, "set denoiser.unet.num_text_layers=3, or text_layers"),
        ({"text_dim": 72, "num_text_layers": 3}, {}, "set denoiser.unet.text_dim=24"),
        (READS | {"text_embed_dim": 23}, {"text_embed": "clip"}, "set denoiser.unet.text_embed_dim=24"),
        (READS, {}, "text_embed is None: a prior reads it"),
        ({"text_dim": 24, "num_text_layers": 1}, {"text_layers": [4]}, "layers [4] cannot be read; it has the layers"),
        (
            {"text_dim": 24, "num_text_layers": 1},
            {"text_layers": [2, 3]},
            "denoiser.unet.num_text_layers is 1; set it",
        ),
        (
            {"text_dim": 24, "num_text_layers": 2},
            {"text_layers": [3, 3]},
            "text_layers are [3, 3], which names a layer twice",
        ),
    ],
)
def test_what_does_not_fit_the_stored_layers_is_refused_in_one_line(
    work: Path, tmp_path: Path, unet: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    write_training(work, "bad", unet, **more)
    result = train(work, "bad", tmp_path / "bad")
    assert result.code == 2
    assert message in result.err


@pytest.mark.slow
def test_a_stack_resumes_and_verifies_in_both_formats_and_every_dtype(work: Path, tmp_path: Path) -> None:
    models = [
        part
        for name, folder in (("llm", "llama"), ("clip", "clip"))
        for part in ("--encoder-model", f"{name}={work}/{folder}")
    ]
    for store_format, dtype in (("hdf5", "int8"), ("parquet", "float32")):
        out = tmp_path / store_format
        small = ["source.num_samples=12", "shard_size=4", "images.sizes_px=[]", f"store.format={store_format}"]
        given = [*small, f"store.dtype={dtype}", encoders(work)]
        assert precompute(out, *given).code == 0
        before = (out / "store/manifest.json").read_bytes()
        for path in (out / "store/manifest.json", *(out / "store/text-llm").glob("00001.*")):
            path.unlink()
        (out / "state/text-llm/00001.json").unlink(missing_ok=True)
        again = precompute(out, *given)
        assert again.code == 0, again.err
        assert (out / "store/manifest.json").read_bytes() == before
        verified = call("verify", str(out / "store"), "--reencode", "1", *models)
        assert verified.code == 0, verified.err + verified.out


def test_a_layer_that_is_named_twice_cannot_be_stacked(work: Path, tmp_path: Path) -> None:
    result = precompute(tmp_path / "run", "source.num_samples=4", encoders(work, layers=[1, -1, 3]))
    assert result.code == 2
    assert "encoders.llm.layers: names layer 3 twice" in result.err
