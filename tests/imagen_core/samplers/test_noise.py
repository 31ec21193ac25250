"""An image's random numbers are its own."""

import math

import pytest
import torch

from imagen_core.samplers import SeededNoise


def test_rows_depend_on_their_own_seed_only():
    alone = SeededNoise([7])
    together = SeededNoise([3, 7, 5])
    for _ in range(3):  # and so do the numbers of later calls
        assert torch.equal(alone.normal((3, 4, 4))[0], together.normal((3, 4, 4))[1])


def test_another_seed_or_stream_gives_other_independent_numbers():
    rows = SeededNoise([0, 1]).normal((100_000,), dtype=torch.float64)
    other = SeededNoise([0], stream=1).normal((100_000,), dtype=torch.float64)
    correlation = torch.corrcoef(torch.cat([rows, other]))
    assert float((correlation - torch.eye(3)).abs().max()) < 5 / math.sqrt(100_000)


def test_seeds_and_streams_do_not_add_up():
    assert not torch.equal(SeededNoise([1], stream=0).normal((9,)), SeededNoise([0], stream=1).normal((9,)))


def test_numbers_are_standard_normal():
    numbers = SeededNoise([5]).normal((200_000,), dtype=torch.float64)
    assert float(numbers.mean()) == pytest.approx(0, abs=0.01)
    assert float(numbers.var()) == pytest.approx(1, abs=0.015)


def test_float32_is_the_rounded_float64():
    exact = SeededNoise([5]).normal((50,), dtype=torch.float64)
    assert torch.equal(SeededNoise([5]).normal((50,), dtype=torch.float32), exact.float())
