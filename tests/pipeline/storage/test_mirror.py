"""Work in a local copy of a folder on an object store: no kill, fault or lost folder costs a whole checkpoint."""

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import LockedError, MachineError
from pipeline.storage import LocalStorage, ObjectStorage, Storage
from pipeline.storage import mirror as mirror_module
from pipeline.storage.lock import LEASE, Lease
from pipeline.storage.mirror import Mirror, WorkingFolder, working_folder
from pipeline.storage.open import open_storage
from tests.object_store import ObjectStore, object_store

FILES = ("model.safetensors", "state.json", "z.safetensors")


class Killed(BaseException):
    """Ends a process where it is."""


@dataclass
class Requests:
    """What is asked of the object store, as `read NAME`, `written NAME` and so on."""

    made: list[str] = field(default_factory=list)
    kill_after: int | None = None
    refuse: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def far(s3: ObjectStore, tmp_path: Path) -> Storage:
    return open_storage(f"{s3.url}/{tmp_path.name}")


@pytest.fixture
def near(tmp_path: Path) -> Iterator[ObjectStorage]:
    """An object store in this process."""
    storage = open_storage(f"memory://{tmp_path.name}")
    assert isinstance(storage, ObjectStorage)
    yield storage
    storage.delete_folder("")


@pytest.fixture
def requests(near: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> Requests:
    seen, call = Requests(), near._call

    def counted(done: str, name: str, function: Callable[[str], Any]) -> Any:
        if seen.kill_after is not None:
            if not seen.kill_after:
                raise Killed
            seen.kill_after -= 1
        if done in seen.refuse:
            raise MachineError(f"{name}: refused")
        seen.made.append(f"{done} {name}")
        return call(done, name, function)

    monkeypatch.setattr(near, "_call", counted)
    return seen


def new_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def save(working: WorkingFolder, step: int) -> None:
    folder = new_folder(working.path / f"checkpoints/step-{step}")
    for name in FILES:
        (folder / name).write_text(f"{step}")


def remove(working: WorkingFolder, step: int) -> None:
    shutil.rmtree(working.path / f"checkpoints/step-{step}")


def started(storage: ObjectStorage, place: Path, step: int, lease: Lease | None = None) -> Mirror:
    """A run that has a copy of a folder with metrics and one checkpoint."""
    for name in FILES:
        storage.write(f"checkpoints/step-{step}/{name}", f"{step}".encode())
    storage.write("metrics.jsonl", b"1")
    for _ in range(2):  # the first run finds the checkpoint, so the second finds it in a list of marks
        shutil.rmtree(place / "copy", ignore_errors=True)
        mirror = Mirror(storage, new_folder(place / "copy"), lease)
        mirror.fetch()
    return mirror


def whole(folder: Path) -> set[int]:
    """Steps of the checkpoints that have all files."""
    steps = (int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*"))
    return {step for step in steps if all((folder / f"checkpoints/step-{step}/{name}").exists() for name in FILES)}


def marked(folder: Path) -> set[int]:
    """Steps of the checkpoints that are said to be complete."""
    return {int(path.parent.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*/state.json")}


def contents(storage: Storage) -> list[str]:
    """All files but those of the engine."""
    return [name for name in storage.walk() if not name.startswith(".")]


def lease_of(storage: Storage, owner: str) -> Lease:
    """The lease of a run that has the folder from now on."""
    now = time.time()
    lease = {"owner": owner, "host": "node-3", "pid": 7, "user": "ann", "since": now, "renewed": now}
    storage.write(LEASE, json.dumps(lease).encode())
    return Lease(storage, owner)


def test_a_local_run_works_in_its_own_folder(tmp_path: Path) -> None:
    with working_folder(LocalStorage(tmp_path)) as working:
        assert working.path == tmp_path


def test_the_copy_has_what_is_there_and_changes_are_sent_back(far: Storage) -> None:
    far.write("checkpoints/step-1/state.json", b"1")
    far.write("metrics.jsonl", b"old\n")
    with working_folder(far) as working:
        folder = working.path
        assert (folder / "checkpoints/step-1/state.json").read_bytes() == b"1"
        (folder / "metrics.jsonl").write_bytes(b"old\nnew\n")
        (folder / "grids").mkdir()
        (folder / "grids/a.png").write_bytes(b"png")
    assert far.read("metrics.jsonl") == b"old\nnew\n"
    assert contents(far) == ["checkpoints/step-1/state.json", "grids/a.png", "metrics.jsonl"]
    assert not folder.exists()


def test_what_the_work_wrote_is_sent_even_if_it_fails(far: Storage) -> None:
    def fail() -> None:
        with working_folder(far) as working:
            (working.path / "a").write_bytes(b"1")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert far.read("a") == b"1"


def test_only_one_of_several_processes_sends(far: Storage) -> None:
    far.write("a", b"1")
    with working_folder(far, sends=False) as working:
        (working.path / "a").write_bytes(b"2")
    assert far.read("a") == b"1"
    assert list(far.walk()) == ["a"]


def test_new_checkpoints_are_sent_mark_last_before_old_ones_are_deleted_mark_first(
    near: ObjectStorage, tmp_path: Path, requests: Requests
) -> None:
    mirror = started(near, tmp_path, 1)
    save(mirror, 2)
    half = mirror.path / "checkpoints/.tmp-step-3"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    remove(mirror, 1)
    (mirror.path / "metrics.jsonl").write_bytes(b"2")
    requests.made.clear()
    mirror.send()
    changes = [request for request in requests.made if request.partition(" ")[0] in ("written", "deleted", "replaced")]
    assert changes == [
        "replaced metrics.jsonl",
        "written checkpoints/step-2/model.safetensors",
        "written checkpoints/step-2/z.safetensors",
        "written .sent-000002.json",
        "written checkpoints/step-2/state.json",
        "deleted checkpoints/step-1/state.json",
        "deleted checkpoints/step-1/model.safetensors",
        "deleted checkpoints/step-1/z.safetensors",
    ]


def test_a_kill_between_any_two_requests_of_a_send_leaves_a_whole_checkpoint(
    near: ObjectStorage, tmp_path: Path, requests: Requests
) -> None:
    """With one checkpoint kept: the newest is 1 before the send, 2 after it."""
    killed = 0
    for number in itertools.count():
        near.delete_folder("")
        mirror = started(near, tmp_path / str(number), 1)
        save(mirror, 2)
        remove(mirror, 1)
        (mirror.path / "metrics.jsonl").write_bytes(b"2")
        requests.kill_after = number
        try:
            mirror.send()
        except Killed:
            killed += 1
        requests.kill_after = None
        next_one = Mirror(near, new_folder(tmp_path / f"next-{number}"))
        next_one.fetch()
        assert whole(next_one.path), f"killed after {number} requests"
        assert marked(next_one.path) == whole(next_one.path)
        if 2 in whole(next_one.path):
            assert (next_one.path / "metrics.jsonl").read_bytes() == b"2", "no line up to a checkpoint is lost"
        if killed <= number:
            break
    assert killed == 12, "a kill before each request"
    assert whole(next_one.path) == {2}


def test_metrics_never_tell_of_a_first_checkpoint_that_is_not_there(
    near: ObjectStorage, tmp_path: Path, requests: Requests
) -> None:
    """A training whose metrics tell of one, and that has none, is refused: it seems lost."""
    for number in itertools.count():
        near.delete_folder("")
        mirror = Mirror(near, new_folder(tmp_path / str(number)))
        mirror.fetch()
        (mirror.path / "metrics.jsonl").write_bytes(b"1")
        save(mirror, 1)
        requests.kill_after = number
        try:
            mirror.send()
        except Killed:
            pass
        else:
            break
        finally:
            requests.kill_after = None
        next_one = Mirror(near, new_folder(tmp_path / f"next-{number}"))
        next_one.fetch()
        assert whole(next_one.path) or not (next_one.path / "metrics.jsonl").exists()
    assert number > 4
    assert near.read("metrics.jsonl") == b"1"


def test_the_last_whole_checkpoint_is_never_deleted(near: ObjectStorage, tmp_path: Path) -> None:
    mirror = started(near, tmp_path, 1)
    remove(mirror, 1)
    mirror.send()
    assert near.size("checkpoints/step-1/state.json") == 1
    save(mirror, 2)
    mirror.send()
    assert {name for name in contents(near) if "step-1" in name} == set()
    assert near.size("checkpoints/step-2/state.json") == 1


def test_a_checkpoint_that_did_not_arrive_whole_is_sent_again_before_its_mark(
    near: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, put, cut = started(near, tmp_path, 1), near.replace_file, ["model.safetensors", "z.safetensors"]

    def halved(name: str, local: Path, version: str | None) -> bool:
        done = put(name, local, version)
        if "step-2" in name and name.rpartition("/")[2] in cut:
            cut.remove(name.rpartition("/")[2])
            near.write(name, b"")
        return done

    monkeypatch.setattr(near, "replace_file", halved)
    save(mirror, 2)
    mirror.send()
    assert near.sizes("checkpoints/step-2") == {f"checkpoints/step-2/{name}": 1 for name in FILES}
    cut.extend(["model.safetensors"] * 9)
    remove(mirror, 2)
    save(mirror, 3)
    monkeypatch.setattr(near, "replace_file", lambda name, *_: bool(near.write(name, b"")) or True)
    with pytest.raises(MachineError, match=r"step-3/model\.safetensors: 0 of 1 bytes arrived, also after 3 tries"):
        mirror.send()
    assert near.size("checkpoints/step-3/state.json") is None
    assert near.size("checkpoints/step-2/state.json") == 1


def test_what_the_last_send_could_not_send_is_kept_named_and_used_by_the_same_command(
    near: ObjectStorage, tmp_path: Path, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(new_folder(tmp_path / "tmp")))
    new_folder(tmp_path / "copy")
    started(near, tmp_path, 1)

    def train_on() -> None:
        with working_folder(near, lease_of(near, "a")) as working:
            save(working, 2)
            remove(working, 1)
            (working.path / "metrics.jsonl").write_bytes(b"2")
            requests.refuse = ("written", "replaced", "deleted")

    with pytest.raises(MachineError) as caught:
        train_on()
    assert re.search(r"what was not sent is kept in /\S+ on \S+: the same command there sends it", str(caught.value))
    assert isinstance(caught.value.__cause__, MachineError)
    kept = Path(re.findall(r"kept in (\S+) on", str(caught.value))[0])
    assert whole(kept) == {2}
    assert near.size("checkpoints/step-1/state.json") == 1
    requests.refuse = ()
    with pytest.raises(MachineError, match=r"several processes need it; copy its files to memory://"):  # noqa: SIM117
        with working_folder(near, lease_of(near, "b"), alone=False):
            pass
    killed = Mirror(near, new_folder(tmp_path / "killed"), lease_of(near, "killed"))
    killed.fetch()  # and then ends before it sends
    assert whole(killed.path) == {2}
    with working_folder(near, lease_of(near, "b")) as working:
        assert whole(working.path) == {2}
        assert (working.path / "metrics.jsonl").read_bytes() == b"2"
    assert list(kept.parent.iterdir()) == []
    assert {name for name in contents(near) if name.endswith("state.json")} == {"checkpoints/step-2/state.json"}
    assert near.read("metrics.jsonl") == b"2"


def test_what_was_kept_is_not_used_once_another_run_has_been_there(
    near: ObjectStorage, tmp_path: Path, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(new_folder(tmp_path / "tmp")))
    started(near, tmp_path, 1)

    def train_on() -> None:
        with working_folder(near, lease_of(near, "a")) as working:
            save(working, 2)
            requests.refuse = ("written", "replaced", "deleted")

    with pytest.raises(MachineError, match="is kept in"):
        train_on()
    requests.refuse = ()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("tempfile.tempdir", str(new_folder(tmp_path / "elsewhere")))
        Mirror(near, new_folder(tmp_path / "copy of b"), lease_of(near, "b")).fetch()
    with working_folder(near, lease_of(near, "c")) as working:
        assert whole(working.path) == {1}


def test_work_that_could_not_be_sent_for_long_is_asked_to_stop(
    near: ObjectStorage, tmp_path: Path, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "SEND_EVERY_S", 0.01)
    monkeypatch.setattr(mirror_module, "STUCK_AFTER_S", 0.2)
    with working_folder(near) as working:
        (working.path / "a").write_bytes(b"1")
        requests.refuse = ("written",)
        deadline = time.monotonic() + 20
        while not working.why_stop():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert re.match(r"nothing could be sent to memory://.* for 0\.\d s: .*refused", working.why_stop())
        requests.refuse = ()
        while working.why_stop():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert near.read("a") == b"1"


def test_a_run_that_lost_the_folder_sends_nothing_more(near: ObjectStorage, tmp_path: Path) -> None:
    mirror = started(near, tmp_path, 1, lease_of(near, "old"))
    save(mirror, 2)
    lease_of(near, "new")
    before = contents(near)
    with pytest.raises(LockedError, match="lost the folder to process 7"):
        mirror.send()
    assert contents(near) == before

    def go_on() -> None:
        with working_folder(near, lease_of(near, "third")) as working:
            save(working, 3)
            lease_of(near, "fourth")
            working.check()

    with pytest.raises(LockedError):
        go_on()
    assert [name for name in contents(near) if "step-3" in name] == []


def test_a_mark_that_arrives_after_the_folder_was_lost_does_not_count_and_is_deleted(
    near: ObjectStorage, tmp_path: Path
) -> None:
    """The old run was suspended just before it sent the mark of its checkpoint 2."""
    old = started(near, tmp_path / "old", 1)
    save(old, 2)
    mark, put = "checkpoints/step-2/state.json", near.replace_file
    late: list[Callable[[], object]] = []

    def suspended(name: str, local: Path, version: str | None) -> bool:
        if name == mark:
            late.append(lambda: put(name, local, version))
            raise Killed
        return put(name, local, version)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "replace_file", suspended)
        with pytest.raises(Killed):
            old.send()
    new = Mirror(near, new_folder(tmp_path / "new"))
    new.fetch()
    assert marked(new.path) == {1}
    late[0]()
    assert near.size(mark) == 1
    later = Mirror(near, new_folder(tmp_path / "later"))
    later.fetch()
    assert marked(later.path) == {1}
    assert near.size(mark) is None
    late[0]()
    save(later, 4)
    remove(later, 1)
    later.send()
    assert near.size(mark) is None, "the run that has the folder deletes it when it looks"
    save(later, 2)
    later.send()
    last = Mirror(near, new_folder(tmp_path / "last"))
    last.fetch()
    assert marked(last.path) == {2, 4}, "a checkpoint of the same name that the new run made counts"


def test_a_late_write_of_a_suspended_run_changes_no_file_of_the_run_that_has_the_folder(
    far: ObjectStorage, tmp_path: Path
) -> None:
    late = new_folder(tmp_path / "late") / "metrics.jsonl"
    late.write_bytes(b"of the old run")
    far.write("metrics.jsonl", b"1")
    seen = far.version("metrics.jsonl")
    mirror = Mirror(far, new_folder(tmp_path / "copy"))
    mirror.fetch()
    (mirror.path / "metrics.jsonl").write_bytes(b"12")
    save(mirror, 1)
    mirror.send()
    assert not far.replace_file("metrics.jsonl", late, seen)
    assert not far.replace_file("checkpoints/step-1/model.safetensors", late, None)
    assert far.read("metrics.jsonl") == b"12"
    assert far.read("checkpoints/step-1/model.safetensors") == b"1"


def test_a_folder_of_an_earlier_version_has_no_list_of_marks_and_all_count(
    near: ObjectStorage, tmp_path: Path
) -> None:
    for name in FILES:
        near.write(f"checkpoints/step-5/{name}", b"5")
    mirror = Mirror(near, new_folder(tmp_path / "copy"))
    mirror.fetch()
    assert whole(mirror.path) == {5}
    assert near.read_json(".sent-000001.json") == {
        "owner": "",
        "sent": ["checkpoints/step-5/state.json"],
        "late": [],
    }


def test_nothing_is_sent_twice(near: ObjectStorage, tmp_path: Path, requests: Requests) -> None:
    mirror = Mirror(near, new_folder(tmp_path / "copy"))
    (tmp_path / "copy/a").write_bytes(b"1")
    mirror.send()
    requests.made.clear()
    mirror.send()
    assert requests.made == []
    (tmp_path / "copy/a").write_bytes(b"22")
    mirror.send()
    assert requests.made[-1] == "replaced a"


def test_what_was_deleted_here_is_deleted_there_before_new_files_are_sent(
    near: ObjectStorage, tmp_path: Path, requests: Requests
) -> None:
    """As with --restart, whose record of new settings must not be next to images of others."""
    for name in ("images-16/0.png", "images-16/1.png", "images.json"):
        near.write(name, b"1")
    mirror = Mirror(near, new_folder(tmp_path / "copy"))
    mirror.fetch()
    for path in mirror.path.glob("images-16/*"):
        path.unlink()
    (mirror.path / "images.json").write_bytes(b"22")
    requests.made.clear()
    mirror.send()
    changes = [request for request in requests.made if not request.startswith("read")]
    assert changes == ["deleted images-16/0.png", "deleted images-16/1.png", "replaced images.json"]
