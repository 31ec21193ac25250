"""Feature models against the networks called by hand, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from imagen_core.evaluation.inception import FidInception
from pipeline.errors import ConfigError, MachineError
from stages.encoders.clip_image import Preprocessing
from stages.evaluation.features.clip import ClipFeatures
from stages.evaluation.features.inception import InceptionFeatures
from tests.stages.encoders import tiny_models


def images(count: int, width: int = 32) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 32, width, 3), np.uint8))


def test_clip_features_are_the_embeddings_of_the_centre_squares(tmp_path: Path) -> None:
    folder = tiny_models.write(tiny_models.clip, tmp_path / "clip")
    wide = images(5, width=40)
    found = ClipFeatures(model=str(folder), batch_size=2).extract(wide).arrays["features"]
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    prepared = torch.from_numpy(np.stack([Preprocessing(32).prepare(image[:, 4:36]) for image in wide]))
    with torch.inference_mode():
        expected = model.visual_projection(model.vision_model(pixel_values=prepared).pooler_output)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_captions_have_one_vector_in_the_space_of_the_images_and_truncated_ones_are_counted(tmp_path: Path) -> None:
    folder = tiny_models.write(tiny_models.clip, tmp_path / "clip")
    model = ClipFeatures(model=str(folder), max_tokens=8)
    found = model.captions.extract(["a star", "a ring " * 20])
    assert found.arrays["features"].shape == (2, 16)
    assert found.counts == {"captions_truncated": 1}
    assert model.label == "CLIP clip"


@pytest.mark.slow
def test_inception_features_and_logits_are_the_networks_in_batches_of_one_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = FidInception().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    mixed = [*images(2), np.full((16, 20, 3), 90, np.uint8)]
    model = InceptionFeatures(path=f"{tmp_path}/weights.safetensors")
    found = model.extract(mixed).arrays
    assert model.label == "Inception v3, weights.safetensors"
    with torch.inference_mode():
        for row, image in enumerate(mixed):
            side = len(image)
            left = (image.shape[1] - side) // 2
            x = torch.from_numpy(image[:, left : left + side]).permute(2, 0, 1)[None].float() / 255 * 2 - 1
            features, logits = network(x)
            np.testing.assert_allclose(found["features"][row], features[0].numpy(), rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found["logits"][row], logits[0].numpy(), rtol=1e-3, atol=1e-5)


def test_other_files_are_refused_and_torchscript_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loading one runs code from the file"):
        InceptionFeatures(path="inception-2015-12-05.pt").fingerprint()
    with pytest.raises(MachineError, match=r"absent.safetensors cannot be read"):
        InceptionFeatures(path="absent.safetensors").fingerprint()
    save_file({"fc.bias": torch.zeros(1008)}, tmp_path / "w.safetensors")
    with pytest.raises(MachineError, match=r"lacks .* weights of FID's Inception v3"):
        InceptionFeatures(path=f"{tmp_path}/w.safetensors").extract(images(1))
