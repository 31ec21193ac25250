"""Sampling by further images from files, with a model that was trained on arrays of a store."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagen_core import store as st
from imagen_core.train import train
from pipeline.errors import ConfigError
from stages.sampling.inputs import read_condition_images
from tests.commands import call
from tests.imagen_core.store.arrays_added import add_arrays
from tests.imagen_core.train.small import BASE_UNET, make_config, make_store


def save(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)


def test_the_centre_of_a_file_is_read_with_as_many_channels_as_the_model_reads(tmp_path: Path) -> None:
    wide = np.tile(np.arange(32), (16, 1)) * 8
    paths = {"depth": save(tmp_path / "gray.png", wide)}
    found = read_condition_images([paths, paths], {"depth": 1}, (16, 16))
    assert found["depth"].shape == (2, 1, 16, 16)
    np.testing.assert_allclose(found["depth"][0, 0].numpy(), wide[:, 8:24] / 127.5 - 1, atol=1e-6)
    coloured = {"depth": save(tmp_path / "rgb.png", np.dstack([wide, wide, wide + 7]))}
    assert read_condition_images([coloured], {"depth": 3}, (16, 16))["depth"].shape == (1, 3, 16, 16)
    with pytest.raises(ConfigError, match=r"condition_images\.depth: .*rgb\.png has colours, and one channel is read"):
        read_condition_images([paths, coloured], {"depth": 1}, (16, 16))


@pytest.mark.slow
def test_each_image_is_sampled_by_its_own_file(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    arrays = [np.full((16, 16), row * 6, np.uint8) for row in range(40)]
    add_arrays(store, "depth", st.ArraySpec("uint8", (16, 16)), arrays, "parquet")
    unet = BASE_UNET | {"condition_channels": 1, "text_dim": None, "attention_type": "self"}
    denoiser = {"unet": unet, "size_px": 16}
    train(
        make_config(store, denoiser=denoiser, text=None, condition_images={"depth": 1}, num_steps=2), tmp_path / "run"
    )
    light, dark = (save(tmp_path / f"{level}.png", np.full((20, 20), level)) for level in (250, 5))

    def sample(out: str, *more: str):
        stages = f"stages=[{{checkpoint: {tmp_path / 'run'}, sampling: {{num_steps: 2}}}}]"
        return call("run", "sample", "--out", str(tmp_path / out), "--quiet", "device=cpu", stages, *more)

    both = sample("both", f"condition_images={{depth: [{light}, {dark}]}}", "seeds=[3,3]")
    assert both.code == 0, both.err
    first, second = (np.asarray(Image.open(tmp_path / f"both/images-16/0000{k}.png")).astype(int) for k in (0, 1))
    assert np.abs(first - second).max() > 0
    alone = sample("alone", f"condition_images={{depth: [{dark}]}}", "seeds=[3]")
    assert alone.code == 0, alone.err
    assert np.array_equal(np.asarray(Image.open(tmp_path / "alone/images-16/00000.png")), second)
    changed = sample("alone", f"condition_images={{depth: [{light}]}}", "seeds=[3]")
    assert changed.code != 0
    assert "holds images of other settings" in changed.err

    missing = sample("missing", "prompts=[a]")
    assert missing.code == 2
    assert "condition_images: the stages read ['depth'], but 'depth' is missing" in missing.err
    unknown = sample("unknown", f"condition_images={{depth: [{dark}], edges: [{dark}]}}")
    assert unknown.code == 2
    assert "condition_images.edges: no stage reads it (they read ['depth'])" in unknown.err
