"""`pipeline remove`, and `pipeline inspect --key`: a sample asked for goes everywhere, and does not come back."""

import io
import itertools
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagen_core import store as st
from pipeline.config import load_config
from pipeline.engine.retries import retried_rows
from pipeline.errors import LockedError
from pipeline.options import RunOptions
from pipeline.storage import LocalStorage
from pipeline.storage.files import write_text
from pipeline.storage.run_folder import RunFolder
from stages.store_tools import compact as compaction
from tests.commands import call, tree
from tests.image_server import body, serve
from tests.runs import SMALL, precompute, store_bytes
from workflows.precompute import Precompute, PrecomputeConfig

SECRET = "a caption that nobody else has"
SHARED = "a caption of two"


def pixels(seed: int) -> np.ndarray:
    """A pattern of its own, uint8 (48, 48, 3)."""
    return np.random.default_rng(seed).integers(1, 256, (48, 48, 3), dtype=np.uint8)


def make_folder(source: Path) -> Path:
    """Nine images; number 3 has the secret caption, and shares another one with number 2."""
    source.mkdir()
    for i in range(9):
        Image.fromarray(pixels(i)).save(source / f"{i}.png")
        captions = {2: [SHARED], 3: [SECRET, SHARED]}.get(i, [f"image {i}"])
        (source / f"{i}.txt").write_text("\n".join(captions))
    return source


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of that folder, a finished run that keeps its originals."""
    root = tmp_path_factory.mktemp("finished")
    precompute(root / "run", *arguments(make_folder(root / "images")))
    return root


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "images", tmp_path / "images"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def arguments(folder: Path, *more: str) -> list[str]:
    kept = "keep_originals=true"
    return [f"source.path={folder}", "source.kind=folder", "shard_size=4", "images.sizes_px=[48]", kept, *more]


def places_with(run: Path, needle: bytes) -> list[str]:
    return sorted(name for name in tree(run) if needle in (run / name).read_bytes())


def remove(path: Path, *options: str, code: int = 0) -> dict:
    result = call("remove", str(path), "--json", *options)
    assert result.code == code, result.err
    return json.loads(result.out)


def verified(path: Path) -> dict:
    result = call("verify", str(path), "--json")
    assert result.code == 0, result.out
    return json.loads(result.out)


@pytest.mark.parametrize("store_format", ["parquet", pytest.param("hdf5", marks=pytest.mark.slow)])
def test_after_compaction_nothing_of_the_sample_is_left_and_the_run_is_still_finished(
    folder: Path, run: Path, store_format: str
) -> None:
    config = arguments(folder, f"store.format={store_format}")
    if store_format != "parquet":
        precompute(run, *config, restart=True)
    write_text(run / "report" / "index.html", SECRET)
    file, original = pixels(3).tobytes(), (folder / "3.png").read_bytes()
    sample = next(sample for sample in st.Store.open(run / "store") if sample.key == "3.png")
    embedding = sample.text["t5"][0].tobytes()
    needles = (file, original, SECRET.encode(), embedding)
    assert all(places_with(run, needle) for needle in needles), "the test looks for what is there"
    before = store_bytes(run)

    assert remove(run, "--key", "3.png", "--reason", "by mail")["removed"] == 1
    assert "3.png" not in [sample.key for sample in st.Store.open(run / "store")]
    assert places_with(run, SECRET.encode()), "only hidden so far"
    assert {k: v for k, v in store_bytes(run).items() if k in before and k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }

    assert remove(run, "--compact")["compacted"]["files"] == 4, "samples, images, embeddings, originals of one shard"
    assert not any(places_with(run, needle) for needle in needles)
    assert places_with(run, SHARED.encode()), "the caption of another sample stays"
    found = verified(run)
    assert (found["num_samples"], found["excluded"], found["warnings"]) == (8, {"removed": 1}, [])
    kept = st.Store.open(run / "store")
    assert [sample.key for sample in kept] == [f"{i}.png" for i in range(9) if i != 3]
    assert kept[2].captions == [SHARED]
    np.testing.assert_array_equal(kept[2].images[48], pixels(2))

    after = store_bytes(run)
    summary = precompute(run, *config)
    assert summary["tally"]["shards_skipped"] == 3
    assert store_bytes(run) == after
    assert remove(run, "--compact")["compacted"]["files"] == 0
    assert store_bytes(run) == after


def test_compaction_names_kept_originals_that_are_gone_and_the_run_that_makes_them_again(
    folder: Path, run: Path
) -> None:
    (lost,) = (run / "staging" / "originals").glob("00000.*")
    lost.unlink()
    assert remove(run, "--key", "3.png")["removed"] == 1
    result = call("remove", str(run), "--compact")
    assert result.code == 4
    assert (
        f"staging/originals/{lost.name}: is missing, but was committed; restore it from a copy; or the" in result.err
    )
    precompute(run, *arguments(folder))
    assert remove(run, "--compact")["compacted"]["files"] >= 0
    assert not places_with(run, SECRET.encode())
    assert verified(run)["excluded"] == {"removed": 1}


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden, originals fetched again", "erased, originals kept"])
def test_a_size_added_later_leaves_the_removed_sample_out(folder: Path, run: Path, hidden: bool) -> None:
    remove(run, "--key", "3.png", *([] if hidden else ["--compact"]))
    if hidden:
        RunFolder(run).delete_group("originals")
        shutil.rmtree(run / "staging")
    precompute(run, *arguments(folder, "images.sizes_px=[24,48]"))
    assert [sample.key for sample in st.Store.open(run / "store")] == [f"{i}.png" for i in range(9) if i != 3]
    assert verified(run)["excluded"] == {"removed": 1}
    group = st.load_manifest(run / "store").images[24]
    (path,) = (run / "store" / "images-24").glob("00000.*")
    assert not st.open_images(str(path), "images", group).pixels(3).any(), "its pixels are not made again"


def test_a_store_without_its_run_is_compacted_too(copy_of_small_run: Path, tmp_path: Path) -> None:
    store = tmp_path / "elsewhere"
    shutil.copytree(copy_of_small_run / "store", store)
    sample = st.Store.open(store)[3]
    assert remove(store, "--sha256", sample.sha256, "--compact")["removed"] == 1
    assert not places_with(store, sample.captions[0].encode())
    assert verified(store)["num_samples"] == 18


def compact_and_die(run: Path, step: int) -> None:
    """Compacts as far as the step of that number, which is a write or a deletion."""
    steps = itertools.count(1)

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call_or_die(*given: object) -> object:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given)

        return call_or_die

    for name in ("commit_file", "rewrite_manifest", "_delete"):
        setattr(compaction, name, dying(getattr(compaction, name)))
    LocalStorage.write_json = dying(LocalStorage.write_json)  # type: ignore[method-assign]
    compaction.compact(run / "store", RunFolder(run))


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_compaction_that_lost_the_folder_deletes_no_file(copy_of_small_run: Path, last: int) -> None:
    """Before its only shard, before the switch to the new files, and before the deletion of the old ones."""
    run, calls = copy_of_small_run, itertools.count(1)
    remove(run, "--key", st.Store.open(run / "store")[3].key)
    files = [path for path in (run / "store").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}

    def check() -> None:
        if next(calls) == last:
            raise LockedError("lost")

    with pytest.raises(LockedError):
        compaction.compact(run / "store", RunFolder(run), check=check)
    changed = [path.name for path in files if path.read_bytes() != before[path]]
    assert changed == ([] if last < 3 else ["manifest.json"])


@pytest.mark.parametrize(
    "kills", [4, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6, 7, 15, 17, 18, 21))]
)
def test_compaction_killed_anywhere_leaves_the_old_or_the_new_store_and_goes_on(
    copy_of_small_run: Path, kills: int
) -> None:
    run = copy_of_small_run
    samples = [st.Store.open(run / "store")[i] for i in (3, 12)]
    remove(run, "--key", samples[0].key, "--key", samples[1].key)
    kept = [sample.key for sample in st.Store.open(run / "store")]
    child = os.fork()
    if child == 0:
        try:
            compact_and_die(run, kills)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [sample.key for sample in st.Store.open(run / "store")] == kept
    assert verified(run)["num_samples"] == 17
    if kills == 6:  # between the records of a shard
        precompute(run, *SMALL)
        assert verified(run)["num_samples"] == 17
    remove(run, "--compact")
    assert verified(run)["warnings"] == []
    assert not any(places_with(run, caption.encode()) for sample in samples for caption in sample.captions)
    after = store_bytes(run)
    precompute(run, *SMALL)
    assert store_bytes(run) == after


def test_what_was_removed_does_not_come_back_with_new_rows_or_a_restart(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    digest = st.Store.open(run / "store")[5].sha256
    (tmp_path / "keys.txt").write_text("3.png\n\n10.png\n")
    found = remove(run, "--key", str(tmp_path / "keys.txt"), "--sha256", digest)
    assert (found["removed"], found["unmatched"]) == (2, {"key": ["10.png"]})
    for name in ("10", "11"):
        Image.fromarray(pixels(int(name))).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"image {name}")
    shutil.copy(folder / "5.png", folder / "12.png")
    (folder / "12.txt").write_text("the same image again")
    workflow = Precompute(load_config(PrecomputeConfig, None, [*arguments(folder), "shard_size=5"]))
    workflow.run(run, RunOptions("inline", restart=True, quiet=True))
    keys = {sample.key for sample in st.Store.open(run / "store")}
    assert keys == {f"{i}.png" for i in (0, 1, 2, 4, 6, 7, 8, 11)}
    found = verified(run)
    assert (found["input_rows"], found["dropped"], found["excluded"]) == (12, {"removed": 4}, {})
    assert not places_with(run, SECRET.encode()), "a row that is dropped leaves nothing"
    workflow.run(run, RunOptions("inline", retry_dropped=("all",), quiet=True))
    assert not (run / "retries").exists(), "nobody tries them again"


def test_a_run_that_has_not_finished_can_be_removed_from(folder: Path, run: Path) -> None:
    (run / "store" / "manifest.json").unlink()
    assert remove(run, "--key", "3.png", "--compact")["removed"] == 1
    precompute(run, *arguments(folder))
    assert verified(run)["excluded"] == {"removed": 1}
    assert len(st.Store.open(run / "store")) == 8


def test_a_sample_that_a_retry_brought_goes_from_the_lists_of_retries_too(tmp_path: Path) -> None:
    broken = tmp_path / "images"
    broken.mkdir()
    for i in range(4):
        Image.fromarray(pixels(i)).save(broken / f"{i}.png")
        (broken / f"{i}.txt").write_text(SECRET if i == 1 else f"image {i}")
    held = (broken / "1.png").read_bytes()
    (broken / "1.png").write_bytes(b"x" * len(held))
    run, config = tmp_path / "run", arguments(broken)
    precompute(run, *config)
    (broken / "1.png").write_bytes(held)
    workflow = Precompute(load_config(PrecomputeConfig, None, config))
    workflow.run(run, RunOptions("inline", retry_dropped=("all",), quiet=True))
    shown = json.loads(call("inspect", str(run), "--key", "1.png", "--json").out)["found"]
    assert [(entry["fate"], entry["shard"]) for entry in shown] == [("stored", 10_000_000), ("dropped", 0)]
    assert shown[0]["retry_of"] == {"shard": 0, "input_row": 1}
    assert places_with(run, SECRET.encode())
    remove(run, "--key", "1.png", "--compact")
    assert places_with(run, SECRET.encode()) == []
    assert retried_rows(RunFolder(run)) == {0: {1}}
    after = store_bytes(run)
    assert precompute(run, *config)["tally"]["shards_skipped"] == 2
    assert store_bytes(run) == after
    assert verified(run)["num_samples"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "identifier", ["key", *(pytest.param(name, marks=pytest.mark.slow) for name in ("url", "sha256"))]
)
def test_caption_url_and_transcription_of_a_retried_sample_are_in_no_file_of_the_run_after_compaction(
    tmp_path: Path, identifier: str
) -> None:
    def png(seed: int) -> bytes:
        data = io.BytesIO()
        Image.fromarray(pixels(seed)).save(data, "PNG")
        return data.getvalue()

    with serve({f"/{i}.png": body(png(i)) for i in range(4)}) as server:
        secret_url, transcription = server.url("/secret/1.png"), "WRITTEN IN THE IMAGE"
        rows = [{"url": server.url(f"/{i}.png"), "caption": f"image {i}", "text": f"TEXT {i}"} for i in range(4)]
        rows[1] = {"url": secret_url, "caption": SECRET, "text": transcription}
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = ["source.kind=urls", f"source.path={tmp_path / 'list.jsonl'}", "source.transcription_column=text"]
        download = ["source.download.retries=0", "source.download.allow_private_addresses=true"]
        config = [*source, *download, "shard_size=4", "images.sizes_px=[48]", "keep_originals=true"]
        run, needles = tmp_path / "run", [secret_url.encode(), SECRET.encode(), transcription.encode()]
        workflow = Precompute(load_config(PrecomputeConfig, None, config))
        workflow.run(run, RunOptions("inline", quiet=True))
        workflow.run(run, RunOptions("inline", retry_dropped=("http_404",), quiet=True))
        server.routes = {**server.routes, "/secret/1.png": body(png(1))}
        workflow.run(run, RunOptions("inline", retry_dropped=("http_404",), quiet=True))
        (sample,) = [sample for sample in st.Store.open(run / "store") if sample.url == secret_url]
        assert (sample.captions, sample.transcription) == ([SECRET], transcription)
        for needle in needles:
            found = {name.split("/")[0] for name in places_with(run, needle)}
            assert found == {"retries", "staging", "store"}, "the test looks for what is there"
        remove(run, f"--{identifier}", str(getattr(sample, identifier)))
        remove(run, "--compact")
        assert {needle: places_with(run, needle) for needle in needles} == {needle: [] for needle in needles}
        assert places_with(run, b"TEXT 2"), "the transcription of another sample stays"
        assert retried_rows(RunFolder(run)) == {0: {1}, 10_000_000: {0}}
        after = store_bytes(run)
        assert precompute(run, *config)["tally"]["shards_skipped"] == 3
        assert store_bytes(run) == after
        assert verified(run)["num_samples"] == 3


def test_kept_originals_of_rows_that_are_no_samples_go_too(tmp_path: Path, folder: Path) -> None:
    Image.fromarray(pixels(3)[:20, :20]).save(folder / "3.png")
    small, run = (folder / "3.png").read_bytes(), tmp_path / "other"
    precompute(run, *arguments(folder))
    (tmp_path / "keys").write_text("3.png\n")
    assert places_with(run, small)
    found = remove(run, "--key", str(tmp_path / "keys"), "--compact")
    assert (found["removed"], found["unmatched"]) == (0, {"key": ["3.png"]})
    assert not places_with(run, small)
    assert not places_with(run, SECRET.encode())
    (tar,) = (run / "staging" / "originals").glob("00000.*")
    with tarfile.open(fileobj=io.BytesIO(tar.read_bytes())) as archive:
        assert archive.getnames() == [f"0000000{i}.{end}" for i in range(4) for end in ("json", "png")][:-1]


def test_the_lineage_of_a_sample_is_told_before_and_after_its_removal(copy_of_small_run: Path) -> None:
    run = copy_of_small_run
    sample = st.Store.open(run / "store")[9]
    for name, value in (("key", sample.key), ("url", sample.url or ""), ("sha256", sample.sha256)):
        (found,) = json.loads(call("inspect", str(run), f"--{name}", value, "--json").out)["found"]
        assert (found["fate"], found["shard"], found["row"], found["input_row"]) == ("stored", 1, 2, 2)
        assert (found["key"], found["url"], found["sha256"]) == (sample.key, sample.url, sample.sha256)
        assert [caption["text"] for caption in found["captions"]] == sample.captions
        text = found["groups"]["text-t5"]
        assert text["rows"] == [caption["id"] for caption in found["captions"]]
        assert text["shapes"] == [list(x.shape) for x in sample.text["t5"]]
        assert (text["file"], text["dtype"]) == ("text-t5/00001.parquet", "float16")
        assert text["encoder"]["model"] == "tiny-random-t5"
        assert found["groups"]["images-16"] == {"file": "images-16/00001.parquet", "rows": [2]}
    dropped = call("inspect", str(run), "--key", "000000002")
    assert dropped.out == "dropped from samples of shard 00000, row 2: http_404 (HTTP Error 404: Not Found)\n"
    unknown = call("inspect", str(run), "--key", "nobody")
    assert (unknown.code, unknown.out) == (1, "key nobody: unknown: no sample, removed or dropped row has it\n")

    remove(run, "--key", sample.key, "--reason", "by mail")
    hidden = call("inspect", str(run), "--key", sample.key).out.splitlines()
    assert hidden[0].startswith("removed from shard 00001 row 2 on 20")
    assert hidden[0].endswith(" (removal 1): by mail")
    assert f"  url        {sample.url}" in hidden
    remove(run, "--compact")
    for name, value in (("key", sample.key), ("url", sample.url or ""), ("sha256", sample.sha256)):
        assert call("inspect", str(run), f"--{name}", value).out == hidden[0] + "\n"
    remove(run, "--url", "https://elsewhere/x.png")
    assert call("inspect", str(run), "--url", "https://elsewhere/x.png").out.startswith("blocked on 20")


def test_the_command_says_what_it_did_and_a_dry_run_writes_nothing(copy_of_small_run: Path) -> None:
    run = copy_of_small_run
    before = {name: (run / name).read_bytes() for name in tree(run)}
    options = ("--key", "000000004", "--url", "synthetic://0/000000012.png", "--url", "https://elsewhere/x.png")
    shown = call("remove", str(run), *options, "--dry-run")
    unmatched = "1 values match no sample; they are refused if they come later:\n  url https://elsewhere/x.png\n"
    assert (shown.code, shown.out) == (0, "2 samples would be removed, in 2 shards\n" + unmatched)
    assert {name: (run / name).read_bytes() for name in tree(run)} == before
    assert call("remove", str(run), *options).out == "2 samples removed, in 2 shards\n" + unmatched
    again = call("remove", str(run / "store"), *options[:2])
    assert again.out == "0 samples removed, in 0 shards\n1 values are of samples that were removed before\n"
    assert call("inspect", str(run)).out.splitlines()[1] == "  2 samples removed, in 1 removals"


def test_a_far_store_is_removed_from_but_not_compacted(small_run: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(small_run / "store"), "memory://far-removal/store", recursive=True)
    place = "memory://far-removal"
    assert json.loads(call("remove", place, "--key", "000000004", "--json").out)["removed"] == 1
    assert len(st.Store.open(f"{place}/store")) == 18
    refused = call("remove", place, "--compact")
    assert (refused.code, "--compact: memory://far-removal is not on this machine" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to remove: give --key, --url or --sha256"),
        (("--key", "keys.txt"), "--key keys.txt: neither a file nor the key of a sample"),
        (("--url", "urls.txt"), "--url: no such file, and 'urls.txt' is not a URL"),
        (("--sha256", "abc"), "--sha256: no such file, and 'abc' is not 64 hex digits"),
        (("--sha256", "FILE"), "'000000004' is not 64 hex digits"),
        (("--key", "000000004"), "is a file, and the key of a sample too; give ./000000004 for the file"),
    ],
)
def test_what_is_mistyped_or_ambiguous_is_refused(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("000000004").write_text("000000005\n")
    Path("FILE").write_text("000000004\n")
    result = call("remove", str(small_run), *options)
    assert result.code == 2
    assert message in result.err
    assert not (small_run / "store" / "removed").exists()
