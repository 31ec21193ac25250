"""Rates from the ends of tasks."""

from pipeline.engine.rates import Bins, RecentTasks


def test_intervals_keep_every_count_while_they_grow() -> None:
    bins = Bins(1000.0)
    for second in range(10_000):
        bins.add(1000.0 + second, 3)
    assert sum(bins.counts) == 30_000
    assert (len(bins.counts), bins.width_s) == (157, 64.0)
    rates = bins.rates(1000.0 + 157 * 64)
    assert rates[0] == (1000.0, 3.0)
    assert all(rate == 3.0 for _, rate in rates[:-1])


def test_what_took_long_counts_evenly_over_that_time() -> None:
    bins = Bins(100.0)
    bins.add(104.5, 8, seconds=4.0)
    assert bins.counts == [1.0, 2.0, 2.0, 2.0, 1.0]
    bins.add(101.0, 5, seconds=50.0)  # began before the run
    assert bins.counts == [6.0, 2.0, 2.0, 2.0, 1.0]
    bins.add(1000.0, 480, seconds=480.0)
    assert (bins.width_s, sum(bins.counts)) == (4.0, 493.0)


def test_the_last_interval_counts_for_the_seconds_that_it_has_had() -> None:
    bins = Bins(0.0)
    bins.add(0.2, 10)
    bins.add(1.5, 10)
    assert bins.rates(1.5) == [(0.0, 10.0), (1.0, 20.0)]


def test_a_silent_time_until_the_end_has_no_rate() -> None:
    bins = Bins(0.0)
    bins.add(0.5, 10)
    assert bins.rates(3.01) == [(0.0, 10.0), (1.0, 0.0), (2.0, 0.0)]
    assert len(bins.rates(100_000.0)) <= 240


def test_what_ended_before_the_start_counts_at_the_start() -> None:
    bins = Bins(100.0)
    bins.add(40.0, 1)
    assert bins.rates(101.0) == [(100.0, 1.0)]


def test_busy_workers_are_worker_seconds_per_second_of_the_last_minute() -> None:
    tasks = RecentTasks()
    for end in range(10, 211, 10):  # two at a time, 10 s each
        tasks.add(end, 10.0)
        tasks.add(end, 10.0)
    assert tasks.busy(0.0, 210.0) == 2.0


def test_of_a_run_that_just_began_only_its_own_seconds_count() -> None:
    tasks = RecentTasks()
    tasks.add(104.0, 4.0)
    assert tasks.busy(100.0, 108.0) == 0.5
    assert tasks.busy(100.0, 100.0) == 0.0
    assert tasks.busy(None, None) == 0.0


def test_a_long_task_counts_with_its_part_in_the_minute() -> None:
    tasks = RecentTasks()
    tasks.add(200.0, 150.0)
    assert tasks.busy(0.0, 200.0) == 1.0
