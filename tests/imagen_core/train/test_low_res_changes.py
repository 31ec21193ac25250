"""Low-resolution images compressed or tinted in training, as Pillow or the formula does it."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagen_core.diffusion import Denoiser
from imagen_core.train import TrainConfig
from imagen_core.train.augment import JpegConfig, TintConfig, jpeg, tint
from imagen_core.train.data.example import Example, make_example
from imagen_core.train.data.stores import open_stores
from imagen_core.train.data.stream import Batch, BatchStream
from imagen_core.train.evaluation import _for_validation
from imagen_core.train.parallel.world import World
from tests.imagen_core.train.small import SUPER, changed, make_config, make_store

CPU = torch.device("cpu")
PLAIN_SUPER = SUPER | {"low_res_noise": None, "unet": SUPER["unet"] | {"low_res_noise": False}}
CHANGES: dict[str, dict[str, Any]] = {
    "low_res_jpeg": {"probability": 0.3, "quality": [20, 60]},
    "low_res_tint": {"probability": 0.3},
}


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file))


def test_jpeg_is_what_pillow_makes_at_a_quality_of_the_range_on_the_stated_part() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 24, 16), np.uint8))
    before = images.clone()
    uniform = torch.tensor([[0.0, 0.0], [0.29, 0.999], [0.3, 0.5], [0.9, 0.0]], dtype=torch.float64)
    found = jpeg(images, JpegConfig(probability=0.3, quality=(20, 80)), uniform)
    assert torch.equal(images, before)
    assert torch.equal(found[2:], before[2:])
    for row, quality in ((0, 20), (1, 80)):
        expected = as_jpeg(before[row].permute(1, 2, 0).numpy(), quality)
        assert np.array_equal(found[row].permute(1, 2, 0).numpy(), expected)
    assert jpeg(images[:0], JpegConfig(), uniform[:1]).shape == (0, 3, 24, 16), "a process without a sample"


def test_a_tint_is_the_luma_times_a_factor_for_each_channel_on_the_stated_part() -> None:
    images = torch.rand(3, 3, 4, 5, dtype=torch.float64) * 2 - 1
    uniform = torch.tensor([[0.1, 0, 0.5, 1], [0.1, 1, 1, 1], [0.5, 0, 0, 0]], dtype=torch.float64)
    found = tint(images, TintConfig(probability=0.5, strength=0.4), uniform)
    brightness = ((images + 1) * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]).sum(1)
    for channel, factor in enumerate((0.6, 0.8, 1.0)):
        torch.testing.assert_close(found[0, channel] + 1, brightness[0] * factor)
        torch.testing.assert_close(found[1, channel] + 1, brightness[1])
    assert torch.equal(found[2], images[2])


def read(config: TrainConfig, count: int, world: World = World(0, 1, CPU)) -> list[Batch]:  # noqa: B008
    stream = BatchStream(open_stores(config), config, world, None)
    try:
        return [stream.next() for _ in range(count)]
    finally:
        stream.close()


def example(config: TrainConfig, batch: Batch) -> Example:
    return make_example(batch, config, Denoiser(config.denoiser), CPU, 0)


def low_res(config: TrainConfig, batch: Batch) -> torch.Tensor:
    found = example(config, batch).conditioning.low_res
    assert found is not None
    return found


@pytest.mark.parametrize("field", list(CHANGES))
def test_the_low_resolution_image_alone_is_changed_in_training_at_the_stated_rate(tmp_path: Path, field: str) -> None:
    plain = make_config(make_store(tmp_path / "store"), denoiser=PLAIN_SUPER, batch_size=40)
    config = changed(plain, views={field: CHANGES[field]})
    num_changed = 0
    for batch in read(plain, 10):
        assert torch.equal(example(plain, batch).x0, example(config, batch).x0)
        same = (low_res(plain, batch) == low_res(config, batch)).flatten(1).all(1)
        assert torch.equal(low_res(_for_validation(config), batch), low_res(_for_validation(plain), batch))
        num_changed += int((~same).sum())
    assert abs(num_changed / 400 - 0.3) < 0.07


@pytest.mark.parametrize("field", list(CHANGES))
def test_what_is_changed_does_not_depend_on_processes_or_micro_batches(tmp_path: Path, field: str) -> None:
    store = make_store(tmp_path / "store")
    config = make_config(store, denoiser=PLAIN_SUPER, batch_size=20, views={field: CHANGES[field]})
    (whole,) = read(config, 1)
    expected = low_res(config, whole)
    parts = [read(config, 1, World(rank, 2, CPU))[0] for rank in (0, 1)]
    assert torch.equal(torch.cat([low_res(config, part) for part in parts]), expected)
    assert torch.equal(torch.cat([low_res(config, whole.part(k, k + 5)) for k in range(0, 20, 5)]), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": {"low_res_jpeg": {}}}, r"views\.low_res_jpeg is for super-resolution"),
        ({"views": {"low_res_tint": {}}}, r"views\.low_res_tint is for super-resolution"),
        (
            {"denoiser": SUPER, "views": {"low_res_jpeg": {"quality": [60, 30]}}},
            r"must be in 1 to 95 and not",
        ),
        ({"denoiser": SUPER, "views": {"low_res_jpeg": {"quality": 96}}}, r"quality: must be in 1 to 95"),
        ({"denoiser": SUPER, "views": {"low_res_tint": {"strength": 0}}}, "strength"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(Path("store"), **changes)
