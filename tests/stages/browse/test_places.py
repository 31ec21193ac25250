"""Which pages a path gets."""

import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from stages.browse.places import find_places
from tests.stages.browse.clients import client


def write_job(folder: Path, workflow: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"workflow": workflow, "stages": [], "transient_groups": []}))
    return folder


def test_a_run_is_followed_by_its_store_and_a_store_stands_alone(small_run: Path) -> None:
    places = find_places([str(small_run)])
    assert [(place.number, place.kind, place.run) for place in places] == [(1, "run", None), (2, "store", 1)]
    assert places[1].url == str(small_run / "store")
    (store,) = find_places([str(small_run / "store")])
    assert (store.number, store.kind, store.run, store.name) == (1, "store", None, "store")


def test_a_path_that_is_given_twice_is_one_place(small_run: Path) -> None:
    twice = find_places([str(small_run), str(small_run / "store"), f"{small_run}/"])
    assert [place.kind for place in twice] == ["run", "store"]


def test_places_that_end_alike_have_as_much_of_their_path_as_tells_them_apart(tmp_path: Path) -> None:
    for name in ("a/x/job", "b/x/job", "b/y/job", "other"):
        write_job(tmp_path / name, "train")
    places = find_places([str(tmp_path / name) for name in ("a/x/job", "b/x/job", "b/y/job", "other")])
    assert [place.name for place in places] == ["a/x/job", "b/x/job", "y/job", "other"]


@pytest.mark.parametrize(
    ("workflow", "kind"),
    [("train", "training"), ("sample", "sampling"), ("evaluate", "evaluation"), ("likelihood", "evaluation")],
)
def test_jobs_are_told_by_their_plan(tmp_path: Path, workflow: str, kind: str) -> None:
    assert [place.kind for place in find_places([str(write_job(tmp_path / "job", workflow))])] == [kind]


@pytest.mark.parametrize(
    ("name", "kind"), [("metrics.jsonl", "training"), ("images.json", "sampling"), ("results.json", "evaluation")]
)
def test_folders_without_a_plan_are_told_by_their_files(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("")
    assert [place.kind for place in find_places([str(tmp_path)])] == [kind]


def test_a_folder_of_folders_stands_for_those_that_can_be_shown(tmp_path: Path) -> None:
    write_job(tmp_path / "b", "train")
    write_job(tmp_path / "a", "sample")
    (tmp_path / "other").mkdir()
    assert [(place.name, place.kind) for place in find_places([str(tmp_path)])] == [
        ("a", "sampling"),
        ("b", "training"),
    ]


def test_a_folder_that_is_nothing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"PATH {tmp_path} is no run folder"):
        find_places([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"PATH .*missing does not exist"):
        find_places([str(tmp_path / "missing")])


def test_the_index_counts_what_each_place_holds(small_run: Path, tmp_path: Path) -> None:
    training = write_job(tmp_path / "training", "train")
    (training / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n{"step": 12, "loss": 0.5}\n{"step": 1')
    sampling = write_job(tmp_path / "sampling", "sample")
    (sampling / "images-64").mkdir()
    (sampling / "images-64" / "0.png").write_bytes(b"")
    text = client(small_run, training, sampling).get("/").text
    assert "19 samples in 3 shards" in text
    assert "finished; shards: samples 3" in text
    assert "step 12" in text
    assert "1 images of 64 px" in text


def test_a_damaged_place_shows_its_error_and_the_others_are_counted(copy_of_small_run: Path, small_run: Path) -> None:
    manifest = copy_of_small_run / "store" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    text = client(copy_of_small_run, small_run).get("/").text
    assert "manifest.json" in text
    assert "19 samples in 3 shards" in text


def test_names_of_folders_are_shown_as_text(tmp_path: Path) -> None:
    write_job(tmp_path / "<script>alert(1)<", "train")
    text = client(tmp_path / "<script>alert(1)<").get("/").text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;" in text
