"""The pages of a run: while it goes, is killed, resumed, compacted; after it; damaged."""

import json
import re
import shutil
from pathlib import Path

import pytest

from pipeline.engine.run_view import RunView
from pipeline.engine.watch import RunWatch
from pipeline.storage.lock import RunLock
from pipeline.storage.record import Record
from pipeline.storage.run_folder import RunFolder
from stages.browse.run.live import all_retry_command, failed_shards, retry_command
from tests.commands import call
from tests.object_store import object_store
from tests.pipeline.engine.test_watch import PLAN, resized, task, write_event
from tests.runs import SMALL, precompute
from tests.stages.browse.clients import client
from tests.stages.browse.run.test_drops import write_list


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.storage.write_json("plan.json", PLAN)
    return run


def shown(text: str) -> str:
    """The words of a page."""
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def test_the_page_of_a_running_run_follows_it(run: RunFolder) -> None:
    browser = client(run.root)
    with RunLock(run.storage):
        write_event(run, "run_started", 100.0, executor="ray", shards=10)
        task(run, "fetch", 0, 103.0, originals={"rows": 9, "drops": {}})
        page = browser.get("/p/1/").text
        assert 'data-running="yes"' in page
        assert "precompute: running" in page
        assert '<progress max="10" value="1" aria-label="fetch">' in page
        text = shown(page)
        assert re.search(r"ETA 0:27 executor ray running for 3.0 s", text)
        assert "fetch 1/10 9 3.0 0.7 0:27 0 0" in text
    write_event(run, "run_ended", 104.0, outcome="finished")


def test_a_killed_run_says_so_and_a_resumed_one_goes_on(run: RunFolder) -> None:
    write_event(run, "run_started", 100.0, shards=4)
    resized(run, 0, 101.0)
    with (run.root / "events.jsonl").open("a") as file:
        file.write('{"time": 102, "event": "task", "sta')
    browser = client(run.root)
    assert "it has not said how it ended" in browser.get("/p/1/live").text
    with RunLock(run.storage):
        with (run.root / "events.jsonl").open("a") as file:
            file.write("\n")
        write_event(run, "run_started", 200.0, shards=4)
        other = client(run.root)
        text = shown(other.get("/p/1/live").text)
    assert "precompute: running" in text
    assert "resize 1/4" in text


def test_failures_have_their_tracebacks_and_are_text(run: RunFolder) -> None:
    write_event(run, "run_started", 100.0)
    error = "OSError: <script>alert(1)</script>"
    write_event(run, "task_failed", 101.0, stage="resize", shard=3, attempt=2, lost="worker", error=error)
    run.storage.write_text("quarantine/failed/resize-00003.txt", "Traceback <b>\n" + "x" * 30_000 + "\nOSError: last")
    text = client(run.root).get("/p/1/").text
    assert "1 shards failed after all tries" in text
    assert "resize on shard 00003" in text
    assert "OSError: last" in text
    assert "worker lost: OSError: &lt;script&gt;" in text
    assert "<script>alert" not in text
    assert len(text) < 40_000


def test_only_the_first_tracebacks_are_read(run: RunFolder) -> None:
    for shard in range(30):
        run.storage.write_text(f"quarantine/failed/encode-t5-{shard:05d}.txt", f"E{shard}")
    found = failed_shards(run)
    assert (found.count, len(found.first)) == (30, 20)
    assert found.first[0].stage == "encode-t5"
    assert (found.first[0].shard, found.first[0].traceback) == ("00000", "E0")


def test_machines_of_a_cluster_are_listed(run: RunFolder) -> None:
    write_event(run, "run_started", 100.0)
    for shard, node in enumerate(["a", "b", "a"]):
        values = {"stage": "fetch", "shard": shard, "seconds": 1.5, "node": node, "groups": {}}
        write_event(run, "task", 101.0 + shard, **values)
    assert "Machines node tasks seconds of work last task ended a 2 3.0 s" in shown(client(run.root).get("/p/1/").text)


@pytest.mark.slow
def test_after_a_planned_run_plan_and_actual_are_compared(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    settings = ["source.num_samples=12", "shard_size=4", "images.sizes_px=[16]", "encoders=[]"]
    planned = call("plan", "precompute", "--out", out, *settings, "--save")
    assert planned.code == 0, planned.err
    assert call("run", "precompute", "--out", out, *settings, "--executor", "inline", "--quiet").code == 0
    text = client(out).get("/p/1/").text
    assert "Planned and actual" in text
    assert "images-16 9.0 KiB" in shown(text)
    browser = client(out)
    (Path(out) / "store" / "manifest.json").write_text("{")
    (Path(out) / "summary.json").write_text("{")
    text = browser.get("/p/1/").text
    assert "manifest.json" in text
    assert "resize 3/3" in shown(text)


@pytest.mark.parametrize("damage", ["plan.json", "events.jsonl", "state/samples/00000.json", "retries/00001-8.jsonl"])
def test_whatever_is_damaged_is_a_line_and_never_an_error_page(copy_of_small_run: Path, damage: str) -> None:
    browser = client(copy_of_small_run)
    assert browser.get("/p/1/").status_code == 200
    path = copy_of_small_run / damage
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'\xff{"a": [1')
    again = client(copy_of_small_run) if damage != "plan.json" else browser
    for address in ("/p/1/", "/p/1/live", "/p/1/drops", "/p/1/drops?reason=http_404"):
        answer = again.get(address)
        assert (answer.status_code, "Traceback" in answer.text) == (200, False)


