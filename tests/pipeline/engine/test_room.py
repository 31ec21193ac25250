"""Free disk is compared with what a run will write: at its start, in a plan, and by the doctor."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.engine import room
from pipeline.errors import MachineError
from pipeline.executors.base import ExecutionConfig
from pipeline.plan import Plan
from pipeline.storage.run_folder import RunFolder
from tests.commands import call, precompute, summary
from workflows.precompute import Precompute, PrecomputeConfig

MIB = 1 << 20
ROWS, SIDE = 4000, 256
SMALL = (f"source.num_samples={ROWS}", "shard_size=1000", f"images.sizes_px=[{SIDE}]", "encoders=[]")
ROW_BYTES = SIDE * SIDE * 3 + 200
EXPECTED, CERTAIN = 3500 * ROW_BYTES, 3000 * ROW_BYTES  # at the start the last shard counts as half a shard

Disks = Callable[[Mapping[Path, int]], None]


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> Disks:
    """disks({folder: free bytes}) makes each of these folders a file system of its own."""

    def pretend(free: Mapping[Path, int]) -> None:
        def of(path: object) -> Path:
            return next((f for f in free if Path(str(path)).is_relative_to(f)), Path("/"))

        usage = lambda path: SimpleNamespace(total=1 << 50, free=free.get(of(path), 1 << 45))  # noqa: E731
        monkeypatch.setattr(shutil, "disk_usage", usage)
        monkeypatch.setattr(room, "_device", lambda path: list(free).index(of(path)))
        monkeypatch.setattr(room, "mount_point", of)

    return pretend


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def planned(out: Path, **settings: object) -> tuple[Plan, RunFolder]:
    config = PrecomputeConfig.model_validate(
        {
            "source": {"kind": "synthetic", "num_samples": ROWS},
            "images": {"sizes_px": [SIDE]},
            "encoders": [],
            **settings,
        }
    )
    run = RunFolder(str(out))
    return Precompute(config).plan(run), run


def check(plan: Plan, run: RunFolder, **execution: object) -> list[str]:
    return room.check_room(plan, run, ExecutionConfig.model_validate(execution), here=True, refuse=True)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(
    tmp_path: Path, temporary: Path, disks: Disks
) -> None:
    disks({temporary: 1 << 40, tmp_path: 200 * MIB})
    result = precompute(tmp_path / "run", *SMALL)
    assert result.code == 4
    assert f"run folder at {tmp_path}: 656.9 MiB to write, 200.0 MiB free" in result.err
    assert "it cannot be less than 253.4 MiB. Make room" in result.err
    assert "execution.disk_check=warn" in result.err
    assert not (tmp_path / "run/store").exists()
    assert not (tmp_path / "run/config.yaml").exists()


def test_what_is_expected_and_does_not_fit_is_a_warning_and_what_fits_is_none(
    tmp_path: Path, temporary: Path, disks: Disks
) -> None:
    plan, run = planned(tmp_path / "run")
    disks({temporary: 1 << 40, tmp_path: EXPECTED - 1})
    (warning,) = check(plan, run)
    assert warning.startswith(f"disk: run folder at {tmp_path}: 656.9 MiB to write, 656.9 MiB free; if the disk gets")
    disks({temporary: 1 << 40, tmp_path: EXPECTED})
    assert check(plan, run) == []


def test_the_least_counts_the_samples_that_may_be_dropped_and_an_option_only_warns(
    tmp_path: Path, temporary: Path, disks: Disks
) -> None:
    free = round(0.9 * 0.8 * CERTAIN)
    plan, run = planned(tmp_path / "run", max_drop_fraction=0.2)
    disks({temporary: 1 << 40, tmp_path: free})
    assert len(check(plan, run)) == 1
    disks({temporary: 1 << 40, tmp_path: free - 1})
    with pytest.raises(MachineError, match="it cannot be less than"):
        check(plan, run)
    assert len(check(plan, run, disk_check="warn")) == 1
    assert len(room.check_room(plan, run, ExecutionConfig(), here=True, refuse=False)) == 1


def test_finished_shards_are_not_counted_again(tmp_path: Path, temporary: Path, disks: Disks) -> None:
    plan, run = planned(tmp_path / "run")
    for group in ("samples", f"images-{SIDE}"):
        (tmp_path / "run/state" / group).mkdir(parents=True)
        for shard in range(2):
            (tmp_path / "run/state" / group / f"{shard:05d}.json").write_text("{}")
    disks({temporary: 1 << 40, tmp_path: 1500 * ROW_BYTES - 1})
    assert "281.5 MiB to write" in check(plan, run)[0]
    disks({temporary: 1 << 40, tmp_path: 1500 * ROW_BYTES})
    assert check(plan, run) == []


def test_groups_of_unknown_size_are_named_and_an_unknown_number_of_rows_is_not_guessed(
    tmp_path: Path, temporary: Path, disks: Disks
) -> None:
    disks({temporary: 1 << 40, tmp_path: 1})
    plan, run = planned(tmp_path / "run", images={"sizes_px": [SIDE], "codec": "webp"}, max_drop_fraction=0.999999)
    assert "683.6 KiB, and images-256 (of unknown size) to write" in check(plan, run)[0]
    assert check(replace(plan, estimated_shards=None), run) == []


def test_where_no_size_is_known_no_bytes_are_said() -> None:
    found = str(room.Room("/disk", ("run folder",), 1 << 30, 0, 0, ("export",)))
    assert found == "run folder at /disk: export (of unknown size) to write, 1.0 GiB free"


def test_temporary_files_on_the_same_file_system_share_its_room(tmp_path: Path, temporary: Path, disks: Disks) -> None:
    plan, run = planned(tmp_path / "run")
    disks({tmp_path: EXPECTED - 1})
    (warning,) = check(plan, run)
    assert "run folder and temporary files (TMPDIR) at" in warning


def test_on_an_object_store_only_temporary_files_count(tmp_path: Path, temporary: Path, disks: Disks) -> None:
    plan, _ = planned(tmp_path / "run")
    far = cast(Any, SimpleNamespace(storage=SimpleNamespace(local=temporary)))
    shard = 1000 * ROW_BYTES
    disks({temporary: 2 * shard - 1, tmp_path: 0})
    (warning,) = check(plan, far, num_cpus=2)
    assert warning.startswith(f"disk: temporary files (TMPDIR) at {temporary}: ")
    disks({temporary: 2 * shard, tmp_path: 0})
    assert check(plan, far, num_cpus=2) == []
    disks({temporary: shard // 3, tmp_path: 0})
    with pytest.raises(MachineError, match="TMPDIR"):
        check(plan, far, num_cpus=2)
    assert room.check_room(plan, far, ExecutionConfig(), here=False, refuse=True) == []


def test_the_plan_and_the_doctor_show_free_disk_beside_planned_bytes(
    tmp_path: Path, temporary: Path, disks: Disks
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    disks({temporary: 1 << 40, tmp_path: 200 * MIB})
    small = ("plan", "precompute", "--out", str(out), *SMALL)
    text = call(*small, "--save").out
    assert f"disk: run folder at {tmp_path}: 750.8 MiB to write, 200.0 MiB free, too little; it cannot be less" in text
    assert f"disk: temporary files (TMPDIR) at {temporary}: 0 B to write, 1.0 TiB free\n" in text
    (first, _) = json.loads(call(*small, "--json").out)["disk"]
    assert (first["expected_bytes"], first["free_bytes"]) == (ROWS * ROW_BYTES, 200 * MIB)
    result = call("doctor", "--out", str(out), "--json")
    assert result.code == 4
    checks = [check for check in json.loads(result.out) if check["name"] == "planned bytes"]
    assert [check["status"] for check in checks] == ["bad", "ok"]
    disks({temporary: 1 << 40, tmp_path: 1 << 40})
    checks = json.loads(call("doctor", "--out", str(out), "--json").out)
    assert [check["status"] for check in checks if check["name"] == "planned bytes"] == ["ok", "ok"]


def test_the_doctor_without_a_saved_plan_says_how_to_make_one(tmp_path: Path) -> None:
    result = call("doctor", "--out", str(tmp_path))
    assert result.code == 2
    assert "no plan with bytes; make one with `pipeline plan ... --save`" in result.err


def test_a_warning_is_in_the_summary_of_the_run(tmp_path: Path, temporary: Path, disks: Disks) -> None:
    disks({temporary: 1 << 40, tmp_path: 1})
    small = ("source.num_samples=2", "shard_size=1", "images.sizes_px=[16]", "encoders=[]")
    assert precompute(tmp_path / "run", *small, "execution.disk_check=warn").code == 0
    (notice,) = summary(tmp_path / "run")["notices"]
    assert notice.startswith("disk: run folder at ")
