import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from imagen_core.store import Store
from stages.hub import push
from tests.commands import call, tree
from tests.hub_server import READER, WRITER, Blob, Hub, Repository
from tests.runs import REPOSITORY, SMALL, precompute, store_bytes

DATASET = "datasets/me/scenes"
NUM_LARGE = 13
"""Files of the small store that the hub stores as large: 4 groups of 3 shards, and one null embedding."""


def talk_to(hub: Hub, *arguments: str) -> list[str]:
    """A command line of its own process that talks to this hub; what the tests' guard sets is set again."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER}
    code = f"import os; os.environ |= {settings}; from pipeline.cli.main import main; main()"
    return [sys.executable, "-c", code, *arguments]


def metadata(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def cells(card: bytes) -> dict[str, list[str]]:
    """The rows of the card's tables by their first cell."""
    rows = [line[2:-2].split(" | ") for line in card.decode().splitlines() if line.startswith("| ")]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_a_pushed_store_is_the_local_one_and_a_card(hub: Hub, small_run: Path) -> None:
    result = call("push", str(small_run), "me/scenes", "--json")
    assert result.code == 0, result.err
    files = hub.repositories[DATASET].files()
    del files["README.md"]
    assert files == store_bytes(small_run)
    told = json.loads(result.out)
    assert (told["repository"], told["form"], told["files"], told["added_files"]) == (DATASET, "store", 15, 15)
    assert told["bytes"] == told["added_bytes"] == sum(map(len, files.values()))
    assert told["commit"] == hub.repositories[DATASET].commit("main")
    assert len(hub.uploads) == len(set(hub.uploads)) == NUM_LARGE
    assert not hub.repositories[DATASET].private


def test_a_second_push_sends_nothing(hub: Hub, small_run: Path) -> None:
    assert call("push", str(small_run), "me/scenes", "--license", "mit").code == 0
    commits = len(hub.repositories[DATASET].commits)
    result = call("push", str(small_run / "store"), "datasets/me/scenes", "--json")
    assert json.loads(result.out)["added_files"] == 0
    assert json.loads(result.out)["commit"] is None
    assert (len(hub.uploads), len(hub.repositories[DATASET].commits)) == (NUM_LARGE, commits)


def test_the_manifest_comes_last(hub: Hub, small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "_COMMIT_FILES", 4)
    assert call("push", str(small_run), "me/scenes").code == 0
    commits = [set(files) for files in hub.repositories[DATASET].commits.values()]
    assert [len(files) for files in commits] == [1, 5, 9, 13, 15, 17]
    assert ["manifest.json" in files for files in commits] == [False] * 5 + [True]


def test_a_push_goes_on_where_it_ended(hub: Hub, small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "_COMMIT_FILES", 4)
    hub.quota = 6
    result = call("push", str(small_run), "me/scenes")
    assert result.code == 4
    assert "Storage quota exceeded" in result.err
    assert len(result.err.splitlines()) == 1
    assert "manifest.json" not in hub.repositories[DATASET].files()
    hub.quota = None
    assert call("push", str(small_run), "me/scenes").code == 0
    assert len(hub.uploads) == len(set(hub.uploads)) == NUM_LARGE
    files = hub.repositories[DATASET].files()
    assert {name: data for name, data in files.items() if name != "README.md"} == store_bytes(small_run)


@pytest.mark.slow
def test_a_killed_push_sends_only_the_rest_afterwards(hub: Hub, small_run: Path) -> None:
    hub.limit = 5
    arguments = talk_to(hub, "push", str(small_run), "me/scenes")
    with subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as process:
        assert hub.hanging.wait(120)
        process.send_signal(signal.SIGKILL)
    sent = list(hub.uploads)
    assert 5 <= len(sent) < NUM_LARGE
    hub.limit = None
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.uploads[: len(sent)] == sent
    assert len(hub.uploads) == len(set(hub.uploads)) == NUM_LARGE
    files = hub.repositories[DATASET].files()
    assert {name: data for name, data in files.items() if name != "README.md"} == store_bytes(small_run)


