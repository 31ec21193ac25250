"""Work in a local copy of a folder on S3."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import LocalStorage, Storage
from pipeline.storage.mirror import Mirror, working_folder
from pipeline.storage.open import open_storage
from tests.object_store import ObjectStore, object_store


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def far(s3: ObjectStore, tmp_path: Path) -> Storage:
    return open_storage(f"{s3.url}/{tmp_path.name}")


def test_a_local_run_works_in_its_own_folder(tmp_path: Path) -> None:
    with working_folder(LocalStorage(tmp_path)) as folder:
        assert folder == tmp_path


def test_the_copy_has_what_is_there_and_changes_are_sent_back(far: Storage) -> None:
    far.write("checkpoints/step-1/state.json", b"1")
    far.write("metrics.jsonl", b"old\n")
    with working_folder(far) as folder:
        assert (folder / "checkpoints/step-1/state.json").read_bytes() == b"1"
        (folder / "metrics.jsonl").write_bytes(b"old\nnew\n")
        (folder / "grids").mkdir()
        (folder / "grids/a.png").write_bytes(b"png")
        (folder / "checkpoints/step-1/state.json").unlink()
    assert far.read("metrics.jsonl") == b"old\nnew\n"
    assert sorted(far.walk()) == ["grids/a.png", "metrics.jsonl"]
    assert not folder.exists()


def test_what_the_work_wrote_is_sent_even_if_it_fails(far: Storage) -> None:
    def fail() -> None:
        with working_folder(far) as folder:
            (folder / "a").write_bytes(b"1")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert far.read("a") == b"1"


def test_only_one_of_several_processes_sends(far: Storage) -> None:
    far.write("a", b"1")
    with working_folder(far, sends=False) as folder:
        (folder / "a").write_bytes(b"2")
    assert far.read("a") == b"1"


def test_a_folder_counts_as_whole_only_once_all_of_it_is_sent(
    far: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    write, delete = far.write_file, far.delete
    monkeypatch.setattr(far, "write_file", lambda name, local: (order.append(f"+{name}"), write(name, local)))
    monkeypatch.setattr(far, "delete", lambda name: (order.append(f"-{name}"), delete(name)))
    mirror = Mirror(far, tmp_path / "copy")
    step = tmp_path / "copy/checkpoints/step-2"
    step.mkdir(parents=True)
    for name in ("model.safetensors", "state.json", "z.safetensors"):
        (step / name).write_bytes(b"x")
    half = tmp_path / "copy/checkpoints/.tmp-step-3"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    mirror.send()
    assert [name.rpartition("/")[2] for name in order] == ["model.safetensors", "z.safetensors", "state.json"]
    order.clear()
    for path in list(step.iterdir()):
        path.unlink()
    mirror.send()
    assert order[0] == "-checkpoints/step-2/state.json"
    assert list(far.walk()) == []


def test_nothing_is_sent_twice(far: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(far, tmp_path / "copy")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/a").write_bytes(b"1")
    mirror.send()
    sent: list[str] = []
    monkeypatch.setattr(far, "write_file", lambda name, local: sent.append(name))
    mirror.send()
    assert sent == []
    (tmp_path / "copy/a").write_bytes(b"22")
    mirror.send()
    assert sent == ["a"]
