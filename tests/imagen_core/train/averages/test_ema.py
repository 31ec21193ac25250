"""Averages of the weights: the plain mean first, then exponential, and never in the way of training."""

import pytest
import torch
from torch import nn

from imagen_core.train.averages.ema import WeightAverages, decay


def trained(num_updates: int, rates: tuple[float, ...], dtype: torch.dtype = torch.float32) -> WeightAverages:
    """Averages of a weight that is k after update k = 0, 1, 2, ..."""
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    averages = WeightAverages(model, rates)
    for k in range(num_updates):
        with torch.no_grad():
            model.weight.fill_(k)
        averages.update()
    return averages


@pytest.mark.parametrize("num_updates", [1, 2, 9, 10])
def test_early_averages_are_the_plain_mean(num_updates: int) -> None:
    averages = trained(num_updates, (0.9, 0.9999))
    for average in averages.averages.values():
        assert float(average["weight"]) == pytest.approx((num_updates - 1) / 2)


def test_later_ones_are_exponential() -> None:
    rate, num_updates = 0.9, 60
    (average,) = trained(num_updates, (rate,)).averages.values()
    expected = 4.5  # the mean of 0 ... 9, at update 9 the decay reaches 0.9
    for k in range(10, num_updates):
        expected = rate * expected + (1 - rate) * k
    assert float(average["weight"]) == pytest.approx(expected, rel=1e-6)
    assert decay(rate, 8) == pytest.approx(8 / 9)
    assert decay(rate, 9) == decay(rate, 10**6) == rate


def test_the_first_random_weights_do_not_count() -> None:
    model = nn.Linear(2, 2)
    averages = WeightAverages(model, (0.9999,))
    with torch.no_grad():
        model.weight.fill_(3.0)
    averages.update()
    assert torch.equal(averages.averages["ema-0.9999"]["weight"], model.weight)


def test_before_the_first_update_that_counts_it_is_the_newest_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    averages = WeightAverages(model, (0.9,))
    for value, counts in ((5.0, False), (7.0, False), (1.0, True), (3.0, True)):
        with torch.no_grad():
            model.weight.fill_(value)
        averages.update(counts=counts)
        if not counts:
            assert float(averages.averages["ema-0.9"]["weight"]) == value
    assert float(averages.averages["ema-0.9"]["weight"]) == 2.0


def test_rate_zero_is_the_last_weights() -> None:
    (average,) = trained(7, (0.0,)).averages.values()
    assert float(average["weight"]) == 6


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_averages_are_at_least_float32(weights: torch.dtype, kept: torch.dtype) -> None:
    (average,) = trained(3, (0.9,), weights).averages.values()
    assert average["weight"].dtype == kept
    assert float(average["weight"]) == 1


def test_averages_are_kept_on_the_requested_device() -> None:
    averages = WeightAverages(nn.Linear(1, 1), (0.9,), "meta")
    averages.update()
    assert {values.device.type for values in averages.averages["ema-0.9"].values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_averages_in_main_memory_are_those_on_the_gpu() -> None:
    model = nn.Linear(8, 8).cuda()
    there, here = WeightAverages(model, (0.9,)), WeightAverages(model, (0.9,), "cpu")
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(1)
        there.update()
        here.update()
    assert torch.equal(here.averages["ema-0.9"]["weight"], there.averages["ema-0.9"]["weight"].cpu())
    with here.applied("ema-0.9"):
        assert torch.equal(model.weight.cpu(), here.averages["ema-0.9"]["weight"])


def test_the_model_has_the_average_within_the_block_only() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(4, 1))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averages = WeightAverages(model, (0.5,))
    averages.update()
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with averages.applied("ema-0.5"):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p, q + 1) for p, q in zip(model.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match="in the block"), averages.applied("ema-0.5"):
        raise RuntimeError("in the block")
    assert all(torch.equal(p, q + 1) for p, q in zip(model.parameters(), before, strict=True))
