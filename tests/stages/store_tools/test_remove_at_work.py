"""Removals while a run, a compaction or another removal is at work on the store: at once, honoured, and in words."""

import json
import shutil
import threading
import time
from pathlib import Path

import fsspec
import pytest

from imagen_core import store as st
from pipeline.errors import LockedError
from pipeline.storage import lock
from pipeline.storage.lock import LEASE
from pipeline.storage.run_folder import RunFolder
from pipeline.storage.scratch import scratch
from stages.precompute import manifest as finishing
from stages.precompute import resize
from stages.store_tools import remove
from stages.store_tools.remove import remove_command
from stages.store_tools.verify import verify_command
from tests.commands import call
from tests.runs import SMALL, precompute, store_bytes

FINISHED, IN_HAND, LATER = "000000001", "000000009", "000000018"
"""Samples of the shards 0, 1 and 2."""


def keys(store: Path) -> list[str]:
    return [sample.key for sample in st.Store.open(store)]


@pytest.mark.slow
def test_a_removal_during_a_run_takes_effect_at_once_and_the_run_honours_it(
    tmp_path: Path, small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, shown = tmp_path / "run", []
    (tmp_path / "keys").write_text(f"{FINISHED}\n{IN_HAND}\n{LATER}\n")

    def remove_and_write(path: Path, *arguments: object, **options: object) -> None:
        if path.name.endswith("00001.parquet"):
            shown.append(call("remove", str(run), "--key", str(tmp_path / "keys"), "--json"))
        st.write_samples(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(resize, "write_samples", remove_and_write)
    precompute(run, *SMALL)
    (result,) = shown
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert (found["removed"], found["unmatched"]) == (1, {"key": [IN_HAND, LATER]}), "of the finished shard"
    assert found["at_work"].startswith("process ")
    gone = {FINISHED, IN_HAND, LATER}
    assert keys(run / "store") == [key for key in keys(small_run / "store") if key not in gone]
    report = st.verify_store(run / "store")
    assert report.ok, report.problems
    assert (report.excluded["removed"], report.dropped["removed"]) == (2, 1)
    log = st.load_removals(st.StoreFolder(run / "store"))
    assert [(removal.at_work, removal.num_rows) for removal in log] == [(True, 1), (False, 1)]

    monkeypatch.undo()
    after = store_bytes(run)
    monkeypatch.setattr(finishing, "_behind", lambda *_: pytest.fail("they were compared already"))
    precompute(run, *SMALL)
    assert store_bytes(run) == after


@pytest.mark.slow
def test_a_row_removed_after_it_was_fetched_is_no_sample(
    tmp_path: Path, small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, begin = tmp_path / "run", resize.ResizeStage.process

    def remove_and_begin(stage: resize.ResizeStage, task: resize.Task) -> None:
        if task.shard.index == 1:
            (tmp_path / "keys").write_text(IN_HAND)
            assert call("remove", str(run), "--key", str(tmp_path / "keys")).code == 0
        begin(stage, task)

    monkeypatch.setattr(resize.ResizeStage, "process", remove_and_begin)
    precompute(run, *SMALL)
    assert keys(run / "store") == [key for key in keys(small_run / "store") if key != IN_HAND]
    assert st.verify_store(run / "store").dropped["removed"] == 1


def test_compaction_of_a_store_at_work_is_refused_in_words_after_the_removal(copy_of_small_run: Path) -> None:
    run = copy_of_small_run
    with RunFolder(run).lock():
        result = call("remove", str(run), "--key", FINISHED, "--compact")
    assert result.code == 4
    assert f"{run}: the removal took effect, but its files were not compacted, as this is at work on it: process" in (
        result.err
    )
    assert FINISHED not in keys(run / "store")
    assert call("remove", str(run), "--compact").out.startswith("compacted: 4 files")
    assert st.verify_store(run / "store").ok


def test_removals_of_a_store_without_run_at_the_same_time_are_all_logged(
    copy_of_small_run: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(copy_of_small_run / "store", tmp_path / "elsewhere"))
    chosen = keys(store)[:4]
    codes: dict[str, int] = {}

    def remove(key: str) -> None:
        codes[key] = remove_command(str(store), key=[key])[2]

    threads = [threading.Thread(target=remove, args=[key]) for key in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == dict.fromkeys(chosen, 0)
    assert not set(chosen) & set(keys(store))
    assert len(st.load_removals(st.StoreFolder(store))) == 4
    assert call("remove", str(store), "--compact").code == 0
    report = st.verify_store(store)
    assert (report.ok, report.warnings) == (True, [])


def test_a_removal_that_lost_the_store_after_it_was_logged_leaves_the_manifest_to_the_other(
    copy_of_small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(copy_of_small_run)
    key = next(iter(st.Store.open(run.store_url))).key
    manifest = (copy_of_small_run / "store/manifest.json").read_bytes()

    def then_taken_over(*arguments: object, **options: object) -> object:
        done = st.add_removal(*arguments, **options)  # type: ignore[arg-type]
        now = time.time()
        lease = {"owner": "other", "host": "node-4", "pid": 7, "user": "ann", "since": now, "renewed": now}
        run.storage.write_json(LEASE, lease)
        monkeypatch.setattr(lock, "_STEP_S", -1.0)  # as after SIGCONT
        return done

    monkeypatch.setattr(remove, "add_removal", then_taken_over)
    with pytest.raises(LockedError, match="node-4"):
        remove_command(str(copy_of_small_run), key=[key])
    assert (copy_of_small_run / "store/manifest.json").read_bytes() == manifest
    assert key not in {sample.key for sample in st.Store.open(run.store_url)}, "the removal is in effect"


def test_copies_of_a_far_store_lie_where_those_of_a_killed_process_are_removed(
    copy_of_small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = fsspec.filesystem("memory")
    far.put(str(copy_of_small_run), f"/{copy_of_small_run.parent.name}", recursive=True)
    places: list[Path] = []
    fetch = st.StoreFolder.fetch
    monkeypatch.setattr(st.StoreFolder, "fetch", lambda *args: (places.append(args[2]), fetch(*args))[1])
    url = f"memory://{copy_of_small_run.parent.name}"
    verify_command(url)
    verified = len(places)
    remove_command(url, key=[next(iter(st.Store.open(f"{url}/store"))).key], dry_run=True)
    assert 0 < verified < len(places)
    assert all(place.is_relative_to(scratch()) for place in places)


def test_no_folder_is_made_where_there_is_no_store(tmp_path: Path) -> None:
    result = call("remove", str(tmp_path / "nothing"), "--key", "a", "--compact")
    assert (result.code, "not a store" in result.err) == (2, True)
    assert not (tmp_path / "nothing").exists()
