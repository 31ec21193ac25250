"""Batches by length: every caption once, within the budget, and the same every time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.encoders.batching import PAD_MULTIPLE, padded_length, token_budget_batches

LENGTHS = st.lists(st.integers(1, 300), max_size=200)
BUDGETS = st.integers(1, 5000)

quick = settings(deadline=None, max_examples=50)


@quick
@given(LENGTHS, BUDGETS)
def test_every_index_comes_once(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches)


@quick
@given(LENGTHS, BUDGETS)
def test_a_batch_keeps_the_budget_unless_it_is_one_caption(lengths: list[int], budget: int) -> None:
    for batch in token_budget_batches(lengths, budget):
        padded = len(batch) * padded_length(max(lengths[i] for i in batch))
        assert padded <= budget or len(batch) == 1


@quick
@given(LENGTHS, BUDGETS)
def test_batches_are_full(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * padded_length(lengths[batch[0]]) > budget


@quick
@given(LENGTHS, BUDGETS)
def test_lengths_fall_and_equal_ones_keep_their_order(lengths: list[int], budget: int) -> None:
    order = [i for batch in token_budget_batches(lengths, budget) for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


@quick
@given(LENGTHS, BUDGETS)
def test_the_same_lengths_make_the_same_batches(lengths: list[int], budget: int) -> None:
    assert token_budget_batches(lengths, budget) == token_budget_batches(tuple(lengths), budget)


@quick
@given(st.lists(st.integers(1, 64), min_size=64, max_size=400))
def test_little_of_a_batch_is_padding(lengths: list[int]) -> None:
    """Padding beyond the rounding is at most one batch's spread of lengths for each batch."""
    batches = token_budget_batches(lengths, 1024)
    padded = sum(len(batch) * padded_length(lengths[batch[0]]) for batch in batches)
    rounding = len(lengths) * (PAD_MULTIPLE - 1)
    spread = sum(len(batch) * (lengths[batch[0]] - lengths[batch[-1]]) for batch in batches)
    assert padded <= sum(lengths) + rounding + spread


def test_a_worked_example() -> None:
    assert token_budget_batches([3, 20, 8, 1, 9], 48) == [[1, 4], [2, 0, 3]]
    assert token_budget_batches([], 48) == []
    assert token_budget_batches([500], 48) == [[0]]


@pytest.mark.parametrize(("tokens", "padded"), [(1, 8), (7, 8), (8, 8), (9, 16), (128, 128), (129, 136)])
def test_lengths_are_rounded_up_to_eight(tokens: int, padded: int) -> None:
    assert (padded_length(tokens), PAD_MULTIPLE) == (padded, 8)
