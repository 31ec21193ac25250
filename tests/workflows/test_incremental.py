"""Nightly runs of one folder: new input is added to the store, and what is there stays as it is."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imagen_core.store import Store, verify_store
from pipeline.errors import StaleOutputError
from stages.precompute.resize import ResizeStage
from tests.commands import call, tree
from tests.commands import precompute as command
from tests.image_server import Server, body, first_then, serve, status
from tests.images import plain_png
from tests.runs import events, precompute, store_bytes


def colour(key: str) -> bytes:
    return plain_png((ord(key[0]), ord(key[1]), 0))


def write_images(folder: Path, name: str, keys: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    for key in keys:
        (folder / f"{name}-{key}.png").write_bytes(colour(key))
        (folder / f"{name}-{key}.txt").write_text(f"colour {key}")


def write_table(folder: Path, name: str, keys: Sequence[str]) -> None:
    """Appends to the one table."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "captions.tsv").open("a") as table:
        if not table.tell():
            table.write("file\tcaption\n")
        for key in keys:
            (folder / "images" / f"{key}.png").write_bytes(colour(key))
            table.write(f"{key}.png\tcolour {key}\n")


def write_tar(folder: Path, name: str, keys: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{name}.tar", "w") as archive:
        for key in keys:
            for member, data in ((f"{key}.png", colour(key)), (f"{key}.txt", f"colour {key}".encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def write_parquet(folder: Path, name: str, keys: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    columns = {"image": [colour(key) for key in keys], "caption": [f"colour {key}" for key in keys]}
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")


Write = Callable[[Path, str, Sequence[str]], None]
KINDS: dict[str, tuple[str, Write]] = {
    "folder": ("folder", write_images),
    "table": ("folder", write_table),
    "webdataset": ("webdataset", write_tar),
    "parquet": ("parquet", write_parquet),
}
SMALL = ("images.sizes_px=[16]", "shard_size=2", "execution.num_cpus=1")


def config(kind: str, data: Path) -> list[str]:
    return [f"source.kind={KINDS[kind][0]}", f"source.path={data}", *SMALL, "encoders=[]"]


def captions(out: Path) -> list[str]:
    return [sample.captions[0].removeprefix("colour ") for sample in Store.open(out / "store")]


def times(out: Path) -> dict[str, int]:
    return {name: (out / name).stat().st_mtime_ns for name in tree(out) if name.startswith(("store/", "state/"))}


class Killer:
    """Ends the run at its first task, at its second, and so on, until none is left to do."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.allowed = 0
        honest = ResizeStage.process

        def process(stage: ResizeStage, task: object) -> None:
            self.allowed -= 1
            if self.allowed < 0:
                raise KeyboardInterrupt
            honest(stage, task)  # type: ignore[arg-type]

        patch.setattr(ResizeStage, "process", process)

    def run(self, out: Path, *overrides: str) -> int:
        """Returns the number of kills."""
        for kills in range(100):
            self.allowed = kills % 2
            try:
                precompute(out, *overrides)
            except KeyboardInterrupt:
                continue
            return kills
        raise AssertionError("never ends")


@pytest.mark.parametrize(
    "kind", [kind if kind == "table" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_two_nights_make_the_same_store_however_often_they_are_killed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, data, out = KINDS[kind][1], tmp_path / "data", tmp_path / "run"
    overrides = config(kind, data)
    write(data, "m", ["aa", "ab", "ac"])
    assert precompute(out, *overrides)["num_samples"] == 3
    shutil.copytree(data, tmp_path / "first")
    before, touched = store_bytes(out), times(out)
    write(data, "c", ["ba", "bb"])
    write(data, "x", ["ca"])
    summary = precompute(out, *overrides)
    tally = summary["tally"]
    assert (summary["num_samples"], tally["input_rows"], tally["shards"], tally["shards_skipped"]) == (6, 6, 4, 2)
    assert captions(out) == ["aa", "ab", "ac", "ba", "bb", "ca"]
    assert all(store_bytes(out)[name] == content for name, content in before.items() if name != "manifest.json")
    later = times(out)
    assert all(later[name] == time for name, time in touched.items() if name != "store/manifest.json")
    assert verify_store(out / "store").ok

    killer, killed = Killer(monkeypatch), tmp_path / "killed"
    data.rename(tmp_path / "both")
    (tmp_path / "first").rename(data)
    kills = killer.run(killed, *overrides)
    shutil.copytree(tmp_path / "both", data, dirs_exist_ok=True)
    kills += killer.run(killed, *overrides)
    assert kills >= 4
    assert store_bytes(killed) == store_bytes(out)

    killer.allowed = 0
    tasks = len(events(out))
    assert precompute(out, *overrides)["tally"]["shards_skipped"] == 4, "nothing new, nothing done"
    assert [event["event"] for event in events(out)[tasks:]] == ["run_started", "run_ended"]


def test_a_plan_shows_the_shards_that_would_be_added_and_writes_nothing(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_images(data, "m", ["aa", "ab", "ac"])
    precompute(out, *config("folder", data))
    write_images(data, "a", ["ba"])
    before = {name: (out / name).read_bytes() for name in tree(out)}
    for arguments in (["plan", "precompute"], ["run", "precompute", "--dry-run"]):
        result = call(*arguments, "--out", str(out), "--json", *config("folder", data))
        planned = json.loads(result.out)
        assert (planned["shards"], planned["input_rows"]) == (3, 4)
        found = planned["groups"]["images-16"]
        assert (found["shards_done"], found["shards_to_do"]) == (2, 1)
    assert {name: (out / name).read_bytes() for name in tree(out)} == before


def test_a_run_folder_of_an_earlier_version_is_continued_with_the_input_it_was_made_from(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_images(data, "m", ["aa", "ab", "ac"])
    precompute(out, *config("folder", data))
    before = store_bytes(out)
    shutil.rmtree(out / "input")
    write_images(data, "n", ["ba"])
    with pytest.raises(StaleOutputError, match="shard 00001 of samples was made from other input rows"):
        precompute(out, *config("folder", data))
    assert not (out / "input").exists()
    (data / "n-ba.png").unlink()
    assert precompute(out, *config("folder", data))["tally"]["shards_skipped"] == 2
    assert store_bytes(out) == before
    write_images(data, "a", ["ba"])
    precompute(out, *config("folder", data))
    assert captions(out) == ["aa", "ab", "ac", "ba"]


def test_rows_appended_to_a_table_whose_other_rows_changed_are_refused_and_not_noted(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_table(data, "", ["aa", "ab", "ac"])
    precompute(out, *config("table", data))
    before, former = {name: (out / name).read_bytes() for name in tree(out)}, (data / "captions.tsv").read_text()
    (data / "captions.tsv").write_text(former.replace("colour ac", "colour xx"))
    write_table(data, "", ["ba"])
    with pytest.raises(StaleOutputError, match="shard 00001 of samples was made from other input rows"):
        precompute(out, *config("table", data))
    assert {name: (out / name).read_bytes() for name in tree(out)} == before
    (data / "captions.tsv").write_text(former)
    write_table(data, "", ["ba"])
    assert precompute(out, *config("table", data))["num_samples"] == 4
    (data / "captions.tsv").write_text("file\tcaption\naa.png\tcolour aa\n")
    with pytest.raises(StaleOutputError, match=r"captions\.tsv: 4 rows then, 1 now"):
        precompute(out, *config("table", data))
    assert precompute(out, *config("table", data), restart=True)["num_samples"] == 1


def test_one_image_less_rebuilds_its_batch_alone_with_restart(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_images(data, "m", ["aa", "ab"])
    precompute(out, *config("folder", data))
    write_images(data, "c", ["ba", "bb"])
    precompute(out, *config("folder", data))
    touched = times(out)
    (data / "c-bb.png").unlink()
    result = command(out, *config("folder", data))
    assert (result.code, "c-bb.png: gone" in result.err, times(out) == touched) == (2, True, True)
    precompute(out, *config("folder", data), restart=True)
    assert captions(out) == ["aa", "ab", "ba"]
    later, files = times(out), [f"store/samples/0000{i}.parquet" for i in range(2)]
    assert [later[file] == touched[file] for file in files] == [True, False]
    assert verify_store(out / "store").ok


@pytest.fixture
def server() -> Iterator[Server]:
    flaky = first_then(status(503), body(plain_png()))
    with serve({"/bad1": flaky, "/bad2": flaky, **{f"/good{i}": body(plain_png()) for i in range(5)}}) as server:
        yield server


def test_batches_and_rounds_of_retries_take_turns(server: Server, tmp_path: Path) -> None:
    lists, out = tmp_path / "lists", tmp_path / "run"
    lists.mkdir()
    download = "source.download={retries: 0, allow_private_addresses: true}"
    overrides = ["source.kind=urls", f"source.path={lists}", download, *SMALL, "encoders=[]"]

    def add(name: str, *images: str) -> None:
        lines = [f"{server.url('/' + image)}\t{image}" for image in images]
        (lists / name).write_text("\n".join(["url\tcaption", *lines, ""]))

    def run(*options: str) -> tuple[int, int]:
        result = command(out, *overrides, *options)
        assert result.code == 0, result.err
        found = json.loads((out / "summary.json").read_text())
        assert verify_store(out / "store").ok
        return found["num_samples"], found["tally"]["input_rows"]

    add("m.tsv", "good0", "bad1", "good1")
    assert run() == (2, 3)
    add("a.tsv", "bad2", "good2")
    assert run() == (3, 5)
    assert run("--retry-dropped", "http_503") == (5, 5)
    touched = times(out)
    add("b.tsv", "good3", "gone")
    assert run("--retry-dropped", "all") == (6, 7)
    assert run("--retry-dropped", "http_404") == (6, 7)
    later = times(out)
    assert all(later[name] == time for name, time in touched.items() if name != "store/manifest.json")
    store = Store.open(out / "store")
    assert [(sample.key, sample.captions[0]) for sample in store] == [
        ("000000000", "good0"),
        ("000000002", "good1"),
        ("000000004", "good2"),
        ("000000005", "good3"),
        ("000000001", "bad1"),
        ("000000003", "bad2"),
    ]


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_dropped_rows_of_equally_named_files_are_retried_from_their_own(kind: str, tmp_path: Path) -> None:
    write, data, out = KINDS[kind][1], tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for day, key in (("day1", "aa"), ("day2", "ba")):
        write(data / day, "0", [key])
        precompute(out, *config(kind, data), "max_drop_fraction=1", "images.sizes_px=[64]")
    result = command(out, *config(kind, data), "max_drop_fraction=1", "images.sizes_px=[64]", "--retry-dropped", "all")
    assert result.code == 0, result.err
    tally = json.loads((out / "summary.json").read_text())["tally"]
    assert (tally["shards_failed"], tally["input_rows"], tally["groups"]["samples"]["drops"]) == (
        0,
        2,
        {"too_small": 2},
    )
