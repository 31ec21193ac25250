"""How shards are divided among drivers."""

from pathlib import Path

import pytest

from pipeline.engine.division import Division, read_division, shown
from pipeline.errors import ConfigError
from pipeline.options import Part
from pipeline.plan import InputCounts
from pipeline.storage.run_folder import DIVISION, RunFolder


def division(shards: int, parts: int, begins: tuple[int, ...] = (0,)) -> Division:
    return Division("id", parts, begins, InputCounts(shards, 1), {}, {})


@pytest.mark.parametrize("shards", [0, 1, 7, 100])
@pytest.mark.parametrize("parts", [1, 3, 7, 150])
def test_each_shard_belongs_to_one_part_and_parts_differ_by_one_shard_at_most(shards: int, parts: int) -> None:
    divided = division(shards, parts)
    found = [index for part in range(1, parts + 1) for those in divided.ranges(part) for index in those]
    assert found == list(range(shards))
    sizes = {sum(map(len, divided.ranges(part))) for part in range(1, parts + 1)}
    assert max(sizes) - min(sizes) <= 1


def test_each_range_is_divided_among_all_parts() -> None:
    divided = division(30, 2, (0, 10))
    assert [divided.ranges(part) for part in (1, 2)] == [[range(5), range(10, 20)], [range(5, 10), range(20, 30)]]
    assert [divided.part_of(shard) for shard in (0, 9, 10, 29)] == [1, 2, 1, 2]


def test_a_division_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert read_division(run) is None
    written = Division("id", 3, (0, 4), InputCounts(9, 2, {"filtered": 1}), {"shard_size": 5}, {"samples": "d"}, True)
    written.write(run)
    assert read_division(run) == written


@pytest.mark.parametrize("content", ["{", "[]", '{"parts": 3}', '{"begins": [0], "counts": {"a": 1}}'])
def test_a_damaged_division_is_named_with_the_remedy(content: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.storage.write_text(DIVISION, content)
    with pytest.raises(ConfigError, match=r"parts/plan\.json.*delete it"):
        read_division(run)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5", ""])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give K/N, with K from 1 to N"):
        Part.parse(text)


def test_numbers_of_parts_are_shown_as_ranges() -> None:
    assert Part.parse("3/100") == Part(3, 100)
    assert shown([5, 3, 6, 7, 9]) == "3, 5-7, 9"
    assert shown([]) == ""
