"""The expected cost of interruptions equals its limits, its bounds, and what a simulation finds."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from pipeline.planning.interruptions import Interruptions

HOUR = 3600.0
OFTEN = Interruptions(per_s=1 / HOUR, wait_s=300.0, start_s=240.0)


def simulated(machine: Interruptions, segment_s: float, count: int, seed: int) -> tuple[float, float, float]:
    """Paid seconds, all seconds and seconds of work done again per segment: machines live for random times."""
    chance = np.random.default_rng(seed)
    lives = iter(lambda: chance.exponential(1 / machine.per_s), None)
    left_s, paid_s, waited_s, redone_s = next(lives), 0.0, 0.0, 0.0
    for _ in range(count):
        while left_s < segment_s:
            paid_s += left_s
            redone_s += left_s
            waited_s += machine.wait_s
            while (left_s := next(lives)) <= machine.start_s:
                paid_s += left_s
                waited_s += machine.wait_s
            paid_s += machine.start_s
            left_s -= machine.start_s
        left_s -= segment_s
        paid_s += segment_s
    return paid_s / count, (paid_s + waited_s) / count, redone_s / count


@pytest.mark.parametrize(
    ("machine", "segment_s"),
    [
        (OFTEN, 900.0),
        (OFTEN, HOUR),
        (Interruptions(per_s=4 / HOUR, wait_s=60.0, start_s=600.0), 300.0),
        (Interruptions(per_s=1 / HOUR), 2 * HOUR),
    ],
)
def test_the_expectation_is_what_a_simulation_finds(machine: Interruptions, segment_s: float) -> None:
    paid_s, all_s, redone_s = simulated(machine, segment_s, 60_000, seed=1)
    assert machine.paid_s(segment_s) == pytest.approx(paid_s, rel=0.01)
    assert machine.all_s(machine.paid_s(segment_s)) == pytest.approx(all_s, rel=0.01)
    assert machine.redone_s(segment_s) == pytest.approx(redone_s, rel=0.02)


def test_of_a_rare_interruption_half_a_segment_is_lost() -> None:
    rare = Interruptions(per_s=1e-9, start_s=100.0)
    lost = rare.redone_s(1000.0) / (rare.per_s * rare.paid_s(1000.0))
    assert lost == pytest.approx(500.0, rel=1e-3)
    assert rare.paid_s(1000.0) == pytest.approx(1000 + 1000e-9 * (100 + 500), rel=1e-12)


def test_a_machine_that_stays_costs_its_work() -> None:
    stays = Interruptions(0.0, wait_s=50.0, start_s=50.0)
    assert (stays.paid_s(7.0), stays.all_s(7.0), stays.redone_s(7.0)) == (7.0, 7.0, 0.0)
    assert stays.best_work_s(1.0) == math.inf


def test_a_segment_much_longer_than_machines_live_never_ends() -> None:
    assert OFTEN.paid_s(200 * HOUR) == math.inf
    assert OFTEN.redone_s(200 * HOUR) == math.inf


@pytest.mark.parametrize("overhead_s", [1.0, 30.0, 600.0])
@pytest.mark.parametrize("further_s", [0.0, 20.0, 8000.0])
def test_the_best_interval_has_the_least_expected_cost(overhead_s: float, further_s: float) -> None:
    def cost(work_s: float) -> float:
        return (OFTEN.paid_s(work_s + overhead_s) + further_s) / work_s

    best = OFTEN.best_work_s(overhead_s, further_s)
    found: Any = minimize_scalar(lambda log: cost(math.exp(log)), bounds=(0, 12), method="bounded")
    assert best == pytest.approx(math.exp(found.x), rel=1e-4)


def test_the_best_interval_is_youngs_when_interruptions_are_rare_and_dalys_when_they_are_not() -> None:
    rare = Interruptions(1e-6)
    assert rare.best_work_s(1.0) == pytest.approx(math.sqrt(2 * 1.0 / 1e-6), rel=1e-3)
    overhead, mean = 300.0, HOUR
    part = overhead / (2 * mean)
    daly = math.sqrt(2 * overhead * mean) * (1 + math.sqrt(part) / 3 + part / 9) - overhead
    assert OFTEN.best_work_s(overhead) == pytest.approx(daly, rel=1e-3)
    assert OFTEN.best_work_s(0.0) == 0.0
