"""Duplicates of whole runs: listed, dropped, and accounted for."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from imagen_core.store import Store, verify_store
from pipeline.config import load_config
from pipeline.engine import progress
from pipeline.errors import ConfigError, MachineError
from pipeline.options import RunOptions
from pipeline.storage.run_folder import RunFolder
from stages.browse.report import report_command
from stages.duplicates.config import DuplicatesConfig
from stages.duplicates.find import find_duplicates
from stages.store_tools.inspect import inspect_command
from stages.store_tools.remove import remove_command
from tests.runs import precompute, store_bytes
from tests.stages.duplicates.paintings import altered, painting
from workflows.precompute import Precompute, PrecomputeConfig

SETTINGS = ("source.kind=folder", "images.sizes_px=[32]", "encoders=[]", "shard_size=2")
REASONS = ("duplicate_image", "near_duplicate", "excluded_image")


def write(folder: Path, name: str, image: Image.Image) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name)
    (folder / name).with_suffix(".txt").write_text(f"painting {name}")
    return folder / name


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three paintings, an equal copy of the first, and a cropped and a mirrored copy of the second."""
    folder = tmp_path_factory.mktemp("duplicates") / "images"
    first, second, third = map(painting, range(3))
    copies = altered(second)
    named = {
        "a.png": first,
        "b.png": second,
        "c.bmp": first,
        "d.png": copies["corner"],
        "e.png": third,
        "f.png": copies["mirror"],
    }
    for name, image in named.items():
        write(folder, name, image)
    return folder


@pytest.fixture(scope="module")
def reported(images: Path) -> Path:
    """A run that reports; tests must not change it."""
    run(images, images.parent / "run", "duplicates=report")
    return images.parent / "run"


