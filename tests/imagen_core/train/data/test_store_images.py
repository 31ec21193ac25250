"""Condition images of a training: arrays of the store, at the size of the network's image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imagen_core import store as st
from imagen_core.cascade import Cascade, CascadeStage, SamplingConfig
from imagen_core.condition_images import stored_images
from imagen_core.diffusion import Denoiser
from imagen_core.train import TrainConfig, TrainError, load_checkpoint, train
from imagen_core.train.checkpoints.single_file import write_model
from imagen_core.train.data.example import make_example
from imagen_core.train.data.stores import open_stores
from tests.imagen_core.store.arrays_added import add_arrays
from tests.imagen_core.train.small import BASE, BASE_UNET, first_batch, make_config, make_store

CPU = torch.device("cpu")
DEPTH, COLOUR, SCORE = (
    st.ArraySpec("uint8", (32, 32)),
    st.ArraySpec("uint8", (16, 16, 3)),
    st.ArraySpec("float32", (8, 8)),
)


def pixels(spec: st.ArraySpec, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, spec.shape).astype(spec.dtype) for _ in range(40)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_store(tmp_path_factory.mktemp("condition") / "store")
    for number, (name, spec) in enumerate({"depth": DEPTH, "colour": COLOUR, "score": SCORE}.items()):
        add_arrays(root, name, spec, pixels(spec, number), "parquet")
    return root


def configured(store: Path, channels: dict[str, int], **changes: Any) -> TrainConfig:
    unet = BASE_UNET | {"condition_channels": sum(channels.values())}
    return make_config(store, denoiser=BASE | {"unet": unet}, condition_images=channels, **changes)


def test_the_network_reads_the_arrays_of_its_samples_at_the_size_of_its_image(store: Path) -> None:
    config = configured(store, {"depth": 1, "colour": 3})
    batch = first_batch(config)
    example = make_example(batch, config, Denoiser(config.denoiser).double(), CPU, 0)
    found = example.conditioning.images
    assert found is not None
    assert found.shape == (8, 4, 16, 16)
    samples = {sample.key: sample for sample in st.Store.open(store)}
    for row, key in enumerate(batch.keys):
        arrays = samples[key].arrays
        depth = torch.from_numpy(arrays["depth"]).double()[None, None] / 127.5 - 1
        expected = F.interpolate(depth, size=(16, 16), mode="bicubic", antialias=True).clamp(-1, 1)
        torch.testing.assert_close(found[row : row + 1, :1], expected)
        colour = torch.from_numpy(arrays["colour"]).double().permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(found[row, 1:], colour)
    part = make_example(batch.part(2, 5), config, Denoiser(config.denoiser).double(), CPU, 0).conditioning.images
    assert part is not None
    assert torch.equal(part, found[2:5])


def test_arrays_of_different_shapes_are_stretched_one_by_one_and_empty_ones_are_zero() -> None:
    arrays = torch.zeros(3, 4, 6, dtype=torch.bool)
    arrays[0, :2, :3], arrays[1, :4, :6] = True, True
    sizes = torch.tensor([[2, 3], [4, 6], [0, 0]])
    found = stored_images(arrays, sizes, (8, 8), CPU, torch.float64)
    assert found.shape == (3, 1, 8, 8)
    assert torch.equal(found[:2], torch.ones(2, 1, 8, 8, dtype=torch.float64))
    assert not found[2].any()
    assert stored_images(arrays[:0], None, (8, 8), CPU, torch.float64).shape == (0, 1, 8, 8)


@pytest.mark.slow
def test_a_training_on_condition_images_resumes_and_its_model_samples_by_them(store: Path, tmp_path: Path) -> None:
    settings = {"num_samples": 4, "every_steps": 2}
    grid = {"every_steps": 4, "num_images": 2, "num_steps": 2}
    config = configured(store, {"depth": 1}, num_steps=4, validation=settings, grid=grid)
    straight = train(config, tmp_path / "straight")
    train(config.model_copy(update={"num_steps": 2}), tmp_path / "cut")
    resumed = train(config, tmp_path / "cut")
    assert (resumed["loss"], resumed["validation_loss"]) == (straight["loss"], straight["validation_loss"])

    loaded = load_checkpoint(tmp_path / "straight")
    assert loaded.condition_images == {"depth": 1}
    write_model(tmp_path / "model.safetensors", loaded)
    assert load_checkpoint(tmp_path / "model.safetensors").condition_images == {"depth": 1}
    stage = CascadeStage(loaded.denoiser, SamplingConfig(num_steps=2), condition_images=loaded.condition_images)
    cascade = Cascade([stage], loaded.encoder)
    text = [np.ones((2, 8), np.float16)]
    light, dark = (
        cascade.sample(text, [1], condition_images={"depth": torch.full((1, 1, 32, 32), level)})[16]
        for level in (1.0, -1.0)
    )
    assert not torch.allclose(light, dark, atol=1e-4)
    with pytest.raises(ValueError, match=r"condition_images\.depth: the model reads \(b, 1, h, w\) \(got None\)"):
        cascade.sample(text, [1])


def test_a_model_without_names_reads_images() -> None:
    config = configured(Path("store"), {"any": 2}).denoiser
    stage = CascadeStage(Denoiser(config), SamplingConfig())
    assert stage.further_images == {"images": 2}


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"edges": 1}, r"'edges' is no array of the store .* \(arrays: \['colour', 'depth', 'score'\]\)"),
        ({"score": 1}, r"the array 'score' is float32 \(8, 8\), and no image; name one of uint8 or bool"),
        ({"colour": 1}, r"condition_images\.colour is 1, but the array has 3 channels; set it to 3"),
    ],
)
def test_arrays_that_are_no_such_images_are_refused(store: Path, channels: dict[str, int], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        open_stores(configured(store, channels))


@pytest.mark.parametrize("views", [{"horizontal_flip": 0.5}, {"resized_crop": {"from_px": 32}}])
def test_views_that_would_not_change_them_alike_are_refused(views: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"would not change the condition_images with the image; leave it off"):
        configured(Path("store"), {"depth": 1}, views=views)
