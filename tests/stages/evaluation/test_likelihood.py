"""Bits a dimension of stored images, from the command line."""

import json
from pathlib import Path

import pytest
import yaml

from imagen_core.train import train
from tests import trained
from tests.commands import call, precompute
from tests.imagen_core.train.small import make_config, make_store
from tests.trained import COMMON, UNET

DIFFUSION = {"schedule": {"kind": "discrete", "num_steps": 6, "beta": "cosine"}, "variance": "learned_range"}
BASE = {
    "denoiser": {"size_px": 16, "unet": UNET | {"out_channels": 6}, "diffusion": DIFFUSION},
    **COMMON,
    "num_steps": 3,
}
SUPER = trained.SUPER | {"views": {"crop_px": None}, "num_steps": 1}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, and a base and a super-resolution model trained on it."""
    folder = tmp_path_factory.mktemp("likelihood")
    assert precompute(folder / "run", "source.num_samples=12", "images.sizes_px=[16,32]").code == 0
    for name, config in (("base", BASE), ("sr", SUPER)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"store": str(folder / "run/store"), **config}))
        result = trained.train(folder, name, folder / name)
        assert result.code == 0, result.err
    return folder


def measure(work: Path, out: Path, *more: str, model: str = "base"):
    arguments = (f"checkpoint={work}/{model}", f"store={work}/run/store", "num_images=5", "device=cpu")
    return call("run", "likelihood", "--out", str(out), "--quiet", "--json", *arguments, *more)


def facts(result) -> dict:
    assert result.code == 0, result.err
    return json.loads(result.out)["summary"]


def by_key(out: Path) -> dict[str, float]:
    found = {}
    for path in (out / "batches").glob("*.json"):
        batch = json.loads(path.read_text())
        found |= dict(zip(batch["keys"], batch["bits_per_dimension"], strict=True))
    return found


def test_the_summary_has_bits_and_errors_per_step(work: Path, tmp_path: Path) -> None:
    found = facts(measure(work, tmp_path / "out"))
    assert (found["images"], found["steps"]) == (5, 6)
    assert all(len(found[name]) == 6 for name in ("bound_bits", "x0_mse", "noise_mse"))
    assert found["bits_per_dimension"] == pytest.approx(found["prior_bits"] + sum(found["bound_bits"]))
    assert found["bits_per_dimension"] == pytest.approx(sum(by_key(tmp_path / "out").values()) / 5)
    assert 0 < found["standard_error"] < found["bits_per_dimension"]
    assert found["x0_mse"][0] < found["x0_mse"][-1]


@pytest.mark.slow
def test_an_images_bits_do_not_depend_on_batch_or_place(work: Path, tmp_path: Path) -> None:
    exact = "precision=float64"
    facts(measure(work, tmp_path / "a", exact))
    facts(measure(work, tmp_path / "b", exact, "batch_size=2", "first_image=2"))
    a, b = by_key(tmp_path / "a"), by_key(tmp_path / "b")
    shared = a.keys() & b.keys()
    assert len(shared) == 3
    for key in shared:
        assert b[key] == pytest.approx(a[key], rel=1e-9)
    facts(measure(work, tmp_path / "c", exact, "seed=1"))
    assert by_key(tmp_path / "c") != a


@pytest.mark.slow
def test_finished_batches_are_not_measured_again(work: Path, tmp_path: Path) -> None:
    first = facts(measure(work, tmp_path, "batch_size=2"))
    batches = sorted((tmp_path / "batches").glob("*.json"))
    assert [path.name for path in batches] == ["00000000.json", "00000002.json", "00000004.json"]
    batches[1].unlink()
    before = [path.stat().st_mtime_ns for path in (batches[0], batches[2])]
    assert facts(measure(work, tmp_path, "batch_size=2")) == first
    assert [path.stat().st_mtime_ns for path in (batches[0], batches[2])] == before
    other = measure(work, tmp_path, "batch_size=2", "seed=3")
    assert other.code == 2
    assert "holds measurements of other settings: settings.seed" in other.err
    assert facts(measure(work, tmp_path, "batch_size=2", "seed=3", "--restart")) != first


@pytest.mark.slow
def test_damaged_measurements_are_made_again_and_a_damaged_record_is_refused(work: Path, tmp_path: Path) -> None:
    few = ("num_images=1", "num_steps=2")
    first = facts(measure(work, tmp_path, *few))
    batch, record = tmp_path / "batches/00000000.json", tmp_path / "likelihood.json"
    data, written = batch.read_bytes(), record.read_bytes()
    for damaged in (data.replace(b"1", b"2", 1), data[:50], b"", b"{}"):
        batch.write_bytes(damaged)
        assert facts(measure(work, tmp_path, *few)) == first
        assert batch.read_bytes() == data
    for spoil in (record.unlink, lambda: record.write_bytes(b""), lambda: record.write_bytes(written[:-9] + b"0" * 9)):
        spoil()
        refused = measure(work, tmp_path, *few)
        assert refused.code == 2
        assert "likelihood.json" in refused.err
        assert "so nothing says what they are of" in refused.err


def test_a_continuous_super_resolution_model_is_measured_on_a_grid(work: Path, tmp_path: Path) -> None:
    found = facts(measure(work, tmp_path / "out", "num_steps=4", model="sr"))
    assert (found["steps"], found["images"]) == (4, 5)
    assert found["bits_per_dimension"] > 0
    missing = measure(work, tmp_path / "no", model="sr")
    assert missing.code == 2
    assert "num_steps: give it; the model's schedule (log_normal) is continuous" in missing.err


def test_the_dry_run_of_a_likelihood_says_how_many_network_calls_it_takes(work: Path, tmp_path: Path) -> None:
    result = measure(work, tmp_path, "--dry-run", "batch_size=2")
    found = json.loads(result.out)["summary"]
    assert (found["steps"], found["network_calls"], found["images"]) == (6, 18, 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("checkpoint=absent", "checkpoint: absent: has no checkpoint"),
        ("store=absent", "store: "),
        ("num_images=13", "0 + 13 exceeds the 11 samples"),
        ("num_steps=13", "13 steps requested of 6"),
        ("grid.kind=respaced", "sections"),
        ("weights=ema-0.5", "has no weights 'ema-0.5'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(work: Path, tmp_path: Path, override: str, words: str) -> None:
    result = measure(work, tmp_path / "out", override)
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_a_store_of_another_encoder_is_refused(work: Path, tmp_path: Path) -> None:
    made = precompute(tmp_path / "run", "source.num_samples=12", "images.sizes_px=[16]", "encoders.0.max_tokens=5")
    assert made.code == 0
    result = measure(work, tmp_path / "out", f"store={tmp_path}/run/store")
    assert result.code == 2
    assert "by another encoder than the model's" in result.err


@pytest.mark.slow
def test_images_of_aspect_ratio_buckets_are_measured_each_in_its_shape(tmp_path: Path) -> None:
    store = make_store(tmp_path / "run/store", rows=(7,), buckets=True)
    train(make_config(store, num_steps=1, batch_size=4), tmp_path / "base")
    more = ("num_images=7", "num_steps=3", "precision=float64")
    together = facts(measure(tmp_path, tmp_path / "together", *more))
    facts(measure(tmp_path, tmp_path / "alone", *more, "batch_size=1"))
    bits, alone = by_key(tmp_path / "together"), by_key(tmp_path / "alone")
    assert len(bits) == together["images"] == 7
    assert bits == pytest.approx(alone, rel=1e-9)
    assert together["bits_per_dimension"] == pytest.approx(together["prior_bits"] + sum(together["bound_bits"]))
