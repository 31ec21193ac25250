"""Progress fits the terminal: whole words and numbers, a line per stage."""

import re

import pytest

from pipeline.engine.lines import StageLine, duration, stage_lines

RUN = [
    StageLine("fetch", 123, 1000, 1234.4, 1, 610.0),
    StageLine("resize", 100, 1000, 80.0, 17, 3723.0),
    StageLine("encode-t5", 0, 1000, None, 0, None),
]
LARGE = [StageLine("captions-sentences", 99_999, 100_000, 123_456.0, 12_345_678, 360_000.0)]


def test_a_stage_is_a_line_with_bar_shards_rate_drops_and_remaining_time() -> None:
    assert stage_lines(RUN, 90) == [
        "fetch      [##....................]  123/1,000 shards  1,234 rows/s    1 drop    ETA 10:10",
        "resize     [##....................]  100/1,000 shards     80 rows/s  17 drops  ETA 1:02:03",
        "encode-t5  [......................]    0/1,000 shards                 0 drops",
    ]


@pytest.mark.parametrize("width", range(30, 200))
@pytest.mark.parametrize("stages", [RUN, LARGE])
def test_lines_fit_and_are_never_cut(stages: list[StageLine], width: int) -> None:
    lines = stage_lines(stages, width)
    assert len(lines) == len(stages)
    assert max(map(len, lines)) <= max(width, len("captions-sentences  99,999/100,000"))
    whole = {word for line in stage_lines(stages, 400) for word in words(line)}
    for line in lines:
        assert set(words(line)) <= whole | {word.removesuffix(" shards") for word in whole}


def words(line: str) -> list[str]:
    """The columns, without the bar."""
    return [word for word in re.split(r"  +", line.strip()) if not word.startswith("[")]


def test_in_80_columns_nothing_is_missing() -> None:
    for line in stage_lines([*RUN, StageLine("encode-openclip", 31_000, 100_000, 9_999.0, 99_999, 86_399.0)], 80):
        assert "shards" in line
        assert "drop" in line
    assert all("ETA" in line for line in stage_lines(RUN, 80)[:2])


def test_columns_are_left_out_in_order_as_the_room_shrinks() -> None:
    def columns(width: int) -> str:
        (line,) = stage_lines(LARGE, width)
        return " ".join(re.sub(r"\[.*\]", "bar", word) for word in re.split(r"  +", line))

    seen = list(dict.fromkeys(columns(width) for width in range(120, 20, -1)))
    shards = "captions-sentences bar 99,999/100,000 shards 123,456 rows/s 12,345,678 drops ETA 4 d 4 h"
    assert seen == [
        shards,
        shards.replace("bar ", ""),
        shards.replace("bar ", "").replace(" shards", ""),
        "captions-sentences 99,999/100,000 12,345,678 drops ETA 4 d 4 h",
        "captions-sentences 99,999/100,000 ETA 4 d 4 h",
        "captions-sentences 99,999/100,000",
    ]


def test_an_estimate_that_was_too_small_grows_with_what_is_done() -> None:
    (line,) = stage_lines([StageLine("fetch", 12, 10, None, 0, None)], 60)
    assert line.startswith("fetch  [###")
    assert "12/12 shards" in line
    assert "." not in line


def test_without_a_total_there_is_no_bar() -> None:
    assert stage_lines([StageLine("fetch", 12, None, 3.0, 0, None)], 80) == ["fetch  12 shards  3 rows/s  0 drops"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0:00"), (65.0, "1:05"), (3599.6, "1:00:00"), (172_799.0, "47:59:59"), (363_600.0, "4 d 5 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
