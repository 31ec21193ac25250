"""An export that was ended at any moment goes on, and has the bytes of one that was not; and what is refused."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from imagen_core.store import ArraySpec, Store
from stages.exports import stage
from stages.store_tools.remove import remove_command
from tests.commands import tree
from tests.imagen_core.store.arrays_added import add_arrays, values_of
from tests.imagen_core.store.handmade_store import make_store
from tests.object_store import object_store
from tests.runs import REPOSITORY, command, pipeline
from tests.stages.exports.exporting import TARGETS, data_files, export, skip_without, tar_samples, try_once

SHARDS = (5, 3, 4)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store", shard_rows=SHARDS, excluded={0: [1]}).path


@pytest.mark.parametrize("target", TARGETS)
def test_a_shard_that_fails_leaves_the_others_and_is_made_by_the_next_run(
    target: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(target)
    assert export(store, target, tmp_path / "whole").code == 0
    name = {"mds": "write_mds", "webdataset": "write_tar", "parquet": "write_parquet"}[target]
    write = getattr(stage, name)

    def fail_in_the_middle(path: Path, samples: Any, *arguments: Any) -> int:
        def some() -> Any:
            for number, sample in enumerate(samples):
                if sample.place[0] == 1 and number == 2:
                    raise RuntimeError("the power went off")
                yield sample

        return write(path, some(), *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(stage, name, fail_in_the_middle)
        result = try_once(store, target, tmp_path / "out")
    assert result.code == 3
    assert "the power went off" in result.err
    assert not [path for path in data_files(tmp_path / "out") if path.startswith("00001")]
    assert not [path for path in tree(tmp_path / "out") if ".tmp" in path]
    assert export(store, target, tmp_path / "out").code == 0
    assert data_files(tmp_path / "out") == data_files(tmp_path / "whole")


@pytest.mark.parametrize("target", TARGETS)
def test_a_second_run_changes_no_file(target: str, store: Path, tmp_path: Path) -> None:
    skip_without(target)

    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (tmp_path / "out/data").rglob("*") if path.is_file()}

    assert export(store, target, tmp_path / "out").code == 0
    before = times()
    assert len(before) > len(SHARDS)
    assert export(store, target, tmp_path / "out").code == 0
    assert times() == before


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_killed_export_goes_on_and_has_the_same_bytes(target: str, tmp_path: Path) -> None:
    skip_without(target)
    store = make_store(tmp_path / "store", shard_rows=(20,) * 90, sizes=(64, 8)).path
    assert export(store, target, tmp_path / "whole").code == 0
    out = tmp_path / "out"
    arguments = command("export", str(store), "--to", target, "--out", str(out), "--executor", "inline", "--quiet")
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(arguments, cwd=REPOSITORY, start_new_session=True)
        before = len(list((out / "state").glob("export/*.json")))
        while len(list((out / "state").glob("export/*.json"))) == before and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        assert not (out / "data/store.json").exists()
    assert kills >= 2
    assert export(store, target, out).code == 0
    assert data_files(out) == data_files(tmp_path / "whole")


def test_after_a_removal_only_its_shard_is_made_again(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(store, "webdataset", out).code == 0
    gone = Store.open(store)[5]
    before = {path.name: path.stat().st_mtime_ns for path in (out / "data").glob("*.tar")}
    remove_command(str(store), key=[gone.key])
    refused = export(store, "webdataset", out)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--restart" in refused.err
    assert export(store, "webdataset", out, "--restart").code == 0
    assert gone.key not in [row["json"]["key"] for row in tar_samples(out)]
    after = {path.name: path.stat().st_mtime_ns for path in (out / "data").glob("*.tar")}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["00001.tar"]
    assert json.loads((out / "data/store.json").read_text())["store"]["num_removals"] == 1


def refusal(*arguments: Any) -> str:
    result = export(*arguments)
    assert result.code == 2, result.err
    assert result.err.count("\n") == 1, result.err
    return result.err


def test_another_export_in_the_folder_is_refused_in_one_line(store: Path, tmp_path: Path) -> None:
    assert export(store, "webdataset", tmp_path / "out").code == 0
    before = data_files(tmp_path / "out")
    assert "to: webdataset -> parquet" in refusal(store, "parquet", tmp_path / "out")
    assert "float16 -> float32" in refusal(store, "webdataset", tmp_path / "out", "--dtype", "float32")
    assert data_files(tmp_path / "out") == before


def test_the_folder_of_another_run_is_refused(store: Path, tmp_path: Path, small_run: Path) -> None:
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    before = tree(run)
    assert "is the folder of a run of precompute" in refusal(store, "parquet", run)
    assert tree(run) == before


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_workers_write_the_same_bytes(executor: str, store: Path, tmp_path: Path) -> None:
    for target in ("parquet", "webdataset"):
        assert export(store, target, tmp_path / target).code == 0
        out = tmp_path / f"{target}-{executor}"
        pipeline("export", str(store), "--to", target, "--out", str(out), "--executor", executor, "--quiet")
        assert data_files(out) == data_files(tmp_path / target)


def test_names_that_differ_in_case_only_are_refused_for_webdataset(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store")
    for name in ("mask", "MASK"):
        spec = ArraySpec("float32")
        add_arrays(made.path, name, spec, values_of(spec), "parquet")
    assert "in case only" in refusal(made.path, "webdataset", tmp_path / "out")


def test_a_wrong_request_is_refused_before_anything_is_written(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "sizes_px: 7 is not in the store; it has [4, 8]" in refusal(store, "parquet", out, "--size", "7")
    assert "encoders: clip is not in the store; it has ['t5']" in refusal(store, "parquet", out, "--encoder", "clip")
    assert "'mds', 'webdataset' or 'parquet'" in refusal(store, "tar", out)
    assert "--weights" in refusal(store, "parquet", out, "--weights", "model")
    unfinished = Path(shutil.copytree(store, tmp_path / "unfinished"))
    (unfinished / "manifest.json").unlink()
    assert "has not finished" in refusal(unfinished, "parquet", out)
    assert not out.exists()
    assert "is inside" in refusal(store, "parquet", store / "export")


def test_a_damaged_file_of_the_store_is_not_copied(store: Path, tmp_path: Path) -> None:
    path = store / "images-8/00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = try_once(store, "webdataset", tmp_path / "out")
    assert result.code == 3
    assert "images-8/00001.parquet" in result.err
    assert sorted(path.name for path in (tmp_path / "out/data").glob("*.tar")) == ["00000.tar", "00002.tar"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_an_export_from_s3_to_s3_has_the_bytes_of_a_local_one(target: str, store: Path, tmp_path: Path) -> None:
    skip_without(target)
    from pipeline.storage.open import open_storage

    assert export(store, target, tmp_path / "near").code == 0
    with object_store() as s3:
        far = open_storage(f"{s3.url}/store")
        for name in tree(store):
            far.write(name, (store / name).read_bytes())
        for _ in range(2):
            assert export(f"{s3.url}/store", target, f"{s3.url}/out").code == 0
        out = open_storage(f"{s3.url}/out/data")
        assert {name: out.read(name) for name in out.walk()} == data_files(tmp_path / "near")
