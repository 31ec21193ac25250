"""The played clock gives the times that can be computed by hand."""

from dataclasses import replace

import pytest

from pipeline.planning.simulate import SimulatedShard, simulate
from pipeline.planning.simulated_executor import SimulatedCluster, SimulatedStage

READ = SimulatedStage("read", (), start_s=0.0, shard_s=0.0, row_s=1.0, uses={"cpus": 1.0})
ENCODE = SimulatedStage("encode", ("read",), start_s=0.0, shard_s=0.0, row_s=3.0, uses={}, workers=1)
ROOMY = SimulatedCluster({"cpus": 8.0}, processes=1, window=100)


def jobs(count: int, *needs: str, rows: int = 1) -> list[SimulatedShard]:
    return [SimulatedShard(needs, rows)] * count


def test_one_process_takes_the_sum() -> None:
    simulated = replace(READ, shard_s=0.5)
    simulation = simulate([simulated], jobs(4, "read", rows=2), ROOMY)
    assert simulation.seconds == pytest.approx(4 * 2.5)
    assert simulation.used["cpus"] == pytest.approx(10.0)


def test_stages_overlap_and_the_slowest_sets_the_pace() -> None:
    simulation = simulate([READ, ENCODE], jobs(10, "read", "encode"), ROOMY)
    assert simulation.seconds == pytest.approx(1 + 10 * 3)
    assert simulation.busy_s == pytest.approx({"read": 10, "encode": 30})


def test_two_workers_halve_the_time_of_their_stage() -> None:
    simulation = simulate([READ, replace(ENCODE, workers=2, row_s=2.0)], jobs(10, "read", "encode"), ROOMY)
    assert simulation.seconds == pytest.approx(1 + 10 * 1 + 1)


def test_a_window_of_one_shard_forbids_overlap() -> None:
    simulation = simulate([READ, ENCODE], jobs(10, "read", "encode"), replace(ROOMY, window=1))
    assert simulation.seconds == pytest.approx(10 * (1 + 3))


def test_tasks_that_ask_for_more_cpus_than_there_are_slow_each_other_down() -> None:
    machine = SimulatedCluster({"cpus": 1.0}, processes=2, window=100)
    simulation = simulate([READ], jobs(10, "read"), machine)
    assert simulation.seconds == pytest.approx(10.0), "two processes on one CPU are no faster than one"
    assert simulation.busy_s["read"] == pytest.approx(20.0)


def test_time_spent_waiting_is_not_stretched() -> None:
    machine = SimulatedCluster({"cpus": 1.0}, processes=4, window=100)
    waiting = replace(READ, uses={"cpus": 0.25})
    assert simulate([waiting], jobs(8, "read"), machine).seconds == pytest.approx(2.0)


def test_all_downloads_together_stay_within_the_network() -> None:
    machine = SimulatedCluster({"cpus": 8.0, "network": 2.0}, processes=8, window=100)
    simulation = simulate([replace(READ, uses={"network": 1.0})], jobs(8, "read"), machine)
    assert simulation.seconds == pytest.approx(4.0)


def test_each_worker_starts_once() -> None:
    simulation = simulate([READ, replace(ENCODE, start_s=7.0)], jobs(10, "read", "encode"), ROOMY)
    assert simulation.seconds == pytest.approx(1 + 7 + 10 * 3)
    machine = SimulatedCluster({"cpus": 2.0}, processes=2, window=100)
    assert simulate([replace(READ, start_s=5.0)], jobs(4, "read"), machine).seconds == pytest.approx(5 + 2)


def test_half_a_slot_lets_twice_the_tasks_run() -> None:
    assert simulate([replace(READ, slots=0.5)], jobs(4, "read"), ROOMY).seconds == pytest.approx(2.0)


def test_shards_skip_the_stages_they_do_not_need() -> None:
    simulation = simulate([READ, ENCODE], jobs(5, "encode"), ROOMY)
    assert simulation.seconds == pytest.approx(15.0)
    assert simulation.busy_s["read"] == 0
