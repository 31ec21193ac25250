"""Evaluation from the command line: a guidance sweep, resumed and in shares, and metrics of existing images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from imagen_core.evaluation.lpips import Lpips
from imagen_core.images import from_pixels, write_png
from imagen_core.store import Store
from pipeline.cli.presets import find_config
from pipeline.config import load_config
from stages.evaluation.config import EvaluateConfig
from stages.images import read_image
from tests.commands import Result, call, tree
from tests.stages.encoders import tiny_models


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tiny_models.clip, tmp_path_factory.mktemp("models") / "tiny-clip")


def evaluate(out: Path, *overrides: str, **config: object) -> Result:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return call("run", "evaluate", "-c", str(path), "--out", str(out), "--quiet", "--json", *overrides)


def summary(result: Result) -> dict:
    assert result.code == 0, result.err
    return json.loads(result.out)["summary"]


def sweep(cascade: Path, clip: Path) -> dict[str, object]:
    """Three captions, sampled at 16 px with two guidance weights."""
    return {
        "sample": {
            "stages": [{"checkpoint": str(cascade / "base"), "sampling": {"num_steps": 2}}],
            "captions": {"kind": "store", "path": str(cascade / "run"), "num_captions": 3},
            "device": "cpu",
        },
        "guidance": [1, 2.5],
        "reference": {"kind": "store", "path": str(cascade / "run"), "size_px": 16},
        "features": {"kind": "clip", "model": str(clip)},
        "clip": {"model": str(clip)},
        "kernel": {"num_subsets": 2},
    }


@pytest.fixture(scope="module")
def finished(cascade: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep; tests must not change it."""
    out = tmp_path_factory.mktemp("finished") / "sweep"
    summary(evaluate(out, **sweep(cascade, clip)))
    return out


def evaluated(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())["summary"]


def numbers(row: dict) -> list[float]:
    return [row[key] for key in ("frechet_distance", "kernel_distance", "clip_score")]


@pytest.mark.slow
def test_a_guidance_sweep_has_a_folder_a_row_and_a_point_for_each_weight(finished: Path) -> None:
    out = finished
    one, two = evaluated(out)["rows"]
    assert [(row["name"], row["guidance"], row["images"]) for row in (one, two)] == [
        ("guidance-1", 1, 3),
        ("guidance-2.5", 2.5, 3),
    ]
    assert one["reference_images"] == 23
    assert "3 samples for 16 dimensions" in one["warning"]
    assert numbers(one) != numbers(two)
    first, other = (read_image(out / f"guidance-{w}/images-16/00000.png").astype(int) for w in ("1", "2.5"))
    assert np.abs(first - other).max() > 0
    settings = json.loads((out / "guidance-2.5/images.json").read_text())["settings"]
    assert settings["stages"][0]["sampling"]["guidance"]["text"] == 2.5
    table = (out / "results.md").read_text()
    assert "| FD (CLIP tiny-clip) |" in table
    assert f"| guidance-2.5 | 3 | {two['frechet_distance']:.4f} |" in table
    assert "FID" not in table
    plot = (out / "distance-clip.svg").read_text()
    assert plot.count("<!-- 2.5 -->") >= 1
    results = json.loads((out / "results.json").read_text())
    assert results["rows"] == [one, two]
    assert results["fingerprints"]["clip"]["output"] == "projected"