def test_a_folder_that_is_being_deleted_is_a_line(copy_of_small_run: Path) -> None:
    browser = client(copy_of_small_run)
    shutil.rmtree(copy_of_small_run)
    for address in ("/p/1/", "/p/1/live", "/p/1/drops"):
        answer = browser.get(address)
        assert answer.status_code == 200
        assert "not a run folder (no plan.json)" in answer.text


@pytest.mark.slow
def test_a_run_whose_removed_samples_are_erased_is_shown_before_and_after(copy_of_small_run: Path) -> None:
    browser = client(copy_of_small_run)
    assert "resize 3/3" in shown(browser.get("/p/1/").text)
    assert call("remove", str(copy_of_small_run), "--key", "000000003", "--compact").code == 0
    for address in ("/p/1/", "/p/1/live", "/p/1/drops"):
        answer = browser.get(address)
        assert (answer.status_code, 'class="error"' in answer.text.replace('id="lost" class="error"', "")) == (
            200,
            False,
        )


def test_drops_can_be_filtered_and_give_the_command_that_retries_just_these(run: RunFolder) -> None:
    rows = [{"row": row, "key": f"k{row}", "reason": "timeout" if row % 2 else "too_small"} for row in range(120)]
    write_list(run, "samples", 0, [{**row, "detail": ""} for row in rows])
    browser = client(run.root)
    page = browser.get("/p/1/drops?reason=timeout").text
    assert "60 dropped rows: 1 to 50" in shown(page)
    assert f"pipeline run precompute --out {run.url} --retry-dropped timeout" in page
    (following,) = re.findall(r'rel="next" href="([^"]+)"', page)
    second = browser.get(f"/p/1/{following.replace('&amp;', '&')}").text
    assert "60 dropped rows: 51 to 60" in shown(second)
    assert 'rel="prev"' in second
    assert "119" in second


@pytest.mark.parametrize(
    "query", ["from=-1", "from=x", "from=99999999999999999999", "group=%00", "reason=%2e%2e%2f", "q=%ff"]
)
def test_strange_queries_are_answered(run: RunFolder, query: str) -> None:
    resized(run, 0, 101.0, {"too_small": 1})
    assert client(run.root).get(f"/p/1/drops?{query}").status_code == 200


def test_the_retry_command_is_quoted_and_leaves_removed_rows_out(run: RunFolder) -> None:
    spaced = RunFolder(run.root.parent / "a run; rm -rf")
    spaced.storage.write_json("plan.json", PLAN)
    drops = {"timeout": 2, "removed": 1}
    spaced.write_record(Record("samples", 0, "f", "i", 10, 7, drops))
    view: RunView = RunWatch(spaced.url).look()
    assert all_retry_command(view) == f"pipeline run precompute --out '{spaced.url}' --retry-dropped timeout"
    assert retry_command(view, ["removed"]) == ""
    many = {f"reason_{number}": 1 for number in range(5)}
    spaced.write_record(Record("samples", 1, "f", "i", 10, 7, many))
    assert all_retry_command(RunWatch(spaced.url).look()).endswith("--retry-dropped all")


def test_rates_and_counts_are_json_free_of_paths_from_requests(small_run: Path) -> None:
    """The live part is a fragment of the same page, so a browser without scripts sees the same."""
    browser = client(small_run)
    page, live = browser.get("/p/1/").text, browser.get("/p/1/live").text
    assert "<html" not in live
    assert shown(live) in shown(page)
    assert json.loads((small_run / "summary.json").read_text())["outcome"] in live


@pytest.mark.slow
def test_a_run_on_an_object_store_has_the_same_pages() -> None:
    with object_store() as s3:
        url = f"{s3.url}/run"
        precompute(url, *SMALL, "encoders=[]", "keep_originals=true")  # pyright: ignore[reportArgumentType]
        browser = client(url)
        text = shown(browser.get("/p/1/").text)
        assert "precompute: finished" in text
        assert "resize 3/3" in text
        drops = browser.get("/p/1/drops").text
        assert "1 dropped rows: 1 to 1" in drops
        assert "synthetic://0/000000002.png" in drops
        assert f"--out {url} --retry-dropped http_404" in drops
        assert browser.get("/p/1/drops/0/2").status_code == 404
        s3.faults.rule = lambda method, path: "403"
        for address in ("/p/1/", "/p/1/live", "/p/1/drops"):
            answer = browser.get(address)
            assert (answer.status_code, "Traceback" in answer.text) == (200, False)
