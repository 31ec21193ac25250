"""No command copies or lists a stored byte that is not the one that was written: the file is named, and stays."""

import json
import shutil
from pathlib import Path

import pytest

from imagen_core import store as st
from pipeline.errors import EXIT_ENVIRONMENT, MachineError, PipelineError
from pipeline.storage.run_folder import RunFolder
from stages.precompute.manifest import build_manifest
from tests.commands import call
from tests.runs import SMALL, precompute, store_bytes

REMOVED = "000000004"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(("place", "group"), [("run", "samples"), ("run", "text-t5"), ("store", "images-16")])
def test_compaction_refuses_a_damaged_file_by_name_and_leaves_the_store_as_it_was(
    copy_of_small_run: Path, tmp_path: Path, place: str, group: str
) -> None:
    target = copy_of_small_run
    if place == "store":
        target = Path(shutil.copytree(copy_of_small_run / "store", tmp_path / "elsewhere"))
    store = target / "store" if place == "run" else target
    assert call("remove", str(target), "--key", REMOVED).code == 0
    flip(store / group / "00000.parquet")
    before = {path: path.read_bytes() for path in store.rglob("*.*") if path.is_file() and path.name != ".lock"}
    result = call("remove", str(target), "--compact")
    assert result.code == 2
    assert f"{group}/00000.parquet: " in result.err
    assert "so it was changed since; restore it from a copy, or move it away" in result.err
    assert {path: path.read_bytes() for path in before} == before
    assert [problem.file for problem in st.verify_store(store).problems] == [f"{group}/00000.parquet"]


@pytest.mark.parametrize("change", [(b'"raw"', b'"Raw"'), (b'"images"', b'"samples"')])
def test_compaction_names_settings_of_a_group_that_are_damaged(
    copy_of_small_run: Path, change: tuple[bytes, bytes]
) -> None:
    assert call("remove", str(copy_of_small_run), "--key", REMOVED).code == 0
    file, before = copy_of_small_run / "state" / "images-16.json", store_bytes(copy_of_small_run)
    assert change[0] in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(*change))
    result = call("remove", str(copy_of_small_run), "--compact")
    assert result.code == 2
    assert "state/images-16.json: is damaged (group 'images-16'" in result.err
    assert "restore it from a copy; or delete it with state/images-16" in result.err
    assert store_bytes(copy_of_small_run) == before


def test_a_removal_refuses_to_look_for_rows_in_a_damaged_file(copy_of_small_run: Path) -> None:
    flip(copy_of_small_run / "store" / "samples" / "00001.parquet")
    result = call("remove", str(copy_of_small_run), "--key", REMOVED)
    assert (result.code, "samples/00001.parquet: " in result.err) == (2, True)
    assert not (copy_of_small_run / "store" / "removed").exists()


@pytest.mark.parametrize("damage", ["changed", "deleted", pytest.param("zeros", marks=pytest.mark.slow)])
def test_a_run_refuses_a_damaged_log_of_removals_before_it_writes_anything(
    copy_of_small_run: Path, damage: str
) -> None:
    run = copy_of_small_run
    for key in (REMOVED, "000000012"):
        assert call("remove", str(run), "--key", key).code == 0
    log = run / "store" / "removed" / "00002.json"
    if damage == "changed":
        log.write_text(log.read_text().replace("00001", "00002"))
    elif damage == "deleted":
        log.unlink()
    else:
        log.write_bytes(bytes(log.stat().st_size))
    before = store_bytes(run)
    for overrides, restart in ((SMALL, False), ([*SMALL, "images.filter=box"], True)):
        with pytest.raises(MachineError, match=r"removed/00002\.json: .*restore it from a copy of the store"):
            precompute(run, *overrides, restart=restart)
    with pytest.raises(MachineError, match=r"removed/00002\.json: "):
        build_manifest(RunFolder(run), 20)
    assert store_bytes(run) == before


