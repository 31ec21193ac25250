"""Tokens of T5, and stacked layers of a language model, in one network: stored, trained on, sampled from, measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from imagen_core.store import Store
from imagen_core.train import load_checkpoint
from stages.encoders.prompts import encode_prompts
from tests.commands import Result, call, precompute
from tests.stages.encoders import tiny_models
from tests.trained import BASE, COMMON, SUPER, UNET, train

pytestmark = pytest.mark.slow
BOTH = {"text_dim": [64, 24], "num_text_layers": [None, 2], "text_layer_join": "concat"}
READS = {"text": ["t5", "llm"], "text_layers": {"llm": [3, 1]}}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two encoders, a base trained on both, and a super-resolution model trained on T5 alone."""
    folder = tmp_path_factory.mktemp("two")
    tiny_models.llama(folder / "llama")
    stacked = {"name": "llm", "kind": "auto", "model": str(folder / "llama"), "layers": [1, 2, 3], "join": "stack"}
    t5 = {"name": "t5", "kind": "t5", "model": "tiny-random-t5", "max_tokens": 32}
    encoders = [t5 | {"compute_dtype": "float32"}, stacked | {"max_tokens": 32, "compute_dtype": "float32"}]
    small = ["source.num_samples=24", "images.sizes_px=[16,32]", "store.dtype=float32"]
    result = precompute(folder / "run", *small, f"encoders={json.dumps(encoders)}")
    assert result.code == 0, result.err
    write(folder, "base", {"size_px": 16, "unet": UNET | BOTH}, **READS)
    write(folder, "sr", SUPER["denoiser"], views=SUPER["views"], num_steps=3)
    for name in ("base", "sr"):
        result = train(folder, name, folder / name)
        assert result.code == 0, result.err
    return folder


def write(work: Path, name: str, denoiser: dict[str, Any], **more: object) -> None:
    config = COMMON | {"denoiser": denoiser, "store": str(work / "run/store")}
    (work / f"{name}.yaml").write_text(yaml.safe_dump(config | more))


def sample(work: Path, out: Path, *more: str, stages: tuple[str, ...] = ("base",)) -> Result:
    sampling = {"num_steps": 2, "guidance": {"text": 3.0}}
    cascade = [{"checkpoint": str(work / name), "sampling": sampling} for name in stages]
    where = f"encoder_model={{llm: {work}/llama}}"
    return call(
        *("run", "sample", "--out", str(out), "--quiet", "--json", "device=cpu", where),
        *(f"stages={json.dumps(cascade)}", *more),
    )


def pixels(out: Path, size: int = 16) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((out / f"images-{size}").glob("*.png"))]


def test_the_dry_run_names_both_groups_and_their_bytes(work: Path, tmp_path: Path) -> None:
    result = call("run", "train", "-c", str(work / "base.yaml"), "--out", str(tmp_path / "x"), "--dry-run", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)["summary"]
    assert plan["store_groups_needed"] == ["images-16", "text-t5", "text-llm"]
    assert plan["text_dim_needed"] == [64, 24]
    assert plan["text_layers_needed"] == [None, 2]
    assert plan["text_bytes_per_token_float16"] == {"t5": 128, "llm": 96}
    assert plan["parameters"] == sum(p.numel() for p in load_checkpoint(work / "base").denoiser.parameters())


