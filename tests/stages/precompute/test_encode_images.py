"""Embeddings of images: what transformers gives, bound to their samples, read with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

from imagen_core.store import Store, verify_store
from pipeline.errors import ConfigError
from stages.encoders.clip_image import ClipImageConfig, Preprocessing
from tests.runs import precompute
from tests.stages.encoders import tiny_models

SETTINGS = ("source.num_samples=10", "images.sizes_px=[16, 32]", "shard_size=4", "store.dtype=float32")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tiny_models.clip, tmp_path_factory.mktemp("models") / "clip")


def encoders(clip: Path, **changes: object) -> str:
    settings = {"name": "clip", "model": str(clip), "from_px": 32, "compute_dtype": "float32", **changes}
    return "image_encoders=[{" + ", ".join(f"{key}: {value}" for key, value in settings.items()) + "}]"


@torch.inference_mode()
def reference(clip: Path, pixels: np.ndarray, output: str) -> np.ndarray:
    """The model on one image, prepared by Pillow and float64."""
    image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    prepared = (np.asarray(image, np.float64) / 255 - mean) / std
    model_class: Any = CLIPVisionModelWithProjection if output == "projected" else CLIPVisionModel
    model = model_class.from_pretrained(clip, dtype=torch.float32).eval()
    result = model(pixel_values=torch.from_numpy(prepared.transpose(2, 0, 1)).float()[None])
    return (result.image_embeds if output == "projected" else result.pooler_output)[0].numpy()


@pytest.mark.parametrize(
    ("from_px", "output", "dim"),
    [
        (32, "projected", 16),
        pytest.param(16, "projected", 16, marks=pytest.mark.slow),
        pytest.param(32, "pooled", 24, marks=pytest.mark.slow),
    ],
)
def test_every_embedding_is_that_of_its_image(clip: Path, tmp_path: Path, from_px: int, output: str, dim: int) -> None:
    precompute(tmp_path / "run", *SETTINGS, encoders(clip, from_px=from_px, output=output, batch_size=3))
    store = Store.open(tmp_path / "run" / "store")
    assert store.image_encoders == ["clip"]
    assert len(store) == 9  # one link is dead
    for sample in store:
        embed = sample.image_embeds["clip"]
        assert (embed.shape, embed.dtype) == ((dim,), np.float32)
        expected = reference(clip, sample.images[from_px], output)
        assert np.abs(embed - expected).max() <= 1e-4 * np.abs(expected).max()
    assert verify_store(tmp_path / "run" / "store").ok


def test_a_batch_has_the_embeddings_of_its_samples(clip: Path, tmp_path: Path) -> None:
    precompute(tmp_path / "run", *SETTINGS, encoders(clip))
    store = Store.open(tmp_path / "run" / "store")
    expected = {sample.key: sample.image_embeds["clip"] for sample in store}
    for batch in store.loader(batch_size=3, images=[16], image_embed="clip", seed=4):
        assert batch["image_embed"].shape == (len(batch["keys"]), 16)
        for key, embed in zip(batch["keys"], batch["image_embed"], strict=True):
            assert np.array_equal(embed.numpy(), expected[key])
    with pytest.raises(ValueError, match=r"image encoder 'nope' is not in the store; it has \['clip'\]"):
        store.loader(batch_size=3, image_embed="nope")


@pytest.mark.slow
@pytest.mark.parametrize("store_format", ["parquet", "hdf5"])
def test_an_image_encoder_added_later_touches_nothing_else_and_verify_finds_exchanged_files(
    clip: Path, tmp_path: Path, store_format: str
) -> None:
    settings = (*SETTINGS, f"store.format={store_format}", "store.dtype=int8", "images.codec={32: png}")
    run = tmp_path / "run"
    precompute(run, *settings)
    before = {path: path.read_bytes() for path in (run / "store").rglob("0*.*")}
    precompute(run, *settings, encoders(clip))
    assert {path: path.read_bytes() for path in before} == before
    assert Store.open(run / "store")[0].image_embeds["clip"].dtype == np.float16, "int8 would save nothing"
    suffix = {"parquet": "parquet", "hdf5": "h5"}[store_format]
    first, second = (run / "store" / "image-embed-clip" / f"0000{i}.{suffix}" for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert {p.file for p in verify_store(run / "store").problems} == {
        f"image-embed-clip/0000{i}.{suffix}" for i in (0, 1)
    }


def test_a_size_that_is_not_stored_is_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image_encoders\.clip\.from_px is 64, but images\.sizes_px is \[16, 32\]"):
        precompute(tmp_path / "run", *SETTINGS, encoders(clip, from_px=64))


def test_the_fingerprint_names_what_decides_the_embedding(clip: Path) -> None:
    config = ClipImageConfig.model_validate({"name": "clip", "model": str(clip), "from_px": 32})
    found = config.identify().fingerprint
    assert (found["from_px"], found["image_px"], found["output"]) == (32, 32, "projected")
    other = config.model_copy(update={"from_px": 16, "batch_size": 1, "workers": 3}).identify().fingerprint
    assert {key for key in found if found[key] != other[key]} == {"from_px"}


def test_the_models_own_mean_and_deviation_are_used(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    looks = Preprocessing.read(tmp_path / "preprocessor_config.json", 4)
    prepared = looks.prepare(np.full((4, 4, 3), (0, 255, 51), np.uint8))
    assert prepared.dtype == np.float32
    assert np.allclose(prepared, np.array([-1, 1, -0.6])[:, None, None] * np.ones((3, 4, 4)), atol=1e-6)


def test_of_an_image_of_a_bucket_the_centre_square_is_encoded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    looks = Preprocessing(16)
    np.testing.assert_array_equal(looks.prepare(pixels), looks.prepare(np.ascontiguousarray(pixels[:, 8:32])))
