"""Training on aspect-ratio buckets: shapes of batches, exact resume, validation, grids, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagen_core.diffusion import Denoiser
from imagen_core.sealed import read_sealed, write_sealed
from imagen_core.store import Store
from imagen_core.train import CheckpointError, TrainError, TrainingStopped, load_checkpoint, train
from imagen_core.train.checkpoints.single_file import write_model
from imagen_core.train.data.example import make_example
from imagen_core.train.data.store import open_store, trained_shapes
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import BatchStream
from imagen_core.train.evaluation import validation_metrics
from tests.imagen_core.store.handmade_store import bucket_list
from tests.imagen_core.train.small import ALONE, BASE_UNET, SUPER, make_config, make_context, make_store, tensors

ROWS = (9, 6)


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("buckets") / "store", rows=ROWS, buckets=True)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("buckets") / "large", rows=ROWS, buckets=True, large_px=64)


def super_config(store: Path, **changes: Any) -> Any:
    return make_config(store, **{"denoiser": SUPER, "batch_size": 3} | changes)


def test_noise_and_low_resolution_images_have_the_shape_of_the_batch(bucketed: Path) -> None:
    config = super_config(bucketed)
    stream = BatchStream(open_stores(config), config, ALONE, None)
    denoiser, seen = Denoiser(config.denoiser), set()
    samples = {sample.key: sample for sample in Store.open(bucketed)}
    for batch in [stream.next() for _ in range(5)]:
        example = make_example(batch, config, denoiser, torch.device("cpu"), 0)
        shape = example.x0.shape[2:]
        seen.add(tuple(shape))
        for key, x0 in zip(batch.keys, example.x0, strict=True):
            pixels = torch.from_numpy(samples[key].images[32]).permute(2, 0, 1)
            assert torch.equal(x0, pixels.double() / 127.5 - 1)
            assert samples[key].images[16].shape[:2] == (shape[0] // 2, shape[1] // 2)
        assert example.noise.shape == example.x0.shape
        assert example.conditioning.low_res is not None
        assert example.conditioning.low_res.shape == example.x0.shape
        empty = make_example(batch.part(5, 6), config, denoiser, torch.device("cpu"), 0)
        assert empty.x0.shape == (1, 3, *shape), "a process without a sample takes part in the same shape"
    stream.close()
    assert seen == set(bucket_list(32))


@pytest.mark.slow
def test_a_training_stopped_and_resumed_in_an_epoch_has_the_weights_of_one_in_one_go(
    bucketed: Path, tmp_path: Path
) -> None:
    config = super_config(
        bucketed,
        validation={"num_samples": 3, "every_steps": 6},
        grid={"every_steps": 6, "num_images": 4, "num_steps": 2},
    )
    whole = train(config, tmp_path / "whole")
    calls = iter([False, False, True])
    with pytest.raises(TrainingStopped):
        train(config, tmp_path / "parts", should_stop=lambda: next(calls))
    parts = train(config, tmp_path / "parts")
    first, second = tensors(whole["checkpoint"]), tensors(parts["checkpoint"])
    assert first.keys() == second.keys()
    assert all(torch.equal(values, second[name]) for name, values in first.items())
    assert whole["validation_loss"] == parts["validation_loss"]
    with Image.open(tmp_path / "parts" / "grids" / "step-00000006.png") as grid:
        assert grid.size == (2 * 40 + 2, 2 * 40 + 2), "each image in the room of the largest height and width"


def test_validation_is_the_mean_over_the_samples_of_all_buckets(bucketed: Path) -> None:
    """Whatever the size of the batches that the buckets are cut into."""
    found = []
    for batch_size in (1, 2, 6):
        config = super_config(bucketed, validation={"num_samples": 6}, batch_size=batch_size)
        torch.manual_seed(0)
        denoiser = Denoiser(config.denoiser).double()
        torch.nn.init.normal_(list(denoiser.parameters())[-2], std=0.1)
        found.append(validation_metrics(make_context(config, denoiser))["validation_loss"])
    np.testing.assert_allclose(found, found[0], rtol=1e-9)
    assert found[0] > 0


def test_shapes_that_the_model_cannot_halve_are_refused_by_name(bucketed: Path) -> None:
    deep = {"unet": BASE_UNET | {"channel_mult": [1, 1, 1, 1], "attention_resolutions": [2]}, "size_px": 16}
    with pytest.raises(TrainError, match=r"multiples of 8 px, but images of an aspect-ratio bucket .* are 20 x 12 px"):
        open_store(make_config(bucketed, denoiser=deep))


def test_crops_that_do_not_fit_a_bucket_are_refused(bucketed: Path, large: Path) -> None:
    with pytest.raises(
        TrainError, match=r"views\.crop_px 32 is larger than a side of an aspect-ratio bucket .* 24 px"
    ):
        open_store(super_config(bucketed, views={"crop_px": 32}))
    config = super_config(bucketed, views={"crop_px": 24})
    assert trained_shapes(open_store(config), config) == [(24, 24)]
    unet = BASE_UNET | {"image_size_px": 50}
    views = {"resized_crop": {"from_px": 64}}
    with pytest.raises(TrainError, match=r"resized_crop\.from_px is 64: images of 50 px cannot have the shapes"):
        open_store(make_config(large, denoiser={"unet": unet, "size_px": 50}, views=views))


def test_random_crops_of_a_larger_size_keep_the_shapes_of_the_buckets(large: Path) -> None:
    config = make_config(large, views={"resized_crop": {"from_px": 64, "min_scale": 0.4}}, batch_size=3)
    assert trained_shapes(open_store(config), config) == list(bucket_list(16))
    stream = BatchStream(open_stores(config), config, ALONE, None)
    shapes = {tuple(stream.next().images[16].shape[2:]) for _ in range(5)}
    stream.close()
    assert shapes == set(bucket_list(16))


def test_a_checkpoint_has_the_shapes_that_it_was_trained_on(bucketed: Path, tmp_path: Path) -> None:
    path = Path(train(make_config(bucketed, num_steps=1, ema={"rates": []}), tmp_path)["checkpoint"])
    model = load_checkpoint(path)
    assert model.shapes == bucket_list(16)
    write_model(tmp_path / "model.safetensors", model)
    assert load_checkpoint(tmp_path / "model.safetensors").shapes == bucket_list(16)
    state = read_sealed(path / "state.json")
    write_sealed(path / "state.json", {name: value for name, value in state.items() if name != "shapes"})
    earlier = load_checkpoint(path)
    assert earlier.shapes == (), "of an earlier version"
    write_model(tmp_path / "earlier.safetensors", earlier)
    assert load_checkpoint(tmp_path / "earlier.safetensors").shapes == ()
    write_sealed(path / "state.json", {**state, "shapes": [[16]]})
    with pytest.raises(CheckpointError, match=r"shapes\.0: list should have at least 2 items"):
        load_checkpoint(path)
