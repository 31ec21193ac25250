"""Damaged and unfinished stores, and folders that are none: the exit code, the file's name, and what to do."""

import json
import shutil
from pathlib import Path

import pytest

from imagen_core.store import Store, StoreError
from tests.commands import call, precompute, tree

OVERRIDES = ("source.num_samples=5", "shard_size=3", "images.sizes_px=[16]")  # scene 2 is the dead link

FILES = {
    "samples/00001.parquet",
    "images-16/00001.parquet",
    "text-t5/00001.parquet",
    "text-t5/null.safetensors",
    "manifest.json",
}
"""One of each kind."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two shards; tests must not change it."""
    out = tmp_path_factory.mktemp("good") / "run"
    result = precompute(out, *OVERRIDES)
    assert result.code == 0, result.err
    assert tree(out / "store") >= FILES
    return out


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def store_bytes(run: Path) -> dict[str, bytes]:
    return {name: (run / "store" / name).read_bytes() for name in tree(run / "store")}


def test_a_good_store_verifies_by_its_folder_and_by_the_run_around_it(good: Path) -> None:
    for path in (good, good / "store"):
        result = call("verify", str(path), "--json")
        found = json.loads(result.out)
        assert (result.code, found["ok"], found["num_samples"], found["problems"]) == (0, True, 4, [])
        assert found["files_checked"] == len(tree(good / "store")) == 9
    rows, files = call("verify", str(good)).out.splitlines()
    assert rows == "5 input rows: 4 samples, 1 dropped (http_404 1), 0 excluded, 0 unaccounted"
    assert files.startswith("good: 9 files, ")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", [flip, pytest.param(cut, marks=pytest.mark.slow)])
def test_a_damaged_file_alone_is_named_and_computed_again_by_the_advised_command(
    run: Path, good: Path, damage, name: str
) -> None:
    damage(run / "store" / name)
    result = call("verify", str(run))
    lines = result.out.splitlines()
    assert result.code == 1
    assert [line for line in lines if line.startswith("bad: ")] == [line for line in lines if name in line]
    assert lines[0].startswith(f"bad: {name}: ")
    assert lines[-2] == "Move the bad files away and run the same pipeline command again: it makes only these again."
    assert lines[-1].startswith("NOT good: ")
    problems = json.loads(call("verify", str(run), "--json").out)["problems"]
    assert [problem["file"] for problem in problems] == [name]

    (run / "store" / name).unlink()
    again = precompute(run, *OVERRIDES)
    assert again.code == 0, again.err
    assert store_bytes(run) == store_bytes(good)


def test_a_missing_null_embedding_costs_one_shard_and_not_the_group(run: Path, good: Path) -> None:
    (run / "store" / "text-t5" / "null.safetensors").unlink()
    tasks = len((run / "events.jsonl").read_text().splitlines())
    assert precompute(run, *OVERRIDES).code == 0
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()[tasks:]]
    assert [(e["stage"], e["shard"]) for e in events if e["event"] == "task"] == [("encode-t5", 0)]
    assert store_bytes(run) == store_bytes(good)


@pytest.mark.parametrize("name", ["samples/00000.parquet", "images-16/00000.parquet", "text-t5/00000.parquet"])
def test_reading_a_cut_shard_names_the_file_and_the_command(run: Path, name: str) -> None:
    cut(run / "store" / name)
    store = Store.open(run / "store")
    with pytest.raises(StoreError) as caught:
        store[0]
    assert name in str(caught.value)
    assert "pipeline verify STORE" in str(caught.value)
    assert store[3].key == "000000004", "the other shard is unharmed"


