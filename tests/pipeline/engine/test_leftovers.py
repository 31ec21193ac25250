"""What killed runs leave of intermediate files is gone when a run has ended."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.options import RunOptions
from pipeline.storage import LocalStorage, ObjectStorage, Storage
from pipeline.storage.run_folder import RunFolder
from tests.object_store import ObjectStore, object_store
from tests.pipeline.toy import Toy, ToyConfig

_CHANGES = ("write", "create", "publish", "delete", "delete_folder")


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


def toy(place: str) -> None:
    Toy(ToyConfig.model_validate({"toy": {"num_shards": 2, "add_cubes": True}})).run(
        place, RunOptions("inline", quiet=True, take_over=True)
    )


def killed_at(number: int, kind: type[Storage], place: str) -> bool:
    """Whether a run was killed before its change of this number, the first being 0."""
    made = 0

    def counting(change: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            made += 1
            if made > number:
                raise Killed
            return change(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in _CHANGES:
            patch.setattr(kind, name, counting(getattr(kind, name)))
        try:
            toy(place)
        except Killed:
            return True
    return False


def check_every_kill(kind: type[Storage], place: str, step: int) -> None:
    number = 0
    while killed_at(number, kind, f"{place}/{number}"):
        run = RunFolder(f"{place}/{number}")
        toy(run.url)
        left = [name for name in run.storage.walk() if name.startswith(("staging/", ".nodes-"))]
        assert left == [], f"killed before change {number}"
        number += step
    assert number > 20


def test_staging_is_empty_after_a_kill_at_any_change_and_another_run(tmp_path: Path) -> None:
    check_every_kill(LocalStorage, str(tmp_path), 4)


@pytest.mark.slow
def test_so_it_is_on_an_object_store(s3: ObjectStore) -> None:
    check_every_kill(ObjectStorage, f"{s3.url}/kills", 4)


@pytest.mark.slow
def test_an_upload_that_arrives_after_its_run_has_ended_goes_with_the_next_run(s3: ObjectStore) -> None:
    place = f"{s3.url}/late"
    toy(place)
    storage = RunFolder(place).storage
    for name in ("staging/raw/00000.txt", "staging/raw/00099.txt", "state/raw/00001.json", "staging/raw/00001.txt"):
        storage.write(name, b"late")
    toy(place)
    assert [name for name in storage.walk() if name.startswith("staging/") or "/raw/" in name] == []
