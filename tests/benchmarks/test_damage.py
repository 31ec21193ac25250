"""The damages of `benchmarks/damage.py`: every combination is tried, each on one file, and a bad end is told."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import damage
from tests.runs import REPOSITORY


def test_each_kind_of_file_meets_each_damage_and_each_command_that_writes() -> None:
    found = damage.cases(0, None)
    assert len(set(found)) == len(found) > 1000
    assert {case.kind for case in found if case.place == "run"} == set(damage.KINDS["run"])
    kept = [case for case in found if (case.place, case.store_format, case.kind) == ("run", "hdf5", "removal")]
    assert len(kept) == len(damage.DAMAGES) * 7
    assert damage.cases(0, 5) == found[:5] != damage.cases(1, 5)


@pytest.mark.parametrize("how", damage.DAMAGES)
def test_a_damage_changes_one_file_of_its_kind(tmp_path: Path, how: str) -> None:
    names = ["samples/00000.parquet", "samples/00001.parquet", "removed/00001.json"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes([65 + number]) * 5000)
    before = {name: (tmp_path / name).read_bytes() for name in names}
    name = damage.damage_file(tmp_path, "samples", "store", how, random.Random(3))
    after = {name: (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None for name in names}
    assert [other for other in names if before[other] != after[other]] == [name]
    assert name.startswith("samples/")
    assert damage.damage_file(tmp_path, "probe", "store", how, random.Random(3)) == "", "there is none"


def test_a_process_that_fails_or_hangs_is_an_outcome(tmp_path: Path) -> None:
    assert damage.in_process(lambda: {"outcome": "harmless"}, tmp_path) == {"outcome": "harmless"}
    assert damage.in_process(lambda: 1 // 0, tmp_path)["outcome"] == "traceback"
    assert damage.in_process(lambda: __import__("os")._exit(3), tmp_path)["outcome"] == "crash"
    assert damage.in_process(lambda: __import__("time").sleep(60), tmp_path, timeout_s=0.05)["outcome"] == "hung"


@pytest.mark.slow
def test_some_damages_are_refused_found_or_harmless_and_a_second_call_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.damage", "--work", str(tmp_path / "work")]
    for tries in ("6", "9"):
        out = ["--tries", tries, "--out", str(tmp_path / "damage.json")]
        subprocess.run([*command, *out], cwd=REPOSITORY, check=True, timeout=1000)
        lines = (tmp_path / "work" / "tries.jsonl").read_text().splitlines()
        assert [json.loads(line)["number"] for line in lines] == list(range(int(tries)))
    (ratio,) = json.loads((tmp_path / "damage.json").read_text())["ratios"].values()
    assert ratio == 1