@pytest.fixture
def copy(reported: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return shutil.copytree(reported, tmp_path / "run")


def run(images: Path, out: Path, *more: str, **options: Any) -> dict[str, Any]:
    return precompute(out, f"source.path={images}", *SETTINGS, "max_drop_fraction=1", *more, **options)


def listed(out: Path) -> dict[str, str]:
    """The key of each duplicate -> the key or name of what it is a duplicate of."""
    entries = [json.loads(line) for line in (out / "duplicates.jsonl").read_text().splitlines()[1:]]
    return {e["key"]: e["same_as"].get("key") or e["same_as"]["name"] for e in entries}


def keys(out: Path) -> list[str]:
    return [sample.key for sample in Store.open(out / "store")]


def counts(summary: dict[str, Any]) -> list[int]:
    return [summary["duplicates"][reason] for reason in REASONS]


COPIES = {"c.bmp": "a.png", "d.png": "b.png", "f.png": "b.png"}


def test_duplicates_are_listed_with_what_they_equal_and_stay_samples(reported: Path) -> None:
    assert listed(reported) == COPIES
    assert len(keys(reported)) == 6
    report = verify_store(reported / "store")
    assert (report.ok, report.excluded, report.unaccounted) == (True, {}, 0)
    summary = json.loads((reported / "summary.json").read_text())
    assert (summary["duplicates"]["compared"], counts(summary)) == (6, [1, 2, 0])


def test_the_report_and_inspect_name_them(copy: Path) -> None:
    result, lines, _ = report_command(str(copy))
    assert [row["key"] for row in result["duplicate_rows"]] == list(COPIES)  # type: ignore[union-attr]
    assert any("1 equal, 2 nearly equal, of 6 images" in line for line in lines)
    assert "near_duplicate" in (copy / "report" / "index.html").read_text()
    _, lines, _ = inspect_command(str(copy), key="f.png")
    assert "  duplicate  near_duplicate of b.png" in lines


def test_drop_keeps_the_first_and_writes_only_the_manifest_anew(images: Path, copy: Path) -> None:
    before = store_bytes(copy)
    summary = run(images, copy, "duplicates=drop")
    assert keys(copy) == ["a.png", "b.png", "e.png"]
    assert (summary["num_samples"], summary["tally"]["shards_skipped"], counts(summary)) == (3, 3, [1, 2, 0])
    after = store_bytes(copy)
    assert [name for name in after if after[name] != before[name]] == ["manifest.json"]
    report = verify_store(copy / "store")
    assert (report.ok, report.excluded) == (True, {"duplicate_image": 1, "near_duplicate": 2})
    assert (report.input_rows, report.num_samples, report.unaccounted) == (6, 3, 0)
    run(images, copy, "duplicates=report")
    assert store_bytes(copy) == before


def test_a_store_that_grew_or_was_made_in_another_order_is_that_of_one_run(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("a.png", "b.png", "c.bmp", "d.png"):
        for file in (images / name, (images / name).with_suffix(".txt")):
            folder.mkdir(exist_ok=True)
            shutil.copy(file, folder / file.name)
    out = tmp_path / "grown"
    run(folder, out, "duplicates=drop")
    assert keys(out) == ["a.png", "b.png"]
    for name in ("e.png", "f.png"):
        for file in (images / name, (images / name).with_suffix(".txt")):
            shutil.copy(file, folder / file.name)
    run(folder, out, "duplicates=drop")
    assert keys(out) == ["a.png", "b.png", "e.png"]
    (out / "state" / "hashes" / "00001.json").unlink()  # as of a run that was killed
    run(folder, out, "duplicates=drop")
    run(images, tmp_path / "once", "duplicates=drop")
    assert store_bytes(out) == store_bytes(tmp_path / "once")
    assert listed(out) == listed(tmp_path / "once") == COPIES


def test_hashes_are_added_to_a_finished_store_whose_other_files_stay(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(images, out)
    assert not (out / "duplicates.jsonl").exists()
    before = store_bytes(out)
    assert counts(run(images, out, "duplicates=report")) == [1, 2, 0]
    after = store_bytes(out)
    assert {name for name in after if after[name] != before.get(name)} == {
        "manifest.json",
        *(f"hashes/0000{shard}.parquet" for shard in range(3)),
    }
    run(images, out)
    assert not (out / "duplicates.jsonl").exists()


def test_an_evaluation_set_is_found_as_a_folder_a_store_and_a_list(images: Path, copy: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "evaluation", tmp_path / "evaluation-run"
    write(folder, "held-out.png", altered(painting(2))["jpeg"])
    excluded = "duplicates={action: drop, exclude: [" + str(folder) + "]}"
    assert counts(run(images, copy, excluded)) == [1, 2, 1]
    assert listed(copy) == {**COPIES, "e.png": "held-out.png"}
    assert keys(copy) == ["a.png", "b.png"]
    assert verify_store(copy / "store").excluded["excluded_image"] == 1
    run(folder, out)
    assert counts(run(images, copy, f"duplicates.exclude=[{out}]")) == [1, 2, 1]
    assert len(keys(copy)) == 6
    file = tmp_path / "list.txt"
    file.write_text(f"# held out\n{Store.open(copy / 'store')[5].sha256}  mirrored.png\n")
    run(images, copy, f"duplicates.exclude=[{file}]")
    by_hash = {key for key, of in listed(copy).items() if of != "a.png"}
    assert by_hash == {"b.png", "d.png", "f.png"}
    fsspec.filesystem("memory").put(str(file), "memory://sets/list.txt")
    run(images, copy, "duplicates.exclude=[memory://sets/list.txt]")
    assert {key for key, of in listed(copy).items() if of != "a.png"} == by_hash


def test_an_evaluation_set_in_aspect_ratio_buckets_is_found(tmp_path: Path) -> None:
    """Its images have other parts of the originals than those of squares."""
    folder, out, wide = tmp_path / "evaluation", tmp_path / "evaluation-run", painting(7).resize((640, 553))
    write(folder, "held-out.png", wide)
    run(folder, out, "images.aspect=buckets", "images.sizes_px=[64,256]")
    assert Store.open(out / "store")[0].images[256].shape == (224, 288, 3), "a tenth of the height is cut off"
    photos = tmp_path / "photos"
    for name, image in altered(wide.crop((43, 0, 596, 553))).items():
        write(photos, f"{name}.png", image)
    write(photos, "other.png", painting(8).resize((640, 553)))
    run(photos, tmp_path / "of-photos", f"duplicates={{action: drop, exclude: [{out}]}}")
    assert listed(tmp_path / "of-photos") == {f"{name}.png": "held-out.png" for name in altered(wide)}
    assert keys(tmp_path / "of-photos") == ["other.png"]


def test_the_search_shows_how_far_it_is(copy: Path, tmp_path: Path) -> None:
    write(tmp_path / "evaluation", "held-out.png", altered(painting(2))["jpeg"])
    shown: list[str] = []
    excluded = DuplicatesConfig(exclude=(str(tmp_path / "evaluation"),))
    find_duplicates(RunFolder(str(copy)), excluded, range(3), {}, shown.append)
    assert shown[0] == "duplicates: 1 images of duplicates.exclude hashed"
    for line in ("hashes of 2/3 shards", "hash 12/12 of 6 images searched", "keys of 3/3 shards"):
        assert f"duplicates: {line}" in shown, shown
    assert any(line.startswith("duplicates: thumbnails of ") and line.endswith(" pairs compared") for line in shown)


def test_a_run_shows_the_search_in_its_progress(
    images: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PLAIN_INTERVAL_S", 0)
    for quiet, action in ((False, "drop"), (True, "report")):
        (copy / "state" / "duplicates" / "found.json").unlink()
        settings = [f"source.path={images}", f"duplicates={action}", *SETTINGS, "max_drop_fraction=1"]
        workflow = Precompute(load_config(PrecomputeConfig, None, settings))
        workflow.run(str(copy), RunOptions("inline", quiet=quiet))
        lines = capfd.readouterr().err.splitlines()
        assert any(re.fullmatch(r"\[ *\d+ s\] duplicates: hashes of 3/3 shards", line) for line in lines) is not quiet


def test_a_removed_image_hides_no_copy_of_it_and_compaction_erases_its_hashes(images: Path, copy: Path) -> None:
    run(images, copy, "duplicates=drop")
    _, lines, _ = remove_command(str(copy), key=["a.png"], compact_files=True)
    assert keys(copy) == ["b.png", "e.png"]
    assert any("c.bmp" in line for line in lines)
    report = verify_store(copy / "store")
    assert (report.ok, report.excluded["removed"]) == (True, 1)
    summary = run(images, copy, "duplicates=drop")
    assert keys(copy) == ["b.png", "c.bmp", "e.png"]
    assert (summary["duplicates"]["compared"], summary["duplicates"]["not_compared"]) == (5, 1)


def test_a_damaged_file_of_hashes_is_refused_by_name(images: Path, copy: Path) -> None:
    file = copy / "store" / "hashes" / "00001.parquet"
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)
    (problem,) = verify_store(copy / "store").problems
    assert problem.file == "hashes/00001.parquet"
    with pytest.raises(MachineError, match=r"hashes/00001\.parquet"):
        run(images, copy, "duplicates={near: false}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("duplicates=remove", r"duplicates\.action: input should be 'report' or 'drop'"),
        ("duplicates.exclude=[/nowhere]", "duplicates.exclude: /nowhere does not exist"),
        ("duplicates.exclude=[EMPTY]", "holds no images"),
        ("duplicates.exclude=[LIST]", "line 2: 'abc' does not begin with a SHA-256"),
        ("images.sizes_px=[]", "there are no images to compare"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_run(
    images: Path, tmp_path: Path, settings: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").write_text("0" * 64 + "\nabc\n")
    settings = settings.replace("EMPTY", str(tmp_path / "empty")).replace("LIST", str(tmp_path / "list"))
    with pytest.raises(ConfigError, match=message):
        run(images, tmp_path / "run", *(["duplicates=report"] if "sizes" in settings else []), settings)
    assert not (tmp_path / "run").exists()
