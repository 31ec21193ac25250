"""Time and money on machines that are taken away, against the real scheduler on a cluster that loses nodes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.planning.hardware import Hardware, Spot
from pipeline.planning.interruptions import Interruptions
from pipeline.planning.simulate import SimulatedShard, simulate
from pipeline.planning.simulated_executor import NodeEvent, SimulatedCluster, SimulatedStage
from pipeline.planning.spot import StageLoad, spot_run, spot_training
from tests.commands import call

SMALL = ["source.num_samples=120", "shard_size=40", "images.sizes_px=[16,48]"]
ENCODE = SimulatedStage("encode", (), start_s=30.0, shard_s=2.0, row_s=0.1, uses={"gpus": 1.0}, workers=4)
CLUSTER = SimulatedCluster({"gpus": 4.0, "cpus": 4.0}, processes=4, window=16, nodes=4)


def machines(per_hour: float, **changes: Any) -> Hardware:
    spot = Spot(usd_per_gpu_hour=1.0, interruptions_per_node_hour=per_hour, wait_s=60.0, start_s=0.0)
    values = {"num_gpus": 4, "num_cpus": 4, "num_nodes": 4, "usd_per_gpu_hour": 3.0, "spot": spot}
    return Hardware.model_validate({**values, **changes})


def lives(per_hour: float, nodes: int, until_s: float, wait_s: float) -> list[NodeEvent]:
    """Each node is lost after a random time, again and again, and comes back after `wait_s`."""
    chance, events = np.random.default_rng(0), []
    for node in range(nodes):
        now = 0.0
        while now < until_s:
            now += chance.exponential(3600 / per_hour)
            events.append(NodeEvent(now, node, comes=False))
            now += wait_s
            events.append(NodeEvent(now, node, comes=True))
    return events


@pytest.mark.slow
def test_the_expectation_is_what_the_scheduler_needs_on_a_cluster_that_loses_nodes() -> None:
    per_hour, shards = 6.0, [SimulatedShard(("encode",), 1000)] * 8000
    calm = simulate([ENCODE], shards, CLUSTER)
    found = simulate([ENCODE], shards, CLUSTER, lives(per_hour, 4, 2 * calm.seconds, 60.0))
    load = StageLoad(ENCODE, len(shards), 8_000_000, calm.busy_s["encode"])
    expected = spot_run([load], CLUSTER, machines(per_hour), calm.seconds, files=0)
    assert calm.seconds == pytest.approx(8000 / 4 * 102, rel=1e-3)
    assert expected["seconds"] / calm.seconds > 1.2, "interruptions count"
    assert found.seconds == pytest.approx(expected["seconds"], rel=0.015)
    redone = found.lost_s["encode"] / calm.busy_s["encode"]
    assert redone == pytest.approx(expected["redone"], rel=0.05)


def test_a_run_on_machines_that_are_never_taken_away_is_the_run() -> None:
    load = StageLoad(ENCODE, 100, 100_000, 10_200.0)
    expected = spot_run([load], CLUSTER, machines(0.0), 2550.0, files=0)
    assert (expected["seconds"], expected["interruptions"], expected["redone"]) == (2550.0, 0.0, 0.0)
    assert expected["usd"] == pytest.approx(2550 / 3600 * 4 * 1.0)


def test_interruptions_are_those_of_all_nodes_while_they_are_paid_for() -> None:
    load = StageLoad(ENCODE, 8000, 8_000_000, 8000 * 102.0)
    expected = spot_run([load], CLUSTER, machines(0.1), 204_000.0, files=0)
    paid_h = expected["usd"] / 4
    assert expected["interruptions"] == pytest.approx(0.1 * 4 * paid_h)
    assert expected["seconds"] == pytest.approx(paid_h * (3600 + 0.1 * 60))


@pytest.mark.parametrize("usd_per_file", [0.0, 0.01])
def test_the_best_shard_size_is_near_the_one_of_the_closed_form(usd_per_file: float) -> None:
    load = StageLoad(ENCODE, 8000, 8_000_000, 8000 * 102.0)
    hardware = machines(1.0, usd_per_million_puts=1e6 * usd_per_file)
    expected = spot_run([load], CLUSTER, hardware, 204_000.0, files=8000)
    files_s = usd_per_file * 3600  # a worker costs a dollar per hour
    ideal = Interruptions(1 / 3600, start_s=30.0).best_work_s(2.0, files_s) / 0.1
    best = expected["best_shard_rows"]
    assert abs(math.log2(best / ideal)) <= 0.51
    assert expected["at_best"]["usd_with_files"] <= expected["usd_with_files"]


def test_shards_stay_so_many_that_all_workers_have_some() -> None:
    load = StageLoad(ENCODE, 100, 10_000, 1200.0)
    expected = spot_run([load], CLUSTER, machines(1e-6), 300.0, files=0)
    assert expected["best_shard_rows"] == 128, "10,000 rows are 64 shards of 156"
    tiny = spot_run([StageLoad(ENCODE, 1, 100, 12.0)], CLUSTER, machines(1.0), 12.0, files=0)
    assert (tiny["best_shard_rows"], tiny["at_best"]) == (None, None)


def test_a_training_on_several_nodes_is_taken_back_by_the_loss_of_each() -> None:
    hardware = machines(0.25, step_s=0.5, checkpoint_s=10.0, model_start_s=120.0)
    found = spot_training(hardware, "mine", num_steps=100_000, every_steps=1000)
    assert found["seconds"] == 100_000 * 0.5 + 100 * 10
    assert found["usd_compute"] == pytest.approx(12 * found["seconds"] / 3600)
    machine = Interruptions(1 / 3600, wait_s=60.0, start_s=120.0)
    paid_s = 100 * machine.paid_s(510.0)
    spot = found["spot"]
    assert spot["seconds"] == pytest.approx(paid_s * (1 + 60 / 3600))
    assert spot["usd"] == pytest.approx(4 * paid_s / 3600)
    assert spot["interruptions"] == pytest.approx(paid_s / 3600)
    assert spot["best_every_steps"] == pytest.approx(machine.best_work_s(10.0) / 0.5, abs=1)
    assert spot["young_steps"] == pytest.approx(math.sqrt(2 * 10 * 3600) / 0.5)
    costs = [
        spot_training(hardware, "mine", 100_000, spot["best_every_steps"] + by)["spot"]["usd"] for by in (-20, 0, 20)
    ]
    assert costs[1] == min(costs) == spot["at_best"]["usd"]


def test_a_training_whose_machines_are_gone_before_a_checkpoint_never_ends() -> None:
    hardware = machines(60.0, step_s=0.5, checkpoint_s=10.0)
    found = spot_training(hardware, "mine", num_steps=100_000, every_steps=10_000)["spot"]
    assert (found["seconds"], found["usd"], found["redone"]) == (None, None, None)
    assert found["at_best"]["seconds"] > 0


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    machine = machines(0.5, tflops={"bfloat16": 1e-6}, cpu_s_per_row={"fetch": 0.01, "resize": 0.02}, task_s=0.05)
    path.write_text(yaml.safe_dump(machine.model_dump(mode="json")))
    return path


def test_a_plan_shows_spot_machines_beside_those_that_stay(tmp_path: Path, profile: Path) -> None:
    arguments = ["plan", "precompute", "--out", str(tmp_path / "run"), "--profile", str(profile), "--rows", "1000000"]
    estimate = json.loads(call(*arguments, *SMALL, "--json").out)["estimate"]
    spot = estimate["spot"]
    assert spot["seconds"] > estimate["seconds"]
    assert spot["usd"] < estimate["usd_compute"]
    shown = call(*arguments, *SMALL).out
    assert f", ${spot['usd']:,.2f}, {spot['interruptions']:,.3g} interruptions, " in shown
    assert f"shards      of {spot['best_shard_rows']:,} samples are best there: " in shown
    plain = yaml.safe_load(profile.read_text()) | {"spot": None}
    profile.write_text(yaml.safe_dump(plain))
    assert json.loads(call(*arguments, *SMALL, "--json").out)["estimate"]["spot"] is None


def test_a_plan_of_a_training_shows_the_best_interval_of_checkpoints(tmp_path: Path, profile: Path) -> None:
    arguments = ["plan", "train", "-c", "minimagen-base-test", f"store={tmp_path}/s", "--out", str(tmp_path / "run")]
    refused = call(*arguments, "--profile", str(profile))
    assert (refused.code, refused.out) == (2, "")
    assert "step_s is missing; copy the profile and enter" in refused.err
    known = yaml.safe_load(profile.read_text()) | {"step_s": 0.2, "checkpoint_s": 3.0}
    profile.write_text(yaml.safe_dump(known))
    result = call(*arguments, "--profile", str(profile), "--json")
    spot = json.loads(result.out)["estimate"]["spot"]
    shown = call(*arguments, "--profile", str(profile)).out
    assert f"checkpoints every {spot['best_every_steps']:,} steps are best there: " in shown
    assert "estimate" not in json.loads(call(*arguments, "--json").out)
    refused = call(*arguments, "--profile", str(profile), "--rows", "9")
    assert refused.code == 2
    assert "--probe, --rows, --save: train has no shards to plan; leave them out" in refused.err
