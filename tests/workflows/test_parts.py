"""`pipeline run --part K/N`: many drivers, one store, which is that of one driver, byte for byte."""

import io
import json
import os
import random
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import load_config
from pipeline.engine.division import read_division, view_parts
from pipeline.engine.parts import finish_run
from pipeline.errors import ConfigError, LockedError, PartsMissingError, PipelineError, StaleOutputError
from pipeline.options import Part, RunOptions
from pipeline.storage import lock
from pipeline.storage.run_folder import RunFolder
from stages.precompute.resize import ResizeStage
from stages.sources.base import InputPart
from stages.sources.tabular.table_rows import TableRange
from tests.commands import call
from tests.images import plain_png
from tests.object_store import ObjectStore, object_store
from tests.runs import REPOSITORY, command, precompute, store_bytes
from workflows.precompute import Precompute, PrecomputeConfig

SMALL = ("source.num_samples=20", "shard_size=3", "images.sizes_px=[16]", "encoders=[]")
"""7 shards; scene 2 is the dead link."""


def workflow(*overrides: str) -> Precompute:
    return Precompute(load_config(PrecomputeConfig, None, overrides))


def run_part(out: Path | str, part: str, *overrides: str) -> dict[str, Any]:
    options = RunOptions("inline", quiet=True, part=Part.parse(part))
    return workflow(*(overrides or SMALL)).run(str(out), options)


def finish(out: Path | str, *overrides: str) -> dict[str, Any]:
    made = workflow(*(overrides or SMALL))
    return dict(finish_run("precompute", made.config, made.plan, str(out), RunOptions("inline", quiet=True)))


def parts_of(out: Path) -> dict[str, Any]:
    view = view_parts(RunFolder(str(out)))
    assert view is not None
    return view.to_json()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one driver makes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    precompute(out, *SMALL)
    return out


