"""Every command that reads S3 (moto's server) ends with words, whatever the server answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from imagen_core.far import StorageError
from pipeline.storage.open import open_storage
from stages.sources.files import find_files
from tests.commands import Result, call
from tests.object_store import ObjectStore, object_store
from tests.runs import SMALL
from tests.trained import UNET

TRAINING = {
    "denoiser": {"size_px": 16, "unet": UNET},
    "text": "t5",
    "num_steps": 2,
    "batch_size": 4,
    "checkpoints": {"every_steps": 1},
    "data": {"shuffle_window_shards": 1},
}
COMMANDS = ("verify", "inspect", "report", "status", "plan", "remove", "export", "train")
SLOW = ("report", "plan", "export", "train")


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    from fsspec.config import conf

    with pytest.MonkeyPatch.context() as patch, object_store() as store:
        patch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 5, "retries": {"max_attempts": 1}}})
        patch.setattr("s3fs.S3FileSystem.retries", 1)
        yield store


@pytest.fixture(scope="module")
def run(small_run: Path, s3: ObjectStore) -> str:
    """A finished run on S3; tests must not change it."""
    storage = open_storage(f"{s3.url}/run")
    for path in sorted(small_run.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            storage.write(path.relative_to(small_run).as_posix(), path.read_bytes())
    return storage.url


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch, s3: ObjectStore) -> Iterator[None]:
    monkeypatch.setattr("imagen_core.far.calls.PATIENCE_S", 0.05)
    monkeypatch.setattr("imagen_core.far.calls.LONGEST_PAUSE_S", 0.01)
    yield
    s3.faults.rule = lambda method, path: ""


def execute(command: str, place: str, folder: Path) -> Result:
    """A command that reads a run on S3."""
    store = f"{place}/store"
    (folder / "train.yaml").write_text(yaml.safe_dump({"store": store, **TRAINING}))
    arguments = {
        "plan": ("plan", "precompute", "--out", place, *SMALL),
        "remove": ("remove", place, "--key", "000000004"),
        "export": ("export", f"{place}/trained", "--out", str(folder / "model.safetensors")),
        "train": ("run", "train", "-c", str(folder / "train.yaml"), "--out", str(folder / "out"), "--quiet"),
    }
    result = call(*arguments.get(command, (command, place)))
    assert "Traceback" not in result.out + result.err
    return result


def commands() -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in COMMANDS]


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_a_server_that_refuses_is_exit_4_at_once_with_what_to_check(
    command: str, run: str, s3: ObjectStore, tmp_path: Path
) -> None:
    s3.faults.rule = lambda method, path: "403"
    result = execute(command, run, tmp_path)
    assert result.code == 4, result.err
    assert str(run) in result.err
    assert (
        ": PermissionError: Forbidden; check that the address is right, and that the environment's cred" in result.err
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_a_server_that_is_down_for_long_is_exit_75(command: str, run: str, s3: ObjectStore, tmp_path: Path) -> None:
    s3.faults.rule = lambda method, path: "503"
    result = execute(command, run, tmp_path)
    assert result.code == 75, result.err
    assert "tries in 0.05 s; check the address and the network, and run the same command again" in result.err


@pytest.mark.parametrize("command", commands())
def test_a_bucket_that_is_not_there_is_told_from_a_missing_run(command: str, s3: ObjectStore, tmp_path: Path) -> None:
    result = execute(command, "s3://no-such-bucket/run", tmp_path)
    assert result.code == 4, result.err
    assert "the bucket s3://no-such-bucket does not exist; check its name, or create it" in result.err
    result = execute(command, f"{s3.url}/no-such-run", tmp_path)
    assert "bucket does not exist" not in result.err + result.out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "remove", "train"])
@pytest.mark.parametrize("answer", ["half", "500", "503"])
def test_a_data_file_that_never_comes_whole_is_exit_75_and_no_damage(
    command: str, answer: str, run: str, s3: ObjectStore, tmp_path: Path
) -> None:
    s3.faults.rule = lambda method, path: answer if method == "GET" and "store/samples/" in path else ""
    result = execute(command, run, tmp_path)
    assert result.code == 75, result.err
    assert "/store/samples/0000" in result.err
    assert "also after" in result.err
    assert "damaged" not in result.err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "inspect", "report", "status", "train"])
def test_faults_that_pass_are_not_seen(
    command: str, run: str, s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagen_core.far.calls.PATIENCE_S", 60.0)
    answers = ["500", "", "half", "", "503", "", ""] * 1000
    s3.faults.rule = lambda method, path: answers.pop(0) if method == "GET" else ""
    assert execute(command, run, tmp_path).code == 0
    assert len(answers) < 7000


def test_a_flipped_byte_is_damage_of_the_file_that_is_named(
    run: str, s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagen_core.far.calls.PATIENCE_S", 60.0)
    s3.faults.rule = lambda method, path: "flip" if method == "GET" and "images-16/00001" in path else ""
    result = execute("verify", run, tmp_path)
    assert result.code == 1, "as of a local store"
    assert "bad: images-16/00001.parquet: s3://bucket/run/store/images-16/00001.parquet: cannot be read: its byt" in (
        result.out
    )
    assert result.out.count("bad: ") == 1


@pytest.mark.slow
def test_a_flipped_byte_in_what_a_removal_decides_by_is_refused(
    run: str, s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagen_core.far.calls.PATIENCE_S", 60.0)
    s3.faults.rule = lambda method, path: "flip" if method == "GET" and "store/samples/00001" in path else ""
    result = execute("remove", run, tmp_path)
    assert result.code == 2, result.err
    assert "store/samples/00001.parquet: " in result.err
    assert "its bytes do not fit their checksum, also after 3 tries" in result.err


@pytest.mark.slow
def test_a_removal_whose_answer_was_lost_is_in_effect_and_says_so(s3: ObjectStore, run: str) -> None:
    place, late = f"{s3.url}/removal", []
    copy = open_storage(place)
    for name, data in s3.keys("run/").items():
        copy.write(name, data)

    def rule(method: str, path: str) -> str:
        if method == "PUT" and path.endswith("removed/00001.json") and not late:
            late.append(path)
            return "late"
        return ""

    s3.faults.rule = rule
    result = call("remove", place, "--key", "000000004")
    assert (result.code, len(late)) == (0, 1), result.err
    assert "1 samples removed, in 1 shards" in result.out
    assert list(s3.keys("removal/store/removed/")) == ["00001.json", "log.json"]


def test_a_folder_on_s3_that_may_not_be_listed_is_not_left_out_of_a_pattern(s3: ObjectStore) -> None:
    """fsspec leaves it out without a word."""
    storage = open_storage(f"{s3.url}/globbed")
    for name in ("a/0.tar", "b/1.tar"):
        storage.write(name, b"")
    pattern = f"{storage.url}/*/*.tar"
    assert list(find_files(pattern, "source.path", ("tar",))) == ["a/0.tar", "b/1.tar"]
    s3.faults.rule = lambda method, path: "403" if "prefix=globbed%2Fb" in path or "prefix=globbed/b" in path else ""
    with pytest.raises(StorageError, match="globbed/b: cannot be listed: PermissionError"):
        find_files(pattern, "source.path", ("tar",))