@pytest.mark.slow
def test_an_interrupted_sweep_continues_and_gives_the_same_numbers(
    cascade: Path, clip: Path, finished: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "sweep", evaluated(finished)
    shutil.copytree(finished, out)
    kept = {name: (out / name).stat().st_mtime_ns for name in tree(out) if name.startswith("features/guidance-1-")}
    (out / "guidance-2.5/images-16/00001.png").unlink()
    again = summary(evaluate(out, **sweep(cascade, clip)))
    assert [again["sampled"][name]["generated_now"] for name in ("guidance-1", "guidance-2.5")] == [0, 1]
    for before, after in zip(whole["rows"], again["rows"], strict=True):
        assert numbers(after) == pytest.approx(numbers(before), abs=0.02), "one level of rounding"
    assert kept
    assert all((out / name).stat().st_mtime_ns == time for name, time in kept.items())


@pytest.mark.slow
def test_a_sweep_refuses_a_folder_of_other_settings_by_name(
    cascade: Path, clip: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(finished, out)
    result = evaluate(out, "sample.seed=7", **sweep(cascade, clip))
    assert result.code == 2
    assert "sweep/guidance-1: holds images of other settings: images.00000.png.seed: 0 -> 7" in result.err


@pytest.mark.slow
def test_shares_sample_what_one_process_samples_and_the_last_one_computes_the_metrics(
    cascade: Path, clip: Path, finished: Path, tmp_path: Path
) -> None:
    config = sweep(cascade, clip)
    first = summary(evaluate(tmp_path / "parts", "sample.part={index: 0, count: 2}", **config))
    assert (first["missing"], "rows" in first) == (2, False)
    assert not (tmp_path / "parts/results.json").exists()
    last = summary(evaluate(tmp_path / "parts", "sample.part={index: 1, count: 2}", **config))
    for part, row in zip(last["rows"], evaluated(finished)["rows"], strict=True):
        assert numbers(part) == pytest.approx(numbers(row), abs=0.02)


def test_a_folder_has_distance_0_to_itself_and_to_a_store_of_the_same_images(
    cascade: Path, clip: Path, tmp_path: Path
) -> None:
    store = Store.open(cascade / "run/store")
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, sample in enumerate(store):
        write_png(folder / f"{number:02d}.png", sample.images[32])
    itself = {"kind": "folder", "path": str(folder)}
    stored = {"kind": "store", "path": str(cascade / "run/store")}
    for reference in (itself, stored):
        [row] = summary(
            evaluate(
                tmp_path / "out",
                generated=itself,
                reference=reference,
                features={"kind": "clip", "model": str(clip)},
                kernel={"num_subsets": 1},
                num_neighbours=3,
            )
        )["rows"]
        assert abs(row["frechet_distance"]) < 1e-6
        assert (row["precision"], row["recall"]) == (1, 1)
        assert "clip_score" not in row


def test_features_computed_here_may_be_used_again_as_files(finished: Path, tmp_path: Path) -> None:
    """And the CLIP score is the mean cosine of the files' rows."""
    out, found = finished, evaluated(finished)
    files = {name.rsplit("-", 2)[0]: str(out / name) for name in tree(out) if name.startswith("features/")}
    again = summary(
        evaluate(
            tmp_path / "files",
            generated={
                "kind": "features",
                "path": files["features/guidance-1"],
                "clip_images": files["features/guidance-1"],
                "clip_texts": files["features/captions"],
            },
            reference={"kind": "features", "path": files["features/reference"]},
            kernel={"num_subsets": 2},
        )
    )
    assert again["features_model"] == "CLIP tiny-clip"
    assert numbers(again["rows"][0]) == pytest.approx(numbers(found["rows"][0]), rel=1e-9)
    images, texts = (load_file(files[f"features/{name}"])["features"] for name in ("guidance-1", "captions"))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(images, texts, strict=True)]
    assert found["rows"][0]["clip_score"] == pytest.approx(np.mean([max(0, 100 * c) for c in cosines]), rel=1e-5)


def test_captions_next_to_images_are_scored(cascade: Path, clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, sample in enumerate(Store.open(cascade / "run/store")[:3]):
        write_png(folder / f"{number}.png", sample.images[32])
        (folder / f"{number}.txt").write_text(sample.captions[0])
    generated = {"kind": "folder", "path": str(folder)}
    stored = {"kind": "store", "path": str(cascade / "run")}
    rows = [
        summary(evaluate(tmp_path / "out", generated=images, clip={"model": str(clip)}))["rows"][0]
        for images in (generated, {**stored, "num_images": 23})
    ]
    assert [row["images"] for row in rows] == [3, 23]
    (folder / "1.txt").unlink()
    refused = evaluate(tmp_path / "out", generated=generated, clip={"model": str(clip)})
    assert refused.code == 2
    assert "1.txt: is missing, as 1 of 3" in refused.err


def test_metrics_are_computed_from_files_of_features_of_any_model_and_of_logits(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = {name: random.standard_normal((40, 4)) + shift for name, shift in (("a", 0.0), ("b", 3.0))}
    np.save(tmp_path / "a.npy", rows["a"])
    save_file({"rows": rows["b"].astype(np.float32)}, tmp_path / "b.safetensors")
    np.save(tmp_path / "logits.npy", np.tile(50.0 * np.eye(4), (10, 1)))
    [row] = summary(
        evaluate(
            tmp_path / "out",
            generated={
                "kind": "features",
                "path": f"{tmp_path}/a.npy",
                "logits": f"{tmp_path}/logits.npy",
                "model": "DINOv2",
            },
            reference={"kind": "features", "path": f"{tmp_path}/b.safetensors"},
        )
    )["rows"]
    shift = rows["a"].mean(axis=0) - rows["b"].mean(axis=0)
    assert row["frechet_mean_term"] == pytest.approx(shift @ shift, rel=1e-6)
    assert row["inception_score"] == pytest.approx(4, rel=1e-9)
    assert "| FD (DINOv2) |" in (tmp_path / "out/results.md").read_text()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "give one of sample and generated"),
        ({"generated": {"kind": "folder", "path": "absent"}, "guidance": [1]}, "guidance is for images to generate"),
        (
            {"generated": {"kind": "folder", "path": "a"}, "reference": {"kind": "folder", "path": "b"}},
            "features: needed to extract features of the images of generated",
        ),
        ({"generated": {"kind": "folder", "path": "absent"}}, "generated.path: absent does not exist; give a folder"),
        ({"generated": {"kind": "features", "path": "a.pt"}}, "suffix '.pt' is not supported"),
        ({"generated": {"kind": "features", "path": "a.npy"}}, "generated.path: a.npy cannot be read"),
        ({"generated": {"kind": "features"}}, "no metric can be computed"),
        ({"generated": {"kind": "features"}, "clip": {"model": "x", "output": "pooled"}}, "clip.output"),
    ],
)
def test_images_that_cannot_be_evaluated_are_named(tmp_path: Path, config: dict, words: str) -> None:
    result = evaluate(tmp_path / "out", **config)
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_a_wrong_metric_model_is_found_before_any_image_is_generated(
    cascade: Path, clip: Path, tmp_path: Path
) -> None:
    result = evaluate(tmp_path / "out", "clip.max_tokens=900", **sweep(cascade, clip))
    assert result.code == 2
    assert "encoder clip: max_tokens is 900, but" in result.err
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reference": {"kind": "folder", "path": "absent"}}, "reference.path: absent does not exist"),
        ({"num_neighbours": 3}, "3"),
        ({"sample.init": {"images": ["a.txt"] * 3}}, "a.txt: cannot be read as an image"),
    ],
)
def test_what_makes_an_evaluation_impossible_is_found_before_any_image_is_sampled(
    cascade: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("no image")
    config: dict = sweep(cascade, clip)
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    result = evaluate(tmp_path / "out", **config)
    assert result.code == 2
    assert words in result.err
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.slow
def test_a_later_folder_of_other_settings_is_refused_before_any_image_is_sampled(
    cascade: Path, clip: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "guidance-1")
    result = evaluate(out, "sample.seed=7", **sweep(cascade, clip))
    assert result.code == 2
    assert "sweep/guidance-2.5: holds images of other settings" in result.err
    assert not list((out / "guidance-1").rglob("*.png"))


def test_features_that_are_not_finite_are_named_by_key_and_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[0.0], [np.nan]]))
    result = evaluate(tmp_path / "out", generated={"kind": "features", "path": f"{tmp_path}/a.npy"})
    assert result.code == 2
    assert f"generated.path: {tmp_path}/a.npy: 1 rows are not finite, the first is row 1" in result.err