def test_parts_in_another_order_make_the_store_and_the_sums_of_one_driver(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run_part(out, "3/3")
    assert (first["part"], first["shards"], first["missing"]) == ("3/3", [[4, 7]], "1-2 (never came)")
    assert first["tally"]["shards"] == 3
    assert "num_samples" not in first
    assert not (out / "store/manifest.json").exists()
    assert not (out / "summary.json").exists()
    assert run_part(out, "1/3")["missing"] == "2 (never came)"
    last = run_part(out, "2/3")
    assert "part" not in last
    assert last == json.loads((out / "summary.json").read_text())
    assert store_bytes(out) == store_bytes(whole)
    one = json.loads((whole / "summary.json").read_text())
    for name in ("tally", "num_samples", "outcome", "groups_in_store"):
        assert last[name] == one[name]
    assert parts_of(out) == {"parts": 3, "done": 3, "running": [], "stopped": [], "absent": [], "finished": True}


def test_each_driver_writes_events_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for part in ("1/2", "2/2"):
        run_part(out, part)
    assert not (out / "events.jsonl").exists()
    shards: list[set[int]] = []
    for number in (1, 2):
        lines = [json.loads(line) for line in (out / f"parts/{number:05d}/events.jsonl").read_text().splitlines()]
        assert lines[0]["part"] == f"{number}/2"
        assert lines[-1]["event"] == "run_ended"
        shards.append({line["shard"] for line in lines if line["event"] == "task"})
    assert shards == [{0, 1, 2}, {3, 4, 5, 6}]


def test_more_parts_than_shards_leave_some_without_any(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    counts = [run_part(out, f"{part}/9")["tally"]["shards"] for part in range(1, 9)]
    assert counts == [0, 1, 1, 1, 0, 1, 1, 1]
    assert run_part(out, "9/9")["tally"]["shards"] == 7
    assert store_bytes(out) == store_bytes(whole)


def test_finish_and_verify_name_the_parts_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    run_part(out, "2/4")
    _interrupt(out, "3/4", monkeypatch, after=1)
    done = call("finish", str(out), "--quiet")
    assert done.code == 3
    assert "3 of 4 parts are missing: 3 (stopped); 1, 4 (never came)" in done.err
    checked = call("verify", str(out))
    assert checked.code == 1
    assert "bad: parts: 3 (stopped); 1, 4 (never came) of 4 are missing" in checked.out
    shown = call("status", str(out))
    assert "parts: 1 of 4 done; 3 (stopped); 1, 4 (never came)" in shown.out
    assert not (out / "store/manifest.json").exists()


def test_finish_on_the_command_line_is_idempotent(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("pipeline.engine.parts._finish_if_last", lambda *_: None)  # as if killed there
    for part in ("1/2", "2/2"):
        run_part(out, part)
    assert not (out / "store/manifest.json").exists()
    for _ in range(2):
        done = call("finish", str(out), "--quiet")
        assert done.code == 0, done.err
        assert "19 of 20 samples in 7 shards" in done.out
        assert store_bytes(out) == store_bytes(whole)
    assert call("verify", str(out)).code == 0


def test_finish_of_a_run_without_parts_changes_nothing(whole: Path) -> None:
    before = store_bytes(whole)
    assert call("finish", str(whole), "--quiet").code == 0
    assert store_bytes(whole) == before


def _interrupt(out: Path, part: str, patch: pytest.MonkeyPatch, *, after: int) -> None:
    """Runs a part until its `after`-th image task has ended, and no further."""
    honest, left = ResizeStage.process, iter([True] * after)

    def process(self: ResizeStage, task: Any) -> None:
        if not next(left, False):
            raise KeyboardInterrupt
        honest(self, task)

    with patch.context() as context:
        context.setattr(ResizeStage, "process", process)
        with pytest.raises(KeyboardInterrupt):
            run_part(out, part)


def test_a_part_that_was_interrupted_goes_on_where_it_was(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    _interrupt(out, "1/2", monkeypatch, after=2)
    run_part(out, "2/2")
    assert parts_of(out)["stopped"] == [1]
    assert run_part(out, "1/2")["tally"]["shards_skipped"] == 2
    assert store_bytes(out) == store_bytes(whole)


def test_a_finished_part_that_is_started_again_finishes_the_run_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for part in ("1/2", "2/2"):
        run_part(out, part)
    (out / "store/manifest.json").unlink()
    (out / "store/samples/00006.parquet").unlink()
    assert "num_samples" in run_part(out, "2/2")
    assert store_bytes(out) == store_bytes(whole)


def test_a_shard_that_vanished_is_named_with_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("pipeline.engine.parts._finish_if_last", lambda *_: None)
    for part in ("1/2", "2/2"):
        run_part(out, part)
    (out / "state/samples/00001.json").unlink()
    with pytest.raises(PartsMissingError, match=r"shard 00001 of samples is gone, of part 1; run that part again"):
        finish(out)
    run_part(out, "1/2")
    assert finish(out)["num_samples"] == 19


def test_what_parts_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_part(out, "1/3")
    refused = [
        (("--part", "1/4"), "the work of .* is divided into 3 parts; give K/3"),
        (("--part", "2/3", "max_drop_fraction=0.4"), r"max_drop_fraction: 0\.5 -> 0\.4"),
        (("--part", "2/3", "source.num_samples=21"), "source.num_samples: 20 -> 21"),
        (("--part", "2/3", "--restart"), "--restart is for all of the run at once"),
        (("--part", "2/3", "--retry-dropped", "all"), "--retry-dropped is for all of the run"),
        (("--part", "0/3"), "give K/N"),
        (("--part", "4/3"), "give K/N"),
        (("--part", "x"), "give K/N"),
        (("--part", "2/3", "--dry-run"), "--dry-run shows all of the run"),
    ]
    for options, message in refused:
        done = call("run", "precompute", "--out", str(out), "--executor", "inline", "--quiet", *SMALL, *options)
        assert done.code == 2, done
        assert re.search(message, done.err), done
    assert parts_of(out)["done"] == 1


def test_workflows_without_parts_refuse_them(tmp_path: Path, whole: Path) -> None:
    cases = {
        "export": ("to=mds", f"store={whole}/store"),
        "sample": (f"stages=[{{checkpoint: {whole}}}]", "prompts=[a cat]"),
    }
    for name, settings in cases.items():
        done = call("run", name, "--out", str(tmp_path / name), "--part", "1/2", *settings)
        assert (done.code, done.err) == (2, f"error: --part 1/2: {name} has no parts; leave it out\n")
        assert not (tmp_path / name).exists()


def test_limits_on_requests_are_refused_with_parts(tmp_path: Path) -> None:
    captioner = (
        "captioners=[{name: long, kind: openai, base_url: http://127.0.0.1:1, model: m, max_requests: 5, prompt: p}]"
    )
    with pytest.raises(ConfigError, match=r"--part 1/2: captioners\.long\.max_requests holds for one driver"):
        run_part(tmp_path / "run", "1/2", *SMALL, captioner)


def test_a_part_that_is_at_work_keeps_out_itself_and_runs_of_all_but_no_other_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run_part(out, "1/3")
    with RunFolder(str(out)).lock(part=2):
        with pytest.raises(LockedError, match=r"another run is working on part 2 of it: process"):
            run_part(out, "2/3")
        with pytest.raises(LockedError, match="working on part 2"):
            precompute(out, *SMALL)
        assert lock.is_running(RunFolder(str(out)).storage)
        assert run_part(out, "3/3")["missing"] == "2 (at work)"
        with pytest.raises(PartsMissingError, match=r"1 of 3 parts are missing: 2 \(at work\)"):
            finish(out)
    assert not lock.is_running(RunFolder(str(out)).storage)
    assert run_part(out, "2/3")["num_samples"] == 19


def test_a_run_of_all_keeps_parts_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.0)
    out = tmp_path / "run"
    with RunFolder(str(out)).lock(), pytest.raises(LockedError, match="another run is working in this folder"):
        run_part(out, "1/2")
    assert not list((out / "parts").glob("*.lease.json"))


def test_a_run_of_all_does_what_parts_have_left_and_ends_the_division(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_part(out, "2/3")
    assert precompute(out, *SMALL)["tally"]["shards_skipped"] == 2
    assert store_bytes(out) == store_bytes(whole)
    assert view_parts(RunFolder(str(out))) is None


def test_drops_of_all_parts_are_retried_by_a_run_of_all(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for part in ("1/2", "2/2"):
        run_part(out, part)
    options = RunOptions("inline", quiet=True, retry_dropped=("http_404",))
    summary: dict[str, Any] = workflow(*SMALL).run(str(out), options)
    assert summary["tally"]["shards"] == 8
    assert summary["num_samples"] == 19
    with pytest.raises(ConfigError, match="has rounds of --retry-dropped, which belong to no part"):
        run_part(out, "1/2")


def test_shards_that_fail_are_named_by_their_part_and_left_out_of_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, honest = tmp_path / "run", ResizeStage.process

    def process(self: ResizeStage, task: Any) -> None:
        if task.shard.index == 5:
            raise RuntimeError("bad luck")
        honest(self, task)

    once = (*SMALL, "execution.max_attempts=1", "execution.give_up_after_shards=3")
    run_part(out, "1/2", *once)
    monkeypatch.setattr(ResizeStage, "process", process)
    with pytest.raises(PipelineError, match="1 of 7 shards failed") as caught:
        run_part(out, "2/2", *once)
    monkeypatch.setattr(ResizeStage, "process", honest)
    assert caught.value.exit_code == 3
    assert json.loads((out / "summary.json").read_text())["num_samples"] == 16
    assert list((out / "quarantine/failed").iterdir()) == [out / "quarantine/failed/resize-00005.txt"]
    assert run_part(out, "2/2", *once)["num_samples"] == 19
    assert not list((out / "quarantine/failed").glob("*"))


def test_duplicates_are_found_over_all_parts(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_images(data, "a", ["aa", "ab", "ac"])
    write_images(data, "b", ["aa", "ad", "ae"])
    settings = (
        "max_drop_fraction=1",
        "source.kind=folder",
        f"source.path={data}",
        "shard_size=2",
        "images.sizes_px=[16]",
        "encoders=[]",
    )
    settings = (*settings, "duplicates=drop")
    precompute(tmp_path / "one", *settings)
    for part in ("2/3", "1/3"):
        run_part(tmp_path / "run", part, *settings)
    assert run_part(tmp_path / "run", "3/3", *settings)["duplicates"]["duplicate_image"] >= 1
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "one")
    names = [tmp_path / run / "duplicates.jsonl" for run in ("one", "run")]
    assert names[0].read_bytes() == names[1].read_bytes()


def write_images(folder: Path, name: str, keys: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    for key in keys:
        (folder / f"{name}-{key}.png").write_bytes(plain_png((ord(key[0]), ord(key[1]), 0)))
        (folder / f"{name}-{key}.txt").write_text(f"colour {key}")


# ---- tables ----


def write_parquet(folder: Path, name: str, rows: int) -> None:
    folder.mkdir(exist_ok=True)
    images = [plain_png((number, len(name), 7)) for number in range(rows)]
    captions = [f"{name} {number}" for number in range(rows)]
    columns = {"image": images, "caption": captions, "good": [n % 3 for n in range(rows)]}
    pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=4)


def of_parquet(data: Path, *more: str) -> tuple[str, ...]:
    settings = ("source.kind=parquet", f"source.path={data}", "shard_size=3", "images.sizes_px=[16]", "encoders=[]")
    return (*settings, *more)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Name, first row and number of the spans of tables that the driver reads."""
    spans: list[tuple[str, int, int]] = []
    honest = TableRange.read

    def noted(self: TableRange) -> Any:
        spans.extend((span.name, span.first, span.rows) for span in self.spans)
        return honest(self)

    monkeypatch.setattr(TableRange, "read", noted)
    return spans


def test_a_part_of_parquet_reads_no_rows_of_others(
    tmp_path: Path, read: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    for name in "ab":
        write_parquet(data, name, 10)
    settings = of_parquet(data)
    precompute(tmp_path / "one", *settings)
    read.clear()
    run_part(tmp_path / "run", "2/2", *settings)
    assert sorted(set(read)) == [("a", 9, 1), ("b", 0, 2), ("b", 2, 3), ("b", 5, 3), ("b", 8, 2)]
    run_part(tmp_path / "run", "1/2", *settings)
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "one")


@pytest.mark.parametrize("more", [("source.where='good > 0'",), ("source.key_column=caption",)])
def test_where_only_rows_tell_the_shards_the_first_driver_reads_all_and_the_store_is_the_same(
    more: tuple[str, ...], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for name in "aab":
        write_parquet(data, name, 10)
    settings = of_parquet(data, *more)
    one = precompute(tmp_path / "one", *settings)
    for part in ("3/3", "1/3"):
        run_part(tmp_path / "run", part, *settings)
    last = run_part(tmp_path / "run", "2/3", *settings)
    assert last.get("filtered") == one.get("filtered")
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "one")


def test_parts_of_tars_make_the_store_of_one_driver(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        with tarfile.open(data / f"{number}.tar", "w") as archive:
            for place in range(5):
                info = tarfile.TarInfo(f"{place}.png")
                info.size = len(image := plain_png((number, place, 9)))
                archive.addfile(info, io.BytesIO(image))
    settings = of_parquet(data, "source.kind=webdataset", "source.caption_column=null", "shard_size=4")
    precompute(tmp_path / "one", *settings)
    for part in ("2/2", "1/2"):
        run_part(tmp_path / "run", part, *settings)
    assert (tmp_path / "run/input/counted.jsonl").exists()
    assert store_bytes(tmp_path / "run") == store_bytes(tmp_path / "one")


def test_later_input_is_divided_among_all_parts(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_parquet(data, "a", 12)
    settings = of_parquet(data)
    for part in ("1/2", "2/2"):
        run_part(out, part, *settings)
    write_parquet(data, "b", 12)
    first = run_part(out, "2/2", *settings)
    assert (first["shards"], first["tally"]["shards_skipped"]) == ([[2, 4], [6, 8]], 2)
    assert first["missing"] == "1 (never came)" or first["missing"] == "1 (stopped)"
    assert run_part(out, "1/2", *settings)["num_samples"] == 24
    one = tmp_path / "one"
    data_b = (data / "b.parquet").rename(tmp_path / "b.parquet")
    precompute(one, *settings)
    data_b.rename(data / "b.parquet")
    precompute(one, *settings)
    assert store_bytes(out) == store_bytes(one)


def test_input_that_comes_while_parts_are_at_work_is_left_to_the_next_run(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_parquet(data, "a", 6)
    settings = of_parquet(data)
    run_part(out, "1/2", *settings)
    write_parquet(data, "b", 6)
    assert run_part(out, "2/2", *settings)["num_samples"] == 6
    assert [file.name for file in (out / "input").glob("0*")] == ["00001.jsonl"]


def test_another_number_of_parts_may_add_to_a_finished_run(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_parquet(data, "a", 12)
    for part in ("1/2", "2/2"):
        run_part(out, part, *of_parquet(data))
    larger = of_parquet(data, "images.sizes_px=[16,32]")
    for part in ("3/3", "1/3"):
        run_part(out, part, *larger)
    assert run_part(out, "2/3", *larger)["groups_in_store"] == ["images-16", "images-32", "samples"]
    precompute(tmp_path / "one", *larger)
    assert store_bytes(out) == store_bytes(tmp_path / "one")


# ---- at once, killed, on an object store ----


def start(out: str, part: str, *overrides: str) -> subprocess.Popen[bytes]:
    arguments = command(
        "run", "precompute", "--out", out, "--executor", "local", "--quiet", "--part", part, *overrides
    )
    return subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True
    )


@pytest.mark.slow
def test_parts_at_once_that_are_killed_again_and_again_make_the_same_store(tmp_path: Path) -> None:
    settings = (
        "source.num_samples=240",
        "shard_size=4",
        "images.sizes_px=[16]",
        "encoders=[]",
        "execution.num_cpus=1",
    )
    precompute(tmp_path / "one", *settings)
    out, chance = tmp_path / "run", random.Random(0)
    running = {part: start(str(out), f"{part}/3", *settings) for part in (1, 2, 3)}
    kills, end = 0, time.monotonic() + 600
    while running and time.monotonic() < end:
        time.sleep(chance.uniform(0.2, 1.5))
        for part, process in list(running.items()):
            if process.poll() is not None:
                assert process.returncode == 0, process.stderr.read().decode() if process.stderr else ""
                del running[part]
        victim = chance.choice(sorted(running)) if running else 0
        if kills < 6 and running and any((out / "state").glob("samples/*.json")):
            os.killpg(running[victim].pid, signal.SIGKILL)
            running[victim].wait()
            running[victim] = start(str(out), f"{victim}/3", *settings)
            kills += 1
    assert not running
    assert kills >= 3
    assert store_bytes(out) == store_bytes(tmp_path / "one")
    assert not list(out.rglob(".tmp-*"))
    division = read_division(RunFolder(str(out)))
    assert division is not None
    assert division.finished


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.mark.slow
def test_parts_on_an_object_store_make_the_same_store(
    s3: ObjectStore, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{s3.url}/parts-{tmp_path.name}"
    run_part(out, "2/3")
    with RunFolder(out).lock(part=1):
        with pytest.raises(LockedError, match="working on part 1"):
            run_part(out, "1/3")
        with pytest.raises(LockedError, match="working on part 1"):
            precompute(out, *SMALL)  # pyright: ignore[reportArgumentType]
        assert run_part(out, "3/3")["missing"] == "1 (at work)"
    s3.requests.clear()
    assert run_part(out, "1/3")["num_samples"] == 19
    prefix = out.removeprefix("s3://bucket/")
    found = s3.keys(f"{prefix}/store/")
    assert found == store_bytes(whole)
    read_again = [r.key for r in s3.requests.seen if r.kind == "GET" and re.search(r"state/\w+/\d{5}\.json$", r.key)]
    assert read_again == [], "records of other parts are read together"
    run_part(f"{out}-other", "1/2")
    with pytest.raises(StaleOutputError, match=r"max_drop_fraction: 0\.5 -> 0\.3"):
        run_part(f"{out}-other", "2/2", *SMALL, "max_drop_fraction=0.3")


def test_the_input_of_all_parts_is_that_of_the_first(tmp_path: Path) -> None:
    """A file that vanished since is refused by every later part."""
    data, out = tmp_path / "data", tmp_path / "run"
    for name in "ab":
        write_parquet(data, name, 6)
    run_part(out, "1/2", *of_parquet(data))
    (data / "b.parquet").unlink()
    with pytest.raises(StaleOutputError, match=r"b\.parquet: gone"):
        run_part(out, "2/2", *of_parquet(data))
    assert InputPart("b.parquet").path in (out / "input/00001.jsonl").read_text()