def test_prompts_and_the_captions_of_the_store_give_the_same_images(work: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(work / "base")
    assert isinstance(loaded.encoder, list)
    assert [(one["name"], one.get("layers")) for one in loaded.encoder] == [("t5", None), ("llm", [3, 1])]
    sample_of = Store.open(work / "run/store")[2]
    found = encode_prompts(sample_of.captions, loaded.encoder[1], model=str(work / "llama"))[0]
    np.testing.assert_allclose(found, sample_of.text["llm"][0][:, [2, 0]], rtol=1e-4, atol=1e-4)
    few = ("seed=5", f"captions={{kind: store, path: {work}/run/store, num_captions: 3}}")
    stored = sample(work, tmp_path / "stored", *few)
    assert stored.code == 0, stored.err
    assert json.loads(stored.out)["summary"]["embeddings"] == {"t5": "store, text-t5", "llm": "store, text-llm"}
    record = json.loads((tmp_path / "stored/images.json").read_text())
    prompts = [image["prompt"] for image in record["images"]]
    encoded = sample(work, tmp_path / "encoded", "seed=5", f"prompts={json.dumps(prompts)}")
    assert encoded.code == 0, encoded.err
    assert json.loads(encoded.out)["summary"]["embeddings"] == {"t5": "encoder", "llm": "encoder"}
    for one, other in zip(pixels(tmp_path / "stored"), pixels(tmp_path / "encoded"), strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    without = sample(work, tmp_path / "without", "seed=5", 'prompts=["", "", ""]')
    assert without.code == 0, without.err
    assert not np.array_equal(pixels(tmp_path / "without")[0], pixels(tmp_path / "stored")[0])
    settings = record["stages"][0]["settings"]
    assert settings["encoders"].keys() == {"captions.t5", "captions.llm"}


def test_a_model_in_one_file_samples_as_its_checkpoint_does(work: Path, tmp_path: Path) -> None:
    file, prompt = tmp_path / "model.safetensors", 'prompts=["a red square"]'
    exported = call("export", str(work / "base"), "--out", str(file))
    assert exported.code == 0, exported.err
    for name, place in (("file", str(file)), ("folder", "base")):
        result = sample(work, tmp_path / name, prompt, stages=(place,))
        assert result.code == 0, result.err
    assert np.array_equal(pixels(tmp_path / "file")[0], pixels(tmp_path / "folder")[0])


def test_each_encoder_is_looked_for_where_it_is_by_its_name(work: Path, tmp_path: Path) -> None:
    prompt = 'prompts=["a red square"]'
    for place, code, message in (
        (f"{work}/llama", 2, "give them by name: encoder_model={t5: ..., llm: ...}"),
        (f"{{bert: {work}/llama}}", 2, "encoder_model: names the encoder 'bert', but the models read t5, llm"),
        (f"{{llm: {work}/gone}}", 4, "its place now is encoder_model.llm=..."),
        ("{t5: tiny-random-t5, llm: tiny-random-t5}", 2, "encoder"),
    ):
        result = sample(work, tmp_path / "bad", prompt, f"encoder_model={place}")
        assert result.code == code, result.err
        assert message in result.err
    (work / "llama").rename(work / "moved")
    try:
        result = sample(work, tmp_path / "moved", prompt, f"encoder_model={{llm: {work}/moved}}")
        assert result.code == 0, result.err
    finally:
        (work / "moved").rename(work / "llama")


def test_a_super_resolution_model_of_one_of_the_encoders_follows_a_base_of_both(work: Path, tmp_path: Path) -> None:
    prompt = 'prompts=["a red square"]'
    result = sample(work, tmp_path / "cascade", prompt, stages=("base", "sr"))
    assert result.code == 0, result.err
    assert pixels(tmp_path / "cascade", 32)[0].shape == (32, 32, 3)
    alone = sample(work, tmp_path / "alone", prompt)
    assert alone.code == 0, alone.err
    assert np.array_equal(pixels(tmp_path / "cascade")[0], pixels(tmp_path / "alone")[0])


def test_likelihoods_read_both_encoders(work: Path, tmp_path: Path) -> None:
    likelihood = ("num_images=2", "num_steps=4", "batch_size=2", f"store={work}/run/store", "device=cpu")
    result = call(
        *("run", "likelihood", "--out", str(tmp_path / "bits"), "--quiet", "--json"),
        *(f"checkpoint={work}/base", *likelihood),
    )
    assert result.code == 0, result.err
    assert np.isfinite(json.loads(result.out)["summary"]["bits_per_dimension"])
    other = tmp_path / "other"
    assert precompute(other, "source.num_samples=4", "images.sizes_px=[16]").code == 0
    refused = call(
        *("run", "likelihood", "--out", str(tmp_path / "other-bits"), "--quiet", f"checkpoint={work}/base"),
        *(*likelihood[:3], f"store={other}/store"),
    )
    assert refused.code == 2
    assert "encoded by another encoder than the model's" in refused.err or "no encoder of captions" in refused.err


def test_online_encoding_of_several_is_refused_in_one_line(work: Path, tmp_path: Path) -> None:
    online = f"online_encoder={json.dumps({'name': 't5', 'kind': 't5', 'model': 'tiny-random-t5'})}"
    result = train(work, "base", tmp_path / "online", online)
    assert result.code == 2
    assert "online_encoder: encodes the captions for one encoder, but text is ['t5', 'llm']" in result.err
    assert not (tmp_path / "online/checkpoints").exists()


def test_a_text_of_one_encoder_records_what_it_did_before(work: Path) -> None:
    loaded = load_checkpoint(work / "sr")
    assert isinstance(loaded.encoder, dict)
    assert BASE["text"] == loaded.encoder["name"] == "t5"
