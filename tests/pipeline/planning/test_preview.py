"""`pipeline plan` predicts what a run then does."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.planning.hardware import load_profile, profiles
from stages.encoders.t5 import T5EncoderConfig
from stages.encoders.tiny import TINY_MODEL
from stages.sources.synthetic.scenes import scene
from tests.commands import call, precompute

SMALL = ["source.num_samples=120", "shard_size=40", "images.sizes_px=[16,48]"]
MACHINE = {
    "num_gpus": 2,
    "num_cpus": 64,
    "tflops": {"bfloat16": 1e-6},
    "utilisation": 0.5,
    "cpu_s_per_row": {"fetch": 0.001, "resize": 0.002},
    "usd_per_gpu_hour": 3.0,
}


def plan(*arguments: str) -> dict[str, Any]:
    result = call("plan", "precompute", "--json", *arguments)
    assert result.code == 0, result.err
    return json.loads(result.out)


@pytest.fixture(autouse=True)
def no_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the probe runs all rows of these small inputs on a busy machine too."""
    monkeypatch.setattr("pipeline.planning.probe._BUDGET_S", 600.0)


@pytest.fixture
def machine(tmp_path: Path) -> str:
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump(MACHINE))
    return str(path)


@pytest.mark.parametrize("store", ["parquet", "hdf5"])
@pytest.mark.slow
def test_bytes_are_predicted_within_two_percent(tmp_path: Path, store: str) -> None:
    config = [*SMALL, f"store.format={store}"]
    out = tmp_path / "run"
    planned = plan("--out", str(out), "--probe", "--executor", "inline", *config)
    assert not out.exists(), "the probe works elsewhere"
    assert precompute(out, *config).code == 0
    for name, group in planned["groups"].items():
        on_disk = sum(path.stat().st_size for path in (out / "store" / name).glob("0*"))
        assert group["bytes_to_do"] == pytest.approx(on_disk, rel=0.02), name


@pytest.mark.slow
def test_without_a_probe_text_bytes_are_known_and_time_is_not(tmp_path: Path) -> None:
    out = tmp_path / "run"
    planned = plan("--out", str(out), *SMALL)
    assert planned["estimate"] is None
    assert precompute(out, *SMALL).code == 0
    on_disk = sum(path.stat().st_size for path in (out / "store/text-t5").glob("0*"))
    assert planned["groups"]["text-t5"]["bytes_to_do"] == pytest.approx(on_disk, rel=0.02)
    assert "--probe measures it here" in call("plan", "precompute", "--out", str(out), *SMALL).out


@pytest.mark.parametrize(("dtype", "padded", "size"), [("float32", "float32", 4), ("int8", "bfloat16", 2)])
def test_a_plan_compares_with_padded_tensors(tmp_path: Path, dtype: str, padded: str, size: int) -> None:
    planned = call("plan", "precompute", "--json", "--out", str(tmp_path / "run"), *SMALL, f"store.dtype={dtype}")
    group = json.loads(planned.out)["groups"]["text-t5"]
    shards = [{c for i in range(s, s + 40) for c in scene(0, i, split="train").captions} for s in (0, 40, 80)]
    layout = f"padded to 128 tokens in {padded}"
    assert group["bytes_otherwise"] == {layout: sum(map(len, shards)) * 128 * 64 * size}
    shown = call("plan", "precompute", "--out", str(tmp_path / "run"), *SMALL, f"store.dtype={dtype}").out
    times = group["bytes_otherwise"][layout] / group["bytes_to_do"]
    assert f"stored; {layout}: " in shown
    assert f"{times:.3g} times as much" in shown


def test_a_profile_turns_counted_flops_into_gpu_hours(machine: str) -> None:
    planned = plan("--profile", machine, *SMALL)
    encoder = T5EncoderConfig(name="t5", model=TINY_MODEL)
    shards = [[scene(0, i, split="train").captions for i in range(s, s + 40)] for s in (0, 40, 80)]
    work = [encoder.workload(list(dict.fromkeys(c for captions in shard for c in captions))) for shard in shards]
    seconds = sum(w.flops for w in work) / (1e6 * 0.5)
    stage = planned["estimate"]["stages"][-1]
    assert stage["tokens"] == sum(sum(w.tokens) for w in work)
    assert stage["gpu_hours"] == pytest.approx(seconds / 3600)
    assert stage["alone_s"] == pytest.approx(seconds / 2, abs=0.01), "two GPUs"
    assert planned["estimate"]["bottleneck"]["name"] in ("gpus", "workers of encode-t5")
    assert planned["estimate"]["usd_compute"] == pytest.approx(2 * 3 * planned["estimate"]["seconds"] / 3600, rel=0.01)


def test_more_rows_cost_in_proportion(machine: str) -> None:
    small = plan("--profile", machine, "--rows", "1200", *SMALL)
    large = plan("--profile", machine, "--rows", "120000", *SMALL)
    assert (large["shards"], large["input_rows"]) == (3000, 120_000)
    for name, group in large["groups"].items():
        assert group["bytes_to_do"] == pytest.approx(100 * small["groups"][name]["bytes_to_do"], rel=1e-4)
    assert large["estimate"]["gpu_hours"] == pytest.approx(100 * small["estimate"]["gpu_hours"])
    assert large["estimate"]["seconds"] == pytest.approx(large["estimate"]["stages"][-1]["alone_s"], rel=0.01)


