"""Patch features: what transformers gives for the patches of an image, in every kind of model and of grid."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionModel,
)

from pipeline.errors import ConfigError
from stages.encoders.patches.config import PatchEncoderConfig
from stages.encoders.patches.encoder import load_patch_encoder
from tests.stages.encoders import tiny_models

_DINO = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
CLIP_LOOKS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def dinov2(folder: Path) -> None:
    Dinov2Model(Dinov2Config(**_DINO)).save_pretrained(folder)


def dinov2_registers(folder: Path) -> None:
    config = Dinov2WithRegistersConfig(**_DINO, num_register_tokens=2)
    Dinov2WithRegistersModel(config).save_pretrained(folder)


def dinov3(folder: Path) -> None:
    DINOv3ViTModel(DINOv3ViTConfig(**_DINO, intermediate_size=40, num_register_tokens=3)).save_pretrained(folder)


MODELS: dict[str, tuple[Callable[[Path], None], Any, int, Any]] = {
    "dinov2": (dinov2, AutoModel, 1, IMAGENET),
    "dinov2_registers": (dinov2_registers, AutoModel, 3, IMAGENET),
    "dinov3": (dinov3, AutoModel, 4, IMAGENET),
    "clip": (tiny_models.clip, CLIPVisionModel, 1, CLIP_LOOKS),
    "siglip": (tiny_models.siglip, SiglipVisionModel, 0, ((0.5,) * 3, (0.5,) * 3)),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    make = MODELS[request.param][0]
    return request.param, tiny_models.write(make, tmp_path_factory.mktemp("models") / request.param)


def encoder(folder: Path, **changes: Any) -> PatchEncoderConfig:
    settings = {"name": "dino", "model": str(folder), "from_px": 32, "input_px": 32, "compute_dtype": "float32"}
    return PatchEncoderConfig.model_validate({**settings, **changes})


@torch.inference_mode()
def reference(name: str, folder: Path, pixels: np.ndarray, layer: int | None) -> np.ndarray:
    """The model on one image that needs no resizing, prepared in float64: (rows, columns, dim)."""
    _, model_class, prefix, (mean, std) = MODELS[name]
    prepared = ((pixels.astype(np.float64) / 255 - mean) / std).transpose(2, 0, 1)
    loaded = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    options = {"interpolate_pos_encoding": True} if name in ("clip", "siglip") else {}
    result = loaded(torch.from_numpy(prepared).float()[None], output_hidden_states=True, **options)
    states = result.last_hidden_state if layer is None else result.hidden_states[layer]
    return states[0, prefix:].reshape(pixels.shape[0] // 8, pixels.shape[1] // 8, -1).numpy()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("layer", [None, 2])
def test_features_are_the_models_states_of_the_patches(model: tuple[str, Path], layer: int | None) -> None:
    name, folder = model
    loaded = load_patch_encoder(encoder(folder, layer=layer, batch_size=2), 1)
    images = [noise(32, 32), noise(40, 24), noise(32, 32), noise(24, 40)]  # buckets of 4 x 4, 5 x 3 and 3 x 5 patches
    for image, found in zip(images, loaded.encode(images), strict=True):
        expected = reference(name, folder, image, layer)
        assert found.shape == (image.shape[0] // 8, image.shape[1] // 8, 24)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_images_are_resized_to_whole_patches_of_their_ratio(model: tuple[str, Path]) -> None:
    name, folder = model
    config = encoder(folder)
    assert [config.grid(shape, 8) for shape in ((32, 32), (16, 16), (80, 48), (20, 60))] == [
        (4, 4),
        (4, 4),
        (5, 3),
        (2, 7),
    ]
    pixels = noise(80, 48)
    resized = np.asarray(Image.fromarray(pixels).resize((24, 40), Image.Resampling.BICUBIC))
    (found,) = load_patch_encoder(config, 1).encode([pixels])
    expected = reference(name, folder, resized, None)
    cosine = (found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.9999  # resizing differs by a level


def test_the_fingerprint_names_what_decides_the_features(tmp_path: Path) -> None:
    folder = tiny_models.write(dinov2, tmp_path / "dino")
    base = encoder(folder).identify()
    assert base.dim == 24
    assert base.fingerprint["mean"] == list(IMAGENET[0])
    for changes, keys in (
        ({"input_px": 40}, {"input_px", "image_px"}),
        ({"layer": 1}, {"layer"}),
        ({"dtype": "float16"}, {"dtype"}),
        ({"mirrored": False, "batch_size": 1, "workers": 2}, set()),
    ):
        other = encoder(folder, **changes).identify().fingerprint
        assert {key for key in other if other[key] != base.fingerprint[key]} == keys


def test_settings_that_no_model_has_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_models.write(dinov2, tmp_path / "dino")
    for changes, message in (
        ({"input_px": 30}, r"image_encoders\.dino\.input_px is 30, which is no multiple .*, 8 px; take 24"),
        ({"layer": 4}, r"image_encoders\.dino\.layer is 4, but .* has 3 layers"),
    ):
        config = encoder(folder, **changes)
        with config.located() as found, pytest.raises(ConfigError, match=message):
            config.patch_px(found)
    text = tiny_models.write(tiny_models.clip_text, tmp_path / "text")
    with pytest.raises(ConfigError, match="is no vision transformer with patches"):
        encoder(text).identify()


def test_the_models_own_mean_and_deviation_are_used(tmp_path: Path) -> None:
    folder = tiny_models.write(dinov2, tmp_path / "dino")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    assert encoder(folder).identify().fingerprint["mean"] == [0.1] * 3