@pytest.mark.parametrize(
    ("file", "known_by"),
    [
        ("null.safetensors", "record"),
        ("probe.json", "manifest"),
        pytest.param("null.safetensors", "manifest", marks=pytest.mark.slow),
        pytest.param("probe.json", "record", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_file_that_belongs_to_no_shard_is_not_listed(
    copy_of_small_run: Path, file: str, known_by: str
) -> None:
    run = copy_of_small_run
    path = run / "store" / "text-t5" / file
    assert json.loads((run / "state" / "text-t5" / f"{file}.json").read_text())["bytes"] == path.stat().st_size
    if known_by == "record":
        (run / "store" / "manifest.json").unlink()
    else:
        (run / "state" / "text-t5" / f"{file}.json").unlink()  # as runs of earlier versions are
    data = path.read_bytes()
    path.write_bytes(data.replace(b"[", b" ", 1) if file == "probe.json" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(MachineError, match=rf"text-t5/{file}: .*so it was changed since; restore it from a copy"):
        precompute(run, *SMALL)
    path.unlink()
    precompute(run, *SMALL)
    assert st.verify_store(run / "store").ok
    assert path.read_bytes() == data, "it is made again"


def test_a_run_of_an_earlier_version_records_its_null_embedding_when_it_goes_on(copy_of_small_run: Path) -> None:
    run = copy_of_small_run
    record = run / "state" / "text-t5" / "null.safetensors.json"
    written = record.read_bytes()
    record.unlink()
    (run / "store" / "text-t5" / "00002.parquet").unlink()
    precompute(run, *SMALL)
    assert record.read_bytes() == written


TWO = "encoders=[{name: t5, kind: t5, model: tiny-random-t5}, {name: other, kind: t5, model: tiny-random-t5}]"


@pytest.mark.slow
@pytest.mark.parametrize("added", ["images.sizes_px=[16,24,48]", TWO], ids=["a size", "an encoder"])
def test_what_is_added_to_a_store_is_not_made_from_a_damaged_file(copy_of_small_run: Path, added: str) -> None:
    run = copy_of_small_run
    before = store_bytes(run)
    samples = run / "store" / "samples" / "00001.parquet"
    flip(samples)
    with pytest.raises(PipelineError, match=r"samples/00001\.parquet: .* were committed, so it was changed") as error:
        precompute(run, *SMALL, added)
    assert error.value.exit_code == EXIT_ENVIRONMENT
    assert store_bytes(run)["manifest.json"] == before["manifest.json"], "readers see the store as it was"
    samples.unlink()
    precompute(run, *SMALL, added)
    assert st.verify_store(run / "store").ok
    assert store_bytes(run)["samples/00001.parquet"] == before["samples/00001.parquet"]


def test_kept_originals_that_were_changed_are_not_compacted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    precompute(run, *SMALL, "keep_originals=true")
    (tar,) = (run / "staging" / "originals").glob("00000.*")
    flip(tar)
    result = call("remove", str(run), "--key", REMOVED, "--compact")
    assert (result.code, f"staging/originals/{tar.name}: " in result.err) == (4, True)


@pytest.mark.parametrize(
    "damage", ["a flipped byte", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zeros", "cut", "missing"))]
)
def test_the_lineage_names_damaged_files_and_searches_the_others(copy_of_small_run: Path, damage: str) -> None:
    run = copy_of_small_run
    path = run / "store" / "samples" / "00001.parquet"
    if damage == "a flipped byte":
        flip(path)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else bytes(path.stat().st_size))
    result = call("inspect", str(run), "--key", REMOVED)
    first, *_, last = result.out.splitlines()
    assert (result.code, first, result.err) == (1, "sample in shard 00000 row 3", "")
    assert last.startswith(f"bad: {path}: ")
    found = json.loads(call("inspect", str(run), "--key", "nobody", "--json").out)
    assert (found["found"], len(found["problems"])) == ([], 1)
    assert call("inspect", str(run), "--key", "nobody").out.startswith(
        "key nobody: unknown in the other files: no sample, removed or dropped row has it\nbad: "
    )


def test_a_damaged_file_of_a_group_is_named_by_the_lineage(copy_of_small_run: Path) -> None:
    path = copy_of_small_run / "store" / "text-t5" / "00000.parquet"
    path.write_bytes(bytes(path.stat().st_size))
    result = call("inspect", str(copy_of_small_run), "--key", REMOVED)
    assert (result.code, f"bad: {path}: not readable as parquet" in result.out) == (1, True)


def test_verify_says_that_a_run_is_at_work(copy_of_small_run: Path) -> None:
    run = copy_of_small_run
    assert "at_work" not in json.loads(call("verify", str(run), "--json").out)
    with RunFolder(run).lock():
        for path in (run, run / "store"):
            lines = call("verify", str(path)).out.splitlines()
            assert lines[-2].startswith("note: a run is at work on it (process ")
            assert lines[-1].startswith("good: ")
        (run / "store" / "manifest.json").unlink()
        result = call("verify", str(run), "--json")
        found = json.loads(result.out)
        assert (result.code, found["ok"], found["at_work"].startswith("process ")) == (1, False, True)
        assert "note: a run is at work on it (process " in call("verify", str(run)).out
