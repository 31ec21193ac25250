"""Shards of some tars alone, from the number of samples that each tar has."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import StaleOutputError
from pipeline.stage import Shard
from pipeline.storage.run_folder import RunFolder
from stages.sources.base import InputPart
from stages.sources.tarfiles import index
from stages.sources.tarfiles.counted import can_count, count_rows_of_files, read_counts, shards_of_files
from stages.sources.tars import WebdatasetConfig, WebdatasetSource
from tests.images import plain_png

SIZES = (5, 0, 3, 7, 1, 4)


def write_tar(path: Path, keys: Sequence[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for key in keys:
            for suffix, data in (("png", plain_png((len(key), 1, 2))), ("txt", key.encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def source(tmp_path: Path) -> WebdatasetSource:
    (tmp_path / "data").mkdir()
    for number, size in enumerate(SIZES):
        keys = [f"k{place}" for place in range(size)]
        write_tar(tmp_path / f"data/{number}.tar", [*keys, *keys[:1]] if number == 3 else keys)  # one comes twice
    return WebdatasetConfig(path=str(tmp_path / "data")).build()


def batches(source: WebdatasetSource) -> list[InputPart]:
    """The first three tars of one batch, the others of a later one."""
    return [replace(part, batch=1 + (place > 2)) for place, part in enumerate(source.parts())]


def described(shards: Iterator[Shard]) -> list[tuple[int, str, object]]:
    return [(shard.index, shard.digest, shard.files) for shard in shards]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    honest = index.open_tar

    def noted(path: str) -> object:
        names.append(Path(path).name)
        return honest(path)

    monkeypatch.setattr(index, "open_tar", noted)
    return names


@pytest.mark.parametrize("shard_size", [1, 3, 4, 100])
def test_any_ranges_are_those_of_all_shards(shard_size: int, source: WebdatasetSource, tmp_path: Path) -> None:
    parts, run = batches(source), RunFolder(tmp_path / "run")
    every = described(source.shards(shard_size, parts))
    assert count_rows_of_files(run, source, parts, shard_size) == len(every)
    counts = read_counts(run, parts) or []
    assert counts == [5, 0, 3, 8, 1, 4]
    for first in range(len(every) + 1):
        for end in range(first, len(every) + 1):
            found = shards_of_files(source, parts, counts, shard_size, [range(first, end)])
            assert described(found) == every[first:end]
    two = shards_of_files(source, parts, counts, shard_size, [range(1), range(len(every) - 1, len(every))])
    assert described(two) == ([every[0], every[-1]] if len(every) > 1 else every)


def test_only_the_tars_of_the_shards_are_opened(source: WebdatasetSource, tmp_path: Path, opened: list[str]) -> None:
    parts, run = batches(source), RunFolder(tmp_path / "run")
    count_rows_of_files(run, source, parts, 2)
    counts = read_counts(run, parts)
    assert counts is not None
    opened.clear()
    list(shards_of_files(source, parts, counts, 2, [range(4, 8)]))  # the 8 samples of the fourth tar
    assert set(opened) == {"3.tar"}


def test_a_tar_that_has_other_samples_since_is_refused(source: WebdatasetSource, tmp_path: Path) -> None:
    parts, run = batches(source), RunFolder(tmp_path / "run")
    count_rows_of_files(run, source, parts, 2)
    counts = read_counts(run, parts)
    assert counts is not None
    write_tar(tmp_path / "data/2.tar", ["only"])
    with pytest.raises(StaleOutputError, match=r"2\.tar has 1 samples, and had 3 when the input was counted"):
        list(shards_of_files(source, parts, counts, 2, [range(4)]))


def test_notes_of_other_tars_are_not_used(source: WebdatasetSource, tmp_path: Path) -> None:
    parts, run = batches(source), RunFolder(tmp_path / "run")
    assert read_counts(run, parts) is None
    count_rows_of_files(run, source, parts, 2)
    assert read_counts(run, parts[:-1]) is None
    run.storage.write_text("input/counted.jsonl", "damaged")
    assert read_counts(run, parts) is None


def test_names_that_begin_others_are_read_with_all(source: WebdatasetSource) -> None:
    parts = batches(source)
    assert can_count(source, parts)
    assert not can_count(source, [*parts, InputPart("x", name=f"{parts[0].name}/b")])
