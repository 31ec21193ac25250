"""Damaged small files of a run folder: rebuilt where that is possible, refused by name where not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.engine.status import run_status
from pipeline.errors import ConfigError
from pipeline.options import RunOptions
from pipeline.storage.events import read_events
from pipeline.storage.run_folder import RunFolder
from tests.pipeline.toy import Toy, ToyConfig

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "not UTF-8": lambda data: b"\xff" + data[1:],
    "another value": lambda _: b"[1]\n",
}


def run(folder: Path, *, factor: int = 2, restart: bool = False, retry: str = "") -> dict[str, object]:
    toy = Toy(ToyConfig.model_validate({"toy": {"num_shards": 3, "add_cubes": True, "factor": factor}}))
    options = RunOptions("inline", quiet=True, restart=restart, retry_dropped=(retry,) if retry else ())
    return toy.run(str(folder), options)


def lasting(folder: Path) -> dict[str, bytes]:
    """The files that do not tell the time."""
    names = ("events.jsonl", "summary.json", ".lock")
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in names}


@pytest.mark.parametrize(
    "damage",
    ["empty", "another value", *(pytest.param(d, marks=pytest.mark.slow) for d in ("cut", "zeros", "not UTF-8"))],
)
@pytest.mark.parametrize(
    "name",
    [
        *("state/squares/00001.json", "state/cubes/00002.json", "state/squares.json", "state/cubes.json"),
        *("plan.json", "config.yaml", "summary.json", "events.jsonl", ".lease.json"),
    ],
)
def test_a_damaged_file_is_rebuilt_by_the_next_run(
    name: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.lock._POLL_S", 0.0)
    run(tmp_path)
    before = lasting(tmp_path)
    path = tmp_path / name
    path.write_bytes(DAMAGES[damage](path.read_bytes() if path.exists() else b'{"owner": "other"}'))
    summary = run(tmp_path)
    assert summary["outcome"] == "finished"
    assert lasting(tmp_path) == before
    assert next(reversed(list(read_events(RunFolder(tmp_path).storage))))["event"] == "run_ended"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["plan.json", "summary.json"])
def test_the_state_of_a_run_with_a_damaged_file_is_refused_by_name(name: str, damage: str, tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"{name}: is damaged \(.*\); the same `pipeline run` again writes it anew"):
        run_status(str(tmp_path))
    run(tmp_path)
    assert run_status(str(tmp_path))["outcome"] == "finished"


def test_a_damaged_record_is_not_counted_as_finished(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "state/squares/00001.json").write_text("{}")
    groups = run_status(str(tmp_path))["groups"]
    assert isinstance(groups, dict)
    assert {name: group["shards"] for name, group in groups.items()} == {"squares": 2, "cubes": 3}


@pytest.mark.parametrize("damage", ["empty", "cut", "not UTF-8"])
def test_the_damaged_fingerprint_of_a_group_that_nothing_can_rebuild_is_refused_by_name(
    damage: str, tmp_path: Path
) -> None:
    run(tmp_path)
    path = tmp_path / "state/squares.json"
    path.write_bytes(DAMAGES[damage](path.read_bytes()) or b"{")
    with pytest.raises(ConfigError, match=r"state/squares\.json: is damaged .*; restore it from a copy; or delete it"):
        run(tmp_path, factor=3)


def test_damaged_lists_of_drops_and_retries_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, retry="all")
    drops = next((tmp_path / "quarantine/squares").iterdir())
    whole = drops.read_bytes()
    drops.write_bytes(whole[:-9])
    with pytest.raises(ConfigError, match=rf"{drops.name} line 1: is damaged .*; delete it: the next run writes it"):
        run(tmp_path, retry="all")
    drops.write_bytes(whole)
    (tmp_path / "retries/00001-4.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match=r"retries/00001-4\.jsonl line 1: is damaged .*; restore it from a copy"):
        run(tmp_path)


def test_a_run_ends_without_files_that_no_record_has(tmp_path: Path) -> None:
    """As a run leaves them that is killed between the deletion of a record and of its files."""
    run(tmp_path)
    before = lasting(tmp_path)
    orphans = ["store/squares/00007.txt", "store/squares/00001.r1.txt", "quarantine/cubes/00007.jsonl"]
    for name in orphans:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("orphan")
    (tmp_path / "store/squares/notes.txt").write_text("of the user")
    run(tmp_path)
    assert lasting(tmp_path) == {**before, "store/squares/notes.txt": b"of the user"}
