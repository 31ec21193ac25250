"""The order of an epoch: a permutation that looks random, is frozen, and can be computed in parts."""

import numpy as np
import pytest

from imagen_core.store.read import order
from imagen_core.store.read.order import ShuffledOrder, WindowedOrder, choices, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_the_order_is_a_permutation_that_can_be_computed_in_parts(size: int) -> None:
    full = permute(np.arange(size), size, key=12345)
    assert sorted(full.tolist()) == list(range(size))
    parts = [permute(np.array([i]), size, key=12345)[0] for i in range(0, size, 97)]
    assert parts == full[::97].tolist()


def test_the_order_looks_random() -> None:
    orders = np.stack([permute(np.arange(50), 50, key) for key in range(2000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=50) for place in range(50)])
    chi2 = ((counts - 40) ** 2 / 40).sum()  # 49 * 49 degrees of freedom, standard deviation 69
    assert abs(chi2 - 49 * 49) < 5 * 69
    runs = np.mean(np.diff(orders, axis=1) == 1)  # neighbours that stayed neighbours: 1 of 50
    assert abs(runs - 0.02) < 0.003


def test_the_order_is_frozen() -> None:
    """A resumed run relies on these numbers; a change here breaks every checkpoint."""
    windowed = WindowedOrder(np.array([0, 2, 5, 6, 9]), window=2, seed=3)
    assert windowed.indices(1, np.arange(9)).tolist() == [8, 7, 2, 6, 4, 3, 0, 5, 1]
    assert permute(np.arange(8), 8, key=1).tolist() == [1, 0, 5, 4, 6, 3, 7, 2]
    assert [number % 5 for number in choices(np.arange(8), key=1)] == [4, 1, 1, 3, 0, 3, 4, 3]


@pytest.mark.parametrize("window", [None, 2])
def test_the_order_is_the_same_read_in_any_parts(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Samples are computed for the next positions too; going back, and to another epoch, begins again."""
    monkeypatch.setattr(order, "_AHEAD", 5)
    bounds = np.array([0, 4, 9, 11, 20])
    make = lambda: ShuffledOrder(20, 3) if window is None else WindowedOrder(bounds, window, 3)  # noqa: E731
    whole = {epoch: make().indices(epoch, np.arange(20)).tolist() for epoch in (0, 1)}
    assert sorted(whole[0]) == sorted(whole[1]) == list(range(20))
    read = make()
    for epoch, start, stop in (
        (0, 0, 3),
        (0, 3, 4),
        (0, 4, 12),
        (1, 4, 6),
        (0, 4, 6),
        (0, 2, 3),
        (0, 17, 20),
        (0, 9, 9),
    ):
        assert read.indices(epoch, np.arange(start, stop)).tolist() == whole[epoch][start:stop]