def test_a_pickled_array_is_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    result = evaluate(tmp_path / "out", generated={"kind": "features", "path": f"{tmp_path}/a.npy"})
    assert result.code == 2
    assert "never read" in result.err


def test_features_of_two_models_are_not_compared(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((9, 4)))
    sets = [{"kind": "features", "path": f"{tmp_path}/a.npy", "model": model} for model in ("A", "B")]
    result = evaluate(tmp_path / "out", generated=sets[0], reference=sets[1])
    assert result.code == 2
    assert "features of different models: A and B" in result.err


def test_a_dry_run_says_how_many_images_are_generated(cascade: Path, clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(sweep(cascade, clip)))
    found = json.loads(call("plan", "evaluate", "-c", str(path), "--json", "sample.part={index: 1, count: 2}").out)
    assert (found["summary"]["images"], found["summary"]["images_of_this_process"]) == (3, 1)
    assert (found["summary"]["samplings"], found["summary"]["sizes_px"]) == (2, [16])


def test_the_shipped_evaluation_protocol_is_nemos() -> None:
    config = load_config(EvaluateConfig, find_config("evaluate", "coco-30k"))
    assert config.guidance == (1, 1.5, 2, 3, 4, 5, 6, 7)
    assert config.sample is not None
    assert config.sample.captions is not None
    assert config.sample.captions.num_captions == 30_000
    assert [stage.sampling.num_steps for stage in config.sample.stages] == [30, 20]


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the AlexNet kind."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_torch({name: value.abs() for name, value in Lpips("alex").state_dict().items()}, path)
    return path


