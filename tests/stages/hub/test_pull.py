import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from imagen_core.store import Store
from tests.commands import call, tree
from tests.hub_server import READER, Blob, Hub, Repository
from tests.runs import REPOSITORY, store_bytes
from tests.stages.hub.test_push import DATASET, talk_to


@pytest.fixture
def pushed(hub: Hub, small_run: Path) -> Hub:
    """A hub with the small store."""
    assert call("push", str(small_run), "me/scenes").code == 0
    hub.uploads.clear()
    return hub


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tree(folder)}


def test_a_pulled_store_is_the_pushed_one_and_verifies(pushed: Hub, small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "pulled"
    result = call("pull", "me/scenes", "--out", str(out), "--json")
    assert result.code == 0, result.err
    found = contents(out)
    assert found.pop("README.md").startswith(b"---\nlicense: unknown\n")
    assert found == store_bytes(small_run)
    assert [path.name for path in tmp_path.iterdir()] == ["pulled"]
    told = json.loads(result.out)
    assert (told["repository"], told["form"], told["files"]) == (DATASET, "store", len(found) + 1)
    assert told["commit"] == pushed.repositories[DATASET].commit("main")
    verified = call("verify", str(out), "--json")
    assert (verified.code, json.loads(verified.out)["warnings"]) == (0, [])
    assert len(Store.open(out)) == 19


def test_a_store_is_read_on_the_hub_too(pushed: Hub, small_run: Path) -> None:
    far, near = Store.open(f"hf://{DATASET}"), Store.open(small_run / "store")
    assert (len(far), far[7].captions) == (19, near[7].captions)
    assert np.array_equal(far[7].images[48], near[7].images[48])
    assert len(pushed.downloads) == 5, "the manifest and one file of each group"
    verified = call("verify", f"hf://{DATASET}", "--json")
    assert (verified.code, json.loads(verified.out)["warnings"]) == (0, [])
    assert call("push", f"hf://{DATASET}", "me/copy").code == 0
    copied = pushed.repositories["datasets/me/copy"].files()
    assert {name: data for name, data in copied.items() if name != "README.md"} == store_bytes(small_run)


def test_what_is_there_already_is_compared_and_not_downloaded_again(pushed: Hub, tmp_path: Path) -> None:
    out = tmp_path / "pulled"
    assert call("pull", "me/scenes", "--out", str(out)).code == 0
    pushed.downloads.clear()
    result = call("pull", "datasets/me/scenes", "--out", str(out))
    assert (result.code, "is there already, unchanged" in result.out) == (0, True)
    assert pushed.downloads == []
    (out / "samples/00001.parquet").write_bytes(b"mine")
    refused = call("pull", "me/scenes", "--out", str(out))
    assert refused.code == 2
    assert "samples/00001.parquet is not that of" in refused.err
    assert (out / "samples/00001.parquet").read_bytes() == b"mine"


def test_a_folder_with_other_things_and_a_file_are_refused(pushed: Hub, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("full", "file", "file/below", "s3://bucket/x"):
        result = call("pull", "me/scenes", "--out", str(tmp_path / place) if ":" not in place else place)
        assert (result.code, len(result.err.splitlines())) == (2, 1), place
    assert contents(tmp_path) == {"full/notes.txt": b"mine", "file": b"mine"}


def test_damage_on_the_way_is_found_and_the_same_command_mends_it(
    pushed: Hub, small_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pulled"
    pushed.damage = {"images-48/00001.parquet", "text-t5/probe.json"}
    result = call("pull", "me/scenes", "--out", str(out))
    assert result.code == 75
    assert "2 files are missing or came damaged, the first images-48/00001.parquet" in result.err
    assert not out.exists()
    pushed.damage = set()
    pushed.downloads.clear()
    assert call("pull", "me/scenes", "--out", str(out)).code == 0
    assert sorted(name for name, _ in pushed.downloads) == ["images-48/00001.parquet", "text-t5/probe.json"]
    assert {name: data for name, data in contents(out).items() if name != "README.md"} == store_bytes(small_run)


@pytest.mark.parametrize("name", ["images-48/00001.parquet", "text-t5/probe.json", "text-t5/null.safetensors"])
def test_a_repository_whose_files_do_not_fit_its_manifest_is_refused(pushed: Hub, tmp_path: Path, name: str) -> None:
    repository = pushed.repositories[DATASET]
    files = dict(repository.commits[repository.branches["main"][-1]])
    data = files[name].data
    files[name] = Blob(data[:-1] + bytes([data[-1] ^ 1]), files[name].is_lfs)
    repository.add("main", files)
    result = call("pull", "me/scenes", "--out", str(tmp_path / "pulled"))
    assert result.code == 4
    assert "do not fit its manifest" in result.err
    assert name in result.err
    assert not (tmp_path / "pulled").exists()


def test_a_file_that_the_manifest_names_and_the_repository_lacks_is_found(pushed: Hub, tmp_path: Path) -> None:
    repository = pushed.repositories[DATASET]
    files = dict(repository.commits[repository.branches["main"][-1]])
    del files["samples/00002.parquet"]
    repository.add("main", files)
    result = call("pull", "me/scenes", "--out", str(tmp_path / "pulled"))
    assert (result.code, "samples/00002.parquet" in result.err) == (4, True)


def test_a_push_that_has_not_ended_is_not_pulled(pushed: Hub, tmp_path: Path) -> None:
    repository = pushed.repositories[DATASET]
    files = dict(repository.commits[repository.branches["main"][-1]])
    del files["manifest.json"]
    repository.add("main", files)
    result = call("pull", "me/scenes", "--out", str(tmp_path / "pulled"))
    assert result.code == 2
    assert "has no manifest.json or data/store.json" in result.err
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_revision_can_be_pulled(pushed: Hub, copy_of_small_run: Path, tmp_path: Path) -> None:
    first = pushed.repositories[DATASET].commit("main")
    assert first is not None
    key = Store.open(copy_of_small_run / "store")[4].key
    assert call("remove", str(copy_of_small_run), "--key", key, "--compact").code == 0
    assert call("push", str(copy_of_small_run), "me/scenes").code == 0
    assert call("pull", "me/scenes", "--out", str(tmp_path / "new")).code == 0
    assert call("pull", "me/scenes", "--out", str(tmp_path / "old"), "--revision", first).code == 0
    assert (len(Store.open(tmp_path / "new")), len(Store.open(tmp_path / "old"))) == (18, 19)
    assert call("verify", str(tmp_path / "new")).code == 0
    result = call("pull", "me/scenes", "--out", str(tmp_path / "none"), "--revision", "v9")
    assert (result.code, "--revision v9" in result.err) == (2, True)


def test_what_another_commit_had_is_not_left_in_a_pull_that_was_killed(pushed: Hub, tmp_path: Path) -> None:
    left = tmp_path / ".tmp-pulled/images-48/00099.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of an earlier commit")
    assert call("pull", "me/scenes", "--out", str(tmp_path / "pulled")).code == 0
    assert not (tmp_path / "pulled/images-48/00099.parquet").exists()


def downloaded(folder: Path) -> set[str]:
    """Files of a pull that is not finished that have come completely."""
    known = folder / ".cache/huggingface/download"
    return {path.relative_to(known).as_posix().removesuffix(".metadata") for path in known.rglob("*.metadata")}


@pytest.mark.slow
def test_a_killed_pull_gets_only_the_rest_afterwards(pushed: Hub, small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "pulled"
    arguments = talk_to(pushed, "pull", "me/scenes", "--out", str(out))
    pushed.limit = 6
    with subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as process:
        assert pushed.hanging.wait(120)
        deadline = time.monotonic() + 60
        while len(finished := downloaded(tmp_path / ".tmp-pulled")) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert len(finished) == 6
    pushed.limit = None
    pushed.downloads.clear()
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = {name for name, _ in pushed.downloads}
    assert again == {*store_bytes(small_run), "README.md"} - finished
    assert {name: data for name, data in contents(out).items() if name != "README.md"} == store_bytes(small_run)


def test_a_private_repository_needs_a_token(
    hub: Hub, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("push", str(small_run), "me/secret", "--private").code == 0
    monkeypatch.delenv("HF_TOKEN")
    refused = call("pull", "me/secret", "--out", str(tmp_path / "a"))
    assert (refused.code, len(refused.err.splitlines())) == (4, 1)
    assert "the hub wants a token" in refused.err
    assert "or there is no such repository" in refused.err
    monkeypatch.setenv("HF_TOKEN", READER)
    assert call("pull", "me/secret", "--out", str(tmp_path / "a")).code == 0


def test_a_missing_repository_and_a_wrong_token_are_told_apart(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = call("pull", "me/nothing", "--out", str(tmp_path / "a"))
    assert (missing.code, len(missing.err.splitlines())) == (2, 1)
    assert "there is no such repository, or this token may not see it" in missing.err
    monkeypatch.setenv("HF_TOKEN", "hf_secret0123456789")
    wrong = call("pull", "me/nothing", "--out", str(tmp_path / "a"))
    assert (wrong.code, len(wrong.err.splitlines())) == (4, 1)
    assert "the hub does not accept the token" in wrong.err
    assert "hf_secret" not in wrong.err
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_a_dataset_and_a_model_has_to_say_which(pushed: Hub, tmp_path: Path) -> None:
    pushed.repositories["models/me/scenes"] = Repository()
    pushed.repositories["models/me/scenes"].add("main", {"config.json": Blob(b"{}", False)})
    result = call("pull", "me/scenes", "--out", str(tmp_path / "a"))
    assert (result.code, "give datasets/me/scenes or models/me/scenes" in result.err) == (2, True)
    assert call("pull", "datasets/me/scenes", "--out", str(tmp_path / "a")).code == 0
    other = call("pull", "models/me/scenes", "--out", str(tmp_path / "b"))
    assert (other.code, "has no model.safetensors or model_index.json" in other.err) == (2, True)


def test_without_network_nothing_is_tried(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = call("pull", "me/scenes", "--out", str(tmp_path / "a"))
    assert (result.code, "HF_HUB_OFFLINE is set" in result.err) == (4, True)


def test_an_export_comes_back_as_it_went(hub: Hub, small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    arguments = ("export", str(small_run), "--to", "parquet", "--out", str(out), "--executor", "inline", "--quiet")
    assert call(*arguments).code == 0
    assert call("push", str(out), "me/table").code == 0
    assert call("pull", "me/table", "--out", str(tmp_path / "back")).code == 0
    found = contents(tmp_path / "back")
    assert {name for name in found if name != "README.md"} == {name for name in tree(out) if name.startswith("data/")}
    assert all((out / name).read_bytes() == data for name, data in found.items() if name != "README.md")
    assert call("push", str(tmp_path / "back"), "me/copy").code == 0
