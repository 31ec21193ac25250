"""Batches by length: every caption once, within the budget, and the same every time."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from stages.encoders.batches.batching import token_budget_batches

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
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1


@quick
@given(LENGTHS, BUDGETS)
def test_batches_are_full(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)
    for batch, following in itertools.pairwise(batches):
        assert sum(lengths[i] for i in batch) + lengths[following[0]] > budget


@quick
@given(LENGTHS, BUDGETS)
def test_lengths_fall_and_equal_ones_keep_their_order(lengths: list[int], budget: int) -> None:
    order = [i for batch in token_budget_batches(lengths, budget) for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


@quick
@given(LENGTHS, BUDGETS)
def test_the_same_lengths_make_the_same_batches(lengths: list[int], budget: int) -> None:
    assert token_budget_batches(lengths, budget) == token_budget_batches(tuple(lengths), budget)


def test_a_worked_example() -> None:
    assert token_budget_batches([3, 20, 8, 1, 9], 30) == [[1, 4], [2, 0, 3]]
    assert token_budget_batches([], 48) == []
    assert token_budget_batches([500], 48) == [[0]]
