"""Patch features in a store: equal to the live model's, of mirrored images too, added, resumed, removed, planned."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from imagen_core.store import Sample, Store, verify_store
from pipeline.errors import StaleOutputError
from stages.encoders.patches.config import PatchEncoderConfig
from stages.encoders.patches.encoder import load_patch_encoder
from stages.precompute.encode_images import EncodePatchesStage
from tests.commands import call
from tests.runs import precompute, precompute_interrupted, store_bytes
from tests.stages.encoders import tiny_models
from tests.stages.encoders.test_patches import dinov2

SETTINGS = ("source.num_samples=10", "images.sizes_px=[16, 32]", "shard_size=4")
GROUPS = ["dino", "dino-mirrored", "dino-mirrored-scale", "dino-scale"]


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(dinov2, tmp_path_factory.mktemp("models") / "dino")


def settings(dino: Path, **changes: object) -> dict[str, object]:
    base = {"name": "dino", "kind": "auto", "model": str(dino), "from_px": 32, "input_px": 32, "batch_size": 3}
    return {**base, "compute_dtype": "float32", **changes}


def encoders(dino: Path, **changes: object) -> str:
    return f"image_encoders={json.dumps([settings(dino, **changes)])}"


def features(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """float32 (rows, columns, dim), whatever they are stored as."""
    scale = arrays.get(f"{name}-scale")
    return arrays[name].astype(np.float32) * (1 if scale is None else scale[..., None])


def cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """The least of all patches."""
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    return float(((found * expected).sum(-1) / lengths).min())


def live(dino: Path, samples: list[Sample], *, mirrored: bool) -> list[np.ndarray]:
    model = load_patch_encoder(PatchEncoderConfig.model_validate(settings(dino)), 1)
    images = [sample.images[32] for sample in samples]
    return model.encode([image[:, ::-1] if mirrored else image for image in images])


@pytest.mark.parametrize(("dtype", "least"), [("float16", 0.9999), ("int8", 0.9995)])
@pytest.mark.parametrize("aspect", ["square", "buckets"])
def test_cached_features_are_those_of_the_live_model_of_the_image_and_of_the_mirrored_image(
    dino: Path, tmp_path: Path, dtype: str, least: float, aspect: str
) -> None:
    precompute(
        tmp_path / "run", *SETTINGS, f"images={{sizes_px: [32], aspect: {aspect}}}", encoders(dino, dtype=dtype)
    )
    samples = list(Store.open(tmp_path / "run/store"))
    assert len(samples) == 9  # one link is dead
    for mirrored, name in ((False, "dino"), (True, "dino-mirrored")):
        for sample, expected in zip(samples, live(dino, samples, mirrored=mirrored), strict=True):
            assert sample.arrays[name].dtype == np.dtype(dtype)
            assert cosine(features(sample.arrays, name), expected) >= least
    unlike = [cosine(features(s.arrays, "dino"), features(s.arrays, "dino-mirrored")[:, ::-1]) for s in samples]
    assert min(unlike) < 0.99, "the features of a mirrored image are not the mirrored features"
    assert verify_store(tmp_path / "run/store").ok
    if aspect == "buckets":
        assert len({sample.arrays["dino"].shape for sample in samples}) > 1


def test_a_batch_has_the_features_of_its_samples_as_float16(dino: Path, tmp_path: Path) -> None:
    precompute(tmp_path / "run", *SETTINGS, encoders(dino, mirrored=False))
    store = Store.open(tmp_path / "run/store")
    assert store.arrays == ["dino", "dino-scale"]
    expected = {sample.key: features(sample.arrays, "dino") for sample in store}
    for batch in store.loader(batch_size=3, images=[16], features="dino", seed=4):
        assert batch["features"].shape == (len(batch["keys"]), 4, 4, 24)
        for key, found in zip(batch["keys"], batch["features"], strict=True):
            assert np.array_equal(found.numpy(), expected[key].astype(np.float16))
    with pytest.raises(ValueError, match="features are 'dino', but no images are loaded"):
        store.loader(batch_size=3, features="dino")
    with pytest.raises(ValueError, match=r"array 'dino-scale' is float32 .*, and no patch features"):
        store.loader(batch_size=3, images=[16], features="dino-scale")


def test_features_and_those_of_mirrored_images_are_added_to_a_finished_run_and_touch_nothing_else(
    dino: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    precompute(run, *SETTINGS)
    for mirrored in (False, True):
        before = {name: data for name, data in store_bytes(run).items() if name != "manifest.json"}
        precompute(run, *SETTINGS, encoders(dino, mirrored=mirrored))
        after = store_bytes(run)
        assert {name: after[name] for name in before} == before
    precompute(tmp_path / "once", *SETTINGS, encoders(dino))
    once = store_bytes(tmp_path / "once")
    assert {name: data for name, data in store_bytes(run).items() if name.startswith("array-")} == {
        name: data for name, data in once.items() if name.startswith("array-")
    }
    assert Store.open(run / "store").arrays == GROUPS


def test_a_run_that_was_interrupted_makes_the_same_bytes(
    dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute(tmp_path / "whole", *SETTINGS, encoders(dino))
    precompute_interrupted(
        EncodePatchesStage, [True, False], tmp_path / "parts", *SETTINGS, encoders(dino), patch=monkeypatch
    )
    whole, parts = (store_bytes(tmp_path / name) for name in ("whole", "parts"))
    arrays = [name for name in whole if name.startswith("array-")]
    assert len(arrays) == 4 * 3
    assert {name: parts[name] for name in arrays} == {name: whole[name] for name in arrays}


def test_exchanged_files_are_found_and_features_of_removed_samples_are_erased(dino: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    precompute(run, *SETTINGS, "store.format=hdf5", encoders(dino))
    key = Store.open(run / "store")[0].key
    result = call("remove", str(run), "--key", key, "--compact")
    assert result.code == 0, result.err
    store = Store.open(run / "store")
    assert key not in [sample.key for sample in store]
    assert verify_store(run / "store").ok
    assert not store.shard(0).arrays["dino"].stored(0).any()
    first, second = (run / "store/array-dino" / f"0000{number}.h5" for number in (1, 2))
    first.write_bytes(second.read_bytes())
    assert {problem.file for problem in verify_store(run / "store").problems} == {"array-dino/00001.h5"}


def test_the_plan_knows_the_bytes_and_other_settings_are_refused(dino: Path, tmp_path: Path) -> None:
    result = call("plan", "precompute", "--out", str(tmp_path / "run"), "--json", *SETTINGS, encoders(dino))
    assert result.code == 0, result.err
    groups = {name: group["bytes_to_do"] for name, group in json.loads(result.out)["groups"].items()}
    precompute(tmp_path / "run", *SETTINGS, encoders(dino))
    for name in ("dino", "dino-mirrored"):  # the scales are so few here that their files are mostly headers
        written = sum(path.stat().st_size for path in (tmp_path / f"run/store/array-{name}").iterdir())
        assert groups[f"array-{name}"] == pytest.approx(written, rel=0.25), name
    assert groups["array-dino-scale"] == groups["array-dino-mirrored-scale"] > 10 * 4 * 16
    with pytest.raises(StaleOutputError, match="input_px: 32 -> 40"):
        precompute(tmp_path / "run", *SETTINGS, encoders(dino, input_px=40))


def test_a_patch_that_int8_cannot_hold_excludes_its_sample(dino: Path, tmp_path: Path) -> None:
    summary = precompute(
        tmp_path / "run", *SETTINGS, "store.min_cosine=0.99999", "max_drop_fraction=1", encoders(dino)
    )
    drops = summary["tally"]["groups"]["array-dino"]["drops"]
    assert set(drops) == {"quantisation_error"}
    assert 0 < drops["quantisation_error"] <= 9