def test_lpips_is_the_mean_over_pairs_of_images_in_their_order(lpips: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for number in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            write_png(tmp_path / name / f"{number}.png", rng.integers(0, 256, (64, 64, 3), np.uint8))
    a, b = ({"kind": "folder", "path": str(tmp_path / name)} for name in ("a", "b"))
    [row] = summary(evaluate(tmp_path / "out", generated=a, reference=b, lpips={"path": str(lpips), "batch_size": 2}))[
        "rows"
    ]
    stacks = [from_pixels(np.stack([read_image(p) for p in sorted((tmp_path / name).iterdir())])) for name in "ab"]
    with torch.inference_mode():
        distances = Lpips.of(load_torch(lpips))(*stacks)
    assert row["lpips"] == pytest.approx(float(distances.mean()), rel=1e-4)
    assert row["lpips"] > 0
    assert row["images"] == 3
    assert "| LPIPS |" in (tmp_path / "out/results.md").read_text()
    (tmp_path / "b/2.png").unlink()
    result = evaluate(tmp_path / "less", generated=a, reference=b, lpips={"path": str(lpips)})
    assert result.code == 2
    assert "lpips: 3 images in generated and 2 to compare them with" in result.err
    result = evaluate(tmp_path / "none", generated=a, lpips={"path": str(lpips)})
    assert "lpips: needs images in generated and as many in reference" in result.err


def test_sampled_images_are_compared_by_lpips_with_the_originals_of_their_captions(
    cascade: Path, lpips: Path, tmp_path: Path
) -> None:
    sample = {
        "stages": [{"checkpoint": str(cascade / name), "sampling": {"num_steps": 2}} for name in ("base", "sr")],
        "captions": {"kind": "store", "path": str(cascade / "run"), "num_captions": 3, "seed": 5},
        "device": "cpu",
    }
    [row] = summary(evaluate(tmp_path / "out", sample=sample, lpips={"path": str(lpips)}))["rows"]
    store = Store.open(cascade / "run/store")
    record = json.loads((tmp_path / "out/generated/images.json").read_text())["images"]
    originals = {each.key: each.images[32] for each in store}
    generated = [read_image(tmp_path / "out/generated/images-32" / image["file"]) for image in record]
    pair = [from_pixels(np.stack(side)) for side in (generated, [originals[image["key"]] for image in record])]
    with torch.inference_mode():
        assert row["lpips"] == pytest.approx(float(Lpips.of(load_torch(lpips))(*pair).mean()), rel=1e-4)
