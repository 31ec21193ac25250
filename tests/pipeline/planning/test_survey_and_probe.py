"""What is left to do is counted, and what it costs is measured, without touching the run folder."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.engine.state import RunState
from pipeline.errors import PipelineError
from pipeline.executors.base import ExecutionConfig
from pipeline.options import RunOptions
from pipeline.planning.estimate import Basis, expected_bytes, predict
from pipeline.planning.hardware import Hardware
from pipeline.planning.probe import LinearCost, Measured, StageCost, probe
from pipeline.planning.survey import ShardBatch, Survey, survey
from pipeline.stage import Shard
from tests.pipeline.toy import Toy, ToyConfig, ToyOptions


def toy(**options: object) -> Toy:
    return Toy(ToyConfig(toy=ToyOptions.model_validate(options)))


def opened(workflow: Toy, out: Path) -> RunState:
    return RunState.open(str(out), workflow.plan)


@pytest.fixture(autouse=True)
def no_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the probe runs all rows of these small inputs on a busy machine too."""
    monkeypatch.setattr("pipeline.planning.probe._BUDGET_S", 600.0)


def test_like_shards_are_one_batch(tmp_path: Path) -> None:
    found = survey(opened(toy(num_shards=500), tmp_path))
    assert found.work == [ShardBatch(("fetch", "square"), rows=4, count=500)]
    assert (found.shards, found.rows) == (500, 2000)


def test_an_added_group_needs_only_its_stage(tmp_path: Path) -> None:
    toy().run(tmp_path, RunOptions("inline", quiet=True))
    found = survey(opened(toy(add_cubes=True), tmp_path))
    assert found.work == [ShardBatch(("cube",), rows=4, count=5)]
    assert (found.groups["squares"].shards_done, found.groups["cubes"].rows_to_do) == (5, 20)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "store/squares").iterdir())
    assert found.groups["squares"].bytes_done == on_disk


def test_the_sample_is_spread_evenly_and_bounded(tmp_path: Path) -> None:
    found = survey(opened(toy(num_shards=5000), tmp_path))
    indices = [shard.index for shard in found.samples]
    steps = {b - a for a, b in pairwise(indices)}
    assert len(steps) == 1
    assert 512 <= len(indices) <= 1024
    assert indices[-1] + steps.pop() >= 5000


def test_another_number_of_rows_is_all_to_do(tmp_path: Path) -> None:
    toy().run(tmp_path, RunOptions("inline", quiet=True))
    state = opened(toy(), tmp_path)
    found = survey(state).scaled(1001, state.plan)
    assert found.work == [ShardBatch(("fetch", "square"), 4, 250), ShardBatch(("fetch", "square"), 1, 1)]
    assert (found.groups["squares"].shards_to_do, found.groups["squares"].rows_to_do) == (251, 1001)


def measure(workflow: Toy, out: Path) -> Measured:
    state = opened(workflow, out)
    return probe(state.plan, state.plan.stages, survey(state).samples, "inline", ExecutionConfig())


def test_the_probe_measures_every_stage_and_leaves_the_run_folder_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = measure(toy(num_shards=50, rows=20, add_cubes=True), out)
    assert not out.exists()
    assert list(found.stages) == ["fetch", "square", "cube"]
    assert found.rows == 1000, "so small an input is run whole"
    assert found.kept == pytest.approx(0.9), "one of ten is dropped"
    assert all(cost.seconds.at(20) > 0 and cost.unit == "rows" for cost in found.stages.values())
    assert found.stages["square"].bytes["squares"].at(18) == pytest.approx(18 * 7, rel=0.2)


def test_a_stage_that_fails_ends_the_probe_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"--probe: square failed on sample rows of the input: .*cannot square"):
        measure(toy(fail_shards=(0,)), tmp_path)
    with pytest.raises(PipelineError, match=r"toy\.model: not found") as failure:
        measure(toy(add_cubes=True, broken_setup=True), tmp_path)
    assert failure.value.exit_code == 4


def test_a_sample_without_one_good_row_is_refused(tmp_path: Path) -> None:
    state = opened(toy(num_shards=1, rows=8), tmp_path)
    sevens = [Shard(shard.index, [7, 17], 2) for shard in survey(state).samples]
    with pytest.raises(PipelineError, match=r"all 2 sample rows were dropped \(ends_in_seven\); check the source"):
        probe(state.plan, state.plan.stages, sevens, "inline", ExecutionConfig())


def basis(found: Survey, **changes: object) -> Basis:
    """Measured: fetch 1 ms a row on a CPU, square 3 ms a row and 100 bytes a kept row; 1 s start-up each."""
    cost = StageCost(1.0, LinearCost(0.0, 0.001), "rows", cores=1.0, bytes={"raw": LinearCost(0.0, 1e6)})
    square = StageCost(1.0, LinearCost(0.0, 0.003), "rows", cores=1.0, bytes={"squares": LinearCost(10.0, 100.0)})
    measured = Measured({"fetch": cost, "square": square}, run_start_s=5.0, kept=0.5, rows=10, seconds=1.0)
    hardware = Hardware(num_gpus=0, num_cpus=4)
    return replace(Basis(found, {}, measured, hardware, "local"), **changes)


def test_a_long_run_takes_the_work_by_the_cpus(tmp_path: Path) -> None:
    state = opened(toy(), tmp_path)
    given = basis(survey(state).scaled(40_000_000, state.plan))
    sizes = expected_bytes(state.plan, given)
    assert sizes == {"squares": 10_000_000 * 10 + 40_000_000 * 0.5 * 100}
    predicted = predict(state.plan, given, sizes)
    assert predicted["seconds"] == pytest.approx(40_000_000 * 0.004 / 4, rel=0.001)
    assert predicted["bottleneck"] == {"name": "cpus", "busy": 1.0, "mostly": "square"}
    assert [stage["alone_s"] for stage in predicted["stages"]] == [10_000, 30_000]
    assert predicted["object_store"]["usd_to_write"] == pytest.approx(10 * 5)


def test_a_slow_network_is_the_bottleneck_and_is_named(tmp_path: Path) -> None:
    state = opened(toy(), tmp_path)
    given = basis(
        survey(state).scaled(1_000_000, state.plan),
        hardware=Hardware(num_gpus=0, num_cpus=4, network_gbit_per_s=1.0, usd_per_cpu_hour=0.5),
        profile="mine",
    )
    predicted = predict(state.plan, given, expected_bytes(state.plan, given))
    network_s = 1_000_000 * 1e6 * 8 / 1e9
    assert network_s < predicted["seconds"] < 1.1 * network_s
    assert (predicted["bottleneck"]["name"], predicted["bottleneck"]["mostly"]) == ("network", "fetch")
    assert predicted["usd_compute"] == pytest.approx(4 * 0.5 * predicted["seconds"] / 3600)


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    toy().run(tmp_path, RunOptions("inline", quiet=True))
    state = opened(toy(), tmp_path)
    given = basis(survey(state))
    predicted = predict(state.plan, given, expected_bytes(state.plan, given))
    assert (predicted["seconds"], predicted["object_store"]["bytes"]) == (0.0, 0)
    assert predicted["bottleneck"]["name"] == "nothing to do"