@pytest.mark.slow
def test_a_probe_for_a_profile_runs_no_model(machine: str) -> None:
    planned = plan("--profile", machine, "--probe", "--executor", "inline", *SMALL)
    assert "fetch, resize measured here on 120 rows" in planned["estimate"]["basis"]
    assert planned["estimate"]["kept"] == pytest.approx(119 / 120, abs=1e-3)


@pytest.mark.slow
def test_the_report_compares_a_run_with_its_saved_plan(tmp_path: Path) -> None:
    out = tmp_path / "run"
    plan("--out", str(out), "--probe", "--save", "--executor", "inline", *SMALL)
    assert [path.name for path in out.iterdir()] == ["estimate.json"]
    assert precompute(out, *SMALL).code == 0
    result = call("report", str(out), "--json")
    planned = json.loads(result.out)["planned"]
    assert {row["group"]: round(row["ratio"], 1) for row in planned["groups"]} == dict.fromkeys(
        ("samples", "images-16", "images-48", "text-t5"), 1.0
    )
    assert [row["stage"] for row in planned["stages"]] == ["all, overlapping", "fetch", "resize", "encode-t5"]
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    busy = sum(e["seconds"] - e["setup_s"] for e in events if e.get("stage") == "resize")
    assert planned["stages"][2]["actual"] == pytest.approx(busy, abs=0.01)
    assert "planned / actual 1.0" in call("report", str(out)).out
    assert "Planned and actual" in (out / "report/index.html").read_text()


@pytest.mark.slow
def test_what_is_finished_is_neither_counted_nor_probed(tmp_path: Path, machine: str) -> None:
    out = tmp_path / "run"
    assert precompute(out, *SMALL).code == 0
    done = plan("--out", str(out), "--probe", "--executor", "inline", *SMALL)["estimate"]
    assert (done["seconds"], done["stages"], done["object_store"]["bytes"]) == (0.0, [], 0)
    second = 'encoders=[{"name": "t5", "model": "tiny-random-t5"}, {"name": "b", "model": "tiny-random-t5"}]'
    added = plan("--out", str(out), "--profile", machine, *SMALL, second)
    assert [stage["stage"] for stage in added["estimate"]["stages"]] == ["encode-b"]
    assert added["groups"]["text-t5"]["bytes_to_do"] == 0
    assert added["groups"]["text-b"]["bytes_to_do"] == pytest.approx(
        added["groups"]["text-t5"]["bytes_done"], rel=0.02
    )


@pytest.mark.slow
def test_a_plan_of_another_configuration_is_not_compared(tmp_path: Path) -> None:
    out = tmp_path / "run"
    plan("--out", str(out), "--save", *SMALL)
    assert precompute(out, *SMALL, "images.sizes_px=[24]").code == 0
    assert json.loads(call("report", str(out), "--json").out)["planned"] == {"same_configuration": False}
    assert "planned with another configuration" in call("report", str(out)).out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--profile", "h300"], "--profile h300: no such file or shipped profile; shipped: a100x8, cpu16"),
        (["--profile", "no.yaml"], "config file no.yaml: cannot be read"),
        (["--save", "--rows", "9"], "--save: a plan for --rows 9 is not one for the run"),
        (["--profile", "{machine}", "encoders.0.compute_dtype=float32"], "tflops has no float32, the compute_dtype"),
        (["--profile", "{bare}"], "cpu_s_per_row has no fetch; add it, or measure it with --probe"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path: Path, machine: str, arguments: list[str], says: str) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text(yaml.safe_dump({**MACHINE, "cpu_s_per_row": {}}))
    given = [argument.format(machine=machine, bare=bare) for argument in arguments]
    result = call("plan", "precompute", "--out", str(tmp_path / "run"), *SMALL, *given)
    assert (result.code, result.out) == (2, "")
    assert says in result.err


def test_a_training_is_not_planned_by_shards(tmp_path: Path) -> None:
    result = call("plan", "train", "-c", "minimagen-base-test", "--probe", f"store={tmp_path}")
    assert result.code == 2
    assert "train has no shards to plan" in result.err


def test_every_shipped_profile_is_whole() -> None:
    assert set(profiles()) == {"h200x1", "h200x8", "a100x8", "l4x1", "cpu16"}
    for name in profiles():
        hardware = load_profile(name)
        assert set(hardware.tflops) == {"bfloat16", "float32"}
        assert set(hardware.cpu_s_per_row) == {"fetch", "resize", "read-captions"}
        assert hardware.usd_per_hour
        for line in profiles()[name].read_text().splitlines()[3:]:
            assert "#" in line or line.endswith(":"), f"{name}: {line} has no source"


@pytest.mark.parametrize("name", profiles())
def test_a_shipped_profile_knows_what_each_set_of_captions_costs_to_read(name: str) -> None:
    hardware = load_profile(name)
    cost = hardware.seconds_per_row("read-captions")
    assert cost is not None
    assert hardware.seconds_per_row("read-captions-short") == cost
    assert hardware.seconds_per_row("read") is None