def test_the_card_says_what_the_store_is(hub: Hub, small_run: Path) -> None:
    assert call("push", str(small_run), "me/scenes", "--license", "cc-by-4.0").code == 0
    card = hub.repositories[DATASET].files()["README.md"]
    assert metadata(card) == {
        "license": "cc-by-4.0",
        "task_categories": ["text-to-image"],
        "tags": ["imagen-precompute", "text-embeddings"],
        "size_categories": ["n<1K"],
        "configs": [{"config_name": "samples", "data_files": "samples/*.parquet"}],
    }
    rows = cells(card)
    manifest = Store.open(small_run / "store").manifest
    size = sum(map(len, store_bytes(small_run).values()))
    assert rows["samples"][0] in ("19", "parquet")
    assert rows["input rows"] == ["20"]
    assert rows["dropped"] == ["1 (http_404 1)"]
    assert rows["removed"] == ["0"]
    assert rows["bytes"][0].startswith(f"{size:,} (")
    assert rows["source"] == ["`synthetic: split train`"]
    assert rows["licence"] == ["cc-by-4.0"]
    assert rows["sha256 of the manifest"] == [f"`{manifest.sha256}`"]
    assert rows["images-48"][0] == "images of 48 px, raw, parquet"
    assert rows["t5"][:7] == ["`tiny-random-t5`", "-", "none", "bfloat16", "float16", "64", "128"]


