"""Which settings decide a cached feature: each field makes another key, or is named as one that does not."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from imagen_core.images import write_png
from pipeline.config import Config
from pipeline.errors import ConfigError
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.features import base, image_sets
from stages.evaluation.features.base import Extracted, FrozenConfig
from stages.evaluation.features.clip import ClipFeatures
from stages.evaluation.features.gather import FeatureCache, FeatureSet
from stages.evaluation.features.inception import InceptionFeatures
from stages.evaluation.features.lpips import LpipsDistance
from stages.evaluation.features.registry import AnyFeatures
from stages.evaluation.metrics import compute_metrics
from tests.stages.encoders import tiny_models

OTHER = {
    "output": "pooled",
    "compute_dtype": "bfloat16",
    "max_tokens": 9,
    "batch_size": 3,
    "max_pixels": 5000,
    "size_px": 16,
    "num_images": 2,
    "seed": 7,
}
"""A value of each field that is not the one the test begins with. A new field needs one here, or in PLACES."""
PLACES = ("model", "path", "revision", "kind")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tiny_models.clip, tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def fields(*classes: type[Config]) -> Iterator[Any]:
    for config in classes:
        for name in sorted(config.model_fields.keys() - set(PLACES)):
            yield pytest.param(config, name, id=f"{config.__name__}.{name}")


def test_every_model_says_which_fields_act() -> None:
    models = get_args(get_args(AnyFeatures)[0])
    assert set(models) == {ClipFeatures, InceptionFeatures}
    used = {EvaluateConfig.model_fields[name].annotation for name in ("clip", "lpips")}
    assert {get_args(annotation)[0] for annotation in used} == {ClipFeatures, LpipsDistance}
    for model in (*models, LpipsDistance):
        assert issubclass(model, FrozenConfig)
        assert model.inert.keys() <= model.model_fields.keys()
        assert all(model.inert.values())


@pytest.mark.parametrize(("config", "name"), fields(ClipFeatures, InceptionFeatures, LpipsDistance))
def test_another_value_of_a_field_of_a_model_is_another_fingerprint_unless_the_field_is_inert(
    config: type[FrozenConfig], name: str, clip: Path, weights: Path
) -> None:
    place = {"model": str(clip)} if config is ClipFeatures else {"path": str(weights)}
    one, other = config(**place), config(**place, **{name: OTHER[name]})
    assert getattr(one, name) != getattr(other, name)
    halves = [fingerprints(each) for each in (one, other)]
    assert (halves[0] != halves[1]) is (name not in config.inert)


def fingerprints(model: Any) -> list[Any]:
    """Of images, and of captions."""
    return [model.fingerprint(), model.captions.fingerprint() if isinstance(model, ClipFeatures) else None]


def test_each_half_of_a_clip_has_a_fingerprint_of_what_acts_on_it(clip: Path) -> None:
    images, texts = fingerprints(ClipFeatures(model=str(clip)))
    assert fingerprints(ClipFeatures(model=str(clip), max_tokens=9))[0] == images
    assert fingerprints(ClipFeatures(model=str(clip), output="pooled"))[1] == texts
    assert "tokenizer" in texts
    assert "tokenizer" not in images


@pytest.mark.parametrize("changed", ["tokenizer.json", "model.safetensors", "config.json"])
def test_other_files_of_a_model_are_another_fingerprint_and_a_copy_of_them_is_not(
    changed: str, clip: Path, tmp_path: Path
) -> None:
    copy = tmp_path / clip.name
    shutil.copytree(clip, copy)
    before = fingerprints(ClipFeatures(model=str(clip)))
    assert fingerprints(ClipFeatures(model=str(copy))) == before
    data = (copy / changed).read_bytes()
    old = {"tokenizer.json": b'"~"', "config.json": b'"projection_dim": 16', "model.safetensors": data[-1:]}[changed]
    new = {"tokenizer.json": b'"z~"', "config.json": b'"projection_dim": 17'}.get(changed, bytes([data[-1] ^ 1]))
    assert old in data
    (copy / changed).write_bytes(data[: data.rindex(old)] + new + data[data.rindex(old) + len(old) :])
    after = fingerprints(ClipFeatures(model=str(copy)))
    assert after[1] != before[1]
    assert (after[0] != before[0]) is (changed != "tokenizer.json")


@pytest.mark.parametrize("config", [InceptionFeatures, LpipsDistance])
def test_weights_are_known_by_their_content(config: type[Any], weights: Path, tmp_path: Path) -> None:
    before = config(path=str(weights)).fingerprint()
    moved = tmp_path / "moved.safetensors"
    shutil.copy(weights, moved)
    assert config(path=str(moved)).fingerprint() == before
    save_file({"a": np.zeros(2, np.float32)}, moved)
    assert config(path=str(moved)).fingerprint() != before


INERT_OF_IMAGES = {("ImageFolder", "max_pixels"): "an image that is larger is an error, and not read differently"}


@pytest.mark.parametrize(("config", "name"), fields(image_sets.ImageFolder, image_sets.StoreImageSet))
def test_another_value_of_a_field_of_a_set_of_images_is_another_identity(
    config: type[Any], name: str, small_run: Path, tmp_path: Path
) -> None:
    if config is image_sets.ImageFolder:
        write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
        settings: dict[str, object] = {"path": str(tmp_path)}
    else:
        settings = {"path": str(small_run), "num_images": 5}
    one, other = (config(**{**settings, **more}).open("field").identity for more in ({}, {name: OTHER[name]}))
    assert (one != other) is ((config.__name__, name) not in INERT_OF_IMAGES)


class _Model:
    label = "model"

    def __init__(self, setting: int = 1):
        self.setting = setting

    def fingerprint(self) -> dict[str, object]:
        return {"setting": self.setting}


def cached(folder: Path, inputs: object = "images", model: _Model | None = None) -> bool:
    """Whether features come from the cache."""
    calls: list[int] = []
    made = Extracted({"features": np.ones((3, 4), np.float32)})
    FeatureCache(folder).get("name", inputs, model or _Model(), lambda: calls.append(1) or made)
    return not calls


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {"inputs": "others"},
        lambda _: {"model": _Model(2)},
        lambda patch: patch.setattr(base, "version", lambda _: "0.0") or {},
        lambda patch: patch.setattr(torch.cuda, "is_available", lambda: True) or {},
    ],
    ids=["images", "settings", "version of a library", "device"],
)
def test_features_are_used_again_for_the_same_images_model_versions_and_device_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], dict[str, Any]]
) -> None:
    assert [cached(tmp_path), cached(tmp_path)] == [False, True]
    changed = change(monkeypatch)
    assert [cached(tmp_path, **changed), cached(tmp_path, **changed)] == [False, True]


def test_features_stay_until_their_successor_is_written(tmp_path: Path) -> None:
    assert not cached(tmp_path, "old")

    def fails() -> Extracted:
        assert len(list(tmp_path.iterdir())) == 1
        raise MemoryError

    with pytest.raises(MemoryError):
        FeatureCache(tmp_path).get("name", "new", _Model(), fails)
    assert cached(tmp_path, "old")
    assert not cached(tmp_path, "new")
    assert len(list(tmp_path.iterdir())) == 1, "the successor alone"


def test_features_of_one_model_with_other_settings_are_not_compared() -> None:
    rows = np.random.default_rng(0).standard_normal((9, 4))
    outputs = ("pooled", "projected")
    sets = [FeatureSet("CLIP a", rows, model={"output": output, "model": output}) for output in outputs]
    config = EvaluateConfig.model_validate({"generated": {"kind": "features", "path": "a.npy"}})
    with pytest.raises(ConfigError, match="different settings, in reference -> in generated: output: pooled ->"):
        compute_metrics(sets[1], sets[0], config)
    assert compute_metrics(sets[0], sets[0], config)["images"] == 9
