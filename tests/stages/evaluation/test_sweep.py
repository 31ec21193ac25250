"""Sweeps over lengths of averages and weights of guidance: one row of the table for each combination."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from imagen_core.train import load_checkpoint, train
from stages.evaluation.config import EvaluateConfig
from stages.evaluation.sweep import sweep
from stages.sampling.config import SampleConfig
from tests.commands import Result, call
from tests.imagen_core.train.small import make_config, make_store
from tests.stages.encoders import tiny_models

SAMPLE = {"stages": [{"checkpoint": "base"}, {"checkpoint": "large", "weights": "model"}], "prompts": ["a fox"]}


def config(**changes: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate({"sample": SAMPLE} | changes)


def test_without_a_sweep_there_is_one_sampling() -> None:
    (point,) = sweep(config())
    assert (point.name, dict(point.values)) == ("generated", {})


def test_all_combinations_are_made_and_each_has_a_name() -> None:
    points = sweep(config(sigma_rel=[0.05, 0.1], guidance=[1, 2.5]))
    assert [point.name for point in points] == [
        "sigma_rel-0.05-guidance-1",
        "sigma_rel-0.05-guidance-2.5",
        "sigma_rel-0.1-guidance-1",
        "sigma_rel-0.1-guidance-2.5",
    ]
    assert [point.name for point in sweep(config(guidance=[3]))] == ["guidance-3"]


@pytest.mark.parametrize(
    ("of", "weights"), [("all", ["power-0.07", "power-0.07"]), ("first", ["power-0.07", "model"])]
)
def test_a_length_changes_the_weights_of_its_stages(of: str, weights: list[str]) -> None:
    (point,) = sweep(config(sigma_rel=[0.07], sigma_rel_of=of))
    sample = point.with_weights(SampleConfig.model_validate(SAMPLE))
    assert [stage.weights for stage in sample.stages] == weights


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigma_rel": [0.1, 0.1]}, "sigma_rel: each value once"),
        ({"sigma_rel": [0.4]}, r"sigma_rel: each must be above 0 and at most 0.28 \(got 0.4\)"),
        (
            {"sample": None, "generated": {"kind": "folder", "path": "x"}, "autoguidance": [2]},
            "autoguidance is for images",
        ),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**changes)


def test_an_evaluation_without_the_new_sweeps_is_recorded_as_ever() -> None:
    assert not {"sigma_rel", "sigma_rel_of", "autoguidance"} & config().model_dump().keys()


def evaluate(out: Path, **settings: Any) -> Result:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return call("run", "evaluate", "-c", str(path), "--out", str(out), "--quiet", "--json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a training with snapshots, and a worse one of the same."""
    folder = tmp_path_factory.mktemp("trained")
    store = make_store(folder / "store")
    ema = {"rates": [], "profiles": [0.05, 0.1], "snapshot_every_steps": 2}
    train(make_config(store, precision="float32", num_steps=30, ema=ema), folder / "base")
    train(make_config(store, precision="float32", num_steps=3, seed=1, ema={"rates": [0.5]}), folder / "worse")
    return folder


def settings(trained: Path, **more: Any) -> dict[str, Any]:
    stage = {"checkpoint": str(trained / "base"), "sampling": {"num_steps": 2}}
    stage["guide"] = {"checkpoint": str(trained / "worse")}
    captions = {"kind": "store", "path": str(trained / "store"), "num_captions": 3}
    clip = tiny_models.write(tiny_models.clip, trained / "clip")
    return {
        "sample": {"stages": [stage], "captions": captions, "device": "cpu"},
        "reference": {"kind": "store", "path": str(trained / "store"), "size_px": 16},
        "features": {"kind": "clip", "model": str(clip)},
        "kernel": {"num_subsets": 2},
        **more,
    }


@pytest.mark.slow
def test_a_sweep_over_lengths_has_a_row_for_each_and_resumes(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    both = settings(trained, sigma_rel=[0.05, 0.07], autoguidance=[1, 2])
    result = evaluate(out, **both)
    assert result.code == 0, result.err
    rows = json.loads(result.out)["summary"]["rows"]
    names = [f"sigma_rel-{length}-autoguidance-{weight}" for length in (0.05, 0.07) for weight in (1, 2)]
    assert [row["name"] for row in rows] == names
    assert [(row["sigma_rel"], row["autoguidance"]) for row in rows] == [(0.05, 1), (0.05, 2), (0.07, 1), (0.07, 2)]
    assert len({row["frechet_distance"] for row in rows}) == 4
    table = (out / "results.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:6]] == names
    records = [json.loads((out / name / "images.json").read_text(encoding="utf-8")) for name in names]
    digests = [load_checkpoint(trained / "base", weights).sha256 for weights in ("power-0.05", "power-0.07")]
    assert [record["stages"][0]["sha256"] for record in records] == [each for each in digests for _ in range(2)]
    assert records[0]["stages"][0]["guide"]["weights"] == "ema-0.5"

    missing = out / names[2] / "images-16/00001.png"
    before = missing.read_bytes()
    missing.unlink()
    again = evaluate(out, **both)
    sampled = json.loads(again.out)["summary"]["sampled"]
    assert [sampled[name]["generated_now"] for name in names] == [0, 0, 1, 0]
    assert missing.read_bytes() == before


@pytest.mark.slow
def test_a_sweep_against_guides_that_are_missing_is_refused(trained: Path, tmp_path: Path) -> None:
    without = settings(trained, autoguidance=[2])
    del without["sample"]["stages"][0]["guide"]
    result = evaluate(tmp_path / "sweep", **without)
    assert result.code == 2
    assert "autoguidance: no stage has a guide; name one as sample.stages.0.guide" in result.err