def test_all_bad_files_are_named_at_once(run: Path) -> None:
    bad = ["images-16/00000.parquet", "samples/00001.parquet", "text-t5/00000.parquet"]
    for name in bad:
        flip(run / "store" / name)
    (run / "store" / "images-16" / "00001.parquet").unlink()
    (run / "store" / "notes.txt").write_text("who wrote this?")
    result = call("verify", str(run / "store"))
    assert result.code == 1
    named = [line.split(": ")[1] for line in result.out.splitlines() if line.startswith("bad: ")]
    assert sorted(named) == sorted([*bad, "images-16/00001.parquet"])
    assert "note: notes.txt: not in the manifest" in result.out


def edit_manifest(run: Path, old: bytes, new: bytes) -> None:
    path = run / "store" / "manifest.json"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def not_a_store(run: Path) -> Path:
    (run.parent / "images").mkdir()
    return run.parent / "images"


def absent(run: Path) -> Path:
    return run.parent / "absent"


def unfinished(run: Path) -> Path:
    (run / "store" / "manifest.json").unlink()
    return run


def barely_begun(run: Path) -> Path:
    shutil.rmtree(run / "store")
    return run


def newer(run: Path) -> Path:
    edit_manifest(run, b'"schema_version":2', b'"schema_version":99')
    return run


def changed(run: Path) -> Path:
    edit_manifest(run, b'"rows":3', b'"rows":4')
    return run


def no_json(run: Path) -> Path:
    (run / "store" / "manifest.json").write_text("{}")
    return run


CASES = [
    (not_a_store, "images", "not a store (no manifest.json); give the folder `pipeline run` wrote"),
    (absent, "absent", "not a store (no manifest.json); give the folder `pipeline run` wrote"),
    (unfinished, "store", "the run that writes it has not finished; run the same pipeline command again"),
    (barely_begun, "run", "not a store (no manifest.json); give the folder `pipeline run` wrote"),
    (newer, "manifest.json", "schema_version is 99, this library reads up to 3; upgrade imagen-precompute"),
    (changed, "manifest.json", "do not match their own sha256, so it was changed or truncated; check the store with"),
    (no_json, "manifest.json", "do not match their own sha256"),
]


@pytest.mark.parametrize(("make", "names", "says"), CASES, ids=lambda case: getattr(case, "__name__", None))
def test_a_store_that_cannot_be_opened_is_named_with_the_remedy(run: Path, make, names: str, says: str) -> None:
    path = make(run)
    before = tree(run.parent)

    verified = call("verify", str(path))
    assert verified.code == 1
    first = verified.out.splitlines()[0]
    assert first.startswith("bad: ")
    assert names in first
    assert says in first

    verified_json = json.loads(call("verify", str(path), "--json").out)
    assert verified_json["ok"] is False
    assert says in verified_json["problems"][0]["message"]

    for command in ("inspect", "report"):
        read = call(command, str(path))
        assert (read.code, read.out) == (2, ""), command
        assert read.err.startswith("error: ")
        assert len(read.err.splitlines()) == 1
        assert names in read.err
        assert says in read.err
    assert tree(run.parent) == before

    folder = path / "store" if (path / "store").is_dir() else path
    with pytest.raises(StoreError) as caught:
        Store.open(folder)
    assert says in str(caught.value)


def test_the_status_of_a_folder_without_a_run_is_refused(run: Path) -> None:
    result = call("status", str(run / "store"))
    assert (result.code, result.out) == (2, "")
    assert "not a run folder (no plan.json); give the --out of a `pipeline run`" in result.err


def test_the_status_of_an_unfinished_run_is_shown(run: Path) -> None:
    (run / "summary.json").unlink()
    shutil.rmtree(run / "state" / "text-t5")
    result = call("status", str(run), "--json")
    found = json.loads(result.out)
    assert (result.code, found["outcome"], found["running"]) == (0, None, False)
    counters = found["groups"]["samples"].pop("counters")
    assert (counters["captions"], counters["found_before"]) == (5, 1)
    assert found["groups"]["samples"] == {"shards": 2, "rows": 4, "drops": {"http_404": 1}}
    assert found["groups"]["text-t5"] == {"shards": 0, "rows": 0, "drops": {}, "counters": {}}