def test_the_python_of_the_card_runs(
    hub: Hub, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("push", str(small_run), "me/scenes").code == 0
    card = hub.repositories[DATASET].files()["README.md"].decode()
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    Path("STORE").symlink_to(small_run / "store")
    names: dict = {}
    exec(code, names)
    assert next(iter(names["loader"]))["text"].shape[0] == 2


def test_a_licence_stays_until_another_one_is_given(hub: Hub, small_run: Path) -> None:
    def licence(*options: str) -> str:
        assert call("push", str(small_run), "me/scenes", *options).code == 0
        return metadata(hub.repositories[DATASET].files()["README.md"])["license"]

    assert [licence(), licence("--license", "mit"), licence(), licence("--license", "apache-2.0")] == [
        "unknown",
        "mit",
        "mit",
        "apache-2.0",
    ]


def test_an_unknown_licence_is_refused_before_anything_is_sent(hub: Hub, small_run: Path) -> None:
    result = call("push", str(small_run), "me/scenes", "--license", "mine")
    assert result.code == 2
    assert "give a --license that the hub knows" in result.err
    assert hub.uploads == []


def test_removed_samples_are_not_pushed_until_they_are_erased(hub: Hub, copy_of_small_run: Path) -> None:
    run = str(copy_of_small_run)
    assert call("push", run, "me/scenes").code == 0
    sample = Store.open(copy_of_small_run / "store")[4]
    old = store_bytes(copy_of_small_run)
    assert call("remove", run, "--key", sample.key, "--reason", "opt-out").code == 0
    refused = call("push", run, "me/scenes")
    assert refused.code == 2
    assert "1 removed samples are still in its files" in refused.err
    assert f"pipeline remove {run} --compact" in refused.err
    assert call("remove", run, "--compact").code == 0
    result = call("push", run, "me/scenes")
    assert result.code == 0, result.err
    files = hub.repositories[DATASET].files()
    card = files.pop("README.md")
    assert files == store_bytes(copy_of_small_run)
    gone = sorted(set(old) - set(files))
    assert gone == [f"{group}/00000.parquet" for group in ("images-16", "images-48", "samples", "text-t5")]
    assert "4 files were deleted, but the history of the repository still has them" in result.out
    assert cells(card)["removed"] == ["1 in 1 removals"]
    assert not any(sample.captions[0].encode() in data for data in files.values())
    kept = [data for commit in list(hub.repositories[DATASET].commits.values())[-1:] for data in commit.values()]
    assert all(blob.data not in {old[name] for name in gone} for blob in kept)


def test_a_store_behind_a_url_is_pushed_and_compacted_nowhere_else(hub: Hub, small_run: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(small_run / "store"), "memory://far-push/store", recursive=True)
    assert call("push", "memory://far-push", "me/scenes").code == 0
    files = hub.repositories[DATASET].files()
    assert {name: data for name, data in files.items() if name != "README.md"} == store_bytes(small_run)
    key = Store.open(small_run / "store")[4].key
    assert call("remove", "memory://far-push", "--key", key).code == 0
    refused = call("push", "memory://far-push/store", "me/scenes")
    assert (refused.code, "compact a local copy" in refused.err) == (2, True)


@pytest.mark.slow
def test_a_store_that_is_changed_while_it_is_pushed_gets_no_manifest(
    hub: Hub, copy_of_small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_of_small_run / "store"
    key = Store.open(store)[4].key
    remove = talk_to(hub, "remove", str(copy_of_small_run), "--key", key)
    monkeypatch.setattr(hub, "first_upload", lambda: subprocess.run(remove, cwd=REPOSITORY, check=True))
    result = call("push", str(copy_of_small_run), "me/scenes")
    assert (result.code, "was changed while it was pushed" in result.err) == (2, True)
    assert "manifest.json" not in hub.repositories[DATASET].files()


@pytest.mark.slow
def test_while_files_are_replaced_the_repository_has_no_manifest(hub: Hub, small_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    precompute(other, *SMALL, "source.seed=5")
    assert call("push", str(small_run), "me/scenes").code == 0
    before = len(hub.repositories[DATASET].commits)
    assert call("push", str(other), "me/scenes").code == 0
    commits = list(hub.repositories[DATASET].commits.values())[before:]
    assert ["manifest.json" in commit for commit in commits] == [False, True]
    files = hub.repositories[DATASET].files()
    del files["README.md"]
    assert files == store_bytes(other)


def test_a_damaged_file_is_not_pushed(hub: Hub, copy_of_small_run: Path) -> None:
    path = copy_of_small_run / "store/images-48/00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = call("push", str(copy_of_small_run), "me/scenes")
    assert result.code == 2
    assert "images-48/00001.parquet" in result.err
    assert "manifest.json" not in hub.repositories[DATASET].files()


def test_half_a_store_is_refused(hub: Hub, copy_of_small_run: Path) -> None:
    (copy_of_small_run / "store/manifest.json").unlink()
    for place, wrong in ((copy_of_small_run, "is not finished"), (copy_of_small_run / "store", "no complete store")):
        result = call("push", str(place), "me/scenes")
        assert (result.code, wrong in result.err) == (2, True), result.err
    assert hub.repositories == {}


def test_what_is_nothing_of_the_kind_is_refused(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no store")
    for place in (tmp_path, tmp_path / "absent"):
        result = call("push", str(place), "me/scenes")
        assert result.code == 2
        assert "is neither a store, nor an export of one, nor a trained model" in result.err
    assert hub.repositories == {}


@pytest.mark.parametrize("repo", ["scenes", "spaces/me/x", "me/x/y", "me/..x", "https://huggingface.co/me/x", ""])
def test_a_wrong_name_of_a_repository_is_refused(hub: Hub, small_run: Path, repo: str) -> None:
    result = call("push", str(small_run), repo)
    assert result.code == 2
    assert "give USER/NAME" in result.err


def test_a_store_is_no_model(hub: Hub, small_run: Path) -> None:
    result = call("push", str(small_run), "models/me/scenes")
    assert result.code == 2
    assert "a store is pushed as a dataset" in result.err
    result = call("push", str(small_run), "me/scenes", "--weights", "model")
    assert (result.code, "--weights model" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("token", "code", "words"),
    [
        (None, 4, "the hub wants a token"),
        ("hf_secret0123456789", 4, "the hub does not accept the token"),
        (READER, 4, "the hub refuses"),
    ],
)
def test_a_token_that_is_missing_or_wrong_is_one_line_without_it(
    hub: Hub, small_run: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, code: int, words: str
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    result = call("push", str(small_run), "me/scenes")
    assert (result.code, len(result.err.splitlines())) == (code, 1)
    assert words in result.err
    assert "hf auth login" in result.err
    assert token is None or token not in result.err + result.out


def test_a_hub_in_trouble_is_worth_another_try(hub: Hub, small_run: Path) -> None:
    hub.trouble = 501
    result = call("push", str(small_run), "me/scenes")
    assert (result.code, len(result.err.splitlines())) == (75, 1)
    assert "the hub answers 501" in result.err


def test_a_private_repository_is_made_and_a_public_one_is_not_taken_for_one(hub: Hub, small_run: Path) -> None:
    assert call("push", str(small_run), "me/secret", "--private").code == 0
    assert hub.repositories["datasets/me/secret"].private
    hub.repositories[DATASET] = Repository()
    hub.repositories[DATASET].add("main", {})
    result = call("push", str(small_run), "me/scenes", "--private")
    assert result.code == 2
    assert "exists and is public" in result.err
    assert hub.repositories[DATASET].files() == {}


def test_a_branch_is_made_and_main_stays(hub: Hub, small_run: Path) -> None:
    assert call("push", str(small_run), "me/scenes", "--revision", "v1").code == 0
    assert call("push", str(small_run), "me/scenes", "--revision", "v1").code == 0
    repository = hub.repositories[DATASET]
    assert repository.files("main") == {}
    assert "manifest.json" in repository.files("v1")


def test_a_repository_with_something_else_is_left_alone(hub: Hub, small_run: Path) -> None:
    hub.repositories[DATASET] = Repository()
    hub.repositories[DATASET].add("main", {"data/store.json": Blob(b"{}", False), "notes.txt": Blob(b"mine", False)})
    result = call("push", str(small_run), "me/scenes")
    assert result.code == 2
    assert "holds an export (data/store.json)" in result.err
    hub.repositories[DATASET].add("main", {"notes.txt": Blob(b"mine", False)})
    assert call("push", str(small_run), "me/scenes").code == 0
    assert hub.repositories[DATASET].files()["notes.txt"] == b"mine"


def test_an_export_is_pushed_with_its_lineage(hub: Hub, copy_of_small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    arguments = ("export", str(copy_of_small_run), "--to", "parquet", "--out", str(out), "--executor", "inline")
    assert call(*arguments, "--quiet").code == 0
    assert call("push", str(out), "me/table").code == 0
    files = hub.repositories["datasets/me/table"].files()
    card = files.pop("README.md")
    assert set(files) == {name for name in tree(out) if name.startswith("data/")}
    assert all((out / name).read_bytes() == data for name, data in files.items())
    assert metadata(card)["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
    rows = cells(card)
    assert (rows["samples"], rows["format"]) == (["19"], ["parquet"])
    assert rows["source"] == ["`synthetic: split train`"]
    assert call("push", str(out / "data"), "me/table", "--json").code == 0

    store = Store.open(copy_of_small_run / "store")
    assert call("remove", str(copy_of_small_run), "--key", store[4].key).code == 0
    refused = call("push", str(out), "me/table")
    assert refused.code == 2
    assert "samples were removed" in refused.err
    assert call(*arguments, "--quiet", "--restart").code == 0
    assert call("push", str(out), "me/table").code == 0
    shutil.rmtree(copy_of_small_run)
    assert "nobody checked whether samples were removed" in call("push", str(out), "me/table").out


def test_an_unfinished_export_is_refused(hub: Hub, small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    assert call("export", str(small_run), "--to", "parquet", "--out", str(out), "--executor", "inline").code == 0
    (out / "data/store.json").unlink()
    result = call("push", str(out), "me/table")
    assert (result.code, "this export is not finished" in result.err) == (2, True)
