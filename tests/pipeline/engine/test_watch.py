"""A run is watched from its events and records: while it goes, killed, resumed, rebuilt, on an object store."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.engine import watch as watch_module
from pipeline.engine.watch import RunWatch
from pipeline.errors import ConfigError
from pipeline.storage import LocalStorage
from pipeline.storage.events import EventLog
from pipeline.storage.lock import RunLock
from pipeline.storage.record import Record
from pipeline.storage.run_folder import RunFolder
from tests.object_store import object_store
from tests.runs import SMALL, precompute

PLAN = {
    "workflow": "precompute",
    "stages": [
        {"name": "fetch", "inputs": [], "groups": ["originals"]},
        {"name": "resize", "inputs": ["originals"], "groups": ["samples", "images-16"]},
    ],
    "transient_groups": ["originals"],
}


def record(run: RunFolder, group: str, shard: int, rows: int = 8, drops: dict[str, int] | None = None) -> None:
    run.write_record(Record(group, shard, "f", "i", 10, rows, drops or {}))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.storage.write_json("plan.json", PLAN)
    return run


def write_event(run: RunFolder, event: str, at: float, **fields: object) -> None:
    with (run.root / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": at, "event": event, **fields}) + "\n")


def task(run: RunFolder, stage: str, shard: int, at: float, **groups: dict[str, object]) -> None:
    groups = {name.replace("_", "-"): group for name, group in groups.items()}
    write_event(run, "task", at, stage=stage, shard=shard, seconds=2.0, setup_s=0.0, cpu_s=1.0, groups=groups)


def resized(run: RunFolder, shard: int, at: float, drops: dict[str, int] | None = None) -> None:
    for group in ("samples", "images-16"):
        record(run, group, shard, drops=drops if group == "samples" else None)
    task(run, "resize", shard, at, samples={"rows": 8, "drops": drops or {}}, images_16={"rows": 8, "drops": {}})


def test_a_running_run_has_stages_with_rate_drops_and_eta(run: RunFolder) -> None:
    with RunLock(run.storage):
        write_event(run, "run_started", 100.0, workflow="precompute", executor="local", shards=10)
        for shard in range(4):
            task(run, "fetch", shard, 102.0 + shard, originals={"rows": 9, "drops": {}})
        resized(run, 0, 107.0, {"too_small": 2})
        resized(run, 1, 108.0)
        write_event(run, "task_failed", 110.0, stage="resize", shard=2, attempt=1, error="OSError: x")
        view = RunWatch(run.url).look()
    fetch, resize = view.stages
    assert (view.state, view.executor, view.total_shards) == ("running", "local", 10)
    assert (fetch.done, fetch.total, fetch.rows, fetch.rows_per_s) == (4, 10, 36, 3.6)
    assert (resize.done, resize.total, resize.drops, resize.failed_tries) == (2, 10, 2, 1)
    assert (fetch.eta_s, resize.eta_s, view.eta_s) == (15.0, 40.0, 40.0)
    assert (fetch.busy, resize.busy) == (0.8, 0.4)
    assert [(group.name, group.shards, group.rows, dict(group.drops)) for group in view.groups] == [
        ("samples", 2, 16, {"too_small": 2}),
        ("images-16", 2, 16, {}),
    ]
    assert [(failed.stage, failed.shard, failed.error) for failed in view.failures] == [("resize", 2, "OSError: x")]
    assert sum(rate for _, rate in view.throughput["fetch"]) == pytest.approx(36.0)


def test_a_run_without_an_end_that_nobody_holds_is_interrupted(run: RunFolder) -> None:
    write_event(run, "run_started", 100.0, executor="ray")
    resized(run, 0, 101.0)
    view = RunWatch(run.url).look()
    assert (view.state, view.stages[1].done, view.eta_s) == ("interrupted", 1, None)
    assert view.stages[0].done == 1  # what was made from it is finished, so it was


def test_a_resumed_run_goes_on_with_what_is_finished_and_has_rates_of_its_own(run: RunFolder) -> None:
    watch = RunWatch(run.url)
    write_event(run, "run_started", 100.0, executor="ray", shards=4)
    resized(run, 0, 101.0)
    with (run.root / "events.jsonl").open("a") as file:
        file.write('{"time": 101.5, "event": "ta')  # killed
    assert watch.look().state == "interrupted"
    with RunLock(run.storage):
        log = EventLog(LocalStorage(run.root))
        log.close()
        write_event(run, "run_started", 1000.0, executor="local", shards=4)
        resized(run, 1, 1002.0)
        watch._list_at = 0.0
        view = watch.look()
    assert (view.state, view.executor, view.started) == ("running", "local", 1000.0)
    assert (view.stages[1].done, view.stages[1].rows, view.stages[1].rows_per_s) == (2, 8, 4.0)
    write_event(run, "run_ended", 1003.0, outcome="finished")
    assert watch.look().state == "finished"


def test_records_count_without_events_and_events_without_records_do_not(run: RunFolder) -> None:
    """A killed driver on an object store loses its last events; --restart deletes records, whose events stay."""
    write_event(run, "run_started", 100.0)
    resized(run, 0, 101.0, {"too_small": 2})
    watch = RunWatch(run.url)
    assert watch.look().groups[0].shards == 1
    record(run, "samples", 1, rows=5, drops={"http_404": 3})
    run.storage.delete("state/samples/00000.json")
    watch._list_at = 0.0
    group = watch.look().groups[0]
    assert (group.shards, group.rows, dict(group.drops)) == (1, 5, {"http_404": 3})
    assert watch.drops_by_shard("samples") == {1: {"http_404": 3}}


def test_a_damaged_record_and_damaged_events_are_left_out(run: RunFolder) -> None:
    run.storage.write_text("state/samples/00000.json", "{")
    lines = ['{"event": "task"}', '{"event": "task", "time": "x", "stage": 1}', "7", '{"event": "task_failed"}']
    (run.root / "events.jsonl").write_text("\n".join(lines) + "\n")
    view = RunWatch(run.url).look()
    assert (view.groups[0].shards, view.state) == (0, "not started")


def test_rows_that_a_round_tries_again_are_no_longer_drops(run: RunFolder) -> None:
    resized(run, 0, 101.0, {"timeout": 2, "too_small": 1})
    lines = [{"shard": 0, "row": row, "reason": "timeout", "source": ["k"]} for row in (3, 4)]
    run.storage.write_json_lines("retries/00001-10.jsonl", lines)
    view = RunWatch(run.url).look()
    assert (dict(view.retried), view.num_drops) == ({"timeout": 2}, 1)


def test_a_folder_that_was_deleted_and_made_again_is_counted_anew(run: RunFolder) -> None:
    write_event(run, "run_started", 100.0)
    resized(run, 0, 101.0)
    resized(run, 1, 102.0)
    watch = RunWatch(run.url)
    assert watch.look().stages[1].done == 2
    shutil.rmtree(run.root)
    with pytest.raises(ConfigError, match="not a run folder"):
        watch.look()
    run.storage.write_json("plan.json", PLAN)
    write_event(run, "run_started", 200.0)
    resized(run, 7, 201.0)
    assert (watch.look().stages[1].done, watch.look().started) == (1, 200.0)


def test_a_look_may_be_shared_for_a_while(run: RunFolder) -> None:
    watch = RunWatch(run.url)
    first = watch.look()
    resized(run, 0, 101.0)
    assert watch.look(max_age_s=60.0) is first
    assert watch.look() is not first


def test_a_finished_run_is_seen_as_its_summary_says(small_run: Path) -> None:
    view = RunWatch(str(small_run)).look()
    tally = json.loads((small_run / "summary.json").read_text())["tally"]
    assert view.state == "finished"
    assert {group.name: (group.shards, group.rows, dict(group.drops)) for group in view.groups} == {
        name: (group["shards"], group["rows"], group["drops"]) for name, group in tally["groups"].items()
    }
    assert [(stage.name, stage.done, stage.total) for stage in view.stages[:2]] == [("fetch", 3, 3), ("resize", 3, 3)]


def test_a_look_at_a_run_of_many_shards_reads_only_what_is_new(run: RunFolder) -> None:
    write_event(run, "run_started", 100.0, shards=2000)
    with (run.root / "events.jsonl").open("a") as file:
        for shard in range(2000):
            group = {"rows": 8, "drops": {}}
            value = {"time": 101.0, "event": "task", "stage": "fetch", "shard": shard, "seconds": 1.0}
            file.write(json.dumps({**value, "groups": {"originals": group}}) + "\n")
    watch = RunWatch(run.url)
    assert watch.look().stages[0].done == 2000
    offset = watch._readers[""]._offset
    resized(run, 0, 102.0)
    watch.look()
    assert watch._readers[""]._offset - offset < 300


@pytest.mark.slow
def test_a_run_on_an_object_store_is_watched_without_reading_its_records_again() -> None:
    with object_store() as s3:
        url = f"{s3.url}/run"
        precompute(url, *SMALL, "encoders=[]")  # pyright: ignore[reportArgumentType]
        watch = RunWatch(url)
        view = watch.look()
        assert (view.state, view.stages[1].done, view.groups[0].rows) == ("finished", 3, 19)
        s3.requests.clear()
        watch.look()
        assert s3.requests.by_kind("run/state")["GET"] == 0
        assert s3.requests.by_kind("run/events")["GET"] == 0


def test_a_drop_is_one_of_the_stage_that_found_it(run: RunFolder) -> None:
    write_event(run, "run_started", 100.0)
    drops = {"http_404": 3, "too_small": 2, "truncated": 4}
    before = {"http_404": 3, "truncated": 1}
    run.write_record(Record("samples", 0, "f", "i", 10, 1, drops, info={"found_before": before}))
    samples = {"rows": 1, "drops": drops, "found_before": before}
    task(run, "resize", 1, 101.0, samples=samples)
    run.write_record(Record("samples", 1, "f", "i", 10, 1, drops, info={"found_before": before}))
    view = RunWatch(run.url).look()
    assert [(found.stage, found.reason, found.count) for found in view.drops] == [
        ("fetch", "http_404", 6),
        ("fetch", "truncated", 2),
        ("resize", "truncated", 6),
        ("resize", "too_small", 4),
    ]
    assert [stage.drops for stage in view.stages] == [8, 10]


def test_the_events_of_a_run_say_which_stage_found_each_drop(small_run: Path) -> None:
    view = RunWatch(str(small_run)).look()
    assert [(found.stage, found.group, found.reason, found.count) for found in view.drops] == [
        ("fetch", "samples", "http_404", 1)
    ]
    shutil.copytree(small_run / "state", small_run.parent / "without" / "state")
    shutil.copy(small_run / "plan.json", small_run.parent / "without")
    without_events = RunWatch(str(small_run.parent / "without")).look()
    assert without_events.drops == view.drops


def test_many_events_are_read_over_several_looks_each_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_event(run, "run_started", 100.0, shards=3)
    for shard in range(3):
        resized(run, shard, 101.0 + shard)
    write_event(run, "run_ended", 104.0, outcome="finished")
    monkeypatch.setattr(watch_module, "_EVENTS_S", -1.0)  # one event per look
    watch = RunWatch(run.url)
    views = [watch.look() for _ in range(6)]
    assert [view.stages[1].done for view in views] == [0, 1, 2, 3, 3, 3]
    assert [view.is_behind for view in views] == [True] * 5 + [False]
    assert [views[0].state, views[-1].state] == ["reading its events", "finished"]
    assert views[-1].stages[1].rows == 24


def part_event(run: RunFolder, number: int, event: str, at: float, /, **fields: object) -> None:
    folder = run.root / f"parts/{number:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": at, "event": event, **fields}) + "\n")


def test_drivers_of_parts_are_watched_as_one_run_and_a_later_run_of_all_as_another(run: RunFolder) -> None:
    write_event(run, "run_started", 50.0, workflow="precompute", executor="local", shards=9)
    watch = RunWatch(run.url)
    assert watch.look().total_shards == 9
    for part, shards in ((2, 3), (1, 2)):
        part_event(run, part, "run_started", 100.0 + part, executor="ray", shards=shards, part=f"{part}/2")
        groups = {name: {"rows": 8, "drops": {}} for name in ("samples", "images-16")}
        task_of = {"stage": "resize", "shard": part, "seconds": 1.0, "groups": groups}
        part_event(run, part, "task", 110.0, **task_of)
        for group in groups:
            record(run, group, part)
    view = watch.look()
    assert (view.total_shards, view.started, view.executor) == (5, 101.0, "ray")
    assert [stage.done for stage in view.stages] == [2, 2]
    assert view.stages[1].rows == 16
    write_event(run, "run_started", 200.0, workflow="precompute", executor="local", shards=5)
    part_event(run, 1, "task_failed", 201.0, stage="resize", shard=1, error="late")
    view = watch.look()
    assert (view.total_shards, view.started, view.num_failed_tries) == (5, 200.0, 0)
    assert view.groups[0].shards == 2
