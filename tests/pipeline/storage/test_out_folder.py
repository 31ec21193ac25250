"""A run folder where a run would spoil other data, or take its own files for input, is refused."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from imagen_core.store import Store
from pipeline.errors import ConfigError
from pipeline.storage.out_folder import check_out
from pipeline.storage.run_folder import RunFolder
from tests.commands import call, tree
from tests.images import plain_png
from tests.runs import SMALL, copy_of_small_run, precompute, small_run  # noqa: F401

INSIDE = "next to the data"


def check(out: Path | str, workflow: str = "precompute", **config: Any) -> None:
    check_out(RunFolder(out), workflow, config)


@pytest.fixture
def far() -> Iterator[str]:
    yield "memory://bucket"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def write(place: Path | str, name: str, data: bytes = b"x") -> None:
    with fsspec.open(f"{place}/{name}", "wb", auto_mkdir=True) as file:
        file.write(data)  # type: ignore[union-attr]


@pytest.fixture(params=["local", "far"])
def root(request: pytest.FixtureRequest, tmp_path: Path, far: str) -> str:
    write(far, "anything/else")
    return str(tmp_path) if request.param == "local" else far


def test_inside_the_input_is_refused(root: str) -> None:
    for out in ("data", "data/run", "data/a/b"):
        with pytest.raises(ConfigError, match=rf"--out .*{out}: is inside source.path=.*data, .*; give .* {INSIDE}"):
            check(f"{root}/{out}", source={"path": f"{root}/data"})
    with pytest.raises(ConfigError, match=r"is inside source.path=.*data, "):
        check(f"{root}/data/run", source={"path": f"{root}/data/**/x.tar"})
    with pytest.raises(ConfigError, match=r"is inside stages.1.checkpoint="):
        check(f"{root}/m/out", stages=[{"checkpoint": f"{root}/k"}, {"checkpoint": f"{root}/m"}])
    check(f"{root}/data/run", source={"path": f"{root}/data", "file_list": f"{root}/list.txt"})
    for path in ("data.parquet", "data/urls.parquet", "data/*.tar", "database"):
        check(f"{root}/data", source={"path": f"{root}/other/{path}"})
        check(f"{root}/data/run", source={"path": f"{root}/{path}"})


def test_links_and_spellings_do_not_hide_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for out, path in (("link/run", "data"), ("data/run", "link"), ("data/../link/run", "./data/"), ("data/run", ".")):
        with pytest.raises(ConfigError, match=r"is inside source.path"):
            check(out, source={"path": path})
    with pytest.raises(ConfigError, match=r"is inside source.path"):
        check(f"file://{tmp_path}/data/run", source={"path": "data"})


def test_a_folder_with_other_data_is_refused(root: str) -> None:
    for name in ("a.png", "b.tar", "c/d.jpg", "e.parquet"):
        write(root, f"out/{name}")
    with pytest.raises(ConfigError, match=r"out: holds a.png, b.tar, c/ and 1 more, which no run made; give a new"):
        check(f"{root}/out")


def test_a_folder_with_logs_and_other_runs_is_not(root: str) -> None:
    for name in ("slurm-7.out", "train.log", ".gitignore", "base/plan.json", "estimate.json", "state/samples.json"):
        write(root, f"out/{name}")
    check(f"{root}/out")
    check(f"{root}/new")


def test_the_input_inside_the_run_folder_is_refused(root: str) -> None:
    write(root, "out/notes.md")
    with pytest.raises(ConfigError, match=r"out: holds source.path=.*/out/data, which the run must not change"):
        check(f"{root}/out", source={"path": f"{root}/out/data"})


def test_inside_a_store_a_checkpoint_or_a_part_of_a_run_is_refused(root: str) -> None:
    for name in ("manifest.json", "samples/00000.parquet"):
        write(root, f"copy/{name}")
    for name in ("state.json", "model.safetensors"):
        write(root, f"step-00000010/{name}")
    for name in ("plan.json", "config.yaml", "state/samples.json"):
        write(root, f"run/{name}", b"{}")
    for out, says in {
        "copy": "inside the store",
        "copy/text-t5/x": "inside the store",
        "step-00000010": "inside the checkpoint",
        "step-00000010/new": "inside the checkpoint",
        "run/quarantine": "inside quarantine/ of the run",
        "run/checkpoints/new": "inside checkpoints/ of the run",
    }.items():
        with pytest.raises(ConfigError, match=rf"{out}: is {says}.*{INSIDE}"):
            check(f"{root}/{out}")
    check(f"{root}/run/base")


def test_nothing_is_written_and_a_finished_run_goes_on(small_run: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(plain_png())
    (tmp_path / "link").symlink_to(small_run)
    before = tree(tmp_path)
    for out in ("images", "link/store", "link/store/new", "link/state/x"):
        result = call("run", "precompute", "--executor", "inline", "--out", str(tmp_path / out), *SMALL)
        assert (result.code, result.err.count("error: --out")) == (2, 1)
    assert tree(tmp_path) == before
    again = precompute(tmp_path / "link", *SMALL)
    assert again["num_samples"] == len(Store.open(small_run / "store"))


@pytest.mark.parametrize("workflow", ["train", "sample", "evaluate", "likelihood"])
def test_every_workflow_refuses_it(small_run: Path, tmp_path: Path, workflow: str) -> None:  # noqa: F811
    settings = {
        "train": ["-c", "demo-base", f"store={small_run}/store"],
        "sample": ["-c", "demo", f"stages=[{{checkpoint: {small_run}}}]"],
        "evaluate": ["generated={kind: folder, path: x}"],
        "likelihood": [f"store={small_run}/store", f"checkpoint={small_run}"],
    }[workflow]
    before = tree(small_run)
    result = call("run", workflow, "--out", f"{small_run}/store/new", *settings)
    assert (result.code, "error: --out" in result.err) == (2, True), result.err
    assert tree(small_run) == before
    os.makedirs(tmp_path / "data")
    (tmp_path / "data" / "a.jpg").touch()
    result = call("run", workflow, "--out", str(tmp_path / "data"), *settings)
    assert (result.code, "holds a.jpg, which no run made" in result.err) == (2, True), result.err
