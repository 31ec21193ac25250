"""Which rows are stored does not depend on whether the first tokens were run apart."""

import numpy as np
import pytest

from stages.encoders.batches.model_input import ModelInput

ROWS = np.arange(20, dtype=np.float32).reshape(10, 2)


@pytest.mark.parametrize(
    ("head", "start", "tail", "zeros"), [(0, 0, 0, 0), (1, 4, 0, 0), (0, 7, 0, 0), (2, 2, 1, 0), (6, 8, 0, 3)]
)
@pytest.mark.parametrize("count", [0, 1, 5, 9])
def test_rows_are_those_of_all_states(head: int, start: int, tail: int, zeros: int, count: int) -> None:
    one = ModelInput(list(range(10)), (0, 0), head, start, tail, zeros_after=zeros)
    expected = [*ROWS[:head], *ROWS[start : 10 - tail], *np.zeros((zeros, 2))]
    assert one.num_rows == len(expected)
    np.testing.assert_array_equal(one.kept(ROWS), expected)
    np.testing.assert_array_equal(one.kept(ROWS[count:], ROWS[:count]), expected)


@pytest.mark.parametrize(
    ("ids", "masked", "begins"),
    [
        ([7, 8, 9], (0, 0), True),
        ([7, 8], (0, 0), False),
        ([7, 9, 9], (0, 0), False),
        ([], (0, 0), False),
        ([7, 8, 9], (2, 3), True),
        ([7, 8, 9], (1, 3), False),
    ],
)
def test_tokens_can_be_run_apart_where_they_come_first_and_are_attended_to(
    ids: list[int], masked: tuple[int, int], begins: bool
) -> None:
    assert ModelInput(ids, masked).begins_with([7, 8]) == begins
